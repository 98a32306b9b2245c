"""The rules, as they were frozen: each gives a number an epoch from what it may see, and takes the epoch of the best.

References, expected values and temperatures are the package's own; metrics of labels are as scikit-learn's.
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
from torchmetrics import Metric
from torchmetrics.classification import MulticlassAccuracy, MulticlassAUROC, MulticlassF1Score

from lightning_sensitivity.functional import expected_metric, expected_score
from lightning_sensitivity.functional.refined_score import TEMPERATURES
from lightning_sensitivity.reference import Reference

WORTH, METRIC_WORTH = 200, 1000  # labels that a reference is worth: for the refined score; accuracy, and regression
WORTHS = (200, 1000)  # that were compared
COUNTS, NUM_DRAWS = (50, 100, 200, 600), 20  # of noisy labels that choose an epoch, and draws of them
NUM_METRIC_DRAWS = 5  # of labels that choose by a metric of their own: a tenth, or all 600


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
        y = torch.tensor(self.found[name])
        return y[:, None] if self.task == "regression" else torch.nn.functional.one_hot(y, num_outputs)


def reference_says(reference: Reference, x: Tensor) -> Tensor:
    """Return the reference's probabilities of all classes (N, C), or its numbers (N, 1)."""
    if reference.task != "regression":
        return torch.tensor(reference.predict_proba(x))
    return torch.tensor(reference.predict(x)).float().reshape(len(x), -1)


def as_fitted(q: Tensor, reference: Reference) -> Tensor:
    """Return a reference's predictions as they were before they were calibrated."""
    share = reference.smoothing_
    found = ((q - share / q.shape[1]) / (1 - share)).clamp(min=1e-200) ** reference.temperature_
    return found / found.sum(1, keepdim=True)


# %% Curves: a number an epoch.
def expected_curves(
    run: Recorded, reference: Reference, q: Tensor, names: Iterable[str] = ("accuracy", "auc", "balanced", "f1")
) -> dict[str, np.ndarray]:
    """Compute what is expected of unseen samples without their labels."""
    outputs = run.outputs("unseen")
    if run.task == "regression":
        return {"score": np.array([expected_score(each, q, run.task, reference.score_).score for each in outputs])}
    curves = {"score": np.array([expected_score(each, q).score for each in outputs])}
    for name in names:
        metric = metrics(q.shape[1])[name]
        curves[name] = np.array([float(expected_metric(metric, each, q)) for each in outputs])
    return curves


def sample_scores(outputs: Tensor, labels: Tensor) -> Tensor:
    """Compute the score of each sample against labels or predictions (N, C), by temperature and epoch, (T, E, N)."""
    if outputs.shape[2] == 1:
        return (outputs - labels).square().mean(2)[None]
    scores = [((outputs / temperature).softmax(2) - labels).square().sum(2) for temperature in TEMPERATURES]
    return torch.stack(scores)


def refined(scores: Tensor, rows: Tensor) -> np.ndarray:
    """Compute the refined score of some samples, by epoch."""
    return scores[:, :, rows].double().mean(2).amin(0).numpy()


def gain_curve(name: str, p: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.array([GAINS[name](each, y) for each in p])


# %% The epochs that are chosen.
def lowest(curve: np.ndarray) -> int:
    """Return the epoch of the lowest value, the last one if there is none."""
    return int(np.nanargmin(curve)) if np.isfinite(curve).any() else len(curve) - 1


def candidates(run: Recorded, curves: dict[str, np.ndarray], q: Tensor) -> dict[str, list[int]]:
    """Return the epochs that are taken by each number by itself: one, or one for each draw of labels."""
    chosen = {"never_stop": [len(curves["score"]) - 1], "expected_score": [lowest(curves["score"])]}
    chosen |= {f"expected_{name}": [lowest(-curve)] for name, curve in curves.items() if name != "score"}
    if run.task != "regression":
        chosen["cbpe"] = [lowest(-run.predictions("unseen").max(2).mean(1))]
        chosen |= by_metrics_of_labels(run)
    return chosen | by_labels(run, curves["score"], q)


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


def by_labels(run: Recorded, expected: np.ndarray, q: Tensor) -> dict[str, list[int]]:
    """Choose by the refined score of noisy labels, beside the expected score, and by that of a tenth of the samples."""
    outputs, chosen = run.outputs("unseen"), {}
    scores = sample_scores(outputs, run.labels("y_unseen", outputs.shape[2]))
    distances = sample_scores(outputs, q)
    for name, number in counts(run).items():
        curves = [refined(scores, rows) for rows in draws_of(run, number)]
        chosen[name] = list(map(lowest, curves))
        for worth in WORTHS:
            both = [number * curve + worth * expected for curve in curves]
            chosen[f"{name}_and_{worth}"] = list(map(lowest, both))
    number = counts(run)["tenth"]
    pairs = [(refined(scores, rows), refined(distances, rows)) for rows in draws_of(run, number)]
    chosen["tenth_unlabelled"] = [lowest(distance) for _, distance in pairs]
    for worth in WORTHS:
        chosen[f"tenth_alone_and_{worth}"] = [lowest(number * score + worth * distance) for score, distance in pairs]
    return chosen


@cache  # further judges see the same labels
def by_metrics_of_labels(run: Recorded) -> dict[str, list[int]]:
    """Choose by a metric of noisy labels."""
    p, y, chosen = run.predictions("unseen"), run.found["y_unseen"], {}
    for label, number in counts(run).items():
        if label in ("tenth", "labels_600"):
            draws = draws_of(run, number)[:NUM_METRIC_DRAWS]
            for name in GAINS:
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


def rules(with_reference: bool, is_regression: bool) -> dict[str, str]:
    """Say which candidate each rule takes: without a reference that sees, labels alone or the last epoch."""
    labels = ["tenth", *(f"labels_{count}" for count in COUNTS)]
    by_metric = [f"{name}_by_{gain}" for name in ("tenth", "labels_600") for gain in GAINS]
    found = {name: name for name in ("never_stop", "cbpe", *labels, *by_metric, *HELD_OUT)}
    for name in ("score", *GAINS):
        found[f"expected_{name}"] = f"expected_{name}" if with_reference else "never_stop"
    worth = f"and_{METRIC_WORTH if is_regression else WORTH}"
    found |= {f"{name}_combined": f"{name}_{worth}" if with_reference else name for name in labels}
    found["tenth_unlabelled"] = "tenth_unlabelled" if with_reference else "never_stop"
    return found | {"tenth_alone_combined": f"tenth_alone_{worth}" if with_reference else "tenth"}


# %% The level, and what is compared.
def correlation(curve: np.ndarray, truth: np.ndarray) -> float:
    """Return Spearman's rank correlation; nan if a curve is constant."""
    is_constant = len(set(curve)) == 1 or len(set(truth)) == 1
    return float("nan") if is_constant else float(spearmanr(curve, truth).statistic)


def level(run: Recorded, curves: dict[str, np.ndarray], truth: np.ndarray) -> dict[str, float]:
    """Say how far expected values are from those of unseen labels, and how they follow the truth by epoch.

    In points of accuracy; in percent of the squared error of a regression. `truth` is of the test.
    """
    p, y = run.predictions("unseen"), run.found["y_unseen"]
    if run.task == "regression":
        errors = np.array([loss(each, y) for each in p])
        off = 100 * (curves["score"] / errors - 1)
        about = {"expected": correlation(curves["score"], truth), "labels": correlation(errors, truth)}
        found = {"level_error": float(np.abs(off).mean()), "level_bias": float(off.mean())}
        return found | {f"spearman_{name}": value for name, value in about.items()}
    accuracy, found = gain_curve("accuracy", p, y), {}
    for name, curve in {"level": curves["accuracy"], "cbpe_level": p.max(2).mean(1)}.items():
        off = 100 * (curve - accuracy)
        found |= {f"{name}_error": float(np.abs(off).mean()), f"{name}_bias": float(off.mean())}
    about = {"expected": curves["accuracy"], "score": -curves["score"], "labels": accuracy, "cbpe": p.max(2).mean(1)}
    return found | {f"spearman_{name}": correlation(curve, truth) for name, curve in about.items()}
