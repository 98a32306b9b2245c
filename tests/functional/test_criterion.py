"""The criterion: the distance from the reference, calibrated, beside labels, and by the order of samples alone."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor

from lightning_sensitivity.functional import refined_score
from lightning_sensitivity.functional.criterion import (
    Calibration,
    combine_with_labels,
    distance_from_reference,
    rank_disagreement,
)
from lightning_sensitivity.functional.refined_score import TEMPERATURES, Refined, ScoreSums, score_sums
from lightning_sensitivity.functional.tasks import TASKS

NUM = len(TEMPERATURES)
KNOWN = {"multiclass": 4, "binary": 1, "regression": 2}


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of_agreement(*agreements: float, num_samples: int = 20) -> ScoreSums:
    """Sums with these mean agreements, one for each temperature or one for all."""
    values = torch.tensor([*agreements]).double().expand(NUM)
    zeros = torch.zeros(NUM, dtype=torch.float64)
    return ScoreSums(zeros + num_samples, zeros, values * num_samples, zeros, zeros, zeros)


def updated(*epochs: tuple[float, float]) -> list[float]:
    """The factors after epochs of agreements: on unseen samples with the reference, of training labels."""
    calibration = Calibration()
    for unseen, training in epochs:
        calibration = calibration.updated(of_agreement(unseen), of_agreement(training, num_samples=7))
    return calibration.factors


# The factor of the agreement


@pytest.mark.parametrize(("epochs", "factor"), [
    pytest.param([(0.2, 0.28)], 1.4, id="is the ratio"),
    pytest.param([(0.2, 0.28), (0.4, 0.5), (0.5, 0.9)], 1.25, id="is the smallest so far"),
    pytest.param([(0.2, 0.1)], 1.0, id="is 1 at least"),
    pytest.param([(0.2, 0.9)], 1.5, id="is 1.5 at most"),
    pytest.param([(0.4, 0.56), (0.05, 0.05)], 1.4, id="does not count agreement below 15 % of the largest"),
    pytest.param([(0.4, 0.56), (0.07, 0.07)], 1.0, id="counts agreement above 15 % of the largest"),
    pytest.param([(1e-5, 1e-5), (0.2, 0.28)], 1.4, id="does not count a network that has not moved"),
    pytest.param([(-0.2, 0.4), (0.2, 0.28)], 1.4, id="does not count one that disagrees"),
    pytest.param([(0.2, 0.28), (math.nan, 0.1), (0.2, math.nan)], 1.4, id="is not changed by nan"),
])  # fmt: skip
def test_the_factor(epochs: Any, factor: float) -> None:
    assert updated(*epochs) == pytest.approx([factor] * NUM)


def test_the_factor_has_a_value_at_each_temperature_and_an_epoch_without_samples_changes_nothing() -> None:
    ratios = torch.linspace(0.5, 4.0, NUM)
    calibration = Calibration().updated(of_agreement(0.2), of_agreement(*(0.2 * ratios).tolist()))
    assert calibration.factors == pytest.approx(ratios.clamp(1, 1.5).tolist())
    assert calibration.updated(of_agreement(0.2, num_samples=0), of_agreement(0.1)) is calibration


# The distance


def unseen_sums(task: str, seed: int = 0, num_samples: int = 30) -> tuple[Tensor, Tensor, Tensor, ScoreSums]:
    """Outputs of a network, predictions of a reference, the shares of the classes, and the sums."""
    outputs, others = (2 * randn(num_samples, KNOWN[task], seed=each) for each in (seed, seed + 100))
    q, shares = TASKS[task].predictions(others), TASKS[task].clip(randn(1, KNOWN[task], seed=1).sigmoid())[0]
    return outputs, q, shares, ScoreSums(*score_sums(outputs, q, TASKS[task], shares).T)


@pytest.mark.parametrize("task", KNOWN)
def test_without_a_factor_the_distance_is_the_refined_score_against_the_predictions_of_the_reference(task: str) -> None:
    outputs, q, _, sums = unseen_sums(task)
    calibration = Calibration(smallest_ratios=(0.9,) * NUM)
    assert distance_from_reference(sums, calibration) == pytest.approx(refined_score(outputs, q, task))


@given(seed=st.integers(0, 99), factor=st.floats(1, 1.5))
@settings(max_examples=10, deadline=None)
def test_the_distance_counts_agreement_beyond_the_shares_by_the_factor(seed: int, factor: float) -> None:
    outputs, q, shares, sums = unseen_sums("multiclass", seed)
    distances = []
    for temperature in TEMPERATURES:
        p = (outputs / temperature).softmax(1)
        agreed = (p * shares).sum(1) + factor * (p * (q - shares)).sum(1)
        distances.append(float((p.square().sum(1) - 2 * agreed + q.square().sum(1)).mean()))
    lowest = min(distances)
    found = distance_from_reference(sums, Calibration(smallest_ratios=(factor,) * NUM))
    assert found.score == pytest.approx(lowest, abs=1e-6)
    assert distances[TEMPERATURES.index(found.temperature)] == pytest.approx(lowest, abs=1e-9)


def test_labels_count_as_many_as_they_are_and_the_reference_as_200() -> None:
    outputs, targets = 2 * randn(50, 4), torch.arange(50) % 4
    labels = ScoreSums(*score_sums(outputs, targets, TASKS["multiclass"]).T)
    alone = refined_score(outputs, targets)
    assert combine_with_labels(None, labels) == pytest.approx(alone)
    both = combine_with_labels(Refined(-0.2, 0.5), labels)
    assert both == pytest.approx(((50 * alone.score - 200 * 0.2) / 250, alone.temperature))


# The order of the samples


def correlation(a: Any, b: Any) -> float:
    """Spearman's, of SciPy, which does not warn of a constant as the first."""
    return 0.0 if (a == a[0]).all() else float(spearmanr(a, b).statistic)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), num_samples=st.integers(2, 30), num_values=st.integers(2, 20))
def test_the_disagreement_is_that_of_scipy_also_with_ties(seed: int, num_samples: int, num_values: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = torch.randint(num_values, (2, num_samples, 3), generator=generator).double() / num_values
    columns = [(a, b) for a, b in zip(p.T.numpy(), q.T.numpy(), strict=True) if (b != b[0]).any()]
    wanted = [1 - correlation(a, b) for a, b in columns]
    expected = sum(wanted) / len(wanted) if wanted else math.nan
    assert rank_disagreement(p, q) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_only_the_order_within_a_class_counts() -> None:
    p, q = randn(40, 3).softmax(1), randn(40, 3, seed=1).softmax(1)
    assert rank_disagreement(p**3 / 2, q) == pytest.approx(rank_disagreement(p, q))
    assert rank_disagreement(q, q) == pytest.approx(0) and rank_disagreement(-q, q) == pytest.approx(2)


@pytest.mark.parametrize(("p", "q", "expected"), [
    pytest.param([[0.1, 0.2], [0.1, 0.9]], [[0.3, 0.1], [0.4, 0.2]], 0.5, id="a constant network"),
    pytest.param([[0.2, 0.3], [0.1, 0.9]], [[0.5, 0.1], [0.5, 0.2]], 0.0, id="a constant of the reference is left out"),
    pytest.param([[0.1], [0.2]], [[1.0], [1.0]], math.nan, id="all are constant"),
    pytest.param([[0.1]], [[0.2]], math.nan, id="a single sample"),
    pytest.param([[]], [[]], math.nan, id="no sample"),
])  # fmt: skip
def test_constants(p: Any, q: Any, expected: float) -> None:
    assert rank_disagreement(torch.tensor(p), torch.tensor(q)) == pytest.approx(expected, nan_ok=True)
