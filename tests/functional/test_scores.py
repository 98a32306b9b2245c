import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as with_logits
from torch.nn.functional import cross_entropy

from lightning_sensitivity.functional.scores import SampleScores, consensus_scores, join_samples, score_samples
from lightning_sensitivity.functional.sensitivity import sensitivity_rows
from lightning_sensitivity.functional.tasks import TASKS

SOFT, BITS = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [1, 0]], [[0, 1], [1, 0], [1, 1]]], dtype=torch.float64)


PARTS = [(2, torch.ones(2)), (3, None)]  # sizes and errors of batches


@pytest.mark.parametrize(("task", "shape", "targets", "loss"), [
    ("multiclass", (2, 3, 2, 2), torch.tensor([[[0, -100], [1, 1]], [[-100, -100], [2, -100]]]), cross_entropy),
    ("multiclass", (5, 3), torch.tensor([0, 2, 1, 1, 0]), cross_entropy), ("multiclass", (3, 2), SOFT, cross_entropy),
    ("binary", (3, 1), BITS[:, :1], with_logits), ("multilabel", (3, 2), BITS, with_logits),
])  # fmt: skip
def test_loss_and_error_are_those_of_torch(task: str, shape: tuple[int, ...], targets: Tensor, loss: Any) -> None:
    clean, *noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    noisy = [clean + each for each in noise]
    TASKS[task].check(clean, targets)
    scores = score_samples(clean, iter(noisy), targets, task)
    assert {len(getattr(scores, name)) for name in ("rows", "loss", "error", "num_labels")} == {shape[0]}
    torch.testing.assert_close(scores.rows, sensitivity_rows(clean, noisy))
    torch.testing.assert_close(scores.loss.sum() / scores.num_labels.sum(), loss(clean.double(), targets))
    decisions = clean.argmax(1, keepdim=targets is SOFT) if task == "multiclass" else clean > 0
    right = targets.gather(1, decisions) if targets is SOFT else (decisions == targets)[targets >= 0]
    torch.testing.assert_close(scores.error.sum() / scores.num_labels.sum(), 1 - right.double().mean())
    assert (scores.log_p is not None) == (clean.ndim < 3)
    unlabelled = score_samples(clean, noisy, None, task)
    assert unlabelled.loss is unlabelled.error is unlabelled.num_labels is None
    assert score_samples(clean, noisy, None, None).log_p is None


def test_the_samples_of_batches_are_joined_and_what_one_lacks_is_left_out() -> None:
    parts = [SampleScores(torch.ones(size, 5), loss=torch.ones(size), error=error) for size, error in PARTS]
    joined = join_samples(parts)
    assert joined.rows.shape == (5, 5) and joined.loss.shape == (5,)
    assert joined.error is joined.log_p is None
    with pytest.raises(ValueError, match="two samples or more"):
        join_samples(parts[:0])


def log_probabilities(num_models: int, decisions: int = 1) -> dict[str, Tensor]:
    """Of models that agree in part."""
    g = torch.Generator().manual_seed(0)
    truth, own = torch.randn(20, decisions, 4, generator=g), torch.randn(num_models, 20, decisions, 4, generator=g)
    return {str(index): values.log_softmax(2) for index, values in enumerate(3 * truth + 2 * own)}


def brute_force(models: dict[str, Tensor], voters: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Loss and error by plain loops, with each vote's confidence found on a fine grid."""
    predicted = {name: log_p.argmax(2) for name, log_p in models.items()}
    votes = {}
    for name in voters:
        agreement = sum((predicted[name] == predicted[other]).double().mean() for other in voters if other != name)
        scales = torch.logspace(-1.3, 1.3, 2000).double()
        grid = [(scale * models[name].double()).softmax(2).amax(2).mean() for scale in scales]
        nearest = (torch.stack(grid) - agreement / (len(voters) - 1)).abs().argmin()
        votes[name] = (scales[nearest] * models[name].double()).softmax(2)
    found = {}
    for name, log_p in models.items():
        jury = torch.stack(list(votes.values())).prod(0)
        jury = jury / jury.sum(2, keepdim=True)
        error = 1 - jury.gather(2, predicted[name][..., None]).mean((1, 2))
        labels = [predicted[voter][..., None] for voter in voters if voter != name]
        losses = [-log_p.double().gather(2, label).mean((1, 2)) for label in labels]
        found[name] = torch.stack(losses).mean(0), error
    return found


@pytest.mark.parametrize(("decisions", "voters"), [
    pytest.param(1, "0123", id="all vote"),
    pytest.param(3, "0123", id="three decisions a sample"),
    pytest.param(1, "012", id="one has no vote"),
])  # fmt: skip
def test_the_consensus_is_that_of_plain_loops(decisions: int, voters: str) -> None:
    models = log_probabilities(4, decisions)
    found = consensus_scores(models, list(voters))
    for name, expected in brute_force(models, voters).items():
        torch.testing.assert_close(found[name], expected, rtol=2e-3, atol=2e-3)


def test_no_model_gains_by_being_unsure_of_itself() -> None:
    models = log_probabilities(4)
    before = {name: error.mean() for name, (_, error) in consensus_scores(models).items()}
    worst = max(before, key=lambda name: before[name])
    unsure = models | {worst: (0.4 * models[worst]).log_softmax(2)}
    after = {name: error.mean() for name, (_, error) in consensus_scores(unsure).items()}
    for name in models:
        torch.testing.assert_close(after[name], before[name], atol=1e-4, rtol=0)


def test_there_is_no_consensus_of_two_models_or_of_different_classes() -> None:
    models = log_probabilities(3)
    assert consensus_scores({}) == consensus_scores(models, voters=["0", "1"]) == {}
    assert consensus_scores(models | {"other": torch.zeros(20, 1, 5).log_softmax(2)}) == {}


def test_certain_models_that_disagree_give_finite_scores() -> None:
    certain, other, impossible = torch.tensor([[[[0, -1e5]]], [[[-1e5, 0]]], [[[0, -math.inf]]]])
    scores = consensus_scores({"a": certain, "b": certain, "c": other})
    assert scores["a"][1] < 1e-6 and scores["c"][1] > 1 - 1e-6
    assert scores["c"][0].item() == pytest.approx(1e5)
    same = consensus_scores(dict.fromkeys("abc", impossible))["a"]
    assert torch.stack(same).abs().max() < 1e-6
