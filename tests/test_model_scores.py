import math

import pytest
import torch
from torch import Tensor

from lightning_sensitivity import OutputSensitivity
from lightning_sensitivity.functional import loss_estimate
from lightning_sensitivity.model_scores import check_same_samples, compare_scored
from lightning_sensitivity.sample_scores import SampleScores
from lightning_sensitivity.scored_model import Scored


def scored(weight: Tensor, x: Tensor, noise: list[Tensor], labels: Tensor | None = None) -> Scored:
    """What a pass of a linear model over one batch gives."""
    metric, scores = OutputSensitivity(), SampleScores(x @ weight, "multiclass")
    scores.add_inputs(x, 0.01)
    noisy = [(x + draw) @ weight for draw in noise]
    for outputs in noisy:
        scores.add_noisy(outputs)
    metric.update(x @ weight, noisy)
    if labels is not None:
        scores.add_targets(labels)
    values = float(metric.compute()), float(metric.stderr)
    return Scored(scores.table, scores.log_probabilities, *values, weight.shape[1], "multiclass", weight.numel(), 1.0)


def case(seed: int, num_samples: int = 100, draws: int = 1) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(num_samples, 6, generator=generator)
    return x, [0.1 * torch.randn(num_samples, 6, generator=generator) for _ in range(draws)]


WEIGHTS = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
NAMES = ("a", "b", "c")


def compared(seed: int = 0, **kwargs: int) -> dict[str, Scored]:
    x, noise = case(seed, **kwargs)
    labels = torch.randint(4, (len(x),), generator=torch.Generator().manual_seed(seed))
    return {name: scored(weight, x, noise, labels) for name, weight in zip(NAMES, WEIGHTS, strict=True)}


@pytest.mark.parametrize("draws", [1, 3])
def test_the_error_of_a_difference_is_that_over_samples_and_noise(draws: int) -> None:
    truths = {n: 0.01 * float(w.mean(1).square().sum()) for n, w in zip(NAMES, WEIGHTS, strict=True)}
    deviations = []
    for seed in range(150):
        value, stderr = compare_scored(compared(seed, draws=draws), dict.fromkeys(NAMES, "")).difference("a", "b")
        deviations.append((value - truths["a"] + truths["b"]) / stderr)
    z = torch.tensor(deviations)
    assert z.square().mean().sqrt().item() == pytest.approx(1, abs=0.15)
    assert (z.abs() < 1.96).double().mean().item() == pytest.approx(0.95, abs=0.05)


def test_the_error_of_a_value_is_the_metrics() -> None:
    result = compare_scored(compared(draws=2), dict.fromkeys(NAMES, ""))
    samples = result._by_sample["a"]["sensitivity"]
    assert samples.mean().item() == pytest.approx(result["a"].sensitivity)
    assert samples.std().item() / math.sqrt(len(samples)) == pytest.approx(result["a"].sensitivity_stderr)


def test_the_numbers_of_a_model() -> None:
    x, noise = case(0)
    found = compared()
    row = compare_scored(found, {"a": "", "b": "", "c": ""})["a"]
    power = float(x.double().square().mean()) / 0.01
    assert row.loss_estimate == pytest.approx(float(loss_estimate(row.sensitivity, power, 1.0, 4)))
    p, noisy = ((inputs @ WEIGHTS[0]).double().softmax(1) for inputs in (x, x + noise[0]))
    assert row.variance == pytest.approx(power * float((noisy - p).square().sum(1).mean()), rel=1e-4)
    assert row.entropy == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    assert row.flips == pytest.approx(float((noisy.argmax(1) != p.argmax(1)).double().mean()))
    others = sum((x @ weight).double().softmax(1) for weight in WEIGHTS[1:]) / 2
    assert row.consensus_loss == pytest.approx(float(-(others * p.log()).sum(1).mean()), rel=1e-5)
    assert (row.num_parameters, row.seconds, row.note) == (24, 1.0, "")


def test_two_models_have_no_consensus_and_failures_take_no_part_in_it() -> None:
    found = compared()
    del found["c"]
    result = compare_scored(found, {"a": "", "b": "", "c": "failed: why"})
    assert math.isnan(result["a"].consensus_loss)
    assert result["c"].note == "failed: why"
    assert math.isnan(result["c"].sensitivity)


def test_the_same_samples_are_required() -> None:
    first, other = compared(0)["a"], compared(1)["a"]
    check_same_samples(first, {})
    check_same_samples(first, {"x": first})
    with pytest.raises(ValueError, match="Other inputs than those of 'x'"):
        check_same_samples(other, {"x": first})
    with pytest.raises(ValueError, match="100 and 50 samples"):
        check_same_samples(first, {"x": compared(0, num_samples=50)["a"]})
    # The same power, in another order.
    x, noise = case(0)
    x = torch.nn.functional.normalize(x)
    with pytest.raises(ValueError, match="Other inputs"):
        check_same_samples(scored(WEIGHTS[0], x, noise), {"x": scored(WEIGHTS[0], x.flip(0), noise)})


def test_the_loss_estimate_ties_as_sensitivity_does() -> None:
    result = compare_scored(compared() | {"copy": compared()["a"]}, dict.fromkeys([*NAMES, "copy"], ""))
    assert "copy" in result.ties("loss_estimate")["a"] and "copy" in result.ties()["a"]
    for first, second in (("a", "b"), ("b", "c")):
        relative = [
            value / stderr
            for value, stderr in (result.difference(first, second, s) for s in ("sensitivity", "loss_estimate"))
        ]
        assert relative[0] == pytest.approx(relative[1], rel=0.3)


def test_every_label_counts_the_same() -> None:
    clean = torch.randn(8, 3, 10, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(3, (8, 10), generator=torch.Generator().manual_seed(1))
    for index in range(8):
        labels[index, 9 - index :] = -100  # 9 labels to 2
    labels[3] = -100
    metric, scores = OutputSensitivity(), SampleScores(clean, "multiclass")
    scores.add_inputs(clean, 1.0)
    scores.add_noisy(clean + torch.rand(8, 3, 10))
    scores.add_targets(labels)
    metric.update(clean, clean + torch.rand(8, 3, 10))
    found = Scored(scores.table, scores.log_probabilities, float(metric.compute()), 0.1, 3, "multiclass", 1, 1.0)
    row = compare_scored({"a": found}, {"a": ""})["a"]
    assert row.loss == pytest.approx(float(torch.nn.functional.cross_entropy(clean.double(), labels)))
    assert row.error == pytest.approx(float((clean.argmax(1) != labels)[labels >= 0].double().mean()))


def test_undecided_labels_of_a_multilabel_model_are_seen() -> None:
    clean = 0.01 * torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    scores = SampleScores(clean, "multilabel")
    scores.add_inputs(clean, 1.0)
    scores.add_noisy(clean + 0.01)
    found = Scored(scores.table, scores.log_probabilities, 0.1, 0.1, 10, "multilabel", 1, 1.0)
    row = compare_scored({"a": found}, {"a": ""})["a"]
    assert row.note == "undecided (untrained?)"
    assert math.isnan(row.loss_estimate)


def test_the_untrained_have_no_vote() -> None:
    found = compared() | {"d": compared()["a"]}
    notes = dict.fromkeys("abcd", "")
    alone = compare_scored({name: found[name] for name in NAMES}, dict.fromkeys(NAMES, ""))
    result = compare_scored(found, notes | {"d": "untrained (step 0)"})
    assert result["a"].consensus_loss == alone["a"].consensus_loss
    assert result["d"].consensus_loss > 0
    assert compare_scored(found, notes)["a"].consensus_loss != alone["a"].consensus_loss
