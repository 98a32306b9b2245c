import contextlib
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection

from lightning_sensitivity import OutputSensitivity
from lightning_sensitivity.functional import output_sensitivity
from lightning_sensitivity.moments import batch_moments, sensitivity_estimate

NUM_BATCHES, BATCH_SIZE, NUM_OUTPUTS = 6, 16, 5
CLEAN, NOISY = torch.randn(2, NUM_BATCHES, BATCH_SIZE, NUM_OUTPUTS, generator=torch.Generator().manual_seed(0))


def filled(**kwargs: object) -> OutputSensitivity:
    metric = OutputSensitivity(**kwargs)
    for clean, noisy in zip(CLEAN, NOISY, strict=True):
        metric.update(clean, noisy)
    return metric


def whole(dtype: torch.dtype = torch.float32, per_output: bool = False) -> Tensor:
    return output_sensitivity(CLEAN.flatten(0, 1).to(dtype), NOISY.flatten(0, 1).to(dtype), per_output)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kwargs", [{}, {"per_output": True, "num_outputs": NUM_OUTPUTS}])
def test_batches_give_the_value_of_all_data(kwargs: dict[str, object]) -> None:
    metric = filled(**kwargs)
    estimate = sensitivity_estimate(batch_moments(CLEAN.flatten(0, 1), NOISY.flatten(0, 1), metric.per_output)[0])
    close(metric.compute(), estimate.sensitivity)
    close(metric.stderr, estimate.stderr)
    assert metric.num_samples == NUM_BATCHES * BATCH_SIZE


def test_forward_gives_the_batch_value_and_accumulates() -> None:
    metric = OutputSensitivity()
    for clean, noisy in zip(CLEAN, NOISY, strict=True):
        close(metric(clean, noisy), output_sensitivity(clean, noisy))
    close(metric.compute(), whole())


def test_several_draws() -> None:
    metric = OutputSensitivity()
    metric.update(CLEAN[0], (NOISY[i] for i in range(3)))
    close(metric.compute(), output_sensitivity(CLEAN[0], list(NOISY[:3])))
    assert metric.num_samples == BATCH_SIZE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    metric = OutputSensitivity()
    for clean, noisy in zip(CLEAN, NOISY, strict=True):
        metric.update(clean.to(dtype), noisy.to(dtype))
    close(metric.compute(), whole(dtype))


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.float()])
def test_a_cast_of_the_metric_does_not_cast_what_follows(cast: Callable[[Metric], Metric]) -> None:
    metric = OutputSensitivity()
    cast(metric)
    for clean, noisy in zip(CLEAN, NOISY, strict=True):
        metric.update(clean, noisy)
    close(metric.compute(), whole())


def test_reset_clears_everything() -> None:
    metric = filled()
    metric.compute()
    metric.reset()
    metric.update(CLEAN[0], NOISY[0])
    close(metric.compute(), output_sensitivity(CLEAN[0], NOISY[0]))
    assert metric.num_samples == BATCH_SIZE


def test_the_error_bar_follows_updates() -> None:
    metric = OutputSensitivity()
    metric.update(CLEAN[0], NOISY[0])
    first = metric.stderr
    metric.update(CLEAN[1], NOISY[1])
    assert metric.stderr != first


def test_merge_state() -> None:
    first, second = OutputSensitivity(), OutputSensitivity()
    for i in range(NUM_BATCHES):
        (first if i < 2 else second).update(CLEAN[i], NOISY[i])
    first.compute()  # a value from before the merge must not survive it
    first.merge_state(second)
    close(first.compute(), whole())
    assert first.num_samples == NUM_BATCHES * BATCH_SIZE


def test_pickle_and_clone() -> None:
    metric = OutputSensitivity()
    metric.update(CLEAN[0], NOISY[0])
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        for i in range(1, NUM_BATCHES):
            copy.update(CLEAN[i], NOISY[i])
        close(copy.compute(), whole())
    assert metric.num_samples == BATCH_SIZE


def test_state_dict_is_empty_unless_asked_for() -> None:
    metric = filled()
    assert not metric.state_dict()
    metric.persistent(True)
    restored = OutputSensitivity()
    restored.persistent(True)
    restored.load_state_dict(metric.state_dict())
    restored.update(CLEAN[:0].flatten(0, 1), NOISY[:0].flatten(0, 1))
    close(restored.compute(), whole())


def test_many_draws_in_a_collection() -> None:
    collection = MetricCollection([OutputSensitivity()], prefix="val_")
    collection.update(CLEAN[0], [NOISY[0], NOISY[1]])
    close(collection.compute()["val_OutputSensitivity"], output_sensitivity(CLEAN[0], [NOISY[0], NOISY[1]]))


def test_in_a_collection() -> None:
    collection = MetricCollection(
        {"averaged": OutputSensitivity(), "each": OutputSensitivity(per_output=True, num_outputs=NUM_OUTPUTS)}
    )
    for clean, noisy in zip(CLEAN, NOISY, strict=True):
        collection.update(clean, noisy)
    values = collection.compute()
    close(values["averaged"], whole())
    close(values["each"], whole(per_output=True))


def test_torchmetrics_attributes() -> None:
    metric = OutputSensitivity()
    assert metric.higher_is_better is False
    assert metric.full_state_update is False
    assert metric.is_differentiable is False
    assert metric.plot_lower_bound == 0
    composed = metric + MeanMetric()  # metrics compose
    assert isinstance(composed, Metric)


def test_plot() -> None:
    pytest.importorskip("matplotlib").use("agg")
    metric = filled()
    _, axes = metric.plot()
    assert axes.lines[0].get_ydata() == metric.compute()
    values = [metric(clean, noisy) for clean, noisy in zip(CLEAN, NOISY, strict=True)]
    _, axes = metric.plot(values)
    assert len(axes.lines[0].get_ydata()) == NUM_BATCHES


def test_the_state_does_not_grow() -> None:
    def state_bytes(metric: OutputSensitivity) -> int:
        return sum(state.numel() * state.element_size() for state in metric.metric_state.values())

    metric = OutputSensitivity()
    before = state_bytes(metric)
    for _ in range(50):
        metric.update(CLEAN[0], [NOISY[0], NOISY[1]])
    assert state_bytes(metric) == before < 256


def test_inference_mode_leaves_a_usable_metric() -> None:
    metric = OutputSensitivity()
    with torch.inference_mode():
        metric.update(CLEAN[0], NOISY[0])
    for i in range(1, NUM_BATCHES):
        metric.update(CLEAN[i], NOISY[i])
    close(metric.compute(), whole())


# What bad input gets


def test_non_finite_outputs_raise_in_compute_and_are_named() -> None:
    metric = filled()
    bad = NOISY[0].clone()
    bad[3, 1] = torch.nan
    metric.update(CLEAN[0], bad)
    with pytest.raises(ValueError, match=f"noisy outputs of batch {NUM_BATCHES} .*nan_strategy='warn'"):
        metric.compute()


def test_non_finite_outputs_can_warn() -> None:
    metric = OutputSensitivity(nan_strategy="warn")
    metric.update(CLEAN[0] / 0, NOISY[0])
    with pytest.warns(UserWarning, match="clean outputs of batch 0"):
        assert metric.compute().isnan()
    metric.reset()
    metric.update(CLEAN[0], NOISY[0])
    close(metric.compute(), output_sensitivity(CLEAN[0], NOISY[0]))


def test_probabilities_are_refused_over_all_batches() -> None:
    metric = OutputSensitivity()
    for clean, noisy in zip(CLEAN, NOISY, strict=True):
        metric.update(clean.softmax(1), noisy.softmax(1))
    with pytest.raises(ValueError, match="Pass the logits"):
        metric.compute()
    with pytest.raises(ValueError, match="Pass the logits"):
        OutputSensitivity()(CLEAN[0].softmax(1), NOISY[0].softmax(1))


def rounding_warnings(metric: OutputSensitivity) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):  # a second time from the cache
            metric.compute(), metric.stderr, metric.num_samples
    return [str(warning.message) for warning in caught]


def rounded(change: float, dtype: torch.dtype, **kwargs: object) -> OutputSensitivity:
    """Outputs around 10, with changes of the given size."""
    metric = OutputSensitivity(**kwargs)
    for clean, noisy in zip(CLEAN.double() + 10, NOISY.double(), strict=True):
        metric.update(clean.to(dtype), (clean + change * noisy).to(dtype))
    return metric


@pytest.mark.parametrize("kwargs", [{}, {"per_output": True, "num_outputs": NUM_OUTPUTS}])
@pytest.mark.parametrize(
    ("dtype", "advice"),
    [(torch.bfloat16, 32), (torch.float16, 32), (torch.float32, 64), (torch.float64, 64)],
)
def test_rounding_above_the_changes_warns_once(dtype: torch.dtype, advice: int, kwargs: dict[str, object]) -> None:
    epsilon = torch.finfo(dtype).eps
    assert not rounding_warnings(rounded(300 * epsilon, dtype, **kwargs))
    (warning,) = rounding_warnings(metric := rounded(5 * epsilon, dtype, **kwargs))
    assert f"sensitivity, {metric.compute():.2g} ± {metric.stderr:.2g}, may be off" in warning
    assert f"epsilon {epsilon:.2g}" in warning
    assert f'`precision="{advice}-true"`' in warning


def test_outputs_that_do_not_change_at_all_are_rounding_only_in_16_bits() -> None:
    assert rounding_warnings(rounded(0, torch.bfloat16))
    assert not rounding_warnings(rounded(0, torch.float32))


def test_one_sample_and_no_sample_have_no_error_bar_to_be_outside_of() -> None:
    metric = OutputSensitivity()
    metric.update(CLEAN[0, :0].bfloat16(), NOISY[0, :0].bfloat16())
    assert not rounding_warnings(metric)
    metric.update(CLEAN[0, :1].bfloat16(), CLEAN[0, :1].bfloat16())
    assert not rounding_warnings(metric)


def test_a_small_error_bar_is_no_reason_to_warn_of_negligible_rounding() -> None:
    metric = OutputSensitivity()
    sign = torch.tensor([[1.0], [-1.0]]).expand(2, NUM_OUTPUTS)
    metric.update(sign, 2 * sign)
    assert metric.stderr == 0
    assert not rounding_warnings(metric)


def test_rounding_is_that_of_autocast_where_outputs_were_widened() -> None:
    metric = OutputSensitivity()
    clean, noisy = CLEAN + 10, CLEAN + 10 + 1e-2 * NOISY
    metric.update(clean.flatten(0, 1), noisy.flatten(0, 1))
    assert not rounding_warnings(metric)
    with torch.autocast("cpu", torch.bfloat16):
        metric.update(clean.flatten(0, 1), noisy.flatten(0, 1))
    assert "epsilon 0.0078" in rounding_warnings(metric)[0]


def test_rounding_is_that_of_a_16_bit_default_type() -> None:
    metric, default = OutputSensitivity(), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for `precision="bf16-true"`
    try:
        metric.update(CLEAN[0] + 10, CLEAN[0] + 10 + 1e-2 * NOISY[0])
    finally:
        torch.set_default_dtype(default)
    assert "epsilon 0.0078" in rounding_warnings(metric)[0]


def test_rows_of_one_sum_get_one_warning() -> None:
    metric = OutputSensitivity()
    for clean, noisy in zip(CLEAN, NOISY, strict=True):
        centred = clean - clean.mean(1, keepdim=True)
        metric.update(centred.bfloat16(), (centred + 1e-3 * noisy).bfloat16())
    (warning,) = rounding_warnings(metric)
    assert "sum to the same value" in warning


def test_a_changing_number_of_outputs_is_refused() -> None:
    metric = OutputSensitivity()
    metric.update(CLEAN[0], NOISY[0])
    metric.update(CLEAN[1][:, :4], NOISY[1][:, :4])
    with pytest.raises(ValueError, match="same number of outputs.*got 4 to 5"):
        metric.compute()


def test_the_wrong_number_of_outputs_is_refused() -> None:
    metric = OutputSensitivity(per_output=True, num_outputs=7)
    with pytest.raises(ValueError, match=r"7 outputs in dimension 1.*\(16, 5\)"):
        metric.update(CLEAN[0], NOISY[0])


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"per_output": 1}, "`per_output`.*bool.*got 1"),
        ({"per_output": True}, "`num_outputs`.*larger than 0.*got None"),
        ({"per_output": True, "num_outputs": 0}, "`num_outputs`.*got 0"),
        ({"num_outputs": 10}, "`num_outputs` only with `per_output`.*got 10"),
        ({"nan_strategy": "ignore"}, "`nan_strategy`.*'error' or 'warn'.*'ignore'"),
        ({"unknown": 1}, "Unexpected keyword arguments"),
    ],
)
def test_bad_arguments(kwargs: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        OutputSensitivity(**kwargs)


def test_compute_before_update_warns_and_gives_nan() -> None:
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert OutputSensitivity().compute().isnan()


def test_needs_no_lightning() -> None:
    modules = ", ".join(f"lightning_sensitivity.{name}" for name in ("metric", "functional", "twin"))
    code = f"import sys, {modules}; sys.exit('lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Several processes


def compute_in_process(rank: int, file: Path, per_output: bool) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    metric = OutputSensitivity(per_output=per_output, num_outputs=NUM_OUTPUTS if per_output else None)
    for i in range(NUM_BATCHES):
        if (i < 2) == (rank == 1):  # four batches here, two there
            metric.update(CLEAN[i], NOISY[i])
    for _ in range(2):  # a second time from the cache
        close(metric.compute(), whole(per_output=per_output))
        assert metric.num_samples == NUM_BATCHES * BATCH_SIZE
    metric.update(CLEAN[0], NOISY[0])  # goes on with its own samples only
    assert metric.num_samples == (NUM_BATCHES + 2) * BATCH_SIZE

    step = OutputSensitivity(dist_sync_on_step=True)
    both = output_sensitivity(CLEAN[:2].flatten(0, 1), NOISY[:2].flatten(0, 1))
    close(step(CLEAN[rank], NOISY[rank]), both)

    empty = OutputSensitivity()
    if rank == 0:
        empty.update(CLEAN[0], NOISY[0])
    else:
        empty._update_count = 1  # keep torchmetrics from warning
    close(empty.compute(), output_sensitivity(CLEAN[0], NOISY[0]))

    coarse = OutputSensitivity()  # 16-bit outputs in one process, warned of in both
    coarse.update((CLEAN[0] + 10).to(torch.bfloat16 if rank == 1 else torch.float32), CLEAN[0] + 10)
    with pytest.warns(UserWarning, match="epsilon 0.0078") if rank == 0 else contextlib.nullcontext():
        coarse.compute()

    bad = OutputSensitivity()
    bad.update(CLEAN[0] / (0 if rank == 1 else 1), NOISY[0])
    with pytest.raises(ValueError, match="clean outputs of batch 0"):  # in both processes: none waits for the other
        bad.compute()
    os._exit(0)  # as in `helpers.run_processes`: the group's end may hang


@pytest.mark.parametrize("per_output", [False, True])
def test_two_processes(tmp_path: Path, per_output: bool) -> None:
    torch.multiprocessing.spawn(compute_in_process, args=(tmp_path / "rendezvous", per_output), nprocs=2)
