"""How many labels look wrong, by predictions that have not seen them."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity.functional import (
    Reference,
    estimate_noise,
    fit_reference,
    label_noise,
    principal_components,
)

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
    expected = pytest.approx(estimate_noise(predictions, labels.argmax(1)))
    assert [estimate_noise(predictions, labels), estimate_noise(*moved)] == [expected] * 2


@given(seed=SEEDS, num_classes=st.sampled_from([2, 3, 10]))
@settings(max_examples=15, deadline=None)
def test_it_grows_as_more_are_relabelled(seed: int, num_classes: int) -> None:
    predictions, labels = sample(num_classes, seed, num_samples=600)  # of 400, one in 300 draws hides its noise
    shares = [0.0, 0.05, 0.1, 0.15, 0.2]
    found = [estimate_noise(predictions, relabelled(labels, share, num_classes, seed)) for share in shares]
    assert found == sorted(found) and found[-1] == pytest.approx(0.2, abs=0.05)


@given(seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_two_classes_may_be_the_probability_of_one(seed: int) -> None:
    predictions, labels = sample(2, seed)
    forms = (predictions, labels), (predictions[:, 1], labels), (predictions[:, 1:], labels[:, None].float())
    expected, *others = (estimate_noise(*form) for form in forms)
    assert others == [pytest.approx(expected)] * 2


# On real data, and what is known of them with a reference

X, Y = (torch.tensor(each) for each in load_digits(return_X_y=True))


def reference(labels: Tensor, num_columns: int = 64, seed: int = 0) -> Reference:
    """Of 500 digits, some of their pixels, and a label each."""
    rows = torch.randperm(len(X), generator=torch.Generator().manual_seed(seed))[:500]
    columns = torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:num_columns]
    features, _ = principal_components(X[rows][:, columns].float(), X[:1, columns].float())
    return fit_reference(features, one_hot(labels[rows], 10), features[:1])


@pytest.mark.parametrize("share", [0.0, 0.1, 0.3, 0.5])
def test_of_digits_it_is_about_the_share_that_was_relabelled(share: float) -> None:
    for seed in range(2):
        assert reference(relabelled(Y, share, 10, seed), seed=seed).noise == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_a_data_set_needs_its_features_and_labels_only(share: float) -> None:
    labels, state = relabelled(Y, share, 10), torch.get_rng_state()
    found = label_noise(X.reshape(-1, 1, 8, 8), labels)
    assert found == pytest.approx(share, abs=0.04) and torch.equal(torch.get_rng_state(), state)
    table = torch.cat([X, 1e5 * torch.rand(len(X), 1)], 1)  # one more column, in another unit
    assert label_noise(table, labels) == pytest.approx(share, abs=0.06)


def test_a_data_set_may_have_labels_of_any_kind() -> None:
    x, y = X[Y < 3][:200], relabelled(Y[Y < 3], 0.2, 3)[:200]
    ignored = torch.cat([y, torch.full((50,), -100)])
    others = (7 * y + 5).to(torch.uint8), one_hot(y, 3), one_hot(y, 3).float(), one_hot(y, 100)
    assert [label_noise(x, each) for each in others] == [pytest.approx(label_noise(x, y))] * 4
    assert label_noise(torch.cat([x, x[:50]]), ignored) == pytest.approx(label_noise(x, y), abs=0.02)
    drawn = torch.randint(200, (400,), generator=torch.Generator().manual_seed(0))  # with replacement
    assert label_noise(x[drawn], y[drawn]) == pytest.approx(label_noise(x, y), abs=0.02)
    is_zero = y == 0
    binary = [label_noise(x, each, "binary") for each in (is_zero, is_zero[:, None].float())]
    assert binary == [pytest.approx(label_noise(x, is_zero.long()), abs=1e-4)] * 2
    assert math.isnan(
        label_noise(torch.rand(200, 3, generator=torch.Generator().manual_seed(0)), y)
    )  # nothing can be learned


REFUSED: dict[str, tuple[str, Any, Any, str]] = {
    "several labels for a sample": ("`task` to be 'multiclass' or 'binary'", X, one_hot(Y, 10), "multilabel"),
    "another task": ("`task` to be one of", X, Y, "regression"),
    "fewer labels": (r"`features` .* and `labels` .* got \(1797, 64\) and \(5,\)", X, Y[:5], "multiclass"),
    "no matrix": ("`features` .* and `labels`", X[:, 0], Y, "multiclass"),
    "ignored labels": ("`labels` of which some are not ignored", X, 0 * Y - 100, "multiclass"),
    "nan": ("`features` to be finite", X * math.nan, Y, "multiclass"),
    "numbers": ("`labels`", X, Y + 0.5, "multiclass"),
    "more than 1": ("`labels` to be probabilities", X, Y, "binary"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_data_set_is_refused_by_name(what: str) -> None:
    match, features, labels, task = REFUSED[what]
    with pytest.raises(ValueError, match=f"Expected .*{match}"):
        label_noise(features, labels, task)


def test_few_labels_of_a_hard_but_correct_task_look_wrong() -> None:
    found = reference(Y, num_columns=12)
    assert 0.1 < found.score < found.chance / 2 and found.noise < 0.05


def test_several_labels_for_a_sample_have_none() -> None:
    found = fit_reference(torch.rand(20, 2), (torch.rand(20, 3) > 0.5).double(), torch.rand(1, 2), "multilabel")
    assert math.isnan(found.noise)


@pytest.mark.parametrize("labels", [torch.zeros(30).long(), torch.full((30, 2), 0.5), torch.zeros(1).long()])
def test_of_one_class_one_sample_or_labels_that_say_nothing_it_is_a_number(labels: Tensor) -> None:
    assert 0 <= estimate_noise(torch.full((len(labels), 2), 0.5, dtype=torch.float16), labels) < 0.86


SHAPES, PROBABILITIES = r"`predictions` \(N, K\) and `labels`", "`predictions` and `labels` to be probabilities"
THIRDS, INDICES = torch.full((6, 3), 1 / 3), torch.arange(6) % 3
BAD: dict[str, tuple[str, Any, Any]] = {
    "no samples": (SHAPES, THIRDS[:0], INDICES[:0]),
    "fewer labels": (SHAPES + r".* \(6, 3\) and \(5,\)", THIRDS, INDICES[:5]),
    "labels of other classes": (SHAPES, THIRDS, INDICES + 1),
    "labels of more classes": (SHAPES, THIRDS, torch.full((6, 4), 0.25)),
    "predictions for positions": (SHAPES, THIRDS[..., None], INDICES),
    "ignored labels": (PROBABILITIES, THIRDS[:, 0], INDICES.where(INDICES > 0, -100)),
    "logits": (PROBABILITIES, 9 * THIRDS - 4, INDICES),
    "nan": (PROBABILITIES, THIRDS * math.nan, INDICES),
    "negative indices": ("`labels`", THIRDS, INDICES - 100),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_by_name(what: str) -> None:
    match, predictions, labels = BAD[what]
    with pytest.raises(ValueError, match=f"Expected .*{match}"):
        estimate_noise(predictions, labels)
