"""What RiskMonitor logs is what a plain loop gives, over batches of unequal sizes."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as cb
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, mse_loss, one_hot

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor
from tests.callbacks.plain_loop import CORRECT, CRITERION, HOLDOUT, NOISY, RANKING, Plain, Truth, X, batches_of, fit
from tests.helpers import Classifier, first_tensor, fitted, fitted_and_said, loader, logged
from tests.helpers import unlabelled_loader as unlabelled

INDEX = torch.arange(90)
UPPER = (NOISY > 1).long()
SOFT = 0.9 * one_hot(NOISY, 4) + 0.025
FEW = 0 * CORRECT[:50] - 100
FEW[::7] = helpers.labelled(50, seed=1).tensors[1][::7]


def bce(outputs: Tensor, targets: Tensor) -> Tensor:
    return binary_cross_entropy_with_logits(outputs, targets.to(outputs).reshape(outputs.shape))


def mse(outputs: Tensor, targets: Tensor) -> Tensor:
    return mse_loss(outputs, targets.to(outputs).reshape(outputs.shape))


def images(x: Tensor) -> Tensor:
    """The first feature is in one corner, and so on."""
    squares = torch.nn.functional.interpolate(x[:, :4].reshape(-1, 1, 2, 2), size=8)
    return squares + 0.1 * x.repeat(1, 6)[:, :64].reshape(-1, 1, 8, 8)


def tokens(x: Tensor) -> Tensor:
    return (9 * x[:, :5]).long()


class Reads(Plain):
    """A bag of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 12).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.words(x).mean(1))


class Centred(Plain):
    """The samples of a batch interact."""

    def forward(self, x: Tensor) -> Tensor:
        outputs = super().forward(x)
        return outputs - outputs.mean(0)


@dataclass(frozen=True)
class Case:
    """The labels, the model, what becomes of the features, and whether the reference must choose."""

    labels: Tensor = NOISY
    make: Any = Plain
    x: Any = lambda x: x
    chooses: bool = True
    holdout_labels: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the monitor
    truth: dict[str, Any] = field(default_factory=dict)


def blind(batch: Any) -> Tensor:
    return torch.ones(len(first_tensor(batch)), 1)


HALF = {"features": lambda batch: first_tensor(batch)[:, :6].sin_()}  # it gets a copy
CASES = {
    "multiclass": Case(),
    "multiclass, some without a label": Case(NOISY.where(INDEX % 5 > 0, -100)),
    "multiclass, soft": Case(SOFT),
    "multiclass, correct": Case(CORRECT, chooses=False),
    "multiclass, samples that interact": Case(make=Centred),
    "multiclass, features=": Case(options=HALF, truth={"seen": lambda batch: first_tensor(batch)[:, :6].sin()}),
    "multiclass, features= that are blind": Case(
        NOISY.where(INDEX % 6 > 0, 0), chooses=False, options={"features": blind}, truth={"seen": blind}),
    "multiclass, images": Case(CORRECT.where(INDEX % 4 > 0, NOISY), lambda: Plain(width=64), images),
    "multiclass, tokens": Case(make=Reads, x=tokens),
    "multiclass, labels": Case(holdout_labels=FEW),
    "multiclass, labels, features= that are blind": Case(
        NOISY.where(INDEX % 6 > 0, 0), chooses=False, holdout_labels=FEW, options={"features": blind},
        truth={"seen": blind}),
    "binary": Case(UPPER.float(), lambda: Plain(1, bce)),
    "binary, labels": Case(UPPER, lambda: Plain(1, bce), holdout_labels=FEW.clamp(max=1).float()),
    "regression": Case(X[:, :1] + X[:, 1:2].sin(), lambda: Plain(1, mse)),
    "regression, two targets": Case(X[:, :2] + 0.1 * X[:, 2:4], lambda: Plain(2, mse)),
    "regression, labels": Case(X[:, 0], lambda: Plain(1, mse), holdout_labels=HOLDOUT[:, 0]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_a_plain_loop(name: str) -> None:
    case, task, has_labels = CASES[name], name.partition(",")[0], CASES[name].holdout_labels is not None
    monitor = RiskMonitor(task, validation_labels=has_labels, **case.options)
    truth = Truth(task, has_labels=has_labels, **case.truth)
    holdout = [case.x(HOLDOUT), *([case.holdout_labels] if has_labels else [])]
    train, val = batches_of(case.x(X), case.labels), batches_of(*holdout)
    _, texts = fitted_and_said([monitor, truth], case.make(), train, val, max_epochs=3)
    assert not texts
    assert monitor.record.verdict is not None and monitor.record.verdict.is_trusted == case.chooses
    assert truth.reference.kind == name.rpartition(", ")[2] or truth.reference.kind in ("vectors", "tokens")


def test_of_many_training_samples_evenly_spaced_batches_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sensitivity.callbacks.training.NUM_SCORED", 30)
    fit(Plain(), RiskMonitor(), Truth(scored=[0, 2]), max_epochs=2)


def test_a_step_that_writes_to_its_batch_changes_nothing() -> None:
    class Writer(Plain):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            loss = super().training_step([part.clone() for part in batch], batch_idx)
            batch[0].zero_(), batch[1].zero_()
            return loss

    monitor, model = RiskMonitor(), Writer()
    for _ in range(2):  # a second fit has samples and a reference of its own
        fit(model, monitor, Truth(), max_epochs=2)


def test_precisions_give_nearly_the_same() -> None:
    data, precisions = (loader(50), unlabelled(50, seed=1)), ("32-true", "bf16-mixed", "bf16-true", "64-true")
    found = [logged(fitted(RiskMonitor(), Classifier(0.0), *data, precision=each), "val/") for each in precisions]
    assert found[1:] == [pytest.approx(found[0], rel=0.05, abs=0.02)] * 3


@pytest.mark.parametrize(("y", "is_said"), [(NOISY[:1], False), (0 * NOISY, True)])
def test_a_single_sample_and_a_single_class_have_a_criterion(y: Tensor, is_said: bool) -> None:
    run, texts = fitted_and_said(RiskMonitor(), Plain(), batches_of(X[: len(y)], y), unlabelled(seed=1))
    assert ["finds only 1 classes" in text for text in texts] == [True] * is_said
    assert math.isfinite(run.callback_metrics[CRITERION])


def test_each_of_several_loaders_has_values_under_lightnings_names() -> None:
    def values(loaders: Any) -> dict[str, float]:
        model = Plain()
        model.net[2].p = 0.0  # each loader draws a random number
        return logged(fit(model, RiskMonitor(), val=loaders), "val/risk_")

    first, second = unlabelled(50, seed=1), unlabelled(20, seed=2)
    both, alone, other = values([first, second]), values(first), values(second)
    expected = {f"{name}/dataloader_idx_0": value for name, value in alone.items()}
    expected |= {f"{name}/dataloader_idx_1": value for name, value in other.items()}
    assert both == pytest.approx(expected, rel=1e-5)


def test_early_stopping_and_checkpoints_follow_it_and_the_progress_bar_shows_it(tmp_path: Path) -> None:
    stopping = cb.EarlyStopping(CRITERION, patience=3)
    checkpoint = cb.ModelCheckpoint(tmp_path, monitor=CRITERION, filename="{epoch}")
    model = Plain()
    model.lr = 0.05
    run = fit(model, stopping, checkpoint, RiskMonitor(prog_bar=True), enable_checkpointing=True, max_epochs=60)
    values = [epoch[CRITERION] for epoch in run.epochs]
    best = values.index(min(values))
    assert len(values) == best + 4 < 60
    assert Path(checkpoint.best_model_path).name == f"epoch={best}.ckpt"
    assert run.progress_bar_metrics.keys() & {CRITERION, RANKING} == {CRITERION}


# Where labels are


def test_labels_that_do_not_fit_and_batches_without_any_are_said_and_cost_no_run() -> None:
    for labels, match in ((CORRECT[:50] + 7, "Expected labels from 0 to 3"), (FEW * 0 - 100, "found no label")):
        options = {"max_epochs": 2, "num_sanity_val_steps": 0}
        monitor, val = RiskMonitor(validation_labels=True), batches_of(HOLDOUT, labels)
        run, texts = fitted_and_said(monitor, Plain(), batches_of(X, NOISY), val, **options)
        assert any(match in text for text in texts) and math.isfinite(run.callback_metrics[CRITERION])
        assert run.current_epoch == 2 and monitor.record.loaders[0].history[-1].num_labels == 0


def test_labels_in_a_validation_batch_do_not_count_unless_they_are_wanted() -> None:
    found = [logged(fit(Plain(), RiskMonitor(), val=batches_of(HOLDOUT, y)), "val/risk") for y in (FEW, CORRECT[:50])]
    assert found[0] == found[1]
