"""What RiskMonitor has to log, by plain torch over the samples of a fit, and the models and data for it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity.functional import fit_reference
from tests.helpers import NUM_FEATURES, Classifier, History, first_tensor, fitted, inputs, labelled

CRITERION, RANKING, DISAGREEMENT = "val/risk_criterion", "val/risk_ranking", "val/risk_disagreement"
TEMPERATURES = [2 ** (half / 2) for half in range(-2, 7)]
X, CORRECT = labelled(90).tensors  # in batches of 16 and one of 10
NOISY = CORRECT.where(torch.arange(90) % 3 > 0, (CORRECT + 1 + torch.arange(90) % 2) % 4)  # a third is wrong
HOLDOUT = inputs(50, seed=1)  # in batches of 16 and one of 2


def batches_of(*tensors: Tensor, batch_size: int = 16) -> DataLoader:
    return DataLoader(TensorDataset(*tensors), batch_size)


class Plain(Classifier):
    """In 64 bits, in which sums in another order are the same to nine digits."""

    def __init__(self, num_outputs: int = 4, loss: Any = cross_entropy, width: int = NUM_FEATURES, **kwargs: Any):
        super().__init__(**kwargs)
        self.net = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, num_outputs)).double()
        self.loss = loss

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1).double())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        pass


class Multiclass:
    """How predictions are made, compared with labels or the reference, and turned into classes."""

    @staticmethod
    def predictions(outputs: Tensor, temperature: float) -> Tensor:
        return (outputs / temperature).softmax(1)

    @staticmethod
    def score(p: Tensor, y: Tensor) -> float:
        return float((p - y).square().sum(1).mean())

    @staticmethod
    def agreement(p: Tensor, y: Tensor, shares: Tensor) -> float:
        return float((p * (y - shares)).sum(1).mean())

    @staticmethod
    def classes(p: Tensor) -> Tensor:
        return p.argmax(1)


class Binary(Multiclass):
    @staticmethod
    def predictions(outputs: Tensor, temperature: float) -> Tensor:
        return (outputs.reshape(-1, 1) / temperature).sigmoid()

    @staticmethod
    def agreement(p: Tensor, y: Tensor, shares: Tensor) -> float:
        return float(((p - 0.5) * (y - shares)).sum(1).mean())

    @staticmethod
    def classes(p: Tensor) -> Tensor:
        return p[:, 0] > 0.5


class Regression(Multiclass):
    @staticmethod
    def predictions(outputs: Tensor, temperature: float) -> Tensor:
        return outputs.reshape(len(outputs), -1)

    @staticmethod
    def score(p: Tensor, y: Tensor) -> float:
        return float((p - y).square().mean())

    @staticmethod
    def agreement(p: Tensor, y: Tensor, shares: Tensor) -> float:
        return 0.0


TASKS: dict[str, Any] = {"multiclass": Multiclass, "binary": Binary, "regression": Regression}


def as_matrix(labels: Tensor, task: str, num_outputs: int) -> Tensor:
    if task == "multiclass" and labels.ndim == 1:
        return one_hot(labels.long(), num_outputs).double()
    return labels.double().reshape(len(labels), -1)


class Truth(History):
    """Goes over all samples at each validation, and compares what was logged when the fit ends.

    It stands after callbacks that change weights for a validation, such as those that average them.

    Args:
        task: The task.
        seen: What the reference sees of a batch.
        scored: The indices of the training batches that are run; None for all.
        has_labels: Whether labels of the validation samples count.
    """

    def __init__(
        self,
        task: str = "multiclass",
        seen: Callable[[Any], Tensor] = first_tensor,
        scored: Collection[int] | None = None,
        has_labels: bool = False,
    ) -> None:
        super().__init__()
        self.task, self.kind, self.seen, self.has_labels = task, TASKS[task], seen, has_labels
        self.scored = scored
        self.training: list[Any] = []
        self.holdout: list[Any] = []
        self.reference: Any = None
        self.expected: list[dict[str, float]] = []
        self.largest, self.factors = [0.0] * 9, [math.inf] * 9

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if self.reference is None and trainer.current_epoch == 0:
            self.training.append([part.clone() for part in batch])

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and self.reference is None:
            self.holdout.append(batch if isinstance(batch, Tensor) else [part.clone() for part in batch])

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and batch_idx == trainer.num_val_batches[0] - 1:
            self.expected.append(self.values(pl_module))

    def values(self, model: Any) -> dict[str, float]:
        outputs = torch.cat([model(first_tensor(batch)) for batch in self.holdout]).double()
        scored = [batch for index, batch in enumerate(self.training) if self.scored is None or index in self.scored]
        known, known_y = self.labelled([self.seen(batch) for batch in self.training], self.training, outputs)
        training, y = self.labelled([model(batch[0]).double() for batch in scored], scored, outputs)
        if self.reference is None:
            seen = torch.cat([self.seen(batch) for batch in self.holdout])
            self.reference = fit_reference(known, known_y, seen, self.task)
        q, shares = self.reference.predictions.float().double(), self.reference.shares
        chosen, ranking = self.distance(outputs, q, training, y, shares), math.nan
        p = self.kind.predictions(outputs.float(), 1)
        if self.task != "regression":
            correlations = [spearmanr(p[:, k], q[:, k]).statistic for k in range(p.shape[1])]
            ranking = 1 - sum(correlations) / len(correlations)
        if not (self.reference.is_trusted and not self.reference.looks_clean):
            chosen = ranking = self.kind.score(self.kind.predictions(training, 1), y)
        found = {CRITERION: self.with_labels(outputs, chosen) if self.has_labels else chosen}
        if self.task == "regression":
            return found
        disagreement = float((self.kind.classes(p) != self.kind.classes(q)).double().mean())
        return {**found, RANKING: ranking, DISAGREEMENT: disagreement}

    def labelled(self, parts: list[Tensor], batches: list[Any], outputs: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of parts, and the labels, of samples that have one."""
        labels = torch.cat([batch[1] for batch in batches])
        counts = labels.reshape(len(labels), -1)[:, 0].long() != -100
        num_outputs = outputs.shape[1] if outputs.ndim > 1 else 1
        return torch.cat(parts)[counts], as_matrix(labels[counts], self.task, num_outputs)

    def distance(self, outputs: Tensor, q: Tensor, training: Tensor, y: Tensor, shares: Tensor) -> float:
        """D: the score against the reference, of which the agreement counts c times."""
        distances = []
        for place, temperature in enumerate(TEMPERATURES):
            p = self.kind.predictions(outputs, temperature)
            agreement = self.kind.agreement(p, q, shares)
            known = self.kind.agreement(self.kind.predictions(training, temperature), y, shares)
            self.largest[place] = max(self.largest[place], agreement)
            if agreement > max(0.15 * self.largest[place], 1e-4):
                self.factors[place] = min(self.factors[place], known / agreement)
            factor = min(max(self.factors[place], 1.0), 1.5)
            distances.append(self.kind.score(p, q) - 2 * (factor - 1) * agreement)
        return min(distances)

    def with_labels(self, outputs: Tensor, chosen: float) -> float:
        labels = torch.cat([batch[1] for batch in self.holdout])
        counts = labels.reshape(len(labels), -1)[:, 0].long() != -100
        y = as_matrix(labels[counts], self.task, outputs.shape[1] if outputs.ndim > 1 else 1)
        score = min(self.kind.score(self.kind.predictions(outputs[counts], t), y) for t in TEMPERATURES)
        is_trusted = self.reference.is_trusted and not self.reference.looks_clean
        return (len(y) * score + 200 * chosen) / (len(y) + 200) if is_trusted else score

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert self.epochs and len(self.epochs) == len(self.expected)
        for values, expected in zip(self.epochs, self.expected, strict=True):
            found = {name: value for name, value in values.items() if name.startswith("val/risk")}
            # Rounding, which differs between processors, decides on the order of numbers that are nearly equal.
            ranking = expected.pop(RANKING, None)
            assert found.pop(RANKING, None) == (None if ranking is None else pytest.approx(ranking, abs=2e-3))
            assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)
        criteria = [each[CRITERION] for each in self.expected]
        assert len(set(criteria)) == len(criteria)  # it moves


def fit(model: Any, *callbacks: Any, train: Any = None, val: Any = None, **kwargs: Any) -> Trainer:
    """A Trainer after a fit of noisy labels, in batches of unequal sizes."""
    train = batches_of(X, NOISY) if train is None else train
    return fitted([*callbacks], model, train, DataLoader(HOLDOUT, 16) if val is None else val, **kwargs)
