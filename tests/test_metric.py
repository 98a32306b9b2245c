import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lightning_sensitivity import OutputSensitivity, RiskEstimate
from lightning_sensitivity.functional import output_sensitivity, risk_estimate, variance_factor
from lightning_sensitivity.functional.sensitivity import SensitivityEstimate, sensitivity_from_rows, sensitivity_rows

NUM_BATCHES, BATCH_SIZE = 6, 16
CLEAN, NOISY, TWIN = torch.randn(3, NUM_BATCHES, BATCH_SIZE, 5, generator=torch.Generator().manual_seed(0))
LABELS = CLEAN.roll(1).argmax(-1)


def filled(metric: Any, batches: Iterable[int] = range(NUM_BATCHES)) -> Any:
    for i in batches:
        metric.update(CLEAN[i], NOISY[i])
        if isinstance(metric, RiskEstimate):
            metric.update_training(NOISY[i], LABELS[i])
            metric.update_labels(TWIN[i], LABELS[i])
    return metric


def value(metric: Any) -> Tensor:
    result = metric.compute()
    return torch.stack(list(result.values())) if isinstance(result, dict) else result


def expected(*batches: int) -> SensitivityEstimate:
    clean, noisy = (outputs[list(batches or range(NUM_BATCHES))].flatten(0, 1) for outputs in (CLEAN, NOISY))
    return sensitivity_from_rows(sensitivity_rows(clean, noisy))


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("per_output", [False, True])
def test_batches_give_what_all_samples_give(per_output: bool) -> None:
    metric, place = filled(OutputSensitivity(per_output)), 2 * per_output
    close((metric.compute(), metric.stderr), expected()[place : place + 2])
    change = (NOISY.double() - CLEAN.double()).flatten(0, 1)
    deviations = change if per_output else change.mean(1, keepdim=True) - change.mean()
    close(metric.per_sample, deviations.square().mean(1))
    metric.update(CLEAN[0], NOISY[0] + 1)
    assert len(metric.per_sample) == metric.estimate.num_samples == (NUM_BATCHES + 1) * BATCH_SIZE
    metric.reset()
    close(metric(CLEAN[0], (NOISY[0],)), expected(0)[place])


# What both metrics survive


def make_risk() -> RiskEstimate:
    return RiskEstimate(strength=0.5, num_training=400, num_weights=10_000)


def merged(metric: Any) -> Any:
    other = make_risk() if isinstance(metric, RiskEstimate) else OutputSensitivity()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert value(other).isnan().any()  # must not survive the merge
    other.merge_state(metric)
    return other


def moved_while_synced(metric: Any) -> Any:
    metric.sync(dist_sync_fn=lambda x, group: [x, x[:0] if x.ndim > 1 else 0 * x], distributed_available=lambda: True)
    synced = metric.metric_state
    close(metric.bfloat16().metric_state, synced)
    metric.unsync()
    return metric


WAYS: dict[str, Callable[[Any], Any]] = {
    "cloned": Metric.clone,
    "merged into a computed one": merged,
    "pickled": lambda metric: pickle.loads(pickle.dumps(metric)),
    "cast with a model": lambda metric: nn.Sequential(metric).bfloat16()[0],
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


def test_lower_is_better_for_a_risk_and_nothing_is_for_sensitivity() -> None:
    assert OutputSensitivity.higher_is_better is None  # lowest before training
    assert RiskEstimate.higher_is_better is False


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
    metric = RiskEstimate(strength=0.5, has_batch_norm=True)
    metric.set_size(400, 10_000)
    for i in range(NUM_BATCHES):
        metric.update(CLEAN[i], TWIN[i])
        assert metric.compute()["risk_estimate"].isnan() == (i == 0)  # until there is a training sample
        metric.update_training(NOISY[i], LABELS[i])
    tensors = [each.flatten(0, 1) for each in (CLEAN, TWIN, NOISY, LABELS)]
    options = {"strength": 0.5, "factor": variance_factor(400, 10_000, has_batch_norm=True)}
    terms = risk_estimate(*tensors, **options)
    close(metric.compute(), {f"risk_{name}": term for name, term in terms._asdict().items()})
    metric.update_labels(CLEAN[0], LABELS[0])
    values = metric.compute()
    close(values["risk_estimate"], risk_estimate(*tensors, **options, labelled_outputs=CLEAN[0], labels=LABELS[0])[0])
    score = (CLEAN[0].softmax(1) - nn.functional.one_hot(LABELS[0], 5)).square().sum(1).double().mean()
    torch.testing.assert_close(values["risk_label_score"], score)
    assert values["risk_num_labels"] == BATCH_SIZE


def test_sizes_that_are_known_later_change_a_computed_value() -> None:
    metric, factor = filled(RiskEstimate(strength=0.5)), variance_factor(400, 10_000)
    variance = metric.compute()["risk_variance"]
    metric.set_size(400, 10_000)
    close(metric.compute()["risk_variance"], factor * variance)
    metric.set_size(None, 10_000)
    close(metric.compute()["risk_variance"], variance)


def test_a_doubtful_risk_is_explained() -> None:
    metric = RiskEstimate()
    filled(metric, [0]).compute()
    assert metric.messages == {}
    metric.update(torch.full((1, 5), torch.nan), CLEAN[0, :1])
    metric.compute()
    assert list(metric.messages) == ["non-finite"]


def test_bad_arguments_of_the_risk_are_refused() -> None:
    bad: list[Callable[[], Any]] = [
        lambda: RiskEstimate("regression"),
        lambda: RiskEstimate(strength=0.0),
        lambda: RiskEstimate(num_training=0, num_weights=1),
        lambda: RiskEstimate().update_training(CLEAN[0], LABELS[0] + 5),
        lambda: RiskEstimate().update_labels(CLEAN[0], LABELS[0][:, None]),
        lambda: RiskEstimate().update(CLEAN[0], TWIN[0, :, :1]),
    ]
    for refused in bad:
        with pytest.raises(ValueError, match="Expected "):
            refused()


def test_it_does_without_lightning() -> None:  # what processes share is tested with the callbacks
    code = "import sys, lightning_sensitivity as ls; ls.OutputSensitivity(); sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
