"""What the monitors share: options, and Lightning's hooks in the order in which they are called."""

import math
from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity import compat
from lightning_sensitivity.callbacks.checks import check_run
from lightning_sensitivity.callbacks.run import Phase, Run, Validation, agree, gather_tensors, is_fitting, raise_in_all
from lightning_sensitivity.expected.record import Values
from lightning_sensitivity.functional.tensors import are_close
from lightning_sensitivity.messages import Refused, check_argument, check_int
from lightning_sensitivity.reading.kept import MAX_BYTES, NUM_BATCHES, KeptBatch, KeptSamples
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.running import isolated
from lightning_sensitivity.running.call import ModelCall, Sigmoids
from lightning_sensitivity.running.isolation import RunIsolated

NO_VALUE = (
    "This epoch has no value: callbacks that monitor it get the last one again, and count it against their patience."
)
_FEW_SAMPLES = 50  # of which a value is mostly noise


class Monitor(Callback, ABC):
    """The base of callbacks that measure the same few samples in every validation, and log the values.

    The first validation of a run keeps samples as they come. Its last batch, and that of every later
    validation, measures them, and the end of the epoch logs the values.
    """

    def __init__(self, reader: BatchReader, num_samples: int | None, prefix: str) -> None:
        check_int("num_samples", num_samples, 1, optional=True)
        check_argument("prefix", prefix, isinstance(prefix, str), "a str")
        self.reader = reader
        self.num_samples = num_samples
        self.prefix = prefix
        self.run = Run(type(self).__name__, prefix)

    # For subclasses to implement or override

    @property
    @abstractmethod
    def directions(self) -> dict[str, bool]:
        """Whether the highest value is the best, by name without the prefix."""

    @abstractmethod
    def check_outputs(self, outputs: Tensor, are_of_sigmoid: bool) -> None:
        """Refuse outputs that can't be measured, before the first step."""

    @abstractmethod
    def measure(self, module: LightningModule, run_isolated: RunIsolated, samples: KeptSamples) -> tuple[Tensor, ...]:
        """Run the model on the kept samples of a loader in this process.

        Returns:
            What :meth:`compute_values` needs, as tensors of rows; the first has a row for each sample.
        """

    @abstractmethod
    def compute_values(self, trainer: Trainer, dataloader_idx: int, *rows: Tensor) -> Values:
        """Compute the values of a loader from the rows of all processes, and warn of doubtful ones.

        Values are nan if all outputs are; what could not be measured is left out.
        """

    def start(self, trainer: Trainer, module: LightningModule, batch: object) -> None:
        """Check the first training batch of a run; before the first step, what fails here fails in all processes."""

    def learn(self, trainer: Trainer, module: LightningModule, batch: object, begins_epoch: bool) -> None:
        """Learn from a training batch, the first one of the run included, and be told whether it begins an epoch."""

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether all is there that a validation needs; every process comes here."""
        return True

    def prepare(self, trainer: Trainer) -> None:
        """Prepare to compute values, after the samples of a fit were measured; every process comes here."""

    def remember(self, trainer: Trainer, dataloader_idx: int, values: Values) -> None:
        """Remember the values of a loader, if any, at the end of a validation."""

    def keep_labels(self, module: LightningModule, batch: object, kept: KeptBatch) -> None:
        """Keep the labels of a validation batch, too."""

    # Before a run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch, and forget the last run."""
        if stage not in ("fit", "validate"):
            return
        check_run(type(self).__name__, trainer, pl_module, stage, has_call=self.reader.function is not None)
        names = self.names_of_all(trainer)
        are_unique = len(names) == len({*names})
        check_argument("prefix", self.prefix, are_unique, "different in monitors that log the same names")
        self.run = Run(type(self).__name__, self.prefix, bool(trainer.fast_dev_run))  # type: ignore[attr-defined]
        if stage == "fit" and compat.has_workers(trainer):
            message = "keeps nothing of a fit in forked or spawned processes, which end with it. Set `strategy='ddp'`."
            self.run.warn("processes", message)

    # Training

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Check the first batch of a run, and watch its step. From now on, a failure costs a value, and no run."""
        if self.run.phase is Phase.TRAINING:
            self.learn(trainer, pl_module, batch, batch_idx == 0)
            return
        self.reader.reset()  # a sanity check may have read others
        with raise_in_all(trainer):
            self.start(trainer, pl_module, batch)
            self.learn(trainer, pl_module, batch, batch_idx == 0)
        self.run.phase = Phase.TRAINING
        self.run.first_step.start(pl_module, batch, self.reader)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: object, *args: object) -> None:
        """Warn if the first step changes the inputs that are measured."""
        problem = self.run.first_step.stop()
        if problem is not None:
            self.run.warn(
                "step",
                f"may not measure what your step computes: {problem}. Do what the step does with inputs and outputs "
                "in `forward`, or in `inputs=` and `outputs=`.",
            )

    # A validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Decide whether to measure, and prepare to keep samples in the first validation of a run."""
        if is_fitting(trainer) and self.run.phase is Phase.BEFORE_FIRST_STEP:
            self.run.phase = Phase.RESUMED
        self.run.validation = Validation.SKIPPED
        if self.is_ready(trainer):
            self.run.validation = Validation.KEEPING
            if not self.run.samples:
                num_loaders, world_size = compat.num_loaders(trainer), trainer.world_size
                num_wanted = math.inf if self.num_samples is None else self.num_samples / world_size
                max_bytes = MAX_BYTES / num_loaders / world_size
                self.run.samples = [KeptSamples(num_wanted, index, max_bytes) for index in range(num_loaders)]

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep a batch before the step can change it."""
        if not self.run.is_measured or batch is None or dataloader_idx >= len(self.run.samples):
            return
        samples = self.run.samples[dataloader_idx]
        if not samples.wants(batch_idx):
            return
        with (
            self.run.report_failure("could not keep a validation batch", "It is left out."),
            trainer.precision_plugin.val_step_context(),
        ):
            max_bytes = samples.max_bytes / min(NUM_BATCHES, trainer.num_val_batches[dataloader_idx])
            kept = self.reader.keep(pl_module, batch, batch_idx, samples.num_wanted, max_bytes)
            self.keep_labels(pl_module, batch, kept)
            samples.add(kept)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: object) -> None:
        """Measure the samples after the last batch: in this hook averaged weights are still in place."""
        if self.run.is_measured and compat.is_last_batch(trainer):
            self._measure_all(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the values, or forget the samples of the sanity check; every process comes here."""
        if self.run.validation is Validation.KEEPING:  # the loader ended early, or has no batch here
            self._measure_all(trainer, pl_module)
        if trainer.sanity_checking:
            self.run.free()
            return
        if self.run.is_measured:
            self.prepare(trainer)
        self.run.missing.begin()
        for dataloader_idx in range(self.num_loaders(trainer)):
            values = self._compute_loader(trainer, dataloader_idx) if self.run.is_measured else {}
            self._log_values(trainer, dataloader_idx, values)
            if is_fitting(trainer):
                self.remember(trainer, dataloader_idx, values)
        if is_fitting(trainer):
            self.run.missing.publish(trainer)  # to others, for what is missing
        self.run.validation = Validation.SKIPPED

    # After a run

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Withdraw what was not measured, so that nobody takes it for a value of the fit."""
        self.run.missing.withdraw(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as at the end, for which Lightning does not call us after an exception."""
        Monitor.on_train_end(self, trainer, pl_module)
        self.run.free()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the samples."""
        self.run.free()

    # Helpers

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all values that may be logged, without the prefix."""
        return tuple(self.directions)

    def names_of_all(self, trainer: Trainer) -> list[str]:
        """List the names of all values that monitors of a Trainer may log, with their prefixes."""
        monitors = [each for each in trainer.callbacks if isinstance(each, Monitor)]  # type: ignore[attr-defined]
        return [each.prefix + name for each in monitors for name in each.names]

    def num_loaders(self, trainer: Trainer) -> int:
        """Count the loaders whose samples are kept; before there are any, those of the validation."""
        return len(self.run.samples) or compat.num_loaders(trainer)

    def logged_name(self, trainer: Trainer, name: str, dataloader_idx: int) -> str:
        """Return a name with the prefix, and with what Lightning adds if there are several loaders."""
        suffix = f"/dataloader_idx_{dataloader_idx}" if self.num_loaders(trainer) > 1 else ""
        return self.prefix + name + suffix

    def _measure_all(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the samples of every loader without a trace, by averaged weights, if there are any."""
        self.run.validation = Validation.MEASURED
        self.run.measured = [None] * len(self.run.samples)
        for samples in self.run.samples:
            samples.complete()
            if samples.is_truncated:
                message = f"keeps only {samples.size} samples of a loader: more would take too much memory."
                self.run.warn("samples", message)
            what = f"could not measure the samples of dataloader {samples.dataloader_idx}"
            with (
                self.run.report_failure(what, NO_VALUE),
                trainer.precision_plugin.val_step_context(),
                isolated(pl_module) as run_isolated,
            ):
                if self.run.phase is Phase.BEFORE_FIRST_STEP and samples.size > 0:
                    self.check_model(run_isolated, samples.batches[0].call.to(pl_module.device))
                self.run.measured[samples.dataloader_idx] = self.measure(pl_module, run_isolated, samples)

    def check_model(self, run_isolated: RunIsolated, call: ModelCall) -> Tensor:
        """Refuse a model that can't be measured, by two passes over a batch, and return the outputs."""
        outputs = run_isolated(call)
        with Sigmoids() as sigmoids:
            again = run_isolated(call)
        if outputs.shape != again.shape or not are_close(outputs, again):  # though we restore all that we can
            raise Refused(
                "`forward` gives other outputs when it is called again on the same batch, in eval mode and with the "
                "same random numbers of torch: it keeps something that is not restored. Change it only `if "
                "self.training`, and draw random numbers by torch.",
                entry="state",
            )
        self.check_outputs(outputs, sigmoids.gave(again))
        return outputs

    def _compute_loader(self, trainer: Trainer, dataloader_idx: int) -> Values:
        """Gather what all processes have measured of a loader, and compute its values; none if one fails.

        A process may fail before it agrees, never between two steps that need all of them.
        """
        measured = self.run.measured[dataloader_idx]
        if not agree(trainer, measured is not None) or measured is None:
            return {}
        rows = [gather_tensors(trainer, each) for each in measured]
        is_intended = (self.num_samples or _FEW_SAMPLES) < _FEW_SAMPLES
        if 0 < len(rows[0]) < _FEW_SAMPLES and not is_intended:
            message = (
                f"has only {len(rows[0])} samples of dataloader {dataloader_idx}: values are mostly noise. Use 600."
            )
            self.run.warn("few-samples", message, kind=str(dataloader_idx))
        values: Values | None = None
        with self.run.report_failure(f"could not compute the values of dataloader {dataloader_idx}", NO_VALUE):
            values = self.compute_values(trainer, dataloader_idx, *rows)
        return values or {} if agree(trainer, values is not None) else {}

    def _log_values(self, trainer: Trainer, dataloader_idx: int, values: Values) -> None:
        """Log the values of a loader."""
        for name, is_highest in self.directions.items():
            logged_name = self.logged_name(trainer, name, dataloader_idx)
            self.log_value(trainer, logged_name, (name, dataloader_idx), values.get(name), is_highest)

    def log_value(
        self, trainer: Trainer, logged_name: str, key: tuple[str, int], value: Tensor | float | None, is_highest: bool
    ) -> None:
        """Log a value, by its name and loader, or note that it is missing."""
        if value is None:
            self.run.missing.add(logged_name, key, is_highest)
            return
        self.run.missing.remember(key, float(value))
        sync_dist = trainer.world_size > 1
        with self.run.report_failure(f"could not log `{logged_name}`", NO_VALUE):
            trainer.lightning_module.log(logged_name, value, sync_dist=sync_dist, add_dataloader_idx=False)
