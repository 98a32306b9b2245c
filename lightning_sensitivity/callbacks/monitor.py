"""What the monitors share: options, and Lightning's hooks in the order in which they are called."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import check_argument, check_bool, check_int
from lightning_sensitivity.callbacks.checks import callbacks_that_monitor, check_repeatable, check_run
from lightning_sensitivity.callbacks.first_step import FirstStep
from lightning_sensitivity.callbacks.reporter import Reporter
from lightning_sensitivity.model import isolated
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import MAX_BYTES, KeptSamples

LEFT_OUT = "This epoch has no value."


class Monitor(Callback, ABC):
    """Measure the same few validation samples in every validation, and log the values; see the subclasses.

    The first validation of a run keeps samples as they come. Its last batch, and that of every later
    validation, measures them, and the end of the epoch logs the values.
    """

    names: tuple[str, ...]  # of the values that are always logged, without the prefix; the progress bar shows the first
    measures_only_fits = False  # and leaves `Trainer.validate` alone

    def __init__(self, reader: BatchReader, num_samples: int | None, prefix: str, prog_bar: bool) -> None:
        check_int("num_samples", num_samples, 1, optional=True)
        check_argument("prefix", prefix, isinstance(prefix, str), "a str")
        check_bool("prog_bar", prog_bar)
        self.reader = reader
        self.num_samples = num_samples
        self.prefix = prefix
        self.prog_bar = prog_bar
        self.metrics: list[Any] = []  # of the last validation, by loader; None where it failed
        self.samples: list[KeptSamples] = []  # by loader
        self.reporter = Reporter(type(self).__name__, prefix)
        self._is_measuring = False  # the current validation
        self._first_step = FirstStep()

    # For subclasses to implement or override

    @abstractmethod
    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that can't be measured, before the first step."""

    @abstractmethod
    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> object:
        """Run the model on the kept samples of a loader, and return a metric of them."""

    @abstractmethod
    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor | float]:
        """Compute the values of a loader over all processes, if any, and warn of doubtful ones."""

    @abstractmethod
    def fallback_values(self, dataloader_idx: int) -> Mapping[str, float]:
        """Return what other callbacks get where a validation of a fit has no values; it is not logged."""

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure the current validation. Override it to measure at other times."""
        return True

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether all is there that a validation of a fit needs; every process comes here."""
        return True

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Do what is to be done once, before the samples of all loaders are measured."""

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch."""
        samples.add(self.reader.keep(module, batch, batch_idx))

    # Before a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch, and forget the last run."""
        if stage not in ("fit", "validate"):
            return
        check_run(type(self).__name__, trainer, pl_module, stage)
        names = self.prefixed_names()
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            is_unique = other is self or not isinstance(other, Monitor) or other.prefixed_names().isdisjoint(names)
            check_argument("prefix", self.prefix, is_unique, "different in monitors that log the same names")
        self.reporter = Reporter(type(self).__name__, self.prefix)
        self._free()

    # The first training step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Watch the first step. From now on, a failure costs a value, and no run."""
        if self.reporter.before_first_step:
            self.reporter.before_first_step = False
            self._first_step.start(pl_module, batch, self.reader)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, *args: object) -> None:
        """Warn if the first step does not compute what is measured."""
        problem = self._first_step.stop(is_skipped=pl_module.automatic_optimization and not outputs)
        if problem is not None:
            self.reporter.warn(
                "step",
                f"may not measure what your step computes: {problem}. Do what the step does with inputs and outputs "
                "in `forward`, or in `inputs=` and `outputs=`.",
            )

    # A validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether to measure, and prepare to keep samples in the first validation of a run."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        if is_fit and not trainer.sanity_checking:
            self.reporter.before_first_step = False  # also in a resumed fit that begins with a validation
        is_ready = not self.measures_only_fits
        if is_fit:
            is_ready = trainer.sanity_checking or self.is_ready(trainer)
        self._is_measuring = is_ready and self.should_measure(trainer)
        if self._is_measuring:
            self.metrics = []
            self.samples = self.samples or self._make_samples(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a batch before the step can change it."""
        if not self._is_measuring or batch is None or dataloader_idx >= len(self.samples):
            return
        samples = self.samples[dataloader_idx]
        if not samples.wants(batch_idx):
            return
        with (
            self.reporter.report_failure("could not keep a validation batch", "It is left out."),
            trainer.precision_plugin.val_step_context(),
        ):
            self.keep(pl_module, batch, batch_idx, samples)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Measure the samples after the last batch: in this hook averaged weights are still in place."""
        if self._is_measuring and compat.is_last_batch(trainer):
            self._measure_all(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values, or forget the samples of the sanity check; every process comes here."""
        if self._is_measuring and not self.metrics:  # the loader ended before Lightning knew, or has no batch here
            self._measure_all(trainer, pl_module)
        if trainer.sanity_checking:
            self.samples = []
            return
        for dataloader_idx in range(self.num_loaders(trainer)):
            self._log_values(trainer, dataloader_idx)
        self._is_measuring = False

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the samples."""
        self._free()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as in ``teardown``, which Lightning does not call after an exception."""
        self._free()

    # Helpers

    def prefixed_names(self) -> set[str]:
        """Return the logged names with the prefix."""
        return {self.prefix + name for name in self.names}

    def num_loaders(self, trainer: Trainer) -> int:
        """Count the loaders whose samples are kept; before there are any, those of the validation."""
        return len(self.samples) or compat.num_loaders(trainer)

    def logged_name(self, trainer: Trainer, name: str, dataloader_idx: int) -> str:
        """Return a name with the prefix, and with what Lightning adds if there are several loaders."""
        suffix = f"/dataloader_idx_{dataloader_idx}" if self.num_loaders(trainer) > 1 else ""
        return self.prefix + name + suffix

    def _make_samples(self, trainer: Trainer) -> list[KeptSamples]:
        """Prepare to keep samples of each validation loader."""
        num_loaders = compat.num_loaders(trainer)
        num_wanted = math.inf if self.num_samples is None else self.num_samples / trainer.world_size
        return [KeptSamples(num_wanted, index, MAX_BYTES / num_loaders) for index in range(num_loaders)]

    def _measure_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the samples of every loader."""
        self.metrics = [None] * len(self.samples)
        for samples in self.samples:
            samples.complete()
            if samples.is_truncated:
                message = f"keeps only {samples.size} samples of a loader: more would take too much memory."
                self.reporter.warn("samples", message)
        with self.reporter.report_failure("could not prepare to measure", LEFT_OUT):
            self.prepare(trainer, pl_module)
        for samples in self.samples:
            what = f"could not measure the samples of dataloader {samples.dataloader_idx}"
            with self.reporter.report_failure(what, LEFT_OUT):
                self.metrics[samples.dataloader_idx] = self._measure_isolated(trainer, pl_module, samples)
                if trainer.state.fn != TrainerFn.FITTING or not self.reporter.before_first_step:
                    self.reporter.warn_of_probabilities()

    def _measure_isolated(self, trainer: Trainer, pl_module: LightningModule, samples: KeptSamples) -> object:
        """Measure the samples of a loader without a trace; before the first step, check the model, too."""
        with isolated(pl_module) as run, trainer.precision_plugin.val_step_context():
            if self.reporter.before_first_step and samples.size > 0:
                call = samples.batches[0].call
                assert call is not None
                self.check_model(run, call.to(pl_module.device))
            return self.measure(pl_module, run, samples)

    def check_model(self, run: RunIsolated, call: Any) -> Tensor:
        """Refuse a model that can't be measured, by two passes over a batch, and return the outputs."""
        outputs: Tensor = run(call)
        check_repeatable(outputs, run(call))
        self.check_outputs(outputs)
        return outputs

    def _log_values(self, trainer: Trainer, dataloader_idx: int) -> None:
        """Log the values of a loader, unless a process could not measure it; every process comes here."""
        values: Mapping[str, Tensor | float] = {}
        is_measured = self._is_measuring and self.metrics[dataloader_idx] is not None
        if self._is_measuring and trainer.strategy.reduce_boolean_decision(is_measured):
            what = f"could not compute the values of dataloader {dataloader_idx}"
            with self.reporter.report_failure(what, LEFT_OUT):
                values = self.compute_values(trainer, dataloader_idx)
        if not values and trainer.state.fn == TrainerFn.FITTING:
            self._log_fallback(trainer, dataloader_idx)
        for name, value in values.items():
            logged_name = self.logged_name(trainer, name, dataloader_idx)
            with self.reporter.report_failure(f"could not log `{logged_name}`", LEFT_OUT):
                trainer.lightning_module.log(
                    logged_name,
                    value,
                    prog_bar=self.prog_bar and name == self.names[0],
                    sync_dist=trainer.world_size > 1,
                    add_dataloader_idx=False,
                )

    def _log_fallback(self, trainer: Trainer, dataloader_idx: int) -> None:
        """Give other callbacks a value that is in no curve, and that does not count for their patience."""
        fallbacks = self.fallback_values(dataloader_idx)
        values = {self.logged_name(trainer, name, dataloader_idx): value for name, value in fallbacks.items()}
        for callback, name in callbacks_that_monitor(trainer):
            if name in values and isinstance(getattr(callback, "wait_count", None), int):
                callback.wait_count -= 1  # type: ignore[attr-defined]
                bound = getattr(callback, "divergence_threshold", None)
                values[name] = values[name] if bound is None else min(values[name], bound)  # which is not exceeded
        trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def _free(self) -> None:
        """Free the samples, and stop watching."""
        self.samples = []
        self._first_step.cancel()
        self._is_measuring = False
