"""Helpers of the monitors: selection of batches, failures, names of logged values, checks of the run and the step."""

import inspect
import math
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from lightning_sensitivity.functional.tasks import warn
from lightning_sensitivity.model import ModelCall
from lightning_sensitivity.model.forward import clone_tensors, parameters_of, tensors_in
from lightning_sensitivity.model.isolation import is_isolated

_LIGHTNING_MODULES = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")
_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")


class BatchChoice:
    """Choose which batches of a validation are measured: always the same, evenly spaced, since loaders may be sorted.

    Args:
        num_batches: Of each loader.
        sizes: Numbers of samples in the first batch of each loader, once it was measured.
        budget: How many samples of a loader this process should measure.

    Attributes:
        num_batches: Of each loader.
        num_measured: Samples that were measured, of each loader.
    """

    def __init__(self, num_batches: list[int | float], sizes: Mapping[int, int], budget: float) -> None:
        self.num_batches, self._sizes, self._budget = num_batches, sizes, budget
        self.num_measured = [0] * len(num_batches)

    def num_selected(self, dataloader_idx: int) -> float:
        """Count the batches of a loader that will be measured; all of them until the first was measured."""
        count, size = self.num_batches[dataloader_idx], self._sizes.get(dataloader_idx, 0)
        is_limited = size > 0 and math.isfinite(count) and math.isfinite(self._budget)
        return min(count, math.ceil(self._budget / size)) if is_limited else count

    def includes(self, batch_idx: int, dataloader_idx: int) -> bool:
        """Decide whether to measure a batch: always the first one, none once the budget is spent."""
        count, chosen = self.num_batches[dataloader_idx], self.num_selected(dataloader_idx)
        is_chosen = chosen == count or batch_idx * chosen % count < chosen
        return batch_idx == 0 or (is_chosen and self.num_measured[dataloader_idx] < self._budget)


class Failures:
    """Turn failures into an error before the first training step, and into one warning of each kind after it.

    Args:
        name: Name of the monitor's class.
        prefix: Prefix of what it logs.

    Attributes:
        is_strict: Whether a failure is an error.
        has_failed: Whether something has failed in the validation that runs.
    """

    def __init__(self, name: str, prefix: str) -> None:
        self._name, self._prefix, self.is_strict, self._kinds = name, prefix, True, set[str]()
        self.has_failed = False

    def warn(self, kind: str, message: str, in_any_process: bool = False) -> None:
        """Warn once of each kind; the message follows the name of the monitor."""
        if kind not in self._kinds:
            self._kinds.add(kind)
            (warn if in_any_process else rank_zero_only(warn))(f"`{self._name}` ({self._prefix}*) {message}")

    @contextmanager
    def warn_on_failure(self, what: str) -> Iterator[None]:
        """Turn an exception inside into a warning, or into an error that says what failed; see :attr:`is_strict`."""
        try:
            yield
        except Exception as error:
            is_clear = isinstance(error, MisconfigurationException)
            if self.is_strict and (is_clear or is_oom_error(error)):
                raise  # out of memory: Lightning's finder of batch sizes waits for it
            reason = str(error) if is_clear else f"{type(error).__name__}: {str(error).strip().rstrip('.')}."
            if self.is_strict:
                advice = (
                    "If `forward` takes other arguments, set `inputs=`, such as `inputs=lambda batch: batch['image']`."
                )
                raise MisconfigurationException(f"`{self._name}` {what}: {reason} {advice}") from error
            self.has_failed = True
            self.warn(what, f"{what}: {reason}", in_any_process=True)
            if is_oom_error(error):
                traceback.clear_frames(error.__traceback__)  # which hold what the pass had on the device
                garbage_collection_cuda()


def lay_out_charts(trainer: Trainer, charts: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Lay out TensorBoard's Custom Scalars.

    Args:
        trainer: The Trainer, whose TensorBoard loggers get the layout.
        charts: The prefix of each monitor, and for the title of each of its charts a regular expression for the tags.
    """
    layout: dict[str, dict[str, object]] = {}
    for prefix, tags in charts:
        group = layout.setdefault(f"Generalization ({prefix}*)", {})
        group.update({title: ["Multiline", [f"^{re.escape(prefix)}{tag}"]] for title, tag in tags.items()})
    for logger in trainer.loggers:
        if any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):  # of either package
            logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]


def logged_name(name: str, is_test: bool, dataloader_idx: int, num_loaders: int) -> str:
    """Return the name for a value of a loader. In ``Trainer.test``, "test" replaces the word "val".

    Lightning's ``add_dataloader_idx`` adds no index at the end of an epoch.
    """
    if is_test:
        replaced, count = re.subn(r"(?<![A-Za-z])val(?![A-Za-z])", "test", name, count=1)
        name = replaced if count else f"test_{name}"
    return name if num_loaders == 1 else f"{name}/dataloader_idx_{dataloader_idx}"


def watchers(trainer: Trainer, names: Collection[str]) -> list[tuple[str, str, str]]:
    """List who watches one of our values: the name of the class, the logged name, and ``"min"`` or ``"max"``.

    Args:
        trainer: The Trainer.
        names: What we log, without the index of a loader.
    """
    owners = [*trainer.callbacks, *trainer.lr_scheduler_configs]  # type: ignore[attr-defined]
    watching = [(getattr(each, "scheduler", each), getattr(each, "monitor", None)) for each in owners]
    return [
        (type(owner).__name__, name, getattr(owner, "mode", "min"))
        for owner, name in watching
        if isinstance(name, str) and name.split("/dataloader_idx_")[0] in names
    ]


def num_batches(trainer: Trainer) -> list[int | float]:
    """Count the batches of each loader of the running loop; inf for a loader without a length, even if limited."""
    loop = trainer._evaluation_loop
    counts = loop.max_batches
    # Only the loop knows of a CombinedLoader. Lightning sees it as one loader unless it is sequential.
    mode, loaders = loop._combined_loader._mode, loop._combined_loader.flattened  # type: ignore[union-attr]
    if len(loaders) == len(counts):
        counts = [math.inf if sized_len(each) is None else count for count, each in zip(counts, loaders, strict=True)]
    return counts if mode == "sequential" else [min(counts) if mode == "min_size" else max(counts)]


def check_run(name: str, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Check that the module and the Trainer have what a monitor needs.

    Args:
        name: Name of the monitor's class.
        trainer: The Trainer, after its environment was set up.
        pl_module: The module of the run.
        stage: ``"fit"``, ``"validate"`` or ``"test"``.

    Raises:
        MisconfigurationException: If something is missing; the message says what to change.
    """
    strategy = {base.__name__ for base in type(trainer.strategy).__mro__}  # `pytorch_lightning` has classes of its own
    flag, sources = "allow_zero_length_dataloader_with_multiple_devices", (pl_module, trainer.datamodule)  # type: ignore[attr-defined]
    may_lack_batches = trainer.world_size > 1 and any(getattr(each, flag, False) for each in sources)
    step = inspect.signature(pl_module.test_step if stage == "test" else pl_module.validation_step)
    lacks_step = stage == "fit" and not _is_overridden("validation_step", pl_module)
    lacks_loop = stage == "fit" and not trainer.enable_validation
    for applies, problem in (
        (not _is_overridden("forward", pl_module), "needs a `forward` that returns the logits"),
        (lacks_step, "needs a `validation_step`: `def validation_step(self, batch, batch_idx): pass` is enough"),
        (lacks_loop, "needs a validation loop: pass `val_dataloaders`, and leave `limit_val_batches` above 0"),
        ("dataloader_iter" in step.parameters, "should see each batch before the step, which takes `dataloader_iter`"),
        (not strategy.isdisjoint(_SHARDED), "needs all weights in every process, as with DDP, but got them sharded"),
        (may_lack_batches, f"needs a batch in every process, not `{flag}=True`"),
    ):
        if applies:
            raise MisconfigurationException(f"`{name}` {problem}.")


class CallWatch:
    """Compare the first call of a module in a step of the user with ours.

    Tensors should have as many dimensions, a similar mean and a similar mean size: a step may augment its inputs.

    Args:
        pl_module: The module.
        call: Our call on the batch of the step.
    """

    def __init__(self, pl_module: LightningModule, call: ModelCall) -> None:
        self._pl_module, self._differing = pl_module, list[str]()
        self._handle: Any = None
        self._signature = inspect.Signature(parameters_of(pl_module))  # strategies put another in its place
        self._ours = self._bind(*clone_tensors((call.args, call.kwargs)))
        # Compiled code would trace the hook, and be compiled again without it.
        if self._ours and getattr(pl_module, "_compiler_ctx", None) is None and not pl_module._compiled_call_impl:
            self._handle = pl_module.register_forward_pre_hook(self._compare, with_kwargs=True)

    def end(self) -> list[str]:
        """Stop watching, and name the arguments that differ."""
        if self._handle is not None:
            self._handle.remove()
        return self._differing

    def _compare(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_isolated(self._pl_module):
            return
        with suppress(Exception):  # it runs in the user's step, on whatever is given there
            theirs = self._bind(args, kwargs)
            tolerance = 1 if module.training else 0.01  # steps of training augment
            self._differing = [name for name in theirs if not _are_alike(self._ours.get(name), theirs[name], tolerance)]
        self._handle.remove()

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments by the names of ``forward``, with defaults; nothing if it has no signature."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except (TypeError, ValueError):
            return {}
        bound.apply_defaults()
        return dict(bound.arguments)


def _are_alike(ours: Any, theirs: Any, tolerance: float) -> bool:
    tensors, others = tensors_in(ours), tensors_in(theirs)
    if not tensors and not others:
        return not any(isinstance(value, str | int | float | None) for value in (ours, theirs)) or bool(ours == theirs)
    for x, y in zip(tensors, others, strict=False):
        pair = x.detach().float(), y.detach().float()
        sizes, shift = [float(z.abs().mean()) for z in pair], abs(float(pair[0].mean() - pair[1].mean()))
        if max(sizes) > (1 + tolerance) * min(sizes) or shift > tolerance / 2 * max(sizes):
            return False  # never of nan
    return [x.ndim for x in tensors] == [y.ndim for y in others]


def _is_overridden(name: str, pl_module: LightningModule) -> bool:
    # Not Lightning's own check, which fails on a module of the other package, `lightning` or `pytorch_lightning`.
    return getattr(getattr(pl_module, name), "__module__", "") not in _LIGHTNING_MODULES
