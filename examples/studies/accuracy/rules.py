"""Judges every rule on the recorded runs, and leaves one row a run in `results.csv`.

    python examples/studies/accuracy/rules.py RUNS

`RUNS` is the folder that `make.py` has filled. The criterion is computed by the package's own `RiskEstimate`, which
gets the outputs that were recorded. A rule chooses an epoch from what it may see; it pays by correct test labels.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

sys.path.insert(0, str(Path(__file__).parents[1] / "early_stopping"))
from runs import learned

from lightning_sensitivity import RiskEstimate
from lightning_sensitivity.functional import Reference, loss_estimate
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.functional.sums import TEMPERATURES, UNCHANGED, LabelSums, label_sums
from lightning_sensitivity.functional.tasks import find_task

HERE = Path(__file__).parent
REPORT = {"people": 1000, "random": 17000, "as_built": 18000, "tables": 19000, "by_class": 20000}  # first seeds
COUNTS, NUM_DRAWS = (20, 50, 100, 200), 20  # of noisy labels by which an epoch is chosen, and of draws of them
VOTES, VOTES_FROM = 2.0, 0.15  # of a candidate that was not adopted
SIGMA = 0.1
Choice = tuple[int, float]  # an epoch, and the temperature by which its logits are divided


class Recorded:
    """A recorded training: outputs (E, N, K) of each epoch, and labels."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as found:
            self.found = dict(found)
        self.task = "binary" if self["about_is_binary"] else "multiclass"
        self.num_epochs = len(self.found["test"])
        batch = np.arange(120)
        places = np.concatenate([batch + 120 * index for index in self.found["unseen_batches"]])
        self.places = places[places < len(self.found["unseen_given"])]  # of the unseen samples that were kept

    def __getitem__(self, name: str) -> Any:
        return self.found[name].item()

    def outputs(self, name: str) -> Tensor:
        return torch.tensor(self.found[name].astype(np.float32))

    def labels(self, name: str) -> Tensor:
        return torch.tensor(self.found[name])[self.places]

    def logits(self, name: str) -> Tensor:
        outputs = self.outputs(name)
        return torch.cat([torch.zeros_like(outputs), outputs], -1) if self.task == "binary" else outputs

    @cached_property
    def accuracy(self) -> np.ndarray:
        right = self.logits("test").argmax(-1) == torch.tensor(self.found["test_labels"])
        return 100 * right.double().mean(1).numpy()

    def loss(self, epoch: int, temperature: float = 1.0) -> float:
        """Give the test loss of an epoch whose logits are divided by a temperature."""
        labels = torch.tensor(self.found["test_labels"])
        return float(cross_entropy(self.logits("test")[epoch] / temperature, labels))

    @cached_property
    def losses(self) -> np.ndarray:
        return np.array([self.loss(epoch) for epoch in range(self.num_epochs)])

    @property
    def counts(self) -> bool:
        return learned(self.accuracy / 100, self["about_num_classes"]) and bool(np.isfinite(self.losses).all())

    @cached_property
    def reference(self) -> Reference | None:
        if "reference_predictions" not in self.found:
            return None
        numbers = {name: self[f"reference_{name}"] for name in ("score", "chance", "claim", "noise")}
        tensors = ("predictions", "shares", "leave_one_out")
        return Reference(**numbers, **{name: torch.tensor(self.found[f"reference_{name}"]) for name in tensors})

    def measured(self, rows: Tensor, with_labels: bool) -> dict[str, np.ndarray]:
        """Give what `RiskEstimate` computes of each epoch from some of the unseen samples."""
        reference, calibration, values = self.reference, None, []
        labels, scored = self.labels("unseen_given")[rows], torch.tensor(self.found["scored_labels"])
        predictions = None if reference is None else reference.predictions[rows]
        names = ("unseen", "twins", "baseline" if "baseline" in self.found else "unseen", "training")
        for unseen, twins, baseline, training in zip(*map(self.outputs, names), strict=True):
            numbers = {name: self[name] for name in ("num_training", "num_weights")}
            metric = RiskEstimate(
                self.task, strength=TWIN_STRENGTH, reference=reference, calibration=calibration, **numbers
            )
            others = list(twins[rows].unbind(1))
            metric.update(unseen[rows], others, baseline_outputs=baseline[rows], reference=predictions)
            metric.update_training(training, scored)
            if with_labels:
                metric.update_labels(unseen[rows], labels)
            values.append({name: float(value) for name, value in metric.compute().items()})
            calibration = metric.calibration
        return {name: np.array([row.get(name, np.nan) for row in values]) for name in values[0]}

    def scores(self, labels: Tensor, rows: Tensor) -> Tensor:
        """Give the Brier score of each label of some unseen samples, at each temperature and epoch, (T, E, N)."""
        logits, y = self.logits("unseen")[:, rows], one_hot(labels[rows], self["about_num_classes"])
        scores = torch.stack([((logits / t).softmax(-1) - y).square().sum(-1) for t in TEMPERATURES])
        return scores / 2 if self.task == "binary" else scores

    def scores_of_training(self) -> np.ndarray:
        """Give the Brier score on kept training samples, by epoch."""
        task, labels = find_task(self.task), torch.tensor(self.found["scored_labels"])
        sums = [label_sums(outputs, labels, task)[UNCHANGED] for outputs in self.outputs("training")]
        return np.array([float(each[1] / each[0]) for each in sums])

    def test_scores(self) -> np.ndarray:
        """Give the Brier score of noisy labels of the test samples, at each temperature and epoch."""
        task, labels = find_task(self.task), torch.tensor(self.found["test_noisy"])
        found = [LabelSums(*label_sums(outputs, labels, task).T) for outputs in self.outputs("test")]
        return np.array([(sums.score / sums.num_scored).numpy() for sums in found]).T

    def votes(self) -> np.ndarray:
        """Give the mean probability that the reference has for the network's class, by epoch."""
        assert self.reference is not None
        q = self.reference.predictions
        q = torch.cat([1 - q, q], 1) if self.task == "binary" else q
        classes = self.logits("unseen").argmax(-1)
        return np.array([float(q.gather(1, each[:, None]).mean()) for each in classes])


# %% The rules.
def lowest(curve: np.ndarray) -> int:
    return int(np.nanargmin(curve))


def refined(scores: np.ndarray) -> Choice:
    """Choose the lowest of scores at each temperature and epoch, (T, E)."""
    epoch = lowest(scores.min(0))
    return epoch, TEMPERATURES[int(scores[:, epoch].argmin())]


def rules_without_labels(run: Recorded) -> dict[str, Choice]:
    """Choose from training labels and 600 unlabelled samples."""
    rows = torch.arange(len(run.places))
    values = run.measured(rows, with_labels=False)
    criterion, temperatures = values["risk_criterion"], values["risk_temperature"]
    chosen = {"never_stop": run.num_epochs - 1, "criterion": lowest(criterion)}
    found = {name: (epoch, float(temperatures[epoch])) for name, epoch in chosen.items()}
    found["criterion_before"] = lowest(run.found["val_risk_criterion"]), 1.0
    found["estimate"] = lowest(values["risk_estimate"]), 1.0
    training = run.scores_of_training()
    found["training_score"] = lowest(training), 1.0
    reference = run.reference
    found["reference"] = (lowest(values["risk_reference"]), 1.0) if reference is not None else found["never_stop"]
    noise = values.get("risk_label_noise", np.zeros(1))[0]
    is_gated = reference is not None and noise >= VOTES_FROM
    votes = run.votes() if is_gated else np.zeros(run.num_epochs)
    epoch = lowest(criterion + VOTES * (1 - votes) * is_gated)
    found["criterion_with_votes"] = epoch, float(temperatures[epoch])
    found |= rules_by_sensitivity(run)
    test = run.test_scores()
    found["true_score"], found["true_refined_score"] = (lowest(test[UNCHANGED]), 1.0), refined(test)
    return found


def rules_by_sensitivity(run: Recorded) -> dict[str, Choice]:
    """Choose by output sensitivity: its lowest value, its knee, and the loss that Equation 9 of the paper has of it."""
    if "val_output_sensitivity" not in run.found:
        return {}
    s = run.found["val_output_sensitivity"]
    if not np.isfinite(s).all() or s.min() <= 0:
        return {}
    power = run["input_power"] / SIGMA**2
    num_classes = max(2, run["about_num_classes"])
    equation = [float(loss_estimate(torch.tensor(value), power, 1.0, num_classes)) for value in s]
    return {
        "sensitivity_lowest": (lowest(s), 1.0),
        "sensitivity_knee": (knee(np.log(s)), 1.0),
        "equation_9": (lowest(np.array(equation)), 1.0),
    }


def knee(curve: np.ndarray) -> int:
    """Give the place of a rising curve that is farthest above the line from its first to its last value."""
    line = np.linspace(curve[0], curve[-1], len(curve))
    return int((curve - line).argmax())


def rules_with_labels(run: Recorded) -> dict[str, Choice]:
    """Choose from a tenth of the training samples that was held out, with its noisy labels."""
    labels = run.labels("unseen_given")
    rows = (labels >= 0).nonzero()[:, 0]
    values, scores = run.measured(rows, with_labels=True), run.scores(labels, rows).mean(-1).numpy()
    logits = run.logits("unseen")[:, rows]
    errors = (logits.argmax(-1) != labels[rows]).double().mean(1).numpy()
    losses = np.array([float(cross_entropy(each, labels[rows])) for each in logits])
    epoch = lowest(values["risk_criterion"])
    last = run.num_epochs - 1
    return {
        "held_out_never_stop": (last, TEMPERATURES[int(scores[:, last].argmin())]),
        "held_out_score": (lowest(scores[UNCHANGED]), 1.0),
        "held_out_refined": refined(scores),
        "held_out_error": (lowest(errors), 1.0),
        "held_out_loss": (lowest(losses), 1.0),
        "held_out_criterion": (epoch, float(values["risk_temperature"][epoch])),
        "held_out_criterion_before": (lowest(run.found["val_risk_criterion"]), 1.0),
    }


def rules_by_few_labels(run: Recorded) -> Iterator[tuple[str, Choice]]:
    """Choose by some noisy labels alone, over and over: by their Brier score, the refined one, and the error."""
    labels, generator = run.labels("unseen_noisy"), torch.Generator().manual_seed(0)
    of_samples = run.scores(labels, torch.arange(len(labels)))
    wrong = (run.logits("unseen").argmax(-1) != labels).float()
    for count in COUNTS:
        for _ in range(NUM_DRAWS):
            rows = torch.randperm(len(labels), generator=generator)[:count]
            scores, errors = of_samples[..., rows].mean(-1).numpy(), wrong[:, rows].mean(-1).numpy()
            yield f"noisy_labels_{count}_score", (lowest(scores[UNCHANGED]), 1.0)
            yield f"noisy_labels_{count}_refined", refined(scores)
            yield f"noisy_labels_{count}_error", (lowest(errors), 1.0)


# %% What they cost.
def judged(folder: Path) -> dict[str, object] | None:
    """Give the row of a run; None if it learned nothing.

    It has for each rule: accuracy lost in points, and by how many percent the test loss is above its lowest, of the
    logits as they are and divided by the temperature.
    """
    full, fewer = Recorded(folder / "full.npz"), Recorded(folder / "fewer.npz")
    if not full.counts:
        return None
    chosen = [(full, rule, choice) for rule, choice in rules_without_labels(full).items()]
    chosen += [(fewer, rule, choice) for rule, choice in rules_with_labels(fewer).items()]
    chosen += [(full, rule, choice) for rule, choice in rules_by_few_labels(full)]
    best, least = full.accuracy.max(), full.losses.min()
    rows = [
        {
            "rule": rule,
            "epoch": epoch,
            "accuracy_lost": best - run.accuracy[epoch],
            "loss_regret": 100 * (run.losses[epoch] / least - 1),
            "calibrated_loss_regret": 100 * (run.loss(epoch, temperature) / least - 1),
        }
        for run, rule, (epoch, temperature) in chosen
    ]
    means = pd.DataFrame(rows).groupby("rule", sort=False).mean()
    return about(folder, full) | {
        f"{rule}_{name}": value for rule, row in means.iterrows() for name, value in row.items()
    }


def about(folder: Path, run: Recorded) -> dict[str, object]:
    pool, _, seed = folder.name.rpartition("_")
    wrong = (run.found["train_labels"] != run.found["train_correct"]).mean()
    reference = run.reference
    return {
        "run": folder.name,
        "pool": pool.replace("_", " "),
        "seed": int(seed),
        "kind": run["about_kind"],
        "labels": run["about_labels"],
        "n": run["about_n"],
        "epochs": run.num_epochs,
        "share_wrong": float(wrong),
        "label_noise": np.nan if reference is None else reference.noise,
        "is_augmented": bool(run["about_is_augmented"]),
        "is_fine_tuned": "fine-tuned" in run["about_kind"],
    }


def is_of_report(folder: Path) -> bool:
    pool, _, seed = folder.name.rpartition("_")
    return seed.isdigit() and pool in REPORT and int(seed) >= REPORT[pool] and (folder / "fewer.npz").exists()


def main() -> None:
    folders = sorted(folder for folder in Path(sys.argv[1]).iterdir() if is_of_report(folder))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        rows = [row for row in pool.map(judged, folders) if row is not None]
    pd.DataFrame(rows).to_csv(HERE / "results.csv", index=False, float_format="%.4g")
    print(f"{len(folders)} runs, {len(rows)} of which learned something: results.csv")


if __name__ == "__main__":
    main()
