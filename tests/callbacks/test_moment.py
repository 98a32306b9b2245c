"""Every moment: what is logged, and what other callbacks get where a validation has no value."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

import tests.helpers as helpers
from lightning_sensitivity import SensitivityMonitor
from tests.callbacks.plain_loop import Plain, Truth
from tests.helpers import Linear, Plateau, Quiet, fitted, fitted_and_said, loader, quick_risk, unlabelled_loader

SENSITIVITY = "val/output_sensitivity"
WORST = float(torch.finfo(torch.float32).max)


class Scripted(SensitivityMonitor):
    """It logs what a script says for each validation, and 10 minus that unless it is above 5; or nothing."""

    directions = {"low": False, "high": True}  # noqa: RUF012

    def __init__(self, script: str) -> None:
        super().__init__()
        self.script = [None if each == "-" else float(each) for each in script.split()]

    def compute_values(self, trainer: Any, dataloader_idx: int, *rows: Tensor) -> Any:
        value = self.script.pop(0)
        if value is None:
            return {}
        return {"low": value} if value > 5 else {"low": value, "high": 10 - value}


# Where there is no value


class Ending(Quiet):
    """It ends a fit in the fifth epoch by an error, if there is one."""

    error: Any = None

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 4 and self.error:
            raise self.error


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_what_is_missing_is_the_worst_and_then_the_last_and_is_in_no_curve_and_no_metric_of_a_fit(
    error: Any, tmp_path: Path
) -> None:
    logger = CSVLogger(tmp_path, name=None)
    checkpoint = cb.ModelCheckpoint(tmp_path / "checkpoints", monitor="val/high", mode="max", filename="{epoch}")
    options = {"enable_checkpointing": True, "logger": logger, "max_epochs": 4 + bool(error)}
    model = Ending()
    model.error = error
    run = helpers.trainer([Scripted("- - 3 7"), checkpoint], num_sanity_val_steps=0, **options)
    try:
        run.fit(model, loader(), loader())
    except (RuntimeError, SystemExit):
        assert error
    expected = [(WORST, -WORST), (0.999 * WORST, -0.999 * WORST), (3, 7), (7, 7)]  # the last one again
    assert [(each["val/low"], each["val/high"]) for each in run.epochs] == [pytest.approx(each) for each in expected]
    curves = [(row.get("val/low"), row.get("val/high")) for row in helpers.csv_rows(logger.log_dir)]
    assert [row for row in curves if any(row)] == [("3.0", "7.0"), ("7.0", "")]
    assert Path(checkpoint.best_model_path).name == "epoch=2.ckpt" and checkpoint.best_model_score == 7
    assert helpers.logged(run, "val/") == {"val/low": 7}  # of which a tuner reads the last


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # of Trainer, EarlyStopping and scheduler
    "an epoch": ({}, {}, {}),
    "at the end of a validation": ({}, {"check_on_train_epoch_end": False}, {}),
    "several validations in an epoch": ({"val_check_interval": 2}, {}, {"interval": "step", "frequency": 2}),
}


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")  # before the first validation
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("way", WAYS)
def test_waiting_for_a_first_value_uses_up_no_patience_and_a_gap_after_it_does(way: str, mode: str) -> None:
    options, of_stopping, of_scheduler = WAYS[way]
    name = {"min": "val/low", "max": "val/high"}[mode]
    for script, num_validations in (("- - - - - - - 1", 8), ("- - - - 3 2 - -", 7)):
        model = Plateau(name, mode, strict=False, **of_scheduler)
        stopping = cb.EarlyStopping(name, patience=1, mode=mode, **of_stopping)
        epochs = {"max_epochs": 4 if "several" in way else 8, "num_sanity_val_steps": 0}
        run = fitted([stopping, Scripted(script)], model, **epochs, **options)
        assert len(run.epochs) == num_validations
        assert (model.optimizers().param_groups[0]["lr"] == 0.1) == (num_validations == 8)


WAYS_OF_RISK: dict[str, dict[str, Any]] = {
    "without a sanity check": {"num_sanity_val_steps": 0},
    "all of the validation as a sanity check": {"num_sanity_val_steps": -1},
    "fast_dev_run": {"fast_dev_run": True},
    "epochs of one batch": {"limit_train_batches": 1, "num_sanity_val_steps": 0},
    "a part of the validation": {"limit_val_batches": 2},
    "a validation in two epochs": {"check_val_every_n_epoch": 2, "max_epochs": 4, "num_sanity_val_steps": 0},
    "two validations in an epoch, the first too early": {"val_check_interval": 3, "max_epochs": 1},
    "four batches to a validation, the first too early": {"val_check_interval": 4, "check_val_every_n_epoch": None},
}


@pytest.mark.parametrize("way", WAYS_OF_RISK)
def test_values_are_right_and_nothing_is_said_in(way: str) -> None:
    train, val = loader(90, 64), unlabelled_loader(50, seed=1)
    train = loader(90, 16) if "too early" in way else train
    monitors = [quick_risk(), truth := Truth(estimator=helpers.quick_estimator())]
    _, texts = fitted_and_said(monitors, Plain(), train, val, **{"max_epochs": 2, **WAYS_OF_RISK[way]})
    assert not texts and truth.expected[-1] and (None in truth.expected) == ("too early" in way)


class Pretrained(Plain):
    """Its first epoch has no labels."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        has_none = self.trainer.training and self.current_epoch == 0
        return [batch[0], torch.full_like(batch[1], -100)] if has_none else batch

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx) if self.current_epoch else self(batch[0]).square().mean()


def test_after_an_epoch_without_labels_the_reference_is_made_of_the_next_one() -> None:
    data = loader(90), unlabelled_loader(seed=1)
    _, texts = fitted_and_said(monitor := quick_risk(), Pretrained(), *data, max_epochs=3)
    assert len(texts) == 1 and "No training sample has a label" in texts[0]
    assert ["expected_loss" in row for row in monitor.history] == [False, True, True]


# Where passes fail


class Diverging(Linear):
    """Its outputs are nan from the third epoch on."""

    def forward(self, x: Any) -> Any:
        return super().forward(x) * (math.nan if self.trainer.validating and self.current_epoch > 1 else 1)


@pytest.mark.parametrize(("kind", "name"), [(SensitivityMonitor, SENSITIVITY), (quick_risk, "val/expected_loss")])
def test_outputs_that_are_all_nan_end_a_run_by_lightning(kind: Any, name: str) -> None:
    run, texts = fitted_and_said([kind(), cb.EarlyStopping(name, patience=3)], Diverging(), max_epochs=6)
    assert len(run.epochs) == 3 and math.isnan(run.epochs[2][name])
    assert any("gave nan or inf" in text for text in texts)


def test_an_estimate_of_the_loss_of_a_single_output_is_refused() -> None:
    monitor = SensitivityMonitor(loss_estimate=True, outputs=lambda y: y[:, 0])
    helpers.refused([monitor], Quiet(), loader(40), match="`loss_estimate` should be False for a single output")
