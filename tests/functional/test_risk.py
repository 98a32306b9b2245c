from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity import RiskEstimate
from lightning_sensitivity.functional import risk as R
from lightning_sensitivity.functional import sums as RS
from lightning_sensitivity.functional import tensors
from lightning_sensitivity.functional.tasks import TASKS
from tests.helpers import at_unchanged, risk_estimate

MULTICLASS = TASKS["multiclass"]


def example(task: str = "multiclass", num_samples: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of the network and of a twin for unseen samples; outputs and labels of training samples."""
    g, k = torch.Generator().manual_seed(seed), {"multiclass": 4, "binary": 1, "multilabel": 3}[task]
    unseen, twin, train = 3 * torch.randn(3, num_samples, k, generator=g, dtype=torch.float64)
    highest, shape = (k, (num_samples,)) if task == "multiclass" else (2, (num_samples, k))
    return unseen, twin, train, torch.randint(0, highest, shape, generator=g)


def labels_as_probabilities(targets: Tensor, task: str) -> Tensor:
    return torch.eye(4, dtype=torch.float64)[targets] if task == "multiclass" else targets.double()


def brier_score(p: Tensor, y: Tensor, task: str = "multiclass") -> Tensor:
    return (p - y).square().sum(1).mean() if task == "multiclass" else (p - y).square().mean()


def claim(p: Tensor, task: str = "multiclass") -> Tensor:
    """The expected score if labels were drawn from p."""
    if task == "multiclass":
        return sum((p[:, k] * (p - torch.eye(4)[k]).square().sum(1)).mean() for k in range(4))
    return (p * (1 - p).square() + (1 - p) * p.square()).mean()


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 30), max_size=3), task=st.sampled_from(sorted(TASKS)))
@settings(max_examples=30, deadline=None)
def test_the_terms_are_those_of_their_definitions_however_samples_are_split(seed: int, cuts: Any, task: str) -> None:
    outputs, holdout, training = example(task, seed=seed), 0, 0
    p, q, t = (TASKS[task].probabilities(each) for each in outputs[:3])
    score = brier_score(t, labels_as_probabilities(outputs[3], task), task)
    zero = torch.zeros_like(score)
    terms = claim(p, task), score - claim(t, task), zero, brier_score(p, q, task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_CHUNK", 40)  # elements that are widened at a time
        for unseen, twin, train, targets in zip(*(each.tensor_split(sorted(cuts)) for each in outputs), strict=True):
            holdout = holdout + RS.unseen_sums(unseen, [twin], TASKS[task])
            training = training + RS.label_sums(train, targets, TASKS[task])
    whole = at_unchanged(R.risk_terms(RS.UnseenSums(*holdout.T), RS.LabelSums(*training.T)))
    for actual in (risk_estimate(*outputs, task=task), whole):
        torch.testing.assert_close(actual, R.RiskTerms(sum(terms), *terms))


def test_the_variance_of_simulated_twins_is_scaled_and_falls_with_the_number_of_training_samples() -> None:
    unseen, twin, train, targets = example()
    p, q = (MULTICLASS.probabilities(outputs) for outputs in (unseen, twin / 3))  # this twin claims more
    simulated = risk_estimate(unseen, twin / 3, train, targets, strength=0.5)
    torch.testing.assert_close(simulated.variance, 4 * brier_score(p, q) * claim(p) / claim(q))
    simulated, real = (risk_estimate(unseen, 3 * twin, train, targets, strength=s) for s in (1.0, None))
    assert simulated.variance == real.variance
    factors = [R.variance_factor(n, 10_000) for n in (1, 2_000, 10**8)]
    assert factors == pytest.approx([1, 0.05**0.5, 1e-3])
    half = risk_estimate(unseen, 3 * twin, train, targets, strength=1.0, factor=0.5)
    assert half.variance == simulated.variance / 2 and half.claim == simulated.claim


def test_beside_simulated_twins_underconfidence_counts_half_and_certainty_on_training_samples_is_memory() -> None:
    unseen, twin, train, _ = example()
    for scale, targets, factor in ((3, train.argmin(1), 1), (1 / 3, train.argmax(1), 0.5)):
        real, simulated = (risk_estimate(unseen, twin, scale * train, targets, strength=s) for s in (None, 1.0))
        assert (real.overconfidence > 0) == (simulated.memorization > 0) == (scale == 3)
        torch.testing.assert_close(simulated.overconfidence, factor * real.overconfidence)
        memory = claim(MULTICLASS.probabilities(unseen)) - claim(MULTICLASS.probabilities(scale * train))
        torch.testing.assert_close(simulated.memorization, memory.clamp(min=0))
        assert simulated.estimate == torch.stack(simulated[1:]).sum()


def test_twins_count_by_their_mean_beside_outputs_computed_alike() -> None:
    unseen, *others = 3 * torch.randn(4, 30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    compared, *twins = others
    sums = RS.UnseenSums(*RS.unseen_sums(unseen, twins, MULTICLASS, compared)[RS.UNCHANGED])
    p, q, *ps = (MULTICLASS.probabilities(outputs) for outputs in (unseen, compared, *twins))
    expected = [claim(p), sum(brier_score(q, each) for each in ps) / 2, claim(q), sum(map(claim, ps)) / 2]
    torch.testing.assert_close(torch.stack(sums[1:5]), 30 * torch.stack(expected))
    twins[0][3, 0] = torch.nan
    rows = RS.unseen_sums(unseen, twins, MULTICLASS)
    assert {tuple(row[::5].tolist()) for row in rows} == {(29.5, 0.5)}  # of one of two twins


@pytest.mark.parametrize("shape", [(6,), (6, 3), (6, 3, 5)])
def test_a_network_that_has_not_moved_has_no_variance(shape: tuple[int, ...]) -> None:
    g, task = torch.Generator().manual_seed(0), "binary" if len(shape) == 1 else "multiclass"
    x, labels = torch.randn(shape, generator=g), torch.randint(2, shape[:1] + shape[2:], generator=g)
    terms = risk_estimate(x, x, x, labels, task=task, strength=0.5)
    assert terms.variance == 0 and terms.estimate.isfinite()
    certain = risk_estimate(1e4 * x, 1e4 * x, x, labels, task=task, strength=0.5)  # with a claim of 0
    assert certain.variance == 0 and certain.estimate.isfinite()


def test_sums_at_a_temperature_are_those_of_logits_divided_by_it() -> None:
    unseen, twin, train, targets = example()
    for place, temperature in enumerate(RS.TEMPERATURES):
        shrunk, shrunk_twin, shrunk_train = (each / temperature for each in (unseen, twin, train))
        for rows, others in (
            (RS.unseen_sums(unseen, [twin], MULTICLASS), RS.unseen_sums(shrunk, [shrunk_twin], MULTICLASS)),
            (RS.label_sums(train, targets, MULTICLASS), RS.label_sums(shrunk_train, targets, MULTICLASS)),
        ):
            torch.testing.assert_close(rows[place], others[RS.UNCHANGED])


def test_the_criterion_is_the_lowest_estimate_the_training_score_or_between() -> None:
    estimates, training = torch.tensor([0.9, 0.6, 0.8]), torch.tensor(0.2)
    found = [float(R.criterion(estimates, training, weight)) for weight in (0.0, 0.7, 1.0)]
    assert found == pytest.approx([0.2, 0.48, 0.6])


def test_beside_labels_the_estimate_counts_as_a_number_of_them() -> None:
    estimates, rows = torch.tensor([0.9, 0.6]), torch.tensor([[10.0, 3.0, 0, 0], [10.0, 2.0, 0, 0]])
    labels = RS.LabelSums(*rows.T)
    assert float(R.criterion_with_labels(estimates, labels, 40)) == pytest.approx((2 + 40 * 0.6) / 50)
    assert float(R.criterion_with_labels(torch.full((2,), torch.nan), labels, 0)) == pytest.approx(0.2)
    assert R.combine_with_labels(estimates, labels, 40).tolist() == pytest.approx([39 / 50, 26 / 50])


def test_bad_input_is_refused() -> None:
    x = torch.zeros(2, 3)
    for refused in (
        lambda: R.variance_factor(0, 10),
        lambda: R.variance_factor(10, -1),
        lambda: RiskEstimate("multiclass", strength=0.0),
        lambda: RS.unseen_sums(x, [], MULTICLASS),
        lambda: RS.unseen_sums(x, [x[:1]], MULTICLASS),
    ):
        with pytest.raises(ValueError, match="Expected `"):
            refused()
