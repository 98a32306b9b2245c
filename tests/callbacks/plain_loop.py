"""What RiskMonitor has to log, by plain torch over the samples of a fit, and the models and data for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from lightning.pytorch import Trainer
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import Reference
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.reference.kinds import kind_of
from lightning_sensitivity.reference.observations import projection
from tests.helpers import NUM_FEATURES, Classifier, History, first_tensor, fitted, inputs, labelled

LOSS, ACCURACY, AUROC = (f"val/expected_{name}" for name in ("loss", "accuracy", "auroc"))
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


def names_of(task: str, num_columns: int = 2) -> set[str]:
    """What is logged by default."""
    return {LOSS, *(f"val/expected_{name}" for name in find_task(task).default_metrics(num_columns))}


class Kind(NamedTuple):
    """How predictions are made, compared with labels or the reference, and turned into classes."""

    predictions: Callable[[Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    classes: Callable[[Tensor], Tensor] = lambda p: p.argmax(1)


def shaped(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda outputs, y: loss(outputs.reshape(y.shape), y)


KINDS = {
    "multiclass": Kind(lambda outputs: outputs.softmax(1), cross_entropy),
    "binary": Kind(
        lambda outputs: outputs.reshape(-1, 1).sigmoid(),
        shaped(binary_cross_entropy_with_logits),
        lambda p: p[:, 0] > 0.5,
    ),
    "regression": Kind(lambda outputs: outputs, shaped(mse_loss)),
}


def label_matrix(labels: Tensor, task: str, num_outputs: int) -> Tensor:
    """Labels as a plain loop has them: in one column for two classes."""
    if task == "multiclass" and labels.ndim == 1:
        return one_hot(labels.long(), num_outputs).double()
    return labels.double().reshape(len(labels), -1)


def by_kind(x: Any) -> dict[str, Tensor]:
    """What a reference sees, of which most have one kind."""
    return x if isinstance(x, dict) else {kind_of(x): x}


def fit_reference(x: Any, y: Tensor, task: str, estimator: Any) -> Any:
    return Reference(task, estimator).fit(by_kind(x), y)


def reweighed(q: Tensor, known: Tensor, shares: Any) -> Tensor:
    """Predictions by a reference of training samples with known shares of classes, for samples with others."""
    q = q * torch.as_tensor(shares) / known
    return q / q.sum(1, keepdim=True)


def expected_by(reference: Any, outputs: Tensor, x: Any, shares: Any = None) -> dict[str, float]:
    """What RiskMonitor logs, from outputs of the network, and what a reference sees of the same samples."""
    order = projection(by_kind(x)).argsort()  # of the samples, by which labels are drawn
    task, outputs, x = reference.task, outputs[order], {name: part[order] for name, part in by_kind(x).items()}
    kind = KINDS[task]
    q = torch.from_numpy(reference.predict(x) if task == "regression" else reference.predict_proba(x))
    q = q if shares is None else reweighed(q, torch.from_numpy(reference.shares_), shares)
    q = q[:, 1:] if task == "binary" else q.reshape(len(q), -1)
    labels, is_finite = drawn(q) if task != "regression" else q, outputs.reshape(len(q), -1).isfinite().all(1)
    outputs, q = outputs[is_finite], q[is_finite]
    loss = float(kind.loss(outputs, q))
    if task == "regression":
        return {LOSS: loss + reference.score_}
    p = kind.predictions(outputs)
    labels, classes = labels[:, is_finite], kind.classes(p).int()
    found = {LOSS: loss, ACCURACY: float((labels == classes).double().mean())}
    columns = range(p.shape[1]) if task == "multiclass" else [0]
    wanted = [labels == (k if task == "multiclass" else 1) for k in columns]
    areas = [
        roc_auc_score(y.flatten(), p[:, k].repeat(len(y))) for k, y in zip(columns, wanted, strict=True) if y.any()
    ]
    return {**found, AUROC: sum(areas) / len(areas)}


def drawn(q: Tensor) -> Tensor:
    """20 labels per sample, ``(20, N)``, at evenly spaced quantiles that begin at the multiples of the golden ratio."""
    q = torch.cat([1 - q, q], 1) if q.shape[1] == 1 else q
    offsets = [(place + 1) * (math.sqrt(5) - 1) / 2 % 1 for place in range(len(q))]
    rows = [[int((row.cumsum(0) <= (k + offset) / 20).sum()) for row, offset in zip(q, offsets, strict=True)]
            for k in range(20)]  # fmt: skip
    return torch.tensor(rows)


class Truth(History):
    """Goes over all samples at each validation, and compares what was logged when the fit ends.

    It stands after callbacks that change weights for a validation, such as those that average them.

    Args:
        task: The task.
        seen: What the reference sees of a batch.
        has_labels: Whether validation labels count beside the reference.
        estimator: What is fitted as the reference; by default its own learners.
        shares: The shares of the classes among unseen samples.
    """

    def __init__(
        self,
        task: str = "multiclass",
        seen: Callable[[Any], Tensor] = first_tensor,
        has_labels: bool = False,
        estimator: Any = None,
        shares: Any = None,
    ) -> None:
        super().__init__()
        self.estimator, self.shares = estimator, shares
        self.task, self.kind, self.seen, self.has_labels = task, KINDS[task], seen, has_labels
        self.training: list[Any] = []
        self.holdout: list[Any] = []
        self.reference: Any = None
        self.expected: list[dict[str, float] | None] = []  # None where it is too early

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 0:
            self.training.append([part.clone() for part in batch])

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and not self.expected:
            self.holdout.append(batch if isinstance(batch, Tensor) else [part.clone() for part in batch])

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking and batch_idx == trainer.num_val_batches[0] - 1:
            is_whole = trainer.is_last_batch or trainer.current_epoch > 0
            self.expected.append(self.values(pl_module) if is_whole else None)

    def values(self, model: Any) -> dict[str, float]:
        outputs = torch.cat([model(first_tensor(batch)) for batch in self.holdout]).double()
        num_outputs = outputs.shape[1] if outputs.ndim > 1 else 1
        if self.reference is None:
            seen = torch.cat([self.seen(batch) for batch in self.training])
            known, y = self.labelled(seen, self.training, num_outputs)
            self.reference = fit_reference(known, y, self.task, self.estimator)
        if not self.reference.may_choose(sees_all=self.seen is first_tensor):
            return self.of_labels(outputs, num_outputs) if self.has_labels else {}
        seen = torch.cat([self.seen(batch) for batch in self.holdout])
        found = expected_by(self.reference, outputs, seen, self.shares)
        if not self.has_labels:
            return found
        of_labels = self.of_labels(outputs, num_outputs)
        m = len(self.labelled(outputs, self.holdout, num_outputs)[1])
        return {name: (m * of_labels[name] + 1000 * found[name]) / (m + 1000) for name in found}

    def labelled(self, rows: Tensor, batches: list[Any], num_outputs: int) -> tuple[Tensor, Tensor]:
        """The rows and labels of samples that have one, and are finite."""
        labels = torch.cat([batch[1] for batch in batches])
        counts = (labels.reshape(len(labels), -1)[:, 0].long() != -100) & rows.reshape(len(rows), -1).isfinite().all(1)
        return rows[counts], label_matrix(labels[counts], self.task, num_outputs)

    def of_labels(self, outputs: Tensor, num_outputs: int) -> dict[str, float]:
        """The same values, of labels."""
        outputs, y = self.labelled(outputs, self.holdout, num_outputs)
        loss = float(self.kind.loss(outputs, y))
        if self.task == "regression":
            return {LOSS: loss}
        p = self.kind.predictions(outputs)
        areas = [roc_auc_score(y[:, k], p[:, k]) for k in range(p.shape[1])]
        accuracy = (self.kind.classes(p) == self.kind.classes(y)).double().mean()
        return {LOSS: loss, ACCURACY: float(accuracy), AUROC: sum(areas) / len(areas)}

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        assert self.epochs and len(self.epochs) == len(self.expected)
        pairs = [pair for pair in zip(self.epochs, self.expected, strict=True) if pair[1]]
        for values, expected in pairs:
            found = {name: value for name, value in values.items() if name.startswith("val/expected_")}
            others = names_of(self.task) - {LOSS, ACCURACY, AUROC}  # which this loop does not know
            found = {name: value for name, value in found.items() if name not in others}
            area = {AUROC: pytest.approx(expected[AUROC], abs=5e-4)} if AUROC in expected else {}  # ranks may be ties
            assert found == {name: pytest.approx(each, rel=1e-5, abs=1e-7) for name, each in expected.items()} | area
        losses = [expected[LOSS] for _, expected in pairs if expected]
        assert len(set(losses)) == len(losses)  # it moves


def fit(model: Any, *callbacks: Any, train: Any = None, val: Any = None, **kwargs: Any) -> Trainer:
    """A Trainer after a fit of noisy labels, in batches of unequal sizes."""
    train = batches_of(X, NOISY) if train is None else train
    return fitted([*callbacks], model, train, DataLoader(HOLDOUT, 16) if val is None else val, **kwargs)
