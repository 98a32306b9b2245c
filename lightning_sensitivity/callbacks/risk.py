"""The callback that logs the risk estimate, which decides when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int, check_selectors, see
from lightning_sensitivity.callbacks.checks import describe_error
from lightning_sensitivity.callbacks.closing import Measured, log_closing_line
from lightning_sensitivity.callbacks.companions import BatchReader, Companions, fit_to_kept
from lightning_sensitivity.callbacks.monitor import Monitor
from lightning_sensitivity.callbacks.risk_passes import RiskPasses
from lightning_sensitivity.callbacks.samples import MAX_BYTES, Group, KeptSamples
from lightning_sensitivity.callbacks.state import FitState
from lightning_sensitivity.callbacks.training import TrainingSamples
from lightning_sensitivity.functional.reference import Calibration
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.functional.tasks import TASKS, has_ignored_value
from lightning_sensitivity.metric import RiskEstimate
from lightning_sensitivity.model import isolated
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.twins import unknown_parameters

NUM_LABELS = 1200  # of validation samples that are kept for their labels
_ENTRIES = {"probabilities": "arguments", "non-finite": "nan", "no value": "failed", "too large": "above-2"}


class RiskMonitor(Monitor):
    r"""Log an estimate of the Brier score on unseen samples in every validation epoch; stop when it is lowest.

    It needs only training labels, even noisy ones. See :class:`~lightning_sensitivity.RiskEstimate` for the formula.
    Regressions and dense outputs have no estimate.

    **Logged values**, only in ``Trainer.fit``, after ``prefix``: ``risk_estimate``; its terms ``risk_claim``,
    ``risk_overconfidence``, ``risk_memorization``, ``risk_variance``; ``risk_reference`` and ``risk_reference_weight``,
    for dense inputs, token ids or ``features``. The last line of a fit says where the estimate was lowest.

    Up to 1,000 training samples and ``num_samples`` validation samples are kept on the CPU, at most 512 MiB of each in
    each process. A validation runs two passes over the latter (with batch norm 3), one over the former.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        targets: A function ``batch -> labels``; by default :func:`~lightning_sensitivity.model.select_targets`.
            Labels of -100 are ignored.
        validation_labels: Combine it with the score on about 1,200 validation labels; log ``risk_label_score`` and
            ``risk_num_labels``, too.
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
        MisconfigurationException: If an argument is invalid; before the first step, if the Trainer or the model is not
            supported, labels do not fit the task, or the number of training samples is unknown.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> callbacks = [RiskMonitor(), EarlyStopping("val_risk_estimate", patience=10)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False)
    """

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
        self.validation_labels = validation_labels
        self.initial_weights = initial_weights
        self.num_training = num_training
        self.fit_state = FitState()
        self._reader = BatchReader(targets, features)
        self._is_refused = False  # whether this fit has no estimate
        self._training: TrainingSamples | None = None  # in a fit that can have an estimate
        self._companions: dict[int, Companions] = {}  # beside the validation samples, by loader
        self._module: LightningModule | None = None  # during a run

    # Before and after a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch, and forget the last fit, unless this one continues it."""
        super().setup(trainer, pl_module, stage)
        self._module = pl_module
        if stage == "fit" and _is_new(trainer):
            self.fit_state = FitState()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """Return the weights from before training, and what else a resumed fit needs."""
        return self.fit_state.to_dict(self._module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state."""
        self.fit_state = FitState.from_dict(state_dict)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log where the estimate was lowest."""
        companions = self._companions.get(0, Companions())
        name = self.prefix + self.names[0] + self.suffix(0)
        log_closing_line(trainer, name, self.fit_state.history, companions.reference)

    # Training samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start with the first batch of a fit, and keep the first samples."""
        training = self._training
        if training is None:
            if not self._is_refused:
                self._start_fit(trainer, pl_module, batch, batch_idx)
                self._is_refused = self._training is None
        elif batch_idx == 0:
            training.samples.stop()  # a new epoch repeats the samples
        elif training.samples.wants(batch_idx):
            with self.reporter.report_failure("could not keep a training batch", "It is left out."):
                training.keep(pl_module, batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _start_fit(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Find the weights from before training, and check that labels and outputs allow an estimate."""
        training = TrainingSamples(self.task, self._reader, self.inputs, self.outputs, trainer.world_size)
        with self.reporter.report_failure("cannot estimate the risk", "There is no estimate in this fit."):
            state = self.fit_state
            state.initial = state.initial_weights(pl_module, self.initial_weights, _is_new(trainer))
            state.is_resumed = False
            training.keep(pl_module, batch, batch_idx)
            training.check_number(trainer, self.num_training)
            self._training = training

    # A validation

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure the current validation: only in a fit."""
        return trainer.state.fn == TrainerFn.FITTING

    def keep(self, module: LightningModule, batch: Any, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch if its samples are wanted, with its features and labels."""
        if samples.is_complete:
            return
        super().keep(module, batch, batch_idx, samples)
        companions = self._companions.get(samples.dataloader_idx)
        if companions is None:
            companions = self._companions[samples.dataloader_idx] = Companions()
            companions.labelled = KeptSamples(0, samples.num_batches, NUM_LABELS / module.trainer.world_size, MAX_BYTES)
        is_kept = batch_idx in samples.batch_indices
        wants_labels = self.validation_labels and (is_kept or companions.labelled.wants(batch_idx))
        if wants_labels or (is_kept and self._reader.has_features):
            self._keep_companions(module, batch, batch_idx, samples.groups[-1] if is_kept else None, companions)

    def _keep_companions(
        self, module: LightningModule, batch: Any, batch_idx: int, kept: Group | None, companions: Companions
    ) -> None:
        """Keep features and labels of a batch; if it is not kept itself, only a batch that has labels."""
        with isolated(module) as run:
            labels = run(self._find_labels, module, batch) if self.validation_labels else None
            if kept is not None and self._reader.has_features:
                companions.features[batch_idx] = run(self._reader.features, batch, kept.size)
        if labels is None:
            if not companions.labelled.groups:
                companions.labelled.num_batches = math.inf  # labels are scattered: keep them as they come
            return
        if kept is None:
            super().keep(module, batch, batch_idx, companions.labelled)
        if kept is not None or batch_idx in companions.labelled.batch_indices:
            companions.labels[batch_idx] = labels

    def _find_labels(self, module: LightningModule, batch: Any) -> Tensor | None:
        """Select the labels of a validation batch; None if it has none."""
        try:
            labels = self._reader.labels(module, batch)
            if self._training is not None:
                TASKS[self.task].check(torch.zeros(len(labels), self._training.companions.num_outputs), labels)
        except (MisconfigurationException, ValueError) as error:
            if self._reader.has_targets or isinstance(error, ValueError):
                self.reporter.warn("labels", f"takes some validation batches as unlabelled: {describe_error(error)}")
            return None
        return None if bool(has_ignored_value(labels).all()) else labels

    def make_metric(self, trainer: Trainer, dataloader_idx: int) -> RiskEstimate:
        """Make the metric of a loader for one validation."""
        calibration = self.fit_state.calibrations.get(dataloader_idx, Calibration())
        return RiskEstimate(self.task, strength=TWIN_STRENGTH, calibration=calibration)

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples, metric: RiskEstimate) -> None:
        """Run the model and its twins on the kept samples of a loader, and the model on training samples."""
        if self._training is None and not self.reporter.is_strict:
            raise MisconfigurationException(f"no training sample is kept yet.{see('no-estimate')}")
        initial = self.fit_state.weights_before_training(module)
        self._warn_of_new(module, initial)
        companions = self._companions.setdefault(samples.dataloader_idx, Companions())
        self._fit_reference(samples, companions)
        metric.set_reference(companions.reference)
        passes = RiskPasses(module, run, metric)
        passes.run_validation(samples, companions, initial, self.seed)
        passes.run_labelled(companions)
        if self._training is not None:
            passes.run_training(self._training.samples, self._training.companions)

    def measured_with(self, samples: KeptSamples) -> list[KeptSamples]:
        """Return the samples of a loader, more of them that have labels, and the training samples."""
        labelled = self._companions.get(samples.dataloader_idx, Companions()).labelled
        return [samples, labelled, *([] if self._training is None else [self._training.samples])]

    def _fit_reference(self, samples: KeptSamples, companions: Companions) -> None:
        """Fit the reference of a loader, once all training samples are there."""
        training = self._training
        if training is None or not samples.groups or companions.num_fitted == training.samples.size:
            return
        companions.num_fitted = training.samples.size
        reason = "inputs are neither dense numbers nor token ids, or no kept training sample has a label"
        try:
            companions.reference = fit_to_kept(
                training.samples,
                training.companions,
                samples,
                companions,
                TASKS[self.task],
                self._reader.has_features,
            )
        except (RuntimeError, ValueError) as error:
            companions.reference = None
            reason = describe_error(error).rstrip(".")
        if companions.reference is None:
            self.reporter.warn(
                "features",
                f"has no reference: {reason}. Set `features=` to a function `batch -> (N, D)`. Until then, the "
                "estimate does without one.",
            )

    # Values

    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor]:
        """Compute the estimate on a loader over all processes, and warn of doubtful values."""
        metric: RiskEstimate = self.metrics[dataloader_idx]
        self._fix_sizes(trainer)
        metric.set_size(self.fit_state.num_training, self.fit_state.num_weights)
        values = metric.compute()
        for kind, message in metric.messages.items():
            self.reporter.warn(_ENTRIES[kind], f"on dataloader {dataloader_idx}: {message}")
        if not bool(values["risk_estimate"].isfinite()):
            return {}
        self.fit_state.calibrations[dataloader_idx] = metric.calibration
        if dataloader_idx == 0:
            self._remember(trainer, values, metric.estimate_without_labels)
        values.pop("risk_label_stderr", None)
        return values

    def values_without_measurement(self, dataloader_idx: int) -> dict[str, Tensor]:
        """Return the worst possible score if a fit begins without a value, since EarlyStopping ends without one."""
        if dataloader_idx in self.fit_state.calibrations:  # there was a value
            return {}
        message = "has no first value, and logs the worst possible score in its place, so that training continues."
        self.reporter.warn("failed", message, kind="first value")
        device = None if self._module is None else self._module.device
        return {"risk_estimate": torch.tensor(TASKS[self.task].max_score, device=device)}

    def _fix_sizes(self, trainer: Trainer) -> None:
        """Fix n and w in the first validation, so that only the model can move the curve; every process comes here."""
        state = self.fit_state
        if state.num_training is not None or self._training is None:
            return
        state.num_training = self._training.count_labelled(trainer, self.num_training)
        module = trainer.lightning_module
        state.num_weights = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)

    def _remember(self, trainer: Trainer, values: Mapping[str, Tensor], estimate_without_labels: float) -> None:
        """Remember what the closing line needs."""
        found = {name.removeprefix("risk_"): float(value) for name, value in values.items()}
        deviation = 0.0
        if "label_score" in found:
            difference = found["label_score"] - estimate_without_labels
            deviation = difference / found["label_stderr"] if found["label_stderr"] > 0 else 0.0
        self.fit_state.history.append(Measured(trainer.current_epoch, found["estimate"], deviation))

    def _warn_of_new(self, module: LightningModule, initial: Mapping[str, Tensor]) -> None:
        new = unknown_parameters(module, initial)
        if new:
            message = f"has no initial weights for {', '.join(new[:3])}: they count as entirely learned."
            self.reporter.warn("initial-weights", message)

    def forget_samples(self) -> None:
        """Forget the kept validation samples, and what is kept beside them."""
        super().forget_samples()
        self._companions = {}
        if self._training is not None:
            self._training.samples.forget_outputs()

    def _free(self) -> None:
        """Free the kept training samples, too."""
        super()._free()
        self._module = None
        self._is_refused = False
        self._training = None


def _check_optional(initial_weights: object, num_training: object) -> None:
    """Check arguments that may be None."""
    is_mapping = isinstance(initial_weights, Mapping | None)
    check_argument("initial_weights", initial_weights, is_mapping, "a state dict, as in a checkpoint, or None")
    if num_training is not None:
        check_int("num_training", num_training, 1)


def _is_new(trainer: Trainer) -> bool:
    """Return whether nothing was trained yet; raw optimizers do not count steps."""
    return trainer.global_step == 0 and trainer.current_epoch == 0
