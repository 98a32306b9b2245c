"""Labels of validation samples count beside the estimate, few or all, wherever they are."""

import re
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional.risk import LABEL_WEIGHT
from tests.helpers import Classifier, fitted, inputs, labelled, loader, logged

NUM_BATCHES, BATCH_SIZE = 40, 50  # of 2,000 samples, 24 batches are chosen


def values(val: Any, **kwargs: Any) -> tuple[dict[str, float], Classifier]:
    seed_everything(0, verbose=False)
    model, options = Classifier(), {"max_epochs": 1, "num_sanity_val_steps": 0}
    model.validation_step = lambda batch, batch_idx, dataloader_idx=0: None  # labels may lie outside of the classes
    run = fitted([RiskMonitor(**kwargs)], model, loader(), val, **options)
    return logged(run, "val_risk_"), model.eval()


def validation(labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(inputs(len(labels), seed=1), labels), BATCH_SIZE)


X, Y = labelled(NUM_BATCHES * BATCH_SIZE, seed=1).tensors
SOME = Y.where(torch.arange(len(Y)) % 97 == 5, -100)  # 21 of them, most in batches that are not chosen
LABELS = {"few": SOME, "all": Y, "one": Y.where(torch.arange(len(Y)) == 1999, -100), "8 bits": Y.to(torch.int16)}


@pytest.mark.parametrize("name", LABELS)
def test_their_score_and_the_estimate_are_combined(name: str) -> None:
    labels = LABELS[name]
    without, _ = values(validation(labels))
    combined, model = values(validation(labels), validation_labels=True)
    counts = labels.long() != -100
    with torch.no_grad():
        p = model(X[counts]).double().softmax(1)
    scores = (p - nn.functional.one_hot(labels[counts].long(), 4)).square().sum(1)
    m = int(counts.sum())
    expected = (scores.sum() + LABEL_WEIGHT * without["val_risk_estimate"]) / (m + LABEL_WEIGHT)
    assert combined["val_risk_num_labels"] == m
    assert combined["val_risk_label_score"] == pytest.approx(float(scores.mean()), rel=1e-5)
    assert combined["val_risk_estimate"] == pytest.approx(float(expected), rel=1e-5)
    terms = ("claim", "overconfidence", "memorization", "variance")
    assert all(combined[f"val_risk_{term}"] == pytest.approx(without[f"val_risk_{term}"]) for term in terms)


def test_they_are_found_by_targets_and_in_some_batches_only() -> None:
    x = inputs(120, seed=1).split(40)
    batches = [(x[0],), (x[1], Y[40:80]), (x[2],)]
    found, _ = values(DataLoader(batches, None), validation_labels=True)
    assert found["val_risk_num_labels"] == 40
    by_key = DataLoader([{"x": part, "what": Y[:40]} for part in x], None)

    def targets(batch: Any) -> Tensor:
        return batch["what"] if isinstance(batch, dict) else batch[1]

    assert values(by_key, validation_labels=True, targets=targets)[0]["val_risk_num_labels"] == 120


@pytest.mark.parametrize(("val", "match"), [
    (DataLoader(inputs(40), 8), "No validation batch has labels"),
    (validation(Y + 7), "could not (measure|score).*Expected labels from 0 to 3"),
])  # fmt: skip
def test_labels_that_are_missing_or_of_other_classes_are_said(val: Any, match: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values(val, validation_labels=True)
    assert any(re.search(match, str(each.message)) for each in caught)


def test_each_of_several_loaders_has_its_own() -> None:
    found, _ = values([validation(SOME), validation(Y[:100])], validation_labels=True)
    counts = [found[f"val_risk_num_labels/dataloader_idx_{index}"] for index in (0, 1)]
    assert counts == [int((SOME != -100).sum()), 100]


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_binary_labels_of_minus_100_are_none(dtype: torch.dtype) -> None:
    def labels(num_samples: int) -> Tensor:
        y = (inputs(num_samples)[:, 0] > 0.5).to(dtype)
        return y.where(torch.arange(num_samples) % 5 == 0, -100)

    model = Classifier()
    model.net[4] = nn.Linear(16, 1)
    model.training_step = lambda batch, batch_idx: model(batch[0]).square().mean()
    model.validation_step = lambda batch, batch_idx: None
    train, val = (DataLoader(TensorDataset(inputs(100), labels(100)), 20) for _ in range(2))
    monitor = RiskMonitor("binary", validation_labels=True)
    run = fitted([monitor], model, train, val, max_epochs=1)
    assert run.callback_metrics["val_risk_num_labels"] == 20 and monitor.num_training == 20
    assert 0 < run.callback_metrics["val_risk_label_score"] < 1


def test_a_targets_function_may_fail_on_batches_without_labels() -> None:
    batches = DataLoader([(X[:40],), (X[40:80], Y[40:80])], None)
    with pytest.warns(UserWarning, match="takes some validation batches as unlabelled: .*IndexError"):
        found, _ = values(batches, validation_labels=True, targets=lambda batch: batch[1])
    assert found["val_risk_num_labels"] == 40 and found["val_risk_estimate"] > 0
