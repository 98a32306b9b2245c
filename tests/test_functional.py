import math
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_sensitivity.functional import (
    batch_moments,
    empty_moments,
    loss_estimate,
    merge_moments,
    output_sensitivity,
    sensitivity_estimate,
)


def changes(clean: torch.Tensor, noisy: torch.Tensor) -> torch.Tensor:
    """Class-averaged changes by definition, one per sample and position."""
    return (noisy.double() - clean.double()).reshape(len(clean), clean[0].numel() and clean.shape[1], -1).mean(1)


def moments(clean: torch.Tensor, noisy: object, per_output: bool = False) -> torch.Tensor:
    return batch_moments(clean, noisy, per_output)[0]


def estimates_agree(a: torch.Tensor, b: torch.Tensor, rtol: float = 1e-9) -> None:
    for x, y in zip(sensitivity_estimate(a), sensitivity_estimate(b), strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=0, equal_nan=True)


# Values


@pytest.mark.parametrize("shape", [(50, 10), (50, 1), (50, 10, 4), (50, 3, 4, 5)])
def test_is_the_population_variance_of_the_averaged_change(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noisy = (torch.randn(shape, generator=generator) for _ in range(2))
    expected = changes(clean, noisy).var(correction=0)
    torch.testing.assert_close(output_sensitivity(clean, noisy), expected, rtol=1e-12, atol=0)


def test_one_dimension_is_one_output() -> None:
    clean, noisy = torch.rand(2, 30, generator=torch.Generator().manual_seed(0))
    assert output_sensitivity(clean, noisy) == output_sensitivity(clean[:, None], noisy[:, None])


def test_per_output_is_the_mean_of_the_outputs_variances() -> None:
    clean, noisy = torch.randn(2, 40, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    each = (noisy - clean).transpose(0, 1).reshape(3, -1).var(1, correction=0)
    torch.testing.assert_close(output_sensitivity(clean, noisy, per_output=True), each.mean(), rtol=1e-12, atol=0)


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
    for mean in (0.0, 0.5, 3.0):
        shifted = change - change.mean(0) + mean
        estimate = sensitivity_estimate(moments(torch.zeros_like(shifted), shifted, per_output=True))
        exact = ((change - change.mean(0)).square().mean(1).var() / 400).sqrt()
        if mean == 0:
            torch.testing.assert_close(estimate.stderr, exact, rtol=1e-9, atol=0)
        assert estimate.stderr >= exact * (1 - 1e-9)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e5])
def test_holds_over_the_range_that_occurs(scale: float) -> None:
    clean, noisy = scale * torch.randn(2, 300, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        output_sensitivity(clean, noisy), changes(clean, noisy).var(correction=0), rtol=1e-12, atol=0
    )


def test_a_common_change_does_not_drown_the_variance() -> None:
    change = 1e-3 * torch.randn(1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = torch.zeros_like(change)
    parts = [moments(clean[i : i + 7], 1e4 + change[i : i + 7]) for i in range(0, 1000, 7)]
    merged = sensitivity_estimate(merge_moments(torch.stack(parts)))
    torch.testing.assert_close(merged.sensitivity, change.var(correction=0), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_outputs_are_upcast_before_they_are_subtracted(dtype: torch.dtype) -> None:
    clean, noisy = (100 + torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(0))).to(dtype)
    torch.testing.assert_close(
        output_sensitivity(clean, noisy), output_sensitivity(clean.double(), noisy.double()), rtol=1e-12, atol=0
    )


def test_an_unchanged_output_has_no_sensitivity() -> None:
    clean = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    assert output_sensitivity(clean, clean) == 0
    assert output_sensitivity(torch.zeros(8, 3), torch.zeros(8, 3)) == 0


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


# Merging


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


def test_draws_are_consumed_one_at_a_time() -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def draw() -> torch.Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        output = torch.randn(4, 3)
        alive.append(weakref.ref(output))
        return output

    output_sensitivity(torch.zeros(4, 3), (draw() for _ in range(10)))
    assert len(alive) == 10
    assert most <= 1  # the one that the loop variable still names


# What bad input gets


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("num_outputs", [2, 10, 1000])
def test_probabilities_are_refused(dtype: torch.dtype, num_outputs: int) -> None:
    clean, noisy = 3 * torch.randn(2, 64, num_outputs, generator=torch.Generator().manual_seed(0)).to(dtype)
    with pytest.raises(ValueError, match="rows all sum to 1, such as probabilities.*Pass the logits"):
        output_sensitivity(clean.softmax(1), noisy.softmax(1))
    assert output_sensitivity(clean.softmax(1), noisy.softmax(1), per_output=True) > 0
    assert output_sensitivity(clean, noisy) > 0
    assert output_sensitivity(clean.sigmoid(), noisy.sigmoid()) > 0


def test_logits_with_a_small_class_mean_are_not_taken_for_probabilities() -> None:
    clean = 10 * torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    clean = clean - clean.mean(1, keepdim=True) + 0.1 * torch.randn(64, 1, generator=torch.Generator().manual_seed(1))
    noisy = clean + 0.1 * torch.randn(64, 10, generator=torch.Generator().manual_seed(2))
    assert output_sensitivity(clean, noisy) > 0
    with pytest.raises(ValueError, match="rows all sum to"):
        output_sensitivity(clean - clean.mean(1, keepdim=True), noisy - noisy.mean(1, keepdim=True))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_non_finite_outputs_are_named(value: float) -> None:
    good, bad = torch.zeros(4, 3), torch.zeros(4, 3)
    bad[2, 1] = value
    with pytest.raises(ValueError, match="nan or inf in the clean outputs of batch 0"):
        output_sensitivity(bad, good)
    with pytest.raises(ValueError, match="nan or inf in the noisy outputs of batch 0"):
        output_sensitivity(good, bad)
    with pytest.raises(ValueError, match="clean outputs of batch 0 and in the noisy outputs of batch 0"):
        output_sensitivity(bad, bad)


@pytest.mark.parametrize(
    ("clean", "noisy", "error", "match"),
    [
        (torch.zeros(4, 3), torch.zeros(4, 2), ValueError, r"\(4, 2\) for noisy and \(4, 3\) for clean"),
        (torch.zeros(4, 3), torch.zeros(4), ValueError, r"\(4,\) for noisy"),
        (torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3), TypeError, "`clean`.*floating.*torch.int64"),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int32), TypeError, "`noisy`.*floating.*torch.int32"),
        (torch.zeros(4, 3, dtype=torch.complex64), torch.zeros(4, 3), TypeError, "`clean`.*torch.complex64"),
        ([1.0], torch.zeros(1), TypeError, "`clean` to be a tensor.*got list"),
        (torch.zeros(1), [[1.0]], TypeError, "`noisy` to be a tensor.*got list"),
        (torch.tensor(1.0), torch.tensor(1.0), ValueError, "`clean`.*got a scalar"),
        (torch.zeros(4, 3), [], ValueError, "at least one noise draw"),
        (torch.zeros(0, 3), torch.zeros(0, 3), ValueError, r"at least one sample.*\(0, 3\)"),
    ],
)
def test_bad_input(clean: torch.Tensor, noisy: torch.Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        output_sensitivity(clean, noisy)


# Equation 9


def test_loss_estimate_is_equation_9() -> None:
    assert loss_estimate(0.04, 0.25, 0.1, 10).item() == pytest.approx(math.sqrt(0.5 * 0.9 * 0.04 * 25))
    with_offset = loss_estimate(0.04, 0.25, 0.1, 10, offset=0.5).item()
    assert with_offset == pytest.approx(math.sqrt(0.5 * (0.9 * 0.04 * 25 + 0.5)))
    # The authors' example (their notebook): S = 6.08e8, E[x²] = 0.2648, σ = 0.1.
    assert loss_estimate(6.08e8, 0.2648, 0.1, 10).item() == pytest.approx(85_119, rel=1e-3)


def test_loss_estimate_takes_tensors_and_channels() -> None:
    sensitivity = torch.tensor([0.1, 0.4])
    torch.testing.assert_close(loss_estimate(4 * sensitivity, 0.2, 0.1, 5), 2 * loss_estimate(sensitivity, 0.2, 0.1, 5))
    per_channel = loss_estimate(0.1, torch.tensor([0.2, 0.8]), torch.tensor([0.1, 0.2]), 5)
    torch.testing.assert_close(per_channel, loss_estimate(0.1, 0.2, 0.1, 5))


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        ({"noise_std": 0.0}, "`noise_std`.*got 0.0"),
        ({"noise_std": -0.1}, "`noise_std`"),
        ({"noise_std": math.inf}, "`noise_std`"),
        ({"noise_std": torch.tensor([0.1, 0.0])}, "`noise_std`"),
        ({"num_outputs": 1}, "`num_outputs`.*2 or more.*got 1"),
        ({"num_outputs": 10.0}, "`num_outputs`.*got 10.0"),
        ({"sensitivity": -1.0}, "`sensitivity`.*0 or more"),
        ({"input_power": -1.0}, "`input_power`.*0 or more"),
        ({"offset": -10.0}, "`offset`.*got"),
    ],
)
def test_loss_estimate_refuses(overrides: dict[str, object], match: str) -> None:
    arguments = {"sensitivity": 0.04, "input_power": 0.25, "noise_std": 0.1, "num_outputs": 10, **overrides}
    with pytest.raises(ValueError, match=match):
        loss_estimate(**arguments)
