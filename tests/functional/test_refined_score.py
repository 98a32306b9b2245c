"""The refined score: it is the lowest score over temperatures, and ignores how sure a network is."""

from functools import partial
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, softmax
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity.functional import refined_score, tensors
from lightning_sensitivity.functional.refined_score import TEMPERATURES, Refined, ScoreSums, score_sums
from lightning_sensitivity.functional.tasks import TASKS

WIDTH = {"multiclass": 4, "binary": 1, "regression": 3}


def samples(seed: int = 0, num_samples: int = 200, task: str = "multiclass") -> tuple[Tensor, Tensor]:
    """Outputs, and labels that are as certain as these say."""
    generator = torch.Generator().manual_seed(seed)
    outputs = 2 * torch.randn(num_samples, WIDTH[task], generator=generator)
    if task == "multiclass":
        return outputs, torch.multinomial(outputs.softmax(1), 1, generator=generator)[:, 0]
    if task == "binary":
        return outputs, torch.bernoulli(outputs.sigmoid(), generator=generator)
    return outputs, outputs + torch.randn(outputs.shape, generator=generator)


def oracle(outputs: Tensor, y: Any, task: str) -> np.ndarray:
    """The sum of the score at each temperature, by NumPy in double precision."""
    x, y = outputs.double().numpy(), np.asarray(y, dtype=np.float64).reshape(len(outputs), -1)
    if task == "regression":
        return np.full(len(TEMPERATURES), ((x - y) ** 2).mean(1).sum())
    predict = expit if task == "binary" else partial(softmax, axis=1)
    return np.array([((predict(x / temperature) - y) ** 2).sum() for temperature in TEMPERATURES])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 30), max_size=3), task=st.sampled_from(sorted(WIDTH)))
def test_sums_are_those_of_their_definitions_however_samples_are_split(seed: int, cuts: Any, task: str) -> None:
    outputs, targets = samples(seed, 30, task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensors, "_CHUNK", 40)  # elements that are widened at a time
        parts = zip(*(each.tensor_split(sorted(cuts)) for each in (outputs, targets)), strict=True)
        rows = sum(score_sums(x, y, TASKS[task]) for x, y in parts)
    sums, y = ScoreSums(*rows.T), one_hot(targets, 4) if task == "multiclass" else targets
    expected = oracle(outputs, y, task)
    np.testing.assert_allclose(sums.score, expected, atol=1e-4)
    assert sums.num_scored.tolist() == [30] * len(TEMPERATURES) and not sums.num_non_finite.any()
    found = refined_score(outputs, targets, task)
    assert found.score == pytest.approx(expected.min() / 30, abs=1e-6)
    wanted = 1.0 if task == "regression" else TEMPERATURES[expected.argmin()]
    assert found.temperature == wanted


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_predictions_and_soft_labels_are_targets_as_labels_are(task: str) -> None:
    outputs, targets = samples(task=task)
    q = TASKS[task].predictions(samples(1, task=task)[0])
    expected = pytest.approx(oracle(outputs, q[:, -WIDTH[task] :], task).min() / 200)
    assert refined_score(outputs, q, task).score == expected == refined_score(outputs, q[:, -WIDTH[task] :], task).score
    certain = one_hot(targets, 4).float() if task == "multiclass" else targets[:, 0].bool()
    assert refined_score(outputs, certain, task) == refined_score(outputs, targets, task)
    p = TASKS[task].predictions(outputs)
    own = refined_score(outputs, p, task)  # the predictions themselves are as near as can be
    assert own.score == pytest.approx(0, abs=1e-12) and own.temperature == 1


def test_a_regression_has_a_mean_squared_error_and_no_temperature() -> None:
    outputs, targets = samples(task="regression")
    for x, y in ((outputs, targets), (outputs[:, 0], targets[:, 0]), (outputs[:, :1], targets[:, 0])):
        expected = float((x.reshape(200, -1) - y.reshape(200, -1)).square().mean())
        assert refined_score(x, y, "regression") == (pytest.approx(expected), 1.0)


@pytest.mark.parametrize("sureness", [2.0, 4.0])
def test_a_network_that_is_too_sure_has_the_same_score_and_that_temperature(sureness: float) -> None:
    logits, targets = samples(num_samples=4000)
    calm, sure = refined_score(logits, targets), refined_score(sureness * logits, targets)
    assert sure.score == pytest.approx(calm.score, abs=1e-6)
    assert sure.temperature == pytest.approx(sureness * calm.temperature)


def test_of_equal_scores_that_of_unchanged_logits_is_taken() -> None:
    assert pytest.approx([0.5 * 2 ** (place / 2) for place in range(9)]) == TEMPERATURES  # from 0.5 to 8
    assert refined_score(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0])).temperature == 1
    assert Refined.lowest(torch.full((len(TEMPERATURES),), torch.nan)).temperature == 1


def test_logits_that_overflow_at_a_low_temperature_count_at_all() -> None:
    logits, y = torch.tensor([[3e38, 0.0], [0.0, 3e38], [0.0, 1.0], [1.0, 0.0]]), torch.tensor([1, 0, 1, 0])
    assert refined_score(logits, y).score == pytest.approx(oracle(logits, one_hot(y), "multiclass").min() / 4)


# What counts


@pytest.mark.parametrize("task", ["multiclass", "binary"])
def test_ignored_labels_and_samples_with_nan_do_not_count(task: str) -> None:
    logits, targets = samples(task=task)
    more = torch.cat([logits, torch.full((1, WIDTH[task]), torch.nan), torch.ones(1, WIDTH[task])])
    of_more = torch.cat([targets, torch.tensor([0, -100]).to(targets).reshape(2, *targets.shape[1:])])
    assert refined_score(more, of_more, task) == refined_score(logits, targets, task)
    sums = ScoreSums(*score_sums(more, of_more, TASKS[task]).T)
    assert {*sums.num_scored.tolist()} == {200} and {*sums.num_non_finite.tolist()} == {1}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_give_what_their_numbers_give_in_32_bits(dtype: torch.dtype) -> None:
    logits, targets = samples()
    assert refined_score(logits.to(dtype), targets) == refined_score(logits.to(dtype).float(), targets)
    large = torch.tensor([[6e4, 0.0], [0.0, 6e4]], dtype=dtype)  # more than half of the largest number
    sums = ScoreSums(*score_sums(large, torch.tensor([0, 1]), TASKS["multiclass"]).T)
    assert not sums.score.any() and not sums.num_non_finite.any()


LOGITS, TARGETS = samples(num_samples=20)


def test_numbers_may_be_arrays_lists_tables_and_tensors_of_a_graph() -> None:
    x, y = LOGITS.numpy(), TARGETS.numpy()
    tables = pandas.DataFrame(x), pandas.Series(y)
    for values in ((x.astype(float), y.astype(np.uint8)), (x.tolist(), y.tolist()), tables):
        assert refined_score(*values) == pytest.approx(refined_score(LOGITS.clone().requires_grad_(), TARGETS))


# What is refused

RARE = torch.rand(60, generator=torch.Generator().manual_seed(0)) / 4
REFUSED: dict[str, tuple[Any, Any, str, str]] = {
    "no label": (LOGITS, torch.full((20,), -100), "multiclass", "with a label"),
    "only nan": (LOGITS * torch.nan, TARGETS, "multiclass", "finite `logits`, but got none"),
    "labels of another task": (LOGITS[:, 0], TARGETS, "multiclass", "task='binary'"),
    "a softmax in 16 bits": (LOGITS.softmax(1).bfloat16(), TARGETS, "multiclass", "but got probabilities"),
    "a sigmoid": (LOGITS[:, 0].sigmoid(), TARGETS > 1, "binary", "but got probabilities"),
    "a sigmoid of a rare class": (RARE, RARE > 0.24, "binary", "but got probabilities"),
    "dense logits": (LOGITS[:, :, None], TARGETS, "multiclass", r"shape \(20, 4, 1\)"),
    "integers for logits": (TARGETS, TARGETS, "binary", "Expected floating `logits`"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_score_is_refused(what: str) -> None:
    logits, targets, task, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        refined_score(logits, targets, task)


def test_few_logits_that_lie_between_0_and_1_may_be_logits() -> None:
    assert refined_score(RARE[:20], RARE[:20] > 0.2, "binary").score < 0.3
    assert refined_score(LOGITS.sigmoid(), TARGETS).score > 0  # of several classes, only what sums to 1 is refused
