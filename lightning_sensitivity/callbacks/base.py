"""What the monitors share: which batches are measured, passes that leave no trace, failures, and logging."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torchmetrics import Metric

from lightning_sensitivity.callbacks import utilities
from lightning_sensitivity.functional.tasks import warn
from lightning_sensitivity.metric import LazyValue
from lightning_sensitivity.model import ModelCall, isolated
from lightning_sensitivity.model.forward import Function, check_argument, check_functions, check_int
from lightning_sensitivity.model.isolation import Run, written_parameters


class Monitor(Callback, ABC):
    """Measure validation batches and log the values, without ever ending a run; see the subclasses."""

    names: tuple[str, ...]  # of the logged values, without the prefix
    charts: ClassVar[dict[str, str]]  # titles of TensorBoard charts: a regular expression for the names
    wrong_mode: str  # the mode of an `EarlyStopping` that would pick the worst value
    advice: str  # the end of the warning about it
    num_draws, prog_bar, noisy_input = 1, False, False

    def __init__(
        self, num_samples: int | None, seed: int, prefix: str, inputs: Function, outputs: Function, every_n_epochs: int
    ) -> None:
        if num_samples is not None:
            check_int("num_samples", num_samples, 1)
        check_int("seed", seed, 0)
        check_int("every_n_epochs", every_n_epochs, 1)
        check_argument("prefix", prefix, isinstance(prefix, str), "a str")
        check_functions(inputs=inputs, outputs=outputs)
        self.num_samples, self.seed, self.prefix = num_samples, seed, prefix
        self.inputs, self.outputs, self.every_n_epochs = inputs, outputs, every_n_epochs
        self._watch: utilities.CallWatch | None = None
        self._reset_run()
        self._reset_validation()

    @abstractmethod
    def measure(self, trainer: Trainer, run: Run, call: ModelCall, batch_idx: int, dataloader_idx: int) -> int:
        """Measure a batch, and return how many samples it has."""

    @abstractmethod
    def compute(self, trainer: Trainer, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Compute the values of a loader over all processes, and the warnings. Every process must call it."""

    @abstractmethod
    def make_metric(self) -> Metric:
        """Make the metric of a loader for a validation."""

    def end_validation(self) -> None:
        """Free what only a validation needs."""

    def check_outputs(self, outputs: Tensor) -> None:
        """Raise MisconfigurationException if these outputs would give wrong values."""

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure the current validation. Override it to measure at other times."""
        is_fit = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        epoch, last = trainer.current_epoch, self._last_epoch
        return not self._is_disabled and (not is_fit or epoch == last or epoch >= last + self.every_n_epochs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch."""
        if stage not in ("fit", "validate", "test"):
            return
        utilities.check_run(type(self).__name__, trainer, pl_module, stage)
        others = {other.prefix + name for other in _monitors(trainer) if other is not self for name in other.names}
        valid = others.isdisjoint(self.prefix + name for name in self.names)
        check_argument("prefix", self.prefix, valid, "different in monitors that log the same names")
        self._reset_run()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Warn if our values are monitored in the wrong way, and lay out TensorBoard's Custom Scalars once for all."""
        monitors = _monitors(trainer)
        if self is monitors[0]:  # a second layout would take the place of the first
            utilities.lay_out_charts(trainer, [(monitor.prefix, monitor.charts) for monitor in monitors])
        for owner, name, mode in utilities.watchers(trainer, {self.prefix + name for name in self.names}):
            if mode == self.wrong_mode and not name.endswith("_stderr"):
                warn(f"`{owner}` {mode}imizes `{name}`, {self.advice}")
            if self.every_n_epochs > 1:
                warn(f"`{owner}` sees the previous `{name}` again in epochs that are not measured.")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Check the model before the first step, unless the sanity check did. From then on, only warn."""
        if not self.failures.is_strict:
            return
        outputs, written = None, list[str]()
        with suppress(Exception), self.isolated(trainer, pl_module) as run:
            call = self.prepare(run, pl_module, batch)
            self._watch = utilities.CallWatch(pl_module, call)
            if trainer.global_step == 0 and not self._batch_sizes:
                outputs, written = written_parameters(pl_module, partial(run, call))
        if outputs is not None:
            self._check(outputs, written)
        self.failures.is_strict = False

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop watching the step, and warn if it called the model differently than we do."""
        if self._watch is not None and (names := ", ".join(self._watch.end())):
            message = f"The step calls the model with another {names}: set `inputs=` to a function that returns them."
            self.failures.warn("call", f"may not measure what your step computes. {message}")
        self._watch = None

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset, and broadcast buffers as the first forward of DDP would."""
        self._reset_validation()
        budget = math.inf if self.num_samples is None else self.num_samples / (trainer.world_size * self.num_draws)
        self.choice = utilities.BatchChoice(utilities.num_batches(trainer), self._batch_sizes, budget)
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.failures.is_strict = False  # also in a fit that goes on with a validation
        model: Any = trainer.strategy.model
        if isinstance(trainer.strategy.model, DistributedDataParallel) and model.will_sync_module_buffers():
            model._sync_buffers()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure a batch before the step can change it. On a loader's first batch, log values that are read later."""
        if not self.should_measure(trainer):
            return
        if batch_idx == 0:
            for earlier in range(dataloader_idx):  # which others may have reduced, even if this process had no batch
                self._values(trainer, earlier)
            self._log(trainer, dataloader_idx)
        if batch is None or not self.choice.includes(batch_idx, dataloader_idx):
            return
        with self.failures.warn_on_failure(f"could not measure a batch of dataloader {dataloader_idx}"):
            with self.isolated(trainer, pl_module) as run:
                call = self.prepare(run, pl_module, batch)
                if dataloader_idx not in self._batch_sizes:
                    outputs, written = written_parameters(pl_module, partial(run, call))
                    self._check(outputs, written)
                    self._batch_sizes[dataloader_idx] = max(1, len(outputs))
                    del outputs  # a batch of them may be large
                    self._watch = utilities.CallWatch(pl_module, call)
                size = self.measure(trainer, run, call, batch_idx, dataloader_idx)
            self.choice.num_measured[dataloader_idx] += size
            self.failures.is_strict = self.failures.is_strict and trainer.state.fn == TrainerFn.FITTING

    on_validation_batch_end = on_train_batch_end  # type: ignore[assignment]

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take part in every reduction, in every process, and warn about problems, also in the sanity check."""
        if self.should_measure(trainer):
            for dataloader_idx in range(len(self.choice.num_batches)):
                self._values(trainer, dataloader_idx)
                if dataloader_idx not in self._logged:
                    self._log(trainer, dataloader_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Free what only a validation needs."""
        if self.should_measure(trainer) and not trainer.sanity_checking:
            self._last_epoch = trainer.current_epoch
        self.end_validation()

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_train_batch_end  # type: ignore[assignment]
    on_test_epoch_end = on_validation_epoch_end
    on_test_end = on_validation_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Remove our hooks, and free what refers to the module."""
        self.on_train_batch_end()
        self.end_validation()
        self._lazy_values.clear()

    on_exception = teardown  # where Lightning calls no `teardown`

    @contextmanager
    def isolated(self, trainer: Trainer, pl_module: LightningModule) -> Iterator[Run]:
        """Yield a function that runs the model and leaves no trace, in the precision of validation."""
        with isolated(pl_module) as run, trainer.precision_plugin.val_step_context():
            yield run

    def prepare(self, run: Run, pl_module: LightningModule, batch: Any) -> ModelCall:
        """Prepare the call of the model on a batch."""
        prepare = partial(ModelCall, pl_module, batch, self.inputs, self.outputs, self.noisy_input)
        return run(prepare) if self.inputs else prepare()  # only code of the user may leave a trace

    def metric(self, trainer: Trainer, dataloader_idx: int) -> Any:
        """Return the metric of a loader."""
        if dataloader_idx not in self.metrics:
            with trainer.lightning_module.device:  # for the types that it has
                self.metrics[dataloader_idx] = self.make_metric()
        return self.metrics[dataloader_idx]

    def _check(self, outputs: Tensor, written: list[str]) -> None:
        """Refuse a model whose values would be wrong, or that our passes would change."""
        if written:
            self._is_disabled = True
            problem = f"would change a model whose `forward` writes its parameters, here {', '.join(written[:3])}"
            raise MisconfigurationException(f"`{type(self).__name__}` {problem}. Write them in a hook of training.")
        self.check_outputs(outputs)

    def _reset_run(self) -> None:
        self.failures = utilities.Failures(type(self).__name__, self.prefix)
        self._is_disabled = False
        self._last_epoch = -self.every_n_epochs  # the last one measured
        self._lazy_values: dict[tuple[int, str], LazyValue] = {}  # by loader and name
        self._batch_sizes: dict[int, int] = {}  # of the first batch of each loader

    def _reset_validation(self) -> None:
        self._computed: dict[int, dict[str, Tensor]] = {}  # by loader
        self._logged: set[int] = set()
        self.failures.has_failed = False
        self.end_validation()
        self.metrics: dict[int, Any] = {}  # by loader

    def _values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        if dataloader_idx not in self._computed:
            self._computed[dataloader_idx] = {}
            with self.failures.warn_on_failure(f"could not compute the values of dataloader {dataloader_idx}"):
                self._computed[dataloader_idx], messages = self.compute(trainer, dataloader_idx)
                for kind, message in messages.items():
                    if kind != "no value" or not self.failures.has_failed:  # else a warning has said why
                        self.failures.warn(kind, f"on dataloader {dataloader_idx}: {message}")
        return self._computed[dataloader_idx]

    def _log(self, trainer: Trainer, dataloader_idx: int) -> None:
        if trainer.sanity_checking:
            return
        self._logged.add(dataloader_idx)
        place = trainer.testing, dataloader_idx, len(self.choice.num_batches)
        for name in self.names:
            logged_name = utilities.logged_name(self.prefix + name, *place)
            key = dataloader_idx, name
            if key not in self._lazy_values:  # a Metric costs more to make than to log
                self._lazy_values[key] = LazyValue(partial(self._values, trainer, dataloader_idx), name)
            # With a `metric_attribute`, the module need not have the Metric.
            options: dict[str, Any] = {"metric_attribute": name, "add_dataloader_idx": False}
            options |= {"prog_bar": self.prog_bar and name == self.names[0], "on_step": False, "on_epoch": True}
            with self.failures.warn_on_failure(f"could not log {logged_name!r}"):  # not by a `log` of the module
                LightningModule.log(trainer.lightning_module, logged_name, self._lazy_values[key], **options)


def _monitors(trainer: Trainer) -> list[Monitor]:
    return [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]
