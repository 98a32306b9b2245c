import math
import re
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


def close(actual: Any, expected: Any, rtol: float = 1e-7, atol: float = 0.0) -> None:
    actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def clustered_mean(values: list[list[float]]) -> tuple[float, float]:
    """The mean over the values of all samples, and its standard error, clustered by sample."""
    total, n = sum(map(len, values)), len(values)
    mean = sum(map(sum, values)) / total
    squares = sum(sum(value - mean for value in sample) ** 2 for sample in values)
    return mean, math.sqrt(n / (n - 1) * squares) / total


SHAPES = st.sampled_from([(), (1,), (4,), (3, 2), (2, 3, 2)])  # behind N


@given(data=st.data(), shape=SHAPES, num_samples=st.integers(2, 12), num_draws=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_values_are_those_of_plain_loops(data: Any, shape: Any, num_samples: int, num_draws: int) -> None:
    scale, num_outputs = 10.0 ** data.draw(st.integers(-7, 5)), shape[0] if shape else 1
    clean, *draws = scale * randn(num_draws + 1, num_samples, *shape, seed=data.draw(st.integers(0, 2**31)))
    common = data.draw(st.sampled_from([0.0, 1e4])) * scale  # a change of all samples, which the variance leaves out
    draws = [draw + common for draw in draws]
    changes = [[(draw[i] - clean[i]).reshape(num_outputs, -1).T.tolist() for draw in draws] for i in range(num_samples)]
    positions = [[position for draw in sample for position in draw] for sample in changes]
    means = [[sum(position) / num_outputs for position in sample] for sample in positions]
    squares = [[sum(change**2 for change in position) / num_outputs for position in sample] for sample in positions]
    center = sum(map(sum, means)) / sum(map(len, means))
    deviations = [[(mean - center) ** 2 for mean in sample] for sample in means]

    order = data.draw(st.permutations(range(num_samples)))
    cuts = sorted(data.draw(st.lists(st.integers(0, num_samples), max_size=4)))  # some batches have no sample
    batches = torch.tensor(order).tensor_split(cuts)
    rows = torch.cat([S.sensitivity_sums(clean[batch], [draw[batch] for draw in draws]) for batch in batches])
    actual, atol = S.sensitivity_from_sums(rows), 1e-12 * scale**2 + 1e-14 * common**2
    close(torch.stack(actual[:2]), clustered_mean(deviations), 1e-6, atol)
    close(torch.stack(S.sensitivity_from_sums(rows, per_output=True)[:2]), clustered_mean(squares))
    close(actual.class_mean_share, sum(mean**2 for sample in means for mean in sample) / sum(map(sum, squares)))
    assert actual[3:] == (num_samples, 0, num_outputs)
    close(S.squared_deviations(rows), [sum(deviations[i]) for i in order], 1e-6, atol)


def test_a_change_whose_mean_is_far_above_its_spread_keeps_its_variance() -> None:
    change = randn(500, 3)
    close(output_sensitivity(0 * change, change + 1e8), (change + 1e8).mean(1).var(correction=0), 1e-9)


@pytest.mark.parametrize(("num_draws", "num_positions"), [(1, 1), (16, 1), (1, 25)])
def test_error_bars_hold_where_the_changes_of_a_sample_are_correlated(num_draws: int, num_positions: int) -> None:
    z, truth = [], (1.5**5 - 0.5**5) / 5
    for seed in range(200):  # samples differ in gain, and all draws and positions of a sample share it
        gain = (torch.rand(300, 1, 1, generator=torch.Generator().manual_seed(seed)) + 0.5) ** 2
        draws = gain * randn(num_draws, 300, 1, num_positions, seed=seed)
        actual = S.sensitivity_from_sums(S.sensitivity_sums(torch.zeros_like(draws[0]), draws.unbind()))
        z.append(float((actual.value - truth) / actual.stderr))
    assert 0.90 <= sum(abs(each) <= 1.96 for each in z) / len(z) <= 0.99


def test_a_class_average_that_holds_nothing_of_the_change_is_said() -> None:
    logits = 3 * randn(2, 64, 10)
    for outputs in (logits.softmax(2).bfloat16(), logits - logits.mean(2, keepdim=True)):
        estimate = S.sensitivity_from_sums(S.sensitivity_sums(*outputs))
        message = S.diagnostics(estimate)["class-mean"]
        assert re.match("Only .* survives averaging over classes.*`per_output=True`", message)
        assert S.diagnostics(estimate, per_output=True) == {} and output_sensitivity(*outputs, per_output=True) > 0
    assert S.diagnostics(S.sensitivity_from_sums(S.sensitivity_sums(*logits[..., :1]))) == {}
    assert output_sensitivity(logits[0], logits[0]) == 0  # functions do not warn, the metric does


def test_bad_outputs_are_refused() -> None:
    x = torch.zeros(4, 3)
    bad: Any = [(x, x[:, :2]), (x.sum(), x.sum()), (x[:, :0], x[:, :0]), (x, []), (x[:0], x[:0]), (x, x.long())]
    for clean, noisy in bad:
        with pytest.raises((TypeError, ValueError), match="Expected `(clean|noisy)` to .*, but got"):
            output_sensitivity(clean, noisy)


def test_numbers_of_outputs_that_differ_are_refused() -> None:
    rows = torch.cat([S.sensitivity_sums(x, x + 1) for x in (torch.zeros(2, 3), torch.zeros(2, 4))])
    with pytest.raises(ValueError, match=r"the same number of outputs K .* but got 3 and 4\. If"):
        S.sensitivity_from_sums(rows)
    with pytest.raises(ValueError, match="`num_outputs` to be 2 or more, but got 1"):
        loss_estimate(0.04, 0.25, 0.1, num_outputs=1)


def test_the_loss_estimate_is_equation_9() -> None:
    close(loss_estimate(0.04, 0.25, 0.1, 10, offset=0.5), math.sqrt(0.5 * (0.9 * 0.04 * 25 + 0.5)))
    close(loss_estimate(6.08e8, 0.2648, 0.1, 10), 85_119, 1e-3)  # the authors' example, in their notebook
