"""The line at the end of a fit: which epoch, what is known of the labels, and whether to trust it."""

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
from lightning_sensitivity.callbacks.state import FitRecord, ValidationResult
from lightning_sensitivity.functional import fit_reference
from tests.callbacks.plain_loop import Plain
from tests.helpers import fitted, labelled, trainer, unlabelled_loader

CRITERION, ESTIMATE = "val_risk_criterion", "val_risk_estimate"
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
        assert parts(said.text)[0].startswith(f"`{name}` was lowest at epoch {best} ({min(values):.3f}){place}. ")
    assert best < 11


@pytest.mark.parametrize("what", ["monitor", "folder"])
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_checkpoint_of_another_epoch_is_told_with_the_reason(what: str, tmp_path: Path, said: Any) -> None:
    first, other = tmp_path / "first", tmp_path / "other"
    if what == "folder":
        fit_fast(checkpoint(first))
        said.clear()
        fit_fast(checkpoint(other), max_epochs=14, ckpt_path=first / "last.ckpt")
        expected = rf", but the best checkpoint of `ModelCheckpoint`, in {other}, has [.\d]+\. "
    else:
        fit_fast(checkpoint(other, monitor="val_risk_claim"))
        expected = ", but `ModelCheckpoint` monitors 'val_risk_claim'. "
    assert re.search(rf"^`{CRITERION}` was lowest at epoch \d+ \([.\d]+\){expected}", parts(said.text)[0])


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_after_a_resume_with_fewer_loaders_it_is_about_one_that_is_left(tmp_path: Path, said: Any) -> None:
    name = f"{CRITERION}/dataloader_idx_0"
    watching = cb.ModelCheckpoint(tmp_path, monitor=name, save_last=True)
    values = [epoch[name] for epoch in fit_fast(watching, num_loaders=2, max_epochs=2)]
    said.clear()
    values += [epoch[CRITERION] for epoch in fit_fast(max_epochs=4, ckpt_path=tmp_path / "last.ckpt")]
    best = values.index(min(values))
    assert f"`{CRITERION}` was lowest at epoch {best} ({min(values):.3f})" in said.text


def test_a_debugging_run_says_nothing(said: Any) -> None:
    fit_fast(fast_dev_run=True)
    assert "was lowest" not in said.text


@pytest.mark.parametrize(("threshold", "max_epochs", "is_falling"), [
    (None, 4, True), (0.0, 4, True), (10.0, 4, False), (None, 1, False)
])  # fmt: skip
def test_only_a_run_that_came_to_its_last_epoch_was_still_falling(
    threshold: float | None, max_epochs: int, is_falling: bool, said: Any
) -> None:
    stopping = cb.EarlyStopping(CRITERION, patience=2, stopping_threshold=threshold)
    model = Fast()
    model.lr = 0.003
    run = fitted([RiskMonitor(), stopping], model, NOISY, unlabelled_loader(seed=1), max_epochs=max_epochs)
    assert ("It was still falling" in said.text) == (run.current_epoch == 4) == is_falling


@pytest.mark.parametrize("kind", [cb.EarlyStopping, cb.ModelCheckpoint])
@pytest.mark.parametrize("monitor", [CRITERION, SECOND, ESTIMATE])
def test_a_callback_that_looks_for_the_highest_value_is_refused(kind: Any, monitor: str) -> None:
    message = f"`mode` should be 'min' for `{monitor}`, got 'max' in `{kind.__name__}`"
    with pytest.raises(MisconfigurationException, match=message):
        fit_fast(kind(monitor=monitor, mode="max"))


# What is known of the labels, and whether to trust the epoch

KNOWN = fit_reference(X, torch.nn.functional.one_hot(Y, 4), X[:1])._replace(
    score=0.5, chance=0.75, claim=0.5, noise=0.02
)
CLEAN, WRONG = {"noise": 0.01, "claim": 0.7}, {"noise": 0.304}
LABELS = "label 50 validation samples, and set `validation_labels=True`"
NO_REFERENCE = f"There was no reference to check the epoch by: {LABELS}."
DISAGREES = "The reference disagrees (it would choose epoch {}), and such runs lost 2 points of accuracy on average: "
AGREES, CLEAN_LABELS = (
    "The reference agrees.",
    "No noise was found in the training labels: training to the end is about as good.",
)
TEXTS: dict[str, tuple[Any, float, int, str, list[str]]] = {
    # what of the reference, which validation it would choose, which one is chosen, what is said, and links
    "agrees": ({}, 10, 10, AGREES, []),
    "agrees, and labels look wrong": (WRONG, 10, 10, f"About 30 % of the training labels look wrong. {AGREES}", []),
    "agrees nearly": ({}, 11, 10, AGREES, []),
    "no longer agrees": ({}, 12, 10, f"{DISAGREES.format(25)}{LABELS}.", ["disagree"]),
    "disagrees, and labels look wrong": (WRONG, 3, 10,
        f"About 30 % of the training labels look wrong. {DISAGREES.format(7)}{LABELS}.", ["disagree"]),
    "agrees, and may be better": ({"score": 0.3, "claim": 0.3}, 10, 10,
        "The reference agrees, but may be the better model itself.", ["reference-better"]),
    "disagrees, and may be better": ({"score": 0.3, "claim": 0.3}, 3, 10,
        f"{DISAGREES.format(7)}{LABELS}, or try kernel ridge regression.", ["disagree"]),
    "none": (None, math.nan, 10, NO_REFERENCE, ["disagree"]),
    "without skill": (
        WRONG | {"score": 0.75, "claim": 0.75, "noise": math.nan}, math.nan, 10, NO_REFERENCE, ["disagree"]),
    "not there in the first epoch": ({}, 10, 10, NO_REFERENCE, ["disagree"]),
    "none, still falling": (None, math.nan, 19, "It was still falling: train for longer.", ["still-falling"]),
    "still falling": (WRONG, 3, 19,
        "About 30 % of the training labels look wrong. It was still falling: train for longer.", ["still-falling"]),
    "no noise": (CLEAN, math.nan, 10, CLEAN_LABELS, []),
    "no noise, still falling": (CLEAN, math.nan, 19, CLEAN_LABELS, []),
}  # fmt: skip


@pytest.mark.parametrize("what", TEXTS)
def test_what_it_says_where_the_reference(what: str, said: Any) -> None:
    changes, other, best, expected, links = TEXTS[what]
    record = FitRecord()
    record.references[0] = None if changes is None else KNOWN._replace(**changes)
    for place in range(20):  # in every second epoch
        by_reference = math.nan if place == 0 and "first epoch" in what else abs(place - other) / 100
        value, of_estimate = 0.4 + abs(place - best) / 100, 0.4 + abs(place - 5) / 100
        result = ValidationResult(2 * place + 1, value, of_estimate, value, by_reference)
        record.history.setdefault(0, []).append(result)
    names = {CRITERION: ("risk_criterion", 0), ESTIMATE: ("risk_estimate", 0)}
    log_closing_line(trainer(), record, names)
    line = f"`{CRITERION}` was lowest at epoch {2 * best + 1} (0.400). {expected}"
    assert parts(said.text) == (line, links)
    said.clear()
    log_closing_line(trainer(cb.EarlyStopping(ESTIMATE)), record, names)
    assert parts(said.text)[0].startswith(f"`{ESTIMATE}` was lowest at epoch 11 (0.400).")


DIGITS, DIGIT_LABELS = (torch.tensor(each) for each in load_digits(return_X_y=True))


@pytest.mark.parametrize(("is_noisy", "expected"), [
    (True, r"\. About (2\d|3\d) % of the training labels look wrong\. (It was|The reference)"),
    (False, rf"\. {CLEAN_LABELS}( It was still falling: train for longer\.)?$"),
])  # fmt: skip
def test_of_digits_it_says_whether_labels_are_wrong(is_noisy: bool, expected: str, said: Any) -> None:
    model = Plain()
    model.net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 10)).double()
    x, y = DIGITS.float() / 16, DIGIT_LABELS
    noisy = (y + 1 + torch.arange(len(y)) % 9) % 10
    y = noisy.where(is_noisy & (torch.arange(len(y)) % 10 < 3), y)
    train = DataLoader(TensorDataset(x[:500], y[:500]), 50, shuffle=True)
    last = fitted([RiskMonitor()], model, train, DataLoader(x[500:800], 100), max_epochs=6).epochs[-1]
    assert re.search(expected, parts(said.text)[0])
    assert (last[CRITERION] == last[ESTIMATE]) == is_noisy
