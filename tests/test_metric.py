import os
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_sensitivity import OutputSensitivity
from lightning_sensitivity.functional import output_sensitivity
from lightning_sensitivity.functional.sensitivity import sensitivity_from_rows, sensitivity_rows

NUM_BATCHES, BATCH_SIZE, NUM_OUTPUTS = 6, 16, 5
CLEAN, NOISY = torch.randn(2, NUM_BATCHES, BATCH_SIZE, NUM_OUTPUTS, generator=torch.Generator().manual_seed(0))


def filled(metric: Any = None, batches: Iterable[int] = range(NUM_BATCHES)) -> Any:
    metric = OutputSensitivity() if metric is None else metric
    for i in batches:
        metric.update(CLEAN[i], NOISY[i])
    return metric


def value_of(batches: Iterable[int] = range(NUM_BATCHES), per_output: bool = False) -> Tensor:
    return output_sensitivity(CLEAN[list(batches)].flatten(0, 1), NOISY[list(batches)].flatten(0, 1), per_output)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0, check_dtype=False, equal_nan=True)


@pytest.mark.parametrize("per_output", [False, True])
def test_batches_give_what_all_samples_give(per_output: bool) -> None:
    metric = filled(OutputSensitivity(per_output))
    estimate = sensitivity_from_rows(sensitivity_rows(CLEAN.flatten(0, 1), NOISY.flatten(0, 1)))
    close(metric.compute(), estimate.mean_square if per_output else estimate.sensitivity)
    close(metric.stderr, estimate.mean_square_stderr if per_output else estimate.stderr)
    assert metric.num_samples == metric.estimate.num_samples == NUM_BATCHES * BATCH_SIZE
    change = (NOISY.double() - CLEAN.double()).flatten(0, 1)
    averages = change.mean(1)
    close(metric.per_sample, change.square().mean(1) if per_output else (averages - averages.mean()).square())
    close(metric.per_sample.mean(), metric.compute())
    metric.update(CLEAN[0], NOISY[0] + 1)
    assert metric.per_sample.shape == ((NUM_BATCHES + 1) * BATCH_SIZE,) and metric.stderr != estimate.stderr
    metric.reset()
    close(filled(metric, [0]).compute(), value_of([0], per_output))
    assert metric.num_samples == BATCH_SIZE


def pickled(metric: Metric) -> Any:
    return pickle.loads(pickle.dumps(metric))


def restored(metric: Metric) -> Any:
    assert not metric.state_dict()
    metric.persistent(True)
    other = OutputSensitivity()
    other.persistent(True)
    other.load_state_dict(metric.state_dict())
    return other


def used_in_inference_mode(metric: Metric) -> Any:
    with torch.inference_mode():
        return filled(OutputSensitivity(), [0])


def merged(metric: Metric) -> Any:
    other = OutputSensitivity()
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert other.compute().isnan()  # must not survive the merge
    other.merge_state(metric)
    return other


TREATMENTS = [pickled, Metric.clone, restored, used_in_inference_mode, merged, Metric.half, Metric.double]
CASTS = [lambda metric: nn.ModuleList([metric]).to(torch.bfloat16)[0], lambda metric: metric.to("cpu", torch.float16)]


@pytest.mark.parametrize("treat", TREATMENTS + CASTS)
def test_goes_on_as_if_nothing_had_happened(treat: Callable[[Metric], Any]) -> None:
    metric = filled(None, [0])
    after = filled(treat(metric), range(1, NUM_BATCHES))
    close(after.compute(), value_of())
    assert after.compute().dtype == torch.float64 and after.num_samples == NUM_BATCHES * BATCH_SIZE
    assert {rows.dtype for rows in after.rows} == {torch.float64}
    if after is not metric:
        assert metric.num_samples == BATCH_SIZE


def test_in_a_collection_of_which_forward_gives_the_values_of_the_batch() -> None:
    collection = MetricCollection({"averaged": OutputSensitivity(), "each": OutputSensitivity(per_output=True)})
    for i in range(NUM_BATCHES):
        of_batch = collection(CLEAN[i], (NOISY[i],))
        close(of_batch["averaged"], value_of([i]))
    values = collection.compute()
    close(values["averaged"], value_of())
    close(values["each"], value_of(per_output=True))
    close(collection["averaged"].per_sample, filled().per_sample)  # in their order


def test_updates_after_the_first_do_not_wait_for_the_device() -> None:
    from tests.helpers import Watch  # which imports lightning; the processes below must not

    def refuse(function: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = function.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "is_nonzero", "equal", "nonzero"}
        assert name != "_to_copy" or not kwargs.get("device")

    with pytest.raises(AssertionError), Watch(refuse):
        filled(None, [0])
    metric = filled(None, [0])
    with Watch(refuse):
        filled(metric, [1, 2])
        metric.update(CLEAN[3], iter([NOISY[3], NOISY[4]]))


# What is left out, warned of, and refused


def test_each_doubt_is_said_once_and_updates_go_on() -> None:
    metric = filled()
    bad = NOISY[0].clone()
    bad[3, 1], bad[5, 0] = torch.nan, torch.inf
    metric.update(CLEAN[0], bad)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # a second time from the cache
            metric.compute(), metric.stderr, metric.per_sample
    (warning,) = caught
    assert "2 samples gave nan or inf and were left out; 110 remain" in str(warning.message)
    kept = [i for i in range(BATCH_SIZE) if i not in (3, 5)]
    clean, noisy = (torch.cat([each.flatten(0, 1), each[0, kept]]) for each in (CLEAN, NOISY))
    close(metric.compute(), output_sensitivity(clean, noisy))
    assert metric.per_sample.isnan().nonzero().flatten().tolist() == [NUM_BATCHES * BATCH_SIZE + i for i in (3, 5)]


def test_masked_outputs_are_told_by_the_first_batch() -> None:
    metric, mask = OutputSensitivity(), torch.tensor([False, True, False, False, True])
    for clean, noisy in zip(CLEAN, NOISY, strict=True):
        metric.update(*(each.masked_fill(mask, -torch.inf) for each in (clean, noisy)))
    with pytest.warns(UserWarning, match="-inf in both passes have not changed"):
        metric.compute()


def test_another_number_of_outputs_is_refused() -> None:
    metric, other = filled(), OutputSensitivity()
    other.update(CLEAN[0, :, :4], NOISY[0, :, :4])
    metric.merge_state(other)
    other(CLEAN[0], NOISY[0])  # torchmetrics resets the metric for a moment
    for each in (metric, other):
        with pytest.raises(ValueError, match=r"same number of outputs K .* but got 4 and 5\."):
            each.compute()
    other.reset()
    close(filled(other).compute(), value_of())


@pytest.mark.parametrize("kwargs", [{"per_output": 1}, {"per_output": None}, {"unknown": 1}])
def test_bad_arguments(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"`per_output` to be a bool, but got|Unexpected keyword arguments"):
        OutputSensitivity(**kwargs)


# Several processes


def in_a_process(rank: int, file: Path) -> None:
    import lightning_sensitivity.perturbations
    import lightning_sensitivity.twins  # noqa: F401

    assert "lightning" not in sys.modules  # which the lower floors do without
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    uneven = filled(None, range(4) if rank == 0 else range(4, NUM_BATCHES))
    close(uneven.compute(), value_of())
    everything = sensitivity_from_rows(sensitivity_rows(CLEAN.flatten(0, 1), NOISY.flatten(0, 1)))
    close(uneven.stderr, everything.stderr)
    filled(uneven, [0])  # goes on with its own samples
    assert uneven.num_samples == (NUM_BATCHES + 2) * BATCH_SIZE
    close(OutputSensitivity(dist_sync_on_step=True)(CLEAN[rank], NOISY[rank]), value_of([0, 1]))
    empty = filled(OutputSensitivity().to(torch.float16), [0] if rank == 0 else [])
    empty._update_count = 1  # keep torchmetrics from warning
    close(empty.compute(), value_of([0]))
    assert len(empty.per_sample) == BATCH_SIZE
    other = OutputSensitivity()
    other.update(CLEAN[0, :, rank:], NOISY[0, :, rank:])
    with pytest.raises(ValueError, match="but got 4 and 5"):  # in both processes: none waits for the other
        other.compute()
    os._exit(0)  # at an ordinary end, gloo's threads now and then abort a process, or wait for another for ever


def test_two_processes_give_the_value_of_all_samples(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(in_a_process, args=(tmp_path / "rendezvous",), nprocs=2)
