"""The metric: batches of any sizes and processes give what all samples give, and nothing on the way is lost."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import MetricCollection, MetricTracker
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.wrappers import BootStrapper, MultioutputWrapper

from lightning_sensitivity import OutputSensitivity
from lightning_sensitivity.functional import output_sensitivity
from lightning_sensitivity.functional.sensitivity import SensitivityEstimate, sensitivity_from_sums, sensitivity_sums
from tests.helpers import run_processes

SIZES = 16, 9, 1, 20, 13
NUM_SAMPLES, NUM_BATCHES = sum(SIZES), len(SIZES)
ALL_CLEAN, ALL_NOISY, OTHERS = 2 * torch.randn(3, NUM_SAMPLES, 5, generator=torch.Generator().manual_seed(0))
ALL_LABELS = (ALL_CLEAN + 3 * OTHERS).argmax(-1)
CLEAN, NOISY, LABELS = (each.split(SIZES) for each in (ALL_CLEAN, ALL_NOISY, ALL_LABELS))
ROWS = torch.arange(NUM_SAMPLES).split(SIZES)


def filled(metric: Any, batches: Iterable[int] = range(NUM_BATCHES), called: bool = False) -> Any:
    for i in batches:
        (metric if called else metric.update)(CLEAN[i], NOISY[i])
    return metric


def expected(*batches: int, per_output: bool = False) -> SensitivityEstimate:
    rows = torch.cat([ROWS[i] for i in batches or range(NUM_BATCHES)])
    return sensitivity_from_sums(sensitivity_sums(ALL_CLEAN[rows], ALL_NOISY[rows]), per_output)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


# What it survives


def called_as_a_function(metric: Any) -> Any:
    metric.reset()
    return filled(metric, [0], called=True)


def moved_while_synced(metric: Any) -> Any:
    def gather(x: Tensor, group: Any) -> list[Tensor]:
        return [x, x[:0]]

    metric.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    synced = metric.metric_state
    close(metric.bfloat16().metric_state, synced)
    metric.unsync()
    return metric


def cast_and_reset(metric: Any) -> Any:
    metric.to(torch.bfloat16).reset()
    return filled(metric, [0])


def merged(metric: Any) -> Any:
    empty, state = type(metric)(), metric.metric_state
    empty.update(CLEAN[0][:0], NOISY[0][:0])
    empty.merge_state(metric)
    other = filled(type(metric)(), [1])
    other.merge_state(state)
    close(other.compute(), expected(0, 1).value)
    return empty


def loaded(metric: Any) -> Any:
    assert not metric.state_dict()
    other = type(metric)()
    for each in (metric, other):
        each.persistent(True)
    other.load_state_dict(metric.state_dict())
    return other


def scripted(metric: Any) -> Any:
    torch.jit.script(metric)
    return metric


WAYS: dict[str, Callable[[Any], Any]] = {
    "called as a function": called_as_a_function,
    "merged into another": merged,
    "pickled": lambda metric: pickle.loads(pickle.dumps(metric)),
    "cloned": lambda metric: metric.clone(),
    "a state that is loaded": loaded,
    "scripted": scripted,
    "cast with a model": lambda metric: nn.Sequential(metric).to(torch.bfloat16)[0],
    "cast, and filled anew": cast_and_reset,
    "in eval mode with a model": lambda metric: nn.Sequential(metric).train().eval()[0],
    "moved while it is synced": moved_while_synced,
}


@pytest.mark.filterwarnings("ignore:.*called before the ``update``", "ignore:.*torch.jit.script")  # by scripting
@pytest.mark.parametrize("way", WAYS)
def test_it_resumes_as_if_nothing_had_happened(way: str) -> None:
    metric = WAYS[way](filled(OutputSensitivity(), [0]))
    close(metric.compute(), filled(OutputSensitivity(), [0]).compute())
    close(filled(metric, range(1, NUM_BATCHES)).compute(), filled(OutputSensitivity()).compute())
    assert {x.dtype for x in metric.rows} == {torch.float64}


def measure_in_process(rank: int, folder: Path) -> tuple[Tensor, Tensor]:
    """The first process has no sample, the other all; a step of each is that of both."""
    torch.distributed.init_process_group("gloo", world_size=2, rank=rank)
    metric = OutputSensitivity()
    if rank == 1:
        filled(metric)
    metric._update_count = max(1, metric._update_count)  # else it warns that nothing came
    value: Tensor = metric.compute()
    assert len(metric.rows[-1]) == rank * SIZES[-1]  # again those of its own
    return value, OutputSensitivity(dist_sync_on_step=True)(CLEAN[rank], NOISY[rank])


def test_two_processes_compute_what_one_computes_even_if_one_has_no_sample(tmp_path: Path) -> None:
    for value, of_step in run_processes(measure_in_process, tmp_path):
        close(value, filled(OutputSensitivity()).compute())
        close(of_step, expected(0, 1).value)


@pytest.mark.long
def test_it_does_without_lightning() -> None:  # importing torch anew takes seconds
    code = "import sys, lightning_sensitivity as ls; ls.OutputSensitivity(); sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# In a collection


def test_in_a_collection_it_takes_keywords() -> None:
    metrics = {"accuracy": MulticlassAccuracy(5), "S": OutputSensitivity()}
    collection = MetricCollection(metrics, prefix="val/")
    for i in range(NUM_BATCHES):
        collection.update(preds=CLEAN[i], target=LABELS[i], clean=CLEAN[i], noisy=NOISY[i])
    values = collection.compute()
    assert set(values) == {"val/accuracy", "val/S"}
    close(values["val/S"], filled(OutputSensitivity()).compute())


def test_labels_that_a_collection_passes_are_refused() -> None:
    with pytest.raises(TypeError, match="Expected `noisy` to be a floating tensor"):
        MetricCollection({"S": OutputSensitivity()})(CLEAN[0], LABELS[0])


@pytest.mark.parametrize("dtype", [torch.half, torch.bfloat16])
def test_outputs_in_16_bits_give_what_their_numbers_give(dtype: torch.dtype) -> None:
    clean, noisy = CLEAN[0].to(dtype), NOISY[0].to(dtype)
    close(OutputSensitivity().half()(clean, noisy), OutputSensitivity()(clean.double(), noisy.double()))


def test_what_is_no_flag_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected argument `per_output` to be a bool, but got 1"):
        OutputSensitivity(per_output=1)  # type: ignore[arg-type]


# What torchmetrics does with any metric


def in_a_group() -> tuple[Any, Any]:
    collection = filled(MetricCollection({"S": OutputSensitivity(), "single": OutputSensitivity(per_output=True)}))
    assert [*collection.compute_groups.values()] == [["S", "single"]]  # which share their rows

    def values(*batches: int) -> dict[str, Tensor]:
        return {"S": expected(*batches).value, "single": expected(*batches, per_output=True).value}

    close(collection.compute(), values())
    close(collection(CLEAN[0], NOISY[0]), values(0))
    return collection.compute(), values(*range(NUM_BATCHES), 0)


def by_columns() -> tuple[Any, Any]:
    metric = filled(MultioutputWrapper(OutputSensitivity(), 5))
    return metric.compute(), (ALL_NOISY.double() - ALL_CLEAN).var(0, correction=0)


def followed() -> tuple[Any, Any]:
    tracker = MetricTracker(OutputSensitivity(), maximize=False)
    for batch in range(NUM_BATCHES):
        tracker.increment()
        filled(tracker, [batch])
    return tracker.compute_all(), torch.stack([expected(batch).value for batch in range(NUM_BATCHES)])


def in_a_formula() -> tuple[Any, Any]:
    root = OutputSensitivity() ** 0.5
    return filled(root).compute(), expected().value.sqrt()


@pytest.mark.parametrize("use", [in_a_group, by_columns, followed, in_a_formula])
def test_what_torchmetrics_makes_of_it_is_what_all_samples_give(use: Callable[[], tuple[Any, Any]]) -> None:
    close(*use())


def test_a_bootstrap_finds_its_standard_error() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # which it draws by
    of_bootstrap = filled(BootStrapper(OutputSensitivity(), num_bootstraps=300)).compute()
    assert of_bootstrap["std"] == pytest.approx(float(expected().stderr), rel=0.2)


def test_its_flags_stay_and_are_those_of_a_plot_from_0() -> None:
    metric = filled(OutputSensitivity())
    for flag in ("is_differentiable", "higher_is_better"):
        with pytest.raises(RuntimeError, match="Can't change const"):
            setattr(metric, flag, True)
    outputs = CLEAN[0].clone().requires_grad_()
    assert metric(outputs, NOISY[0]).requires_grad == metric.is_differentiable
    figure, axes = metric.plot()
    for value in (metric.compute(), [metric.compute()] * 3):
        assert metric.plot(value, axes)[1] is axes
    assert axes.get_ylim()[0] <= 0 < axes.get_ylim()[1]
    plt.close(figure)


# What it computes


@pytest.mark.parametrize("per_output", [False, True])
def test_batches_give_what_all_samples_give(per_output: bool) -> None:
    metric = filled(OutputSensitivity(per_output))
    close((metric.compute(), metric.stderr), expected(per_output=per_output)[:2])
    metric.update(CLEAN[0], NOISY[0] + 1)
    assert metric.estimate.num_samples == NUM_SAMPLES + SIZES[0]
    metric.reset()
    close(metric(CLEAN[0], (NOISY[0],)), expected(0, per_output=per_output).value)


def test_what_is_left_out_is_said_once_and_updates_go_on() -> None:
    metric, bad = filled(OutputSensitivity()), NOISY[0].clone()
    bad[:2, 1] = torch.tensor([torch.nan, torch.inf])
    metric.update(CLEAN[0], bad)
    with pytest.warns(UserWarning, match="^2 samples gave nan or inf") as warnings:
        for _ in range(2):  # a second time from the cache
            metric.compute(), metric.stderr
    assert [warning.filename for warning in warnings] == [__file__]
    kept = (torch.cat([every, first[2:]]) for every, first in ((ALL_CLEAN, CLEAN[0]), (ALL_NOISY, NOISY[0])))
    close(metric.compute(), output_sensitivity(*kept))
    assert (metric.estimate.num_samples, metric.estimate.num_non_finite) == (NUM_SAMPLES + SIZES[0] - 2, 2)


class AppleGPU(TorchFunctionMode):
    """Refuses to move float64 to a device, as MPS does; the CPU stands in for it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args[1:], *(kwargs or {}).values()]
        moves, casts = (any(isinstance(each, kind) for each in given) for kind in (torch.device, torch.dtype))
        if function is Tensor.to and args[0].dtype == torch.float64 and moves and not casts:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return function(*args, **(kwargs or {}))


def test_no_float64_is_moved_to_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("functional.sensitivity", "metric"):
        module = sys.modules[f"lightning_sensitivity.{room}"]
        monkeypatch.setattr(module, "wide_dtype", lambda device: torch.float32)
    with AppleGPU():
        metric = filled(OutputSensitivity())
        value = metric.compute()
    assert value.dtype == torch.float32 == metric.rows[0].dtype
    torch.testing.assert_close(value, expected().value, check_dtype=False)
