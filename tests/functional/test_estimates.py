"""How sure a value is, and what a reference and labels say together."""

import math

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_sensitivity.functional import draw_labels
from lightning_sensitivity.functional.expected import Estimate, combine, jackknife, one_draw, worth_beside


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# The jackknife


@pytest.mark.parametrize("size", [1, 20])
def test_the_variance_of_a_mean_is_that_of_its_independent_samples(size: int) -> None:
    values = torch.randn(500, generator=generator()).repeat_interleave(size)
    groups = None if size == 1 else torch.arange(500).repeat_interleave(size)
    order = torch.randperm(len(values), generator=generator(1))
    found = [
        jackknife(lambda rows, each=each: {"mean": float(each[rows].mean())}, len(each), own)["mean"]
        for each, own in ((values, groups), (values[order], None if groups is None else groups[order]))
    ]
    assert found[0] == pytest.approx(1 / 500, rel=0.5) and (size == 1 or found[1] == pytest.approx(found[0]))


def test_that_of_any_metric_is_what_many_samples_show() -> None:
    def area(y: Tensor, rows: Tensor) -> float:
        return float(roc_auc_score(y[rows] > 0, (y + 2 * noise)[rows]))

    areas, variances = [], []
    for seed in range(60):
        y, noise = torch.randn(2, 200, generator=generator(seed))
        areas.append(area(y, torch.arange(200)))
        variances.append(jackknife(lambda rows, y=y: {"area": area(y, rows)}, 200, None)["area"])
    assert sum(variances) / 60 == pytest.approx(float(torch.tensor(areas).var()), rel=0.35)


def test_it_leaves_out_what_can_not_always_be_measured() -> None:
    assert jackknife(lambda rows: {"all": 1.0} | ({"some": 1.0} if rows[0] else {}), 40, None) == {"all": 0.0}
    assert jackknife(lambda rows: {"all": 1.0}, 40, torch.zeros(40)) == {}


@pytest.mark.parametrize("period", [2, 5, 10])
def test_it_does_not_mind_the_period_of_a_loader(period: int) -> None:
    values = (torch.arange(600) % period == 0).double()
    found = jackknife(lambda rows: {"mean": float(values[rows].mean())}, 600, None)["mean"]
    assert found == pytest.approx(float(values.var()) / 600, rel=0.7)


@pytest.mark.parametrize(("size", "groups"), [(1, None), (30, torch.zeros(30))])
def test_of_a_single_sample_or_group_nothing_is_measured_without_it(size: int, groups: Tensor | None) -> None:
    assert jackknife(lambda rows: {"first": float(rows[0])}, size, groups) == {}


def test_one_draw_is_a_label_of_each_sample_by_its_probabilities() -> None:
    q = torch.rand(2000, 1, generator=generator())
    one = one_draw(draw_labels(torch.cat([1 - q, q], 1)))
    assert one.shape == (1, 2000) and torch.equal(one, one_draw(draw_labels(torch.cat([1 - q, q], 1))))
    assert float(one.double().mean()) == pytest.approx(float(q.mean()), abs=0.03)
    assert float((one[0] - q[:, 0]).square().mean()) == pytest.approx(float((q * (1 - q)).mean()), abs=0.01)


# Both together


def estimate(value: float, size: int, p: float = 0.7) -> Estimate:
    return Estimate(value, p * (1 - p) / size, size)


def test_the_error_of_an_expected_value_is_that_of_unseen_samples_of_left_out_labels_and_of_a_thousand() -> None:
    found = combine(estimate(0.7, 600), None, num_training=300)
    assert found == (0.7, pytest.approx(math.sqrt(0.21 * (1 / 600 + 1 / 300 + 1 / 1000))), 1000, False)
    assert combine(None, estimate(0.7, 50)) == (0.7, pytest.approx(math.sqrt(0.21 / 50)), 1000, False)


def test_labels_that_agree_count_as_many_as_they_are() -> None:
    found = combine(estimate(0.72, 600), estimate(0.7, 200), num_training=300)
    own, reference = 0.21 / 200, 0.21 * (1 / 600 + 1 / 300 + 1 / 1000)
    stderr = math.sqrt(200**2 * own + 1000**2 * reference) / 1200
    assert found == (pytest.approx((200 * 0.7 + 1000 * 0.72) / 1200), pytest.approx(stderr), 1000, False)


@pytest.mark.parametrize("sign", [1, -1])
def test_labels_that_contradict_leave_the_reference_what_their_difference_allows(sign: int) -> None:
    known, far = estimate(0.7, 100), math.sqrt(0.21 / 100)
    assert worth_beside(estimate(0.7 + sign * 1.99 * far, 600), known) == 1000
    assert worth_beside(estimate(0.7 + sign * 2.01 * far, 600), known) == pytest.approx(100 / (2.01**2 - 1))
    found = combine(estimate(0.7 + sign * 5 * far, 600), known, num_training=300)
    assert found.is_contradicted and abs(found.value - 0.7) < 0.25 * far


@pytest.mark.parametrize("variance", [0.0, math.nan])
def test_a_few_labels_that_are_all_right_contradict_no_more_than_others(variance: float) -> None:
    few = Estimate(1.0, variance, 5)
    assert worth_beside(estimate(0.7, 600), few) == 1000


def test_the_reference_counts_as_the_median_of_three_validations_says() -> None:
    near, far, known = estimate(0.7, 600), estimate(0.99, 600), estimate(0.7, 100)
    first = combine(far, known, 300)
    assert first.is_contradicted and first.worth < 20
    assert not combine(far, known, 300, earlier=[1000.0]).is_contradicted
    found = combine(near, known, 300, earlier=[1000.0, first.worth, first.worth])
    assert found.is_contradicted and found.worth == 1000
    assert not combine(near, known, 300, earlier=[first.worth, first.worth, 1000.0]).is_contradicted


@pytest.mark.parametrize("variance", [0.0, math.nan])
def test_of_few_labels_the_variance_is_that_of_the_reference(variance: float) -> None:
    expected = Estimate(0.9, 0.09 / 600, 600)
    both = combine(expected, Estimate(0.9, variance, 2), 500)
    alone = combine(expected, None, 500)
    assert both.value == pytest.approx(0.9) and both.stderr == pytest.approx(alone.stderr, rel=0.1)


@pytest.mark.parametrize("size", [2, 20, 300])
def test_labels_that_are_all_wrong_where_all_should_be_right_contradict(size: int) -> None:
    both = combine(Estimate(1.0, 0.0, 600), Estimate(0.0, 0.0, size), 500)
    assert both.is_contradicted and both.worth == 1 and both.value == pytest.approx(1 / (size + 1))
    assert math.isnan(both.stderr)  # samples that are all alike say nothing of it
