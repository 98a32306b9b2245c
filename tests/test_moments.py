import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sensitivity.moments import batch_moments, empty_moments, merge_moments, sensitivity_estimate
from tests.helpers import changes


def moments(clean: torch.Tensor, noisy: object, per_output: bool = False) -> torch.Tensor:
    return batch_moments(clean, noisy, per_output)[0]


def estimates_agree(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-9) -> None:
    for x, y in zip(sensitivity_estimate(a), sensitivity_estimate(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=0, equal_nan=True)


def test_several_draws_are_further_changes_of_the_same_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = torch.randn(20, 4, generator=generator)
    draws = [torch.randn(20, 4, generator=generator) for _ in range(3)]
    expected = torch.cat([changes(clean, draw) for draw in draws]).var(correction=0)
    estimate = sensitivity_estimate(moments(clean, draws))
    torch.testing.assert_close(estimate.sensitivity, expected, rtol=1e-12, atol=0)
    assert estimate.num_samples == 20
    assert estimate.num_changes == 60


def test_the_standard_error_of_one_draw_is_that_of_the_fourth_moment() -> None:
    clean, noisy = torch.randn(2, 500, 10, generator=torch.Generator().manual_seed(0))
    square = (changes(clean, noisy) - changes(clean, noisy).mean()).square()
    expected = (square.var() / 500).sqrt()
    torch.testing.assert_close(sensitivity_estimate(moments(clean, noisy)).stderr, expected, rtol=1e-12, atol=0)


def test_per_output_standard_error_is_exact_without_mean_change_and_never_too_small() -> None:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(400, 5, generator=generator, dtype=torch.float64) * torch.rand(400, 1, generator=generator)
    for means in ([0.0] * 5, [0.5] * 5, [3.0, -3.0, 1.0, -1.0, 0.0]):
        shifted = change - change.mean(0) + torch.tensor(means)
        estimate = sensitivity_estimate(moments(torch.zeros_like(shifted), shifted, per_output=True))
        exact = ((change - change.mean(0)).square().mean(1).var() / 400).sqrt()
        if not any(means):
            torch.testing.assert_close(estimate.stderr, exact, rtol=1e-9, atol=0)
        assert estimate.stderr >= exact * (1 - 1e-9)


def test_a_common_change_does_not_drown_the_variance() -> None:
    change = 1e-3 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = torch.zeros_like(change)
    parts = [moments(clean[i : i + 7], 1e4 + change[i : i + 7]) for i in range(0, 1000, 7)]
    merged = sensitivity_estimate(merge_moments(torch.stack(parts)))
    torch.testing.assert_close(merged.sensitivity, change.var(correction=0), rtol=1e-6, atol=0)


# Error bars. A linear model's sensitivity is known: σ² ‖mean over k of W_k‖².


def coverage(estimates: list[tuple[torch.Tensor, torch.Tensor]], truth: float) -> float:
    return sum(abs(s - truth) <= 1.96 * e for s, e in estimates) / len(estimates)


@pytest.mark.parametrize("num_draws", [1, 8])
def test_a_linear_model_lies_within_its_error_bars(num_draws: int) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, sigma = torch.randn(10, 8, generator=generator, dtype=torch.float64), 0.1
    truth = sigma**2 * weight.mean(0).square().sum().item()
    estimates = []
    for _ in range(200):
        x = torch.rand(500, 8, generator=generator, dtype=torch.float64)
        noise = sigma * torch.randn(num_draws, *x.shape, generator=generator, dtype=torch.float64)
        estimate = sensitivity_estimate(moments(x @ weight.T, ((x + e) @ weight.T for e in noise)))
        estimates.append((estimate.sensitivity, estimate.stderr))
    assert 0.90 <= coverage(estimates, truth) <= 0.98


@pytest.mark.parametrize(("num_draws", "num_positions"), [(16, 1), (1, 25)])
def test_error_bars_are_right_where_a_samples_changes_are_correlated(num_draws: int, num_positions: int) -> None:
    # Samples differ in gain, draws and positions of one sample share it: counted as independent they would give
    # intervals that hold the truth far too seldom.
    generator = torch.Generator().manual_seed(2)
    estimates, naive = [], []
    for _ in range(200):
        gain = (torch.rand(300, 1, 1, generator=generator, dtype=torch.float64) + 0.5) ** 2
        draws = [
            gain * torch.randn(300, 1, num_positions, generator=generator, dtype=torch.float64)
            for _ in range(num_draws)
        ]
        clean = torch.zeros_like(draws[0])
        estimate = sensitivity_estimate(moments(clean, draws))
        estimates.append((estimate.sensitivity, estimate.stderr))
        square = torch.stack(draws).square()
        naive.append((square.mean(), (square.var() / square.numel()).sqrt()))
    truth = (1.5**5 - 0.5**5) / 5  # E[gain²]
    assert 0.90 <= coverage(estimates, truth) <= 0.98
    assert coverage(naive, truth) < 0.90


def test_one_sample_has_no_standard_error() -> None:
    estimate = sensitivity_estimate(moments(torch.zeros(1, 2, 9), torch.randn(1, 2, 9)))
    assert estimate.sensitivity > 0
    assert estimate.stderr.isnan()


def test_no_sample_has_no_sensitivity() -> None:
    estimate = sensitivity_estimate(empty_moments())
    assert estimate.sensitivity.isnan()
    assert estimate.stderr.isnan()
    assert estimate.num_samples == 0


# Rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_output", [False, True])
def test_the_rounding_of_large_outputs_is_what_it_adds(dtype: torch.dtype, per_output: bool) -> None:
    # A linear model whose outputs are spread over one binade, with changes of about a unit in the last place.
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(10, 8, generator=generator), 64 * 2 ** ((torch.arange(10) + 0.5) / 10)
    x = torch.rand(8000, 8, generator=generator)
    noise = 25 * torch.finfo(dtype).eps * torch.randn(x.shape, generator=generator)
    clean, noisy = x @ weight.T + bias, (x + noise) @ weight.T + bias
    exact = sensitivity_estimate(moments(clean, noisy, per_output))
    rounded = sensitivity_estimate(moments(clean.to(dtype), noisy.to(dtype), per_output))
    added = (rounded.sensitivity - exact.sensitivity).item()
    assert added / 1.5 < rounded.rounding.item() < added * 1.5
    assert exact.rounding < 1e-6 * rounded.rounding


@pytest.mark.parametrize("shape", [(30,), (30, 1), (30, 4), (30, 4, 2, 3)])
@pytest.mark.parametrize("per_output", [False, True])
@pytest.mark.parametrize("num_draws", [1, 3])
def test_rounding_is_per_change(shape: tuple[int, ...], per_output: bool, num_draws: int) -> None:
    clean = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    outputs = clean.double().reshape(30, *shape[1:2] or (1,), -1)
    num_outputs = outputs.shape[1]
    mean_square = outputs.square().sum(1).mean() / (num_outputs if per_output else num_outputs**2)
    estimate = sensitivity_estimate(moments(clean, [clean + 1] * num_draws, per_output))
    torch.testing.assert_close(estimate.rounding, 2 * 2**-14 * mean_square / (32 * math.log(2)), rtol=1e-12, atol=0)


# Merging


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_rounding_is_the_mean_over_changes_of_whatever_type_and_split(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    num_outputs, per_output = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    types = st.sampled_from([torch.bfloat16, torch.float16, torch.float32, torch.float64])
    parts, total, changes_of_all = [empty_moments(num_outputs if per_output else 1)], 0.0, 0
    for dtype, num_samples, num_draws, num_positions in data.draw(
        st.lists(st.tuples(types, st.integers(0, 5), st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5)
    ):
        clean = torch.randn(num_samples, num_outputs, num_positions, generator=generator).to(dtype)
        part = moments(clean, [clean + 1] * num_draws, per_output)
        parts.insert(data.draw(st.integers(0, len(parts))), part)
        num_changes = num_samples * num_draws * num_positions
        total += num_changes * sensitivity_estimate(part).rounding.item() if num_changes else 0
        changes_of_all += num_changes
    estimate = sensitivity_estimate(merge_moments(torch.stack(parts)))
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = merge_moments(torch.stack([one_by_one, part]))
    for rounding in (estimate.rounding, sensitivity_estimate(one_by_one).rounding):
        assert rounding.item() == pytest.approx(total / changes_of_all if changes_of_all else math.nan, nan_ok=True)


@given(st.data())
@settings(max_examples=100, deadline=None)
def test_neither_split_nor_order_nor_grouping_matters(data: st.DataObject) -> None:
    num_samples = data.draw(st.integers(1, 30))
    num_outputs, num_positions = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    per_output, num_draws = data.draw(st.booleans()), data.draw(st.integers(1, 3))
    scale = 10.0 ** data.draw(st.integers(-7, 5))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    shape = (num_draws + 1, num_samples, num_outputs, num_positions)
    clean, *draws = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
    whole = moments(clean, draws, per_output)

    order = torch.randperm(num_samples, generator=generator)
    cuts = sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=5)))
    parts = [
        moments(clean[chunk], [draw[chunk] for draw in draws], per_output)
        for chunk in order.tensor_split(torch.tensor(cuts, dtype=torch.long))
    ]
    parts.append(empty_moments(num_outputs if per_output else 1))
    estimates_agree(merge_moments(torch.stack(parts)), whole, rtol=1e-7)
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = merge_moments(torch.stack([one_by_one, part]))
    estimates_agree(one_by_one, whole, rtol=1e-7)


def test_batches_of_different_length_are_weighted_by_their_positions() -> None:
    generator = torch.Generator().manual_seed(0)
    pairs = [torch.randn(2, 20, 3, length, generator=generator, dtype=torch.float64) for length in (1, 4, 9)]
    merged = sensitivity_estimate(merge_moments(torch.stack([moments(*pair) for pair in pairs])))
    change = [changes(*pair) for pair in pairs]
    flat = torch.cat([c.flatten() for c in change])
    torch.testing.assert_close(merged.sensitivity, flat.var(correction=0), rtol=1e-12, atol=0)
    # The ratio estimator's error: per-sample sums of squares, less what their weight would give.
    excess = torch.cat([((c - flat.mean()).square() - merged.sensitivity).sum(1) for c in change])
    expected = (60 / 59 * excess.square().sum()).sqrt() / flat.numel()
    torch.testing.assert_close(merged.stderr, expected, rtol=1e-9, atol=0)
