"""What is refused before the first training step, and what is said after it."""

import inspect
import math
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error
from torch import Tensor

from lightning_sensitivity.arguments import link_to
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import (
    Diagnosis,
    are_close,
    are_log_probabilities,
    are_probabilities,
    may_be_probabilities,
    num_outputs,
)

_LIGHTNING_MODULES = ("lightning.pytorch.core.module", "pytorch_lightning.core.module")
_SHARDED = ("DeepSpeedStrategy", "FSDPStrategy", "ModelParallelStrategy")
_INPUTS = "`inputs=`, such as `inputs=lambda batch: batch['image']`"
_PAGE = "docs/troubleshooting.md"


class Reporter:
    """Turn a failure into an error before the first training step, and into a warning after it.

    Args:
        monitor: Name of the monitor's class.
        prefix: Prefix of what it logs.

    Attributes:
        before_first_step: Whether a failure is an error.
    """

    def __init__(self, monitor: str, prefix: str) -> None:
        self.before_first_step = True
        self._monitor = monitor
        self._prefix = prefix
        self._said: dict[str, float] = {}  # how severe each kind was when it was last said
        self._num_failures: dict[str, int] = {}
        self._may_be_probabilities: bool | None = None  # all outputs so far; None if there are none

    def warn(self, entry: str, message: str, severity: float = 1.0, kind: str = "") -> None:
        """Warn, and again whenever it has become twice as severe.

        Args:
            entry: The entry of the page on troubleshooting.
            message: What follows the name of the monitor, as whole sentences.
            severity: How bad it is, such as a number of samples.
            kind: What tells this warning from others of the same entry.
        """
        if self._is_worse(entry + kind, severity):
            rank_zero_warn(self._text(entry, message))

    def warn_of(self, diagnoses: Mapping[str, Diagnosis], dataloader_idx: int) -> None:
        """Warn of what makes the values of a loader doubtful."""
        for entry, (message, severity) in diagnoses.items():
            self.warn(entry, f"on dataloader {dataloader_idx}: {message}", severity, kind=str(dataloader_idx))

    def note_outputs(self, outputs: Tensor) -> None:
        """Note whether outputs may be probabilities, until some are not."""
        if self._may_be_probabilities is not False:
            self._may_be_probabilities = may_be_probabilities(outputs)

    def warn_of_probabilities(self) -> None:
        """Warn if all outputs so far may be probabilities, as those of a small head may before training."""
        if self._may_be_probabilities:
            self.warn("arguments", "got outputs that all lie in [0, 1]. If they are not logits, set `outputs=`.")

    @contextmanager
    def report_failure(self, what: str, consequence: str) -> Iterator[None]:
        """Turn an exception inside into an error or a warning; see :attr:`before_first_step`.

        Args:
            what: What failed, such as "could not measure the samples".
            consequence: A sentence that says what happens to the values.
        """
        try:
            yield
        except Warning:  # the user, or a test, has made warnings errors
            raise
        except Exception as error:
            if self.before_first_step:
                raise self._as_error(what, error) from error
            if is_oom_error(error):
                traceback.clear_frames(error.__traceback__)  # they hold the tensors of the pass
                garbage_collection_cuda()
            count = self._num_failures[what] = self._num_failures.get(what, 0) + 1
            entry = "out-of-memory" if is_oom_error(error) else "failed"
            if self._is_worse(what, count):  # in the process where it happens
                again = f" It has failed {count} times." if count > 1 else ""  # Python drops equal warnings
                text = f"{what}: {describe_error(error)} {consequence}{again}"
                warnings.warn(self._text(entry, text), stacklevel=3)

    def _is_worse(self, kind: str, severity: float) -> bool:
        """Return whether something must be said, and remember how severe it was."""
        if severity < 2 * self._said.get(kind, 0.0):
            return False
        self._said[kind] = severity
        return True

    def _text(self, entry: str, message: str) -> str:
        return f"`{self._monitor}` ({self._prefix}*) {_with_link(message, entry)}"

    def _as_error(self, what: str, error: Exception) -> Exception:
        if is_oom_error(error):
            return error  # Lightning's batch-size finder needs it
        reason = describe_error(error)
        is_clear = isinstance(error, MisconfigurationException) or reason.startswith("Expected")
        advice = "" if is_clear else f" If `forward` takes other arguments, set {_INPUTS}."
        entry = "noise" if "perturb" in reason else "task" if "label" in reason else "arguments"
        return MisconfigurationException(f"`{self._monitor}` {what}: {_with_link(reason + advice, entry)}")


def _with_link(message: str, entry: str) -> str:
    return message if _PAGE in message else message + link_to(entry)


def describe_error(error: Exception) -> str:
    """Describe an exception in a sentence."""
    if isinstance(error, MisconfigurationException):
        return str(error)
    reason = str(error).strip().rstrip(".")
    if isinstance(error, ValueError) and reason:
        return f"{reason}."
    if isinstance(error, NotImplementedError) and not reason:
        reason = "a method that the model needs, such as `forward`, is missing"
    return f"{type(error).__name__}: {reason}".removesuffix(": ") + "."


def check_run(monitor: str, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
    """Check that the module and the Trainer have what a monitor needs.

    Args:
        monitor: Name of the monitor's class.
        trainer: The Trainer, after its environment was set up.
        pl_module: The module of the run.
        stage: ``"fit"`` or ``"validate"``.

    Raises:
        MisconfigurationException: If something is missing; the message says what to change.
    """
    names = {base.__name__ for base in type(trainer.strategy).__mro__}
    problem = _problem_of_steps(trainer, pl_module, stage)
    if not names.isdisjoint(_SHARDED):
        problem = "does not support sharded weights (FSDP, DeepSpeed, ModelParallelStrategy); use DDP"
    if problem is not None:
        raise MisconfigurationException(f"`{monitor}` {problem}.{link_to('unsupported')}")


def _problem_of_steps(trainer: Trainer, pl_module: LightningModule, stage: str) -> str | None:
    """Explain what the module lacks, or how its step hides batches; None if nothing is wrong."""
    if not _is_overridden("forward", pl_module):
        return "needs a `forward` that returns the logits, and your module has none"
    training, validation = map(inspect.signature, (pl_module.training_step, pl_module.validation_step))
    if "dataloader_iter" in {*training.parameters, *validation.parameters}:
        return "needs to see each batch before the step, but the step takes `dataloader_iter`"
    if stage != "fit":
        return None
    if not _is_overridden("validation_step", pl_module):
        return "needs a `validation_step`: `def validation_step(self, batch, batch_idx): pass` is enough"
    if not trainer.enable_validation:
        return "needs a validation loop: pass `val_dataloaders`, and leave `limit_val_batches` above 0"
    return None


def _is_overridden(name: str, pl_module: LightningModule) -> bool:
    # Lightning's own check fails if the module comes from the other package (`lightning` or
    # `pytorch_lightning`).
    return getattr(getattr(pl_module, name), "__module__", "") not in _LIGHTNING_MODULES


def check_modes(trainer: Trainer, names: Collection[str]) -> None:
    """Refuse callbacks that look for the highest of values that are best when they are low.

    Raises:
        MisconfigurationException: If there is one.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        monitor = str(getattr(callback, "monitor", None))
        if monitor.partition("/dataloader_idx_")[0] in names and getattr(callback, "mode", "min") == "max":
            got = f"got 'max' in `{type(callback).__name__}`"
            raise MisconfigurationException(f"`mode` should be 'min' for `{monitor}`, {got}.{link_to('lowest')}")


def check_repeatable(first: Tensor, second: Tensor) -> None:
    """Refuse a model whose second pass gives other outputs, though we restored all that we can.

    Raises:
        MisconfigurationException: If outputs differ.
    """
    if first.shape != second.shape or not are_close(first, second):
        raise MisconfigurationException(
            "`forward` gives other outputs when it is called again on the same batch, in eval mode and with the same "
            "random numbers of torch: it keeps something that is not restored. Change it only `if self.training`, and "
            f"draw random numbers by torch.{link_to('state')}"
        )


def check_logits(outputs: Tensor) -> None:
    """Refuse outputs that have another sensitivity than logits.

    Raises:
        MisconfigurationException: If they are probabilities or their logarithms.
    """
    if are_probabilities(outputs) or are_log_probabilities(outputs):
        raise MisconfigurationException(
            "logits are needed, got (log-)probabilities: select logits with `outputs=`, or use `per_output=True`."
            f"{link_to('arguments')}"
        )


def check_outputs(outputs: Tensor, task: Task) -> None:
    """Refuse outputs that have no risk estimate.

    Raises:
        MisconfigurationException: If they are dense, probabilities, or a single one for several classes.
    """
    if task.sums_to_one and num_outputs(outputs) == 1:
        raise MisconfigurationException(
            f"outputs of shape {tuple(outputs.shape)} are one for each sample: set `task='binary'` if labels are 0 and "
            f"1. A regression has no estimate.{link_to('task')}"
        )
    if math.prod(outputs.shape[2:]) > 1:
        raise MisconfigurationException(
            f"outputs are dense, {tuple(outputs.shape)}: there is no estimate for pixels and tokens. Remove "
            f"`RiskMonitor`; `SensitivityMonitor` works.{link_to('no-estimate')}"
        )
    if are_probabilities(outputs):
        raise MisconfigurationException(
            f"outputs are probabilities, and logits are needed: select them with `outputs=`.{link_to('no-estimate')}"
        )
