"""The risk estimate in one validation, from validation samples, kept training samples and any validation labels."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sensitivity.callbacks import trainer as checks
from lightning_sensitivity.callbacks.batches import Batch, CleanOutputs, Group, Queue
from lightning_sensitivity.callbacks.fit import Phase
from lightning_sensitivity.callbacks.samples import TrainingSamples
from lightning_sensitivity.callbacks.session import Session
from lightning_sensitivity.callbacks.twin_passes import TwinPasses, join_small
from lightning_sensitivity.functional.risk import LABEL_WEIGHT, TWIN_STRENGTH
from lightning_sensitivity.functional.risk_sums import holdout_sums, label_sums
from lightning_sensitivity.functional.tasks import Task, has_ignored_value
from lightning_sensitivity.functional.tensors import num_outputs
from lightning_sensitivity.metric import RiskEstimate
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.twins import has_batch_norm, unknown_parameters

if TYPE_CHECKING:
    from lightning_sensitivity.callbacks.risk import RiskMonitor

LABEL_NAMES = ("risk_label_score", "risk_num_labels")
_KEPT = -1  # instead of the index of a loader: the kept training samples
_LEFT_OUT = "left out some training samples, since the model failed on them"
_NO_SCORE = "could not score the labels of a validation batch"


class RiskSession(Session):
    """Measure what the risk estimate needs in a validation.

    Args:
        monitor: The monitor.
        trainer: The Trainer, at the start of a validation.
        clean: Clean outputs, shared with other monitors.
    """

    monitor: RiskMonitor

    def __init__(self, monitor: RiskMonitor, trainer: Trainer, clean: CleanOutputs) -> None:
        super().__init__(monitor, trainer, clean)
        self.labelled = Queue(self._score_labelled, can_wait=self.facts.can_join is not False)
        self._twins: TwinPasses | None = None
        self._training: Tensor | None = None  # sums over the kept training samples

    @property
    def is_estimating(self) -> bool:
        """Whether there can be an estimate: not in the sanity check, nor before the first training batch."""
        return self.monitor.fit_state.phase is Phase.ESTIMATING and not self.trainer.sanity_checking

    @property
    def samples(self) -> TrainingSamples:
        """The kept training samples."""
        samples = self.monitor.fit_state.samples
        assert samples is not None
        return samples

    @property
    def task(self) -> Task:
        """The task, once a training batch has been kept."""
        assert self.samples.task is not None
        return self.samples.task

    # Batches

    def collect(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
        """Put a batch into the queue if it is chosen; otherwise into the queue of labelled batches if it has labels."""
        selection = self.selections[dataloader_idx]
        is_chosen = selection.includes(batch_idx)
        super().collect(batch, batch_idx, dataloader_idx)
        if not self.monitor.validation_labels or not self.is_estimating:
            return
        if not is_chosen:
            prepared = self.make_batch(batch, batch_idx, dataloader_idx)
            if prepared.targets is not None and _has_label(prepared.targets):
                self.labelled.add(prepared, is_last=False)
        if batch_idx + 1 == selection.num_batches:
            self.labelled.flush()

    def make_batch(self, batch: Any, batch_idx: int, dataloader_idx: int) -> Batch:
        """Prepare a batch, with its labels if they are scored."""
        prepared = super().make_batch(batch, batch_idx, dataloader_idx)
        if self.monitor.validation_labels and self.is_estimating:
            prepared.targets = self._labels_of(batch)
        return prepared

    def flush(self) -> None:
        """Measure all batches that wait."""
        super().flush()
        self.labelled.flush()

    def make_metric(self) -> RiskEstimate:
        """Make the metric of a loader."""
        task = self.task.name if self.is_estimating else "multiclass"
        return RiskEstimate(task, strength=TWIN_STRENGTH, has_batch_norm=has_batch_norm(self.module))

    def measure(self, run: RunIsolated, group: Group) -> None:
        """Run the model and its twins on a group of batches."""
        if not self.is_estimating:
            self.clean.get(run, group)
            return
        if self._twins is None:  # before the outputs of the group are in memory
            self._score_training_samples()
            self._twins = self._make_twins()
        outputs = self.clean.get(run, group)
        if self.samples.num_outputs != num_outputs(outputs):
            raise ValueError(
                f"Expected {self.samples.num_outputs} outputs, as training samples have, got {num_outputs(outputs)} "
                "outputs of validation samples"
            )
        num_batches = self.selections[group.dataloader_idx].num_selected * self.trainer.world_size
        num_total = num_batches * group.batches[0].size
        key = self.monitor.seed, self.trainer.global_rank, group.dataloader_idx, group.batches[0].batch_idx
        sums = torch.zeros(())
        for twin in join_small(self._twins.passes(run, group.call, outputs, key, num_total)):
            part = holdout_sums(outputs[twin.samples], twin.outputs, self.task, twin.reference)
            sums = sums.to(part.device) + twin.weight * part
        labels = self._label_sums(outputs, group)
        metric = self.metric(group.dataloader_idx)
        metric.add_sums("holdout", sums)
        if labels is not None:
            metric.add_sums("labels", labels)

    def compute_values(self, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Compute the values of a loader, and the warnings about them."""
        if not self.is_estimating:
            return {}, {}
        metric = self.metric(dataloader_idx)
        self._add_training_samples(metric)
        values, messages = metric.compute(), metric.messages
        is_finite = all(bool(value.isfinite()) for value in values.values())
        if self.monitor.validation_labels:
            self._add_label_values(values, messages)
        # If outputs are nan or inf, nan is logged; if our own passes failed, nothing is.
        if "no variance" in messages or (not is_finite and "non-finite" not in messages):
            return {}, messages
        if dataloader_idx == 0:
            self.monitor.fit_state.history.append((self.trainer.current_epoch, float(values["risk_estimate"])))
        return values, messages

    # Training samples

    def _make_twins(self) -> TwinPasses:
        """Make the object that runs the twins of this validation."""
        initial = self.monitor.initial.weights
        assert initial is not None
        new = unknown_parameters(self.module, initial)
        if new:
            self.failures.warn(
                "new", f"has no initial weights for {', '.join(new[:3])}: they count as entirely learned."
            )
        device_weights = {name: weight.to(self.module.device) for name, weight in initial.items()}
        return TwinPasses(self.module, device_weights, has_batch_norm(self.module), self.facts)

    def _score_training_samples(self) -> None:
        """Score the kept samples with the weights of this validation.

        This runs in a batch hook, since only there are averaged weights in place.
        """
        if self.monitor.task == "auto":
            self.samples.check_classes()
        largest = max((facts.elements_per_sample for facts in self.facts.loaders.values()), default=1.0)
        queue = Queue(
            lambda batches: self.measure_together(batches, self._score_kept_group, _LEFT_OUT),
            can_wait=self.facts.can_join is not False,
        )
        for index, kept in enumerate(self.samples.batches):
            with self.failures.warn_on_failure(_LEFT_OUT):
                call = self.prepare(move_data_to_device(kept.batch, self.module.device))
                size = len(kept.targets)
                queue.add(Batch(call, index, _KEPT, size, size * largest, kept.targets), is_last=False)
        queue.flush()

    def _score_kept_group(self, run: RunIsolated, group: Group) -> None:
        outputs = run(group.call)
        self.samples.num_outputs = num_outputs(outputs)
        sums = label_sums(outputs, group.targets(), self.task)
        self._training = sums if self._training is None else self._training + sums

    def _add_training_samples(self, metric: RiskEstimate) -> None:
        """Add the scores of the kept samples, and the number of training samples; every process must call it."""
        if self._training is not None:  # else this process had no batch
            metric.add_sums("training", self._training)
        self.monitor.num_training = self.samples.num_training(self.trainer)
        metric.set_size(max(1, self.monitor.num_training), checks.num_trained_weights(self.module))

    # Validation labels

    def _labels_of(self, batch: Any) -> Tensor | None:
        """Select the labels of a validation batch, even if all are -100; None if the batch has none."""
        try:
            return self.monitor.select_targets(self.module, batch).clone()  # the user's step may write to them
        except MisconfigurationException as error:
            if self.monitor.targets is not None:
                self.failures.warn("targets", f"takes some validation batches as unlabelled: {error}")
            return None

    def _label_sums(self, outputs: Tensor, group: Group) -> Tensor | None:
        """Score the labels of each batch separately, so that invalid ones cost only the labels of their batch."""
        total = None
        sizes = [batch.size for batch in group.batches]
        parts = torch.split(outputs, sizes) if len(sizes) > 1 else (outputs,)
        for batch, part in zip(group.batches, parts, strict=True):
            if batch.targets is None:
                continue
            with self.failures.warn_on_failure(_NO_SCORE, "The estimate does not use them."):
                targets = batch.targets.to(part.device)
                self.task.check(part, targets)
                sums = label_sums(part, targets, self.task)
                total = sums if total is None else total + sums
        return total

    def _score_labelled(self, batches: list[Batch]) -> None:
        """Score the labels of batches that were not chosen."""
        self.measure_together(batches, self._score_labelled_group, _NO_SCORE)

    def _score_labelled_group(self, run: RunIsolated, group: Group) -> None:
        labels = self._label_sums(run(group.call), group)
        if labels is not None:
            self.metric(group.dataloader_idx).add_sums("labels", labels)

    def _add_label_values(self, values: dict[str, Tensor], messages: dict[str, str]) -> None:
        values.setdefault("risk_label_score", torch.full_like(values["risk_estimate"], math.nan))
        num_labels = int(values.setdefault("risk_num_labels", torch.zeros_like(values["risk_estimate"])))
        if num_labels == 0 and not self.failures.has_warned(_NO_SCORE):
            messages["no labels"] = (
                "No validation batch has labels, so `risk_estimate` does not use any. If there are some, set "
                "`targets=`."
            )
        elif num_labels > 0 and not self.monitor.fit_state.history:
            rank_zero_info(
                f"`RiskMonitor` ({self.monitor.prefix}*): uses {num_labels} validation labels; the estimate counts "
                f"as much as {LABEL_WEIGHT} labels."
            )


def _has_label(targets: Tensor) -> bool:
    return not bool(has_ignored_value(targets).all())
