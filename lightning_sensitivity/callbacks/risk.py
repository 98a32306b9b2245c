"""The callback that logs the risk estimate, which decides when to stop."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int, check_selectors, see
from lightning_sensitivity.callbacks.checks import IN_UNIT_INTERVAL, check_outputs
from lightning_sensitivity.callbacks.closing import Measured, log_closing_line
from lightning_sensitivity.callbacks.monitor import Monitor
from lightning_sensitivity.callbacks.risk_samples import RiskSamples
from lightning_sensitivity.callbacks.samples import KeptSamples, Pass, check_agreement
from lightning_sensitivity.callbacks.state import FitState
from lightning_sensitivity.callbacks.training import check_number, count_labelled_samples
from lightning_sensitivity.callbacks.twins import TwinRunner
from lightning_sensitivity.functional.reference import Calibration, Reference
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import may_be_probabilities
from lightning_sensitivity.metric import RiskEstimate
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.twins import unknown_parameters

_NOT_LOGGED = ("risk_without_labels", "risk_label_stderr")


class RiskMonitor(Monitor):
    r"""Log an estimate of the Brier score on unseen samples in every validation epoch.

    Stop when it is lowest. It needs only training labels, even noisy ones. See
    :class:`~lightning_sensitivity.RiskEstimate` for the formula. Regressions and dense outputs have none.

    **Logged values**, only in ``Trainer.fit``, after ``prefix``: ``risk_estimate``; its terms ``risk_claim``,
    ``risk_overconfidence``, ``risk_memorization``, ``risk_variance``; ``risk_reference`` and
    ``risk_reference_weight``, for dense inputs, token ids or ``features``.

    Up to 1,000 training samples and ``num_samples`` validation samples are kept on the CPU, at most 512 MiB
    of each in each process. A validation runs two passes over the latter (with batch norm 3), one over the
    former.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        targets: A function ``batch -> labels``; by default
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Combine it with the score on about 1,200 validation labels; log
            ``risk_label_score`` and ``risk_num_labels``, too.
        features: A function ``batch -> (N, D)`` for the reference, such as a pretrained encoder.
        initial_weights: State dict from before training, if these data have already been trained on.
        num_training: Number of different training samples, for streams and several loaders.
        num_samples: Validation samples per loader, over all processes, in whole batches; None for all.
        seed: Seed of the simulated twins.
        prefix: Prefix of the logged names.
        inputs: A function ``batch -> arguments``; for this and ``outputs`` see
            :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K)`` or ``(N,)``.
        prog_bar: Show the estimate on the progress bar.

    Raises:
        MisconfigurationException: If an argument is invalid; before the first step, if the Trainer or the
            model is not supported, labels do not fit the task, or the number of training samples is unknown.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> callbacks = [RiskMonitor(), EarlyStopping("val_risk_estimate", patience=10)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False)
    """

    keeps_labels = True
    names = ("risk_estimate", "risk_claim", "risk_overconfidence", "risk_memorization", "risk_variance")

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
        prefix: str = "val_",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        prog_bar: bool = False,
    ) -> None:
        check_argument("task", task, task in TASKS, f"one of {', '.join(map(repr, TASKS))} (a regression has none)")
        check_selectors(targets=targets, features=features)
        check_bool("validation_labels", validation_labels)
        _check_optional(initial_weights, num_training)
        super().__init__(num_samples, seed, prefix, inputs, outputs, prog_bar)
        self.task = task
        self.targets = targets
        self.features = features
        self.validation_labels = validation_labels
        self.initial_weights = initial_weights
        self.num_training = num_training
        self.fit_state = FitState()
        self._kept = self._new_samples()

    # Before and after a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch, and forget the last fit, unless this one continues it."""
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and _is_new(trainer):
            self.fit_state = FitState()
        self.fit_state.module = pl_module

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights from before training, and what else a resumed fit needs."""
        return self.fit_state.to_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.fit_state = FitState.from_dict(state_dict, self.fit_state.module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the estimate was lowest."""
        reference = self._kept.references.get((0, self._kept.training.size))
        log_closing_line(trainer, self.prefix + self.names[0] + self.suffix(0), self.fit_state.history, reference)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start with the first batch of a fit, and keep the first samples."""
        kept = self._kept
        if kept.must_start(batch_idx):
            kept.is_started = True
            with self.reporter.report_failure("cannot estimate the risk", "There is no estimate in this fit."):
                self.fit_state.initial = self.fit_state.find_initial(self.initial_weights, _is_new(trainer))
                check_number(trainer, self.num_training)
                kept.start_training(trainer, pl_module, batch, batch_idx)
        elif batch_idx == 0:  # a new epoch repeats the samples
            kept.training.stop()
        else:
            with self.reporter.report_failure("could not keep a training batch", "It is left out."):
                kept.keep_training(pl_module, batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    # A validation

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure the current validation: only in a fit."""
        return trainer.state.fn == TrainerFn.FITTING

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Fix n and w in the first validation, so that only the model can move the curve; every process comes here."""
        super().on_validation_start(trainer, pl_module)
        state, kept = self.fit_state, self._kept
        if self._is_measuring and kept.is_started and state.num_training is None:
            state.num_training = count_labelled_samples(trainer, kept.training, self.num_training)
            state.num_weights = sum(weight.numel() for weight in pl_module.parameters() if weight.requires_grad)

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch if its samples are wanted, with its features and labels."""
        if samples.is_complete:
            return
        super().keep(module, batch, batch_idx, samples)
        if self.validation_labels:
            self._kept.keep_labels(module, batch, batch_idx, samples)
        kept = samples.find(batch_idx)  # another monitor may have kept it
        if kept is not None:
            self._kept.keep_features(module, batch, kept)

    def measured_with(self, samples: KeptSamples) -> list[KeptSamples]:
        """Return the samples of a loader, more of them that have labels, and the training samples."""
        return [samples, *self._kept.beside(samples)]

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> RiskEstimate:
        """Run the model and its twins on the kept samples of a loader, and the model on samples with labels."""
        training = self._kept.training
        if not training.groups and not self.reporter.is_strict:
            raise MisconfigurationException(f"no training sample is kept yet.{see('no-estimate')}")
        reference = self._kept.find_reference(samples)
        metric = self._make_metric(module, samples.dataloader_idx, reference)
        self._run_twins(module, run, samples, metric, reference)
        for beside in self._kept.beside(samples):
            update = metric.update_training if beside is training else metric.update_labels
            for each in self._passes(beside, module, run):
                for outputs, labels in each.group.labelled(each.outputs):
                    update(outputs, labels)
        return metric

    def _run_twins(
        self,
        module: LightningModule,
        run: RunIsolated,
        samples: KeptSamples,
        metric: RiskEstimate,
        reference: Reference | None,
    ) -> None:
        """Run the model and its twins on the kept samples of a loader, and update its metric."""
        initial = self.fit_state.weights_before_training()
        self._warn_of_new(module, initial)
        twins = TwinRunner(module, initial, run, samples, self.seed)
        start = 0
        for each in self._passes(samples, module, run):
            stop = start + each.group.size
            predictions = None if reference is None else reference.predictions[start:stop]
            found = twins.run(each)
            metric.update(each.outputs, found.twins, compared_with=found.compared_with, reference=predictions)
            for outputs, labels in each.group.labelled(each.outputs):
                metric.update_labels(outputs, labels)
            start = stop

    def _passes(self, samples: KeptSamples, module: LightningModule, run: RunIsolated) -> Iterator[Pass]:
        """Yield the passes over some samples, after a check of their outputs."""
        may_warn = samples is self._kept.training and not self.reporter.is_strict
        for each in samples.passes(module, run):
            check_outputs(each.outputs, TASKS[self.task])
            may_warn = may_warn and may_be_probabilities(each.outputs)
            for alone in each.checked:
                joint = each.outputs[each.group.rows_of(alone.batches[0])]
                check_agreement(joint, run(alone.call.to(module.device)), joint.dtype)
            yield each
        if may_warn:
            self.reporter.warn("arguments", IN_UNIT_INTERVAL)

    def _make_metric(self, module: LightningModule, dataloader_idx: int, reference: Reference | None) -> RiskEstimate:
        state = self.fit_state
        with module.device:  # it determines the floating type of the metric
            return RiskEstimate(
                self.task,
                strength=TWIN_STRENGTH,
                num_training=state.num_training,
                num_weights=state.num_weights,
                reference=reference,
                calibration=state.calibrations.get(dataloader_idx),
            )

    # Values

    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        """Compute the estimate on a loader over all processes, and warn of doubtful values."""
        metric: RiskEstimate = self.metrics[dataloader_idx]
        values = metric.compute()
        self.reporter.warn_of(metric.messages, dataloader_idx)
        if not bool(values["risk_estimate"].isfinite()):
            return {}
        self.fit_state.calibrations[dataloader_idx] = metric.calibration
        if dataloader_idx == 0:
            self.fit_state.history.append(Measured.from_values(trainer.current_epoch, values))
        return {name: value for name, value in values.items() if name not in _NOT_LOGGED}

    def values_without_measurement(self, dataloader_idx: int) -> Mapping[str, float]:
        """Return the worst possible score, once, if a fit has no first value: EarlyStopping ends without one."""
        if dataloader_idx in self.fit_state.calibrations:  # a value was logged
            return {}
        message = "has no first value, and logs the worst possible score in its place, so that training continues."
        self.reporter.warn("failed", message, kind="first value")
        self.fit_state.calibrations[dataloader_idx] = Calibration()
        return {"risk_estimate": TASKS[self.task].max_score}

    def _warn_of_new(self, module: LightningModule, initial: Mapping[str, Tensor]) -> None:
        new = unknown_parameters(module, initial)
        if new:
            message = f"has no initial weights for {', '.join(new[:3])}: they count as entirely learned."
            self.reporter.warn("initial-weights", message)

    def forget_samples(self) -> None:
        """Forget the kept validation samples, and what is kept beside them."""
        super().forget_samples()
        self._kept.forget_validation()

    def _free(self) -> None:
        """Free the kept training samples, too."""
        super()._free()
        self.fit_state.module = None
        self._kept = self._new_samples()

    def _new_samples(self) -> RiskSamples:
        return RiskSamples(TASKS[self.task], self.inputs, self.outputs, self.targets, self.features, self.reporter)


def _check_optional(initial_weights: object, num_training: object) -> None:
    """Check arguments that may be None."""
    is_mapping = isinstance(initial_weights, Mapping | None)
    check_argument("initial_weights", initial_weights, is_mapping, "a state dict, as in a checkpoint, or None")
    if num_training is not None:
        check_int("num_training", num_training, 1)


def _is_new(trainer: Trainer) -> bool:
    """Return whether nothing was trained yet; raw optimizers do not count steps."""
    return trainer.global_step == 0 and trainer.current_epoch == 0
