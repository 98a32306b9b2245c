"""What the monitors share: options, and Lightning's hooks in the order in which they are called."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int, check_selectors, see
from lightning_sensitivity.callbacks.checks import Reporter, check_run
from lightning_sensitivity.callbacks.samples import KeptSamples, count_samples, keep_validation_samples, make_call
from lightning_sensitivity.callbacks.watch import FirstStep
from lightning_sensitivity.model import isolated
from lightning_sensitivity.model.isolation import (
    RunIsolated,
    Seen,
    changed_names,
    fingerprint,
    forget_clones,
    parameter_versions,
    written_parameters,
)

LEFT_OUT = "This epoch has no value."


class Monitor(Callback, ABC):
    """Measure the same few validation samples in every validation, and log the values; see the subclasses.

    The first validation of a run keeps samples as they come. Its last batch, and that of every later validation,
    measures them, and the end of the epoch logs the values.
    """

    names: tuple[str, ...]  # of the logged values, without the prefix

    def __init__(
        self,
        num_samples: int | None,
        seed: int,
        prefix: str,
        inputs: Selector | None,
        outputs: Selector | None,
        prog_bar: bool,
    ) -> None:
        if num_samples is not None:
            check_int("num_samples", num_samples, 1)
        check_int("seed", seed, 0)
        check_argument("prefix", prefix, isinstance(prefix, str), "a str")
        check_selectors(inputs=inputs, outputs=outputs)
        check_bool("prog_bar", prog_bar)
        self.num_samples = num_samples
        self.seed = seed
        self.prefix = prefix
        self.inputs = inputs
        self.outputs = outputs
        self.prog_bar = prog_bar
        self.metrics: list[Any] = []  # of the last validation, by loader; None where it failed
        self.samples: list[KeptSamples] = []  # by loader; other monitors may share them
        self.reporter = Reporter(type(self).__name__, prefix)
        self._is_measuring = False  # the current validation
        self._is_measured = False  # whether its samples have been measured
        self._is_checked = False  # whether the model was tried before the first step
        self._first_step = FirstStep()

    # For subclasses to implement or override

    @abstractmethod
    def make_metric(self, trainer: Trainer, dataloader_idx: int) -> Metric:
        """Make the metric of a loader for one validation."""

    @abstractmethod
    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples, metric: Any) -> None:
        """Run the model on the kept samples of a loader, and update its metric."""

    @abstractmethod
    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        """Compute the values of a loader over all processes, and warn of doubtful ones; empty if there are none."""

    def measured_with(self, samples: KeptSamples) -> list[KeptSamples]:
        """Return all samples that are measured with those of a loader."""
        return [samples]

    def values_without_measurement(self, dataloader_idx: int) -> dict[str, Tensor]:
        """Return what to log where there are no values."""
        return {}

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure the current validation. Override it to measure at other times."""
        return True

    def keep(self, module: LightningModule, batch: Any, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch if its samples are wanted."""
        if samples.wants(batch_idx):
            call = make_call(module, batch, self.inputs, self.outputs)
            samples.add(call, batch_idx, count_samples(module, call))

    def forget_samples(self) -> None:
        """Forget the kept validation samples."""
        self.samples = []

    # Before a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch, and forget the last run."""
        if stage not in ("fit", "validate"):
            return
        check_run(type(self).__name__, trainer, pl_module, stage)
        others = [monitor for monitor in _monitors_of(trainer) if monitor is not self]
        is_unique = all(other.prefixed_names().isdisjoint(self.prefixed_names()) for other in others)
        check_argument("prefix", self.prefix, is_unique, "different in monitors that log the same names")
        self.reporter = Reporter(type(self).__name__, self.prefix)
        self._is_checked = False
        self._free()

    # The first training step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first step, try the model if the sanity check has not, and watch the step."""
        if self.reporter.is_strict:
            if trainer.global_step == 0 and not self._is_checked:
                self._try_training_batch(trainer, pl_module, batch)
            self.reporter.is_strict = False
            self._first_step.is_waiting = True
        self._first_step.start(pl_module, batch, self.inputs, self.outputs)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Warn if the first step does not compute what is measured."""
        problem = self._first_step.stop(pl_module, outputs)
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
            self.reporter.is_strict = False  # also in a resumed fit that begins with a validation
        self._is_measuring = self.should_measure(trainer)
        self._is_measured = False
        if not self._is_measuring:
            return
        if not self.samples:
            self.samples = self._shared_samples(trainer) or keep_validation_samples(trainer, self.num_samples)
        with pl_module.device:  # it determines the floating types of the metrics
            self.metrics = [self.make_metric(trainer, samples.dataloader_idx) for samples in self.samples]
        for metric in self.metrics:
            compat.mark_updated(metric)  # a loader or a process may have no samples

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a batch before the step can change it."""
        if not self._is_measuring or batch is None or dataloader_idx >= len(self.samples):
            return
        with self.reporter.report_failure("could not keep a validation batch", "It is left out."):
            self.keep(pl_module, batch, batch_idx, self.samples[dataloader_idx])

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure the samples after the last batch: in this hook averaged weights are still in place."""
        if self._is_measuring and compat.is_last_batch(trainer):
            self._measure_all(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values; every process comes here."""
        if not self._is_measuring:
            return
        if not self._is_measured:  # the loader ended before Lightning knew, or this process has no batch
            self._measure_all(trainer, pl_module)
        self._is_measuring = False
        for place, samples in enumerate(self.samples):
            for each in self.measured_with(samples):
                each.forget_outputs()
            if not trainer.sanity_checking:
                self._log_values(trainer, place)

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the samples of the sanity check."""
        self._is_checked = True
        self.forget_samples()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the samples, and copies of large buffers."""
        self._free()
        forget_clones(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as in ``teardown``, which Lightning does not call after an exception."""
        self._free()
        forget_clones(pl_module)

    # Helpers

    def prefixed_names(self) -> set[str]:
        """Return the logged names with the prefix."""
        return {self.prefix + name for name in self.names}

    def suffix(self, dataloader_idx: int) -> str:
        """Return what Lightning adds to names if there are several loaders."""
        return f"/dataloader_idx_{dataloader_idx}" if len(self.samples) > 1 else ""

    def _shared_samples(self, trainer: Trainer) -> list[KeptSamples]:
        """Return the samples of an earlier monitor that keeps the same ones, before it has kept any."""
        options = self.inputs, self.outputs, self.num_samples
        for other in _monitors_of(trainer):
            if other is self:
                break
            is_new = other._is_measuring and not any(samples.groups for samples in other.samples)
            if is_new and options == (other.inputs, other.outputs, other.num_samples):
                return other.samples
        return []

    def _measure_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the samples of every loader, and check that the passes leave no trace."""
        self._is_measured = True
        seen: dict[str, Seen] = {}
        versions: dict[str, tuple[int, Tensor]] = {}
        for place, samples in enumerate(self.samples):
            metric, self.metrics[place] = self.metrics[place], None
            what = f"could not measure the samples of dataloader {samples.dataloader_idx}"
            with self.reporter.report_failure(what, LEFT_OUT):
                with isolated(pl_module) as run, trainer.precision_plugin.val_step_context():
                    versions = versions or parameter_versions(pl_module)
                    samples.complete(pl_module, run, pl_module.device)
                    if self.reporter.is_strict and not seen:  # after the first pass, which may fill a cache
                        seen = fingerprint(pl_module)
                    self._measure_loader(pl_module, run, samples, metric)
                self.metrics[place] = metric
            if samples.is_truncated:
                message = f"keeps only {samples.size} samples of a loader: more would take too much memory."
                self.reporter.warn("samples", message)
        changed = changed_names(seen, fingerprint(pl_module)) if seen else []
        written = written_parameters(versions, parameter_versions(pl_module)) if versions else []
        self._report_traces([*written, *changed])

    def _measure_loader(
        self, pl_module: LightningModule, run: RunIsolated, samples: KeptSamples, metric: Metric
    ) -> None:
        """Measure the samples of a loader in joint calls, and batch by batch from now on if that fails."""
        try:
            self.measure(pl_module, run, samples, metric)
            return
        except Warning:
            raise
        except Exception:
            joint = [each for each in self.measured_with(samples) if each.can_regroup]
            if not joint:
                raise
        # Here, the tensors of the failed pass are free.
        for each in joint:
            each.separate()
        metric.reset()
        self.measure(pl_module, run, samples, metric)

    def _report_traces(self, names: list[str]) -> None:
        """Refuse, or warn of, a ``forward`` that changes what our passes do not restore."""
        if not names:
            return
        message = (
            f"would change the model: its `forward` writes to {', '.join(names[:3])} in eval mode, which is not "
            "restored. Do so only `if self.training`, or in a hook, such as `on_train_batch_end`."
        )
        if self.reporter.is_strict:
            raise MisconfigurationException(f"`{type(self).__name__}` {message}{see('state')}")
        self.reporter.warn("state", message)

    def _log_values(self, trainer: Trainer, place: int) -> None:
        """Log the values of a loader, unless a process could not measure it; every process comes here."""
        values: dict[str, Tensor] = {}
        if trainer.strategy.reduce_boolean_decision(self.metrics[place] is not None):
            what = f"could not compute the values of dataloader {place}"
            with self.reporter.report_failure(what, LEFT_OUT):
                values = self.compute_values(trainer, place)
        for name, value in (values or self.values_without_measurement(place)).items():
            trainer.lightning_module.log(
                self.prefix + name + self.suffix(place),
                value,
                prog_bar=self.prog_bar and name == self.names[0],
                sync_dist=trainer.world_size > 1,
                add_dataloader_idx=False,
            )

    def _try_training_batch(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Do everything once with the first training batch in place of a validation batch."""
        samples = KeptSamples(0, 1, 1, float("inf"))
        self.samples = [samples]
        what = "could not measure the first training batch, which stands for validation batches without a sanity check"
        with self.reporter.report_failure(what, LEFT_OUT), pl_module.device:
            self.metrics = [self.make_metric(trainer, 0)]
            self.keep(pl_module, batch, 0, samples)
        self._measure_all(trainer, pl_module)
        self.forget_samples()

    def _free(self) -> None:
        """Free the samples, and stop watching."""
        self.forget_samples()
        self._first_step.cancel()
        self._first_step.is_waiting = False
        self._is_measuring = False


def _monitors_of(trainer: Trainer) -> list[Monitor]:
    """List the monitors among the callbacks of a Trainer."""
    return [callback for callback in trainer.callbacks if isinstance(callback, Monitor)]  # type: ignore[attr-defined]
