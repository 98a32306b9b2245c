import math
import weakref
from typing import Any

import numpy as np
import pytest
import torch

from lightning_sensitivity.functional import loss_estimate, output_sensitivity, risk_estimate
from tests.helpers import changes

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


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e5])
def test_holds_over_the_range_that_occurs(scale: float) -> None:
    clean, noisy = scale * torch.randn(2, 300, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(
        output_sensitivity(clean, noisy), changes(clean, noisy).var(correction=0), rtol=1e-12, atol=0
    )


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
    with pytest.raises(ValueError, match="got probabilities.*rows all sum to 1.*Pass the logits"):
        output_sensitivity(clean.softmax(1), noisy.softmax(1))
    assert output_sensitivity(clean.softmax(1), noisy.softmax(1), per_output=True) > 0
    assert output_sensitivity(clean, noisy) > 0
    assert output_sensitivity(clean.sigmoid(), noisy.sigmoid()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("change", [0.0, 1e-7, 0.01])
def test_probabilities_are_refused_however_little_they_change(dtype: torch.dtype, change: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for logits in (60 * torch.eye(10), 0.1 * torch.randn(64, 10, generator=generator)):
        noisy = logits + change * torch.randn(logits.shape, generator=generator)
        with pytest.raises(ValueError, match="Pass the logits"):
            output_sensitivity(logits.softmax(1).to(dtype), noisy.softmax(1).to(dtype))


def test_other_rows_of_a_constant_sum_warn_and_do_not_raise() -> None:
    # Centred logits, and what weight decay makes of any: cross-entropy does not hold on to the class-mean.
    generator = torch.Generator().manual_seed(0)
    clean, noisy = 10 * torch.randn(2, 64, 10, generator=generator)
    with pytest.warns(UserWarning, match="rows of the outputs all sum to the same value.*`per_output=True`"):
        assert output_sensitivity(clean - clean.mean(1, keepdim=True), noisy - noisy.mean(1, keepdim=True)) < 1e-9
    with pytest.warns(
        UserWarning, match="rows of the outputs all sum to the same value"
    ):  # to 1, but not probabilities
        output_sensitivity(clean - clean.mean(1, keepdim=True) + 0.1, noisy - noisy.mean(1, keepdim=True) + 0.1)
    flat = 1 + 1e-7 * clean.double()  # a real, small change in float64
    assert output_sensitivity(flat, flat + 1e-8 * noisy.double()) > 0
    mean = 1e-3 * torch.randn(64, 1, generator=generator)
    assert output_sensitivity(clean - clean.mean(1, keepdim=True) + mean, noisy) > 0  # silent
    assert output_sensitivity(torch.zeros(8, 4), torch.zeros(8, 4)) == 0  # a head that starts at 0: silent


def test_the_result_holds_on_to_no_graph() -> None:
    clean = torch.rand(4, 3, requires_grad=True)
    assert not output_sensitivity(2 * clean, 3 * clean).requires_grad


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
        (torch.zeros(3, 0), torch.zeros(3, 0), ValueError, r"one output or more in dimension 1, but got \(3, 0\)"),
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


# The risk estimate, whose terms are tested with ``risk``


def test_the_risk_estimate_of_batches_in_one_call() -> None:
    g = torch.Generator().manual_seed(0)
    outputs, twin_outputs, train_outputs = (torch.randn(20, 3, generator=g) for _ in range(3))
    targets = torch.randint(0, 3, (20,), generator=g)
    estimate = risk_estimate(outputs, twin_outputs, train_outputs, targets)
    p, p_twin, p_train = (values.double().softmax(1) for values in (outputs, twin_outputs, train_outputs))
    torch.testing.assert_close(
        estimate.training, (p_train - torch.eye(3, dtype=torch.float64)[targets]).square().sum(1).mean()
    )
    torch.testing.assert_close(estimate.uncertainty, p_train.square().sum(1).mean() - p.square().sum(1).mean())
    torch.testing.assert_close(estimate.variance, (p - p_twin).square().sum(1).mean())
    torch.testing.assert_close(estimate.risk, sum(estimate[1:]))


def test_the_uncertainty_of_a_binary_task_is_gini_impurity() -> None:
    g = torch.Generator().manual_seed(0)
    outputs, train_outputs = torch.randn(20, generator=g), 3 * torch.randn(20, generator=g)
    estimate = risk_estimate(outputs, outputs, train_outputs, torch.arange(20) % 2, task="binary")
    p, p_train = outputs.double().sigmoid(), train_outputs.double().sigmoid()
    torch.testing.assert_close(estimate.uncertainty, (p * (1 - p)).mean() - (p_train * (1 - p_train)).mean())


def test_a_network_that_is_its_own_twin_and_knows_its_training_samples_has_no_risk_but_its_uncertainty() -> None:
    certain, labels = torch.tensor([[50.0, 0.0], [0.0, 50.0]]), torch.tensor([0, 1])
    unseen = torch.zeros(4, 2)
    estimate = risk_estimate(unseen, unseen, certain, labels)
    assert float(estimate.risk) == pytest.approx(0.5)  # the Brier score of a coin
    assert float(risk_estimate(certain, certain, certain, labels).risk) == pytest.approx(0.0, abs=1e-9)


def test_the_risk_estimate_of_a_linear_regression_is_mallows() -> None:
    """Training error plus twice the variance, over many training sets: the risk of ordinary least squares."""
    rng = np.random.default_rng(0)
    n, p = 40, 10
    x, weights = rng.normal(size=(n, p)), rng.normal(size=p)
    hat = x @ np.linalg.pinv(x)
    estimates = []
    for _ in range(2000):
        y, y_twin = (x @ weights + rng.normal(size=n) for _ in range(2))
        fitted, twin, targets = (torch.tensor(values) for values in (hat @ y, hat @ y_twin, y))
        estimates.append(float(risk_estimate(fitted, twin, fitted, targets, task="regression").risk))
    assert np.mean(estimates) == pytest.approx(1 + p / n, rel=0.02)  # noise, and its share in each weight


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2, 3), torch.zeros(2).long()), "the shape of `outputs`"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2).long()), "as many outputs"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2,), 3)), "labels from 0 to 2"),
        (
            (torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(2, 3), torch.zeros(2).long()),
            "`outputs` to hold at least",
        ),
        (
            (torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long(), "ranking"),
            "`task` to be one",
        ),
        ((torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), torch.full((2,), -100)), "a label that counts"),
        ((torch.zeros(2, 2), torch.zeros(2, 2), torch.eye(2), torch.arange(2)), "got probabilities"),
        ((torch.zeros(2, 3).long(), torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2).long()), "floating"),
    ],
)
def test_bad_input_to_the_risk_estimate(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        risk_estimate(*arguments)
