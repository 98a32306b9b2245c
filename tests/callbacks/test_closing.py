"""The line at the end of a fit: which epoch and file, how many labels look wrong, and a second opinion."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import callbacks as cb
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.callbacks.closing import log_closing_line
from lightning_sensitivity.callbacks.record import ValidationResult
from tests.callbacks.plain_loop import Plain
from tests.helpers import fitted, labelled, trainer, unlabelled_loader

CRITERION, ESTIMATE = "val/risk_criterion", "val/risk_estimate"
X, Y = labelled(50).tensors
NOISY = DataLoader(TensorDataset(X, Y.where(torch.arange(50) % 3 > 0, 0)), 16)


class Fast(Plain):
    lr = 0.3


def parts(text: str) -> tuple[str, list[str]]:
    """The line without links, at most three sentences, and its links."""
    (line,) = (each for each in text.splitlines() if "was lowest at epoch" in each)
    line, links = re.sub(r" See docs/\S+ or \S+$", "", line), re.findall(r"troubleshooting.md#(\S+)", line)
    assert len(links) <= 1 and len(re.findall(r"[.](?= [A-Z]|$)", line)) <= 3
    return line[line.index("`") :], links


@pytest.fixture
def said(caplog: Any) -> Any:
    caplog.set_level("INFO", "lightning.pytorch")
    return caplog


# Which epoch, and in which checkpoint


def fit_fast(*callbacks: Any, num_loaders: int = 1, max_epochs: int = 12, **kwargs: Any) -> list[dict[str, float]]:
    """What each epoch of a fit has logged."""
    vals = [unlabelled_loader(seed=seed) for seed in range(1, 1 + num_loaders)]
    has_checkpoint = any(isinstance(each, cb.ModelCheckpoint) for each in callbacks)
    options = {"enable_checkpointing": has_checkpoint, "max_epochs": max_epochs, **kwargs}
    return fitted([RiskMonitor(), *callbacks], Fast(), NOISY, vals, **options).epochs


def checkpoint(folder: Path, **kwargs: Any) -> cb.ModelCheckpoint:
    return cb.ModelCheckpoint(folder, filename="{epoch}", **{"monitor": CRITERION, "save_last": True, **kwargs})


FIRST, SECOND = (f"{CRITERION}/dataloader_idx_{index}" for index in (0, 1))
WATCHED: dict[str, tuple[str, list[str]]] = {  # what the line is about, and what a checkpoint and EarlyStopping watch
    "nothing": (CRITERION, []),
    "a checkpoint on the criterion": (CRITERION, [CRITERION]),
    "a checkpoint on the estimate": (ESTIMATE, [ESTIMATE]),
    "nothing, of two loaders": (FIRST, []),
    "a checkpoint on the second loader, EarlyStopping on the first": (SECOND, [SECOND, FIRST]),
    "EarlyStopping on the second loader": (SECOND, ["", SECOND]),
}


@pytest.mark.filterwarnings("ignore:Checkpoint directory")
@pytest.mark.parametrize("what", WATCHED)
def test_it_is_about_what_is_watched_also_after_a_resume(what: str, tmp_path: Path, said: Any) -> None:
    name, watched = WATCHED[what]
    values, place, options = list[float](), "", {"num_loaders": 1 + (name in (FIRST, SECOND))}
    for max_epochs in (12, 14) if any(watched[:1]) else (12,):
        said.clear()
        callbacks = [cb.EarlyStopping(each, patience=99) for each in watched[1:]]
        callbacks += [checkpoint(tmp_path, monitor=each) for each in watched[:1] if each]
        values += [epoch[name] for epoch in fit_fast(*callbacks, max_epochs=max_epochs, **options)]
        best = values.index(min(values))
        if any(watched[:1]):
            options["ckpt_path"], place = tmp_path / "last.ckpt", f", in the checkpoint {tmp_path}/epoch={best}.ckpt"
        assert parts(said.text)[0].startswith(f"`{name}` was lowest at epoch {best}{place}")


class Several(cb.Callback):
    monitor = (CRITERION, "val_loss"), [CRITERION]  # which has no hash


class Scores(cb.Checkpoint):
    """A checkpoint of one's own, with a score that is none, and without a path."""

    monitor, best_model_score = CRITERION, torch.zeros(2)


@pytest.mark.parametrize("strange", [Several, Scores, lambda: checkpoint(Path("x"), monitor="val/risk_claim")])
def test_it_names_no_checkpoint_of_strange_callbacks_nor_of_another_value(
    strange: Any, said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fit_fast(strange(), enable_checkpointing=True)
    assert re.search(rf"^`{CRITERION}` was lowest at epoch \d+(\.|: divide) ", parts(said.text)[0])


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_it_is_said_once_after_ctrl_c_and_after_an_error_too(error: type[BaseException], said: Any) -> None:
    model = Fast()

    def interrupt() -> None:
        if model.current_epoch == 6:
            raise error

    model.on_train_epoch_start = interrupt
    with pytest.raises((SystemExit, RuntimeError)):
        fitted(RiskMonitor(), model, NOISY, unlabelled_loader(seed=1), max_epochs=12)
    assert parts(said.text)[0].startswith(f"`{CRITERION}` was lowest at epoch ")


def test_before_a_value_there_is_none(said: Any) -> None:
    model = Fast()
    model.on_train_epoch_end = lambda: 1 / 0
    model.on_train_batch_end = lambda *_: 1 / 0
    with pytest.raises(ZeroDivisionError):
        fitted(RiskMonitor(), model, NOISY, unlabelled_loader(seed=1))
    assert "was lowest" not in said.text


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_after_a_resume_with_fewer_loaders_it_is_about_one_that_is_left(tmp_path: Path, said: Any) -> None:
    name = f"{CRITERION}/dataloader_idx_0"
    watching = cb.ModelCheckpoint(tmp_path, monitor=name, save_last=True)
    values = [epoch[name] for epoch in fit_fast(watching, num_loaders=2, max_epochs=2)]
    said.clear()
    values += [epoch[CRITERION] for epoch in fit_fast(max_epochs=4, ckpt_path=tmp_path / "last.ckpt")]
    best = values.index(min(values))
    assert f"`{CRITERION}` was lowest at epoch {best}" in said.text


def test_a_debugging_run_says_nothing(said: Any) -> None:
    fit_fast(fast_dev_run=True)
    assert "was lowest" not in said.text


class Stopping(cb.Callback):
    """It stops a fit in the middle, as `Timer` does, or `EarlyStopping` on another value."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 2


STOPPED: dict[str, tuple[Any, int, bool]] = {  # another callback, the number of epochs; was it still falling
    "EarlyStopping that waits": (lambda: cb.EarlyStopping(CRITERION, patience=2), 4, True),
    "EarlyStopping that has what it wants": (lambda: cb.EarlyStopping(CRITERION, stopping_threshold=10.0), 4, False),
    "another callback that stops it": (Stopping, 4, True),
    "a single epoch": (Stopping, 1, False),
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_run_was_still_falling_unless_it_was_stopped_by_the_value(name: str, said: Any) -> None:
    make, max_epochs, is_falling = STOPPED[name]
    model = Fast()
    model.lr = 0.003
    fitted([RiskMonitor(), make()], model, NOISY, unlabelled_loader(seed=1), max_epochs=max_epochs)
    assert "was lowest" in said.text and ("It was still falling" in said.text) == is_falling


@pytest.mark.parametrize("kind", [cb.EarlyStopping, cb.ModelCheckpoint])
@pytest.mark.parametrize("monitor", [CRITERION, SECOND, ESTIMATE])
def test_a_callback_that_looks_for_the_highest_value_is_refused(kind: Any, monitor: str) -> None:
    message = f"`mode` should be 'min' for `{monitor}`, got 'max' in `{kind.__name__}`"
    with pytest.raises(MisconfigurationException, match=message):
        fit_fast(kind(monitor=monitor, mode="max"))


# What is known of the labels, and a second opinion

WRONG = "At least about 30 % of the training labels look wrong."
CLEAN = "No noise was found in the training labels: if they are right, training to the end is about as good."
FALLING = "It was still falling: train for longer."
OPINION = "A second opinion, a small model of the training labels, would take epoch {}."
TEXTS: dict[str, tuple[float, int, float, bool, str, list[str]]] = {
    # validation of the second opinion, that of the criterion, share of wrong labels, no noise, what is said, and links
    "the same epoch": (10, 10, 0.02, False, OPINION.format(21), []),
    "the same epoch, and labels look wrong": (10, 10, 0.304, False, f"{WRONG} {OPINION.format(21)}", []),
    "nearly the same": (11, 10, 0.02, False, OPINION.format(23), []),
    "another epoch": (12, 10, 0.02, False, OPINION.format(25), ["second-opinion"]),
    "another epoch, and labels look wrong": (
        3, 10, 0.304, False, f"{WRONG} {OPINION.format(7)}", ["second-opinion"]),
    "none": (math.nan, 10, math.nan, False, "", []),
    "none, and labels look wrong": (math.nan, 10, 0.304, False, WRONG, []),
    "none in the first epoch": (10, 10, 0.02, False, "", []),
    "still falling": (3, 19, 0.304, False, f"{WRONG} {FALLING}", ["still-falling"]),
    "none, still falling": (math.nan, 19, math.nan, False, FALLING, ["still-falling"]),
    "no noise": (math.nan, 10, 0.01, True, CLEAN, []),
    "no noise, still falling": (math.nan, 19, 0.01, True, CLEAN, []),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_what_it_says_if_the_second_opinion_is(what: str, said: Any) -> None:
    other, best, noise, is_clean, expected, links = TEXTS[what]
    results = []
    for place in range(20):  # in every second epoch
        by_reference = math.nan if place == 0 and "first epoch" in what else abs(place - other) / 100
        value, of_estimate = 0.4 + abs(place - best) / 100, 0.4 + abs(place - 5) / 100
        weight = 0.0 if is_clean else 1.0
        results.append(ValidationResult(2 * place + 1, value, of_estimate, by_reference, noise, weight, 2.0))
    names = {CRITERION: ("risk_criterion", 0), ESTIMATE: ("risk_estimate", 0)}
    log_closing_line(trainer(), {0: results}, names)
    calibrate = "divide its logits by 2.0 to calibrate it"
    line = f"`{CRITERION}` was lowest at epoch {2 * best + 1}: {calibrate}. {expected}".rstrip()
    assert parts(said.text) == (line, links)
    said.clear()
    log_closing_line(trainer(cb.EarlyStopping(ESTIMATE)), {0: results}, names)
    assert parts(said.text)[0].startswith(f"`{ESTIMATE}` was lowest at epoch 11.")


DIGITS, DIGIT_LABELS = (torch.tensor(each) for each in load_digits(return_X_y=True))


@pytest.mark.parametrize(("is_noisy", "expected"), [
    (True, r"\. At least about (2\d|3\d) % of the training labels look wrong\. (It was|A second opinion)"),
    (False, rf" {CLEAN}$"),
])  # fmt: skip
def test_of_digits_it_says_whether_labels_are_wrong(is_noisy: bool, expected: str, said: Any) -> None:
    model = Plain()
    model.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)).double()
    x, y = DIGITS.float() / 16, DIGIT_LABELS
    noisy = (y + 1 + torch.arange(len(y)) % 9) % 10
    y = noisy.where(is_noisy & (torch.arange(len(y)) % 10 < 3), y)
    train = DataLoader(TensorDataset(x[:500], y[:500]), 50, shuffle=True)
    fitted([monitor := RiskMonitor()], model, train, DataLoader(x[500:800], 100), max_epochs=6)
    assert re.search(expected, parts(said.text)[0])
    assert monitor.record.gap_weights == {0: float(is_noisy)}
