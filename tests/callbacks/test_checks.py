"""What is refused before the first training step, and what is said after it: a monitor never ends a run."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger
from sklearn.linear_model import Ridge
from sklearn.naive_bayes import GaussianNB
from sklearn.svm import LinearSVC
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassAccuracy

import tests.helpers as helpers
from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Acting, Linear, Plateau, failing, fitted, loader, quick_risk, refused, unlabelled_loader

MONITORS = [SensitivityMonitor, RiskMonitor]
BEFORE = [{}, {"num_sanity_val_steps": 0}]  # in the sanity check, and in the first training batch without one
SENSITIVITY, LOSS = "val/output_sensitivity", "val/expected_loss"


def said(*args: Any, **options: Any) -> list[str]:
    """What monitors say in a fit."""
    return helpers.fitted_and_said(*args, **options)[1]


# Failures


@pytest.mark.parametrize("options", BEFORE)
@pytest.mark.parametrize("kind", MONITORS)
@pytest.mark.parametrize(("error", "match"), [
    (TypeError("of the user"), "TypeError: of the user. If `forward` takes other arguments, set `inputs=.*#arguments"),
    (ValueError("of the user"), "of the user. If"),
    (MisconfigurationException("Do this."), "Do this. .More: docs"),
])  # fmt: skip
def test_a_failure_before_the_first_step_is_an_error_that_says_what_to_do(
    options: Any, kind: Any, error: Exception, match: str
) -> None:
    if kind is SensitivityMonitor and options:
        return  # without a sanity check it has no pass before the first step
    text = refused(kind(), failing(error), **options)
    what = "can't read the first training batch" if "RiskMonitor" in text and options else "could not .*"
    assert re.match(rf"`{kind.__name__}` {what}: {match}", text)


def test_running_out_of_memory_before_the_first_step_stays_the_error_that_it_is() -> None:
    run = helpers.trainer(callbacks=[SensitivityMonitor()])
    with pytest.raises(torch.cuda.OutOfMemoryError):  # which the batch-size finder looks for
        run.fit(failing(torch.cuda.OutOfMemoryError("CUDA out of memory.")), loader(), loader())


def test_a_failure_is_said_once_and_leaves_gaps_in_the_curve_and_changes_no_other_value(tmp_path: Path) -> None:
    logger, options = CSVLogger(tmp_path, name=None), {"log_every_n_steps": 1, "max_epochs": 6}
    monitors, data = [SensitivityMonitor(), risk := quick_risk()], (loader(), unlabelled_loader(seed=1))
    model = failing(KeyError("an error of the user"), lambda x, epoch: epoch in range(1, 4))
    run, texts = helpers.fitted_and_said(monitors, model, *data, logger=logger, **options)
    assert [text.split("`")[1] for text in texts] == ["SensitivityMonitor", "RiskMonitor"]
    assert all("KeyError: 'an error of the user'. This epoch has no value: callbacks" in text for text in texts)
    rows = helpers.csv_rows(logger.log_dir)
    for name in (SENSITIVITY, f"{SENSITIVITY}_stderr", "val/expected_loss", "val/expected_accuracy"):
        assert [int(row["epoch"]) for row in rows if row[name]] == [0, 4, 5]  # nothing old as if it were new
    assert ["expected_loss" in row for row in risk.history] == [True, False, False, False, True, True]
    whole = fitted([SensitivityMonitor(), quick_risk()], Linear(), *data, **options)
    assert [run.epochs[index] for index in (0, 4, 5)] == [whole.epochs[index] for index in (0, 4, 5)]


def warning(model: Any, x: Tensor, epoch: int) -> None:
    if epoch > 0:
        warnings.warn("a warning of the user", stacklevel=1)


@pytest.mark.parametrize("monitor", [SensitivityMonitor(), quick_risk()])
def test_warnings_that_are_errors_pass_through(monitor: Any) -> None:
    with pytest.raises(UserWarning, match="a warning of the user"):
        fitted([monitor], Acting(warning))


# State that is not put back


def test_a_forward_that_writes_to_a_parameter_is_refused_at_first_and_later_costs_values() -> None:
    def write(model: Any, x: Tensor, epoch: int) -> None:
        if epoch >= model.first_epoch:
            model.net.bias.detach().mul_(0.9)

    problem = "`forward` writes to parameters in eval mode, which is not restored: do so only `if self.training`"
    for kind in (SensitivityMonitor, quick_risk):
        model = Acting(write)
        model.first_epoch = -1
        assert problem in refused(kind(), model)
        model.first_epoch = 1
        texts = said(kind(), model, loader(), unlabelled_loader(seed=1), max_epochs=3)
        assert len(texts) == 1 and problem in texts[0]


# What is logged


class OwnLog(Linear):
    """Its `log` takes no other arguments than a name and a value."""

    def log(self, name: str, value: Any) -> None:
        LightningModule.log(self, name, value)


def test_a_log_of_fewer_arguments_costs_values() -> None:
    texts = said([SensitivityMonitor(), quick_risk()], model := OwnLog(), loader(), unlabelled_loader(seed=1))
    assert model.trainer.current_epoch == 2
    assert all(sum(f"could not log `{name}`" in each for each in texts) == 1 for name in (SENSITIVITY, LOSS))


# Who monitors a value


def watching(kind: str, monitor: str, mode: str) -> tuple[list[Callback], Any]:
    if kind == "ReduceLROnPlateau":
        return [], Plateau(monitor, mode)
    return [EarlyStopping(monitor, mode=mode)], Linear()


TWO = "/dataloader_idx_1"
NAMES: dict[str, tuple[str, str, int, str]] = {  # a name, a mode, the number of loaders, and what is said
    "the highest score": ("expected_loss", "max", 1, "`mode` should be 'min' for `{}`, got 'max' in `{}`"),
    "the lowest accuracy": ("expected_accuracy", "min", 1, "`mode` should be 'max' for `{}`, got 'min' in `{}`"),
    "the lowest of a loader": ("expected_auroc" + TWO, "min", 2, "`mode` should be 'max' for `{}`, got 'min' in `{}`"),
    "a metric that is left out": ("expected_auroc", "max", 1, "`{1}` monitors `{0}`, which is not logged. There are "),
    "no metric of ours": ("expected_mcc", "max", 1, "To log a metric of torchmetrics, set `metrics={{'mcc': ...}}`"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["EarlyStopping", "ReduceLROnPlateau"])
@pytest.mark.parametrize("name", NAMES)
def test_who_monitors_what_is_not_logged_or_looks_for_the_worst_is_refused(name: str, kind: str) -> None:
    monitor, mode, num_loaders, match = NAMES[name]
    callbacks, model = watching(kind, f"val/{monitor}", mode)
    match = match.format(f"val/{monitor}", kind)
    risk = RiskMonitor(metrics={} if "left out" in name else None)
    refused([risk, *callbacks], model, loader(), [loader()] * num_loaders, match=match, num_sanity_val_steps=0)


def test_other_names_and_those_of_another_prefix_are_no_concern_of_a_monitor() -> None:
    class Own(Linear):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/calibration_error", 0.1)

    others = [EarlyStopping("val/calibration_error"), EarlyStopping("b/expected_loss", mode="min")]
    fitted([quick_risk(prefix="b/"), quick_risk(), *others], Own(), loader(), unlabelled_loader(seed=1))


def test_a_name_that_the_users_code_logs_too_is_said() -> None:
    model = Linear()
    model.on_validation_epoch_end = lambda: model.log("val/expected_loss", 9.0)  # type: ignore[method-assign]
    _, (text,) = helpers.fitted_and_said(quick_risk(), model, loader(), unlabelled_loader(seed=1))
    assert re.search("could not log `val/expected_loss`: .*twice", text)


# Metrics and references that can't be taken


METRICS: dict[str, tuple[Any, str]] = {
    "a metric alone": (MulticlassAccuracy(4), "`metrics` should be a dict of names and torchmetrics metrics"),
    "no direction": ({"sum": SumMetric()}, r"`metrics\['sum'\].higher_is_better` should be True or False, got None"),
    "our name": ({"loss": MulticlassAccuracy(4)}, "`metrics` should be named otherwise"),
    "a vector": ({"a": MulticlassAccuracy(4, average=None)}, r"`metrics\['a'\]` should be one number"),
    "other classes": ({"a": MulticlassAccuracy(3)}, r"`metrics\['a'\]` fails on outputs \(16, 4\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_that_can_not_be_expected_is_refused_before_the_first_step(name: str) -> None:
    metrics, match = METRICS[name]
    with pytest.raises(MisconfigurationException, match=match):
        fitted([RiskMonitor(metrics=metrics)], model := Linear())
    assert name not in ("a vector", "other classes") or model.global_step == 0


@pytest.mark.parametrize("options", BEFORE)
def test_another_number_of_labels_than_of_samples_is_refused_before_the_first_step(options: Any) -> None:
    monitor = RiskMonitor(targets=lambda batch: batch[1][:2])
    assert "a label for each of 16 samples, got 2" in refused(monitor, Linear(), **options)


@pytest.mark.parametrize("options", BEFORE)
def test_labels_among_the_inputs_are_refused_before_the_first_step_unless_features_say_what_is_seen(
    options: Any,
) -> None:
    class OfBatch(Linear):
        def forward(self, batch: Any) -> Tensor:
            return super().forward(batch[0])

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return cross_entropy(self(batch), batch[1])

    selectors: Any = {"inputs": lambda batch: (batch,), "targets": lambda batch: batch[1]}
    refused(RiskMonitor(**selectors), OfBatch(), match="the labels are among the inputs", **options)
    fitted([quick_risk(features=lambda batch: batch[0], **selectors)], OfBatch(), **options)


def test_a_column_of_nan_is_refused_before_the_first_step_unless_labels_say_what_is_expected() -> None:
    x, y = helpers.labelled(50).tensors
    data = DataLoader(TensorDataset(x.index_fill(1, torch.tensor(0), torch.nan), y), 16)
    refused(RiskMonitor(), helpers.Filling(), data, data, match="all samples have nan or inf in inputs or features")
    run, _ = helpers.fitted_and_said(quick_risk(validation_labels=True), helpers.Filling(), data, data)
    assert "val/expected_loss" in run.callback_metrics


SHARES: dict[str, tuple[str, Any, str]] = {
    "other sums": ("multiclass", [0.5, 0.4], "positive shares of all classes that sum to 1"),
    "a class without samples": ("multiclass", [1.0, 0.0], "positive shares of all classes"),
    "words": ("multiclass", ["a", "b"], "can't be read"),
    "a regression": ("regression", [0.5, 0.5], "None"),
    "several labels": ("multilabel", [0.25] * 4, "None"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARES)
def test_class_shares_that_are_none_are_refused(name: str) -> None:
    task, shares, match = SHARES[name]
    with pytest.raises(MisconfigurationException, match=f"`class_shares`.*{match}"):
        RiskMonitor(task, class_shares=shares)


@pytest.mark.parametrize("options", BEFORE)
def test_class_shares_of_other_classes_are_refused_before_the_first_step(options: Any) -> None:
    refused(RiskMonitor(class_shares=[0.5, 0.5]), Linear(), match="`class_shares` should be shares of 4 ", **options)


@pytest.mark.parametrize(("task", "estimator"), [
    ("multiclass", Ridge()), ("multiclass", GaussianNB), ("binary", LinearSVC()), ("regression", 3),
])  # fmt: skip
def test_a_reference_without_what_is_needed_of_it_is_refused(task: str, estimator: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"`reference` should be an estimator of scikit-learn with `p"):
        RiskMonitor(task, reference=estimator)
