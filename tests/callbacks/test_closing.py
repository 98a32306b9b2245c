"""The line at the end of a fit says what is true of this fit: the epoch and file, what chose, and what labels are."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as cb

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.callbacks.closing import closing_line
from lightning_sensitivity.callbacks.record import ValidationResult, Verdict
from tests.callbacks.plain_loop import CRITERION, HOLDOUT, NOISY, RANKING, Plain, X, batches_of, fit
from tests.helpers import fitted, inputs, trainer, unlabelled_loader

FIRST, SECOND = (f"{CRITERION}/dataloader_idx_{index}" for index in (0, 1))
KNOWN = "without having seen them, it predicts 43% of 90 training labels"
KNOWN += "; the network, which has seen them, predicts 80%"
NOISE = "About 24% of the training labels can't be explained: they are wrong, or not to be known from the inputs."
FALLING = "It was still falling: train for longer."


@pytest.fixture
def said(caplog: Any) -> Any:
    caplog.set_level("INFO", "lightning.pytorch")
    return caplog


def lines(text: str) -> list[str]:
    return [each[each.index("`") :] for each in text.splitlines() if "was lowest at epoch" in each]


# What it says of what is known


def verdict(**changes: Any) -> Verdict:
    known = {"has_reference": True, "is_trusted": True, "num_samples": 90, "accuracy": 0.43, "skill": 0.1}
    return Verdict(**{**known, "unexplained": 0.24, **changes})


def results(best: int = 3, temperature: float = 2.0, num_labels: int = 0) -> list[ValidationResult]:
    """Five epochs; the ranking is lowest one epoch after the criterion."""
    rows = [(epoch, 0.4 + abs(epoch - best) / 10, 0.4 + abs(epoch - best - 1) / 10) for epoch in range(5)]
    return [ValidationResult(*row, temperature, num_labels, 0.8) for row in rows]


CHOSE = {"is_trusted": False, "unexplained": math.nan}
LOWEST, CALIBRATE = f"`{CRITERION}` was lowest at epoch 3", ": divide its logits by 2.0 to calibrate it."
SAYS: dict[str, tuple[dict[str, Any], dict[str, Any], str, str]] = {  # a verdict, results, what is said, and a link
    "the reference chose": ({}, {}, f"{LOWEST}{CALIBRATE} The reference chose: {KNOWN}. {NOISE}", ""),
    "few labels are left": ({"unexplained": 0.04}, {}, f"{LOWEST}{CALIBRATE} The reference chose: {KNOWN}.", ""),
    "calibrated": ({}, {"temperature": 1.0}, f"{LOWEST}. The reference chose: {KNOWN}. {NOISE}", ""),
    "the low end of the grid": ({}, {"temperature": 0.5}, f"{LOWEST}. The reference chose: {KNOWN}. {NOISE}", ""),
    "labels and the reference chose": ({}, {"num_labels": 70},
        f"{LOWEST}{CALIBRATE} 70 validation labels and the reference chose. {NOISE}", ""),
    "labels chose": ({**CHOSE, "looks_clean": True}, {"num_labels": 70},
        f"{LOWEST}{CALIBRATE} 70 validation labels chose.", ""),
    "labels look clean": ({**CHOSE, "looks_clean": True}, {"temperature": 1.0},
        f"{LOWEST}. The training labels look clean ({KNOWN}), so the score on training samples chose: if they are "
        "right, training to the end is about as good.", ""),
    "blind": (CHOSE, {"temperature": 1.0},
        f"{LOWEST}. The reference sees too little of the inputs ({KNOWN}), so the score on training samples chose, "
        "which can't say when to stop: label some validation samples, or set `features=`.", "blind"),
    "no reference": ({**CHOSE, "has_reference": False}, {"temperature": 1.0},
        f"{LOWEST}. The reference is missing, so the score on training samples chose, which can't say when to stop: "
        "label some validation samples, or set `features=`.", "blind"),
    "still falling": ({"unexplained": 0.0}, {"best": 4},
        f"`{CRITERION}` was lowest at epoch 4{CALIBRATE} The reference chose: {KNOWN}. {FALLING}", "still-falling"),
    "a regression": ({"accuracy": math.nan, "skill": 0.62, "unexplained": math.nan}, {"temperature": 1.0},
        f"{LOWEST}. The reference chose: without having seen them, it explains 62% of the variance of 90 training "
        "labels.", ""),
}  # fmt: skip


@pytest.mark.parametrize("what", SAYS)
def test_it_says_if(what: str) -> None:
    known, shown, expected, link = SAYS[what]
    line = closing_line(trainer(), {CRITERION: ("risk_criterion", results(**shown))}, verdict(**known))
    assert re.sub(r" See docs/\S+ or \S+$", "", line) == expected
    assert re.findall(r"troubleshooting.md#(\S+)", line) == [link] * bool(link)


WATCHING: dict[str, tuple[list[Any], int]] = {  # callbacks, and the epoch that is named
    "nothing": ([], 2),
    "the ranking": ([cb.EarlyStopping(RANKING)], 3),
    "another value": ([cb.EarlyStopping("val_loss")], 2),
    "the ranking by a checkpoint, the criterion by EarlyStopping": (
        [cb.EarlyStopping(CRITERION), cb.ModelCheckpoint("x", monitor=RANKING)], 3),
}  # fmt: skip


@pytest.mark.parametrize("what", WATCHING)
def test_it_is_about_the_value_that_is_watched_by(what: str) -> None:
    callbacks, epoch = WATCHING[what]
    run = trainer(callbacks, enable_checkpointing=len(callbacks) > 1)
    curves = {CRITERION: ("risk_criterion", results(2)), RANKING: ("risk_ranking", results(2))}
    name = RANKING if epoch == 3 else CRITERION
    line = closing_line(run, curves, verdict())
    assert line.startswith(f"`{name}` was lowest at epoch {epoch}")
    assert ("divide its logits" in line) == (name == CRITERION)  # of the epoch of the lowest criterion


def test_without_a_value_there_is_none() -> None:
    assert closing_line(trainer(), {}, verdict()) == ""


# In a fit


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*callbacks used to create the checkpoint")
def test_of_a_fit_it_names_the_epoch_and_the_file_also_after_a_resume_with_fewer_loaders(
    tmp_path: Path, said: Any
) -> None:
    def run(num_loaders: int, name: str, **kwargs: Any) -> list[float]:
        said.clear()
        checkpoint = cb.ModelCheckpoint(tmp_path, filename="{epoch}", monitor=name, save_last=True)
        vals = [unlabelled_loader(seed=seed) for seed in range(1, 1 + num_loaders)]
        model = Plain()
        model.lr = 0.05
        options = {"val": vals, "enable_checkpointing": True, **kwargs}
        return [epoch[name] for epoch in fit(model, RiskMonitor(), checkpoint, **options).epochs]

    values = run(2, SECOND, max_epochs=4)
    best = values.index(min(values))
    place = f"`{SECOND}` was lowest at epoch {best}, in the checkpoint {tmp_path}/epoch={best}.ckpt"
    (line,) = lines(said.text)
    assert line.startswith(place) and "it predicts 43% of 90 training labels" in line
    values = run(1, CRITERION, max_epochs=6, ckpt_path=tmp_path / "last.ckpt")
    (line,) = lines(said.text)
    assert line.startswith(f"`{CRITERION}` was lowest at epoch ")


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_it_is_said_once_after_ctrl_c_and_after_an_error_too(error: type[BaseException], said: Any) -> None:
    class Ending(Plain):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                raise error

    with pytest.raises((SystemExit, RuntimeError)):
        fit(Ending(), RiskMonitor(), max_epochs=4)
    assert len(lines(said.text)) == 1


def test_before_a_value_and_in_a_debugging_run_there_is_none(said: Any) -> None:
    class Ending(Plain):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fit(Ending(), RiskMonitor())
    fit(Plain(), RiskMonitor(), fast_dev_run=True)
    assert lines(said.text) == []


class Stopping(cb.Callback):
    """It stops a fit in the middle, as `Timer` does, or `EarlyStopping` on another value."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 2


STOPPED: dict[str, tuple[Any, int, bool]] = {  # another callback, the number of epochs; was it still falling?
    "EarlyStopping that waits": (lambda: cb.EarlyStopping(CRITERION, patience=2), 3, True),
    "EarlyStopping that has what it wants": (lambda: cb.EarlyStopping(CRITERION, stopping_threshold=10.0), 3, False),
    "another callback that stops it": (Stopping, 4, True),
    "a single epoch": (Stopping, 1, False),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_was_still_falling_unless_it_was_stopped_by_the_value(name: str, said: Any) -> None:
    make, max_epochs, is_falling = STOPPED[name]
    model = Plain()
    model.lr = 0.003
    fit(model, RiskMonitor(), make(), max_epochs=max_epochs)
    (line,) = lines(said.text)
    assert (FALLING in line) == is_falling


def test_where_labels_chose_it_says_how_many_and_speaks_of_nothing_that_it_does_not_know(said: Any) -> None:
    val = batches_of(HOLDOUT, NOISY[:50].where(torch.arange(50) % 2 > 0, -100))
    blind = RiskMonitor(validation_labels=True, features=lambda batch: torch.ones(len(batch[0]), 1))
    fitted(blind, Plain(), batches_of(X, NOISY), val)
    (line,) = lines(said.text)
    assert "25 validation labels chose." in line
    assert "look clean" not in line and "sees too little" not in line and "explained" not in line


def test_of_correct_labels_it_says_that_training_to_the_end_is_about_as_good(said: Any) -> None:
    x = inputs(300)
    fitted(RiskMonitor(), Plain(), batches_of(x, x[:, :4].argmax(1), batch_size=70), unlabelled_loader(seed=1))
    (line,) = lines(said.text)
    assert re.search(r"The training labels look clean \(without having seen them, it predicts [78]\d% of 300 ", line)


@pytest.mark.parametrize("kind", [cb.EarlyStopping, cb.ModelCheckpoint])
@pytest.mark.parametrize("monitor", [CRITERION, SECOND, RANKING])
def test_a_callback_that_looks_for_the_highest_value_is_refused(kind: Any, monitor: str) -> None:
    message = f"`mode` should be 'min' for `{monitor}`, got 'max' in `{kind.__name__}`"
    with pytest.raises(MisconfigurationException, match=message):
        fit(Plain(), RiskMonitor(), kind(monitor=monitor, mode="max"), enable_checkpointing=True)
