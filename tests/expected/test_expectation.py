"""How sure the values of a fit are, labels that contradict the reference, and where there is nothing to know."""

import math
from typing import Any

import matplotlib
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAUROC, MulticlassF1Score

from lightning_sensitivity import RiskMonitor, compare_models
from lightning_sensitivity.expected.expectation import Expectation, Known
from lightning_sensitivity.expected.record import Unseen
from lightning_sensitivity.functional import draw_labels
from lightning_sensitivity.functional.tasks import TASKS
from tests.callbacks.plain_loop import CORRECT, NOISY, Plain, X, batches_of, fit
from tests.helpers import first_tensor, fitted, fitted_and_said, inputs, quick_risk, unlabelled_loader

VALUES = [f"expected_{name}" for name in ("loss", "accuracy", "auroc")]


def bernoulli(p: float, *sizes: int) -> float:
    return math.sqrt(p * (1 - p) * sum(1 / size for size in sizes))


def test_each_value_has_a_standard_error_and_the_plot_a_band() -> None:
    matplotlib.use("agg")
    fit(Plain(), monitor := quick_risk(), val=unlabelled_loader(400, seed=1), max_epochs=2)
    assert all(row[f"{name}_stderr"] > 0 for row in monitor.history for name in VALUES)
    row = monitor.history[0]
    assert row["expected_accuracy_stderr"] == pytest.approx(bernoulli(row["expected_accuracy"], 400, 90, 500), rel=0.1)
    assert monitor.summary["expected_loss_stderr"] in [row["expected_loss_stderr"] for row in monitor.history]
    band = monitor.plot()[1][0].collections[0].get_paths()[0].vertices[:, 1]
    top = max(row["expected_accuracy"] + 1.645 * row["expected_accuracy_stderr"] for row in monitor.history)
    assert band.max() == pytest.approx(top)


@pytest.mark.parametrize("sees_part", [False, True])
def test_of_patches_it_is_less_sure_than_of_what_the_user_shows_it(
    sees_part: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_sensitivity.reference.reference._LEAST_SKILL", 0)
    known, new = (x.reshape(-1, 1, 3, 4).repeat(1, 1, 3, 2) for x in (X, inputs(200, seed=1)))
    monitor = quick_risk(features=None if sees_part else lambda batch: first_tensor(batch).flatten(1))
    fitted_and_said(monitor, Plain(width=72), batches_of(known, CORRECT), batches_of(new))
    row = monitor.history[0]
    expected = bernoulli(row["expected_accuracy"], 200, 90, 30 if sees_part else 200)
    assert row["expected_accuracy_stderr"] == pytest.approx(expected, rel=0.1)


def of_number(batch: Any) -> Tensor:
    return (first_tensor(batch)[:, 0] * 1e6).long()


def test_samples_of_a_group_count_as_one() -> None:
    stderrs = []
    for groups in (None, of_number):
        monitor = quick_risk(groups=groups)
        fitted_and_said(monitor, Plain(), batches_of(X, NOISY), batches_of(inputs(40, seed=1).repeat(5, 1)))
        stderrs.append(monitor.history[0]["expected_accuracy_stderr"])
    expected = bernoulli(0.5, 40, 90, 500) / bernoulli(0.5, 200, 90, 500)
    assert stderrs[1] / stderrs[0] == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("is_contradicted", [False, True])
def test_labels_that_contradict_the_reference_outweigh_it(is_contradicted: bool) -> None:
    """The network predicts the same class of all samples, of which training labels know nothing."""
    model, y = Plain(), torch.arange(200) % 4
    model.lr = 0.0
    model.net[-1].bias.data = torch.tensor([50.0, 0, 0, 0]).double()
    val = (torch.arange(200) == 0).long() if is_contradicted else y
    monitor = quick_risk(validation_labels=True)
    fitted(monitor, model, batches_of(inputs(200), y), batches_of(inputs(200, seed=1), val), max_epochs=1)
    row = monitor.history[0]
    assert (row["expected_accuracy_equivalent_labels"] < 20) == (row["expected_accuracy"] > 0.9) == is_contradicted


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_soft_labels_are_as_often_right_as_they_say(task: str) -> None:
    """A network that always says yes is right in 0.7, 0.6 and 0 of labels; the most likely label says in 1, 1 and 0."""
    rules, yes = TASKS[task], torch.tensor([0.7, 0.6, 0.0]).repeat(20)[:, None].double()
    y = torch.cat([1 - yes, yes], 1) if task == "multiclass" else yes
    outputs = torch.cat([torch.zeros(60, 1), torch.ones(60, 1)], 1) if task == "multiclass" else torch.ones(60, 1)
    known = Known(y, None, None)
    told = Expectation(rules, None, rules.default_metrics(y.shape[1]), outputs, y, print)
    assert told.values(0, outputs, known, [])["expected_accuracy"] == pytest.approx(1.3 / 3, abs=0.01)


# What other metrics have, and what has no value


def test_other_metrics_have_no_error_also_beside_labels() -> None:
    monitor = quick_risk(metrics={"f1": MulticlassF1Score(4)}, validation_labels=True)
    fit(Plain(), monitor, val=batches_of(inputs(200, seed=1), torch.arange(200) % 4), max_epochs=1)
    row = monitor.history[0]
    assert row["expected_loss_stderr"] > 0 and row["expected_f1_equivalent_labels"] == 1000
    assert "expected_f1_stderr" not in row


def of_some(outputs: Tensor, y: Tensor) -> Tensor:
    """None of samples that are not of the first training batch."""
    return torch.nn.functional.cross_entropy(outputs, y, reduction="none").where(torch.arange(len(y)) < 32, math.nan)


MASK = torch.tensor([0.0, 0, 0, -math.inf]).double()
WITHOUT_LOSS: dict[str, tuple[dict[str, Any], Any, str]] = {  # options, what outputs become, and what is said
    "a loss that is nan for some samples": ({"loss": of_some}, None, "gets nan from `loss`"),
    "a label of a class that is masked": ({"validation_labels": True}, lambda y: y + MASK, "that the outputs mask"),
}


@pytest.mark.parametrize("name", WITHOUT_LOSS)
def test_there_is_no_loss_of(name: str) -> None:
    options, outputs, match = WITHOUT_LOSS[name]
    monitor = quick_risk(outputs=outputs, **options)
    val = batches_of(X, CORRECT)
    _, texts = fitted_and_said(monitor, Plain(), batches_of(X[:60], NOISY[:60]), val, max_epochs=2)
    assert [match in text for text in texts if "logs no `expected_loss` then" in text] == [True]
    assert all("expected_accuracy" in row and "expected_loss" not in row for row in monitor.history)


def test_what_a_reference_thinks_possible_of_a_class_that_outputs_mask_costs_nothing() -> None:
    monitor = quick_risk(outputs=lambda y: y + MASK)
    fit(Plain(), monitor, max_epochs=1)
    assert math.isfinite(monitor.history[0]["expected_loss"]) and monitor.history[0]["expected_loss_stderr"] > 0


# Where there is nothing to know

NOTHING = torch.ones(200, 12)


@pytest.mark.parametrize("metrics", [None, {"auroc": MulticlassAUROC(2)}])
def test_where_all_predictions_are_equal_so_are_all_areas(metrics: Any) -> None:
    task, q = TASKS["multiclass"], torch.tensor([[0.8, 0.2]]).repeat(50, 1)
    metrics = task.default_metrics(2) if metrics is None else metrics
    expected = Expectation(task, None, metrics, torch.zeros(1, 2), torch.zeros(1), print)
    unseen = Unseen(torch.arange(50), q, draw_labels(q), 0.2, 100, "table")
    known = Known(torch.full((50, 2), math.nan), None, unseen)
    values = [expected.values(0, inputs(50, seed)[:, :2], known, []) for seed in range(3)]
    assert [row["expected_auroc"] for row in values] == [0.5] * 3


def test_where_a_table_tells_nothing_the_network_that_claims_least_is_the_best() -> None:
    y = (torch.arange(200) % 5 > 3).long()
    train, val = batches_of(NOTHING, y), batches_of(NOTHING[:50])
    monitor = RiskMonitor()
    _, texts = fitted_and_said(monitor, model := Plain(2), train, val, max_epochs=2)
    shares = torch.tensor([0.8, 0.2]).double()
    expected = -(model.eval()(NOTHING[:50]).detach().log_softmax(1) * shares).sum(1).mean()
    assert monitor.history[-1]["expected_loss"] == pytest.approx(float(expected))
    assert monitor.summary["inputs_tell_nothing"] and monitor.summary["skill"] == 0 and texts == []


def test_models_are_compared_by_the_mean_label_where_a_table_tells_nothing() -> None:
    y = (torch.arange(200) % 5 > 3).long()
    models = {name: torch.nn.Linear(12, 2) for name in ("0", "1")}
    for name, model in models.items():
        torch.nn.init.zeros_(model.weight)
        model.bias.data = 3 * torch.eye(2)[int(name)]
    with pytest.warns(UserWarning, match="the inputs tell nothing of the labels"):
        found = compare_models(models, [NOTHING[:50]], training=batches_of(NOTHING, y))
    assert [(row.name, row.expected) for row in found] == [("0", pytest.approx(0.8)), ("1", pytest.approx(0.2))]
