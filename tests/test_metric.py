import math
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_sensitivity import OutputSensitivity, RiskEstimate
from lightning_sensitivity.functional import (
    Calibration,
    fit_reference,
    output_sensitivity,
    refined_score,
    variance_factor,
)
from lightning_sensitivity.functional.sensitivity import SensitivityEstimate, sensitivity_from_rows, sensitivity_rows
from lightning_sensitivity.functional.sums import TEMPERATURES
from tests.helpers import risk_estimate

NUM_BATCHES, BATCH_SIZE = 6, 16
CLEAN, NOISY, TWIN = torch.randn(3, NUM_BATCHES, BATCH_SIZE, 5, generator=torch.Generator().manual_seed(0))
LABELS = CLEAN.roll(1).argmax(-1)
PREDICTIONS = (CLEAN + TWIN).double().softmax(-1)
FITTED = fit_reference(torch.rand(100, 1), torch.eye(5).repeat(20, 1), torch.rand(1, 1))
REFERENCE = FITTED._replace(
    predictions=PREDICTIONS.flatten(0, 1), shares=torch.arange(1.0, 6) / 15, score=0.7, chance=0.75, claim=0.7
)


def filled(metric: Any, batches: Iterable[int] = range(NUM_BATCHES), called: bool = False) -> Any:
    has_risk, update = isinstance(metric, RiskEstimate), metric if called else metric.update
    for i in batches:
        update(CLEAN[i], NOISY[i], **({"reference": PREDICTIONS[i]} if has_risk else {}))
        if has_risk:
            metric.update_training(NOISY[i], LABELS[i])
            metric.update_labels(TWIN[i], LABELS[i])
    return metric


def value(metric: Any) -> Tensor:
    result = metric.compute()
    return torch.stack(list(result.values())) if isinstance(result, dict) else result


def expected(*batches: int, per_output: bool = False) -> SensitivityEstimate:
    clean, noisy = (outputs[list(batches or range(NUM_BATCHES))].flatten(0, 1) for outputs in (CLEAN, NOISY))
    return sensitivity_from_rows(sensitivity_rows(clean, noisy), per_output)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("per_output", [False, True])
def test_batches_give_what_all_samples_give(per_output: bool) -> None:
    metric = filled(OutputSensitivity(per_output))
    close((metric.compute(), metric.stderr), expected(per_output=per_output)[:2])
    change = (NOISY.double() - CLEAN.double()).flatten(0, 1)
    deviations = change if per_output else change.mean(1, keepdim=True) - change.mean()
    close(metric.per_sample, deviations.square().mean(1))
    metric.update(CLEAN[0], NOISY[0] + 1)
    assert len(metric.per_sample) == metric.estimate.num_samples == (NUM_BATCHES + 1) * BATCH_SIZE
    metric.reset()
    close(metric(CLEAN[0], (NOISY[0],)), expected(0, per_output=per_output).value)


# What both metrics survive


def make_risk(**options: Any) -> RiskEstimate:
    return RiskEstimate(strength=0.5, num_training=400, num_weights=10_000, **{"reference": REFERENCE, **options})


def called_as_a_function(metric: Any) -> Any:
    metric.reset()
    return filled(metric, [0], called=True)


def moved_while_synced(metric: Any) -> Any:
    metric.sync(
        dist_sync_fn=lambda x, group: [x, x[:0] if isinstance(metric, OutputSensitivity) else torch.zeros_like(x)],
        distributed_available=lambda: True,
    )
    synced = metric.metric_state
    close(metric.bfloat16().metric_state, synced)
    metric.unsync()
    return metric


def cast_and_reset(metric: Any) -> Any:
    metric.to(torch.bfloat16).reset()
    return filled(metric, [0])


WAYS: dict[str, Callable[[Any], Any]] = {
    "called as a function": called_as_a_function,
    "pickled": lambda metric: pickle.loads(pickle.dumps(metric)),
    "cast with a model": lambda metric: nn.Sequential(metric).bfloat16()[0],
    "cast, and filled anew": cast_and_reset,
    "in eval mode with a model": lambda metric: nn.Sequential(metric).train().eval()[0],
    "moved while it is synced": moved_while_synced,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [OutputSensitivity, make_risk])
def test_it_resumes_as_if_nothing_had_happened(make: Callable[[], Any], way: str) -> None:
    metric = WAYS[way](filled(make(), [0]))
    close(value(metric), value(filled(make(), [0])))
    close(value(filled(metric, range(1, NUM_BATCHES))), value(filled(make())))
    states = [getattr(metric, name) for name in metric._defaults]
    assert {x.dtype for state in states for x in state} == {torch.float64}


@pytest.mark.parametrize("metric", [OutputSensitivity(), make_risk()])
def test_one_value_or_several_are_plotted(metric: Any) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    results = [filled(metric, [i]).compute() for i in range(3)]
    values = [float(result["risk_estimate"] if isinstance(result, dict) else result) for result in results]
    for given, shown in ((None, values[-1:]), (results[0], values[:1]), (results, values)):
        figure, axes = metric.plot(given)
        assert [float(y) for line in axes.get_lines()[:1] for y in line.get_ydata()] == pytest.approx(shown)
        pyplot.close(figure)


# Sensitivity


COLLECTED: dict[str, tuple[Any, Any, Any]] = {
    "class indices": (OutputSensitivity(), CLEAN[0], LABELS[0]),
    "one-hot labels": (OutputSensitivity(), CLEAN[0], nn.functional.one_hot(LABELS[0], 5).float()),
    "labels of two classes": (OutputSensitivity(), CLEAN[0, :, 0], (LABELS[0] > 1).float()),
    "labels for twins": (RiskEstimate(), CLEAN[0], LABELS[0]),
}


@pytest.mark.parametrize("what", COLLECTED)
def test_labels_that_a_collection_passes_are_refused_by_keywords(what: str) -> None:
    metric, clean, labels = COLLECTED[what]
    with pytest.raises(TypeError, match=r"got labels.*`collection.update\(preds=..., target=..., \w+=..., \w+=...\)`"):
        MetricCollection({"S": metric})(clean, labels)


def test_in_a_collection_it_takes_keywords() -> None:
    collection = MetricCollection({"accuracy": MulticlassAccuracy(5), "S": OutputSensitivity(), "risk": make_risk()})
    outputs = {"clean": CLEAN[0], "noisy": NOISY[0], "outputs": CLEAN[0], "twin_outputs": NOISY[0]}
    collection.update(preds=CLEAN[0], target=LABELS[0], **outputs, reference=PREDICTIONS[0])
    collection["risk"].update_training(NOISY[0], LABELS[0])
    values = collection.compute()
    close(values["S"], value(filled(OutputSensitivity(), [0])))
    assert {"accuracy", "S", "risk_criterion"} <= values.keys() and values["risk_criterion"].isfinite()


def test_what_is_left_out_is_said_once_and_updates_go_on() -> None:
    metric, bad = filled(OutputSensitivity()), NOISY[0].clone()
    bad[:2, 1] = torch.tensor([torch.nan, torch.inf])
    metric.update(CLEAN[0], bad)
    with pytest.warns(UserWarning, match="^2 samples gave nan or inf") as warnings:
        for _ in range(2):  # a second time from the cache
            metric.compute(), metric.stderr, metric.per_sample
    assert [warning.filename for warning in warnings] == [__file__]
    close(metric.compute(), output_sensitivity(*(torch.cat([*outputs, outputs[0, 2:]]) for outputs in (CLEAN, NOISY))))
    assert metric.per_sample.isnan().nonzero().flatten().tolist() == [NUM_BATCHES * BATCH_SIZE + i for i in (0, 1)]


# Risk


def test_the_risk_of_batches_is_that_of_all_samples() -> None:
    metric = RiskEstimate(strength=0.5, num_training=400, num_weights=10_000)
    for i in range(NUM_BATCHES):
        metric.update(CLEAN[i], TWIN[i])
        assert metric.compute()["risk_estimate"].isnan() == (i == 0)  # until there is a training sample
        metric.update_training(NOISY[i], LABELS[i])
    tensors = [each.flatten(0, 1) for each in (CLEAN, TWIN, NOISY, LABELS)]
    terms = risk_estimate(*tensors, strength=0.5, factor=variance_factor(400, 10_000))
    values = metric.compute()
    close([values[f"risk_{name}"] for name in terms._fields], list(terms))


def test_the_score_on_labels_leaves_out_those_that_are_ignored() -> None:
    metric = filled(make_risk(), [0])
    metric.update_labels(CLEAN[0], torch.full_like(LABELS[0], -100))
    values = metric.compute()
    assert float(values["risk_label_score"]) == pytest.approx(refined_score(TWIN[0], LABELS[0]).score)
    assert values["risk_num_labels"] == BATCH_SIZE


def test_the_references_of_processes_count_together() -> None:
    of_other = REFERENCE._replace(score=0.5, claim=0.5, noise=0.3, shares=torch.full((5,), 0.2))
    other = filled(make_risk(reference=of_other), [3, 4, 5])
    received = iter([torch.cat(x) if isinstance(x, list) else x for x in other.metric_state.values()])
    options = {"dist_sync_fn": lambda x, group: [x, next(received)], "distributed_available_fn": lambda: True}
    own = REFERENCE._replace(noise=0.1)
    values = filled(make_risk(reference=own, **options), [0, 1, 2]).compute()
    alone = filled(make_risk(reference=own), [0, 1, 2]).compute(), other.compute()
    assert values["risk_reference_weight"] == pytest.approx(2 * 200 / 400)  # one has 2 * 100 / 400
    assert values["risk_label_noise"] == pytest.approx((0.1 + 0.3) / 2)
    close(values["risk_claim"], (alone[0]["risk_claim"] + alone[1]["risk_claim"]) / 2)
    close(values["risk_reference"], (alone[0]["risk_reference"] + alone[1]["risk_reference"]) / 2)


@pytest.mark.parametrize("make", [OutputSensitivity, make_risk])
def test_it_can_be_made_without_memory_and_get_it_later(make: Callable[[], Any]) -> None:
    with torch.device("meta"):
        module = nn.Sequential(make()).half()
    metric = filled(module.to_empty(device="cpu")[0])
    close(value(metric), value(filled(make())))
    metric.reset()
    close(value(filled(metric, [0])), value(filled(make(), [0])))


def test_the_noise_is_unknown_if_one_process_of_several_does_not_know_it() -> None:
    metric = filled(make_risk(reference=REFERENCE._replace(noise=math.nan)), [0])
    for score in (0.5, 0.6, 0.7):
        metric.merge_state(filled(make_risk(reference=REFERENCE._replace(noise=0.5, score=score)), [1]))
    assert "risk_label_noise" not in metric.compute()


NO_NOISE = {"noise": 0.01, "claim": 1.4 * REFERENCE.score}
REFERENCES = {  # and how much the estimate counts
    "noise is found": (REFERENCE._replace(noise=0.2), 1.0),
    "noise can't be excluded": (REFERENCE._replace(noise=0.01), 0.7),
    "there is no reference": (None, 1.0),
    "nothing is known": (REFERENCE._replace(noise=math.nan, claim=1.4), 1.0),
    "no noise is found": (REFERENCE._replace(**NO_NOISE), 0.0),
}


def at_temperature(temperature: float, reference: Any, has_labels: bool = False) -> dict[str, Tensor]:
    """The values for logits divided by a temperature."""
    metric = RiskEstimate(strength=0.5, num_training=400, num_weights=10_000, reference=reference)
    for i in range(NUM_BATCHES):
        clean, noisy = CLEAN[i] / temperature, NOISY[i] / temperature
        metric.update(clean, noisy, **({} if reference is None else {"reference": PREDICTIONS[i]}))
        metric.update_training(noisy, LABELS[i])
        if has_labels:
            metric.update_labels(TWIN[i], LABELS[i])
    return metric.compute()


@pytest.mark.parametrize("case", REFERENCES)
def test_the_criterion_if(case: str) -> None:
    reference, weight = REFERENCES[case]
    values = at_temperature(1.0, reference)
    estimates = {t: float(at_temperature(t, reference)["risk_estimate"]) for t in TEMPERATURES}
    score = (NOISY.double().softmax(-1) - nn.functional.one_hot(LABELS, 5)).square().sum(-1).mean()
    lowest = min(estimates, key=estimates.__getitem__)
    expected = float(score + weight * (estimates[lowest] - score))
    assert float(values["risk_criterion"]) == pytest.approx(expected, abs=1e-5)
    assert lowest != 1 and float(values["risk_temperature"]) == (lowest if weight == 1 else 1)
    noise = math.nan if reference is None else reference.noise
    assert values.get("risk_label_noise", torch.tensor(math.nan)).item() == pytest.approx(noise, nan_ok=True)


@pytest.mark.parametrize("case", REFERENCES)
def test_the_criterion_with_labels_is_their_refined_score_beside_the_lowest_estimate_if(case: str) -> None:
    reference, weight = REFERENCES[case]
    values = at_temperature(1.0, reference, has_labels=True)
    score, temperature = refined_score(TWIN.flatten(0, 1), LABELS.flatten())
    assert float(values["risk_label_score"]) == pytest.approx(score)
    assert float(values["risk_temperature"]) == temperature
    m, m0 = LABELS.numel(), weight * (200 if values.get("risk_reference_weight", 0) > 0 else 40)
    lowest = min(float(at_temperature(t, reference)["risk_estimate"]) for t in TEMPERATURES)
    assert float(values["risk_criterion"]) == pytest.approx((m * score + m0 * lowest) / (m + m0), abs=1e-5)


@pytest.mark.parametrize("noise", [0.2, math.nan])
def test_a_reference_counts_once_in_calls_and_as_that_of_another_process_after_a_merge(noise: float) -> None:
    def make(num_training: int) -> Any:
        return RiskEstimate(reference=REFERENCE._replace(noise=noise), num_training=num_training)

    expected = filled(make(400), [0, 1]).compute()
    called, merged = filled(make(400), [0, 1], called=True), filled(make(800), [0])
    merged.merge_state(filled(make(800), [1]))  # they know twice as many samples
    for each in (called, merged):
        assert {name: pytest.approx(value) for name, value in expected.items()} == each.compute()


def test_a_call_gives_the_values_so_far() -> None:
    metric, other = filled(make_risk(), [0]), filled(make_risk(), [0])
    values = metric(CLEAN[1], NOISY[1], reference=PREDICTIONS[1])
    other.update(CLEAN[1], NOISY[1], reference=PREDICTIONS[1])
    assert values == other.compute() and values["risk_estimate"] < 2


@pytest.mark.parametrize("weight", [0.0, 0.7, 1.0])
def test_a_verdict_of_an_earlier_epoch_counts(weight: float) -> None:
    metrics = [make_risk(reference=REFERENCE._replace(**NO_NOISE), gap_weight=each) for each in (None, weight)]
    values = [filled(metric).compute() for metric in metrics]
    assert [metric.gap_weight for metric in metrics] == [0.0, weight]
    assert (values[1]["risk_criterion"] == values[0]["risk_criterion"]) == (weight == 0)


def test_it_says_what_the_reference_has_found_by_itself() -> None:
    plain = RiskEstimate(strength=0.5, num_training=400, num_weights=10_000)
    for i in range(NUM_BATCHES):
        plain.update(CLEAN[i], NOISY[i]), plain.update_training(NOISY[i], LABELS[i])
    by_twins, values = plain.compute(), filled(metric := make_risk(reference=REFERENCE._replace(noise=0.25))).compute()
    assert metric.gap_weight == plain.gap_weight == 1.0
    assert float(values["risk_label_noise"]) == pytest.approx(0.25) and values["risk_reference"].isfinite()
    terms = sum(values[f"risk_{name}"] for name in ("claim", "overconfidence", "memorization", "variance"))
    assert float(terms) == pytest.approx(float(by_twins["risk_estimate"]))
    assert not {name for name in by_twins if "reference" in name or "noise" in name}


@pytest.mark.parametrize("called", [False, True])
def test_a_calibration_outlives_its_epoch_but_no_epoch_counts_twice(called: bool) -> None:
    metric, whole = filled(make_risk(), [0]), filled(make_risk())
    metric.compute()  # in the middle of an epoch
    first = filled(metric, range(1, NUM_BATCHES), called).compute()
    calibration = metric.calibration
    assert first == whole.compute() and calibration == whole.calibration != Calibration()
    metric.reset()
    assert metric.calibration == calibration
    close(filled(metric).compute(), first)
    assert metric.calibration == calibration


def test_updates_keep_no_graph() -> None:
    metric, weight = make_risk(), torch.ones(5, requires_grad=True)
    metric.update(CLEAN[0] * weight, NOISY[0] * weight, reference=PREDICTIONS[0])
    metric.update_training(NOISY[0] * weight, LABELS[0])
    metric.update_labels(TWIN[0] * weight, LABELS[0])
    states = [x for state in metric.metric_state.values() for x in (state if isinstance(state, list) else [state])]
    assert not any(state.requires_grad for state in states)


def test_bad_arguments_of_the_risk_are_refused() -> None:
    bad: list[Callable[[], Any]] = [
        lambda: RiskEstimate("regression"),
        lambda: RiskEstimate().update_training(CLEAN[0], LABELS[0] + 5),
        lambda: RiskEstimate().update_labels(CLEAN[0], LABELS[0][:, None]),
        lambda: RiskEstimate().update(CLEAN[0], TWIN[0, :, :1]),
        lambda: RiskEstimate().update(CLEAN[0], TWIN[0], baseline_outputs=TWIN[0, :1]),
        lambda: RiskEstimate().update(CLEAN[0], TWIN[0], reference=PREDICTIONS[0]),
        lambda: make_risk().update(CLEAN[0], TWIN[0], reference=PREDICTIONS[0, :1]),
        lambda: make_risk().update(CLEAN[0], TWIN[0]),
    ]
    for refused in bad:
        with pytest.raises(ValueError, match="Expected "):
            refused()


def test_it_does_without_lightning() -> None:  # what processes share is tested with the callbacks
    code = "import sys, lightning_sensitivity as ls; ls.OutputSensitivity(); sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
