"""A tuning run tells when to stop a final one: where time and sensitivity together pass those of the tuning run."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningCLI
from torch import Tensor
from torch.utils.data import DataLoader

import tests.helpers as helpers
from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.functional.sensitivity import end_of_plateau
from tests.helpers import Linear, Stream, fitted, loader, unlabelled_loader

PROGRESS, PER_OUTPUT = "val/stop_progress", "val/per_output_sensitivity"
LOSSES = [5.0, 4.0, 3.0, 2.0, 3.5, 4.0, 5.0, 6.0]  # lowest after four validations; no noise reaches the fifth


class Logging(Linear):
    """It logs given values, one in each validation, and nothing where there are no labels."""

    lr = 0.1

    def __init__(self, values: Any = LOSSES, name: str = "val/loss") -> None:
        super().__init__()
        self.values, self.name = iter(values), name

    def on_validation_epoch_start(self) -> None:
        self.value = None if self.trainer.sanity_checking else next(self.values)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if self.value is not None and not isinstance(batch, Tensor):
            self.log(self.name, self.value)


def tuned(values: Any = LOSSES, name: str = "val/loss", watch: Any = None, **options: Any) -> tuple[Any, Any]:
    """A monitor that has watched a tuning run, and that run."""
    watch = watch or SensitivityMonitor()
    run = fitted([watch, SensitivityMonitor(per_output=True)], Logging(values, name), **{"max_epochs": 8, **options})
    return watch, run


def plateau(values: list[float]) -> int:
    changes = np.diff(values)
    noise = 1.4826 * np.median(np.abs(changes - np.median(changes))) / math.sqrt(2)
    return int(np.flatnonzero(values <= min(values) + noise)[-1])


@given(st.lists(st.floats(-100, 100), min_size=2, max_size=30))
def test_a_plateau_ends_at_the_last_value_within_the_noise_of_the_lowest(values: list[float]) -> None:
    assert end_of_plateau(torch.tensor(values, dtype=torch.float64)) == plateau(values)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is said for information."""
    said = list[str]()
    monkeypatch.setattr("lightning_sensitivity.callbacks.sensitivity.rank_zero_info", said.append)
    return said


def test_time_and_sensitivity_stop_a_final_run_and_the_last_lines_say_so(lines: list[str]) -> None:
    watch, tuning = tuned()
    stop = watch.early_stopping()
    assert type(stop) is EarlyStopping
    epochs, sensitivity = watch.tuned
    assert epochs == 4 and sensitivity == pytest.approx(tuning.epochs[3][PER_OUTPUT], rel=1e-3)
    assert {*lines} == {
        f"`SensitivityMonitor`: `val/loss` stopped gaining after 4 epochs, at a per-output sensitivity of "
        f"{sensitivity}. For a final run in another script: `SensitivityMonitor(tuned=(4, {sensitivity}))`."
    }  # of both monitors
    both = [watch, stop, SensitivityMonitor(per_output=True)]
    final = fitted(both, Linear(seed=1), loader(80), unlabelled_loader(seed=2), max_epochs=30)
    progress = [values[PROGRESS] for values in final.epochs]
    by_hand = [
        math.sqrt((epoch + 1) / epochs * values[PER_OUTPUT] / sensitivity) for epoch, values in enumerate(final.epochs)
    ]
    assert progress == pytest.approx(by_hand, rel=1e-5)
    assert 1 < len(progress) < 30 and progress[-1] > 1 and all(each <= 1 for each in progress[:-1])
    times = len(progress) / epochs, final.epochs[-1][PER_OUTPUT] / sensitivity
    assert lines[-1:] == [
        f"`SensitivityMonitor`: the final run was stopped after {len(progress)} epochs, at `val/stop_progress` "
        f"{progress[-1]:.3g}: {times[0]:.3g} times the epochs, and {times[1]:.3g} times the sensitivity, at which the "
        "tuning run stopped gaining."
    ]
    other = SensitivityMonitor(tuned=watch.tuned)  # of another script
    again = fitted(
        [other, other.early_stopping()], Linear(seed=1), loader(80), unlabelled_loader(seed=2), max_epochs=30
    )
    assert [values[PROGRESS] for values in again.epochs] == pytest.approx(progress)


# Where the tuning run was when it stopped gaining, by what it was
RUNS: dict[str, tuple[dict[str, Any], float]] = {
    "as it comes": ({}, 4),
    "half epochs": ({"val_check_interval": 2, "max_epochs": 4}, 2),
    "every second epoch": ({"check_val_every_n_epoch": 2, "max_epochs": 16}, 8),
    "so many steps": ({"max_epochs": -1, "max_steps": 4 * 8}, 4),
    "so many batches, over the ends of epochs": (
        {"val_check_interval": 6, "check_val_every_n_epoch": None, "max_epochs": 12}, 6),
    "a stream": ({"train": DataLoader(Stream(64, has_labels=True), 16)}, 4),
    "several loaders": ({"val": [loader(seed=1), loader(20, seed=2)]}, 4),
    "a loader without labels": ({"val": [loader(seed=1), unlabelled_loader(20)]}, 4),
}  # fmt: skip


@pytest.mark.parametrize("what", RUNS)
def test_the_tuning_run_may_validate_at_other_times_and_have_several_loaders(what: str) -> None:
    options, epochs = RUNS[what]
    watch, run = tuned(**options)
    assert len(run.epochs) == 8
    watch.early_stopping()
    assert watch.tuned[0] == epochs


def test_a_final_run_may_validate_in_parts_of_epochs_and_has_the_progress_of_the_first_loader() -> None:
    watch = SensitivityMonitor(tuned=(2, 1e9), at="net")
    val = [unlabelled_loader(seed=1), unlabelled_loader(20, seed=2)]
    run = fitted([watch, watch.early_stopping()], Linear(), val=val, val_check_interval=2, max_epochs=2)
    sensitivity = [math.sqrt(values[PROGRESS] ** 2 / (place / 4)) for place, values in enumerate(run.epochs, 1)]
    of_outputs = SensitivityMonitor(per_output=True, at="net")
    again = fitted([of_outputs], Linear(), val=val, val_check_interval=2, max_epochs=2)
    truth = [math.sqrt(values[f"{PER_OUTPUT}/dataloader_idx_0"] / 1e9) for values in again.epochs]
    assert sensitivity == pytest.approx(truth, rel=1e-4) and len(run.epochs) == 4


def test_what_is_monitored_may_be_highest_where_it_is_best() -> None:
    watch, _ = tuned([-each for each in LOSSES], "accuracy")
    assert watch.early_stopping("accuracy", mode="max").monitor == PROGRESS and watch.tuned[0] == 4


def test_of_several_tuning_runs_the_last_one_counts() -> None:
    watch, _ = tuned()
    watch.early_stopping()
    tuned([*LOSSES[1:], 9.0], watch=watch)
    watch.early_stopping()
    assert watch.tuned[0] == 3


def test_a_tuning_run_may_end_by_early_stopping() -> None:
    watch = SensitivityMonitor()
    fitted([watch, EarlyStopping("val/loss", patience=2)], Logging(), max_epochs=8)
    watch.early_stopping()
    assert watch.tuned[0] == 4


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks")
def test_a_tuning_run_is_resumed_from_its_checkpoint_by_a_monitor_of_the_same_noise(tmp_path: Path) -> None:
    _, run = tuned(LOSSES[:6], max_epochs=6)
    run.save_checkpoint(tmp_path / "six.ckpt")
    for noise, epochs in ((0.1, 4), (0.2, None)):
        watch = SensitivityMonitor(noise)
        options = {"ckpt_path": tmp_path / "six.ckpt", "max_epochs": 8}
        fitted([watch, SensitivityMonitor(per_output=True)], Logging(LOSSES[6:]), **options)
        if epochs is None:
            with pytest.warns(UserWarning, match="`val/loss` has under 4 validations, so a final run is not stopped"):
                watch.early_stopping()
        else:
            watch.early_stopping()
            assert watch.tuned[0] == epochs


def test_a_final_run_is_resumed_where_it_was(tmp_path: Path) -> None:
    watch = SensitivityMonitor(tuned=(4, 1e9))
    whole = fitted([watch, watch.early_stopping()], Linear(), val=unlabelled_loader(), max_epochs=4)
    first = fitted([watch, watch.early_stopping()], Linear(), val=unlabelled_loader(), max_epochs=2)
    first.save_checkpoint(tmp_path / "two.ckpt")
    options = {"val": unlabelled_loader(), "max_epochs": 4, "ckpt_path": tmp_path / "two.ckpt"}
    again = fitted([watch, watch.early_stopping()], Linear(), **options)
    both = [values[PROGRESS] for values in [*first.epochs, *again.epochs]]
    assert both == pytest.approx([values[PROGRESS] for values in whole.epochs])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (range(8, 0, -1), "`val/loss` had not got worse by the tuning run's end"),
        ([3, 1, 2, math.nan], "under 4 validations"),
    ],
)
def test_where_nothing_is_known_it_says_so_and_stops_nothing(values: Any, match: str) -> None:
    values = list(map(float, values))
    watch, _ = tuned(values, max_epochs=len(values))
    with pytest.warns(UserWarning, match=match + ".*, so a final run is not stopped"):
        stop = watch.early_stopping()
    final = fitted([watch, stop], Linear(), val=unlabelled_loader(), max_epochs=12)
    assert len(final.epochs) == 12 and PROGRESS not in final.epochs[-1]


def test_a_name_that_was_not_logged_is_refused_with_those_that_were() -> None:
    watch, _ = tuned()
    with pytest.raises(ValueError, match=r"got 'val_loss'. Logged were \['train_loss', 'val/loss', 'val/output_sens"):
        watch.early_stopping("val_loss", mode="min")
    for arguments in ({"mode": "lowest"}, {"monitor": "train_loss"}):  # of another name, nobody knows which is best
        with pytest.raises(MisconfigurationException, match="`mode` should be 'min' or 'max' for"):
            watch.early_stopping(**arguments)
    with pytest.raises(ValueError, match=r"Logged were \[\]"):
        SensitivityMonitor().early_stopping()


@pytest.mark.parametrize("options", [{}, {"mode": "max"}, {"mode": "max", "stopping_threshold": 1.0}])
def test_early_stopping_by_hand_that_would_stop_too_early_is_refused(options: dict[str, Any]) -> None:
    watch = SensitivityMonitor(tuned=(12, 0.031))
    match = "`EarlyStopping` of `val/stop_progress` needs `mode='max'"
    helpers.refused([watch, EarlyStopping(PROGRESS, **options)], Linear(), match=match)
    right = EarlyStopping(PROGRESS, mode="max", stopping_threshold=1.0, patience=1000)
    fitted([watch, right], Linear(), max_epochs=1)


class Late(SensitivityMonitor):
    """It measures the second epoch and the third, and fails in the latter."""

    def is_ready(self, trainer: Any) -> bool:
        return trainer.current_epoch > 0


def test_a_module_that_does_not_let_it_log_ends_no_run() -> None:
    class Mute(Linear):
        def log(self, name: str, value: Any) -> None:
            """Take no options."""

    watch = SensitivityMonitor(tuned=(2, 1e-9))
    run, texts = helpers.fitted_and_said(watch, Mute(), val=unlabelled_loader(60), max_epochs=2)
    assert run.current_epoch == 2 and ["`val/stop_progress`: TypeError" in text for text in texts].count(True) == 1


def test_a_validation_without_a_value_stops_nothing() -> None:
    model = helpers.failing(RuntimeError("out of luck"), lambda x, epoch: epoch == 2)
    watch = Late(tuned=(2, 1e9))
    with pytest.warns(UserWarning, match="out of luck"):
        run = fitted([watch, watch.early_stopping()], model, val=unlabelled_loader(60), max_epochs=3)
    first, second, third = (values[PROGRESS] for values in run.epochs)
    assert first < -1e30 and third == second > 0


def test_within_an_epoch_of_unknown_length_nothing_is_known() -> None:
    watch = SensitivityMonitor(tuned=(2, 1e9))
    train = DataLoader(Stream(64, has_labels=True), 16)
    _, texts = helpers.fitted_and_said(
        [watch, watch.early_stopping()], Linear(), train, unlabelled_loader(60), val_check_interval=2
    )
    assert ["does not log `val/stop_progress` within an epoch" in text for text in texts] == [True]


def test_of_a_number_the_sensitivity_of_the_one_output_counts() -> None:
    class Regression(Logging):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[:, 0]

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (self(batch[0]) - batch[1]).square().mean()

    watch = SensitivityMonitor()
    run = fitted(watch, Regression(), max_epochs=8)
    watch.early_stopping()
    S = run.epochs[3]["val/output_sensitivity"]
    assert watch.tuned[0] == 4 and watch.tuned[1] == pytest.approx(S, rel=0.2)  # about its mean, which is about 0


YAML = """
trainer:
  max_epochs: 9
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  callbacks:
    - class_path: lightning_sensitivity.SensitivityMonitor
      init_args:
        tuned: [2, 1.0e-9]
    - class_path: lightning.pytorch.callbacks.EarlyStopping
      init_args: {monitor: val/stop_progress, mode: max, stopping_threshold: 1, patience: 1000}
"""


def test_lightning_cli_takes_both_numbers_from_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.yaml").write_text(YAML)
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Linear, run=False, save_config_callback=None)
    cli.trainer.fit(cli.model, loader(), unlabelled_loader())
    assert cli.trainer.current_epoch == 1 and float(cli.trainer.callback_metrics[PROGRESS]) > 1
