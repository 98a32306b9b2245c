"""The rules, as they were frozen: each gives a number an epoch from what it may see, and takes the epoch of the best.

References and expected values are the package's own; metrics of labels are as scikit-learn's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from lightning_sensitivity.functional import draw_labels, expected_metric
from lightning_sensitivity.functional.expected import WEIGHT, Estimate, combine
from lightning_sensitivity.reference.reference import Reference

PATIENCE = 1 / 3  # of all epochs, without a better value of what one keeps by, where one stops to save time
VALUES = ("loss", "accuracy", "auc")  # what one keeps by
COUNTS, NUM_DRAWS = (50, 100, 200, 600), 20  # of noisy labels that choose an epoch, and draws of them
TEMPERATURES = tuple(2 ** (half / 2) for half in range(-2, 7))  # from 0.5 to 8, of the refined score
NUM_METRIC_DRAWS = 5  # of labels that choose by a metric or loss of their own: a tenth, or all 600


# %% Metrics: of labels, and as they are expected.
def accuracy(p: np.ndarray, y: np.ndarray) -> float:
    return float((p.argmax(1) == y).mean())


def auc(p: np.ndarray, y: np.ndarray) -> float:
    """Compute the area under the ROC curve, mean over the classes that occur; nan if only one does."""
    classes, counts = np.unique(y, return_counts=True)
    if len(classes) == 1:
        return float("nan")
    sums = np.array([rankdata(p[:, each])[y == each].sum() for each in classes])
    return float(((sums - counts * (counts + 1) / 2) / counts / (len(y) - counts)).mean())


def balanced(p: np.ndarray, y: np.ndarray) -> float:
    is_right = p.argmax(1) == y
    return float(np.mean([is_right[y == each].mean() for each in np.unique(y)]))


def f1(p: np.ndarray, y: np.ndarray) -> float:
    """Compute the mean F1 of the classes that occur or are predicted."""
    said = p.argmax(1)
    classes = np.union1d(said, y)
    return float(np.mean([2 * ((said == k) & (y == k)).sum() / ((said == k).sum() + (y == k).sum()) for k in classes]))


GAINS = {"accuracy": accuracy, "auc": auc, "balanced": balanced, "f1": f1}


def loss(p: np.ndarray, y: np.ndarray) -> float:
    """Compute the log-loss, or the squared error of a regression."""
    if p.shape[1] == 1:
        return float(np.square(p[:, 0] - y).mean())
    return float(-np.log(p[np.arange(len(y)), y].clip(1e-12)).mean())


def metrics(num_classes: int) -> dict[str, Metric]:
    """Return what is expected of a classification."""
    return {
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "auc": MulticlassAUROC(num_classes),
        "balanced": MulticlassAccuracy(num_classes, average="macro"),
        "f1": MulticlassF1Score(num_classes, average="macro"),
    }


# %% What was recorded.
@dataclass(eq=False)
class Recorded:
    """A recorded training: outputs by epoch, and labels. One logit counts as two classes."""

    found: dict[str, np.ndarray]

    @classmethod
    def read(cls, file: Path) -> Recorded:
        with np.load(file) as found:
            return cls(dict(found))

    @property
    def task(self) -> str:
        """``"multiclass"`` or ``"regression"``."""
        return "regression" if str(self.found["task"]) == "regression" else "multiclass"

    def outputs(self, name: str) -> Tensor:
        """Return logits (E, N, C), or numbers (E, N, 1)."""
        outputs = torch.tensor(self.found[name].astype(np.float32))
        is_binary = str(self.found["task"]) == "binary"
        return torch.cat([torch.zeros_like(outputs), outputs], 2) if is_binary else outputs

    def predictions(self, name: str) -> np.ndarray:
        """Return probabilities (E, N, C), or numbers (E, N, 1)."""
        outputs = self.outputs(name).double()
        return (outputs if self.task == "regression" else outputs.softmax(2)).numpy()

    def labels(self, name: str, num_outputs: int) -> Tensor:
        """Return labels as a matrix (N, C)."""
        return self.as_matrix(self.found[name], num_outputs)

    def as_matrix(self, labels: np.ndarray, num_outputs: int) -> Tensor:
        y = torch.tensor(labels)
        return y[:, None] if self.task == "regression" else torch.nn.functional.one_hot(y, num_outputs)

    def losses(self, name: str, y: Tensor) -> np.ndarray:
        """Return the loss of each epoch, for labels or probabilities (N, C), or targets (N, 1) or (R, N, 1)."""
        outputs, y = self.outputs(name).double(), y.double()
        if self.task == "regression":
            return np.array([float((each - y).square().mean()) for each in outputs])
        return np.array([float(cross_entropy(each, y)) for each in outputs])

    def losses_of(self, name: str, labels: np.ndarray) -> np.ndarray:
        """Return the loss of each epoch, for class indices or targets (N,)."""
        return self.losses(name, self.as_matrix(labels, self.outputs(name).shape[2]))


# %% Curves: a number an epoch.
def expected_curves(
    run: Recorded, reference: Reference, q: Tensor, names: Iterable[str] = ("accuracy", "auc", "balanced", "f1")
) -> dict[str, np.ndarray]:
    """Compute what is expected of unseen samples without their labels; of a regression, the loss alone."""
    if run.task == "regression":
        return {"loss": run.losses("unseen", draw_labels(q, run.task, reference.residuals_))}
    curves = {"loss": run.losses("unseen", q)}
    for name in names:
        metric = metrics(q.shape[1])[name]
        curves[name] = np.array([float(expected_metric(metric, each, q)) for each in run.outputs("unseen")])
    return curves


def score_curve(run: Recorded, q: Tensor) -> np.ndarray:
    """Compute the score that chose before 0.5.0, but for a constant: refined, against the reference's predictions."""
    return refined(sample_scores(run.outputs("unseen"), q), torch.arange(len(q)))


def sample_scores(outputs: Tensor, labels: Tensor) -> Tensor:
    """Compute the score of each sample against labels or predictions (N, C), by temperature and epoch, (T, E, N)."""
    if outputs.shape[2] == 1:
        return (outputs - labels).square().mean(2)[None]
    scores = [((outputs / temperature).softmax(2) - labels).square().sum(2) for temperature in TEMPERATURES]
    return torch.stack(scores)


def refined(scores: Tensor, rows: Tensor) -> np.ndarray:
    """Compute the refined score of some samples, by epoch: the Brier score after the best temperature.

    It follows accuracy, and does not rise only because a network becomes too sure of itself (Berta, Holzmüller, Jordan
    and Bach, arXiv:2501.19195).
    """
    return scores[:, :, rows].double().mean(2).amin(0).numpy()


def gain_curve(name: str, p: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([GAINS[name](each, y) for each in p])


# %% The epochs that are chosen.
def lowest(curve: np.ndarray) -> int:
    """Return the epoch of the lowest value, the last one if there is none."""
    return int(np.nanargmin(curve)) if np.isfinite(curve).any() else len(curve) - 1


def epochs_run(curve: np.ndarray, patience: float) -> int:
    """Return how many epochs run, with `EarlyStopping` at a patience of a share of all of them; the lowest is best."""
    best, most = 0, max(1, round(patience * len(curve)))
    for epoch, value in enumerate(curve):
        if value < curve[best]:
            best = epoch
        if epoch >= best + most:
            return epoch + 1
    return len(curve)


def watched(curves: dict[str, np.ndarray], name: str) -> np.ndarray:
    """Return a curve of which the lowest value is the best."""
    return curves[name] if name == "loss" else -curves[name]


def by_recipe(curves: dict[str, np.ndarray]) -> int:
    """Keep the best of all epochs by its expected accuracy, or the loss of a regression."""
    return lowest(watched(curves, "accuracy" if "accuracy" in curves else "loss"))


def stopped(curve: np.ndarray) -> int:
    """Keep the best of the epochs that run until one stops."""
    return lowest(curve[: epochs_run(curve, PATIENCE)])


def candidates(run: Recorded, curves: dict[str, np.ndarray], q: Tensor, num_training: int) -> dict[str, list[int]]:
    """Return the epochs that are taken by each number by itself: one, or one for each draw of labels."""
    chosen = {"never_stop": [len(curves["loss"]) - 1]}
    chosen |= {f"expected_{name}": [lowest(watched(curves, name))] for name in curves}
    chosen |= {f"stopped_{name}": [stopped(watched(curves, name))] for name in VALUES if name in curves}
    chosen["former_score"] = [lowest(score_curve(run, q))]
    if run.task != "regression":
        chosen["cbpe"] = [lowest(-run.predictions("unseen").max(2).mean(1))]
        chosen |= by_metrics_of_labels(run)
    return chosen | by_labels(run, curves, q, num_training)


def draws_of(run: Recorded, number: int) -> list[Tensor]:
    """Draw unseen samples, the same ones for all runs of as many; one draw if all are taken."""
    size = len(run.found["y_unseen"])
    generator = torch.Generator().manual_seed(0)
    return [torch.randperm(size, generator=generator)[:number] for _ in range(NUM_DRAWS if number < size else 1)]


def counts(run: Recorded) -> dict[str, int]:
    """Say how many labels there are: a tenth of the training samples, and fixed numbers; 600 are all that there are."""
    size = len(run.found["y_unseen"])
    found = {f"labels_{count}": count for count in COUNTS if count < size} | {"labels_600": size}
    return found | {"tenth": min(len(run.found["y"]) // 10, size)}


def by_labels(run: Recorded, curves: dict[str, np.ndarray], q: Tensor, num_training: int) -> dict[str, list[int]]:
    """Choose by noisy labels: their refined score, loss or accuracy, and what a monitor expects by them as well."""
    outputs, chosen = run.outputs("unseen"), {}
    y = run.labels("y_unseen", outputs.shape[2])
    scores, ours, theirs = sample_scores(outputs, y), costs(outputs, y), costs(outputs, q)
    losses = sample_losses(outputs, y)
    whole = -curves["accuracy"] if "accuracy" in curves else curves["loss"]
    expected = [Estimate(*each, len(y)) for each in zip(whole, theirs.var(1) / len(y), strict=True)]
    for name, number in counts(run).items():
        draws = draws_of(run, number)
        chosen[name] = [lowest(refined(scores, rows)) for rows in draws]
        chosen[f"{name}_by_loss"] = [lowest(losses[:, rows].mean(1)) for rows in draws]
        if run.task != "regression":
            chosen[f"{name}_by_accuracy"] = [lowest(ours[:, rows].mean(1)) for rows in draws]
        both = [combined(expected, ours[:, rows], num_training) for rows in draws]
        chosen[f"{name}_and_reference"] = [lowest(curve) for curve in both]
    draws = draws_of(run, counts(run)["tenth"])
    chosen["tenth_unlabelled"] = [lowest(theirs[:, rows].mean(1)) for rows in draws]
    both = counts(run)["tenth"] * ours + WEIGHT * theirs
    return chosen | {"tenth_alone_and_reference": [lowest(both[:, rows].mean(1)) for rows in draws]}


def combined(expected: list[Estimate], costs: np.ndarray, num_training: int) -> np.ndarray:
    """Return what a reference and labels say together by epoch, of what each label costs (E, M)."""
    values, counted, number = [], [], costs.shape[1]
    known = [Estimate(*each, number) for each in zip(costs.mean(1), costs.var(1) / number, strict=True)]
    for both in zip(expected, known, strict=True):
        found = combine(*both, num_training, earlier=counted)
        values.append(found.value)
        counted.append(found.equivalent_labels)
    return np.array(values)


def costs(outputs: Tensor, y: Tensor) -> np.ndarray:
    """Return what each sample costs by its labels or predictions (N, C), by epoch: a squared error, or no hit."""
    if outputs.shape[2] == 1:
        return (outputs - y).square()[:, :, 0].double().numpy()
    hits = y.double().expand(len(outputs), -1, -1).gather(2, outputs.argmax(2, keepdim=True))
    return -hits[:, :, 0].numpy()


def sample_losses(outputs: Tensor, y: Tensor) -> np.ndarray:
    """Return the loss of each sample (E, M): cross-entropy, or squared error."""
    if outputs.shape[2] == 1:
        return costs(outputs, y)
    return -(outputs.double().log_softmax(2) * y).sum(2).numpy()


@cache  # further judges see the same labels
def by_metrics_of_labels(run: Recorded) -> dict[str, list[int]]:
    """Choose by another metric of noisy labels than accuracy."""
    p, y, chosen = run.predictions("unseen"), run.found["y_unseen"], {}
    for label, number in counts(run).items():
        if label in ("tenth", "labels_600"):
            draws = draws_of(run, number)[:NUM_METRIC_DRAWS]
            for name in (each for each in GAINS if each != "accuracy"):
                chosen[f"{label}_by_{name}"] = [lowest(-gain_curve(name, p[:, rows], y[rows])) for rows in draws]
    return chosen


def epochs_of_tenth(run: Recorded) -> dict[str, int]:
    """Return the epochs that people take, who hold a tenth out: of the lowest loss, or the highest accuracy or AUC."""
    p, y = run.predictions("unseen"), run.found["y_unseen"]
    chosen = {"loss": lowest(np.array([loss(each, y) for each in p])), "nothing": len(p) - 1}
    if run.task != "regression":
        scores = sample_scores(run.outputs("unseen"), run.labels("y_unseen", p.shape[2]))
        chosen["score"] = lowest(refined(scores, torch.arange(len(y))))
        chosen |= {name: lowest(-gain_curve(name, p, y)) for name in ("accuracy", "auc")}
    return chosen


HELD_OUT = [*(f"held_out_by_{each}" for each in ("loss", "accuracy", "auc", "score", "nothing")), "retrained"]


def rules(with_reference: bool) -> dict[str, str]:
    """Say which candidate each rule takes: without a reference that sees, labels alone or the last epoch."""
    labels = ["tenth", *(f"labels_{count}" for count in COUNTS)]
    by_metric = [f"{name}_by_{gain}" for name in ("tenth", "labels_600") for gain in GAINS if gain != "accuracy"]
    by_metric += [f"{name}_by_{value}" for name in labels for value in ("loss", "accuracy")]
    found = {name: name for name in ("never_stop", "cbpe", *labels, *by_metric, *HELD_OUT)}
    ours = [*(f"stopped_{each}" for each in VALUES), *(f"expected_{each}" for each in ("loss", *GAINS))]
    for name in (*ours, "former_score", "tenth_unlabelled"):
        found[name] = name if with_reference else "never_stop"
    found |= {f"{name}_combined": f"{name}_and_reference" if with_reference else name for name in labels}
    return found | {"tenth_alone_combined": "tenth_alone_and_reference" if with_reference else "tenth"}


# %% The level, and what is compared.
def correlation(curve: np.ndarray, truth: np.ndarray) -> float:
    """Return Spearman's rank correlation; nan if a curve is constant."""
    is_constant = len(set(curve)) == 1 or len(set(truth)) == 1
    return float("nan") if is_constant else float(spearmanr(curve, truth).statistic)


def level(run: Recorded, curves: dict[str, np.ndarray], truth: np.ndarray, noisy: np.ndarray) -> dict[str, float]:
    """Say how far expected values are from the truth, over all epochs, and how they follow it.

    Accuracy is compared, in points, with that on the unseen labels, and with that on test labels which are as noisy
    (`test_`); the loss, in percent, with that on those test labels. All the same is said of the unseen labels.

    Args:
        run: The run.
        curves: What is expected.
        truth: Accuracy on the test, by epoch.
        noisy: Labels of the test that are as noisy as those of training.
    """
    of_labels = run.losses_of("unseen", run.found["y_unseen"])
    losses = run.losses_of("test", noisy)
    found = distance("loss", curves["loss"] / losses) | distance("labels_loss", of_labels / losses)
    if run.task == "regression":
        return found | {"spearman_loss": correlation(curves["loss"], losses)}
    p, y = run.predictions("unseen"), run.found["y_unseen"]
    accuracy, on_test = gain_curve("accuracy", p, y), gain_curve("accuracy", run.predictions("test"), noisy)
    cbpe = p.max(2).mean(1)
    found |= distance("level", curves["accuracy"], accuracy) | distance("cbpe_level", cbpe, accuracy)
    found |= distance("test_level", curves["accuracy"], on_test) | distance("labels_level", accuracy, on_test)
    found |= {"variance_of_a_hit": float((on_test * (1 - on_test)).mean()), "num_test": len(noisy)}
    about = {"expected": curves["accuracy"], "labels": accuracy, "cbpe": cbpe}
    found |= {f"spearman_{name}": correlation(curve, truth) for name, curve in about.items()}
    return found | {"spearman_loss": correlation(curves["loss"], losses)}


def distance(name: str, curve: np.ndarray, truth: float | np.ndarray = 1.0) -> dict[str, float]:
    """Say how far a curve is from the truth in the mean, in percent or points, and whether it is above or below."""
    off = 100 * (curve - truth)
    return {f"{name}_error": float(np.abs(off).mean()), f"{name}_bias": float(off.mean())}


def against_the_reference(
    run: Recorded, curves: dict[str, np.ndarray], q_test: Tensor, noisy: np.ndarray
) -> dict[str, float]:
    """Say how far the estimate is off where the network is better than the reference, and where it is not.

    Which of them is better is said by test labels as noisy as those of training, how far it is off by the unseen ones.
    In points of accuracy, or percent of the squared error.
    """
    if run.task == "regression":
        by = 100 * (1 - run.losses_of("test", noisy) / loss(q_test.numpy(), noisy))
        off = 100 * (curves["loss"] / run.losses_of("unseen", run.found["y_unseen"]) - 1)
    else:
        by = 100 * (gain_curve("accuracy", run.predictions("test"), noisy) - accuracy(q_test.numpy(), noisy))
        off = 100 * (curves["accuracy"] - gain_curve("accuracy", run.predictions("unseen"), run.found["y_unseen"]))
    is_better = by > 0
    found = {"network_leads": float(is_better.mean())}
    if is_better.any():
        found |= {"leads_by": float(by[is_better].mean()), "off_where_it_leads": float(off[is_better].mean())}
    return found | ({} if is_better.all() else {"off_elsewhere": float(off[~is_better].mean())})
