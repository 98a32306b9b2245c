import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from lightning_sensitivity.comparison import Comparison
from lightning_sensitivity.comparison.scores import (
    Samples,
    Scored,
    consensus_scores,
    joined,
    score_models,
    score_samples,
)
from lightning_sensitivity.functional import loss_estimate

# One row a sample


def outputs(*shape: int, draws: int = 2, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randn(shape, generator=generator)
    return clean, [clean + torch.randn(shape, generator=generator) for _ in range(draws)]


def test_classes_by_hand() -> None:
    clean = torch.tensor([[0.0, math.log(3)], [math.log(4), 0.0]])
    noisy = [torch.tensor([[math.log(3), 0.0], [math.log(4), 0.0]]), clean]
    found = score_samples(clean, noisy, targets=torch.tensor([1, 1]), task="multiclass")
    entropies = [-0.25 * math.log(0.25) - 0.75 * math.log(0.75), -0.2 * math.log(0.2) - 0.8 * math.log(0.8)]
    expected = {"distance": [(0.5**2 + 0.5**2) / 2, 0], "flips": [0.5, 0], "entropy": entropies}
    expected |= {"confidence": [0.75, 0.8], "loss": [-math.log(0.75), -math.log(0.2)], "error": [0, 1]}
    for name, values in (expected | {"num_labels": [1, 1]}).items():
        assert found[name].tolist() == pytest.approx(values, abs=1e-6), name


@pytest.mark.parametrize(("task", "shape", "targets", "loss"), [
    ("multiclass", (5, 3), torch.tensor([0, 2, 1, 1, 0]), cross_entropy),
    ("multiclass", (2, 3, 4), torch.arange(8).reshape(2, 4) % 3, cross_entropy),
    ("multiclass", (2, 3, 2, 2), torch.tensor([[[0, -100], [1, 1]], [[-100, -100], [2, -100]]]), cross_entropy),
    ("multiclass", (3, 2), torch.tensor([[0.5, 0.5], [0.1, 0.9], [1.0, 0.0]]), cross_entropy),
    ("binary", (4,), torch.tensor([0.0, 1.0, 1.0, 0.0]), binary_cross_entropy_with_logits),
    ("binary", (4, 1), torch.tensor([[0.0], [1.0], [1.0], [0.0]]), binary_cross_entropy_with_logits),
    ("multilabel", (2, 3), torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), binary_cross_entropy_with_logits),
    ("regression", (4, 2), torch.arange(8.0).reshape(4, 2), mse_loss),
])  # fmt: skip
def test_the_loss_is_that_of_torch(task: str, shape: tuple[int, ...], targets: Tensor, loss: object) -> None:
    clean, noisy = outputs(*shape)
    found = score_samples(clean, noisy, targets=targets, task=task)
    wide = targets.double() if targets.is_floating_point() else targets
    torch.testing.assert_close(found["loss"].sum() / found["num_labels"].sum(), loss(clean.double(), wide))  # type: ignore[operator]
    assert ("error" in found) == ("entropy" in found) == ("flips" in found) == (task != "regression")


def test_decisions_of_several_labels_count_each() -> None:
    clean, noisy = torch.tensor([[1.0, -1.0, 2.0, -2.0]]), torch.tensor([[-1.0, -1.0, 2.0, -2.0]])
    found = score_samples(clean, [noisy], targets=torch.tensor([[1, 1, 0, 0]]), task="multilabel")
    assert (found["flips"].item(), found["error"].item()) == (0.25, 0.5)


@pytest.mark.parametrize(("shape", "task"), [((4, 3, 2), "multiclass"), ((4, 2), "regression"), ((4, 1), "multiclass")])
def test_what_has_no_meaning_is_left_out(shape: tuple[int, ...], task: str) -> None:
    clean, noisy = outputs(*shape)
    found = score_samples(clean, noisy, task=task)
    assert found.keys().isdisjoint({"log_p", "loss"})
    assert ("entropy" in found) == (shape[1:] == (3, 2))
    assert found["rows"].isfinite().all()


def test_huge_and_masked_logits_lose_nothing() -> None:
    clean = torch.tensor([[1e5, 0.0, -math.inf], [0.0, 1e5, -math.inf]])
    found = score_samples(clean, [clean], targets=torch.tensor([1, 1]), task="multiclass")
    assert (found["loss"].tolist(), found["entropy"].tolist()) == ([1e5, 0], [0, 0])
    assert found["rows"][:, 2].tolist() == [0, 0]


def test_what_one_batch_lacks_none_has() -> None:
    clean, noisy = outputs(4, 3)
    labelled = score_samples(clean, noisy, targets=torch.zeros(4, dtype=torch.long), task="multiclass")
    found = joined([labelled, {}, score_samples(clean[:2], [draw[:2] for draw in noisy], task="multiclass")])
    assert "loss" in labelled and "loss" not in found
    assert len(found["rows"]) == 6
    assert joined([{}, {}]) == {}


# Consensus


def log_probabilities(num_models: int, num_samples: int = 20, decisions: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num_models, num_samples, decisions, 4, generator=generator)
    return {str(index): values for index, values in enumerate(logits.log_softmax(3))}


@pytest.mark.parametrize("decisions", [1, 3])
def test_the_consensus_is_the_mean_over_the_others_one_by_one(decisions: int) -> None:
    models = log_probabilities(5, decisions=decisions)
    for name, (loss, error) in consensus_scores(models).items():
        others = [values.double().exp() for other, values in models.items() if other != name]
        own = models[name].double()
        losses = torch.stack([-(p * own).sum(2).mean(1) for p in others]).mean(0)
        errors = torch.stack([1 - p.gather(2, own.argmax(2, keepdim=True)).mean((1, 2)) for p in others]).mean(0)
        torch.testing.assert_close(loss, losses)
        torch.testing.assert_close(error, errors)


def test_certain_models_that_disagree() -> None:
    certain = torch.tensor([[[0.0, -1e5]]]), torch.tensor([[[-1e5, 0.0]]])
    scores = consensus_scores({"a": certain[0], "b": certain[0], "c": certain[1]})
    assert (scores["a"][0].item(), scores["c"][0].item()) == pytest.approx((0.5e5, 1e5))
    assert scores["c"][1].item() == 1
    impossible = torch.tensor([[[0.0, -math.inf]]])
    assert consensus_scores(dict.fromkeys("abc", impossible))["a"][0].item() == 0


def test_there_is_no_consensus_of_two_models_or_of_different_classes() -> None:
    models = log_probabilities(3)
    assert consensus_scores(log_probabilities(2)) == {}
    assert consensus_scores(models, voters=["0", "1"]) == {}
    assert consensus_scores(models | {"other": torch.zeros(20, 1, 5).log_softmax(2)}) == {}
    assert consensus_scores({}) == {}


def test_who_has_no_vote_is_measured_by_all_who_have() -> None:
    models = log_probabilities(4)
    scores = consensus_scores(models, voters=["0", "1", "2"])
    for name in "012":
        torch.testing.assert_close(scores[name], consensus_scores({voter: models[voter] for voter in "012"})[name])
    votes = sum(models[voter].double().exp() for voter in "012") / 3
    torch.testing.assert_close(scores["3"][0], -(votes * models["3"].double()).sum((1, 2)))


# From samples to models

WEIGHTS = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
NAMES = ("a", "b", "c")


def scored(samples: Samples, power: float = 1.0) -> Scored:
    return Scored(samples | {"power": torch.full_like(samples["distance"], power)}, 24, 1.0)


def case(seed: int, num_samples: int = 100, draws: int = 1) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_samples, 6, generator=generator)
    return x, [0.1 * torch.randn(num_samples, 6, generator=generator) for _ in range(draws)]


def all_scored(seed: int = 0, **kwargs: int) -> dict[str, Scored]:
    """What passes of linear models give."""
    x, noise = case(seed, **kwargs)
    found = {}
    for name, weight in zip(NAMES, WEIGHTS, strict=True):
        samples = score_samples(x @ weight, [(x + draw) @ weight for draw in noise], task="multiclass")
        found[name] = scored(samples, float(x.double().square().mean()) / 0.01)
    return found


def compared(found: dict[str, Scored], task: str = "multiclass", **notes: str) -> Comparison:
    return Comparison(*score_models(found, dict.fromkeys(found, "") | notes, task))


@pytest.mark.parametrize("draws", [1, 3])
def test_the_error_of_a_difference_is_that_over_samples_and_noise(draws: int) -> None:
    truths = {n: 0.01 * float(w.mean(1).square().sum()) for n, w in zip(NAMES, WEIGHTS, strict=True)}
    deviations = []
    for seed in range(150):
        value, stderr = compared(all_scored(seed, draws=draws)).difference("a", "b")
        deviations.append((value - truths["a"] + truths["b"]) / stderr)
    z = torch.tensor(deviations)
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    assert (z.abs() < 1.96).double().mean().item() == pytest.approx(0.95, abs=0.05)


def test_the_numbers_of_a_model() -> None:
    x, noise = case(0)
    row = compared(all_scored())["a"]
    power = float(x.double().square().mean()) / 0.01
    assert row.loss_estimate == pytest.approx(float(loss_estimate(row.sensitivity, power, 1.0, 4)))
    p, noisy = ((inputs @ WEIGHTS[0]).double().softmax(1) for inputs in (x, x + noise[0]))
    assert row.variance == pytest.approx(power * float((noisy - p).square().sum(1).mean()), rel=1e-4)
    others = sum((x @ weight).double().softmax(1) for weight in WEIGHTS[1:]) / 2
    assert row.consensus_loss == pytest.approx(float(-(others * p.log()).sum(1).mean()), rel=1e-5)
    assert (row.num_parameters, row.seconds, row.note) == (24, 1.0, "")


def test_ties_of_the_loss_estimate_are_those_of_the_sensitivity() -> None:
    result = compared(all_scored() | {"copy": all_scored()["a"]})
    assert result.ties("loss_estimate") == result.ties()
    assert "copy" in result.ties()["a"]
    (s, s_stderr), (loss, loss_stderr) = (
        result.difference("a", "b", name) for name in ("sensitivity", "loss_estimate")
    )
    assert s / s_stderr == pytest.approx(loss / loss_stderr, rel=0.3)


def test_who_failed_or_is_untrained_has_no_vote() -> None:
    found = all_scored()
    alone = compared(found)["a"].consensus_loss
    result = compared(found | {"d": found["a"]}, d="untrained (step 0)", e="failed: why")
    assert result["a"].consensus_loss == alone
    assert result["d"].consensus_loss > 0
    assert (result["e"].note, math.isnan(result["e"].sensitivity)) == ("failed: why", True)
    assert compared(found | {"d": found["a"]})["a"].consensus_loss != alone
    assert math.isnan(compared({name: found[name] for name in "ab"})["a"].consensus_loss)


def test_every_label_counts_the_same() -> None:
    clean, noisy = outputs(8, 3, 10)
    labels = torch.randint(3, (8, 10), generator=torch.Generator().manual_seed(1))
    for index in range(8):
        labels[index, 9 - index :] = -100  # 9 labels to 2
    labels[3] = -100
    row = compared({"a": scored(score_samples(clean, noisy, targets=labels, task="multiclass"))})["a"]
    assert row.loss == pytest.approx(float(cross_entropy(clean.double(), labels)))
    assert row.error == pytest.approx(float((clean.argmax(1) != labels)[labels >= 0].double().mean()))


def test_undecided_labels_of_a_multilabel_model_are_seen() -> None:
    clean = 0.01 * outputs(20, 10)[0]
    row = compared({"a": scored(score_samples(clean, [clean + 0.01], task="multilabel"))}, "multilabel")["a"]
    assert row.note == "undecided (untrained?)"
    assert math.isnan(row.loss_estimate)
