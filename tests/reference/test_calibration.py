"""How many labels can't be explained, by predictions that have not seen them."""

import math
from typing import Any

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity.functional import label_noise, learners, unexplained_share

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
def test_the_order_of_samples_and_classes_does_not_matter_and_one_hot_labels_are_indices(
    seed: int, num_classes: int
) -> None:
    predictions, labels = sample(num_classes, seed)
    labels = one_hot(relabelled(labels, 0.3, num_classes, seed), num_classes)
    rows, columns = (torch.randperm(size, generator=torch.Generator().manual_seed(seed)) for size in labels.shape)
    moved = [each[rows][:, columns] for each in (predictions, labels)]
    expected = pytest.approx(unexplained_share(predictions, labels.argmax(1)))
    assert [unexplained_share(predictions, labels), unexplained_share(*moved)] == [expected] * 2
    assert unexplained_share(predictions.numpy(), labels.tolist()) == expected


@given(seed=SEEDS, num_classes=st.sampled_from([2, 3, 10]))
@settings(max_examples=15, deadline=None)
def test_it_grows_as_more_are_relabelled(seed: int, num_classes: int) -> None:
    predictions, labels = sample(num_classes, seed, num_samples=600)  # of 400, one in 300 draws hides its noise
    shares = [0.0, 0.05, 0.1, 0.15, 0.2]
    found = [unexplained_share(predictions, relabelled(labels, share, num_classes, seed)) for share in shares]
    assert found == sorted(found) and found[-1] == pytest.approx(0.2, abs=0.05)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_two_classes_may_be_the_probability_of_one(seed: int) -> None:
    predictions, labels = sample(2, seed)
    forms = (predictions, labels), (predictions[:, 1], labels), (predictions[:, 1:], labels[:, None].float())
    expected, *others = (unexplained_share(*form) for form in forms)
    assert others == [pytest.approx(expected)] * 2


# Of a data set

X, Y = (torch.tensor(each) for each in load_digits(return_X_y=True))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_of_digits_it_is_about_the_share_that_was_relabelled(share: float) -> None:
    assert label_noise(X.reshape(-1, 1, 8, 8)[:400], relabelled(Y, share, 10)[:400]) == pytest.approx(share, abs=0.06)
    table = torch.cat([X, 1e5 * torch.rand(len(X), 1, generator=torch.Generator().manual_seed(0))], 1)[:600]
    assert label_noise(table, relabelled(Y, share, 10)[:600]) == pytest.approx(share, abs=0.06)  # one more unit


def test_a_data_set_may_have_labels_of_any_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "_MAX_CELLS", 0)  # no forest, which takes longer
    x, y = X[Y < 3][:200, 16:48], relabelled(Y[Y < 3], 0.2, 3)[:200]
    expected = pytest.approx(label_noise(x, y))
    others = (7 * y + 5).to(torch.uint8), y * 10**12, one_hot(y, 100), pd.Series(y.numpy(), index=range(200, 400))
    assert [label_noise(x, each) for each in others] == [expected] * 4
    drawn = torch.randint(200, (400,), generator=torch.Generator().manual_seed(0))  # with replacement
    assert label_noise(x[drawn], y[drawn]) == pytest.approx(label_noise(x, y), abs=0.05)
    ignored = torch.cat([y, torch.full((50,), -100)])
    assert label_noise(torch.cat([x, x[:50]]), ignored) == expected
    assert label_noise(x, y == 0, "binary") == pytest.approx(label_noise(x, (y == 0).long()), abs=1e-3)


def test_nobody_knows_where_nothing_can_be_learned() -> None:
    assert math.isnan(label_noise(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)), Y[:200]))


def test_correct_labels_that_inputs_do_not_determine_can_not_be_explained() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 2, generator=g)
    labels = (torch.rand(600, generator=g) < (0.7 * x[:, 0]).sigmoid()).long()
    assert 0.05 < label_noise(x, labels) < 0.35


def test_a_regression_and_unlabelled_samples_are_refused_by_name() -> None:
    for labels, task, match in ((Y, "regression", "`task` to be 'multiclass' or"), (Y - 1, "multiclass", "from 0 to")):
        with pytest.raises(ValueError, match=f"Expected .*{match}"):
            label_noise(X, labels, task)


# Of predictions that are bad


@pytest.mark.parametrize("labels", [torch.zeros(30).long(), torch.full((30, 2), 0.5), torch.zeros(1).long()])
def test_of_one_class_one_sample_or_labels_that_say_nothing_it_is_a_number(labels: Tensor) -> None:
    assert 0 <= unexplained_share(torch.full((len(labels), 2), 0.5, dtype=torch.float16), labels) < 0.86


SHAPES, PROBABILITIES = r"`predictions` \(N, K\) and `labels`", "`predictions` and `labels` to be probabilities"
THIRDS, INDICES = torch.full((6, 3), 1 / 3), torch.arange(6) % 3
BAD: dict[str, tuple[str, Any, Any]] = {
    "no samples": (SHAPES, THIRDS[:0], INDICES[:0]),
    "fewer labels": (SHAPES + r".* \(6, 3\) and \(5,\)", THIRDS, INDICES[:5]),
    "labels of other classes": (SHAPES, THIRDS, INDICES + 1),
    "ignored labels": (PROBABILITIES, THIRDS[:, 0], INDICES.where(INDICES > 0, -100)),
    "logits": (PROBABILITIES, 9 * THIRDS - 4, INDICES),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name(what: str) -> None:
    match, predictions, labels = BAD[what]
    with pytest.raises(ValueError, match=f"Expected .*{match}"):
        unexplained_share(predictions, labels)
