import os
import pickle
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torchmetrics import Metric, MetricCollection

from lightning_sensitivity import OutputSensitivity
from lightning_sensitivity.functional import output_sensitivity, risk_estimate
from lightning_sensitivity.functional.sensitivity import SensitivityEstimate, sensitivity_from_rows, sensitivity_rows
from lightning_sensitivity.metric import RiskEstimate

NUM_BATCHES, BATCH_SIZE = 6, 16
CLEAN, NOISY, TWIN = torch.randn(3, NUM_BATCHES, BATCH_SIZE, 5, generator=torch.Generator().manual_seed(0))
LABELS = CLEAN.roll(1).argmax(-1)


def filled(metric: Any = None, batches: Iterable[int] = range(NUM_BATCHES)) -> Any:
    metric = OutputSensitivity() if metric is None else metric
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
    metric, whole = filled(OutputSensitivity(per_output)), expected()
    close(metric.compute(), whole.mean_square if per_output else whole.sensitivity)
    close(metric.stderr, whole.mean_square_stderr if per_output else whole.stderr)
    change = (NOISY.double() - CLEAN.double()).flatten(0, 1)
    averages = change.mean(1)
    close(metric.per_sample, change.square().mean(1) if per_output else (averages - averages.mean()).square())
    metric.update(CLEAN[0], NOISY[0] + 1)
    assert len(metric.per_sample) == metric.num_samples == (NUM_BATCHES + 1) * BATCH_SIZE
    metric.reset()
    close(filled(metric, [0]).estimate, expected(0))


def used_in_inference_mode(metric: Metric) -> Any:
    with torch.inference_mode():
        return filled(OutputSensitivity(), [0])


def merged(metric: Metric) -> Any:
    other = OutputSensitivity()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert other.compute().isnan()  # must not survive the merge
    other.merge_state(metric)
    return other


def in_a_model_of_16_bits(metric: Metric) -> Any:
    return nn.ModuleList([metric]).to(torch.bfloat16)[0]


def pickled(metric: Metric) -> Any:
    return pickle.loads(pickle.dumps(metric))


@pytest.mark.parametrize("treat", [pickled, Metric.clone, used_in_inference_mode, merged, in_a_model_of_16_bits])
def test_it_goes_on_as_if_nothing_had_happened(treat: Callable[[Metric], Any]) -> None:
    metric = filled(None, [0])
    after = filled(treat(metric), range(1, NUM_BATCHES))
    close(after.compute(), expected().sensitivity)
    assert {rows.dtype for rows in after.rows} == {torch.float64}
    assert after is metric or metric.num_samples == BATCH_SIZE


def test_in_a_collection_of_which_forward_gives_the_values_of_the_batch() -> None:
    collection = MetricCollection({"averaged": OutputSensitivity(), "each": OutputSensitivity(per_output=True)})
    for i in range(NUM_BATCHES):
        close(collection(CLEAN[i], (NOISY[i],))["averaged"], expected(i).sensitivity)
    close([*collection.compute().values()], [expected().sensitivity, expected().mean_square])


def test_what_is_left_out_is_said_once_and_updates_go_on() -> None:
    metric, bad = filled(), NOISY[0].clone()
    bad[:2, 1] = torch.nan
    metric.update(CLEAN[0], bad)
    with pytest.warns(UserWarning, match="^2 samples gave nan or inf") as warnings:
        for _ in range(2):  # a second time from the cache
            metric.compute(), metric.stderr, metric.per_sample
    assert [warning.filename for warning in warnings] == [__file__]
    clean, noisy = (torch.cat([*outputs, outputs[0, 2:]]) for outputs in (CLEAN, NOISY))
    close(metric.compute(), output_sensitivity(clean, noisy))
    assert metric.per_sample.isnan().nonzero().flatten().tolist() == [NUM_BATCHES * BATCH_SIZE + i for i in (0, 1)]


def test_another_number_of_outputs_is_refused() -> None:
    metric = filled()
    metric.update(CLEAN[0, :, :4], NOISY[0, :, :4])
    with pytest.raises(ValueError, match=r"outputs K .* 4 and 5"):
        metric.compute()
    with pytest.raises(ValueError, match="`per_output`.* got 1"):
        OutputSensitivity(per_output=1)  # type: ignore[arg-type]


def test_the_risk_of_batches_is_that_of_all_samples() -> None:
    metric = RiskEstimate("multiclass", strength=0.5)
    assert metric.compute().estimate.isnan()  # without a warning: a process may have no batch
    metric.num_training = 10_000
    for i in range(NUM_BATCHES):
        for twin in (TWIN[i], NOISY[i]):  # two of the same samples
            metric.update(CLEAN[i], twin, weight=0.5)
        assert metric.compute().estimate.isnan() == (i == 0)  # until there is a training sample
        metric.update_training(NOISY[i], LABELS[i])
    unseen, twins = CLEAN.flatten(0, 1).repeat(2, 1), torch.cat([TWIN, NOISY]).flatten(0, 1)
    whole = risk_estimate(unseen, twins, NOISY.flatten(0, 1), LABELS.flatten(), "multiclass", 0.5, 10_000)
    close(metric.compute(), whole)
    assert [float(total[0]) for total in metric.totals] == [NUM_BATCHES * BATCH_SIZE] * 2


def in_a_process(rank: int, file: Path) -> None:
    assert "lightning" not in sys.modules  # which the lower floors do without
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = filled(None, range(4) if rank == 0 else range(4, NUM_BATCHES))
    close((metric.compute(), metric.stderr), (expected().sensitivity, expected().stderr))
    filled(metric, [0])  # goes on with its own samples
    assert metric.num_samples == (NUM_BATCHES + 2) * BATCH_SIZE
    close(OutputSensitivity(dist_sync_on_step=True)(CLEAN[rank], NOISY[rank]), expected(0, 1).sensitivity)
    empty = filled(OutputSensitivity().to(torch.float16), [0] if rank == 0 else [])
    empty._update_count = 1  # keep torchmetrics from warning
    close(empty.estimate, expected(0))
    metric.update(CLEAN[0, :, rank:], NOISY[0, :, rank:])
    with pytest.raises(ValueError, match="4 and 5"):  # in both processes: none waits for the other
        metric.compute()
    risk, whole = RiskEstimate("multiclass"), RiskEstimate("multiclass", sync_on_compute=False)
    for each, batches in ((risk, [rank]), (whole, [0, 1])):
        for i in batches:
            each.update(CLEAN[i], TWIN[i])
            each.update_training(NOISY[i], LABELS[i])
    close(risk.compute(), whole.compute())
    os._exit(0)  # at an ordinary end, gloo's threads now and then abort a process, or wait for another for ever


def test_two_processes_give_the_values_of_all_samples(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_a_process, args=(tmp_path / "rendezvous",), nprocs=2)
