import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.functional import loss_estimate, output_sensitivity
from lightning_sensitivity.functional import sensitivity as S


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def estimate(clean: Tensor, noisy: Any) -> S.SensitivityEstimate:
    return S.sensitivity_from_rows(S.sensitivity_rows(clean, noisy))


def close(actual: Any, expected: Any, rtol: float = 1e-7, atol: float = 0.0) -> None:
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def clustered_mean(values: list[list[float]]) -> tuple[float, float]:
    """The mean over the values of all samples, and its standard error, clustered by sample."""
    total, n = sum(map(len, values)), len(values)
    mean = sum(map(sum, values)) / total
    residuals = [sum(value - mean for value in sample) for sample in values]
    return mean, math.sqrt(n / (n - 1) * sum(z**2 for z in residuals)) / total


SHAPES = st.sampled_from([(), (1,), (4,), (3, 2), (2, 3, 2)])  # behind N


@given(data=st.data(), shape=SHAPES, num_samples=st.integers(2, 12), num_draws=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_plain_loops(data: Any, shape: Any, num_samples: int, num_draws: int) -> None:
    scale, num_outputs = 10.0 ** data.draw(st.integers(-7, 5)), shape[0] if shape else 1
    clean, *draws = scale * randn(num_draws + 1, num_samples, *shape, seed=data.draw(st.integers(0, 2**31)))
    changes = [[(draw[i] - clean[i]).reshape(num_outputs, -1).T.tolist() for draw in draws] for i in range(num_samples)]
    positions = [[position for draw in sample for position in draw] for sample in changes]
    means = [[sum(position) / num_outputs for position in sample] for sample in positions]
    squares = [[sum(change**2 for change in position) / num_outputs for position in sample] for sample in positions]
    center = sum(map(sum, means)) / sum(map(len, means))
    deviations = [[(mean - center) ** 2 for mean in sample] for sample in means]

    order = data.draw(st.permutations(range(num_samples)))
    cuts = sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=4)))  # some batches have no sample
    batches = torch.tensor(order).tensor_split(cuts)
    rows = torch.cat([S.sensitivity_rows(clean[batch], (draw[batch] for draw in draws)) for batch in batches])
    actual, atol = S.sensitivity_from_rows(rows), 1e-12 * scale**2
    close(torch.stack(actual[:2]), clustered_mean(deviations), 1e-6, atol)
    close(torch.stack(actual[2:4]), clustered_mean(squares))
    close(actual.class_mean_share, sum(mean**2 for sample in means for mean in sample) / sum(map(sum, squares)))
    assert actual[5:] == (num_samples, 0, num_outputs)
    close(S.squared_deviations(rows), [sum(deviations[i]) for i in order], 1e-6, atol)


@given(seed=st.integers(0, 2**31), num_outputs=st.integers(1, 6), std=st.sampled_from([1e-2, 1.0, 1e2]))
@settings(max_examples=30, deadline=None)
def test_a_linear_model_has_the_sensitivity_of_its_weights(seed: int, num_outputs: int, std: float) -> None:
    """S = σ² ‖mean_k W_k‖², and σ² mean_k ‖W_k‖² without the class average; exact where the noise is white."""
    weight, x, raw = randn(num_outputs, 5, seed=seed), randn(40, 5), randn(40, 5, seed=seed + 1)
    noise = std * math.sqrt(40) * torch.linalg.qr(raw - raw.mean(0)).Q  # of mean 0 and covariance σ² I
    actual = estimate(x @ weight.T, (x + noise) @ weight.T)
    close(actual.sensitivity, std**2 * weight.mean(0).square().sum())
    close(actual.mean_square, std**2 * weight.square().sum(1).mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_outputs_are_widened_before_they_are_subtracted_and_leave_their_graph(dtype: torch.dtype) -> None:
    clean, noisy = (100 + randn(2, 64, 10)).to(dtype).requires_grad_()
    actual = output_sensitivity(clean, noisy)
    close(actual, (noisy.double() - clean.double()).mean(1).var(correction=0).detach(), 1e-9)
    assert not actual.requires_grad


def test_samples_count_by_their_positions_and_a_common_change_does_not_drown_the_variance() -> None:
    pairs = [randn(2, 20, 3, length) for length in (1, 4, 9)]
    rows = torch.cat([S.sensitivity_rows(clean, noisy + 1e4) for clean, noisy in pairs])
    changes = torch.cat([(noisy - clean).mean(1).flatten() for clean, noisy in pairs])
    close(S.sensitivity_from_rows(rows).sensitivity, changes.var(correction=0))


@pytest.mark.parametrize(("num_draws", "num_positions"), [(1, 1), (16, 1), (1, 25)])
def test_error_bars_hold_where_the_changes_of_a_sample_are_correlated(num_draws: int, num_positions: int) -> None:
    z, truth = [], (1.5**5 - 0.5**5) / 5
    for seed in range(200):  # samples differ in gain, and all draws and positions of a sample share it
        gain = (torch.rand(300, 1, 1, generator=torch.Generator().manual_seed(seed)) + 0.5) ** 2
        draws = gain * randn(num_draws, 300, 1, num_positions, seed=seed)
        actual = estimate(torch.zeros_like(draws[0]), draws.unbind())
        z.append(float((actual.sensitivity - truth) / actual.stderr))
    assert 0.90 <= sum(abs(each) <= 1.96 for each in z) / len(z) <= 0.99


def test_there_is_no_error_bar_below_two_samples_and_no_value_without_one() -> None:
    for num_samples in (0, 1):
        actual = estimate(torch.zeros(num_samples, 2, 9), randn(num_samples, 2, 9))
        assert [bool(value.isnan()) for value in actual[:4]] == [num_samples == 0, True] * 2
        assert not S.diagnostics(actual)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [[0], [1], [0, 1]])
def test_samples_that_are_not_finite_cost_themselves_alone(value: float, where: list[int]) -> None:
    outputs = randn(2, 20, 3, 4)
    expected = output_sensitivity(*outputs[:, 3:])
    outputs[where, :3, 1, 2] = value
    with pytest.warns(UserWarning, match="^3 samples gave nan or inf") as warnings:
        close(output_sensitivity(*outputs), expected)
    assert warnings[0].filename == __file__  # the line that the user wrote
    assert S.squared_deviations(S.sensitivity_rows(*outputs)).isnan().tolist() == [True] * 3 + [False] * 17


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_class_average_that_holds_nothing_of_the_change_is_said(dtype: torch.dtype) -> None:
    logits = 3 * randn(2, 64, 10)
    for outputs in (logits.softmax(2).to(dtype), (logits - logits.mean(2, keepdim=True)).to(dtype)):
        with pytest.warns(UserWarning, match="class average .*`per_output=True`"):
            output_sensitivity(*outputs)
        assert output_sensitivity(*outputs, per_output=True) > 0  # without a warning, as are these
    assert output_sensitivity(*logits.to(dtype)) > 0 and output_sensitivity(*logits[..., :1].to(dtype)) > 0
    with pytest.warns(UserWarning, match="No output changed"):
        assert output_sensitivity(logits[0], logits[0]) == 0


X = torch.zeros(4, 3)


@pytest.mark.parametrize(("clean", "noisy", "error", "match"), [
    (X, X[:, :2], ValueError, r"`clean`, \(4, 3\), but got \(4, 2\)"),
    (X.to(torch.complex64), X, TypeError, "`clean`.*floating.*torch.complex64"),
    (X.sum(), X.sum(), ValueError, r"`clean`.*\(N, K, ...\).*got \(\)"),
    (X, [], ValueError, "`noisy`.* one noise draw"),
    (X[:0], X[:0], ValueError, r"`clean`.* one sample.*\(0, 3\)"),
])  # fmt: skip
def test_bad_outputs_are_refused(clean: Any, noisy: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        output_sensitivity(clean, noisy)


def test_the_loss_estimate_is_equation_9() -> None:
    close(loss_estimate(0.04, 0.25, 0.1, 10, offset=0.5), math.sqrt(0.5 * (0.9 * 0.04 * 25 + 0.5)))
    close(loss_estimate(6.08e8, 0.2648, 0.1, 10), 85_119, 1e-3)  # the authors' example, in their notebook
    channels = loss_estimate(0.1, torch.tensor([0.2, 0.9]), torch.tensor([0.1, 0.2]), 5)
    close(channels, loss_estimate(0.1, (20 + 22.5) / 2, 1.0, 5), 1e-6)
    for name, value in [("noise_std", math.nan), ("noise_std", 0.0), ("num_outputs", 1), ("sensitivity", -0.1)]:
        with pytest.raises(ValueError, match=f"`{name}`"):
            loss_estimate(**{"sensitivity": 0.1, "input_power": 0.2, "noise_std": 0.1, "num_outputs": 10, name: value})
