"""The callback that logs what to stop by."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, describe_error
from lightning_sensitivity.callbacks.checks import check_modes, check_outputs, check_targets
from lightning_sensitivity.callbacks.closing import closing_line
from lightning_sensitivity.callbacks.monitor import Monitor
from lightning_sensitivity.callbacks.record import RiskRecord, ValidationResult
from lightning_sensitivity.callbacks.reference import RunReference
from lightning_sensitivity.callbacks.training import TrainingSamples
from lightning_sensitivity.functional.criterion import combine_with_labels, distance_from_reference
from lightning_sensitivity.functional.reference import MAX_SAMPLES
from lightning_sensitivity.functional.refined_score import UNCHANGED, Refined, ScoreSums
from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS
from lightning_sensitivity.metric.refined_score import Agreement, RefinedScore, computed_sums
from lightning_sensitivity.model.isolation import RunIsolated, isolated
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import KeptSamples

CRITERION, RANKING, DISAGREEMENT = "risk_criterion", "risk_ranking", "risk_disagreement"
NUM_LABELLED = 2000  # validation samples that are kept if they have labels, over all processes
_WORST_RANKING = 2.0


@dataclass
class RiskMetrics:
    """Hold what a validation measures on a loader.

    Attributes:
        unseen: Scores of unseen samples against the reference.
        labels: Scores of validation samples against their labels.
        training: Scores of training samples against their labels.
        agreement: How alike network and reference rank unseen samples; None for a regression.
    """

    unseen: RefinedScore
    labels: RefinedScore
    training: RefinedScore
    agreement: Agreement | None


class RiskMonitor(Monitor):
    r"""Log what to stop by, and to choose a checkpoint by, in every validation epoch, without validation labels.

    A small model of the training labels, the *reference*, stands in for validation labels. It is kernel ridge
    regression (see :func:`~lightning_sensitivity.functional.fit_reference`), it is checked by leaving each label
    out, and it never sees the network. The network is the better, the nearer its predictions for unseen samples
    are to those of the reference, see :func:`~lightning_sensitivity.functional.criterion.distance_from_reference`.
    Where training labels look clean, or the reference sees too little of the inputs, the score on training
    samples takes its place; the line at the end of a fit says so.

    **Logged values**, only in ``Trainer.fit``, after ``prefix``, all best where they are lowest:

    - ``risk_criterion``: what to stop by, for accuracy and, in a regression, for the squared error;
    - ``risk_ranking``: what to stop by for AUC, few positives, class weights or resampling: 1 - rank correlation
      of the network's predictions with the reference's, class by class;
    - ``risk_disagreement``: the share of unseen samples whose class is not the reference's, to compare runs.

    Up to 3,000 training samples (what the reference sees of them) and ``num_samples`` validation samples are
    kept on the CPU. A validation runs one pass over the latter, and one over 600 training samples.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``.
        targets: A function ``batch -> labels``; by default
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Choose by the refined score of validation labels, which may be noisy, and by the
            reference. Up to 2,000 samples are then kept.
        features: A function ``batch -> (N, D)``, what the reference sees, such as a pretrained encoder; by
            default the inputs.
        num_samples: Validation samples per loader, over all processes; None for all.
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

    names = (CRITERION, RANKING, DISAGREEMENT)
    measures_only_fits = True

    def __init__(
        self,
        task: str = "multiclass",
        *,
        targets: Selector | None = None,
        validation_labels: bool = False,
        features: Selector | None = None,
        num_samples: int | None = 600,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        prog_bar: bool = False,
    ) -> None:
        check_argument("task", task, task in TASKS, f"one of {TASK_NAMES}")
        check_bool("validation_labels", validation_labels)
        reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=TASKS[task])
        super().__init__(reader, num_samples, prefix, prog_bar)
        if validation_labels and num_samples is not None:
            self.num_samples = max(num_samples, NUM_LABELLED)
        self.task = task
        self.validation_labels = validation_labels
        self.record = RiskRecord()  # all of it is saved; nothing of what follows is
        self.training: TrainingSamples | None = None  # of this run; None before its first batch
        self.reference = RunReference(TASKS[task], self.record, self.reporter)
        self._has_said_last_line = False

    # Before and after a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked by now, and forget the last fit, unless this one continues it."""
        super().setup(trainer, pl_module, stage)
        check_modes(trainer, self.prefixed_names())
        self._has_said_last_line = False
        if stage == "fit" and trainer.global_step == 0 and trainer.current_epoch == 0:  # raw optimizers count no steps
            self.record = RiskRecord()
        self._free()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    # Not `state_dict`, of which Lightning refuses two with one key before we can name the argument.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what a resumed fit continues."""
        checkpoint["callbacks"][self.state_key] = self.record.to_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore what was saved, if anything."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is not None:
            self.record = RiskRecord.from_dict(state)
            self._free()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which epoch to choose, and what is known of the labels."""
        self._say_last_line(trainer)
        is_waiting = self.training is not None and not self.reference.is_made and self.record.verdict is None
        if is_waiting and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            message = f"has no value: no validation came after {MAX_SAMPLES:,} training samples, or after an epoch."
            self.reporter.warn("samples", message)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as at the end of a fit, also after Ctrl-C."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._say_last_line(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _say_last_line(self, trainer: Trainer) -> None:
        is_silent = self._has_said_last_line or trainer.fast_dev_run  # type: ignore[attr-defined]
        if is_silent or self.record.verdict is None:
            return
        self._has_said_last_line = True
        with self.reporter.report_failure("could not say which epoch to choose", "Look at the curve."):
            curves = {
                self.logged_name(trainer, name, index): (name, record.history)
                for name in (CRITERION, RANKING)
                for index, record in sorted(self.record.loaders.items())
                if record.history
            }
            line = closing_line(trainer, curves, self.record.verdict)
            if line:
                rank_zero_info(line)

    def _free(self) -> None:
        """Free all that a checkpoint does not need."""
        super()._free()
        self.training = None
        self.reference = RunReference(TASKS[self.task], self.record, self.reporter)

    # Training samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Check the first batch of a run, and keep samples of its first epoch."""
        if self.training is None:
            with self.reporter.report_failure("cannot measure the risk", "There is no criterion in this fit."):
                self.training = self._start(trainer, pl_module, batch)
        elif batch_idx == 0:  # a new epoch repeats the samples
            self.training.complete()
        if self.training is not None and not self.reference.is_made:
            with (
                self.reporter.report_failure("could not keep a training batch", "It is left out."),
                trainer.precision_plugin.val_step_context(),
            ):
                self.training.keep(pl_module, batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _start(self, trainer: Trainer, module: LightningModule, batch: object) -> TrainingSamples:
        """Check that the model can be measured on a batch, and that its labels fit."""
        call = self.reader.call(module, batch)
        with isolated(module) as run, trainer.precision_plugin.val_step_context():
            outputs = self.check_model(run, call)
        output_shape = tuple(outputs.shape[1:])
        labels = self.reader.labels(module, batch, output_shape)
        seen = self.reader.seen(module, batch, call, len(outputs))
        check_targets(labels, len(outputs), seen, TASKS[self.task])
        return TrainingSamples(self.reader, TASKS[self.task], output_shape, trainer.world_size)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs that have no criterion."""
        check_outputs(outputs, TASKS[self.task])

    # A validation

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether every process has its training samples: as many as are wanted, or those of an epoch."""
        training = self.training
        has_all = training is not None and training.scored.size > 0
        if has_all and not self.reference.is_made and self.record.verdict is None:
            assert training is not None
            has_all = training.is_full or trainer.is_last_batch
        return bool(trainer.strategy.reduce_boolean_decision(has_all))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather the training samples of all processes before the first validation that is measured."""
        super().on_validation_start(trainer, pl_module)
        if self._is_measuring and self.training is not None and not self.reference.is_made:
            self.training.complete()
            self.reference.gather(trainer, self.training)

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch, with its labels if they are wanted."""
        kept = self.reader.keep(module, batch, batch_idx, with_seen=True)
        if self.validation_labels and self.reader.may_have_labels(module, batch):
            try:
                kept.labels = self._find_labels(module, batch)
            except MisconfigurationException as error:
                self.reporter.warn("labels", f"takes some validation batches as unlabelled: {describe_error(error)}")
        samples.add(kept)

    def _find_labels(self, module: LightningModule, batch: object) -> Tensor | None:
        """Return the labels of a validation batch; None if all are ignored."""
        shape = None if self.training is None else self.training.output_shape
        labels = self.reader.labels(module, batch, shape)
        return labels if bool(TASKS[self.task].has_label(labels).any()) else None

    def prepare(self, trainer: Trainer, module: LightningModule) -> None:
        """Make the reference, once."""
        if not self.reference.is_made and not trainer.sanity_checking:
            self.reference.make(self.samples, module.device)
            if self.training is not None:
                self.training.forget_known()

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> RiskMetrics:
        """Run the model on the kept samples of a loader, and on training samples."""
        metrics = self._make_metrics(module)
        predictions = self.reference.predictions.get(samples.dataloader_idx)
        place = 0
        for batch in samples.batches:
            assert batch.call is not None
            outputs = run(batch.call.to(module.device))
            if TASKS[self.task].has_classes:
                self.reporter.note_outputs(outputs)
            if predictions is not None:
                q = predictions[place : place + batch.size]
                metrics.unseen.update(outputs, q)
                if metrics.agreement is not None:
                    metrics.agreement.update(outputs, q)
            if batch.labels is not None:
                metrics.labels.update(outputs, batch.labels)
            place += batch.size
        for batch in () if self.training is None else self.training.scored.batches:
            assert batch.call is not None and batch.labels is not None
            metrics.training.update(run(batch.call.to(module.device)), batch.labels)
        return metrics

    def _make_metrics(self, module: LightningModule) -> RiskMetrics:
        shares = torch.tensor(self.reference.shares) if self.reference.shares else None
        with module.device:  # it determines the floating type of a metric
            unseen, labels, training = (RefinedScore(self.task, shares=shares) for _ in range(3))
            agreement = Agreement(self.task, self._num_outputs) if TASKS[self.task].has_classes else None
        return RiskMetrics(unseen, labels, training, agreement)

    @property
    def _num_outputs(self) -> int:
        return 1 if self.training is None else self.training.num_outputs

    # Values

    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor | float]:
        """Compute the criterion on a loader over all processes, and remember it."""
        verdict, record = self.reference.decide(trainer), self.record.loader(dataloader_idx)
        self.reference.share(trainer, self.samples[dataloader_idx], self._num_outputs)
        metrics: RiskMetrics = self.metrics[dataloader_idx]
        unseen, labels, training = map(computed_sums, (metrics.unseen, metrics.labels, metrics.training))
        ranking, disagreement = (math.nan, math.nan) if metrics.agreement is None else metrics.agreement.compute()
        self._warn_of_samples(dataloader_idx, unseen, labels, training)
        calibration = record.calibration.updated(unseen, training)
        training_score = Refined(float(training.scores[UNCHANGED]), 1.0)
        chosen = distance_from_reference(unseen, calibration) if verdict.is_trusted else training_score
        num_labels = int(labels.num_scored[0])
        if num_labels > 0:
            chosen = combine_with_labels(chosen if verdict.is_trusted else None, labels)
        if not verdict.is_trusted or math.isnan(ranking):
            ranking = training_score.score
        if not math.isfinite(chosen.score + ranking):
            self.reporter.warn("failed", f"has no value on dataloader {dataloader_idx}: no sample counts.")
            return {}
        record.calibration = calibration
        accuracy = float(training.num_correct[UNCHANGED] / training.num_scored[UNCHANGED])
        epoch = trainer.current_epoch
        result = ValidationResult(epoch, chosen.score, ranking, chosen.temperature, num_labels, accuracy)
        record.history.append(result)
        values: dict[str, Tensor | float] = {CRITERION: chosen.score}
        if metrics.agreement is not None:
            values[RANKING] = ranking
        return values if math.isnan(disagreement) else values | {DISAGREEMENT: disagreement}

    def _warn_of_samples(self, dataloader_idx: int, unseen: ScoreSums, labels: ScoreSums, training: ScoreSums) -> None:
        where = f"dataloader {dataloader_idx}"
        num_non_finite = int(max(sums.num_non_finite.max() for sums in (unseen, labels, training)))
        if num_non_finite > 0:
            message = f"on {where}: {num_non_finite} samples gave nan or inf, and were left out."
            self.reporter.warn("nan", message, num_non_finite, kind=str(dataloader_idx))
        if self.validation_labels and not bool(labels.num_scored.any()):
            message = f"found no label in the batches of {where}, and does without. If they have some, set `targets=`."
            self.reporter.warn("labels", message, kind="none")

    def fallback_values(self, dataloader_idx: int) -> dict[str, float]:
        """Return the worst possible values."""
        worst = {CRITERION: TASKS[self.task].max_score}
        return worst | ({RANKING: _WORST_RANKING, DISAGREEMENT: 1.0} if TASKS[self.task].has_classes else {})
