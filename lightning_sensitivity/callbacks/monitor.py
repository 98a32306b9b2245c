"""What the monitors share: options, and Lightning's hooks in the order in which they are called."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import check_argument, check_bool, check_int
from lightning_sensitivity.callbacks.checks import check_repeatable, check_run
from lightning_sensitivity.callbacks.first_call import FirstCall
from lightning_sensitivity.callbacks.reporter import Reporter
from lightning_sensitivity.model import isolated
from lightning_sensitivity.model import samples as kept
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import KeptSamples

LEFT_OUT = "This epoch has no value."


class Monitor(Callback, ABC):
    """Measure the same few validation samples in every validation, and log the values; see the subclasses.

    The first validation of a run keeps samples as they come. Its last batch, and that of every later
    validation, measures them, and the end of the epoch logs the values.
    """

    names: tuple[str, ...]  # of the values that are always logged, without the prefix; the progress bar shows the first
    measures_only_fits = False  # and leaves `Trainer.validate` alone

    def __init__(
        self,
        reader: BatchReader,
        num_samples: int | None,
        seed: int,
        prefix: str,
        prog_bar: bool,
        num_labelled: int = 0,
    ) -> None:
        check_int("num_samples", num_samples, 1, optional=True)
        check_int("seed", seed, 0)
        check_argument("prefix", prefix, isinstance(prefix, str), "a str")
        check_bool("prog_bar", prog_bar)
        self.reader = reader
        self.num_samples = num_samples
        self.seed = seed
        self.prefix = prefix
        self.prog_bar = prog_bar
        self._num_labelled = num_labelled  # validation samples with labels that are kept first
        self.metrics: list[Any] = []  # of the last validation, by loader; None where it failed
        self.samples: list[KeptSamples] = []  # by loader
        self.reporter = Reporter(type(self).__name__, prefix)
        self._is_measuring = False  # the current validation
        self._first_call = FirstCall()

    # For subclasses to implement or override

    @abstractmethod
    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> Metric:
        """Run the model on the kept samples of a loader, and return a metric of them."""

    @abstractmethod
    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that can't be measured, before the first step."""

    @abstractmethod
    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        """Compute the values of a loader over all processes, if any, and warn of doubtful ones."""

    def fallback_values(self, dataloader_idx: int, has_failed: bool) -> Mapping[str, float]:
        """Return what to log in a fit where there are no values: they have failed, or this is no time to measure."""
        return {}

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure the current validation. Override it to measure at other times."""
        return True

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch if its samples are wanted."""
        if samples.wants(batch_idx):
            samples.add(self.reader.keep(module, batch, batch_idx))

    def forget_samples(self) -> None:
        """Forget the kept validation samples."""
        self.samples = []

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
        self.reader.forget_model()
        self._free()

    # The first training step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Before the first step, try the model if the sanity check has not, and watch the step."""
        if self.reporter.before_first_step:
            if trainer.global_step == 0 and trainer.num_sanity_val_steps == 0:
                self._try_training_batch(trainer, pl_module, batch)
            self.reporter.before_first_step = False
            self._first_call.start(pl_module, batch, self.reader)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, *args: object) -> None:
        """Warn if the first step does not compute what is measured."""
        problem = self._first_call.stop(is_skipped=pl_module.automatic_optimization and not outputs)
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
        self._is_measuring = (is_fit or not self.measures_only_fits) and self.should_measure(trainer)
        if self._is_measuring:
            self.metrics = []
            self.samples = self.samples or self._keep_samples(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a batch before the step can change it."""
        if not self._is_measuring or batch is None or dataloader_idx >= len(self.samples):
            return
        with (
            self.reporter.report_failure("could not keep a validation batch", "It is left out."),
            trainer.precision_plugin.val_step_context(),
        ):
            self.keep(pl_module, batch, batch_idx, self.samples[dataloader_idx])

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Measure the samples after the last batch: in this hook averaged weights are still in place."""
        if self._is_measuring and compat.is_last_batch(trainer):
            self._measure_all(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values, or forget the samples of the sanity check; every process comes here."""
        if self._is_measuring and not self.metrics:  # the loader ended before Lightning knew, or has no batch here
            self._measure_all(trainer, pl_module)
        if trainer.sanity_checking:
            self.forget_samples()
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

    def _keep_samples(self, trainer: Trainer) -> list[KeptSamples]:
        """Prepare to keep samples of each validation loader."""
        num_loaders, num_processes = compat.num_loaders(trainer), trainer.world_size
        num_wanted = math.inf if self.num_samples is None else self.num_samples / num_processes
        num_labelled, max_bytes = self._num_labelled / num_processes, kept.MAX_BYTES / num_loaders
        return [KeptSamples(index, num_wanted, num_labelled, max_bytes) for index in range(num_loaders)]

    def _measure_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the samples of every loader."""
        self.metrics = [None] * len(self.samples)
        for samples in self.samples:
            what = f"could not measure the samples of dataloader {samples.dataloader_idx}"
            with self.reporter.report_failure(what, LEFT_OUT):
                metric = self._measure_isolated(trainer, pl_module, samples)
                if trainer.state.fn != TrainerFn.FITTING or not self.reporter.before_first_step:
                    self.reporter.warn_of_probabilities()
                compat.mark_updated(metric)  # a loader or a process may have no samples
                self.metrics[samples.dataloader_idx] = metric
            if samples.is_truncated:
                message = f"keeps only {samples.size} samples of a loader: more would take too much memory."
                self.reporter.warn("samples", message)

    def _measure_isolated(self, trainer: Trainer, pl_module: LightningModule, samples: KeptSamples) -> Metric:
        """Measure the samples of a loader without a trace; before the first step, check the model, too."""
        samples.complete()
        with isolated(pl_module) as run, trainer.precision_plugin.val_step_context():
            if self.reporter.before_first_step:
                self._check_model(pl_module, run, samples)
            return self.measure(pl_module, run, samples)

    def _check_model(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> None:
        """Refuse a model that can't be measured, by two passes over a batch."""
        for batch in samples.batches[:1]:
            call = batch.call.to(module.device)
            outputs = run(call)
            check_repeatable(outputs, run(call))
            self.check_outputs(outputs)

    def _log_values(self, trainer: Trainer, dataloader_idx: int) -> None:
        """Log the values of a loader, unless a process could not measure it; every process comes here."""
        values: Mapping[str, Tensor | float] = {}
        is_measured = self._is_measuring and self.metrics[dataloader_idx] is not None
        if self._is_measuring and trainer.strategy.reduce_boolean_decision(is_measured):
            what = f"could not compute the values of dataloader {dataloader_idx}"
            with self.reporter.report_failure(what, LEFT_OUT):
                values = self.compute_values(trainer, dataloader_idx)
        if not values and trainer.state.fn == TrainerFn.FITTING:
            values = self.fallback_values(dataloader_idx, has_failed=self._is_measuring)
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

    def _try_training_batch(self, trainer: Trainer, pl_module: LightningModule, batch: object) -> None:
        """Do everything once with the first training batch in place of a validation batch, if it is of that kind."""
        samples = KeptSamples(0, num_wanted=1)
        what = "could not measure the first training batch, which stands for validation batches without a sanity check"
        with self.reporter.report_failure(what, LEFT_OUT):
            try:
                with trainer.precision_plugin.val_step_context():
                    self.keep(pl_module, batch, 0, samples)
                self._measure_isolated(trainer, pl_module, samples)
            except (MisconfigurationException, Warning):
                raise
            except Exception as error:  # it may be of another kind, which the first validation will see
                if is_oom_error(error):
                    raise

    def _free(self) -> None:
        """Free the samples, and stop watching."""
        self.forget_samples()
        self._first_call.cancel()
        self._is_measuring = False
