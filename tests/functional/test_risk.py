from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.functional import risk_estimate
from lightning_sensitivity.functional.risk import (
    NUM_HOLDOUT_SUMS,
    NUM_TRAINING_SUMS,
    holdout_sums,
    risk_terms,
    training_sums,
)
from lightning_sensitivity.functional.tasks import predictions

NUM_OUTPUTS = {"multiclass": 4, "multilabel": 3, "binary": 1, "regression": 2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(task: str, num_samples: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the network and of a twin for unseen samples; outputs and labels of training samples."""
    g, k = generator(seed), NUM_OUTPUTS[task]
    unseen, twin, train = (3 * torch.randn(num_samples, k, generator=g, dtype=torch.float64) for _ in range(3))
    targets = {
        "multiclass": torch.randint(0, k, (num_samples,), generator=g),
        "regression": 5 + torch.randn(num_samples, k, generator=g),
    }.get(task, torch.randint(0, 2, (num_samples, k), generator=g))
    return unseen, twin, train, targets


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary"])
def test_with_a_real_twin_it_is_the_score_where_unseen_labels_agree_as_the_identity_says(task: str) -> None:
    one, other, train, targets = example(task)
    unseen, twin = torch.cat([one, other]), torch.cat([other, one])  # each is the other's twin
    p, q, t = (predictions(outputs, task) for outputs in (unseen, twin, train))
    y = torch.eye(4, dtype=torch.float64)[targets] if task == "multiclass" else targets.double()
    agreement = (p * q).mean(0) + (t * (y - t)).mean(0)  # E p·y on unseen samples, class by class
    squares = 1 / y.shape[1] if task == "multiclass" else p.mean(0) + (y - t).mean(0)  # E y²
    score = p.square().mean(0) - 2 * agreement + squares
    expected = score.sum() if task == "multiclass" else score.mean()
    estimate = risk_estimate(unseen, twin, train, targets, task)
    torch.testing.assert_close(estimate.risk, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(sum(estimate[1:]), estimate.risk)


def test_the_estimate_of_a_linear_regression_is_mallows() -> None:
    """Training error plus twice the variance, over many training sets: the risk of ordinary least squares."""
    rng = np.random.default_rng(0)
    n, p = 40, 10
    x, weights = rng.normal(size=(n, p)), rng.normal(size=p)
    hat = x @ np.linalg.pinv(x)
    estimates = []
    for _ in range(1500):
        y, y_twin = (x @ weights + rng.normal(size=n) for _ in range(2))
        fitted, twin, targets = (torch.tensor(values) for values in (hat @ y, hat @ y_twin, y))
        estimates.append(float(risk_estimate(fitted, twin, fitted, targets, task="regression").risk))
    assert np.mean(estimates) == pytest.approx(1 + p / n, rel=0.02)  # noise, and its share in each weight


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 30), max_size=3), task=st.sampled_from([*NUM_OUTPUTS]))
@settings(max_examples=30, deadline=None)
def test_it_does_not_matter_how_samples_are_split(seed: int, cuts: list[int], task: str) -> None:
    unseen, twin, train, targets = example(task, seed=seed)
    whole = risk_estimate(unseen, twin, train, targets, task)
    holdout, training = (torch.zeros(size, dtype=torch.float64) for size in (NUM_HOLDOUT_SUMS, NUM_TRAINING_SUMS))
    chunks = (tensor.tensor_split(torch.tensor(sorted(cuts), dtype=torch.long)) for tensor in (unseen, twin, train))
    for one, other, t, y in zip(*chunks, targets.tensor_split(sorted(cuts)), strict=True):
        holdout = holdout + holdout_sums(one, other, task=task)
        training = training + training_sums(t, y, task)
    torch.testing.assert_close(risk_terms(holdout, training), whole)


def test_positions_are_samples_and_ignored_labels_are_none() -> None:
    g = generator()
    outputs, targets = torch.randn(3, 4, 5, generator=g), torch.randint(0, 4, (3, 5), generator=g)
    flat = outputs.movedim(1, -1).reshape(15, 4)
    everything = training_sums(flat, targets.flatten(), "multiclass")
    torch.testing.assert_close(training_sums(outputs, targets, "multiclass"), everything)
    ignored = targets.where(torch.rand(3, 5, generator=g) < 0.5, -100)
    kept = ignored.flatten() != -100
    alone = training_sums(flat[kept], targets.flatten()[kept], "multiclass")
    assert alone[0] == kept.sum() < 15
    torch.testing.assert_close(training_sums(outputs, ignored, "multiclass"), alone)


def test_samples_that_are_not_finite_are_left_out_and_counted() -> None:
    unseen, twin, train, targets = example("multiclass")
    broken, broken_train = twin.clone(), train.clone()
    broken[:2, 1], broken_train[:3, 0] = torch.nan, torch.inf
    found = holdout_sums(unseen, broken, task="multiclass")
    torch.testing.assert_close(found[:-1], holdout_sums(unseen[2:], twin[2:], task="multiclass")[:-1])
    assert found[-1] == 2
    found = training_sums(broken_train, targets, "multiclass")
    torch.testing.assert_close(found[:-1], training_sums(train[3:], targets[3:], "multiclass")[:-1])
    assert found[-1] == 3


def test_without_training_or_unseen_samples_there_is_no_estimate() -> None:
    holdout, training = torch.ones(NUM_HOLDOUT_SUMS), torch.ones(NUM_TRAINING_SUMS)
    assert risk_terms(holdout, training).risk.isfinite()
    assert risk_terms(0 * holdout, training).risk.isnan() and risk_terms(holdout, 0 * training).risk.isnan()


X, LABELS = torch.zeros(2, 3), torch.zeros(2).long()


@pytest.mark.parametrize(("arguments", "message"), [
    ((X, X.new_zeros(3, 3), X, LABELS), "the shape of `outputs`"),
    ((X, X, X.new_zeros(2, 4), LABELS), "as many outputs"),
    ((X[:0], X[:0], X, LABELS), "`outputs` to be a floating tensor of one sample or more"),
    ((X, X, X, LABELS, "ranking"), "`task` to be one"),
    ((X[:, :2], X[:, :2], torch.eye(2), torch.arange(2)), "got probabilities"),
])  # fmt: skip
def test_bad_input(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        risk_estimate(*arguments)
