"""Labels of validation samples count beside the estimate, few or all, wherever they are."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional import refined_score
from tests.callbacks.plain_loop import Plain, bce
from tests.helpers import Quiet, fitted, inputs, labelled, loader, logged, said

NUM_BATCHES, BATCH_SIZE = 30, 50
X, Y = labelled(NUM_BATCHES * BATCH_SIZE, seed=1).tensors
TERMS = [f"val/risk_{name}" for name in ("claim", "overconfidence", "memorization", "variance", "reference")]


def run(val: Any, num_sanity_val_steps: int = 1, **kwargs: Any) -> tuple[Any, Quiet]:
    """What is logged in two epochs that do not move the model, and the model."""
    model = Quiet()
    model.lr = 0.0
    run = fitted([RiskMonitor(**kwargs)], model, loader(), val, num_sanity_val_steps=num_sanity_val_steps)
    return logged(run, "val/risk_"), model.eval()


def values(val: Any, **kwargs: Any) -> dict[str, float]:
    return run(val, **kwargs)[0]


def validation(labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(inputs(len(labels), seed=1), labels), BATCH_SIZE)


def without_labels(found: dict[str, float]) -> float:
    """The estimate, from its terms and the reference."""
    *terms, reference = (found[name] for name in TERMS)
    weight = found["val/risk_reference_weight"]
    return (sum(terms) + weight * reference) / (1 + weight)


INDEX = torch.arange(len(Y))
LABELLED = {  # which samples have a label
    "first": INDEX < 80,
    "last": len(Y) - 1 == INDEX,
    "scattered, most in batches that would not be kept without": INDEX % 97 == 5,
    "in every second batch": (INDEX // 50) % 2 == 0,
}


def labels_where(has_label: Tensor) -> Tensor:
    return Y.where(has_label, -100)


def scores(model: Quiet, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        p = model(x).double().softmax(1)
    return (p - nn.functional.one_hot(labels.long(), 4)).square().sum(1)


def refined(model: Quiet, x: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return refined_score(model(x), labels.long()).score


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("has_reference", [True, False])
def test_they_are_kept_first_wherever_they_are_and_combined_with_the_estimate(name: str, has_reference: bool) -> None:
    # A constant has no skill, and so no weight.
    options = {} if has_reference else {"features": lambda batch: torch.ones(len(batch[0]), 1)}
    has_label = LABELLED[name]
    found, model = run(validation(labels_where(has_label)), validation_labels=True, **options)
    assert (found["val/risk_reference_weight"] > 0) == has_reference
    expected, m = scores(model, X[has_label], Y[has_label]), int(has_label.sum())
    assert found["val/risk_num_labels"] == m
    assert found["val/risk_label_score"] == pytest.approx(refined(model, X[has_label], Y[has_label]), rel=1e-5)
    weight = 200 if has_reference else 40
    combined = (expected.sum() + weight * without_labels(found)) / (m + weight)
    assert found["val/risk_estimate"] == pytest.approx(float(combined), rel=1e-5)


@pytest.mark.parametrize("num_samples", [600, 1000])
def test_the_terms_are_those_without_the_option_where_the_same_samples_are_kept(num_samples: int) -> None:
    val, options = validation(Y[:num_samples].to(torch.int8)), {"num_samples": num_samples}
    without, found = (values(val, validation_labels=on, **options) for on in (False, True))
    assert found["val/risk_num_labels"] == num_samples
    assert {term: found[term] for term in TERMS} == {term: without[term] for term in TERMS}
    assert without_labels(found) == pytest.approx(without["val/risk_estimate"], rel=1e-5)


def test_of_many_about_twelve_hundred_are_scored() -> None:
    found, model = run(validation(Y), validation_labels=True)
    assert found["val/risk_num_labels"] == 1200
    assert found["val/risk_label_score"] == pytest.approx(refined(model, X, Y), rel=0.02)


def test_of_many_batches_only_those_are_asked_for_labels_that_may_be_kept() -> None:
    asked = list[int]()

    def targets(batch: Any) -> Tensor:
        asked.append(len(batch[1]))
        return batch[1]

    data = TensorDataset(inputs(20_000, seed=1), torch.zeros(20_000, dtype=torch.long))
    found = values(DataLoader(data, 10), validation_labels=True, targets=targets)
    assert found["val/risk_num_labels"] == 1200 and asked.count(10) < 700  # of 2,000


def test_they_are_found_by_targets_which_may_fail_on_batches_without_labels() -> None:
    batches = DataLoader([{"x": X[:40]}, {"x": X[40:80], "what": Y[40:80]}], None)
    with pytest.warns(UserWarning, match="takes some validation batches as unlabelled: .*KeyError"):
        found = values(batches, validation_labels=True, targets=lambda b: b["what"] if isinstance(b, dict) else b[1])
    assert found["val/risk_num_labels"] == 40 and found["val/risk_estimate"] > 0


@pytest.mark.parametrize("val", [
    DataLoader(inputs(40), 8), validation(torch.full_like(Y[:100], -100)),
    DataLoader([{"x": x, "annotation": y} for x, y in zip(X[:40], Y[:40], strict=True)], 8),
])  # fmt: skip
def test_that_there_are_none_is_said_once_and_changes_nothing(val: DataLoader) -> None:
    without = values(val)
    with said() as texts:
        assert values(val, validation_labels=True) == without
    assert len(texts) == 1 and "found no label in the batches of dataloader 0, and does without." in texts[0]


@pytest.mark.parametrize("num_sanity_val_steps", [0, 1])
def test_labels_of_other_classes_are_refused_at_first_and_later_cost_no_run(num_sanity_val_steps: int) -> None:
    options = {"validation_labels": True, "num_sanity_val_steps": num_sanity_val_steps}
    refused = pytest.raises(MisconfigurationException, match="Expected labels from 0 to 3")
    with said() as texts, refused if num_sanity_val_steps else nullcontext():
        values(validation(Y[:100] + 7), **options)
    assert num_sanity_val_steps or any("Expected labels from 0 to 3" in text for text in texts)


def test_each_of_several_loaders_has_its_own() -> None:
    few = labels_where(INDEX % 97 == 5)[:400]
    found = values([validation(few), validation(Y[:100])], validation_labels=True)
    counts = [found[f"val/risk_num_labels/dataloader_idx_{index}"] for index in (0, 1)]
    assert counts == [int((few != -100).sum()), 100]


def test_binary_labels_of_minus_100_are_none() -> None:
    y = (inputs(100)[:, 0] > 0.5).float().where(torch.arange(100) % 5 == 0, -100)
    model, monitor = Plain(1, bce), RiskMonitor("binary", validation_labels=True)
    model.training_step = lambda batch, batch_idx: model(batch[0]).square().mean()
    model.validation_step = lambda batch, batch_idx: None
    train, val = (DataLoader(TensorDataset(inputs(100), y), 20) for _ in range(2))
    run = fitted([monitor], model, train, val, max_epochs=1)
    assert run.callback_metrics["val/risk_num_labels"] == 20 and monitor.record.num_training == 20
    assert 0 < run.callback_metrics["val/risk_label_score"] < 1
