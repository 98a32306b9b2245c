"""Every moment: what is logged, and what other callbacks get where a validation has no value."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

import tests.helpers as helpers
from lightning_sensitivity import SensitivityMonitor
from tests.callbacks.plain_loop import Plain, Truth
from tests.helpers import Linear, Quiet, fitted, fitted_and_said, loader, quick_estimator, quick_risk, unlabelled_loader

SENSITIVITY = "val/output_sensitivity"
WORST = {"val/low": 9.0, "val/high": -9.0}


class Scripted(SensitivityMonitor):
    """It logs what a script says for each validation: the same number as the negative of ``high``, or nothing."""

    names = ("low", "high")

    def __init__(self, script: str) -> None:
        super().__init__()
        self.script = [None if each == "-" else float(each) for each in script.split()]

    def compute_values(self, trainer: Any, dataloader_idx: int) -> Any:
        value = self.script.pop(0)
        if value is None:
            return {}
        return {"low": value} if value > 5 else {"low": value, "high": -value}

    def worst_values(self, dataloader_idx: int) -> dict[str, float]:
        return {"low": 9.0, "high": -9.0}


# Patience


class Stopping(cb.EarlyStopping):
    """It notes each check: the value, and the count after it."""

    def _evaluate_stopping_criteria(self, current: Any) -> Any:
        found = super()._evaluate_stopping_criteria(current)
        self.checks = [*getattr(self, "checks", []), (float(current), self.wait_count)]
        return found


class Plateau(ReduceLROnPlateau):
    """It notes each check, too."""

    checks: Any = ()

    def step(self, metrics: Any, epoch: Any = None) -> None:
        super().step(metrics)
        self.checks = [*self.checks, (float(metrics), self.num_bad_epochs)]


class Scheduled(Linear):
    """Its rate falls by a schedule that monitors a value."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.options = options

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        self.plateau = Plateau(optimizer, "min", patience=99)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.plateau, **self.options}}


def counts_without_gaps(checks: list[tuple[float, int]], mode: str, worst: float) -> list[int]:
    """What the counts should be: a value that was not measured changes none."""
    best, count, counts = math.inf, 0, []
    for value, _ in checks:
        if value != worst:
            low = value if mode == "min" else -value
            best, count = (low, 0) if low < best else (best, count + 1)
        counts.append(count)
    return counts


WAYS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {  # of Trainer, EarlyStopping and scheduler
    "an epoch": ({}, {}, {}),
    "at the end of a validation": ({}, {"check_on_train_epoch_end": False}, {"frequency": 2}),
    "several validations in an epoch": ({"val_check_interval": 2}, {}, {"interval": "step"}),
    "several, checked once": ({"val_check_interval": 2}, {"check_on_train_epoch_end": True}, {}),
    "a validation in two epochs": ({"check_val_every_n_epoch": 2}, {"check_on_train_epoch_end": True}, {}),
    "more checks than validations": ({"val_check_interval": 4}, {}, {"interval": "step", "frequency": 3}),
}
SCRIPT = "3 - 4 - - 2 2 - 3 4 - 1 1 - - 2 - 3 - 4"


@pytest.mark.filterwarnings("ignore:ReduceLROnPlateau conditioned on metric")  # before the first validation
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("way", WAYS)
def test_a_check_of_a_value_that_was_not_measured_uses_up_no_patience(way: str, mode: str) -> None:
    options, of_stopping, of_scheduler = WAYS[way]
    name = {"min": "val/low", "max": "val/high"}[mode]
    stopping = Stopping(name, patience=99, mode=mode, strict=False, **of_stopping)
    model = Scheduled({"monitor": "val/low", "strict": False, **of_scheduler})
    monitors = [stopping, Scripted(SCRIPT)] if mode == "min" else [Scripted(SCRIPT), stopping]
    fitted(monitors, model, max_epochs=8, num_sanity_val_steps=0, **options)
    for checks, direction, worst in ((stopping.checks, mode, WORST[name]), (model.plateau.checks, "min", 9.0)):
        assert len(checks) >= 4 and worst in [value for value, _ in checks[1:]]
        assert [count for _, count in checks] == counts_without_gaps(checks, direction, worst)


def test_a_patience_of_0_is_not_used_up_either() -> None:
    stopping = cb.EarlyStopping("val/low", patience=0)
    run = fitted([Scripted("- 3 - - 2 - 4 1 1"), stopping], Quiet(), max_epochs=9, num_sanity_val_steps=0)
    assert len(run.epochs) == 7 and stopping.stopped_epoch == 6


def test_every_name_without_a_value_has_its_worst_one_and_is_in_no_curve(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name=None)
    checkpoint = cb.ModelCheckpoint(tmp_path / "checkpoints", monitor="val/high", mode="max", filename="{epoch}")
    options = {"enable_checkpointing": True, "logger": logger, "max_epochs": 4, "num_sanity_val_steps": 0}
    run = fitted([Scripted("- 3 7 -"), checkpoint], Quiet(), **options)
    found = [(epoch["val/low"], epoch["val/high"]) for epoch in run.epochs]
    assert found == [(9, -9), (3, -3), (7, -9), (9, -9)]
    curves = [(row.get("val/low"), row.get("val/high")) for row in helpers.csv_rows(logger.log_dir)]
    assert [row for row in curves if any(row)] == [("3.0", "-3.0"), ("7.0", "")]
    assert Path(checkpoint.best_model_path).name == "epoch=1.ckpt" and checkpoint.best_model_score == -3


@pytest.mark.parametrize(("name", "mode", "bound"), [("val/low", "min", 4.0), ("val/high", "max", -4.0)])
def test_a_value_that_was_not_measured_does_not_exceed_a_bound(name: str, mode: str, bound: float) -> None:
    stopping = cb.EarlyStopping(name, mode=mode, patience=9, divergence_threshold=bound)
    run = fitted([Scripted("- 3 - 3.9 - 5 1"), stopping], Quiet(), max_epochs=7, num_sanity_val_steps=0)
    assert run.epochs[0][name] == bound and run.current_epoch == 6


WAYS_OF_RISK: dict[str, dict[str, Any]] = {
    "without a sanity check": {"num_sanity_val_steps": 0},
    "all of the validation as a sanity check": {"num_sanity_val_steps": -1},
    "fast_dev_run": {"fast_dev_run": True},
    "fast_dev_run of three batches": {"fast_dev_run": 3},
    "epochs of one batch": {"limit_train_batches": 1, "num_sanity_val_steps": 0},
    "a part of the validation": {"limit_val_batches": 2},
    "a validation in two epochs": {"check_val_every_n_epoch": 2, "max_epochs": 4, "num_sanity_val_steps": 0},
    "two validations in an epoch, the first too early": {"val_check_interval": 3, "max_epochs": 1},
}


@pytest.mark.parametrize("way", WAYS_OF_RISK)
def test_values_are_right_and_nothing_is_said_in(way: str) -> None:
    train, val = loader(90, 64), unlabelled_loader(50, seed=1)
    train = loader(90, 16) if "too early" in way else train
    monitors = [quick_risk(), truth := Truth(estimator=quick_estimator())]
    _, texts = fitted_and_said(monitors, Plain(), train, val, **{"max_epochs": 2, **WAYS_OF_RISK[way]})
    assert not texts and truth.expected[-1] and (None in truth.expected) == ("too early" in way)


# Where passes fail


class Failing(Linear):
    """Its passes of our own fail in some epochs, or give nan."""

    def __init__(self, epochs: Any, is_nan: bool) -> None:
        super().__init__()
        self.epochs, self.is_nan = epochs, is_nan

    def forward(self, x: Any) -> Any:
        fails = self.trainer.validating and self.current_epoch in self.epochs
        if fails and not self.is_nan:
            raise ValueError("out of luck")
        return super().forward(x) * (math.nan if fails else 1)


def test_epochs_that_fail_are_gaps_and_outputs_that_are_all_nan_end_a_run_by_lightning() -> None:
    for is_nan, last in ((False, 6), (True, 2)):
        stopping = cb.EarlyStopping(SENSITIVITY, patience=2, min_delta=-9.0)
        run, texts = fitted_and_said([SensitivityMonitor(), stopping], Failing((2, 3, 4), is_nan), max_epochs=6)
        assert len(run.epochs) == last + is_nan and texts
        assert stopping.stopped_epoch == (2 if is_nan else 0)
        values = [epoch[SENSITIVITY] for epoch in run.epochs]
        assert math.isnan(values[2]) if is_nan else values[2:5] == [pytest.approx(torch.finfo(torch.float32).max)] * 3


def test_an_estimate_of_the_loss_that_can_not_be_made_is_refused_or_left_out() -> None:
    monitor = SensitivityMonitor(loss_estimate=True, outputs=lambda y: y[:, 0])
    helpers.refused([monitor], Quiet(), loader(40), match="`loss_estimate` should be False for a single output")

    class Filling(Quiet):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.nan_to_num())

    x = torch.rand(40, 12)
    x[::20, 3] = torch.nan  # in each batch
    run = fitted([SensitivityMonitor(loss_estimate=True)], Filling(), val=DataLoader(x, 20), max_epochs=1)
    assert run.callback_metrics["val/loss_estimate"] > 1e38 > run.callback_metrics[SENSITIVITY]  # the worst value


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`", "ignore:.*(has no value|monitors)")
def test_a_loader_without_a_value_does_not_keep_the_patience_of_a_callback_on_another() -> None:
    name = f"{SENSITIVITY}/dataloader_idx_0"
    stopping = cb.EarlyStopping(name, patience=2, min_delta=1e9)
    run = fitted([SensitivityMonitor(), stopping], Quiet(), val=[loader(50), loader(0)], max_epochs=6)
    assert len(run.epochs) == 3 and run.callback_metrics[f"{SENSITIVITY}/dataloader_idx_1"] > 1e38
