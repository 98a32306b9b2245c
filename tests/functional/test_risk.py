from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.functional import risk as R
from lightning_sensitivity.functional import risk_estimate
from lightning_sensitivity.functional import tasks as T


def example(task: str = "multiclass", num_samples: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the network and of a twin for unseen samples; outputs and labels of training samples."""
    g, k = torch.Generator().manual_seed(seed), {"multiclass": 4, "binary": 1, "multilabel": 3}[task]
    unseen, twin, train = 3 * torch.randn(3, num_samples, k, generator=g, dtype=torch.float64)
    highest, shape = (k, (num_samples,)) if task == "multiclass" else (2, (num_samples, k))
    return unseen, twin, train, torch.randint(0, highest, shape, generator=g)


def brier_score(p: Tensor, y: Tensor, task: str = "multiclass") -> Tensor:
    return (p - y).square().sum(1).mean() if task == "multiclass" else (p - y).square().mean()


def claim(p: Tensor, task: str = "multiclass") -> Tensor:
    """The expected score if labels were drawn from p."""
    if task == "multiclass":
        return sum((p[:, k] * (p - torch.eye(4)[k]).square().sum(1)).mean() for k in range(4))
    return (p * (1 - p).square() + (1 - p) * p.square()).mean()


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 30), max_size=3), task=st.sampled_from(T.TASKS))
@settings(max_examples=30, deadline=None)
def test_the_terms_are_those_of_their_definitions_however_samples_are_split(seed: int, cuts: Any, task: str) -> None:
    tensors, holdout, training = example(task, seed=seed), 0, 0
    p, q, t = (T.probabilities(outputs, task) for outputs in tensors[:3])
    y = torch.eye(4)[tensors[3]] if task == "multiclass" else tensors[3]
    score, variance = brier_score(t, y, task), brier_score(p, q, task)
    terms = claim(p, task), score - claim(t, task), torch.zeros_like(score), variance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(T, "_CHUNK", 40)  # elements that are widened at a time
        for unseen, twin, train, targets in zip(*(each.tensor_split(sorted(cuts)) for each in tensors), strict=True):
            holdout = holdout + R.holdout_sums(unseen, twin, task)
            training = training + R.training_sums(train, targets, task)
    for actual in (risk_estimate(*tensors, task), R.risk_terms(holdout, training)):
        torch.testing.assert_close(actual, R.RiskTerms(sum(terms), *terms))


def test_the_variance_of_simulated_twins_is_scaled_and_falls_with_the_number_of_training_samples() -> None:
    unseen, twin, train, targets = example()
    p, q = (T.probabilities(outputs, "multiclass") for outputs in (unseen, twin / 3))  # this twin claims more
    simulated = risk_estimate(unseen, twin / 3, train, targets, strength=0.5)
    torch.testing.assert_close(simulated.variance, 4 * brier_score(p, q) * claim(p) / claim(q))
    simulated, real = (risk_estimate(unseen, 3 * twin, train, targets, strength=s) for s in (1.0, None))
    assert simulated.variance == real.variance
    factors = [R.variance_factor(n, 10_000) for n in (1, 2_000, 10**8)]
    assert factors == [1.0, pytest.approx(0.05**0.5), 1e-3]
    half = risk_estimate(unseen, 3 * twin, train, targets, strength=1.0, factor=0.5)
    assert half.variance == simulated.variance / 2 and half.claim == simulated.claim


def test_beside_simulated_twins_underconfidence_counts_half_and_certainty_on_training_samples_is_memory() -> None:
    unseen, twin, train, _ = example()
    for scale, targets, factor in ((3, train.argmin(1), 1), (1 / 3, train.argmax(1), 0.5)):
        real, simulated = (risk_estimate(unseen, twin, scale * train, targets, strength=s) for s in (None, 1.0))
        assert (real.overconfidence > 0) == (simulated.memorization > 0) == (scale == 3)
        torch.testing.assert_close(simulated.overconfidence, factor * real.overconfidence)
        memory = claim(T.probabilities(unseen, "multiclass")) - claim(T.probabilities(scale * train, "multiclass"))
        torch.testing.assert_close(simulated.memorization, memory.clamp(min=0))
        assert simulated.estimate == torch.stack(simulated[1:]).sum()


def test_bad_input_is_refused() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(2).long()
    bad: Any = [(x, x[:1], x, y), (x, x, x[:, 1:], y), (x[:0], x[:0], x, y), (x, x, x.exp() / 3, y), (x, x, x, y - 100)]
    for arguments in (*bad, (x, x, x, y, "regression")):
        with pytest.raises(ValueError, match="Expected `"):
            risk_estimate(*arguments)
