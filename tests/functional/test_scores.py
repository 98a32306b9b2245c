import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as with_logits
from torch.nn.functional import cross_entropy

from lightning_sensitivity.functional.scores import consensus_scores, score_samples
from lightning_sensitivity.functional.sensitivity import sensitivity_rows
from lightning_sensitivity.functional.tasks import TASKS

SOFT, BITS = torch.tensor([[[0.5, 0.5], [0.25, 0.75], [1, 0]], [[0, 1], [1, 0], [1, 1]]], dtype=torch.float64)


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
    assert {len(values) for values in scores.values()} == {shape[0]}
    torch.testing.assert_close(scores["rows"], sensitivity_rows(clean, noisy))
    means = {name: scores[name].sum() / scores["num_labels"].sum() for name in ("loss", "error")}
    torch.testing.assert_close(means["loss"], loss(clean.double(), targets))
    decisions = clean.argmax(1, keepdim=targets is SOFT) if task == "multiclass" else clean > 0
    right = targets.gather(1, decisions) if targets is SOFT else (decisions == targets)[targets >= 0]
    torch.testing.assert_close(means["error"], 1 - right.double().mean())
    assert ("log_p" in scores) == (clean.ndim < 3)
    assert score_samples(clean, noisy, None, task).keys() == scores.keys() - {"loss", "error", "num_labels"}
    assert score_samples(clean, noisy, None, None).keys() == {"rows"}


def log_probabilities(num_models: int, decisions: int = 1) -> dict[str, Tensor]:
    logits = 3 * torch.randn(num_models, 20, decisions, 4, generator=torch.Generator().manual_seed(0))
    return {str(index): values for index, values in enumerate(logits.log_softmax(3))}


@pytest.mark.parametrize(("decisions", "voters"), [(1, "01234"), (3, "01234"), (1, "0123")])
def test_the_consensus_is_the_mean_over_the_others_that_vote_one_by_one(decisions: int, voters: str) -> None:
    models = log_probabilities(5, decisions)
    for name, scores in consensus_scores(models, list(voters)).items():
        votes = [models[voter].double().exp() for voter in voters if voter != name]
        log_p = models[name].double()
        losses = torch.stack([-(p * log_p).sum(2).mean(1) for p in votes]).mean(0)
        errors = torch.stack([1 - p.gather(2, log_p.argmax(2, keepdim=True)).mean((1, 2)) for p in votes]).mean(0)
        torch.testing.assert_close(scores, (losses, errors))


def test_there_is_no_consensus_of_two_models_or_of_different_classes() -> None:
    models = log_probabilities(3)
    assert consensus_scores({}) == consensus_scores(models, voters=["0", "1"]) == {}
    assert consensus_scores(models | {"other": torch.zeros(20, 1, 5).log_softmax(2)}) == {}


def test_certain_models_that_disagree_lose_nothing_to_rounding() -> None:
    certain, other, impossible = torch.tensor([[[[0, -1e5]]], [[[-1e5, 0]]], [[[0, -math.inf]]]])
    scores = consensus_scores({"a": certain, "b": certain, "c": other})
    assert (scores["a"][0].item(), scores["c"][0].item(), scores["c"][1].item()) == (0.5e5, 1e5, 1)
    assert consensus_scores(dict.fromkeys("abc", impossible))["a"][0].item() == 0
