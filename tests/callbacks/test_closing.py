"""The summary and the line at the end of a fit say what is true of it: the epoch and file, what chose, and why."""

import math
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import torch
from lightning.pytorch import callbacks as cb
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.callbacks.closing import closing_line, summarize
from lightning_sensitivity.callbacks.record import RiskRecord, Verdict
from tests.callbacks.plain_loop import ACCURACY, AUROC, NOISY, SCORE, Plain, X, batches_of, fit
from tests.callbacks.test_checks import Plateau
from tests.helpers import fitted, fitted_and_said, labelled, quick_estimator, quick_risk, trainer, unlabelled_loader

FIRST, SECOND = (f"{SCORE}/dataloader_idx_{index}" for index in (0, 1))
SKILL = "without having seen them, it predicts 84% of these labels (always the most frequent class: 60%; AUROC 0.91)"
NOISE = "About 12% of the training labels can't be explained: they are wrong, or not to be known from the inputs."
DATA = batches_of(X, NOISY), unlabelled_loader(seed=1)
LONGER = "It was still improving: train for longer."


@pytest.fixture
def log(caplog: Any) -> Any:
    caplog.set_level("INFO", "lightning.pytorch")
    return caplog


def lines(log: Any) -> list[str]:
    return [each for each in log.text.splitlines() if "was lowest at epoch" in each or "was highest at" in each]


# What it says of what is known


def verdict(**changes: Any) -> Verdict:
    known = {"is_trusted": True, "learner": "forest", "features": "columns", "num_samples": 2000}
    shares = {"skill": 0.5, "accuracy": 0.84, "auroc": 0.91, "majority": 0.6, "unexplained": 0.12}
    return Verdict(**{**known, **shares, **changes})


def record(
    known: Verdict | None,
    best: int = 3,
    temperature: float = 2.0,
    num_labels: int = 0,
    earlier: float = 0.9,
    **more: Any,
) -> Any:
    """Of five epochs, four by a second reference; accuracy is highest one epoch after the lowest score."""
    rows = [
        {"epoch": epoch, "step": 10 * epoch, "dataloader_idx": 0, "expected_score": 0.4 + abs(epoch - best) / 10,
         "expected_accuracy": 0.9 - abs(epoch - best - 1) / 10, "temperature": temperature, "num_labels": num_labels,
         "reference": 1 + (epoch > 0)} for epoch in range(5)]  # fmt: skip
    rows[0]["expected_score"] = earlier  # by a reference of few samples
    return RiskRecord(known, history=rows, num_validations=5, **{"num_references": 2, **more})


CURVES = {SCORE: ("expected_score", 0, False), ACCURACY: ("expected_accuracy", 0, True)}
BEST, CALIBRATE = f"`{SCORE}` was lowest at epoch 3", ": divide its logits by 2.0 to calibrate it."
CHOSE = f"The reference (random forest, 2,000 training labels) chose: {SKILL}."
BLIND = {"is_trusted": False, "unexplained": math.nan}
NUMBERS = {"accuracy": math.nan, "auroc": math.nan, "majority": math.nan, "unexplained": math.nan, "skill": 0.62}
SAYS: dict[str, tuple[Verdict | None, dict[str, Any], str]] = {  # a verdict, a record, and what is said
    "the reference chose": (verdict(), {}, f"{BEST}{CALIBRATE} {CHOSE} {NOISE}"),
    "few labels are left": (verdict(unexplained=0.04), {}, f"{BEST}{CALIBRATE} {CHOSE}"),
    "calibrated": (verdict(), {"temperature": 1.0}, f"{BEST}. {CHOSE} {NOISE}"),
    "the low end of the grid": (verdict(), {"temperature": 0.5}, f"{BEST}. {CHOSE} {NOISE}"),
    "gaps": (verdict(), {"num_gaps": 1}, f"{BEST}{CALIBRATE} {CHOSE} {NOISE} 1 of 5 validations have no value."),
    "a better value of an earlier reference": (verdict(unexplained=0.0), {"earlier": 0.1},
        f"{BEST}{CALIBRATE} {CHOSE} An earlier reference, which knew fewer samples, gave 1 better: callbacks may have "
        "stopped the run or saved by that."),
    "labels and the reference chose": (verdict(unexplained=0.0), {"num_labels": 70},
        f"{BEST}{CALIBRATE} 70 validation labels and the{CHOSE[3:]}"),
    "labels chose": (verdict(**BLIND), {"num_labels": 70}, f"{BEST}{CALIBRATE} 70 validation labels chose."),
    "labels chose, without a reference": (None, {"num_labels": 70}, f"{BEST}{CALIBRATE} 70 validation labels chose."),
    "ridge regression": (verdict(learner="ridge", features="patches", unexplained=0.0), {},
        f"{BEST}{CALIBRATE} {CHOSE.replace('random forest', 'ridge regression on patches')}"),
    "another estimator, many classes": (verdict(learner="GaussianNB", auroc=math.nan, unexplained=0.0), {},
        f"{BEST}{CALIBRATE} {CHOSE.replace('random forest', 'GaussianNB').replace('; AUROC 0.91', '')}"),
    "still improving": (verdict(unexplained=0.0), {"best": 4},
        f"{BEST[:-1]}4{CALIBRATE} {CHOSE} {LONGER}"),
    "a gap at the end": (verdict(unexplained=0.0), {"best": 4, "ends_in_gap": True},
        f"{BEST[:-1]}4{CALIBRATE} {CHOSE}"),
    "a regression": (verdict(**NUMBERS), {"temperature": 1.0},
        f"{BEST}. {CHOSE.replace(SKILL, 'its R² on left-out labels is 0.62')}"),
    "only a former reference was trusted": (verdict(**BLIND), {"num_references": 3},
        f"`{SCORE}` has no value to choose by. The reference sees too little of the inputs ({SKILL}), so nothing says "
        "when to stop. Callbacks that monitor it took the last epoch: label some validation samples "
        "(`validation_labels=True`), or set `features=`."),
    "no finite value since a trusted reference": (verdict(unexplained=0.0), {"num_references": 3},
        f"`{SCORE}` has no value to choose by. No validation since the reference was fitted gave one."),
}  # fmt: skip


@pytest.mark.parametrize("what", SAYS)
def test_it_says_if(what: str) -> None:
    known, shown, expected = SAYS[what]
    run = trainer()
    assert closing_line(run, summarize(run, CURVES, record(known, **shown))) == expected


WATCHING: dict[str, tuple[list[Any], str, int]] = {  # callbacks, the value, and the epoch that is named
    "nothing": ([], SCORE, 2),
    "accuracy": ([cb.EarlyStopping(ACCURACY, mode="max")], ACCURACY, 3),
    "another value": ([cb.EarlyStopping("val_loss")], SCORE, 2),
    "accuracy by a checkpoint, the score by EarlyStopping": (
        [cb.EarlyStopping(SCORE), cb.ModelCheckpoint("x", monitor=ACCURACY, mode="max")], ACCURACY, 3),
}  # fmt: skip


@pytest.mark.parametrize("what", WATCHING)
def test_it_is_about_the_value_that_is_watched_by(what: str) -> None:
    callbacks, name, epoch = WATCHING[what]
    run = trainer(callbacks, enable_checkpointing=len(callbacks) > 1)
    summary = summarize(run, CURVES, record(verdict(), 2))
    assert (summary["monitored"], summary["epoch"]) == (name, epoch)
    line = closing_line(run, summary)
    assert f"`{name}` was {'lowest' if name == SCORE else 'highest'} at epoch {epoch}" in line
    assert ("divide its logits" in line) == (name == SCORE)


# In a fit


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:.*callbacks used to create the checkpoint")
def test_of_a_fit_it_names_the_epoch_and_the_file_also_after_a_resume_with_fewer_loaders(
    tmp_path: Path, log: Any
) -> None:
    def run(num_loaders: int, name: str, **kwargs: Any) -> tuple[list[float], dict[str, Any]]:
        log.clear()
        checkpoint = cb.ModelCheckpoint(tmp_path, filename="{epoch}", monitor=name, save_last=True)
        vals = [unlabelled_loader(seed=seed) for seed in range(1, 1 + num_loaders)]
        model = Plain()
        model.lr = 0.05
        options = {"val": vals, "enable_checkpointing": True, **kwargs}
        epochs = fit(model, monitor := quick_risk(), checkpoint, **options).epochs
        return [epoch[name] for epoch in epochs], monitor.summary

    values, summary = run(2, SECOND, max_epochs=4)
    best = values.index(min(values))
    assert (summary["epoch"], summary["checkpoint"]) == (best, f"{tmp_path}/epoch={best}.ckpt")
    (line,) = lines(log)
    assert f"`{SECOND}` was lowest at epoch {best}, in the checkpoint {tmp_path}/epoch={best}.ckpt" in line
    values, summary = run(1, SCORE, max_epochs=6, ckpt_path=tmp_path / "last.ckpt")
    assert summary["monitored"] == SCORE and len(lines(log)) == 1


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # older versions of Lightning
def test_a_file_of_another_step_is_not_named(tmp_path: Path) -> None:
    """It was saved some steps after the validation whose value it has."""
    options = {"monitor": SCORE, "filename": "{step}", "every_n_train_steps": 5}
    monitor, checkpoint = quick_risk(), cb.ModelCheckpoint(tmp_path, **options)
    fit(Plain(), monitor, checkpoint, enable_checkpointing=True, max_epochs=3)
    assert checkpoint.best_model_path and monitor.summary["checkpoint"] == ""


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
    assert len(texts) == 1 and "logged nothing: the run ended before a validation with 600 training" in texts[0]
    fit(Plain(), monitor := quick_risk(), fast_dev_run=True)
    assert lines(log) == [] and monitor.summary == {} and len(monitor.history) == 1


class Stopping(cb.Callback):
    """It stops a fit in the middle, as `Timer` does, or `EarlyStopping` on another value."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 2


class Scheduled(Plain):
    """Its rate ends at zero."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


STOPPED: dict[str, tuple[Any, Any, int, bool]] = {  # a model, another callback, epochs; was it still improving?
    "EarlyStopping that waits": (Plain, lambda: cb.EarlyStopping(SCORE, patience=2), 3, True),
    "EarlyStopping that has what it wants": (Plain, lambda: cb.EarlyStopping(SCORE, stopping_threshold=10.0), 3, False),
    "another callback that stops it": (Plain, Stopping, 4, True),
    "a single epoch": (Plain, Stopping, 1, False),
    "a schedule that has ended": (Scheduled, Stopping, 3, False),
}


@pytest.mark.parametrize("name", STOPPED)
def test_it_advises_to_train_for_longer_unless_that_is_of_no_use(name: str, log: Any) -> None:
    make, other, max_epochs, is_improving = STOPPED[name]
    model = make()
    model.lr = 0.003
    fit(model, quick_risk(), other(), max_epochs=max_epochs)
    (line,) = lines(log)
    assert (LONGER in line) == is_improving


# Where there is no value


class Diverging(Plain):
    """Its outputs are nan from an epoch on."""

    first = 2

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (math.nan if self.current_epoch >= self.first else 1)


def test_outputs_that_are_all_nan_end_a_run_by_lightning_and_are_no_reason_to_train_for_longer(log: Any) -> None:
    for patient in (False, True):
        log.clear()
        monitor, stopping = quick_risk(), cb.EarlyStopping(SCORE, patience=3)
        run, _ = fitted_and_said([monitor] + [stopping] * (not patient), Diverging(), *DATA, max_epochs=5)
        assert len(run.epochs) == (5 if patient else 3) and math.isnan(run.epochs[2][SCORE])
        (line,) = lines(log)
        assert LONGER not in line and f"{len(run.epochs) - 2} of {len(run.epochs)} validations have no value" in line
        assert monitor.summary["epoch"] in (0, 1)


def test_of_a_network_that_was_never_finite_it_does_not_say_that_the_reference_is_blind() -> None:
    model = Diverging()
    model.first = 0
    _, texts = fitted_and_said(monitor := quick_risk(), model, *DATA)
    assert monitor.summary["epoch"] is None and monitor.summary["num_gaps"] == 2
    assert not any("sees too little" in text for text in texts)


def blind(batch: Any) -> Tensor:
    return torch.ones(len(batch if isinstance(batch, Tensor) else batch[0]), 1)


class OtherStopping(cb.EarlyStopping):
    pass


@pytest.mark.parametrize("goal", [None, 0.1, 0.3])  # which is not reached by what was not measured
@pytest.mark.parametrize(("name", "mode"), [(SCORE, "min"), (AUROC, "max")])
def test_where_the_reference_is_blind_callbacks_take_the_last_epoch(
    name: str, mode: str, goal: float | None, tmp_path: Path
) -> None:
    stopping = cb.EarlyStopping(name, mode=mode, patience=1, stopping_threshold=goal)
    checkpoint = cb.ModelCheckpoint(tmp_path, monitor=name, mode=mode, filename="{epoch}")
    monitor = RiskMonitor(features=blind)
    with pytest.warns(UserWarning) as caught:
        other = OtherStopping(name, mode=mode, stopping_threshold=0.2 if goal else None)
        monitors = [monitor, stopping, other, checkpoint]
        run = fitted(monitors, Plain(), *DATA, enable_checkpointing=True, max_epochs=4)
    first, last = (str(each.message) for each in caught if "reference sees too little" in str(each.message))
    assert Path(checkpoint.best_model_path).name == "epoch=3.ckpt" and stopping.stopped_epoch == 0
    assert "logs nothing: the reference sees too little of the inputs" in first
    assert "The reference sees too little of the inputs (without having" in last and "took the last epoch" in last
    assert monitor.history == [] and name not in run.logged_metrics
    assert monitor.summary["chosen_by"] == "nothing" and monitor.summary["epoch"] is None


class EverySecond(RiskMonitor):
    def should_measure(self, trainer: Any) -> bool:
        return trainer.current_epoch % 2 == 1


def test_epochs_that_are_left_out_cost_no_patience_and_no_rate(log: Any) -> None:
    stopping = cb.EarlyStopping(ACCURACY, mode="max", patience=2, min_delta=-9.0)
    model = Plateau(SCORE, "min")
    run = fit(model, monitor := EverySecond(reference=quick_estimator()), stopping, max_epochs=6)
    assert run.current_epoch == 6 and model.optimizers().param_groups[0]["lr"] == 0.1
    assert [epoch[ACCURACY] < -1e38 and epoch[SCORE] > 1e38 for epoch in run.epochs] == [True, False] * 3
    assert "3 of 6 validations have no value" in lines(log)[0] and monitor.summary["num_gaps"] == 3


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
    summary, reference = monitor.summary, monitor.reference
    assert summary["chosen_by"] == "reference and labels" and summary["num_labels"] == 50
    known = {"left_out_accuracy": "accuracy", "left_out_auroc": "auroc", "num_training": "num_samples"}
    for name in ("learner", "features", "skill", "unexplained", "majority", *known):
        assert str(summary[name]) == str(getattr(reference, known.get(name, name)))
    assert math.isnan(summary["left_out_r2"])
    keys = {"epoch", "step", "dataloader_idx", "num_labels", "temperature"}
    assert len(monitor.history) == 6 and all(row.keys() >= keys for row in monitor.history)
    for index in (0, 1):
        rows = [row for row in monitor.history if row["dataloader_idx"] == index]
        for name in ("expected_score", "expected_accuracy", "expected_auroc"):
            curve = [epoch[f"val/{name}/dataloader_idx_{index}"] for epoch in run.epochs]
            assert [row[name] for row in rows] == pytest.approx(curve, rel=1e-6)
    figure, axes = monitor.plot()
    assert [ax.get_title() for ax in axes] == [SCORE, ACCURACY, AUROC] and len(axes[0].lines) == 2
    figure.savefig(tmp_path / "curves.png")


@pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint")
def test_a_metric_that_a_resumed_fit_has_and_the_one_before_had_not_has_a_summary_and_a_plot(tmp_path: Path) -> None:
    matplotlib.use("agg")
    fit(Plain(), quick_risk(metrics={})).save_checkpoint(tmp_path / "last.ckpt")
    monitor, stopping = quick_risk(), cb.EarlyStopping(ACCURACY, mode="max")
    fit(Plain(), monitor, stopping, max_epochs=3, ckpt_path=tmp_path / "last.ckpt")
    assert (monitor.summary["monitored"], monitor.summary["epoch"]) == (ACCURACY, 2)
    assert len(monitor.plot()[1][1].lines[0].get_ydata()) == 3


class Immutable(CSVLogger):
    def log_hyperparams(self, params: Any) -> None:
        raise RuntimeError("hyperparameters are immutable")


def test_a_logger_that_refuses_the_summary_costs_no_last_line(tmp_path: Path, log: Any) -> None:
    _, texts = fitted_and_said(monitor := quick_risk(), Plain(), *DATA, logger=Immutable(tmp_path))
    assert len(texts) == len(lines(log)) == 1 and monitor.summary["epoch"] is not None
    assert "could not write the summary to a logger: RuntimeError: hyperparameters are immutable" in texts[0]
