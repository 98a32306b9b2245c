"""What the monitors share: arguments, and Lightning's hooks, in the order in which Lightning calls them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int, check_selectors
from lightning_sensitivity.callbacks import trainer as checks
from lightning_sensitivity.callbacks.batches import CleanOutputs
from lightning_sensitivity.callbacks.failures import Failures
from lightning_sensitivity.callbacks.run import RunFacts
from lightning_sensitivity.callbacks.session import LAST_IS_KEPT, Session, could_not_measure
from lightning_sensitivity.callbacks.watch import CallWatch
from lightning_sensitivity.functional.reporting import warn
from lightning_sensitivity.model import ModelCall
from lightning_sensitivity.model.isolation import RunIsolated


class Monitor(Callback, ABC):
    """Measure validation batches and log the values, without ever ending a run; see the subclasses.

    ``on_validation_start`` makes a :class:`~lightning_sensitivity.callbacks.session.Session`, which does the work.
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

    # For subclasses to implement or override

    @abstractmethod
    def make_session(self, trainer: Trainer, clean: CleanOutputs) -> Session:
        """Make the session that measures a validation."""

    @property
    def num_draws_per_sample(self) -> int:
        """Number of noisy passes that count against ``num_samples``."""
        return 1

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise MisconfigurationException if these outputs would give wrong values."""

    def check_call(self, pl_module: LightningModule, run: RunIsolated, call: ModelCall) -> None:
        """Raise an exception if the monitor cannot measure the model by this call."""

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure the current validation. Override it to measure at other times."""
        if self.run_facts.is_disabled:
            return False
        is_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if not is_fit or self._last_epoch is None:
            return True
        epoch = trainer.current_epoch
        return epoch == self._last_epoch or epoch >= self._last_epoch + self.every_n_epochs

    # Before a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch."""
        if stage not in ("fit", "validate", "test"):
            return
        checks.check_run(type(self).__name__, trainer, pl_module, stage)
        others = [monitor for monitor in monitors_of(trainer) if monitor is not self]
        is_unique = all(other.prefixed_names().isdisjoint(self.prefixed_names()) for other in others)
        check_argument("prefix", self.prefix, is_unique, "different in monitors that log the same names")
        self.run_facts = RunFacts(Failures(type(self).__name__, self.prefix))
        self._last_epoch = None

    @property
    def checkpoint_key(self) -> str:
        """Key of the monitor's state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return f"{type(self).__qualname__}(prefix={self.prefix!r})"

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the last epoch that was measured, for a resumed fit."""
        # Not with `state_dict`: if two monitors have one, Lightning raises an error before our own error can help.
        if self.every_n_epochs > 1:
            checkpoint.setdefault(self.checkpoint_key, {})["last_epoch"] = self._last_epoch

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the last epoch that was measured."""
        self._last_epoch = checkpoint.get(self.checkpoint_key, {}).get("last_epoch")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if a value is monitored in the wrong mode, and lay out TensorBoard's charts once for all monitors."""
        monitors = monitors_of(trainer)
        if self is monitors[0]:  # a second layout would replace the first
            checks.lay_out_charts(trainer, [(monitor.prefix, monitor.charts) for monitor in monitors])
        for consumer in checks.consumers(trainer, self.prefixed_names()):
            self._warn_of_consumer(consumer)

    # The user's training step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the model before the first step, unless the sanity check has done so. After that, only warn."""
        failures = self.run_facts.failures
        if not failures.is_strict:
            return
        session = self.make_session(trainer, CleanOutputs(self.inputs, self.outputs))
        is_unchecked = trainer.global_step == 0 and not self.run_facts.loaders
        try:
            call = session.prepare(batch)
            if is_unchecked:
                session.check_first_batch(call)
            self.run_facts.watch = CallWatch(pl_module, call, self.outputs)
        except Exception as error:
            if is_unchecked:
                self._check_validation_batch(trainer, session, error)
        failures.is_strict = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop watching the step, and warn if it did not call the model as we do."""
        watch = self.run_facts.watch
        if watch is not None and watch.can_watch and not watch.was_called:
            self.run_facts.failures.warn(
                "call",
                "measures `forward`, which your training step does not call. If the step prepares its inputs in "
                "another way, such as by normalizing them, do that in `forward`, or in `inputs=`.",
            )
        self._end_watch()

    # The validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a session, and broadcast buffers as the first forward pass under DDP would."""
        failures = self.run_facts.failures
        failures.has_failed = False
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            failures.is_strict = False  # also in a resumed fit that begins with a validation
        compat.sync_buffers(trainer.strategy.model)
        if self.should_measure(trainer):
            self.session = self.make_session(trainer, self._shared_clean_outputs(trainer))
            self.metrics = self.session.metrics

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Pass a batch to the session before the step can change it."""
        session = self.session
        if session is None:
            return
        if batch_idx == 0:
            session.start_loader(dataloader_idx)
        if batch is not None:
            with self.run_facts.failures.warn_on_failure(could_not_measure(dataloader_idx), LAST_IS_KEPT):
                session.collect(batch, batch_idx, dataloader_idx)
        if compat.is_last_batch(trainer):
            session.flush()

    def on_validation_batch_end(self, *args: Any) -> None:
        """Stop watching the step, and warn if it called the model differently than we do."""
        self._end_watch()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute the remaining values."""
        if self.session is not None:
            self.session.finish()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the session, and warn if the module or another callback logs our names."""
        self.check_names(trainer)
        if self.session is not None and not trainer.sanity_checking:
            self._last_epoch = trainer.current_epoch
        self.session = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do as in a validation."""
        self.on_validation_start(trainer, pl_module)

    def on_test_batch_start(self, *args: Any) -> None:
        """Do as in a validation."""
        self.on_validation_batch_start(*args)

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
        """Remove our hooks, and drop references to the module."""
        self.free()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as in ``teardown``, which Lightning does not call after an exception."""
        self.free()

    # For sessions and hooks to call

    def prefixed_names(self) -> set[str]:
        """Return the logged names with the prefix."""
        return {self.prefix + name for name in self.names}

    def read(self, dataloader_idx: int, name: str) -> Tensor | None:
        """Return a value of the running validation; None if there is none."""
        return None if self.session is None else self.session.values_of(dataloader_idx).get(name)

    def check_names(self, trainer: Trainer) -> None:
        """Stop logging names that the module or another callback logs; in the sanity check, raise an error."""
        names = {checks.logged_name(name, bool(trainer.testing)) for name in self.prefixed_names()}
        taken = checks.taken_names(trainer, names) - self.run_facts.taken
        if not taken:
            return
        message = checks.explain_taken(sorted(taken)[0], self.prefix)
        if trainer.sanity_checking:
            raise MisconfigurationException(f"`{type(self).__name__}` {message}")
        self.run_facts.taken |= taken
        self.run_facts.failures.warn("taken", f"{message} Until then, the monitor does not log it.")

    def drop_watch(self) -> list[str]:
        """Stop watching the step, and return the names of arguments that differ from ours."""
        watch, self.run_facts.watch = self.run_facts.watch, None
        return [] if watch is None else watch.end()

    def free(self) -> None:
        """Remove our hooks, and drop references to the module."""
        self._end_watch()
        self.session = None
        self.run_facts.lazy_values.clear()

    def _check_validation_batch(self, trainer: Trainer, session: Session, error: Exception) -> None:
        """Raise an error if validation batches fail, too; called if a training batch failed without a sanity check."""
        with self.run_facts.failures.warn_on_failure(could_not_measure(0)):
            if self.run_facts.is_disabled:
                raise error
            with session.isolated() as run:  # samples and transforms may draw random numbers
                batch = run(checks.make_validation_batch, trainer)
            if batch is not None:  # it may differ in kind from training batches
                session.check_first_batch(session.prepare(batch))
            elif isinstance(error, MisconfigurationException):
                raise error

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

    def _warn_of_consumer(self, consumer: checks.Consumer) -> None:
        is_value = not consumer.name.split("/dataloader_idx_")[0].endswith("_stderr")
        if consumer.mode == self.misleading_mode and is_value:
            warn(f"`{consumer.owner}` {consumer.mode}imizes `{consumer.name}`, {self.misleading_mode_advice}")
        if self.every_n_epochs > 1:
            skipped = f"in the epochs that `every_n_epochs={self.every_n_epochs}` skips"
            warn(f"`{consumer.owner}` sees a stale `{consumer.name}` {skipped}.")

    def _end_watch(self) -> None:
        names = self.drop_watch()
        if names:
            self.run_facts.failures.warn(
                "call",
                "may not measure what your step computes: the step calls the model with different arguments "
                f"({', '.join(names)}). Set `inputs=` to a function that returns what the step passes.",
            )


def monitors_of(trainer: Trainer) -> list[Monitor]:
    """List the monitors among the callbacks of a Trainer."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]
