"""What the monitors share: the hooks, and the way of a validation batch from its start to the log."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int, check_selectors
from lightning_sensitivity.callbacks import trainer as checks
from lightning_sensitivity.callbacks.failures import Failures, free_memory
from lightning_sensitivity.callbacks.run import RunFacts, first_pass
from lightning_sensitivity.callbacks.session import (
    Batch,
    BatchSelection,
    CleanOutputs,
    Group,
    Queue,
    Session,
    are_independent,
)
from lightning_sensitivity.callbacks.watch import CallWatch
from lightning_sensitivity.functional.reporting import warn
from lightning_sensitivity.metric import LazyValue
from lightning_sensitivity.model import ModelCall, isolated
from lightning_sensitivity.model.isolation import RunIsolated, shared_state

_STANDS = "Where no value could be measured, the last one stands."


class Monitor(Callback, ABC):
    """Measure validation batches and log the values, without ever ending a run; see the subclasses.

    The way of a validation: ``on_validation_start`` makes a :class:`~.session.Session`. ``on_validation_batch_start``
    prepares a chosen batch and puts it into the session's queue, which calls :meth:`measure_batches` when enough wait.
    That runs the model on them at once, and :meth:`measure` adds to the metric of the loader. Lightning reads the
    values, by :meth:`values_of`, when all processes are done with the loader.
    """

    names: tuple[str, ...]  # of the logged values, without the prefix
    charts: ClassVar[tuple[checks.Chart, ...]]  # for TensorBoard
    misleading_mode: ClassVar[str]  # the mode of an `EarlyStopping` that would pick the worst value
    misleading_mode_advice: ClassVar[str]

    def __init__(
        self,
        num_samples: int | None,
        seed: int,
        prefix: str,
        inputs: Selector | None,
        outputs: Selector | None,
        every_n_epochs: int,
        prog_bar: bool,
    ) -> None:
        if num_samples is not None:
            check_int("num_samples", num_samples, 1)
        check_int("seed", seed, 0)
        check_argument("prefix", prefix, isinstance(prefix, str), "a str")
        check_selectors(inputs=inputs, outputs=outputs)
        check_int("every_n_epochs", every_n_epochs, 1)
        check_bool("prog_bar", prog_bar)
        self.num_samples = num_samples
        self.seed = seed
        self.prefix = prefix
        self.inputs = inputs
        self.outputs = outputs
        self.every_n_epochs = every_n_epochs
        self.prog_bar = prog_bar
        self.metrics: dict[int, Any] = {}  # of the last validation, by loader
        self.session: Session | None = None
        self.run_facts = RunFacts(Failures(type(self).__name__, prefix))
        self._last_epoch: int | None = None  # the last one measured

    # What a subclass measures

    @abstractmethod
    def measure(self, trainer: Trainer, run: RunIsolated, group: Group) -> None:
        """Run the model on a group of batches, and add to the metric of their loader: all of it or nothing."""

    @abstractmethod
    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Compute the values of a loader over all processes, and the warnings. Every process must call it."""

    @abstractmethod
    def make_metric(self) -> Metric:
        """Make the metric of a loader for a validation."""

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise MisconfigurationException if these outputs would give wrong values."""

    def check_call(self, pl_module: LightningModule, run: RunIsolated, call: ModelCall) -> None:
        """Raise an exception if what the monitor does with a call is not possible."""

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure the current validation. Override it to measure at other times."""
        if self.run_facts.is_disabled:
            return False
        is_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not is_fit or self._last_epoch is None:
            return True
        epoch = trainer.current_epoch
        return epoch == self._last_epoch or epoch >= self._last_epoch + self.every_n_epochs

    @property
    def num_draws_per_sample(self) -> int:
        """Number of noisy passes that count against ``num_samples``."""
        return 1

    # Before a run

    @property
    def checkpoint_key(self) -> str:
        """The key of what is saved in a checkpoint; monitors of a Trainer differ by their prefix."""
        return f"{type(self).__qualname__}(prefix={self.prefix!r})"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the last epoch that was measured, which a resumed fit continues from."""
        # Not by `state_dict`: Lightning refuses two monitors that have one, before ours can say what to do.
        if self.every_n_epochs > 1:
            checkpoint.setdefault(self.checkpoint_key, {})["last_epoch"] = self._last_epoch

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the last epoch that was measured."""
        self._last_epoch = checkpoint.get(self.checkpoint_key, {}).get("last_epoch")

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch."""
        if stage not in ("fit", "validate", "test"):
            return
        name = type(self).__name__
        checks.check_run(name, trainer, pl_module, stage)
        others = {
            prefixed for other in monitors_of(trainer) if other is not self for prefixed in other.prefixed_names()
        }
        is_unique = others.isdisjoint(self.prefixed_names())
        check_argument("prefix", self.prefix, is_unique, "different in monitors that log the same names")
        self.run_facts = RunFacts(Failures(name, self.prefix))
        self._last_epoch = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if our values are monitored in the wrong way, and lay out TensorBoard's charts once for all monitors."""
        monitors = monitors_of(trainer)
        if self is monitors[0]:  # a second layout would replace the first
            checks.lay_out_charts(trainer, [(monitor.prefix, monitor.charts) for monitor in monitors])
        for consumer in checks.consumers(trainer, self.prefixed_names()):
            is_value = not consumer.name.split("/dataloader_idx_")[0].endswith("_stderr")
            if consumer.mode == self.misleading_mode and is_value:
                warn(f"`{consumer.owner}` {consumer.mode}imizes `{consumer.name}`, {self.misleading_mode_advice}")
            if self.every_n_epochs > 1:
                warn(
                    f"`{consumer.owner}` sees a stale `{consumer.name}` in the epochs that `every_n_epochs="
                    f"{self.every_n_epochs}` skips."
                )

    # The user's training step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the model before the first step, unless the sanity check did. From then on, only warn."""
        failures = self.run_facts.failures
        if not failures.is_strict:
            return
        try:
            call = self.prepare(trainer, pl_module, batch)
            if trainer.global_step == 0 and not self.run_facts.loaders:
                self._check_first_batch(trainer, pl_module, call)
        except Exception as error:
            self._check_validation_batch(trainer, pl_module, error)
        else:
            self.run_facts.watch = CallWatch(pl_module, call, self.outputs)
        failures.is_strict = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching the step, and warn if it does not call the model as we do."""
        watch = self.run_facts.watch
        if watch is not None and watch.can_watch and not watch.was_called:
            self.run_facts.failures.warn(
                "call",
                "measures `forward`, which your training step does not call. If the step prepares its inputs in another "
                "way, such as by normalizing them, do that in `forward`, or in `inputs=`.",
            )
        self._end_watch()

    def on_validation_batch_end(self, *args: Any) -> None:
        """Stop watching the step, and warn if it called the model differently than we do."""
        self._end_watch()

    # The validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a session, and broadcast buffers as the first forward of DDP would."""
        self.run_facts.failures.has_failed = False
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.run_facts.failures.is_strict = False  # also in a resumed fit that begins with a validation
        compat.sync_buffers(trainer.strategy.model)
        if self.should_measure(trainer):
            self.session = self.make_session(trainer)

    def make_session(self, trainer: Trainer) -> Session:
        """Make the state of a validation."""
        budget = math.inf
        if self.num_samples is not None:
            budget = self.num_samples / (trainer.world_size * self.num_draws_per_sample)
        selections = [BatchSelection(count, budget) for count in compat.num_batches(trainer)]
        for dataloader_idx, facts in self.run_facts.loaders.items():
            selections[dataloader_idx].start(facts.batch_size)
        can_wait = self.run_facts.can_join is not False
        self.metrics = {}
        return Session(
            selections=selections,
            queue=Queue(partial(self.measure_batches, trainer), can_wait),
            clean=self._shared_clean_outputs(trainer),
            metrics=self.metrics,
        )

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Put a chosen batch into the queue before the step can change it. At a loader's first batch, log its values."""
        session = self.session
        if session is None:
            return
        if batch_idx == 0:
            self._start_loader(trainer, dataloader_idx)
        if batch is not None:
            with self.run_facts.failures.warn_on_failure(_could_not_measure(dataloader_idx), _STANDS):
                self.collect(trainer, pl_module, session, batch, batch_idx, dataloader_idx)
        if compat.is_last_batch(trainer):
            session.flush()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part in every reduction, in every process, and warn about problems, also in the sanity check."""
        session = self.session
        if session is None:
            return
        for dataloader_idx in range(len(session.selections)):
            self.values_of(trainer, dataloader_idx)
            if dataloader_idx not in session.logged:
                self._log(trainer, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the session, and say if somebody else logs our names."""
        self._check_names(trainer)
        if self.session is not None and not trainer.sanity_checking:
            self._last_epoch = trainer.current_epoch
        self.session = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as in a validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Do as in a validation."""
        self.on_validation_batch_start(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_test_batch_end(self, *args: Any) -> None:
        """Do as in a validation."""
        self._end_watch()

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as in a validation."""
        self.on_validation_epoch_end(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as in a validation."""
        self.on_validation_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remove our hooks, and free what refers to the module."""
        self._free()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as in ``teardown``, which Lightning does not call then."""
        self._free()

    # Passes

    @contextmanager
    def isolated(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[RunIsolated]:
        """Yield a function that runs the model and leaves no trace, in the precision of validation."""
        with isolated(pl_module) as run, trainer.precision_plugin.val_step_context():
            yield run

    def measure_batches(self, trainer: Trainer, batches: list[Batch]) -> None:
        """Measure batches together, or one by one where that fails, so that one bad batch costs one batch."""
        if len(batches) > 1 and self._measure_joint(trainer, batches):
            return
        pl_module = trainer.lightning_module
        for batch in batches:
            with self.run_facts.failures.warn_on_failure(_could_not_measure(batch.dataloader_idx), _STANDS):
                with self.isolated(trainer, pl_module) as run:
                    self.measure(trainer, run, Group([batch]))

    def clean_outputs(self, run: RunIsolated, group: Group) -> Tensor:
        """Return the clean outputs of a group, by a pass or from the monitor that made it just now."""
        assert self.session is not None
        return self.session.clean.get(run, group)

    def metric(self, trainer: Trainer, dataloader_idx: int) -> Any:
        """Return the metric of a loader, on the device of the module."""
        if dataloader_idx not in self.metrics:
            with trainer.lightning_module.device:  # for the types that it has
                self.metrics[dataloader_idx] = self.make_metric()
            compat.mark_updated(self.metrics[dataloader_idx])  # a process may have no batch
        return self.metrics[dataloader_idx]

    def values_of(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        """Return the values of a loader, computed once, over all processes."""
        session = self.session
        if session is None:
            return {}
        if dataloader_idx not in session.values:
            session.flush()
            session.values[dataloader_idx] = {}
            failures = self.run_facts.failures
            with failures.warn_on_failure(f"could not compute the values of dataloader {dataloader_idx}", _STANDS):
                session.values[dataloader_idx], messages = self.compute_values(trainer, dataloader_idx)
                self._warn_of_values(messages, dataloader_idx)
        return session.values[dataloader_idx]

    def _warn_of_values(self, messages: dict[str, str], dataloader_idx: int) -> None:
        """Warn of doubtful values, unless a warning has said why they are."""
        failures = self.run_facts.failures
        if failures.has_failed:
            messages.pop("no value", None)
        if failures.has_warned("call"):
            messages.pop("too large", None)
        for kind, message in messages.items():
            failures.warn(kind, f"on dataloader {dataloader_idx}: {message}")

    def prefixed_names(self) -> set[str]:
        """Return the logged names with the prefix."""
        return {self.prefix + name for name in self.names}

    def prepare(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> ModelCall:
        """Prepare the call of the model on a batch."""
        if self.inputs is None:
            return ModelCall(pl_module, batch, outputs=self.outputs)
        with self.isolated(trainer, pl_module) as run:  # only user code can have side effects
            return run(ModelCall, pl_module, batch, self.inputs, self.outputs)

    def collect(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        session: Session,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Put a batch into the queue if it is chosen."""
        selection = session.selections[dataloader_idx]
        if not selection.includes(batch_idx):
            return
        prepared = self.make_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)
        selection.count(prepared)
        session.queue.add(prepared, is_last=selection.is_complete(batch_idx))

    def make_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> Batch:
        """Prepare a batch; the first one of a loader is checked, and shows how large the others will be."""
        assert self.session is not None
        call = self.prepare(trainer, pl_module, batch)
        if dataloader_idx not in self.run_facts.loaders:
            self._check_first_batch(trainer, pl_module, call, dataloader_idx)
            self.session.selections[dataloader_idx].start(self.run_facts.loaders[dataloader_idx].batch_size)
            self.run_facts.watch = CallWatch(pl_module, call, self.outputs)
            self.run_facts.failures.is_strict &= trainer.state.fn == TrainerFn.FITTING
        facts = self.run_facts.loaders[dataloader_idx]
        size = call.sizes[0] or facts.batch_size
        return Batch(call, batch_idx, dataloader_idx, size, size * facts.elements_per_sample)

    def _check_first_batch(
        self, trainer: Trainer, pl_module: LightningModule, call: ModelCall, dataloader_idx: int | None = None
    ) -> None:
        """Refuse a model whose values would be wrong, or that our passes would change."""
        with self.isolated(trainer, pl_module) as run:
            outputs, written, facts = first_pass(pl_module, run, call)
            if dataloader_idx is None:  # otherwise it is measured next
                self.check_call(pl_module, run, call)
        if written:
            self.run_facts.is_disabled = True
            raise MisconfigurationException(
                f"`{type(self).__name__}` would change a model whose `forward` writes its parameters, here "
                f"{', '.join(written[:3])}. Update them in a training hook instead, such as `on_train_batch_end`."
            )
        self.check_outputs(outputs)
        if dataloader_idx is not None:
            self.run_facts.loaders[dataloader_idx] = facts
        shared = shared_state(pl_module)
        if shared:
            self.run_facts.failures.warn(
                "shared",
                f"cannot copy these attributes of the model for its passes: {', '.join(map(repr, shared[:5]))}. If "
                "`forward` changes them, it does so in our passes, too.",
            )

    def _check_validation_batch(self, trainer: Trainer, pl_module: LightningModule, error: Exception) -> None:
        """Raise what is wrong with a validation batch, where no sanity check did and a training batch failed."""
        if trainer.global_step > 0 or self.run_facts.loaders:
            return
        if isinstance(error, MisconfigurationException) and self.run_facts.is_disabled:
            raise error
        with self.isolated(trainer, pl_module) as run:  # samples and transforms may draw random numbers
            batch = run(checks.make_validation_batch, trainer)
        if batch is not None:
            with self.run_facts.failures.warn_on_failure(_could_not_measure(0)):
                self._check_first_batch(trainer, pl_module, self.prepare(trainer, pl_module, batch))

    def _measure_joint(self, trainer: Trainer, batches: list[Batch]) -> bool:
        """Measure batches together, and return whether that was possible."""
        facts = self.run_facts
        if facts.can_join is False:
            return False
        try:
            group = Group(batches)
            with self.isolated(trainer, trainer.lightning_module) as run:
                if facts.can_join is None:
                    single, joint = run(batches[0].call), run(group.call)
                    has_all = len(joint) == group.size
                    facts.can_join = has_all and are_independent(joint[: len(single)], single, batches[0].size)
                if facts.can_join:
                    self.measure(trainer, run, group)
        except Exception as error:
            if is_oom_error(error):
                free_memory(error)
            return False
        return facts.can_join

    def _shared_clean_outputs(self, trainer: Trainer) -> CleanOutputs:
        """Return the clean outputs of an earlier monitor that calls the model as this one does, or new ones."""
        for other in monitors_of(trainer):
            if other is self:
                break
            clean = None if other.session is None else other.session.clean
            if clean is not None and (clean.inputs, clean.outputs) == (self.inputs, self.outputs):
                clean.num_users += 1
                return clean
        return CleanOutputs(self.inputs, self.outputs)

    def _start_loader(self, trainer: Trainer, dataloader_idx: int) -> None:
        for earlier in range(dataloader_idx):  # other processes may already have reduced these
            self.values_of(trainer, earlier)
        self._log(trainer, dataloader_idx)

    def _log(self, trainer: Trainer, dataloader_idx: int) -> None:
        """Log the values of a loader, which are read when all processes are done with it."""
        session = self.session
        if session is None or trainer.sanity_checking:
            return
        session.logged.add(dataloader_idx)
        self._check_names(trainer)
        for name in self.names:
            base_name = checks.logged_name(self.prefix + name, bool(trainer.testing))
            if base_name in self.run_facts.taken:
                continue
            key = dataloader_idx, name
            if key not in self.run_facts.lazy_values:  # a Metric costs more to make than to log
                self.run_facts.lazy_values[key] = LazyValue(partial(self._read, trainer, dataloader_idx, name))
            full_name = checks.with_loader_index(base_name, dataloader_idx, len(session.selections))
            is_shown = self.prog_bar and name == self.names[0]
            with self.run_facts.failures.warn_on_failure(f"could not log {full_name!r}"):
                compat.log_metric(trainer.lightning_module, full_name, self.run_facts.lazy_values[key], is_shown)

    def _read(self, trainer: Trainer, dataloader_idx: int, name: str) -> Tensor | None:
        return self.values_of(trainer, dataloader_idx).get(name)

    def _check_names(self, trainer: Trainer) -> None:
        """Leave names to others who log them; before the first training step, that is an error."""
        names = {checks.logged_name(name, bool(trainer.testing)) for name in self.prefixed_names()}
        taken = checks.taken_names(trainer, names) - self.run_facts.taken
        if not taken:
            return
        message = checks.explain_taken(sorted(taken)[0], self.prefix)
        if trainer.sanity_checking:
            raise MisconfigurationException(f"`{type(self).__name__}` {message}")
        self.run_facts.taken |= taken
        self.run_facts.failures.warn("taken", f"{message} Until then, this value of ours is left out.")

    def _end_watch(self) -> None:
        watch, self.run_facts.watch = self.run_facts.watch, None
        names = [] if watch is None else watch.end()
        if names:
            self.run_facts.failures.warn(
                "call",
                "may not measure what your step computes: the step calls the model with different arguments "
                f"({', '.join(names)}). Set `inputs=` to a function that returns what the step passes.",
            )

    def _free(self) -> None:
        self._end_watch()
        self.session = None
        self.run_facts.lazy_values.clear()


def monitors_of(trainer: Trainer) -> list[Monitor]:
    """List the monitors among the callbacks of a Trainer."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]


def _could_not_measure(dataloader_idx: int) -> str:
    return f"could not measure a batch of dataloader {dataloader_idx}"
