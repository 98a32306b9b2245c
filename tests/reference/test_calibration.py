"""What left-out predictions need to be probabilities; what they say of labels, of class shares, and of themselves."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.dummy import DummyClassifier
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity import Reference, label_noise
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.reference import reference
from lightning_sensitivity.reference.calibration import (
    _FEWEST,
    Calibration,
    Sharpening,
    _unexplained,
    calibrate,
    judge,
    reweigh,
)
from lightning_sensitivity.reference.observations import largest_difference
from tests.reference.conftest import generator

SEEDS = st.integers(0, 99)


def relabelled(labels: Tensor, share: float, num_classes: int, seed: int = 0) -> Tensor:
    """A share of the labels is turned into others; what a smaller share turns, a larger one does, too."""
    g = torch.Generator().manual_seed(seed)
    is_wrong = torch.randperm(len(labels), generator=g) < share * len(labels)
    others = (labels + torch.randint(1, num_classes, labels.shape, generator=g)) % num_classes
    return others.where(is_wrong, labels)


def sample(num_classes: int, seed: int, num_samples: int = 400) -> tuple[Tensor, Tensor]:
    """Labels, and predictions of them that are more or less certain."""
    g = torch.Generator().manual_seed(seed)
    labels, certainty = torch.randint(num_classes, (num_samples,), generator=g), torch.rand(num_samples, 1, generator=g)
    return certainty * one_hot(labels, num_classes) + (1 - certainty) / num_classes, labels


@given(seed=SEEDS, num_classes=st.sampled_from([2, 3, 10]))
@settings(max_examples=15, deadline=None)
def test_the_order_of_samples_and_classes_does_not_matter(seed: int, num_classes: int) -> None:
    predictions, labels = sample(num_classes, seed)
    labels = one_hot(relabelled(labels, 0.3, num_classes, seed), num_classes).double()
    rows, columns = (torch.randperm(size, generator=torch.Generator().manual_seed(seed)) for size in labels.shape)
    moved = [each[rows][:, columns] for each in (predictions, labels)]
    assert _unexplained(*moved) == pytest.approx(_unexplained(predictions, labels))


@given(seed=SEEDS, num_classes=st.sampled_from([2, 3, 10]))
@settings(max_examples=15, deadline=None)
def test_it_grows_as_more_are_relabelled(seed: int, num_classes: int) -> None:
    predictions, labels = sample(num_classes, seed, num_samples=600)  # of 400, one in 300 draws hides its noise
    shares = [0.0, 0.05, 0.1, 0.15, 0.2]
    of_shares = [one_hot(relabelled(labels, share, num_classes, seed), num_classes).double() for share in shares]
    found = [_unexplained(predictions, each) for each in of_shares]
    assert found == sorted(found) and found[-1] == pytest.approx(0.2, abs=0.05)


# Calibration


@pytest.mark.parametrize("power", [0.6, 1.0, 2.0, 8.0])
def test_the_temperature_is_that_of_predictions_that_are_too_unsure_or_too_sure(power: float) -> None:
    """Labels that are as certain as true probabilities say, of which another power is predicted."""
    g = torch.Generator().manual_seed(0)
    p = (2 * torch.randn(20_000, 4, generator=g, dtype=torch.float64)).softmax(1)
    y = one_hot(torch.multinomial(p, 1, generator=g)[:, 0], 4).double()
    predicted = (p.log() / power).softmax(1)
    found = calibrate(predicted, y, TASKS["multiclass"])
    assert math.log2(found.power / power) == pytest.approx(0, abs=0.251) and found.smoothing == 0  # a step of the grid
    torch.testing.assert_close(found(predicted), p, atol=0.1, rtol=0)


@pytest.mark.parametrize(("redrawn", "num_samples", "is_smoothed"), [
    (0.3, 4000, True), (0.3, 30, False), (0.0, 4000, False)
])  # fmt: skip
def test_what_a_temperature_leaves_too_sure_is_smoothed(redrawn: float, num_samples: int, is_smoothed: bool) -> None:
    """Predictions of labels, a share of which is then redrawn, are right less often than a power of them can say."""
    g = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (num_samples,), generator=g)
    is_easy = torch.rand(num_samples, generator=g)[:, None] < 0.5
    p = torch.where(is_easy, 0.97 * one_hot(labels, 4) + 0.0075, 0.1 * one_hot(labels, 4) + 0.225).double()
    drawn = torch.randint(4, (num_samples,), generator=g)
    y = one_hot(labels.where(torch.rand(num_samples, generator=g) >= redrawn, drawn), 4).double()
    found = calibrate(p, y, TASKS["multiclass"])
    assert (found.smoothing > 0.02) == is_smoothed
    if is_smoothed:
        q = found(p)
        assert found.smoothing == pytest.approx(redrawn, abs=0.05)
        assert float(q.amax(1).mean()) == pytest.approx(float(y.gather(1, p.argmax(1, keepdim=True)).mean()), abs=5e-3)
        assert float(-(q * q.log()).sum(1).mean()) == pytest.approx(float(-(y * q.log()).sum(1).mean()), rel=0.01)


@pytest.mark.parametrize(("sure", "hits"), [(0.95, 2), (0.8, 2), (0.97, 3)])
def test_smoothing_makes_no_positives_of_samples_that_have_none(sure: float, hits: int) -> None:
    """One in 50 samples looks positive, and one of two or three of these is; nearly none of the others is."""
    place = torch.arange(10_000)
    looks_positive = place % 50 == 0
    is_positive = torch.where(looks_positive, place // 50 % hits > 0, place % 1000 == 1).double()
    p = torch.where(looks_positive, sure, 0.0).double()
    found = calibrate(torch.stack([1 - p, p], 1), torch.stack([1 - is_positive, is_positive], 1), TASKS["binary"])
    q = found(torch.stack([1 - p, p], 1))[:, 1]
    assert found.smoothing > 0 and q[~looks_positive].sum() / q.sum() < 0.1


def test_what_is_too_sure_of_a_rare_class_is_spread_though_the_frequent_one_hides_it() -> None:
    """One in ten is positive: a half of what looks so by 0.4, and else one in fifteen, as others say."""
    place = torch.arange(3000)
    looks_positive = place % 10 == 0
    is_positive = torch.where(looks_positive, place % 50 == 0, place % 11 == 1).double()
    p = torch.where(looks_positive, 0.45, 0.06).double()
    found = calibrate(torch.stack([1 - p, p], 1), torch.stack([1 - is_positive, is_positive], 1), TASKS["binary"])
    q = found(torch.stack([1 - p, p], 1))[:, 1]
    assert found.smoothing > 0 and float(q[looks_positive].mean()) == pytest.approx(0.2, abs=0.05)


def test_numbers_near_probabilities_become_probabilities_whose_logarithms_a_temperature_divides() -> None:
    near = torch.tensor([[-1.0, 0.5, 2.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(Calibration(TASKS["multiclass"])(near), torch.tensor([[0, 1, 2], [1, 1, 1]]) / 3.0)
    p = torch.tensor([[0.2, 0.8]])
    torch.testing.assert_close(Calibration(TASKS["binary"], [Sharpening(2.0)])(p), torch.tensor([[0.04, 0.64]]) / 0.68)


def test_a_regression_stays_as_it_is_and_so_does_one_class() -> None:
    x = torch.randn(9, 2).double()
    assert torch.equal(calibrate(x, x + 1, TASKS["regression"])(x), x)
    one = torch.ones(9, 1).double()
    assert torch.equal(calibrate(one, one, TASKS["multiclass"])(one), one)


# Class shares


def shifted(shares: list[float], seed: int = 0, num_samples: int = 600) -> tuple[Tensor, Tensor, Tensor]:
    """What is predicted of unseen digits, and of training ones, which come with other shares of two classes."""
    few = torch.tensor([3, 8])
    x, y = X[torch.isin(Y, few)].double(), (Y[torch.isin(Y, few)] == 8).long()
    found = Reference().fit(x[:150] + 8 * torch.randn(150, 64, generator=torch.Generator().manual_seed(seed)), y[:150])
    new = torch.multinomial(torch.tensor(shares)[y[150:]], num_samples, replacement=True)
    p = found.predict_proba(x[150:][new] + 8 * torch.randn(num_samples, 64))
    return torch.tensor(found.left_out_), torch.tensor(p), one_hot(y[150:][new], 2).double().mean(0)


def test_other_shares_of_unseen_classes_are_told() -> None:
    torch.manual_seed(0)
    left_out, q, truth = shifted([1.0, 9.0])
    training = left_out.mean(0)
    assert largest_difference(left_out, q)[1] > 4
    weighed = reweigh(q, training, truth)
    torch.testing.assert_close(weighed.sum(1), torch.ones(600).double())
    assert (weighed.mean(0) - truth).abs().max() < 0.08 < (q.mean(0) - truth).abs().max()
    left_out, q, _ = shifted([1.0, 1.0])
    assert largest_difference(left_out, q)[1] < 4 and largest_difference(left_out, q[:1])[1] < 4


def test_known_shares_weigh_probabilities_as_bayes_says() -> None:
    q = torch.tensor([[0.8, 0.2], [0.5, 0.5]])
    found = reweigh(q, torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1]))
    torch.testing.assert_close(found, torch.tensor([[0.72 / 0.74, 0.02 / 0.74], [0.9, 0.1]]).double())
    torch.testing.assert_close(reweigh(q, torch.tensor([0.3, 0.7]), torch.tensor([0.3, 0.7])), q.double())


# Of a data set

X, Y = (torch.tensor(each) for each in load_digits(return_X_y=True))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_of_digits_it_is_about_the_share_that_was_relabelled(share: float) -> None:
    assert label_noise(X.reshape(-1, 1, 8, 8)[:400], relabelled(Y, share, 10)[:400]) == pytest.approx(share, abs=0.06)
    table = torch.cat([X, 1e5 * torch.rand(len(X), 1, generator=torch.Generator().manual_seed(0))], 1)[:600]
    assert label_noise(table, relabelled(Y, share, 10)[:600]) == pytest.approx(share, abs=0.06)  # one more unit


def test_nobody_knows_where_nothing_can_be_learned() -> None:
    assert math.isnan(label_noise(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)), Y[:200]))


def test_correct_labels_that_inputs_do_not_determine_can_not_be_explained() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=g)
    labels = (torch.rand(600, generator=g) < (0.7 * x[:, 0]).sigmoid()).long()
    assert 0.05 < label_noise(x, labels) < 0.35


def test_a_regression_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="Expected a `task` of classes, but got 'regression'"):
        label_noise(X, Y, "regression")


# Where the inputs of a table tell nothing of the labels, the mean label is predicted, and trusted

SIZE = 2 * _FEWEST
CONSTANT, RANDOM = torch.ones(SIZE, 3), torch.randn(SIZE, 3, generator=generator())
CLASSES = torch.arange(SIZE) % 5 // 2
YES = (CLASSES == 2).double()
UNKNOWN = YES.where(torch.arange(SIZE) < _FEWEST - 1, math.nan)  # too few
NOTHING: dict[str, tuple[str, Tensor, Tensor, list[float]]] = {
    "classes": ("multiclass", CONSTANT, CLASSES, [0.4, 0.4, 0.2]),
    "random columns": ("multiclass", RANDOM, CLASSES, [0.4, 0.4, 0.2]),
    "one output": ("binary", CONSTANT, YES, [0.8, 0.2]),
    "targets": ("regression", CONSTANT, torch.stack([YES, 3 * YES], 1), [0.2, 0.6]),
    "labels": ("multilabel", CONSTANT, torch.stack([YES, 1 - YES], 1), [0.2, 0.8]),
}
NEW = torch.randn(4, 3, generator=generator(1))


@pytest.mark.parametrize("what", NOTHING)
def test_where_a_table_tells_nothing_the_mean_label_is_what_to_expect(what: str) -> None:
    task, x, y, shares = NOTHING[what]
    found = Reference(task).fit(x, y)
    assert found.inputs_tell_nothing_ and found.skill_ == 0 and found.blind_labels_.tolist() == []
    assert found.is_trusted_ and not found.may_choose(sees_all=False) and math.isnan(found.unexplained_)
    np.testing.assert_allclose(found.predict_matrix(NEW), np.tile(shares, (4, 1)))
    np.testing.assert_array_equal(found.left_out_, np.tile(found.shares_, (SIZE, 1)))


def ranked(share: float, num_samples: int = 600) -> tuple[Tensor, Tensor]:
    """Left-out predictions that are too sure for any skill, and rank a share of a few positives first."""
    place = torch.arange(num_samples)
    y = one_hot((place % 15 == 0).long(), 2).double()
    p = torch.where(place % 15 == 0, place % 100 < 100 * share, place % 5 == 1).double()
    return torch.stack([1 - p, p], 1), y


def sure_of_few() -> tuple[Tensor, Tensor]:
    """Left-out predictions that are right of a tenth, and rank all others the wrong way round."""
    place = torch.arange(600)
    y = one_hot(place % 2, 2).double()
    return torch.where(place[:, None] % 10 < 2, 0.1 + 0.8 * y, 0.501 - 0.002 * y), y


REPEATED = (RANDOM[:, :2] * torch.tensor([1.0, 0.1]))[: SIZE // 10].repeat_interleave(10, 0)
JUDGED: dict[str, tuple[tuple[Tensor, Tensor], Tensor | None, bool]] = {
    "an order without a skill": (ranked(0.5), None, True),
    "an order by chance": (ranked(0.2), None, False),
    "an order of many samples": ((REPEATED[:, 1:], REPEATED.sum(1, keepdim=True)), None, True),
    "an order of their few groups": ((REPEATED[:, 1:], REPEATED.sum(1, keepdim=True)), torch.arange(SIZE) // 10, False),
    "a score without an order": (sure_of_few(), None, True),
    "a correlation of targets": ((RANDOM[:, :1] + RANDOM[:, 1:2], RANDOM[:, :1]), None, True),
    "targets of another column": ((RANDOM[:, 1:2], RANDOM[:, :1]), None, False),
}


@pytest.mark.parametrize("what", JUDGED)
def test_predictions_tell_something_by_their_score_or_their_order(what: str) -> None:
    (p, y), groups, expected = JUDGED[what]
    (found,) = judge(p.double(), y.double(), groups, TASKS["regression" if y.shape[1] == 1 else "multiclass"])
    assert found.is_nothing != expected and found.is_clear == (groups is None or len(groups.unique()) >= _FEWEST)


def test_of_several_labels_those_that_are_too_few_or_all_alike_stay_blind() -> None:
    found = Reference("multilabel").fit(CONSTANT, torch.stack([YES, 0 * YES, UNKNOWN], 1))
    assert found.is_trusted_ and found.blind_labels_.tolist() == [1, 2] and found.accuracy_ == pytest.approx(0.8)
    found = Reference("multilabel").fit(CONSTANT, torch.stack([0 * YES, UNKNOWN], 1))
    assert not found.is_trusted_ and found.blind_labels_.tolist() == [0, 1]
    told = torch.stack([(RANDOM[:, 0] > 0).double(), YES], 1)
    assert Reference("multilabel").fit(RANDOM, told).blind_labels_.tolist() == [1]  # since another one can be told


FEW = slice(_FEWEST - 1)
BLIND: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "too few labels": ({}, (CONSTANT[FEW], CLASSES[FEW])),
    "too few groups": ({}, (CONSTANT, CLASSES, torch.arange(SIZE) % (_FEWEST - 1))),
    "one class": ({}, (CONSTANT, 0 * CLASSES)),
    "an estimator of the user": ({"estimator": DummyClassifier()}, (CONSTANT, CLASSES)),
    "images": ({}, (CONSTANT[:, :, None, None] + torch.arange(SIZE)[:, None, None, None], CLASSES)),
}


@pytest.mark.parametrize("what", BLIND)
def test_it_stays_blind_where_nothing_can_be_said_of_the_inputs(what: str) -> None:
    options, samples = BLIND[what]
    found = Reference(**options).fit(*samples)
    assert found.skill_ <= 0.05 and not found.inputs_tell_nothing_ and not found.may_choose(sees_all=False)
    assert found.is_trusted_ == (found.kind_ == "columns" and found.skill_ > 0)


def test_of_more_columns_than_a_forest_takes_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_FOREST_COLUMNS", 2)
    assert not Reference().fit(CONSTANT, CLASSES).is_trusted_
