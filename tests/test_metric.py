import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torchmetrics import Metric

from lightning_sensitivity import OutputSensitivity
from lightning_sensitivity.functional import output_sensitivity, risk_estimate
from lightning_sensitivity.functional.sensitivity import SensitivityEstimate, sensitivity_from_rows, sensitivity_rows
from lightning_sensitivity.metric import RiskEstimate

NUM_BATCHES, BATCH_SIZE = 6, 16
CLEAN, NOISY, TWIN = torch.randn(3, NUM_BATCHES, BATCH_SIZE, 5, generator=torch.Generator().manual_seed(0))
LABELS = CLEAN.roll(1).argmax(-1)


def filled(metric: Any, batches: Iterable[int] = range(NUM_BATCHES)) -> Any:
    for i in batches:
        metric.update(CLEAN[i], NOISY[i])
    return metric


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


def merged(metric: Metric) -> Any:
    other = OutputSensitivity()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert other.compute().isnan()  # must not survive the merge
    other.merge_state(metric)
    return other


WAYS = [Metric.clone, merged, lambda m: pickle.loads(pickle.dumps(m)), lambda m: nn.Sequential(m).bfloat16()[0]]


@pytest.mark.parametrize("treat", WAYS)
def test_it_goes_on_as_if_nothing_had_happened(treat: Callable[[Metric], Any]) -> None:
    metric = treat(filled(OutputSensitivity(), [0]))
    close(metric.compute(), expected(0).sensitivity)
    close(filled(metric, range(1, NUM_BATCHES)).compute(), expected().sensitivity)
    assert {rows.dtype for rows in metric.rows} == {torch.float64}


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


def test_the_risk_of_batches_is_that_of_all_samples() -> None:
    metric = RiskEstimate("multiclass")
    assert metric.compute().estimate.isnan()  # without a warning: a process may have no batch
    for i in range(NUM_BATCHES):
        metric.update(CLEAN[i], TWIN[i], weight=0.5)
        assert metric.compute().estimate.isnan() == (i == 0)  # until there is a training sample
        metric.update_training(NOISY[i], LABELS[i])
    close(metric.compute(), risk_estimate(*(each.flatten(0, 1) for each in (CLEAN, TWIN, NOISY, LABELS))))
    assert [float(total[0]) for total in metric.totals] == [NUM_BATCHES * BATCH_SIZE * weight for weight in (0.5, 1)]


def test_it_does_without_lightning() -> None:  # what processes share is tested with the callbacks
    code = "import sys, lightning_sensitivity as ls; ls.OutputSensitivity(); sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
