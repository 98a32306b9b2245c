"""Labels of validation samples count beside the estimate, few or all, wherever they are."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor
from tests.callbacks.plain_loop import Plain, bce
from tests.helpers import Classifier, fitted, inputs, labelled, loader, logged, said

NUM_BATCHES, BATCH_SIZE = 30, 50  # of 1,500 samples, 12 batches are chosen
X, Y = labelled(NUM_BATCHES * BATCH_SIZE, seed=1).tensors
TERMS = [f"val_risk_{name}" for name in ("claim", "overconfidence", "memorization", "variance", "reference")]


def do_nothing(batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
    """A step for labels that may lie outside of the classes."""


def values(
    val: Any, step: Any = do_nothing, num_sanity_val_steps: int = 1, **kwargs: Any
) -> tuple[dict[str, float], Classifier]:
    """What is logged after an epoch, and the model."""
    seed_everything(0, verbose=False)
    model = Classifier()
    model.validation_step = step
    options = {"max_epochs": 1, "num_sanity_val_steps": num_sanity_val_steps}
    run = fitted([RiskMonitor(**kwargs)], model, loader(), val, **options)
    return logged(run, "val_risk_"), model.eval()


def validation(labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(inputs(len(labels), seed=1), labels), BATCH_SIZE)


def only(index: Tensor, kept: Any) -> Tensor:
    """The labels of some samples; -100 for the others."""
    return Y.where(kept(index), -100)


INDEX = torch.arange(len(Y))
# 12 evenly spaced batches are measured, and 24 are scored if they have labels, beside the first that is not measured.
KEPT = {1} | {-(-place * NUM_BATCHES // count) for count in (12, 24) for place in range(count)}
IS_KEPT = torch.tensor([int(index) // BATCH_SIZE in KEPT for index in INDEX])
LABELS = {
    "few, most in batches that are not chosen": only(INDEX, lambda index: index % 97 == 5),
    "one, in the last batch": only(INDEX, lambda index: index == len(Y) - 1),
    "in each batch, 8 bits": only(INDEX, lambda index: index % 3 > 0).to(torch.int8),
}


def scores(model: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    with torch.no_grad():
        p = model(x).double().softmax(1)
    return (p - nn.functional.one_hot(labels.long(), 4)).square().sum(1)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("has_reference", [True, False])
def test_their_score_and_the_estimate_are_combined(name: str, has_reference: bool) -> None:
    labels = LABELS[name]
    # A constant has no skill, and so no weight.
    options = {} if has_reference else {"features": lambda batch: torch.ones(len(batch[0]), 1)}
    without, _ = values(validation(labels), **options)
    combined, model = values(validation(labels), validation_labels=True, **options)
    counts = labels.long() != -100
    if "each" in name:
        counts &= IS_KEPT
    found, m = scores(model, X[counts], labels[counts]), int(counts.sum())
    assert (without["val_risk_reference_weight"] > 0) == has_reference
    weight = 200 if has_reference else 40
    expected = (found.sum() + weight * without["val_risk_estimate"]) / (m + weight)
    assert combined["val_risk_num_labels"] == m
    assert combined["val_risk_label_score"] == pytest.approx(float(found.mean()), rel=1e-5)
    assert combined["val_risk_estimate"] == pytest.approx(float(expected), rel=1e-5)
    assert all(combined[term] == pytest.approx(without[term]) for term in TERMS)
    assert "val_risk_label_stderr" not in combined


def test_of_many_labels_about_twelve_hundred_are_scored_in_evenly_spaced_batches() -> None:
    combined, model = values(validation(Y), validation_labels=True)
    assert combined["val_risk_num_labels"] == int(IS_KEPT.sum()) == 1250
    truth = float(scores(model, X[IS_KEPT], Y[IS_KEPT]).mean())
    assert combined["val_risk_label_score"] == pytest.approx(truth, rel=1e-5)


def test_they_are_found_by_targets() -> None:
    val = DataLoader([{"x": x, "what": y} for x, y in zip(X[:120].split(40), Y[:120].split(40), strict=True)], None)

    def targets(batch: Any) -> Tensor:
        return batch["what"] if isinstance(batch, dict) else batch[1]

    assert values(val, validation_labels=True, targets=targets)[0]["val_risk_num_labels"] == 120


def test_a_targets_function_may_fail_on_batches_without_labels() -> None:
    batches = DataLoader([(X[:40],), (X[40:80], Y[40:80])], None)
    with pytest.warns(UserWarning, match="takes some validation batches as unlabelled: .*IndexError"):
        found, _ = values(batches, validation_labels=True, targets=lambda batch: batch[1])
    assert found["val_risk_num_labels"] == 40 and found["val_risk_estimate"] > 0


@pytest.mark.parametrize("val", [DataLoader(inputs(40), 8), validation(torch.full_like(Y[:100], -100))])
def test_without_any_the_estimate_is_what_it_is_without_the_option(val: DataLoader) -> None:
    assert values(val, validation_labels=True)[0] == values(val)[0]


@pytest.mark.parametrize("num_sanity_val_steps", [0, 1])
def test_labels_of_other_classes_are_refused_at_first_and_later_cost_no_run(
    num_sanity_val_steps: int,
) -> None:
    options = {"validation_labels": True, "num_sanity_val_steps": num_sanity_val_steps}
    refused = pytest.raises(MisconfigurationException, match="Expected labels from 0 to 3")
    with said() as texts, refused if num_sanity_val_steps else nullcontext():
        values(validation(Y[:100] + 7), **options)
    assert num_sanity_val_steps or any("Expected labels from 0 to 3" in text for text in texts)


def test_each_of_several_loaders_has_its_own() -> None:
    few = LABELS["few, most in batches that are not chosen"][:400]
    found, _ = values([validation(few), validation(Y[:100])], validation_labels=True)
    counts = [found[f"val_risk_num_labels/dataloader_idx_{index}"] for index in (0, 1)]
    assert counts == [int((few != -100).sum()), 100]


def test_binary_labels_of_minus_100_are_none() -> None:
    y = (inputs(100)[:, 0] > 0.5).float().where(torch.arange(100) % 5 == 0, -100)
    model, monitor = Plain(1, bce), RiskMonitor("binary", validation_labels=True)
    model.training_step = lambda batch, batch_idx: model(batch[0]).square().mean()
    model.validation_step = lambda batch, batch_idx: None
    train, val = (DataLoader(TensorDataset(inputs(100), y), 20) for _ in range(2))
    run = fitted([monitor], model, train, val, max_epochs=1)
    assert run.callback_metrics["val_risk_num_labels"] == 20 and monitor.fit_state.num_training == 20
    assert 0 < run.callback_metrics["val_risk_label_score"] < 1


def test_labels_are_those_of_the_batch_before_the_step_changes_it() -> None:
    def spoil(batch: list[Tensor], batch_idx: int) -> None:
        batch[0].zero_(), batch[1].zero_()

    spoiled, _ = values(validation(Y[:100]), spoil, validation_labels=True)
    assert spoiled == values(validation(Y[:100]), validation_labels=True)[0]
