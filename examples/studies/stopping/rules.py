"""The rules, as they were frozen: each gives a number an epoch from what it may see, and takes the epoch of the lowest.

Scores, reference, calibration and ranks are the package's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lightning_sensitivity.functional.criterion import Calibration, distance_from_reference, rank_disagreement
from lightning_sensitivity.functional.reference import Reference
from lightning_sensitivity.functional.refined_score import TEMPERATURES, UNCHANGED, ScoreSums, score_sums
from lightning_sensitivity.functional.tasks import find_task

LEAST_SKILL, CLEAN = 0.05, 1.3  # of images, signals and texts; of claim / score
WEIGHT = 200  # of the reference, in labels
COUNTS, NUM_DRAWS = (20, 50, 100, 200), 20  # of noisy labels that choose an epoch, and draws of them


@dataclass
class Recorded:
    """A recorded training: outputs (E, N, K) by epoch, and labels."""

    found: dict[str, np.ndarray]

    @classmethod
    def read(cls, file: Path) -> Recorded:
        with np.load(file) as found:
            return cls(dict(found))

    @property
    def task(self) -> str:
        return str(self.found["task"])

    def outputs(self, name: str) -> Tensor:
        return torch.tensor(self.found[name].astype(np.float32))

    def labels(self, name: str) -> Tensor:
        return torch.tensor(self.found[name])

    @property
    def y_scored(self) -> Tensor:
        """The labels of the training samples whose outputs were kept."""
        return self.labels("y")[: self.found["training"].shape[1]]

    def predictions(self, name: str) -> Tensor:
        """Return probabilities of all classes, two for one logit; or numbers, in a regression."""
        outputs = self.outputs(name)
        if self.task == "regression":
            return outputs
        both = torch.cat([torch.zeros_like(outputs), outputs], 2) if self.task == "binary" else outputs
        return both.softmax(2)


# %% Without labels of unseen samples.
@dataclass
class Epochs:
    """What the criterion is made of, by epoch: sums of scores on unseen and on training samples."""

    unseen: list[ScoreSums]
    training: list[ScoreSums]

    @classmethod
    def of(cls, run: Recorded, reference: Reference) -> Epochs:
        task, shares = find_task(run.task), reference.shares
        unseen = [score_sums(each, reference.predictions, task, shares) for each in run.outputs("unseen")]
        training = [score_sums(each, run.y_scored, task, shares) for each in run.outputs("training")]
        return cls([ScoreSums(*each.T) for each in unseen], [ScoreSums(*each.T) for each in training])

    def training_score(self) -> np.ndarray:
        return np.array([float(sums.scores[UNCHANGED]) for sums in self.training])

    def distance(self) -> np.ndarray:
        """Compute D of each epoch, with the calibration of the epochs so far."""
        found, calibration = [], Calibration()
        for unseen, training in zip(self.unseen, self.training, strict=True):
            calibration = calibration.updated(unseen, training)
            found.append(distance_from_reference(unseen, calibration).score)
        return np.array(found)


def ranking(run: Recorded, reference: Reference) -> tuple[np.ndarray, np.ndarray]:
    """Compute how far the order of the samples is from the reference's, and from that of training labels."""
    task = find_task(run.task)
    labels = task.as_matrix(run.y_scored, run.found["training"].shape[2])
    by_reference = [rank_disagreement(task.predictions(each), reference.predictions) for each in run.outputs("unseen")]
    by_labels = [rank_disagreement(task.predictions(each), labels) for each in run.outputs("training")]
    return np.array(by_reference), np.array(by_labels)


# %% With labels of unseen samples, as noisy as those of training.
def label_scores(run: Recorded) -> Tensor:
    """Compute the score of each label of unseen samples, by temperature and epoch, (T, E, N)."""
    task, outputs = find_task(run.task), run.outputs("unseen")
    num_epochs, num_unseen, num_outputs = outputs.shape
    outputs = outputs.reshape(-1, num_outputs)
    labels = task.as_matrix(run.labels("y_unseen"), num_outputs).repeat(num_epochs, 1)
    temperatures = TEMPERATURES if task.has_classes else (1.0,)
    scores = [task.distances(task.predictions(outputs / temperature), labels) for temperature in temperatures]
    return torch.stack(scores).reshape(-1, num_epochs, num_unseen)


def refined_score(scores: Tensor, rows: Tensor) -> np.ndarray:
    """Compute the refined score of some labels, by epoch."""
    return scores[:, :, rows].double().mean(2).amin(0).numpy()


def auc(p: np.ndarray, y: np.ndarray) -> float:
    """Compute the area under the ROC curve, mean over classes; nan if only one occurs."""
    found = []
    for number in range(p.shape[1]):
        is_class = y == number
        if 0 < is_class.sum() < len(y):
            _, places, counts = np.unique(p[:, number], return_inverse=True, return_counts=True)
            ranks = (np.cumsum(counts) - (counts - 1) / 2)[places]
            num_pairs = is_class.sum() * (~is_class).sum()
            found.append((ranks[is_class].sum() - is_class.sum() * (is_class.sum() + 1) / 2) / num_pairs)
    return float(np.mean(found)) if found else float("nan")


def candidates(run: Recorded, reference: Reference) -> dict[str, list[int]]:
    """Return the epochs that are taken by each number by itself: one, or one for each draw of labels."""
    epochs = Epochs.of(run, reference)
    distance = epochs.distance()
    curves = {"distance": distance, "training_score": epochs.training_score()}
    if run.task != "regression":
        curves["ranking_by_reference"], curves["ranking_by_labels"] = ranking(run, reference)
    chosen = {"never_stop": [len(distance) - 1]} | {name: [lowest(curve)] for name, curve in curves.items()}
    generator = torch.Generator().manual_seed(0)
    y, p, scores = run.found["y_unseen"], run.predictions("unseen").numpy(), label_scores(run)
    orders = [torch.randperm(len(y), generator=generator) for _ in range(NUM_DRAWS)]
    numbers = {"tenth": len(run.found["y"]) // 10, **{f"labels_{count}": count for count in COUNTS}}
    for name, number in numbers.items():
        parts = [order[:number] for order in orders]
        refined = [refined_score(scores, rows) for rows in parts]
        both = [(number * s + WEIGHT * distance) / (number + WEIGHT) for s in refined]
        if number <= len(y):
            chosen |= {name: list(map(lowest, refined)), f"{name}_and_distance": list(map(lowest, both))}
        if name == "tenth" and run.task != "regression":
            chosen["tenth_by_auc"] = [lowest(np.array([-auc(each[rows], y[rows]) for each in p])) for rows in parts]
    return chosen


def is_used(kind: str, skill: float, claim_by_score: float) -> bool:
    """Whether the reference decides: it sees (of images and texts it has to see more), and labels do not look clean."""
    return skill > (0.0 if kind == "vectors" else LEAST_SKILL) and not claim_by_score >= CLEAN


def rules(with_reference: bool) -> dict[str, str]:
    """Say which candidate each rule takes."""
    labels = ["tenth", *(f"labels_{count}" for count in COUNTS)]
    same = {name: name for name in ("never_stop", "training_score", "tenth_by_auc", *labels)}
    return same | {
        "criterion": "distance" if with_reference else "training_score",
        "ranking": "ranking_by_reference" if with_reference else "training_score",
        **{f"{name}_combined": f"{name}_and_distance" if with_reference else name for name in labels},
    }


def lowest(curve: np.ndarray) -> int:
    """Return the epoch of the lowest value, the last one if there is none."""
    return int(np.nanargmin(curve)) if np.isfinite(curve).any() else len(curve) - 1
