import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.functional import loss_estimate, output_sensitivity
from lightning_sensitivity.functional.sensitivity import (
    doubts,
    has_masked,
    sensitivity_from_rows,
    sensitivity_rows,
    squared_deviations,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def close(actual: Any, expected: Any, rtol: float = 1e-9, atol: float = 0.0) -> None:
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol, equal_nan=True)


def plain_loops(clean: Tensor, draws: list[Tensor]) -> list[tuple[list[float], list[float]]]:
    """Of each sample, its class-averaged changes, and the mean squares of its single outputs' changes."""
    samples = []
    for i in range(len(clean)):
        averages, squares = [], []
        for draw in draws:
            change = (draw[i].double() - clean[i].double()).reshape(clean.shape[1] if clean.ndim > 1 else 1, -1)
            for position in change.T.tolist():
                averages.append(sum(position) / len(position))
                squares.append(sum(each**2 for each in position) / len(position))
        samples.append((averages, squares))
    return samples


def by_definition(values: list[list[float]]) -> tuple[float, float, list[float]]:
    """The mean over all samples' values, its error clustered by sample, and each sample's mean."""
    total, n = sum(map(len, values)), len(values)
    mean = sum(map(sum, values)) / total
    residuals = [sum(each - mean for each in sample) for sample in values]
    stderr = math.sqrt(n / (n - 1) * sum(z**2 for z in residuals)) / total if n > 1 else math.nan
    return mean, stderr, [sum(sample) / len(sample) for sample in values]


SHAPES = st.sampled_from([(), (1,), (4,), (3, 2), (2, 3, 2)])  # behind N


@given(data=st.data(), shape=SHAPES, num_samples=st.integers(2, 12), num_draws=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_plain_loops(data: Any, shape: Any, num_samples: int, num_draws: int) -> None:
    scale = 10.0 ** data.draw(st.integers(-7, 5))
    atol = 1e-12 * scale**2
    g = generator(data.draw(st.integers(0, 2**31)))
    clean, *draws = scale * torch.randn(num_draws + 1, num_samples, *shape, generator=g, dtype=torch.float64)
    samples = plain_loops(clean, draws)
    averages = [each for sample, _ in samples for each in sample]
    centre = sum(averages) / len(averages)
    deviations = by_definition([[(e - centre) ** 2 for e in sample] for sample, _ in samples])
    squares = by_definition([each for _, each in samples])

    order = torch.randperm(num_samples, generator=g)
    cuts = torch.tensor(sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=4))), dtype=torch.long)
    chunks = order.tensor_split(cuts)  # some of them without a sample
    rows = torch.cat([sensitivity_rows(clean[chunk], (draw[chunk] for draw in draws)) for chunk in chunks])
    estimate = sensitivity_from_rows(rows)
    assert rows.shape == (num_samples, 5) and rows.dtype == torch.float64
    close(estimate.sensitivity, deviations[0], 1e-7, atol)
    close(estimate.stderr, deviations[1], 1e-6, atol)
    close(estimate.mean_square, squares[0])
    close(estimate.mean_square_stderr, squares[1], 1e-7, atol)
    close(estimate.class_mean_share, sum(e**2 for e in averages) / sum(map(sum, (each for _, each in samples))))
    assert (estimate.num_samples, estimate.num_non_finite) == (num_samples, 0)
    close(squared_deviations(rows) / rows[:, 0], [deviations[2][i] for i in order], 1e-6, atol)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_are_widened_before_they_are_subtracted(dtype: torch.dtype) -> None:
    clean, noisy = (100 + torch.randn(2, 64, 10, generator=generator())).to(dtype)
    close(output_sensitivity(clean, noisy), (noisy.double() - clean.double()).mean(1).var(correction=0))


def test_samples_count_by_their_positions_and_a_common_change_does_not_drown_the_variance() -> None:
    pairs = [torch.randn(2, 20, 3, length, generator=generator(length), dtype=torch.float64) for length in (1, 4, 9)]
    rows = torch.cat([sensitivity_rows(clean, noisy + 1e4) for clean, noisy in pairs])
    changes = torch.cat([(noisy - clean).mean(1).flatten() for clean, noisy in pairs])
    close(sensitivity_from_rows(rows).sensitivity, changes.var(correction=0), 1e-7)


# Error bars. A linear model's sensitivity is known: σ² ‖mean over k of W_k‖².


def coverage(estimates: list[tuple[Tensor, Tensor]], truth: float) -> float:
    return sum(bool(abs(value - truth) <= 1.96 * error) for value, error in estimates) / len(estimates)


@pytest.mark.parametrize("num_draws", [1, 8])
def test_a_linear_model_has_the_sensitivity_that_is_known_and_lies_within_its_error_bars(num_draws: int) -> None:
    g, sigma = generator(1), 0.1
    weight = torch.randn(10, 8, generator=g, dtype=torch.float64)
    truth = sigma**2 * weight.mean(0).square().sum().item()
    truth_each = sigma**2 * weight.square().sum(1).mean().item()
    found = []
    for _ in range(200):
        x = torch.rand(500, 8, generator=g, dtype=torch.float64)
        noise = sigma * torch.randn(num_draws, *x.shape, generator=g, dtype=torch.float64)
        found.append(sensitivity_from_rows(sensitivity_rows(x @ weight.T, ((x + e) @ weight.T for e in noise))))
    close(torch.stack([each.sensitivity for each in found]).mean(), truth, 0.01)
    assert 0.90 <= coverage([(each.sensitivity, each.stderr) for each in found], truth) <= 0.99
    assert 0.90 <= coverage([(each.mean_square, each.mean_square_stderr) for each in found], truth_each) <= 0.99


@pytest.mark.parametrize(("num_draws", "num_positions"), [(16, 1), (1, 25)])
def test_error_bars_are_right_where_a_samples_changes_are_correlated(num_draws: int, num_positions: int) -> None:
    # Samples differ in gain; draws and positions of one sample share it.
    g = generator(2)
    found, naive = [], []
    for _ in range(200):
        gain = (torch.rand(300, 1, 1, generator=g, dtype=torch.float64) + 0.5) ** 2
        draws = gain * torch.randn(num_draws, 300, 1, num_positions, generator=g, dtype=torch.float64)
        estimate = sensitivity_from_rows(sensitivity_rows(torch.zeros_like(draws[0]), draws.unbind()))
        found.append((estimate.sensitivity, estimate.stderr))
        naive.append((draws.square().mean(), (draws.square().var() / draws.numel()).sqrt()))
    truth = (1.5**5 - 0.5**5) / 5  # E[gain²]
    assert 0.90 <= coverage(found, truth) <= 0.99
    assert coverage(naive, truth) < 0.90  # counted as independent


@pytest.mark.parametrize(("num_samples", "value_is_nan"), [(0, True), (1, False)])
def test_there_is_no_error_bar_below_two_samples(num_samples: int, value_is_nan: bool) -> None:
    change = torch.randn(num_samples, 2, 9, generator=generator())
    estimate = sensitivity_from_rows(sensitivity_rows(torch.zeros_like(change), change))
    assert bool(estimate.sensitivity.isnan()) == value_is_nan
    assert estimate.stderr.isnan() and estimate.mean_square_stderr.isnan()
    assert not doubts(estimate, 2)


# What is left out, and what is warned of


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["clean", "noisy"])
def test_samples_that_are_not_finite_cost_themselves_alone(value: float, where: str) -> None:
    pair = dict(zip(("clean", "noisy"), torch.randn(2, 20, 3, 4, generator=generator()), strict=True))
    rest = output_sensitivity(pair["clean"][3:], pair["noisy"][3:])
    pair[where][:3, 1, 2] = value
    with pytest.warns(UserWarning, match="3 samples gave nan or inf and were left out; 17 remain"):
        close(output_sensitivity(**pair), rest)
    per_sample = squared_deviations(sensitivity_rows(**pair))
    assert per_sample.isnan().tolist() == [True] * 3 + [False] * 17


def test_masked_outputs_have_not_changed_and_do_not_count_in_the_average() -> None:
    clean, noisy = torch.randn(2, 6, 4, 2, generator=generator(), dtype=torch.float64)
    masked = torch.rand(6, 4, 2, generator=generator(1)) < 0.4
    masked[0] = True  # a sample without any
    clean, noisy = (each.masked_fill(masked, -math.inf) for each in (clean, noisy))
    changes = [(noisy - clean)[i, :, j][~masked[i, :, j]].tolist() for i in range(6) for j in range(2)]
    averages = torch.tensor([sum(each) / max(1, len(each)) for each in changes], dtype=torch.float64)
    close(output_sensitivity(clean, noisy), averages.var(correction=0))
    noisy[1] = -math.inf  # masked in one of both: that is a change
    with pytest.warns(UserWarning, match="1 samples gave nan or inf"):
        output_sensitivity(clean, noisy)
    assert has_masked(clean) and not has_masked(clean.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_class_average_that_holds_nothing_of_the_change_is_said(dtype: torch.dtype) -> None:
    clean, noisy = (3 * torch.randn(2, 64, 10, generator=generator())).double()
    for pair in ((clean.softmax(1), noisy.softmax(1)), (clean - clean.mean(1, True), noisy - noisy.mean(1, True))):
        clean_outputs, noisy_outputs = (each.to(dtype) for each in pair)
        with pytest.warns(UserWarning, match="class average holds .* of the outputs' change .*`per_output=True`"):
            output_sensitivity(clean_outputs, noisy_outputs)
        assert output_sensitivity(clean_outputs, noisy_outputs, per_output=True) > 0  # silent, as are these
    assert output_sensitivity(clean.to(dtype), noisy.to(dtype)) > 0
    assert output_sensitivity(clean[:, :1].to(dtype), noisy[:, :1].to(dtype)) > 0


# What it costs


def test_draws_are_consumed_one_at_a_time_and_no_graph_is_held() -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def draw() -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        output = torch.randn(4, 3, requires_grad=True)
        alive.append(weakref.ref(output))
        return output

    assert not output_sensitivity(torch.zeros(4, 3, requires_grad=True), (draw() for _ in range(10))).requires_grad
    assert len(alive) == 10 and most <= 1  # the one that the loop variable still names


X = torch.zeros(4, 3)


@pytest.mark.parametrize(("clean", "noisy", "error", "match"), [
    (X, X[:, :2], ValueError, r"\(4, 2\) for noisy and \(4, 3\) for clean"),
    (X.long(), X, TypeError, "`clean`.*floating.*torch.int64"),
    (X.to(torch.complex64), X, TypeError, "`clean`.*torch.complex64"),
    (X, [[1.0]], TypeError, "`noisy` to be a tensor.*got list"),
    (X.sum(), X.sum(), ValueError, "`clean`.*got a scalar"),
    (X[:, :0], X[:, :0], ValueError, r"one output or more in dimension 1, but got \(4, 0\)"),
    (X, [], ValueError, "at least one noise draw"),
    (X[:0], X[:0], ValueError, r"at least one sample.*\(0, 3\)"),
])  # fmt: skip
def test_bad_input(clean: Any, noisy: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        output_sensitivity(clean, noisy)


# Equation 9


def test_loss_estimate_is_equation_9() -> None:
    close(loss_estimate(0.04, 0.25, 0.1, 10), math.sqrt(0.5 * 0.9 * 0.04 * 25))
    close(loss_estimate(0.04, 0.25, 0.1, 10, offset=0.5), math.sqrt(0.5 * (0.9 * 0.04 * 25 + 0.5)))
    # The authors' example (their notebook): S = 6.08e8, E[x²] = 0.2648, σ = 0.1.
    close(loss_estimate(6.08e8, 0.2648, 0.1, 10), 85_119, 1e-3)
    sensitivity = torch.tensor([0.1, 0.4])
    close(loss_estimate(4 * sensitivity, 0.2, 0.1, 5), 2 * loss_estimate(sensitivity, 0.2, 0.1, 5), 1e-6)
    channels = loss_estimate(0.1, torch.tensor([0.2, 0.9]), torch.tensor([0.1, 0.2]), 5)
    close(channels, loss_estimate(0.1, (20 + 22.5) / 2, 1.0, 5), 1e-6)


@pytest.mark.parametrize(("overrides", "match"), [
    *(({"noise_std": value}, "`noise_std`") for value in (0.0, -0.1, math.inf, math.nan, torch.tensor([0.1, 0.0]))),
    *(({"num_outputs": value}, f"`num_outputs`.*2 or more.*got {value}") for value in (1, 10.0, True)),
    *(({name: -0.1}, f"`{name}` to be 0 or more") for name in ("sensitivity", "input_power", "offset")),
])  # fmt: skip
def test_bad_input_to_the_loss_estimate(overrides: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        loss_estimate(**{"sensitivity": 0.1, "input_power": 0.2, "noise_std": 0.1, "num_outputs": 10, **overrides})
