"""The refined score: it is the lowest Brier score over temperatures, and ignores how sure a network is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import one_hot

from lightning_sensitivity.functional import refined_score
from lightning_sensitivity.functional.sums import TEMPERATURES


def samples(seed: int = 0, num_samples: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_samples, 4, generator=generator)
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    return logits, targets


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 50))
def test_it_is_the_lowest_brier_score_over_the_temperatures(seed: int) -> None:
    logits, targets = samples(seed)
    wanted = [float((logits / t).softmax(1).sub(one_hot(targets, 4)).square().sum(1).mean()) for t in TEMPERATURES]
    found = refined_score(logits, targets)
    assert found.score == pytest.approx(min(wanted), abs=1e-6)
    assert found.temperature == TEMPERATURES[wanted.index(min(wanted))]


@pytest.mark.parametrize("sureness", [2.0, 4.0])
def test_a_network_that_is_too_sure_has_the_same_score_and_that_temperature(sureness: float) -> None:
    logits, targets = samples(num_samples=4000)
    calm, sure = refined_score(logits, targets), refined_score(sureness * logits, targets)
    assert sure.score == pytest.approx(calm.score, abs=1e-6)
    assert sure.temperature == pytest.approx(sureness * calm.temperature)


def test_the_grid_of_temperatures_loses_little() -> None:
    minimize = pytest.importorskip("scipy.optimize").minimize_scalar
    logits, targets = samples(1)
    y = one_hot(targets, 4)
    exact = minimize(lambda a: float((logits * 2.0**a).softmax(1).sub(y).square().sum(1).mean()), bounds=(-4, 2))
    assert refined_score(3 * logits, targets).score == pytest.approx(exact.fun, abs=5e-3)


def test_ignored_labels_and_samples_with_nan_do_not_count() -> None:
    logits, targets = samples()
    more = torch.cat([logits, torch.full((1, 4), torch.nan), torch.ones(1, 4)])
    labels = torch.cat([targets, torch.tensor([0, -100])])
    assert refined_score(more, labels) == refined_score(logits, targets)


def test_one_output_of_two_classes_has_half_the_score_of_two() -> None:
    logits, targets = torch.randn(100, generator=torch.Generator().manual_seed(0)), torch.arange(100) % 2
    two = refined_score(torch.stack([torch.zeros(100), logits], 1), targets)
    one = refined_score(logits, targets, task="binary")
    assert one.score == pytest.approx(two.score / 2) and one.temperature == two.temperature


def test_16_bits_do_not_overflow() -> None:
    logits = torch.tensor([[6e4, 0.0], [0.0, 6e4]], dtype=torch.float16)
    assert refined_score(logits, torch.tensor([0, 1])).score == 0


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (torch.randn(3, 4), torch.full((3,), -100), "with a label"),
        (torch.randn(3, 4), torch.tensor([0, 1, 4]), "from 0 to 3"),
        (torch.randn(3), torch.tensor([0, 1, 1]), "binary"),
        (torch.randn(3, 4).softmax(1), torch.tensor([0, 1, 1]), "but got probabilities"),
    ],
    ids=["no label", "class out of range", "one output", "probabilities"],
)
def test_what_has_no_score_is_refused(logits: torch.Tensor, targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        refined_score(logits, targets)
