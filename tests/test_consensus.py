import math

import pytest
import torch
from torch import Tensor

from lightning_sensitivity.consensus import consensus_scores


def log_probabilities(num_models: int, num_samples: int = 20, num_classes: int = 4) -> dict[str, Tensor]:
    logits = 3 * torch.randn(num_models, num_samples, num_classes, generator=torch.Generator().manual_seed(0))
    return {str(index): values for index, values in enumerate(logits.log_softmax(2))}


def test_it_is_the_mean_over_the_others_one_by_one() -> None:
    models = log_probabilities(5)
    for name, (loss, error) in consensus_scores(models).items():
        others = [values.double().exp() for other, values in models.items() if other != name]
        own = models[name].double()
        losses = torch.stack([-(p * own).sum(1) for p in others]).mean(0)
        errors = torch.stack([1 - p[torch.arange(len(p)), own.argmax(1)] for p in others]).mean(0)
        torch.testing.assert_close(loss, losses)
        torch.testing.assert_close(error, errors)


def test_labels_drawn_from_the_others_have_that_loss_and_error() -> None:
    models = log_probabilities(3, num_samples=1)
    p = models["0"].double()
    others = (models["1"].double().exp() + models["2"].double().exp()) / 2
    labels = torch.multinomial(others[0], 200_000, replacement=True, generator=torch.Generator().manual_seed(0))
    loss, error = consensus_scores(models)["0"]
    assert -p[0, labels].mean().item() == pytest.approx(loss.item(), rel=0.02)
    assert (p.argmax() != labels).double().mean().item() == pytest.approx(error.item(), rel=0.02)


def test_certain_models_that_disagree() -> None:
    certain = torch.tensor([[0.0, -1e5]]), torch.tensor([[-1e5, 0.0]])
    scores = consensus_scores({"a": certain[0], "b": certain[0], "c": certain[1]})
    assert scores["a"].loss.item() == pytest.approx(0.5e5)
    assert scores["c"].loss.item() == pytest.approx(1e5)
    assert scores["c"].error.item() == 1
    impossible = torch.tensor([[0.0, -math.inf]])
    assert consensus_scores(dict.fromkeys("abc", impossible))["a"].loss.item() == 0


def test_there_is_none_of_two_models_or_of_different_classes() -> None:
    assert consensus_scores(log_probabilities(2)) == {}
    assert consensus_scores(log_probabilities(3) | {"other": torch.zeros(20, 5).log_softmax(1)}) == {}
    assert consensus_scores(dict.fromkeys("abc", torch.zeros(20, 0))) == {}


def test_who_has_no_vote_is_measured_by_all_who_have() -> None:
    models = log_probabilities(4)
    scores = consensus_scores(models, voters=["0", "1", "2"])
    assert scores.keys() == models.keys()
    for name in "012":
        expected = consensus_scores({voter: models[voter] for voter in "012"})[name]
        torch.testing.assert_close(scores[name], expected)
    votes = sum(models[voter].double().exp() for voter in "012") / 3
    torch.testing.assert_close(scores["3"].loss, -(votes * models["3"].double()).sum(1))
    assert consensus_scores(models, voters=["0", "1"]) == {}
