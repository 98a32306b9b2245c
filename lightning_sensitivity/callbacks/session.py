"""One validation of one monitor, from its first batch to the values that are logged."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity import compat
from lightning_sensitivity.callbacks import trainer as checks
from lightning_sensitivity.callbacks.batches import (
    Batch,
    BatchSelection,
    CleanOutputs,
    Group,
    Queue,
    are_independent,
)
from lightning_sensitivity.callbacks.failures import free_memory
from lightning_sensitivity.callbacks.lazy import LazyValue
from lightning_sensitivity.callbacks.run import first_pass
from lightning_sensitivity.callbacks.watch import CallWatch
from lightning_sensitivity.model import ModelCall, isolated
from lightning_sensitivity.model.isolation import RunIsolated, shared_state

if TYPE_CHECKING:
    from lightning_sensitivity.callbacks.base import Monitor

LAST_IS_KEPT = "If there is no value, the last one is kept."


class Session(ABC):
    """Measure the batches of a validation, and compute the values of each loader.

    The path of a batch: if a batch is chosen, :meth:`collect` prepares it and puts it into the queue. When enough
    batches wait, the queue calls :meth:`measure_batches`. This runs the model on them together, and :meth:`measure`
    adds to the metric of the loader. Lightning reads the values through :meth:`values_of` after all processes have
    finished the loader.

    Args:
        monitor: The monitor.
        trainer: The Trainer, at the start of a validation.
        clean: Clean outputs, shared with other monitors.

    Attributes:
        metrics: The metric of each loader.
    """

    def __init__(self, monitor: Monitor, trainer: Trainer, clean: CleanOutputs) -> None:
        self.monitor = monitor
        self.trainer = trainer
        self.clean = clean
        self.facts = monitor.run_facts
        self.failures = monitor.run_facts.failures
        self.metrics: dict[int, Any] = {}
        budget = math.inf
        if monitor.num_samples is not None:
            budget = monitor.num_samples / (trainer.world_size * monitor.num_draws_per_sample)
        self.selections = [BatchSelection(count, budget) for count in compat.num_batches(trainer)]
        for dataloader_idx, facts in self.facts.loaders.items():
            self.selections[dataloader_idx].start(facts.batch_size)
        self.queue = Queue(self.measure_batches, can_wait=self.facts.can_join is not False)
        self._values: dict[int, dict[str, Tensor]] = {}  # of each loader, once they are computed
        self._logged: set[int] = set()  # loaders

    @property
    def module(self) -> LightningModule:
        """The module that is validated."""
        return self.trainer.lightning_module

    # For subclasses to implement

    @abstractmethod
    def measure(self, run: RunIsolated, group: Group) -> None:
        """Run the model on a group of batches, and add to the metric of their loader: the whole group or nothing."""

    @abstractmethod
    def compute_values(self, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Compute the values of a loader over all processes, and the warnings. Every process must call it."""

    @abstractmethod
    def make_metric(self) -> Metric:
        """Make the metric of a loader."""

    # The path of a batch

    def start_loader(self, dataloader_idx: int) -> None:
        """Log the values of a loader, which Lightning reads later."""
        for earlier in range(dataloader_idx):  # other processes may have reduced these already
            self.values_of(earlier)
        self._log(dataloader_idx)

    def collect(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Put a batch into the queue if it is chosen."""
        selection = self.selections[dataloader_idx]
        if selection.includes(batch_idx):
            prepared = self.make_batch(batch, batch_idx, dataloader_idx)
            selection.count(prepared)
            self.queue.add(prepared, is_last=selection.is_complete(batch_idx))

    def make_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Batch:
        """Prepare a batch; check the first batch of a loader, and infer the size of the others from it."""
        call = self.prepare(batch)
        if dataloader_idx not in self.facts.loaders:
            self.check_first_batch(call, dataloader_idx)
            self.selections[dataloader_idx].start(self.facts.loaders[dataloader_idx].batch_size)
            self.facts.watch = CallWatch(self.module, call, self.monitor.outputs)
            if self.trainer.state.fn != TrainerFn.FITTING:
                self.failures.is_strict = False
        facts = self.facts.loaders[dataloader_idx]
        size = call.sizes[0] or facts.batch_size
        return Batch(call, batch_idx, dataloader_idx, size, size * facts.elements_per_sample)

    def prepare(self, batch: Any) -> ModelCall:
        """Prepare the call of the model on a batch."""
        inputs, outputs = self.monitor.inputs, self.monitor.outputs
        if inputs is None:
            return ModelCall(self.module, batch, outputs=outputs)
        with self.isolated() as run:  # only user code can have side effects
            return run(ModelCall, self.module, batch, inputs, outputs)

    def measure_batches(self, batches: list[Batch]) -> None:
        """Measure batches of one loader."""
        what = could_not_measure(batches[0].dataloader_idx)
        self.measure_together(batches, self.measure, what, LAST_IS_KEPT)

    def measure_together(
        self, batches: list[Batch], measure: Callable[[RunIsolated, Group], None], what: str, consequence: str = ""
    ) -> None:
        """Measure batches together, or one by one if that fails, so that a bad batch costs only itself.

        Args:
            batches: The batches, all of one layout.
            measure: Function that measures a group of batches: the whole group or nothing.
            what: What failed, if a batch cannot be measured.
            consequence: A sentence that says what happens to the values in this case.
        """
        if len(batches) > 1 and self._measure_joint(batches, measure):
            return
        for batch in batches:
            with self.failures.warn_on_failure(what, consequence), self.isolated() as run:
                measure(run, Group([batch]))

    def flush(self) -> None:
        """Measure all batches that wait."""
        self.queue.flush()

    @contextmanager
    def isolated(self) -> Iterator[RunIsolated]:
        """Yield a function that runs the model and leaves no trace, in the precision of validation."""
        with isolated(self.module) as run, self.trainer.precision_plugin.val_step_context():
            yield run

    def metric(self, dataloader_idx: int) -> Any:
        """Return the metric of a loader, on the device of the module."""
        if dataloader_idx not in self.metrics:
            with self.module.device:  # it determines the floating types
                self.metrics[dataloader_idx] = self.make_metric()
            compat.mark_updated(self.metrics[dataloader_idx])  # a process may have no batch
        return self.metrics[dataloader_idx]

    # The values

    def values_of(self, dataloader_idx: int) -> dict[str, Tensor]:
        """Return the values of a loader over all processes; compute them only once."""
        if dataloader_idx not in self._values:
            self.flush()
            self._values[dataloader_idx] = {}
            what = f"could not compute the values of dataloader {dataloader_idx}"
            with self.failures.warn_on_failure(what, LAST_IS_KEPT):
                self._values[dataloader_idx], messages = self.compute_values(dataloader_idx)
                self._warn_of_values(messages, dataloader_idx)
        return self._values[dataloader_idx]

    def finish(self) -> None:
        """Take part in every reduction, and log the values of loaders that gave this process no batch."""
        for dataloader_idx in range(len(self.selections)):
            self.values_of(dataloader_idx)
            if dataloader_idx not in self._logged:
                self._log(dataloader_idx)

    # Checks

    def check_first_batch(self, call: ModelCall, dataloader_idx: int | None = None) -> None:
        """Refuse a model whose values would be wrong, or which our passes would change.

        Args:
            call: The call on the batch.
            dataloader_idx: The validation loader. None for a batch that is not measured afterwards; then everything
                that the monitor does with a batch is tried.
        """
        with self.isolated() as run:
            outputs, written, facts = first_pass(self.module, run, call)
            if dataloader_idx is None:
                self.monitor.check_call(self.module, run, call)
        if written:
            self.facts.is_disabled = True
            raise MisconfigurationException(
                f"`{type(self.monitor).__name__}` would change a model whose `forward` writes its parameters, here "
                f"{', '.join(written[:3])}. Update them in a training hook instead, such as `on_train_batch_end`."
            )
        self.monitor.check_outputs(outputs)
        if dataloader_idx is not None:
            self.facts.loaders[dataloader_idx] = facts
        shared = shared_state(self.module)
        if shared:
            self.failures.warn(
                "shared",
                f"cannot copy these attributes of the model for its passes: {', '.join(map(repr, shared[:5]))}. If "
                "`forward` changes them, it does so in our passes, too.",
            )

    def _measure_joint(self, batches: list[Batch], measure: Callable[[RunIsolated, Group], None]) -> bool:
        """Measure batches together, and return whether that was possible."""
        facts = self.facts
        if facts.can_join is False:
            return False
        try:
            group = Group(batches)
            with self.isolated() as run:
                if facts.num_joined < group.size:
                    facts.can_join = _can_be_joined(run, group)
                    facts.num_joined = group.size
                if not facts.can_join:
                    return False
                measure(run, group)
        except Exception as error:
            if is_oom_error(error):
                free_memory(error)
            return False
        return True

    def _log(self, dataloader_idx: int) -> None:
        if self.trainer.sanity_checking:
            return
        self._logged.add(dataloader_idx)
        monitor = self.monitor
        monitor.check_names(self.trainer)
        for name in monitor.names:
            base_name = checks.logged_name(monitor.prefix + name, bool(self.trainer.testing))
            if base_name in self.facts.taken:
                continue
            key = dataloader_idx, name
            if key not in self.facts.lazy_values:  # making a Metric costs more than logging it
                self.facts.lazy_values[key] = LazyValue(partial(monitor.read, dataloader_idx, name))
            full_name = checks.with_loader_index(base_name, dataloader_idx, len(self.selections))
            is_shown = monitor.prog_bar and name == monitor.names[0]
            with self.failures.warn_on_failure(f"could not log {full_name!r}"):
                compat.log_metric(self.module, full_name, self.facts.lazy_values[key], is_shown)

    def _warn_of_values(self, messages: dict[str, str], dataloader_idx: int) -> None:
        """Warn about doubtful values, unless an earlier warning has explained them."""
        if self.failures.has_failed:
            messages.pop("no value", None)
        if self.failures.has_warned("call"):
            messages.pop("too large", None)
        for kind, message in messages.items():
            self.failures.warn(kind, f"on dataloader {dataloader_idx}: {message}")


def could_not_measure(dataloader_idx: int) -> str:
    """Say which batch failed."""
    return f"could not measure a batch of dataloader {dataloader_idx}"


def _can_be_joined(run: RunIsolated, group: Group) -> bool:
    """Return whether the first and the last batch have the same outputs in a joint pass as in passes of their own."""
    first, last = group.batches[0], group.batches[-1]
    first_outputs, last_outputs, joint = run(first.call), run(last.call), run(group.call)
    return (
        len(joint) == group.size
        and are_independent(joint[: first.size], first_outputs, first.size)
        and are_independent(joint[-last.size :], last_outputs, last.size)
    )
