import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Dirichlet

from lightning_sensitivity.risk import holdout_sums, risk_terms, training_sums
from lightning_sensitivity.tasks import predictions


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def example(task: str, num_samples: int = 30, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs and labels of training samples; outputs of the network and of a twin for holdout samples."""
    g = generator(seed)
    k = {"multiclass": 4, "multilabel": 3, "binary": 1, "regression": 2}[task]
    train, holdout, twin = (3 * torch.randn(num_samples, k, generator=g) for _ in range(3))
    targets = {
        "multiclass": torch.randint(0, k, (num_samples,), generator=g),
        "regression": 5 + torch.randn(num_samples, k, generator=g),
    }.get(task, torch.randint(0, 2, (num_samples, k), generator=g))
    return train, targets, holdout, twin


@pytest.mark.parametrize("task", ["multiclass", "multilabel", "binary", "regression"])
def test_the_terms_are_those_of_the_definition(task: str) -> None:
    train, targets, holdout, twin = example(task)
    estimate = risk_terms(training_sums(train, targets, task) + holdout_sums(holdout, twin, task), task)
    p, q, other = (predictions(outputs, task).numpy() for outputs in (train, holdout, twin))
    y = np.eye(4)[targets] if task == "multiclass" else targets.double().numpy()
    over_outputs = np.sum if task == "multiclass" else np.mean
    assert float(estimate.training) == pytest.approx(over_outputs(((p - y) ** 2).mean(0)))
    assert float(estimate.variance) == pytest.approx(over_outputs(((q - other) ** 2).mean(0)))
    impurity = [over_outputs((values * (1 - values)).mean(0)) for values in (q, p)]
    expected = 0 if task == "regression" else impurity[0] - impurity[1]
    assert float(estimate.uncertainty) == pytest.approx(expected)
    assert float(estimate.risk) == pytest.approx(float(estimate.training + estimate.uncertainty + estimate.variance))


@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(1, 29), max_size=3, unique=True))
@settings(max_examples=30, deadline=None)
def test_it_does_not_matter_how_samples_are_split(seed: int, cuts: list[int]) -> None:
    train, targets, holdout, twin = example("multiclass", seed=seed)
    whole = training_sums(train, targets, "multiclass") + holdout_sums(holdout, twin, "multiclass")
    parts = [list(tensor.tensor_split(sorted(cuts))) for tensor in (train, targets, holdout, twin)]
    split = sum(
        training_sums(t, y, "multiclass") + holdout_sums(h, w, "multiclass") for t, y, h, w in zip(*parts, strict=True)
    )
    torch.testing.assert_close(risk_terms(split, "multiclass"), risk_terms(whole, "multiclass"))


def test_a_regression_has_no_zero() -> None:
    train, targets, holdout, twin = example("regression")

    def estimate(shift: float) -> Tensor:
        sums = training_sums(train + shift, targets + shift, "regression")
        return risk_terms(sums + holdout_sums(holdout + shift, twin + shift, "regression"), "regression").risk

    torch.testing.assert_close(estimate(1e4), estimate(0.0), rtol=1e-4, atol=1e-4)


def test_positions_are_samples_and_ignored_labels_are_none() -> None:
    g = generator(0)
    outputs, targets = torch.randn(3, 4, 5, generator=g), torch.randint(0, 4, (3, 5), generator=g)
    flat = outputs.movedim(1, -1).reshape(15, 4)
    torch.testing.assert_close(
        training_sums(outputs, targets, "multiclass"), training_sums(flat, targets.flatten(), "multiclass")
    )
    ignored = torch.where(torch.rand(15, generator=g) < 0.5, -100, targets.flatten())
    kept = ignored != -100
    torch.testing.assert_close(
        training_sums(flat, ignored, "multiclass"), training_sums(flat[kept], targets.flatten()[kept], "multiclass")
    )


def test_without_training_or_holdout_samples_there_is_no_estimate() -> None:
    train, targets, holdout, twin = example("binary")
    assert risk_terms(training_sums(train, targets, "binary"), "binary").risk.isnan()
    assert risk_terms(holdout_sums(holdout, twin, "binary"), "binary").risk.isnan()


def test_with_the_difference_to_a_twin_network_it_is_the_true_brier_score() -> None:
    # Calibrated on its training labels, and on the holdout as good as a twin that saw other training data.
    g = generator(0)
    n, k = 200_000, 4
    truth = Dirichlet(torch.ones(k)).sample((n,))
    torch.manual_seed(0)
    network, twin = (Dirichlet(2 * truth + 1e-3).sample().clamp_min(1e-6) for _ in range(2))
    labels = torch.multinomial(twin / twin.sum(1, keepdim=True), 1, generator=g)[:, 0]
    fitted = Dirichlet(0.2 * torch.ones(k)).sample((n,)).clamp_min(1e-6)  # more confident than on the holdout
    fitted_labels = torch.multinomial(fitted / fitted.sum(1, keepdim=True), 1, generator=g)[:, 0]
    sums = training_sums(fitted.log(), fitted_labels, "multiclass")
    sums = sums + holdout_sums(network.log(), twin.log(), "multiclass")
    brier = (network - torch.eye(k)[labels]).square().sum(1).mean()
    assert float(risk_terms(sums, "multiclass").risk) == pytest.approx(float(brier), rel=0.01)
    assert float(risk_terms(sums, "multiclass").training) < 0.7 * float(brier)
