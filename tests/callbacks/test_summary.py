"""The summary and the line at the end of a fit say what is true of it: the epoch, what chose, and why."""

import json
import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from lightning.pytorch import callbacks as cb

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.callbacks.checks import callbacks_that_monitor
from lightning_sensitivity.expected.doubts import CONSTANT
from lightning_sensitivity.expected.record import Verdict
from lightning_sensitivity.expected.summary import Curve, summarize
from tests.callbacks.plain_loop import ACCURACY, AUROC, LOSS, NOISY, Plain, X, batches_of, fit, names_of
from tests.helpers import blind, fitted, fitted_and_said, labelled, quick_risk, trainer, unlabelled_loader

SECOND = f"{LOSS}/dataloader_idx_1"
DATA = batches_of(X, NOISY), unlabelled_loader(seed=1)


@pytest.fixture
def log(caplog: Any) -> Any:
    caplog.set_level("INFO", "lightning.pytorch")
    return caplog


def lines(log: Any) -> list[str]:
    return [each for each in log.text.splitlines() if "was lowest at epoch" in each or "was highest at" in each]


# What it says of what is known

Rows = list[dict[str, Any]]


def verdict(**changes: Any) -> Verdict:
    known = {"learner": "forest", "features": "columns", "num_training": 2000, "skill": 0.5}
    shares = {"majority": 0.6, "unexplained": 0.04}
    return Verdict(**{**known, **shares, "is_trusted": True, **changes})


def validations(best: int = 3, **changes: Any) -> Rows:
    """Five of them, the first one by another reference; accuracy is highest one epoch after the lowest score."""
    rows = [
        {"epoch": epoch, "step": 10 * epoch, "dataloader_idx": 0, "expected_loss": 0.4 + abs(epoch - best) / 10,
         "expected_accuracy": 0.9 - abs(epoch - best - 1) / 10, "num_labels": 0, "expected_loss_stderr": 0.03,
         "reference_score": 0.3 if epoch > 0 else 0.2, **changes}
        for epoch in range(5)
    ]  # fmt: skip
    return [rows[0] | {"expected_loss": 0.1}, *rows[1:]]


def without(rows: Rows, **changes: Any) -> Rows:
    """The same validations without values."""
    return [{name: each for name, each in row.items() if "expected" not in name} | changes for row in rows]


CURVES = {LOSS: Curve("expected_loss", 0, False), ACCURACY: Curve("expected_accuracy", 0, True)}
SKILL = "on labels that it has not seen, it is 50% better than chance"
BEST = f"`{LOSS}` was lowest at epoch 3"
CHOSE = "Chosen by the reference (random forest, 2,000 training labels)."
REACH = "There the network is expected to reach a loss of 0.4 ± 0.05."
IMPROVING = "It was still improving."
NONE = f"`{LOSS}` has no value to choose by: "
LAST = (
    ", so nothing says when to stop. Callbacks that monitor it take the last epoch: label some validation samples "
    "(`validation_labels=True`), or set `features=`."
)
BLIND: dict[str, Any] = {"is_trusted": False, "unexplained": math.nan}
NUMBERS = dict.fromkeys(("majority", "unexplained"), math.nan) | {"skill": 0.62}
LABELS: dict[str, Any] = {"num_labels": 70, "reference_score": None}
SAYS: dict[str, tuple[Verdict | None, Rows, str]] = {  # a verdict, a history, and what is said
    "the reference chose": (verdict(), validations(), f"{BEST}. {CHOSE} {REACH}"),
    "many labels are left": (verdict(unexplained=0.12), validations(), f"{BEST}. {CHOSE} {REACH} About 12% of the "
        "training labels can't be explained: they are wrong, or not to be known from the inputs."),
    "labels and the reference chose": (verdict(), validations(num_labels=70),
        f"{BEST}. Chosen by 70 validation labels and the{CHOSE[13:]} {REACH}"),
    "labels chose": (verdict(**BLIND), validations(**LABELS)[1:], f"{BEST}. Chosen by 70 validation labels. {REACH}"),
    "labels chose, without a reference": (None, validations(**LABELS)[1:],
        f"{BEST}. Chosen by 70 validation labels. {REACH}"),
    "without a standard error": (verdict(), validations(expected_loss_stderr=None),
        f"{BEST}. {CHOSE} {REACH.replace(' ± 0.05', '')}"),
    "nothing to know": (verdict(skill=0.0, inputs_tell_nothing=True), validations(), f"{BEST}. {CHOSE} The inputs seem "
        f"to tell nothing of the labels: no network is expected to beat the mean label. {REACH}"),
    "before a resume": (None, validations(),
        f"{BEST}. Chosen by the reference of an earlier part of this fit. {REACH}"),
    "ridge regression": (verdict(learner="ridge", features="patches"), validations(),
        f"{BEST}. {CHOSE.replace('random forest', 'ridge regression on patches')} {REACH}"),
    "a regression": (verdict(**NUMBERS), validations(), f"{BEST}. {CHOSE} {REACH}"),
    "large errors": (verdict(**NUMBERS), [{**row, "expected_loss": 3740.5 * row["expected_loss"]}
        for row in validations(expected_loss_stderr=12.0)[1:]],
        f"{BEST}. {CHOSE} {REACH.replace('0.4 ± 0.05', '1500 ± 20')}"),
    "still improving": (verdict(), validations(4), f"{BEST[:-1]}4. {CHOSE} {REACH} {IMPROVING}"),
    "a single epoch": (verdict(), validations(4)[4:], f"{BEST[:-1]}4. {CHOSE} {REACH}"),
    "gaps, one at the end": (verdict(), without(validations()[:1]) + validations(4) + [{**validations()[0], **{
        "expected_loss": math.nan}}],
        f"{BEST[:-1]}4. {CHOSE} {REACH} There is no value for 2 of 7 validations."),
    "another value, where losses are equal": (verdict(), validations(expected_loss=0.5)[1:],
        f"`{ACCURACY}` was highest at epoch 4. {CHOSE} There the network is expected to reach an accuracy of 0.9. "
        f"{IMPROVING}"),
    "ties": (verdict(), validations(expected_loss=0.5, expected_accuracy=0.5)[1:],
        f"All values of `{LOSS}` are equal, so that no epoch was chosen."),
    "a blind reference": (verdict(**BLIND), without(validations()),
        f"{NONE}the reference sees too little of the inputs ({SKILL}){LAST}"),
    "one class": (verdict(**BLIND, majority=1.0), without(validations()),
        f"{NONE}the reference has seen labels of only one class{LAST}"),
    "a reference that failed": (None, without(validations(), reference_score=None),
        f"{NONE}the reference is missing{LAST}"),
    "no finite value": (verdict(), validations(expected_loss=math.nan, expected_accuracy=math.nan)[1:],
        f"{NONE}no validation after the reference gave one."),
}  # fmt: skip


@pytest.mark.parametrize("what", SAYS)
def test_it_says_if(what: str) -> None:
    known, history, expected = SAYS[what]
    facts, line = summarize([], CURVES, history, known)
    assert line == expected
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert facts["is_tied"] == (what == "ties") and facts["num_validations"] == len(history)


def test_it_says_what_is_doubtful() -> None:
    facts, line = summarize([], CURVES, validations(), verdict(), [CONSTANT])
    assert facts["doubts"] == [CONSTANT] and REACH in line
    assert "This is doubtful: the network was worse than a constant prediction in 3 validations." in line


WATCHING: dict[str, tuple[list[Any], str, int]] = {  # callbacks, the value, and the epoch that is named
    "nothing": ([], LOSS, 2),
    "accuracy": ([cb.EarlyStopping(ACCURACY, mode="max")], ACCURACY, 3),
    "another value": ([cb.EarlyStopping("val_loss")], LOSS, 2),
    "accuracy by a checkpoint, the score by EarlyStopping": (
        [cb.EarlyStopping(LOSS), cb.ModelCheckpoint("x", monitor=ACCURACY, mode="max")], ACCURACY, 3),
}  # fmt: skip


@pytest.mark.parametrize("what", WATCHING)
def test_it_is_about_the_value_that_is_watched_by(what: str) -> None:
    callbacks, name, epoch = WATCHING[what]
    run = trainer(callbacks, enable_checkpointing=len(callbacks) > 1)
    names = [name for _, name in callbacks_that_monitor(run)]
    facts, line = summarize(names, CURVES, validations(2, num_labels=9), verdict())
    assert (facts["monitored"], facts["epoch"]) == (name, epoch)
    assert f"`{name}` was {'lowest' if name == LOSS else 'highest'} at epoch {epoch}" in line


# In a fit


def test_of_a_fit_it_names_the_epoch(tmp_path: Path, log: Any) -> None:
    checkpoint = cb.ModelCheckpoint(tmp_path, "{epoch}", SECOND)
    model, vals = Plain(), [unlabelled_loader(seed=1), unlabelled_loader(seed=2)]
    model.lr = 0.05
    run = fit(model, monitor := quick_risk(), checkpoint, val=vals, enable_checkpointing=True, max_epochs=4)
    values = [epoch[SECOND] for epoch in run.epochs]
    best = values.index(min(values))
    assert monitor.summary["epoch"] == best and Path(checkpoint.best_model_path).name == f"epoch={best}.ckpt"
    (line,) = lines(log)
    assert f"`{SECOND}` was lowest at epoch {best}." in line


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_it_is_said_once_after_ctrl_c_and_after_an_error_too(error: type[BaseException], log: Any) -> None:
    class Ending(Plain):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                raise error

    with pytest.raises((SystemExit, RuntimeError)):
        fit(Ending(), monitor := quick_risk(), max_epochs=4)
    assert len(lines(log)) == 1 and monitor.summary["num_validations"] == 2


def test_in_a_debugging_run_there_is_none_and_before_a_value_a_warning(log: Any) -> None:
    _, texts = fitted_and_said(quick_risk(), Plain(), *DATA, max_steps=2, max_epochs=-1)
    assert len(texts) == 1 and "logged nothing: the run ended before a validation that follows a whole" in texts[0]
    fit(Plain(), monitor := quick_risk(), fast_dev_run=True)
    assert lines(log) == [] and monitor.summary == {} and len(monitor.history) == 1


# Where there is no value


@pytest.mark.parametrize(("name", "mode"), [(LOSS, "min"), (AUROC, "max")])
def test_where_the_reference_is_blind_callbacks_take_the_last_epoch(name: str, mode: str, tmp_path: Path) -> None:
    stopping = cb.EarlyStopping(name, mode=mode, patience=1, stopping_threshold=0.3)  # by what was not measured
    checkpoint = cb.ModelCheckpoint(tmp_path, monitor=name, mode=mode, filename="{epoch}")
    monitor = RiskMonitor(features=blind)
    with pytest.warns(UserWarning) as caught:
        run = fitted([monitor, stopping, checkpoint], Plain(), *DATA, enable_checkpointing=True, max_epochs=4)
    first, last = (str(each.message) for each in caught if "reference sees too little" in str(each.message))
    assert Path(checkpoint.best_model_path).name == "epoch=3.ckpt" and stopping.stopped_epoch == 0
    assert "logs nothing: the reference sees too little of the inputs" in first
    assert "the reference sees too little of the inputs (on labels" in last and "take the last epoch" in last
    assert len(monitor.history) == 4 and not any("expected_loss" in row for row in monitor.history)
    assert name not in run.logged_metrics and name not in run.callback_metrics  # of which a tuner reads
    assert monitor.summary["chosen_by"] == "nothing" and monitor.summary["epoch"] is None


# What machines read


def test_the_summary_the_history_and_the_plot_of_a_fit(tmp_path: Path) -> None:
    matplotlib.use("agg")
    monitor = quick_risk(validation_labels=True)
    with pytest.raises(ValueError, match="Expected a fit with values before `plot`"):
        monitor.plot()
    val = batches_of(*labelled(50, seed=1).tensors)
    vals = [val, unlabelled_loader(20, seed=2)]
    run, texts = fitted_and_said(monitor, Plain(), batches_of(X, NOISY), vals, max_epochs=3)
    assert len(texts) == 1 and "found no label in the batches of dataloader 1, so labels are not used" in texts[0]
    summary = monitor.summary
    assert summary["chosen_by"] == "reference and labels" and summary["num_labels"] == 50
    assert summary["skill"] == monitor.reference.skill_ and summary["num_training"] == 90
    best = monitor.history[2 * summary["epoch"]]
    assert all(summary[name] == best[name] for name in ("expected_loss", "expected_accuracy", "expected_auroc"))
    keys = {"epoch", "step", "dataloader_idx", "num_labels"}
    assert len(monitor.history) == 6 and all(row.keys() >= keys for row in monitor.history)
    for index in (0, 1):
        rows = [row for row in monitor.history if row["dataloader_idx"] == index]
        for name in ("expected_loss", "expected_accuracy", "expected_auroc"):
            curve = [epoch[f"val/{name}/dataloader_idx_{index}"] for epoch in run.epochs]
            assert [row[name] for row in rows] == pytest.approx(curve, rel=1e-6)
    figure, axes = monitor.plot()
    assert {ax.get_title() for ax in axes} == names_of("multiclass") and len(axes[0].lines) == 2
    assert [axes[0].get_title(), axes[-1].get_title()] == [ACCURACY, LOSS]
    figure.savefig(tmp_path / "curves.png")
