"""What a reference predicts, and what it knows of itself."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity.functional import Reference, fit_reference, reference
from lightning_sensitivity.functional.tensors import as_tensor

DIGITS, DIGIT = (torch.tensor(each) for each in load_digits(return_X_y=True))


def sample(task: str = "multiclass", num_samples: int = 24, num_new: int = 7, seed: int = 0) -> tuple[Tensor, ...]:
    """Three columns in several units, noisy labels as a matrix, and new samples."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples + num_new, 3, generator=g, dtype=torch.float64)
    y = x[:num_samples, :2] + 0.5 * torch.randn(num_samples, 2, generator=g)
    if task == "multiclass":
        y = one_hot(2 * (y[:, 0] > 0) + (y[:, 1] > 0).long(), 4).double()
    if task == "binary":
        y = (y[:, :1] > 0).double()
    x = 3 + x * torch.tensor([1.0, 2.0, 0.5])
    return x[:num_samples], y, x[num_samples:]


def loss(p: Tensor, y: Tensor, task: str) -> float:
    squares = (p - y).square()
    return float(squares.sum(1).mean() if task == "multiclass" else squares.mean())


def of_sklearn(x: Tensor, y: Tensor, new: Tensor, gamma: float, ridge: float) -> Tensor:
    model = KernelRidge(alpha=ridge, kernel="rbf", gamma=gamma).fit(x.numpy(), y.numpy())
    return torch.tensor(model.predict(new.numpy())).reshape(len(new), -1)


@pytest.mark.parametrize("task", ["multiclass", "binary", "regression"])
def test_it_is_the_kernel_ridge_regression_of_sklearn_with_the_lowest_leave_one_out_score(task: str) -> None:
    x, y, new = sample(task, num_samples=7)
    shares, found = y.mean(0), []
    spread = x.std(0, correction=0)
    for units, name in ((spread, "columns"), (torch.ones(3), "values")):
        a, b = x / units, new / units
        pairs = torch.pdist(a).square()
        median = torch.cat([pairs, pairs]).median()  # of both orders
        for width in (0.1, 0.4, 1.6):
            for ridge in (0.03, 0.1, 0.3, 1, 3, 10, 30):
                settings = float(1 / (width * median)), ridge
                left_out = torch.cat([
                    of_sklearn(a[keep], (y - shares)[keep], a[~keep], *settings)
                    for keep in ~torch.eye(len(x), dtype=torch.bool)
                ])  # fmt: skip
                score = loss(shares + left_out, y, task)
                found.append((score, name, shares + of_sklearn(a, y - shares, b, *settings)))
    score, name, q = min(found, key=lambda each: each[0])
    if task != "regression":
        q = q.clamp(1e-4 if task == "multiclass" else 0, 1)
    fitted = fit_reference(x, y, new, task)
    torch.testing.assert_close(fitted.predictions, q / q.sum(1, keepdim=True) if task == "multiclass" else q)
    assert (fitted.score, fitted.features, fitted.num_samples) == (pytest.approx(score), name, len(x))
    assert fitted.chance == pytest.approx(loss(shares.expand_as(y), y, task))
    assert fitted.skill == pytest.approx(1 - score / fitted.chance)
    torch.testing.assert_close(fitted.shares, shares)
    of_claim = {
        "multiclass": 1 - fitted.leave_one_out.square().sum(1).mean(),
        "binary": (fitted.leave_one_out * (1 - fitted.leave_one_out)).mean(),
        "regression": math.nan,
    }
    assert fitted.claim == pytest.approx(float(of_claim[task]), nan_ok=True)


def small(monkeypatch: pytest.MonkeyPatch, samples: int, part: int) -> None:
    monkeypatch.setattr(reference, "MAX_SAMPLES", samples)
    monkeypatch.setattr(reference, "_PART", part)


G = torch.Generator().manual_seed(0)
INPUTS: dict[str, Tensor] = {
    "vectors": torch.randn(400, 6, generator=G),
    "images": torch.randint(256, (400, 2, 9, 9), generator=G, dtype=torch.uint8),
    "signals": torch.randn(400, 1, 24, generator=G),
    "tokens": torch.randint(-1, 30, (400, 8), generator=G),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_the_order_of_samples_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, samples=200, part=60)
    inputs, labels = INPUTS[kind], INPUTS[kind].flatten(1).double().sum(1)
    labels = (labels > labels.median()).long()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first = fit_reference(inputs[:300], labels[:300], inputs[300:])
    second = fit_reference(inputs[:300][order], labels[:300][order], inputs[300:])
    torch.testing.assert_close(first.predictions, second.predictions, rtol=1e-5, atol=1e-6)
    assert (first.kind, first.num_samples) == (kind, 200) and first.skill == pytest.approx(second.skill)


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-9, 0.1, 1e9]), shift=st.sampled_from([0.0, 1.0, 100.0]))
@settings(max_examples=15, deadline=None)
def test_units_and_origin_of_features_and_targets_do_not_matter(seed: int, scale: float, shift: float) -> None:
    x, y, new = sample("regression", seed=seed)
    expected = fit_reference(x, y, new, "regression").predictions
    moved = fit_reference(scale * (x + shift), scale * (y + shift), scale * (new + shift), "regression")
    torch.testing.assert_close(moved.predictions / scale - shift, expected.float().double(), rtol=1e-4, atol=1e-4)


def test_of_digits_it_learns_most_and_more_with_more_samples() -> None:
    images, new = DIGITS.reshape(-1, 1, 8, 8), slice(1200, None)
    few, many = (fit_reference(images[:size], DIGIT[:size], images[new]) for size in (200, 1001))
    accuracies = [float((each.predictions.argmax(1) == DIGIT[new]).double().mean()) for each in (few, many)]
    assert 0.85 < accuracies[0] < accuracies[1] and accuracies[1] > 0.95
    assert few.score > many.score and many.looks_clean and many.is_trusted
    assert many.score == pytest.approx(float((many.leave_one_out - many.labels).square().sum(1).mean()), rel=0.1)


def test_it_sees_a_shape_anywhere_in_images_and_signals() -> None:
    g = torch.Generator().manual_seed(0)
    places, labels = torch.randint(16, (300,), generator=g), torch.arange(300) % 2
    signals = 0.3 * torch.randn(300, 1, 40, generator=g)
    images = 0.3 * torch.randn(300, 1, 20, 20, generator=g)
    for signal, image, place, label in zip(signals, images, places.tolist(), labels.tolist(), strict=True):
        signal[0, place : place + 20] += torch.arange(20) % 4 - 1.5 if label else 1.5 - torch.arange(20) % 4
        stripes = (torch.arange(8) % 2 * 2.0 - 1).expand(8, 8)
        image[0, place % 12 : place % 12 + 8, place // 2 : place // 2 + 8] += stripes if label else stripes.T
    for inputs in (signals, images):
        found = fit_reference(inputs, labels, inputs[:0])
        assert found.features == "patches" and found.skill > 0.8


def test_permuted_labels_have_no_skill_and_unknown_noise() -> None:
    for seed in range(3):
        x, y, new = sample(num_samples=300, seed=seed)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        assert fit_reference(x, y, new).skill > 0.2
        permuted = fit_reference(x, y[order], new)
        assert permuted.skill < 0.02 and (permuted.skill > 0.01 or math.isnan(permuted.unexplained))


ONE_HOT = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
DEGENERATE: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "one sample": (torch.rand(1, 3), ONE_HOT[:1], torch.rand(4, 3)),
    "one class": (torch.rand(6, 3), ONE_HOT[:1].expand(6, 3), torch.rand(4, 3)),
    "constant features": (torch.full((6, 3), 0.1), ONE_HOT, torch.full((4, 3), 0.1)),
    "constant features, others of new samples": (torch.zeros(6, 3), ONE_HOT, torch.rand(4, 3)),
    "no new samples": (torch.rand(6, 3), ONE_HOT, torch.rand(0, 3)),
    "a new sample far away": (torch.rand(6, 3), ONE_HOT, torch.full((1, 3), 1e30)),
    "images of one color": (torch.ones(6, 3, 8, 8), ONE_HOT, torch.rand(4, 3, 8, 8)),
    "texts of padding": (torch.full((6, 3), -1), ONE_HOT, torch.ones(4, 5).long()),
}


@pytest.mark.parametrize("what", DEGENERATE)
def test_what_holds_nothing_to_learn_gives_the_shares(what: str) -> None:
    x, y, new = DEGENERATE[what]
    found = fit_reference(x, y, new)
    shares = y.double().mean(0).clamp(min=1e-4)
    torch.testing.assert_close(found.predictions, (shares / shares.sum()).expand(len(new), 3), atol=0.01, rtol=0)
    if what not in ("no new samples", "a new sample far away"):
        assert found.skill <= 0 and not found.is_trusted


ROWS, FIRST = torch.tensor([[0.1], [0.2], [0.1], [0.3]]), torch.tensor([0, 1, 0, 2])
KNOWN: dict[str, tuple[Tensor, Tensor, int]] = {
    "no sample comes twice": (torch.rand(4, 2), FIRST, 4),
    "one is drawn twice": (ROWS, FIRST, 3),
    "equal inputs have several labels": (ROWS, torch.arange(4), 4),
    "a table has few values": (ROWS[[0, 1]].repeat(10, 1), FIRST[[0, 1]].repeat(10), 20),
    "labels are ignored": (torch.rand(4, 2), torch.tensor([0, -100, 1, -100]), 2),
}


@pytest.mark.parametrize("case", KNOWN)
def test_which_samples_it_knows_if(case: str) -> None:
    x, labels, expected = KNOWN[case]
    assert fit_reference(x, labels, x).num_samples == expected


def test_arrays_tables_and_lists_are_as_good_as_tensors() -> None:
    x, y, new = sample("regression", num_samples=12)
    expected = fit_reference(x, y[:, 0], new, "regression").predictions
    for convert in (np.asarray, pd.DataFrame, Tensor.tolist):
        convert = convert if convert is Tensor.tolist else lambda each, made=convert: made(each.numpy())
        found = fit_reference(convert(x), convert(y[:, :1]), convert(new), "regression").predictions
        torch.testing.assert_close(found, expected)
    mixed = pd.DataFrame({"a": [0.5, 1.5] * 6, "b": [True, False, False] * 4})  # as by `get_dummies`
    assert torch.equal(as_tensor("inputs", mixed), torch.tensor(mixed.to_numpy(float)))
    classes = fit_reference(x, [True, False] * 6, new).predictions
    torch.testing.assert_close(classes, fit_reference(x, torch.tensor([1, 0] * 6), new).predictions)


def test_new_samples_are_predicted_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, new = sample()
    expected = fit_reference(x, y, new).predictions
    monkeypatch.setattr(reference, "_CHUNK", 2)
    torch.testing.assert_close(fit_reference(x, y, new).predictions, expected)


def made(kind: str, skill: float, claim: float = 0.5) -> Reference:
    empty = torch.zeros(0, 2)
    return Reference(empty, torch.zeros(2), 1 - skill, 1.0, claim, math.nan, empty, empty, kind, "columns")


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("skill", [-0.01, 0.0, 0.001, 0.04, 0.06])
def test_it_is_trusted_where_it_sees_enough(kind: str, skill: float) -> None:
    least = 0.0 if kind == "vectors" else 0.05
    assert made(kind, skill).is_trusted == (skill > least)


def test_labels_look_clean_if_it_claims_more_doubt_than_it_has() -> None:
    assert made("vectors", 0.5, claim=0.66).looks_clean and not made("vectors", 0.5, claim=0.64).looks_clean
    assert not made("vectors", 0.5, claim=math.nan).looks_clean


X, Y, NAN = torch.rand(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.full((6, 3), math.nan)
SHAPES = r"`inputs` \(N, \.\.\.\), `labels` .* but got"
BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "inputs of nan": ("`inputs` to be finite", (NAN, Y, X)),
    "new inputs of inf": ("`new_inputs` to be finite", (X, Y, 1 / torch.zeros(6, 3))),
    "no samples": (SHAPES + r" \(0, 3\), \(0,\)", (X[:0], Y[:0], X)),
    "other new inputs": (SHAPES + r" \(6, 3\), \(6,\) and \(2, 2\)", (X, Y, X[:2, :2])),
    "fewer labels": (SHAPES + r" .*\(5,\)", (X, Y[:5], X)),
    "classes as floats": (r"`labels` to be class indices .*task='binary'", (X, Y.float(), X)),
    "a column of classes": (r"`labels` to be class indices .*\(6, 1\)", (X, Y[:, None], X)),
    "negative classes": ("labels from 0 to 3, .* got -1 to 3", (X, 2 * Y - 1, X)),
    "labels of nan": ("`labels` to be finite", (X, NAN, X)),
    "a binary matrix": ("one label per output.* Leave `task` out", (X, X, X, "binary")),
    "ignored labels": ("`labels` of which some", (X, 0 * Y - 100, X)),
    "strings": ("`labels` to be real numbers.*factorize", (X, ["a", "b"] * 3, X)),
    "rows of several lengths": ("`inputs` to be numbers in rows of one length", ([[1, 2], [3]], Y, X)),
}


@pytest.mark.parametrize("what", BAD)
def test_what_it_can_not_learn_from_is_refused_by_name(what: str) -> None:
    message, arguments = BAD[what]
    with pytest.raises(ValueError, match=f"Expected {message}"):
        fit_reference(*arguments)


def test_indices_and_one_hot_labels_give_the_same_of_repeated_rows() -> None:
    x = torch.randint(3, (90, 2), generator=torch.Generator().manual_seed(0)).float()
    y = torch.arange(90) % 3
    first, second = (fit_reference(x, labels, x[:9]) for labels in (y, torch.nn.functional.one_hot(y).float()))
    torch.testing.assert_close(first.predictions, second.predictions, rtol=1e-5, atol=1e-5)
