"""What is refused before the first training step, and said of it."""

import math
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_sensitivity import compat
from lightning_sensitivity.expected.record import EXPECTED
from lightning_sensitivity.functional.expected import Loss, check_pairs, mean_loss, metric_value
from lightning_sensitivity.functional.tasks import AnyMetric, Task
from lightning_sensitivity.functional.tensors import in_32_bits
from lightning_sensitivity.messages import Refused, check_argument, refuse_on_error
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.running.batches import is_dense, tensors_in
from lightning_sensitivity.running.isolation import isolated, isolated_with
from lightning_sensitivity.running.rules import labels_in, name_positions, without

_LIGHTNING_MODULES = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")
_SAME = 0.25  # difference of a loss that is a mean, such as one of pairs, or that draws numbers
_ZERO = 1e-12  # up to which a loss is 0
_ROUNDING = 1e-3  # of shares that sum to 1
_SCALED, _SHIFTED = 1.5, 0.5  # factor between standard deviations, and the part of one between means, of inputs
_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


def check_run(monitor: str, trainer: Trainer, pl_module: LightningModule, stage: str, has_call: bool = False) -> None:
    """Check that the module and the Trainer have what a monitor needs.

    Args:
        monitor: Name of the monitor's class.
        trainer: The Trainer, after its environment was set up.
        pl_module: The module of the run.
        stage: ``"fit"`` or ``"validate"``.
        has_call: Whether a function of the user stands in for ``forward``.

    Raises:
        MisconfigurationException: If something is missing; the message says what to change.
    """
    is_sharded = any(base.__name__ in _SHARDED for base in type(trainer.strategy).__mro__)
    has_forward = has_call or _is_overridden("forward", pl_module)
    has_step = stage != "fit" or _is_overridden("validation_step", pl_module)
    has_loop = stage != "fit" or trainer.enable_validation
    needs = {
        "does not support sharded weights (FSDP, DeepSpeed); use DDP": not is_sharded,
        "needs a `forward` that returns the logits, and your module has none": has_forward,
        "needs a `validation_step`: `def validation_step(self, batch, batch_idx): pass` is enough": has_step,
        "needs a validation loop: pass `val_dataloaders`, and leave `limit_val_batches` above 0": has_loop,
    }
    for problem, is_met in needs.items():
        if not is_met:
            raise Refused(f"`{monitor}` {problem}.", entry="unsupported")


def _is_overridden(name: str, pl_module: LightningModule) -> bool:
    # Lightning's own check fails if the module comes from the other package, such as `pytorch_lightning`.
    return getattr(getattr(pl_module, name), "__module__", "") not in _LIGHTNING_MODULES


def check_monitored(trainer: Trainer, prefix: str, directions: Mapping[str, bool]) -> None:
    """Refuse callbacks and schedulers that monitor a name that will not be logged, or look for the worst value.

    Args:
        trainer: The Trainer.
        prefix: What logged names begin with.
        directions: Whether the highest value is the best, by logged name without the prefix.

    Raises:
        MisconfigurationException: If there is one.
    """
    logged = {prefix + name: is_highest for name, is_highest in directions.items()}
    for owner, monitor in callbacks_that_monitor(trainer):
        name, kind = without_loader(monitor), type(owner).__name__
        if name in logged:
            best, mode = "max" if logged[name] else "min", getattr(owner, "mode", None)
            if mode in ("min", "max") and mode != best:  # some have no such mode
                raise Refused(f"`mode` should be {best!r} for `{monitor}`, got {mode!r} in `{kind}`.", "names")
        elif monitor.startswith(prefix + EXPECTED):
            metric = monitor.removeprefix(prefix + EXPECTED)
            raise Refused(
                f"`{kind}` monitors `{monitor}`, which is not logged. There are `{'`, `'.join(logged)}`. To log a "
                f"metric of torchmetrics, set `metrics={{{metric!r}: ...}}`; if your own code logs it, set another "
                "`prefix=`.",
                "names",
            )


def callbacks_that_monitor(trainer: Trainer) -> list[tuple[object, str]]:
    """List the callbacks, and the schedulers, that monitor a value, each with its name, checkpoints first."""
    callbacks = sorted(trainer.callbacks, key=lambda each: not hasattr(each, "best_model_path"))  # type: ignore[attr-defined]
    monitors = [(callback, getattr(callback, "monitor", None)) for callback in callbacks]
    schedulers = [(each.scheduler, each.monitor) for each in trainer.lr_scheduler_configs if each.reduce_on_plateau]
    return [(owner, name) for owner, name in [*monitors, *schedulers] if isinstance(name, str)]


def without_loader(name: str) -> str:
    """Return a logged name without what Lightning adds if there are several loaders."""
    return name.partition("/dataloader_idx_")[0]


def check_metrics(metrics: Mapping[str, Metric] | MetricCollection) -> dict[str, Metric]:
    """Return metrics by name, or raise MisconfigurationException."""
    expected = "a dict of names and torchmetrics metrics, or a `MetricCollection`"
    check_argument("metrics", metrics, isinstance(metrics, Mapping | MetricCollection), expected)
    by_name = dict(metrics.items())
    for name, metric in by_name.items():
        check_argument("metrics", metric, isinstance(name, str) and isinstance(metric, Metric), expected)
        has_direction = isinstance(metric.higher_is_better, bool)
        check_argument(f"metrics[{name!r}].higher_is_better", metric.higher_is_better, has_direction, "True or False")
        check_argument("metrics", name, name != "loss", "named otherwise, since `expected_loss` is ours")
    return by_name


def try_values(
    module: LightningModule,
    metrics: Mapping[str, AnyMetric],
    loss: Loss | None,
    outputs: Tensor,
    labels: Tensor,
    task: Task,
) -> None:
    """Refuse a metric or a loss that fails on the labelled samples of a training batch, or gives no number of these.

    Args:
        module: The model, of which they may be parts.
        metrics: The metrics by name.
        loss: The loss of the user; None for that of the task.
        outputs: Outputs ``(N, ...)``.
        labels: Their labels, as `targets` returns them.
        task: The task.
    """
    counts = task.has_label(labels)
    if not bool(counts.any()):
        return
    x, y = in_32_bits(outputs)[counts], labels[counts]
    p = task.predictions(task.output_matrix(x.cpu()))
    # A metric gets drawn labels of all columns, also of those of which a batch knows none.
    drawn = task.hard_labels(task.label_matrix(y, p.shape[1])).nan_to_num()
    for name, metric in metrics.items():
        what = f"`metrics[{name!r}]` fails on outputs {tuple(x.shape)}"
        with refuse_on_error(what, entry="metrics"), isolated(module) as run:
            value = run(metric_value, metric, p, torch.stack([drawn, drawn]), task)  # a few need two samples
            is_number = isinstance(value, Tensor) and value.numel() == 1
            check_argument(f"metrics[{name!r}]", value, is_number, "one number")
    if loss is not None:
        y = task.as_labels(drawn, in_32_bits(y).to(x.device))
        with isolated_with(module, loss) as run:
            run(_try_loss, loss, x, y)


def _try_loss(loss: Loss, outputs: Tensor, labels: Tensor) -> None:
    """Refuse a loss that is no mean over samples."""
    got = f"outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)} of {labels.dtype}"
    with refuse_on_error(f"`loss` fails on {got}", entry="loss"):
        pairs = [(outputs, labels), (torch.cat([outputs, outputs]), torch.cat([labels, labels]))]
        once, twice = (mean_loss(loss, *pair) for pair in pairs)
        check_pairs(loss, outputs, labels)
    check_argument("loss", once, math.isfinite(once), f"finite for {got}")
    if not math.isclose(once, twice, rel_tol=_SAME, abs_tol=_ZERO):
        values = f"{once:.4g} for {len(labels)} samples, and {twice:.4g} if each comes twice"
        raise Refused(f"`loss` should be a mean over samples, or a number for each, got {values}.", entry="loss")


def check_class_shares(class_shares: object, task: Task, num_classes: int | None = None) -> None:
    """Require shares that sum to 1, one for each class if these are known, or None."""
    if class_shares is None:
        return
    check_argument("class_shares", class_shares, task.has_class_shares, f"None for {task.name!r}")
    with refuse_on_error("`class_shares` can't be read"):
        shares = torch.as_tensor(class_shares, dtype=torch.float64)
    are_shares = shares.ndim == 1 and bool((shares > 0).all()) and abs(float(shares.sum()) - 1) < _ROUNDING
    check_argument("class_shares", class_shares, are_shares, "positive shares of all classes that sum to 1, or None")
    is_complete = num_classes in (None, len(shares))
    check_argument("class_shares", class_shares, is_complete, f"shares of {num_classes} classes")


# The shape, the mean and the standard deviation of each tensor, by name of the argument.
Inputs = dict[str, list[tuple[torch.Size, float, float]]]


class FirstStep:
    """A comparison of what ``forward`` gets in the first step with what we send it."""

    def __init__(self) -> None:
        self._ours: Inputs = {}
        self._problem: str | None = None
        self._hook = ExitStack()

    def __reduce__(self) -> tuple[type["FirstStep"], tuple[()]]:
        """Copy nothing: a step may copy or pickle the module with the hook."""
        return FirstStep, ()

    def start(self, module: nn.Module, batch: object, reader: BatchReader) -> None:
        """Note what we send of a training batch, and watch the step, unless the module is compiled."""
        if reader.function is not None or compat.is_compiled(module):  # a hook would have it compiled anew
            return
        with suppress(Exception):  # training batches may be of another kind than validation batches
            self._ours = _inputs(reader.call(module, batch).arguments)
            self._hook.enter_context(module.register_forward_pre_hook(self._compare, with_kwargs=True))

    def _compare(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Compare the first call of the step; in passes of monitors, gradients are off."""
        if not torch.is_grad_enabled() or compat.is_redirected(module):
            return
        self._hook.close()
        with suppress(Exception):  # a step must not fail because of a hint
            self._problem = _difference(self._ours, _inputs(name_positions(module, args) | kwargs))

    def stop(self) -> str | None:
        """Stop watching, and say how the step changes inputs, if it does."""
        self._hook.close()
        problem, self._problem = self._problem, None
        return problem


def _inputs(arguments: Mapping[str, object]) -> Inputs:
    """Describe the dense tensors of arguments that are not named like labels, also in mappings."""
    described: Inputs = {}
    for name, value in without(arguments, labels_in(arguments)).items():
        for _, x in tensors_in(without(value, labels_in(value))):
            if is_dense(x):
                finite = x[x.isfinite()].float()
                numbers = float(finite.mean()), float(finite.std(correction=0))
                described.setdefault(name, []).append((x.shape, *numbers))
    return described


def _difference(ours: Inputs, theirs: Inputs) -> str | None:
    """Say how what the step sends differs from what we send, by more than most augmentations change."""
    for name in sorted(ours.keys() ^ theirs.keys()):
        where = "in the step, and not from us" if name in theirs else "from us, and not in the step"
        return f"`forward` gets `{name}` {where}"
    for name, got in theirs.items():
        # Of several tensors, such as two views, a step may send one after the other.
        for (shape, mean, std), (our_shape, our_mean, our_std) in zip(got, ours[name], strict=False):
            if shape != our_shape:
                return f"`forward` gets an input of shape {(*shape,)} in the step, and {(*our_shape,)} from us"
            less, more = sorted([std, our_std])
            if more > _SCALED * less or abs(mean - our_mean) > _SHIFTED * more:
                return f"`forward` gets {mean:.3g} ± {std:.3g} in the step, and {our_mean:.3g} ± {our_std:.3g} from us"
    return None
