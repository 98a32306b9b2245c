import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.kernel_ridge import KernelRidge
from torch import Tensor

from lightning_sensitivity.functional import Calibration, fit_reference
from lightning_sensitivity.functional.reference import ReferenceSums, reference_weight
from lightning_sensitivity.functional.sums import TEMPERATURES


def sample(task: str = "multiclass", num_samples: int = 24, num_new: int = 7, seed: int = 0) -> tuple[Tensor, ...]:
    """Features, noisy labels as probabilities, and new features."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_samples + num_new, 3, generator=g, dtype=torch.float64)
    y = (x[:num_samples, :2] + 0.5 * torch.randn(num_samples, 2, generator=g) > 0).double()
    if task == "multiclass":
        y = torch.eye(4, dtype=torch.float64)[(2 * y[:, 0] + y[:, 1]).long()]
    return x[:num_samples], y[:, :1] if task == "binary" else y, x[num_samples:]


def brier(p: Tensor, y: Tensor, task: str) -> float:
    squares = (p - y).square()
    return float(squares.sum(1).mean() if task == "multiclass" else squares.mean())


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_it_is_the_kernel_ridge_regression_of_sklearn_with_the_lowest_leave_one_out_score(task: str) -> None:
    x, y, new = sample(task, num_samples=15)
    shares, pairs = y.mean(0), [(i, j) for i in range(len(x)) for j in range(len(x)) if i != j]
    median = torch.tensor([float((x[i] - x[j]).square().sum()) for i, j in pairs]).double().median()
    found = []
    for width in (0.1, 0.4, 1.6):
        for ridge in (0.03, 0.1, 0.3, 1, 3, 10, 30):
            model = KernelRidge(alpha=ridge, kernel="rbf", gamma=float(1 / (width * median)))
            left_out = torch.empty_like(y)
            for i in range(len(x)):
                others = [j for j in range(len(x)) if j != i]
                model.fit(x[others].numpy(), (y - shares)[others].numpy())
                left_out[i] = shares + torch.tensor(model.predict(x[i : i + 1].numpy())).flatten()
            q = model.fit(x.numpy(), (y - shares).numpy()).predict(new.numpy()).reshape(-1, y.shape[1])
            found.append((brier(left_out, y, task), shares + torch.tensor(q)))
    score, q = min(found, key=lambda each: each[0])
    q = q.clamp(1e-4 if task == "multiclass" else 0, 1)
    reference = fit_reference(x, y, new, task)
    torch.testing.assert_close(reference.predictions, q / q.sum(1, keepdim=True) if task == "multiclass" else q)
    assert (reference.score, reference.num_samples) == (pytest.approx(score), len(x))
    assert reference.chance == pytest.approx(brier(shares.expand_as(y), y, task))
    assert reference.skill == pytest.approx(1 - score / reference.chance)
    torch.testing.assert_close(reference.shares, shares)


def test_permuted_labels_have_no_skill() -> None:
    for seed in range(3):
        x, y, new = sample(num_samples=300, seed=seed)
        order = torch.randperm(300, generator=torch.Generator().manual_seed(seed))
        assert fit_reference(x, y, new).skill > 0.2
        assert fit_reference(x, y[order], new).skill < 0.02


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-9, 0.1, 1e9]), shift=st.sampled_from([0.0, 1.0, 100.0]))
@settings(max_examples=20, deadline=None)
def test_units_origin_and_order_of_features_samples_and_classes_do_not_matter(
    seed: int, scale: float, shift: float
) -> None:
    x, y, new = sample(seed=seed)
    expected, g = fit_reference(x, y, new), torch.Generator().manual_seed(seed)
    columns, rows, classes = (torch.randperm(size, generator=g) for size in (3, len(x), 4))
    moved, new_moved = (scale * (each + shift)[:, columns] for each in (x, new))
    actual = fit_reference(moved[rows], y[rows][:, classes], new_moved)
    torch.testing.assert_close(actual.predictions, expected.predictions[:, classes], rtol=1e-5, atol=1e-7)
    assert actual.score == pytest.approx(expected.score)


ONE_HOT = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
DEGENERATE: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "one sample": (torch.rand(1, 3), ONE_HOT[:1], torch.rand(4, 3)),
    "one class": (torch.rand(6, 3), ONE_HOT[:1].expand(6, 3), torch.rand(4, 3)),
    "constant features": (torch.full((6, 3), 0.1), ONE_HOT, torch.full((4, 3), 0.1)),
    "constant features, others of new samples": (torch.zeros(6, 3), ONE_HOT, torch.rand(4, 3)),
    "no new samples": (torch.rand(6, 3), ONE_HOT, torch.rand(0, 3)),
    "a new sample far away": (torch.rand(6, 3), ONE_HOT, torch.full((1, 3), 1e30)),
}


@pytest.mark.parametrize("what", DEGENERATE)
def test_what_holds_nothing_to_learn_gives_the_shares(what: str) -> None:
    x, y, new = DEGENERATE[what]
    reference = fit_reference(x, y, new)
    shares = y.double().mean(0).clamp(min=1e-4)
    torch.testing.assert_close(reference.predictions, (shares / shares.sum()).expand(len(new), 3), atol=0.01, rtol=0)
    if what not in ("no new samples", "a new sample far away"):
        assert reference.skill <= 0


def test_bad_input_is_refused_by_name() -> None:
    x, y, nan = torch.rand(6, 3), ONE_HOT, torch.full((6, 3), math.nan)
    shapes, probabilities = r"`features` \(N, D\), .* but got .*", "`labels` to be probabilities, .* sum to 1"
    bad: list[tuple[str, tuple[Any, ...]]] = [
        ("`features` and `new_features` to be finite", (nan, y, x)),
        ("`features` and `new_features` to be finite", (x, y, 1 / torch.zeros(6, 3))),
        (shapes + r"\(0, 3\), \(6, 3\) and \(0, 3\)", (x[:0], y[:0], x)),
        (shapes + r"\(6, 3\), \(2, 2\) and", (x, y, x[:2, :2])),
        (shapes + r".* and \(6,\)", (x, y.argmax(1).float(), x)),
        (shapes + r".* and \(5, 3\)", (x, y[:5], x)),
        (probabilities, (x, y * 2 / 3, x)),
        (probabilities, (x, -y, x, "multilabel")),
        ("`task`", (x, y, x, "regression")),
    ]
    for message, arguments in bad:
        with pytest.raises(ValueError, match=f"Expected {message}"):
            fit_reference(*arguments)


# What the estimate makes of it


WEIGHTS = {  # of a score, a claim, and numbers of samples
    "skilled and calibrated": (0.9, 0.9, 500, 500, 2),
    "no more skilled than with permuted labels": (0.99, 0.99, 500, 500, 0),
    "half way": (0.98, 0.98, 500, 500, 1),
    "of few samples, which reach that by chance": (0.98, 0.98, 75, 75, 0),
    "too cautious: correct labels": (0.5, 0.65, 500, 500, 0),
    "perfect": (0.0, 0.0, 500, 500, 0),
    "of a quarter of the training samples": (0.9, 0.9, 1000, 4000, 0.5),
}


@pytest.mark.parametrize("what", WEIGHTS)
def test_the_weight_of_a_reference_that_is(what: str) -> None:
    score, *others, weight = WEIGHTS[what]
    assert reference_weight(score, 1.0, *others) == pytest.approx(weight)


EPOCHS = st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=1, max_size=9)


@given(epochs=EPOCHS)
def test_the_factor_is_the_smallest_ratio_of_the_epochs_that_are_clear_at_each_temperature(
    epochs: list[tuple[float, float]],
) -> None:
    def at_all(value: float) -> torch.Tensor:
        """The value at the first temperature, another at the others."""
        return torch.tensor([value] + [1.0] * (len(TEMPERATURES) - 1), dtype=torch.float64)

    calibration = Calibration()
    assert set(calibration.factors) == {3}
    for agreement, training in [*epochs, (math.nan, 1.0), (1.0, math.nan)]:
        calibration = calibration.updated(at_all(agreement), at_all(training))
    agreements = [agreement for agreement, _ in epochs]
    clear = [i for i, each in enumerate(agreements) if each > max(1e-4, 0.15 * max(agreements[: i + 1]))]
    smallest = min((epochs[i][1] / epochs[i][0] for i in clear), default=math.inf)
    assert (calibration.largest_agreements[0], calibration.smallest_ratios[0]) == (max(0, *agreements), smallest)
    assert calibration.factors == [min(max(smallest, 1), 3)] + [1.0] * (len(TEMPERATURES) - 1)


GAP_WEIGHTS = {  # noise, claim / score, weight
    "noise is found": (0.05, 1.5, 1.0),
    "nothing is known": (math.nan, 1.5, 1.0),
    "no noise is found": (0.04, 1.3, 0.0),
    "noise can't be excluded": (0.04, 1.29, 0.7),
}


@pytest.mark.parametrize("what", GAP_WEIGHTS)
def test_how_much_the_estimate_counts_in_the_criterion_if(what: str) -> None:
    noise, claim, weight = GAP_WEIGHTS[what]
    known = {"noise": 0.0, "num_unknown": 1.0} if math.isnan(noise) else {"noise": noise, "num_unknown": 0.0}
    assert ReferenceSums(num_samples=1, score=1.0, chance=2.0, claim=claim, **known).gap_weight == weight
