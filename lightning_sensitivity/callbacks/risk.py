"""The callback that logs the risk estimate, which decides when to stop."""

import math
from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sensitivity.arguments import Refused, Selector, check_argument, check_bool, check_int
from lightning_sensitivity.callbacks.checks import check_modes, check_outputs
from lightning_sensitivity.callbacks.closing import log_closing_line
from lightning_sensitivity.callbacks.counting import check_number, count_labelled_samples
from lightning_sensitivity.callbacks.monitor import Monitor
from lightning_sensitivity.callbacks.pitfalls import warn_of_few_classes, warn_of_known_labels, warn_of_preparation
from lightning_sensitivity.callbacks.record import CRITERION, ESTIMATE, KeptTraining, RiskRecord, ValidationResult
from lightning_sensitivity.callbacks.reporter import describe_error
from lightning_sensitivity.functional.reference import Reference
from lightning_sensitivity.functional.risk import TWIN_STRENGTH, RiskTerms
from lightning_sensitivity.functional.tasks import TASKS, has_ignored_value
from lightning_sensitivity.metric import RiskEstimate
from lightning_sensitivity.model import isolated
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.reference import NUM_TRAINING, fit_to_samples
from lightning_sensitivity.model.samples import KeptBatch, KeptSamples, spread
from lightning_sensitivity.model.twins import Twins, has_batch_norm, unknown_parameters

NUM_LABELLED = 1200  # validation samples with labels that are kept, over all processes
NUM_SCORED = 500  # training samples that are run in each validation, over all processes
_FEW_SAMPLES = 8  # in a batch, for batch norm


class RiskMonitor(Monitor):
    r"""Log what to stop by, and an estimate of the Brier score on unseen samples, in every validation epoch.

    Noisy training labels are enough. Regressions and dense outputs have no estimate.

    **Logged values**, only in ``Trainer.fit``, after ``prefix``, as by ``compute`` of
    :class:`~lightning_sensitivity.RiskEstimate`: ``risk_criterion``, lowest where to stop, ``risk_estimate``
    and its terms, ``risk_temperature``; for dense inputs, token ids or ``features``, ``risk_label_noise``, the
    share of training labels that look wrong, ``risk_reference`` and ``risk_reference_weight``.

    Up to 1,000 training samples and ``num_samples`` validation samples are kept on the CPU, at most 512 MiB
    of each in each process. A validation runs two passes over the latter, one more with batch norm or fewer
    than four batches, and one over 500 of the former.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        targets: A function ``batch -> labels``; by default
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Choose by the refined score of validation labels, of up to 1,200 samples, beside the
            estimate where noise may be. Log ``risk_label_score`` and ``risk_num_labels``, too.
        features: A function ``batch -> (N, D)`` for the reference, such as a pretrained encoder.
        initial_weights: State dict from before training, if these data have been trained on before.
        num_training: Number of different training samples, for streams and several loaders.
        num_samples: Validation samples per loader, over all processes; None for all.
        seed: Seed of the simulated twins.
        prefix: Prefix of the logged names.
        inputs: A function ``batch -> arguments``; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K)`` or ``(N,)``.
        prog_bar: Show the criterion on the progress bar.

    Raises:
        MisconfigurationException: If an argument is invalid; before the first step, if the Trainer or the
            model is not supported, or labels do not fit the task.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> callbacks = [RiskMonitor(), EarlyStopping("val/risk_criterion", patience=10)]
    """

    names = (CRITERION, *(f"risk_{term}" for term in RiskTerms._fields))
    measures_only_fits = True

    def __init__(
        self,
        task: str = "multiclass",
        *,
        targets: Selector | None = None,
        validation_labels: bool = False,
        features: Selector | None = None,
        initial_weights: Mapping[str, Tensor] | None = None,
        num_training: int | None = None,
        num_samples: int | None = 600,
        seed: int = 0,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        prog_bar: bool = False,
    ) -> None:
        check_argument("task", task, task in TASKS, f"one of {', '.join(map(repr, TASKS))} (a regression has none)")
        check_bool("validation_labels", validation_labels)
        is_valid = isinstance(initial_weights, Mapping | None)
        check_argument("initial_weights", initial_weights, is_valid, "a state dict, as in a checkpoint, or None")
        check_int("num_training", num_training, 1, optional=True)
        reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=TASKS[task])
        super().__init__(reader, num_samples, seed, prefix, prog_bar, NUM_LABELLED if validation_labels else 0)
        self.task = task
        self.validation_labels = validation_labels
        self.initial_weights = initial_weights
        self.num_training = num_training
        self.record = RiskRecord()  # all of it is saved
        self.kept = KeptTraining()  # none of it is
        self._has_logged: set[int] = set()  # loaders with a value in this run
        self._has_said_last_line = False

    # Before and after a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked by now, and forget the last fit, unless this one continues it."""
        super().setup(trainer, pl_module, stage)
        check_modes(trainer, self.prefixed_names())
        self._has_logged, self._has_said_last_line = set(), False
        if stage == "fit" and _is_new(trainer):
            self.record = RiskRecord()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    # Not `state_dict`, of which Lightning refuses two with one key before we can name the argument.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the weights from before training, and what else a resumed fit needs."""
        with self.reporter.report_failure("could not save its state", "A resumed fit needs `initial_weights=`."):
            checkpoint["callbacks"][self.state_key] = self.record.to_dict(pl_module)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore what was saved, if anything."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None:
            self.record = RiskRecord.from_dict(state, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which epoch to choose, and what is known of the labels."""
        self._say_last_line(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as at the end of a fit, also after Ctrl-C."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._say_last_line(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _say_last_line(self, trainer: Trainer) -> None:
        if self._has_said_last_line or not self._has_logged:
            return
        self._has_said_last_line = True
        with self.reporter.report_failure("could not say which epoch to choose", "Look at the curve."):
            loaders = [index for index in range(self.num_loaders(trainer)) if index in self.record.history]
            names = {self.logged_name(trainer, name, i): (name, i) for i in loaders for name in (CRITERION, ESTIMATE)}
            log_closing_line(trainer, self.record.history, names)

    def forget_samples(self) -> None:
        """Forget the kept validation samples, and the references fitted to them."""
        super().forget_samples()
        self.kept.references = {}

    def _free(self) -> None:
        """Free all that a checkpoint does not need, such as the kept training samples."""
        super()._free()
        self.kept = KeptTraining()

    # Training samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start with the first batch of a fit, and keep the first samples."""
        samples = self.kept.samples
        if self.kept.starts_at(batch_idx):
            with self.reporter.report_failure("cannot estimate the risk", "There is no estimate in this fit."):
                self._start(trainer, pl_module, batch, batch_idx)
        elif batch_idx == 0:  # a new epoch repeats the samples
            samples.complete()
        elif not samples.is_full and samples.wants(batch_idx):
            with self.reporter.report_failure("could not keep a training batch", "It is left out."):
                samples.add(self._keep_training_batch(pl_module, batch, batch_idx))
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _start(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep the initial weights and the first batch, if its outputs and labels allow an estimate."""
        is_first, self.kept.has_started = not self.kept.has_started, True
        check_number(trainer, self.num_training)
        with isolated(module) as run, trainer.precision_plugin.val_step_context():
            if is_first:
                self.record.start(module, self.initial_weights, _is_new(trainer))
            outputs = run(self.reader.call(module, batch))
        self.check_outputs(outputs)
        self.kept.output_shape = tuple(outputs.shape[1:])
        samples = KeptSamples(0, num_wanted=math.ceil(NUM_TRAINING / trainer.world_size))
        samples.add(first := self._keep_training_batch(module, batch, batch_idx))
        self.kept.samples, self.kept.references = samples, {}
        if _is_new(trainer) and self.initial_weights is None and first.labels is not None:
            warn_of_known_labels(self.reporter, outputs, first.labels, TASKS[self.task])
        if self.reader.trains_features:
            message = "gets `features=` that the network computes by weights that are trained: freeze these."
            self.reporter.warn("features", message, kind="trained")

    def _keep_training_batch(self, module: LightningModule, batch: object, batch_idx: int) -> KeptBatch:
        labels = self.reader.labels(module, batch, self.kept.output_shape)
        with module.trainer.precision_plugin.val_step_context():
            return self.reader.keep(module, batch, batch_idx, labels)

    # A validation

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix n and w in the first validation, so that only the model moves the curve."""
        super().on_validation_start(trainer, pl_module)
        record, samples = self.record, self.kept.samples
        if trainer.is_last_batch and not self.kept.starts_at(0):  # of an epoch that was seen from its start
            samples.complete()
        if self._is_measuring and self.kept.has_started and record.num_training is None:
            record.num_training = count_labelled_samples(trainer, samples, self.num_training)
            record.num_weights = sum(weight.numel() for weight in pl_module.parameters() if weight.requires_grad)

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch if its samples are wanted, with its features, or if it has labels."""
        if not (samples.wants(batch_idx, has_labels=True) or samples.wants(batch_idx)):
            return
        labels = self._find_labels(module, batch)
        if samples.wants(batch_idx, labels is not None):
            samples.add(self.reader.keep(module, batch, batch_idx, labels))

    def _find_labels(self, module: LightningModule, batch: object) -> Tensor | None:
        """Return the labels of a validation batch, if they are wanted; None, which is said, if they do not fit."""
        if not self.validation_labels or not self.reader.may_have_labels(module, batch):
            return None
        try:
            labels = self.reader.labels(module, batch, self.kept.output_shape)
        except MisconfigurationException as error:
            self.reporter.warn("labels", f"takes some validation batches as unlabelled: {describe_error(error)}")
            return None
        return None if bool(has_ignored_value(labels).all()) else labels

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that have no estimate."""
        check_outputs(outputs, TASKS[self.task])

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> RiskEstimate:
        """Run the model and its twins on the kept samples of a loader, and the model on training samples."""
        if self.kept.samples.size == 0 and not self.reporter.before_first_step:
            raise Refused("no training sample is kept yet.", entry="no-estimate")
        reference = self._find_reference(samples)
        metric = self._make_metric(module, samples.dataloader_idx, reference)
        self._measure_training(module, run, metric)
        predictions = samples.split(None if reference is None else reference.predictions)
        twins = self._make_twins(module, run, samples)
        batches = samples.batches
        for place, (batch, predicted) in enumerate(zip(batches, predictions, strict=True)):
            call = batch.call.to(module.device)
            outputs = run(call)
            self.reporter.note_outputs(outputs)
            twin_outputs = twins.outputs(call, place, len(batches))
            metric.update(outputs, twin_outputs, baseline_outputs=twins.baseline_outputs(call), reference=predicted)
            if batch.labels is not None:
                metric.update_labels(outputs, batch.labels)
        return metric

    def _find_reference(self, unseen: KeptSamples) -> Reference | None:
        """Fit the reference of a loader, once; None if there can be none, which is said."""
        kept, index, size = self.kept, unseen.dataloader_idx, self.kept.samples.size
        if size != kept.num_known:  # more have come
            kept.references, kept.num_known = {}, size
        if index in kept.references or size == 0 or unseen.size == 0:
            return kept.references.get(index)
        kept.references[index] = None
        warn_of_preparation(self.reporter, kept.samples, unseen)
        num_outputs = math.prod(kept.output_shape or ())
        try:
            batches = kept.samples.batches, unseen.batches
            kept.references[index] = fit_to_samples(*batches, num_outputs, TASKS[self.task])
        except (RuntimeError, ValueError) as error:
            advice = "Set `features=` to a function `batch -> (N, D)`. Until then, the estimate does without one."
            self.reporter.warn("features", f"has no reference: {describe_error(error)} {advice}")
        return kept.references[index]

    def _measure_training(self, module: LightningModule, run: RunIsolated, metric: RiskEstimate) -> None:
        """Run the model on kept training samples, and score it by their labels."""
        for batch in spread(self.kept.samples.batches, NUM_SCORED / module.trainer.world_size):
            outputs = run(batch.call.to(module.device))
            if batch.labels is not None:
                metric.update_training(outputs, batch.labels)

    def _make_metric(self, module: LightningModule, dataloader_idx: int, reference: Reference | None) -> RiskEstimate:
        with module.device:  # it determines the floating type of the metric
            return RiskEstimate(
                self.task,
                strength=TWIN_STRENGTH,
                num_training=self.record.num_training,
                num_weights=self.record.num_weights,
                reference=reference,
                calibration=self.record.calibrations.get(dataloader_idx),
                gap_weight=self.record.gap_weights.get(dataloader_idx),
            )

    def _make_twins(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> Twins:
        initial = self.record.initial_weights(module)
        new = unknown_parameters(module, initial)
        if new:
            message = f"has no initial weights for {', '.join(new[:3])}: they count as entirely learned."
            self.reporter.warn("initial-weights", message)
        largest = max((batch.size for batch in samples.batches), default=_FEW_SAMPLES)
        if largest < _FEW_SAMPLES and has_batch_norm(module):
            message = f"gets validation batches of fewer than {_FEW_SAMPLES} samples, too few for batch norm: take 32."
            self.reporter.warn("batch-size", message)
        return Twins(module, initial, TWIN_STRENGTH, (self.seed, module.global_rank, samples.dataloader_idx), run)

    # Values

    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        """Compute the estimate on a loader over all processes, and warn of doubtful values."""
        has_all = trainer.strategy.reduce_boolean_decision(self.kept.samples.is_full)
        metric: RiskEstimate = self.metrics[dataloader_idx]
        values = metric.compute()
        self.reporter.warn_of(metric.messages, dataloader_idx)
        if values["risk_variance"] == 0 and self.record.has_moved(trainer.lightning_module):
            message = "finds no variance, though weights have moved: `forward` seems to compute with copies of them."
            self.reporter.warn("copied-weights", message)
        if self.validation_labels and "risk_num_labels" not in values:
            where = f"in the batches of dataloader {dataloader_idx}"
            message = f"found no label {where}, and does without. If they have some, set `targets=`."
            self.reporter.warn("labels", message, kind="none")
        if has_all:
            warn_of_few_classes(self.reporter, self.kept, TASKS[self.task])
        if not bool(values[ESTIMATE].isfinite()):
            return {}
        self._remember(trainer.current_epoch, dataloader_idx, metric, values, has_all)
        return values

    def _remember(
        self, epoch: int, dataloader_idx: int, metric: RiskEstimate, values: Mapping[str, Tensor], has_all: bool
    ) -> None:
        """Note what a validation has shown; the first one with all training samples decides whether noise is found."""
        record = self.record
        if has_all and "risk_reference" in values:
            record.gap_weights.setdefault(dataloader_idx, metric.gap_weight)
        record.calibrations[dataloader_idx] = metric.calibration
        record.history.setdefault(dataloader_idx, []).append(ValidationResult.of(epoch, values, metric.gap_weight))
        self._has_logged.add(dataloader_idx)

    def fallback_values(self, dataloader_idx: int, has_failed: bool) -> Mapping[str, float]:
        """Return the worst possible score, once, if there is no first value: EarlyStopping needs one."""
        if dataloader_idx in self._has_logged:
            return {}
        self._has_logged.add(dataloader_idx)
        if has_failed:
            message = "has no first value, and logs the worst possible score in its place, so that training continues."
            self.reporter.warn("failed", message, kind="first value")
        return dict.fromkeys((CRITERION, ESTIMATE), TASKS[self.task].max_score)


def _is_new(trainer: Trainer) -> bool:
    """Return whether nothing was trained yet; raw optimizers do not count steps."""
    return trainer.global_step == 0 and trainer.current_epoch == 0
