"""One moment: nothing is logged before all samples are there, or where it failed, and other callbacks go on."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.callbacks.plain_loop import (
    CRITERION,
    DISAGREEMENT,
    HOLDOUT,
    NOISY,
    RANKING,
    Plain,
    Truth,
    X,
    batches_of,
    fit,
)
from tests.helpers import fitted, fitted_and_said

SENSITIVITY = "val/output_sensitivity"
NUM_STEPS = 6  # of an epoch
WORST = {CRITERION: 2.0, RANKING: 2.0, DISAGREEMENT: 1.0}


def curve(logger: CSVLogger, name: str) -> list[int]:
    """The epochs at which a logger got a value."""
    return [int(row["epoch"]) for row in helpers.csv_rows(logger.log_dir) if row.get(name)]


def watching(folder: Path) -> tuple[Any, Any, CSVLogger]:
    stopping = cb.EarlyStopping(CRITERION, patience=2)
    checkpoint = cb.ModelCheckpoint(folder / "checkpoints", monitor=CRITERION, filename="{epoch}-{step}", save_top_k=2)
    return stopping, checkpoint, CSVLogger(folder, name=None)


# Before the samples are there


@pytest.mark.parametrize(("num_samples", "first"), [(3000, NUM_STEPS), (40, 3)])
def test_nothing_is_logged_before_there_are_as_many_samples_as_are_wanted_or_an_epoch(
    num_samples: int, first: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NUM_SCORED", "MAX_SAMPLES"):
        monkeypatch.setattr(f"lightning_sensitivity.callbacks.training.{name}", num_samples)
    stopping, checkpoint, logger = watching(tmp_path)
    options = {"enable_checkpointing": True, "logger": logger, "log_every_n_steps": 1, "val_check_interval": 1}
    run = fit(Plain(), RiskMonitor(), stopping, checkpoint, max_epochs=1, **options)
    before, after = run.epochs[: first - 1], run.epochs[first - 1 :]
    assert all(epoch == WORST for epoch in before)
    assert all(epoch[CRITERION] < 2 and epoch.keys() >= {RANKING, DISAGREEMENT} for epoch in after)
    assert len(run.epochs) == NUM_STEPS and stopping.stopped_epoch == 0
    assert checkpoint.best_model_score < 2
    assert len(curve(logger, CRITERION)) == len(after)
    others = [name for name in helpers.csv_rows(logger.log_dir)[0] if name.startswith("val/")]
    assert sorted(others) == sorted([CRITERION, RANKING, DISAGREEMENT])


class EverySecond(RiskMonitor):
    def should_measure(self, trainer: Any) -> bool:
        return trainer.current_epoch % 2 == 1


WAYS: dict[str, dict[str, Any]] = {
    "without a sanity check": {"num_sanity_val_steps": 0},
    "all of the validation as a sanity check": {"num_sanity_val_steps": -1},
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run of three batches": {"fast_dev_run": 3},
    "epochs of one batch": {"limit_train_batches": 1, "num_sanity_val_steps": 0},
    "a part of the validation": {"limit_val_batches": 2},
    "a validation in two epochs": {"check_val_every_n_epoch": 2, "max_epochs": 4},
    "two validations in an epoch, the first too early": {"val_check_interval": 3, "max_epochs": 1},
}


class Late(Truth):
    """It knows nothing of a validation that comes too early."""

    def on_fit_end(self, *args: Any) -> None:
        self.epochs = self.epochs[-len(self.expected) :]
        super().on_fit_end(*args)

    def values(self, model: Any) -> dict[str, float]:
        if model.trainer.is_last_batch:
            return super().values(model)
        self.holdout.clear()
        return WORST


@pytest.mark.parametrize("name", WAYS)
def test_values_are_right_and_nothing_is_said_in(name: str) -> None:
    truth = Late() if "too early" in name else Truth()
    train, val = (batches_of(X, NOISY, batch_size=32), DataLoader(HOLDOUT, 16))  # and of 26, of 2
    _, texts = fitted_and_said([RiskMonitor(), truth], Plain(), train, val, **{"max_epochs": 2, **WAYS[name]})
    assert not texts and math.isfinite(truth.expected[-1][CRITERION])


def test_should_measure_leaves_an_epoch_out(tmp_path: Path) -> None:
    stopping, checkpoint, logger = watching(tmp_path)
    options = {"enable_checkpointing": True, "logger": logger, "log_every_n_steps": 1}
    run = fit(Plain(), EverySecond(), stopping, checkpoint, max_epochs=5, **options)
    assert [epoch[CRITERION] == 2 for epoch in run.epochs] == [True, False] * 2 + [True]
    assert curve(logger, CRITERION) == curve(logger, DISAGREEMENT) == [1, 3] and run.current_epoch == 5


# Where a pass fails


class Failing(Plain):
    """Its passes of our own fail in some epochs, or give nan."""

    def __init__(self, epochs: Any, is_nan: bool = False) -> None:
        super().__init__()
        self.epochs, self.is_nan = epochs, is_nan

    def forward(self, x: Any) -> Any:
        fails = self.trainer.validating and self.current_epoch in self.epochs
        if fails and not self.is_nan:
            raise ValueError("out of luck")
        return super().forward(x) * (math.nan if fails else 1)


@pytest.mark.parametrize("is_nan", [False, True])
@pytest.mark.parametrize("epochs", [(0, 1, 3), (2, 3, 4)])
def test_epochs_that_fail_are_gaps_and_count_for_no_other_callback(epochs: Any, is_nan: bool, tmp_path: Path) -> None:
    stopping, checkpoint, logger = watching(tmp_path)
    options = {"enable_checkpointing": True, "logger": logger, "log_every_n_steps": 1}
    model, monitors = Failing(epochs, is_nan), [SensitivityMonitor(), RiskMonitor()]
    run, texts = fitted_and_said([*monitors, stopping, checkpoint], model, max_epochs=6, **options)
    measured = [epoch for epoch in range(6) if epoch not in epochs]
    assert run.current_epoch == 6 and stopping.stopped_epoch == 0 and texts
    assert [epoch for epoch in range(6) if run.epochs[epoch][CRITERION] < 2] == measured
    assert curve(logger, CRITERION) == curve(logger, RANKING) == curve(logger, SENSITIVITY) == measured
    assert 0 < checkpoint.best_model_score < 2
    best = min(measured, key=lambda epoch: run.epochs[epoch][CRITERION])
    assert Path(checkpoint.best_model_path).name.startswith(f"epoch={best}-")
    # Sensitivity has no worst value; a bound is not exceeded.
    assert run.epochs[epochs[0]][SENSITIVITY] == pytest.approx(run.epochs[1][SENSITIVITY] if epochs[0] else 0)


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader` across ranks is zero", "ignore:.*has no value")
def test_a_loader_without_a_value_does_not_keep_the_patience_of_a_callback_on_another() -> None:
    name = f"{CRITERION}/dataloader_idx_0"
    stopping, model = cb.EarlyStopping(name, patience=2, min_delta=9.0), Plain()
    vals = [DataLoader(HOLDOUT, 16), DataLoader(HOLDOUT[:0], 16)]
    run = fit(model, RiskMonitor(), stopping, val=vals, max_epochs=6)
    assert run.current_epoch == 3 and run.callback_metrics[f"{CRITERION}/dataloader_idx_1"] == 2


def test_a_fit_that_ends_before_there_are_enough_samples_says_so() -> None:
    texts = [fitted_and_said(RiskMonitor(), Plain(), val_check_interval=1, max_steps=steps)[1] for steps in (2, 4)]
    assert [len(each) for each in texts] == [1, 0] and "has no value: no validation came after 3,000" in texts[0][0]


def test_epochs_without_a_value_do_not_exceed_the_bound_of_a_callback() -> None:
    stopping = cb.EarlyStopping(CRITERION, patience=9, divergence_threshold=1.9)
    run = fit(Plain(), RiskMonitor(), stopping, val_check_interval=1, max_epochs=1)
    assert len(run.epochs) == NUM_STEPS and run.epochs[0][CRITERION] == pytest.approx(1.9)


def test_a_regression_has_a_worst_value_too() -> None:
    train = batches_of(HOLDOUT, HOLDOUT[:, 0])
    model = Plain(1, lambda y, t: (y[:, 0] - t).square().mean())
    run = fitted(RiskMonitor("regression"), model, train, DataLoader(HOLDOUT, 16), val_check_interval=2, max_epochs=1)
    assert run.epochs[0] == {CRITERION: pytest.approx(torch.finfo(torch.float32).max)} and run.epochs[1][CRITERION] < 9
