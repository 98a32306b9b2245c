"""How sure expected values are, what labels beside them are worth, and how far the reference leads.

    python examples/studies/sureness/sureness.py RUNS     # results.csv.gz: a row a run, judge, and value; minutes
    python examples/studies/tables.py                     # results.csv.gz -> the pages

A row tells the version of the estimates that it was judged by. What is there of runs that RUNS has not stays.

RUNS has what `record.py` and `said.py` of the study of stopping leave there. Values are those of the epoch that they
choose; the truth is that of the test, whose labels are as noisy as those of training. Labels are drawn of the unseen
samples, and levels are those of some epochs.

Thresholds were chosen on the design half: where tables are, that of the study of stopping; elsewhere every other run.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from statistics import median_high
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "stopping"))
from rules import Recorded, lowest
from said import Said

from lightning_sensitivity.functional import draw_labels
from lightning_sensitivity.functional.expected import (
    ESTIMATES,
    VALIDATIONS,
    WEIGHT,
    Estimate,
    estimate,
    weight_beside,
)
from lightning_sensitivity.functional.tasks import AUROC, TASKS, Measured, measure_mean
from lightning_sensitivity.reference.reference import Reference

COUNTS, NUM_DRAWS = (50, 200, 600), 5
THRESHOLDS = (2.0, 2.5, 3.0)  # standard errors
SHIFTED = ("sampler", "undersampled")  # runs that need class_shares=
TABLES = ("tables", "few", "numbers")  # pools that have a design half
Row = dict[str, Any]
Weights = list[float]


class Judged:
    """A recorded run, and what a reference says of it.

    Attributes:
        outputs: Outputs of all epochs for unseen samples and the test, ``(E, N, C)``.
        q: What the reference predicts of both, ``(N, C)``.
        labels: Their labels, as noisy as those of training, ``(N,)``.
    """

    def __init__(self, recorded: Recorded, said: Said) -> None:
        self.reference: Reference = said.reference()
        self.task = TASKS["regression" if recorded.task == "regression" else "multiclass"]
        self.num_training = len(said.labels)
        self.outputs = {name: recorded.outputs(name).double() for name in ("unseen", "test")}
        self.q = dict(zip(("unseen", "test"), said.predictions(self.reference), strict=True))
        self.labels = {"unseen": torch.tensor(recorded.found["y_unseen"]), "test": torch.tensor(said.noisy_test)}
        self.auroc = AUROC()
        self.draws = draw_labels(self.q["unseen"], self.task.name, self.reference.residuals_)

    @property
    def names(self) -> list[str]:
        return ["loss"] if self.task.is_regression else ["accuracy", "auroc", "loss"]

    def sign(self, name: str) -> int:
        """Return 1 where the highest value is the best, else -1."""
        return -1 if name == "loss" else 1

    def values(self, name: str, outputs: Tensor, labels: Tensor) -> Tensor:
        """Return the value of each sample ``(R, N)``, for labels ``(R, N)``, or targets ``(R, N, 1)``."""
        if self.task.is_regression:
            return (outputs - labels).square()[..., 0]
        if name == "accuracy":
            return (outputs.argmax(1) == labels).double()
        return -outputs.log_softmax(1)[torch.arange(len(outputs)), labels]

    def measured(self, name: str, outputs: Tensor, labels: Tensor) -> Measured:
        """Return a value of samples, for labels as above, and what each label adds."""
        if name == "auroc":
            return self.auroc.measure(outputs.softmax(1), labels)
        return measure_mean(self.values(name, outputs, labels)[..., None])

    def measure(self, name: str, outputs: Tensor, labels: Tensor) -> float:
        return self.measured(name, outputs, labels).value

    def estimate(self, name: str, outputs: Tensor, draws: Tensor) -> Estimate:
        """Return what is measured on labels, or to be expected, with its variance."""
        return estimate(self.measured(name, outputs, draws), draws.shape[1], None)

    def targets(self, part: str) -> Tensor:
        """Return labels as draws, ``(1, N)`` or ``(1, N, 1)``."""
        y = self.labels[part]
        return y[None, :, None] if self.task.is_regression else y[None]

    def curve(self, name: str) -> np.ndarray:
        return np.array([self.measure(name, each, self.draws) for each in self.outputs["unseen"]])


def how_sure(run: Judged, name: str, epoch: int) -> Row:
    """Return how far the value to expect is from that of the test, and what both vary by chance."""
    expected = run.estimate(name, run.outputs["unseen"][epoch], run.draws)
    truth = run.estimate(name, run.outputs["test"][epoch], run.targets("test"))
    sizes = {"num_unseen": expected.size, "num_training": run.num_training}
    variances = {"variance": expected.variance, "truth_variance": truth.variance}
    return {"error": expected.value - truth.value, **variances, **sizes}


def leads(run: Judged, name: str, epoch: int) -> Row:
    """Return by how much the reference is expected to be better than the network, and it and the mean of both are."""
    found: Row = {}
    for part, draws in (("test", run.targets("test")), ("unseen", run.draws)):
        outputs, q = run.outputs[part][epoch], run.q[part]
        mean = (run.task.predictions(outputs) + q) / 2
        if not run.task.is_regression:
            q, mean = q.clamp(min=1e-6).log(), mean.log()
        for who, each in (("network", outputs), ("reference", q), ("mean", mean)):
            found[who, part] = run.sign(name) * run.measure(name, each, draws)
    return {
        "lead": found["reference", "unseen"] - found["network", "unseen"],
        "reference_gain": found["reference", "test"] - found["network", "test"],
        "mean_gain": found["mean", "test"] - found["network", "test"],
    }


def beside_labels(run: Judged, name: str) -> Row:
    """Return how far values by labels, by the reference and by both are off, and what their epoch loses.

    They are off in the mean over all epochs; all is a mean over draws of labels.
    """
    y, size, found = run.targets("unseen"), run.q["unseen"].shape[0], []
    sign, truth = (
        run.sign(name),
        np.array([run.measure(name, each, run.targets("test")) for each in run.outputs["test"]]),
    )
    of_draws = [run.values(name, each, run.draws) for each in run.outputs["unseen"]]
    of_labels = [run.values(name, each, y)[0] for each in run.outputs["unseen"]]
    expected = [Estimate(float(each.mean()), float(each.var()) / size, size) for each in of_draws]
    generator = torch.Generator().manual_seed(0)
    for count in COUNTS:
        number = min(count, size)
        for _ in range(NUM_DRAWS if number < size else 1):
            rows, row = torch.randperm(size, generator=generator)[:number], {}
            known = [Estimate(float(each[rows].mean()), float(each[rows].var()) / number, number) for each in of_labels]
            for rule, weights in rules(expected, known).items():
                values = np.array([
                    (number * second.value + weight * first.value) / (number + weight)
                    for first, second, weight in zip(expected, known, weights, strict=True)
                ])  # fmt: skip
                if not rule.startswith("each"):
                    row[f"off_{rule}_{count}"] = float(np.abs(values - truth).mean())
                if rule in ("today", "at_2.0", "each_2.0"):
                    row[f"lost_{rule}_{count}"] = float((sign * truth).max() - sign * truth[lowest(-sign * values)])
            found.append(row)
    return pd.DataFrame(found).mean().to_dict()


def rules(expected: list[Estimate], known: list[Estimate]) -> dict[str, Weights]:
    """Return as how many labels the reference counts in each epoch: by each threshold alone, and by the median."""
    found: dict[str, Weights] = {"labels": [0.0] * len(known), "today": [float(WEIGHT)] * len(known)}
    for least in THRESHOLDS:
        each = [weight_beside(*both, least) for both in zip(expected, known, strict=True)]
        last = [each[max(0, end - VALIDATIONS) : end] for end in range(1, len(each) + 1)]
        found |= {f"each_{least}": each, f"at_{least}": [median_high(some) for some in last]}
    return found


def rows_of(file: Path) -> Iterator[Row]:
    """Measure a run by what a reference says of it."""
    stem, judge = file.name.split(".")[:2]
    said, recorded = Said.read(file), Recorded.read(file.with_name(f"{stem}.npz"))
    run, (pool, index) = Judged(recorded, said), stem.split("-")
    if len(said.test) == 0 or not run.reference.is_trusted_ or said.about["way"] in SHIFTED:
        return
    is_design = said.about["is_design"] if pool in TABLES else int(index) % 2 == 0
    by_accuracy = lowest(-run.curve("accuracy")) if "accuracy" in run.names else None
    by_loss = lowest(run.curve("loss"))
    for name in run.names:
        epoch = by_loss if name == "loss" or by_accuracy is None else by_accuracy
        row = {"run": stem, "judge": judge, "is_design": is_design, "value_of": name, "version": ESTIMATES}
        row |= how_sure(run, name, epoch) | leads(run, name, epoch)
        if name != "auroc":
            off = beside_labels(run, name)
            others = tuple(f"off_at_{least}" for least in THRESHOLDS[1:])  # are told of the design half alone
            row |= {key: each for key, each in off.items() if is_design or not key.startswith(others)}
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv.gz"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows: list[Row] = []
    judged = []
    for file in sorted(arguments.runs.glob("*-???.*.npz")):
        if ".part" not in file.name:
            rows += rows_of(file)
            judged.append(tuple(file.name.split(".")[:2]))
    found = pd.DataFrame(rows)
    if arguments.out.exists():
        earlier = pd.read_csv(arguments.out)
        is_anew = pd.MultiIndex.from_frame(earlier[["run", "judge"]]).isin(judged)
        found = pd.concat([found, earlier[~is_anew]])
    found.to_csv(arguments.out, index=False, float_format="%.3g", compression={"method": "gzip", "mtime": 1})


if __name__ == "__main__":
    main()
