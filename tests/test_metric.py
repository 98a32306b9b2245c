"""Both metrics: batches of any sizes and processes give what all samples give, and nothing on the way is lost."""

import pickle
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_sensitivity import OutputSensitivity, RefinedScore
from lightning_sensitivity.functional import output_sensitivity, refined_score
from lightning_sensitivity.functional.sensitivity import SensitivityEstimate, sensitivity_from_sums, sensitivity_sums
from tests.helpers import run_processes

SIZES = 16, 9, 1, 20, 13
NUM_SAMPLES, NUM_BATCHES = sum(SIZES), len(SIZES)
ALL_CLEAN, ALL_NOISY, OTHERS = 2 * torch.randn(3, NUM_SAMPLES, 5, generator=torch.Generator().manual_seed(0))
ALL_LABELS = (ALL_CLEAN + 3 * OTHERS).argmax(-1)
CLEAN, NOISY, LABELS = (each.split(SIZES) for each in (ALL_CLEAN, ALL_NOISY, ALL_LABELS))
ROWS = torch.arange(NUM_SAMPLES).split(SIZES)


def filled(metric: Any, batches: Iterable[int] = range(NUM_BATCHES), called: bool = False) -> Any:
    others = NOISY if isinstance(metric, OutputSensitivity) else LABELS
    for i in batches:
        (metric if called else metric.update)(CLEAN[i], others[i])
    return metric


def expected(*batches: int, per_output: bool = False) -> SensitivityEstimate:
    rows = torch.cat([ROWS[i] for i in batches or range(NUM_BATCHES)])
    return sensitivity_from_sums(sensitivity_sums(ALL_CLEAN[rows], ALL_NOISY[rows]), per_output)


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


# What both metrics survive


def called_as_a_function(metric: Any) -> Any:
    metric.reset()
    return filled(metric, [0], called=True)


def moved_while_synced(metric: Any) -> Any:
    def gather(x: Tensor, group: Any) -> list[Tensor]:
        return [x, x[:0] if isinstance(metric, OutputSensitivity) else torch.zeros_like(x)]

    metric.sync(dist_sync_fn=gather, distributed_available=lambda: True)
    synced = metric.metric_state
    close(metric.bfloat16().metric_state, synced)
    metric.unsync()
    return metric


def cast_and_reset(metric: Any) -> Any:
    metric.to(torch.bfloat16).reset()
    return filled(metric, [0])


def merged(metric: Any) -> Any:
    empty = type(metric)()
    empty.update(CLEAN[0][:0], (NOISY if isinstance(metric, OutputSensitivity) else LABELS)[0][:0])
    empty.merge_state(metric)
    return empty


WAYS: dict[str, Callable[[Any], Any]] = {
    "called as a function": called_as_a_function,
    "merged into another": merged,
    "pickled": lambda metric: pickle.loads(pickle.dumps(metric)),
    "cast with a model": lambda metric: nn.Sequential(metric).to(torch.bfloat16)[0],
    "cast, and filled anew": cast_and_reset,
    "in eval mode with a model": lambda metric: nn.Sequential(metric).train().eval()[0],
    "moved while it is synced": moved_while_synced,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("make", [OutputSensitivity, RefinedScore])
def test_it_resumes_as_if_nothing_had_happened(make: Callable[[], Any], way: str) -> None:
    metric = WAYS[way](filled(make(), [0]))
    close(metric.compute(), filled(make(), [0]).compute())
    close(filled(metric, range(1, NUM_BATCHES)).compute(), filled(make()).compute())
    assert {x.dtype for name in metric._defaults for x in getattr(metric, name)} == {torch.float64}


def measure_in_process(rank: int, folder: Path) -> dict[str, Any]:
    """The first process has no sample, the other all."""
    torch.distributed.init_process_group("gloo", world_size=2, rank=rank)
    found: dict[str, Any] = {}
    for make in (OutputSensitivity, RefinedScore):
        metric = make()
        if rank == 1:
            filled(metric)
        metric._update_count = max(1, metric._update_count)  # else it warns that nothing came
        found[make.__name__] = metric.compute()
        if isinstance(metric, RefinedScore):
            found["temperature"] = metric.temperature
            assert metric.packed_sums[0, 0] == rank * NUM_SAMPLES  # again those of its own
    return found


def test_two_processes_compute_what_one_computes_even_if_one_has_no_sample(tmp_path: Path) -> None:
    of_processes = run_processes(measure_in_process, tmp_path)
    score = filled(RefinedScore())
    for found in of_processes:
        close(found["OutputSensitivity"], filled(OutputSensitivity()).compute())
        close(found["RefinedScore"], score.compute())
        assert found["temperature"] == score.temperature


@pytest.mark.long
def test_it_does_without_lightning() -> None:  # importing torch anew takes seconds
    code = "import sys, lightning_sensitivity as ls; ls.RefinedScore(); sys.exit('lightning' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# In a collection


def test_in_a_collection_it_takes_keywords_and_the_score_alone_positions() -> None:
    metrics = {"accuracy": MulticlassAccuracy(5), "S": OutputSensitivity(), "score": RefinedScore()}
    collection = MetricCollection(metrics, prefix="val/")
    for i in range(NUM_BATCHES):
        outputs = {"clean": CLEAN[i], "noisy": NOISY[i], "logits": CLEAN[i], "targets": LABELS[i]}
        collection.update(preds=CLEAN[i], target=LABELS[i], **outputs)
    values = collection.compute()
    assert set(values) == {"val/accuracy", "val/S", "val/score"}
    close(values["val/S"], filled(OutputSensitivity()).compute())
    close(values["val/score"], filled(RefinedScore()).compute())
    collection = MetricCollection({"accuracy": MulticlassAccuracy(5), "score": RefinedScore()})
    close(collection(CLEAN[0], LABELS[0])["score"], filled(RefinedScore(), [0]).compute())


@pytest.mark.parametrize("labels", [
    pytest.param(LABELS[0], id="class indices"),
    pytest.param(nn.functional.one_hot(LABELS[0], 5).float(), id="one-hot labels"),
])  # fmt: skip
def test_labels_that_a_collection_passes_are_refused_by_keywords(labels: Tensor) -> None:
    with pytest.raises(TypeError, match=r"got labels.*`collection.update\(preds=..., target=..., \w+=..., \w+=...\)`"):
        MetricCollection({"S": OutputSensitivity()})(CLEAN[0], labels)


# Sensitivity


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


# The refined score

TASKS: dict[str, tuple[Tensor, Tensor]] = {
    "multiclass": (ALL_CLEAN, ALL_LABELS.where(ALL_LABELS > 0, -100)),
    "binary": (ALL_CLEAN[:, 0], (ALL_LABELS > 1).float()),
    "regression": (ALL_CLEAN, ALL_NOISY),
}


@pytest.mark.parametrize("task", TASKS)
def test_the_score_and_the_temperature_of_batches_are_those_of_all_samples(task: str) -> None:
    metric, (outputs, targets) = RefinedScore(task), TASKS[task]
    for rows in ROWS:
        metric.update(outputs[rows], targets[rows])
    score, temperature = refined_score(outputs, targets, task)
    assert float(metric.compute()) == pytest.approx(score) and metric.temperature == temperature
    assert metric.compute().dtype == torch.float64 and metric.compute().ndim == 0


@pytest.mark.parametrize("is_synced", [True, False])
def test_the_temperature_is_that_of_the_score_and_no_further_exchange(is_synced: bool) -> None:
    exchanges: list[Tensor] = []

    def gather(x: Tensor, group: Any) -> list[Tensor]:
        exchanges.append(x)
        return [x, x]

    options = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True, "sync_on_compute": is_synced}
    metric = filled(RefinedScore(**options), called=True)
    temperature = refined_score(ALL_CLEAN, ALL_LABELS).temperature
    assert metric.temperature == temperature and metric.compute() and metric.temperature == temperature
    assert len(exchanges) == is_synced


def test_samples_without_a_label_are_left_out_and_those_with_nan_are_said() -> None:
    metric = RefinedScore()
    metric.update(CLEAN[0], torch.full_like(LABELS[0], -100))
    assert metric.compute().isnan() and metric.temperature == 1  # without a label, it is unknown
    filled(metric).update(CLEAN[0] * torch.nan, LABELS[0])
    with pytest.warns(UserWarning, match="^16 samples gave nan or inf") as warnings:
        close(metric.compute(), filled(RefinedScore()).compute())
    assert [warning.filename for warning in warnings] == [__file__]


SIGMOIDS = ALL_CLEAN[:, 0].sigmoid()
PROBABILITIES: dict[str, tuple[str, Tensor, Tensor]] = {
    "a sigmoid": ("binary", SIGMOIDS, ALL_LABELS > 1),
    "a softmax": ("multiclass", ALL_CLEAN.softmax(1), ALL_LABELS),
    "a softmax in 16 bits": ("multiclass", ALL_CLEAN.bfloat16().softmax(1).float(), ALL_LABELS),
}


@pytest.mark.parametrize("what", PROBABILITIES)
def test_probabilities_in_small_batches_are_warned_of_unless_they_are_few(what: str) -> None:
    task, outputs, targets = PROBABILITIES[what]
    metric = RefinedScore(task)
    with pytest.warns(UserWarning, match="^`logits` look like probabilities.*before softmax") as warnings:
        for rows in ROWS:
            metric.update(outputs[rows], targets[rows])
    assert {warning.filename for warning in warnings} == {__file__}
    RefinedScore()(ALL_CLEAN.sigmoid(), ALL_LABELS)  # of several classes, which do not sum to 1
    metric.update(outputs[:1], targets[:1])  # too few of them to tell


# An Apple GPU


class AppleGPU(TorchFunctionMode):
    """Refuses to move float64 to a device, as MPS does; the CPU stands in for it."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [*args[1:], *(kwargs or {}).values()]
        moves, casts = (any(isinstance(each, kind) for each in given) for kind in (torch.device, torch.dtype))
        if function is Tensor.to and args[0].dtype == torch.float64 and moves and not casts:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("task", ["multiclass", "binary", "regression"])
def test_no_float64_is_moved_to_an_apple_gpu(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for room in ("functional.refined_score", "metric"):
        module = sys.modules[f"lightning_sensitivity.{room}"]
        monkeypatch.setattr(module, "wide_dtype", lambda device: torch.float32)
    x = torch.randn(20, 1)
    predictions = torch.rand(20, 3 if task == "multiclass" else 1, dtype=torch.float64)
    predictions = predictions.softmax(1) if task == "multiclass" else predictions
    with AppleGPU():
        metric = RefinedScore(task)
        metric.update(x.repeat(1, predictions.shape[1]), predictions)
        assert metric.packed_sums.dtype == torch.float32 and float(metric.compute()) >= 0
