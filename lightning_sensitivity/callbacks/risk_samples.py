"""What a RiskMonitor keeps beside validation samples: training samples, labels, features, and the references."""

from __future__ import annotations

import math

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.arguments import Selector, describe, see
from lightning_sensitivity.callbacks.checks import Reporter, check_outputs, describe_error
from lightning_sensitivity.callbacks.groups import Group, KeptBatch, make_call, make_group
from lightning_sensitivity.callbacks.reference import fit_to_kept
from lightning_sensitivity.callbacks.samples import KeptSamples
from lightning_sensitivity.functional.reference import Reference
from lightning_sensitivity.functional.tasks import Task, has_ignored_value
from lightning_sensitivity.model import isolated, select_targets
from lightning_sensitivity.model.batches import clone_tensors

NUM_TRAINING = 1000  # samples that are kept, over all processes
NUM_LABELS = 1200  # validation samples that are kept for their labels, over all processes


class RiskSamples:
    """Keep what the risk estimate needs in a run beside unlabelled validation samples.

    Args:
        task: The kind of classification.
        inputs: How the model is called; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: How outputs are selected.
        targets: The user's function ``batch -> labels``, or None.
        features: The user's function ``batch -> (N, D)``, or None.
        reporter: Says what is wrong with labels and features.

    Attributes:
        is_started: Whether the fit has had a training batch.
        training: The first training samples, with labels.
        labelled: By loader, validation batches that are only kept for their labels.
        references: By loader and number of training samples; None if there can be none.
    """

    def __init__(
        self,
        task: Task,
        inputs: Selector | None,
        outputs: Selector | None,
        targets: Selector | None,
        features: Selector | None,
        reporter: Reporter,
    ) -> None:
        self.is_started = False
        self.training = KeptSamples(0, math.inf, 0, is_growing=True)  # wants none until the fit has started
        self.labelled: dict[int, KeptSamples] = {}
        self.references: dict[tuple[int, int], Reference | None] = {}
        self._task = task
        self._selectors = inputs, outputs
        self._targets = targets
        self._features = features
        self._reporter = reporter
        self._output_shape: tuple[int, ...] | None = None  # for a sample; known once the fit has started

    def forget_validation(self) -> None:
        """Forget what is kept beside validation samples."""
        self.labelled = {}
        self.references = {}
        self.training.forget_outputs()

    def beside(self, samples: KeptSamples) -> list[KeptSamples]:
        """Return what is measured with the samples of a loader."""
        labelled = self.labelled.get(samples.dataloader_idx)
        return [self.training] if labelled is None else [labelled, self.training]

    # Training samples

    def start_training(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep the first training batch if its outputs and labels allow an estimate.

        Raises:
            MisconfigurationException: If they don't.
        """
        with isolated(module) as run, trainer.precision_plugin.val_step_context():
            outputs = run(make_call(module, batch, *self._selectors))
        check_outputs(outputs, self._task)
        self._output_shape = tuple(outputs.shape[1:])
        group = self._make_training_group(module, batch, batch_idx)
        self.training = KeptSamples(0, math.inf, math.ceil(NUM_TRAINING / trainer.world_size), is_growing=True)
        self.training.add(group)
        self.references = {}

    def must_start(self, batch_idx: int) -> bool:
        """Return whether to start with a training batch: the first one of a fit, or, after a resume, of an epoch."""
        is_late = self.training.groups != [] and self.training.batches[0].index > 0
        return not self.is_started or (batch_idx == 0 and is_late)

    def keep_training(self, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep another training batch if its samples are wanted.

        Raises:
            MisconfigurationException: If labels do not fit the task.
        """
        if self.training.wants(batch_idx):
            self.training.add(self._make_training_group(module, batch, batch_idx))

    def _make_training_group(self, module: LightningModule, batch: object, batch_idx: int) -> Group:
        """Copy a batch with its labels and features."""
        group = make_group(module, batch, batch_idx, *self._selectors)
        kept = group.batches[0]
        try:
            kept.labels = self._select_labels(module, batch, kept.size)
        except ValueError as error:
            raise MisconfigurationException(f"{error}.{see('task')}") from error
        kept.features = self._select_features(module, batch, kept.size)
        return group

    # Beside validation samples

    def keep_features(self, module: LightningModule, batch: object, kept: KeptBatch) -> None:
        """Keep the features of a validation batch that is kept."""
        kept.features = self._select_features(module, batch, kept.size)

    def keep_labels(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep the labels of a validation batch, or, if it is not kept itself, a batch for its labels.

        Args:
            module: The module.
            batch: The batch.
            batch_idx: Its index.
            samples: The samples of its loader.
        """
        index, num_wanted = samples.dataloader_idx, NUM_LABELS / module.trainer.world_size
        new = KeptSamples(index, samples.num_batches, num_wanted, samples.max_bytes)
        labelled = self.labelled.setdefault(index, new)
        kept = samples.find(batch_idx)
        if kept is not None:
            kept.labels = self._find_labels(module, batch, kept.size)
            has_labels = kept.labels is not None
        elif labelled.wants(batch_idx):
            group = make_group(module, batch, batch_idx, *self._selectors)
            group.batches[0].labels = self._find_labels(module, batch, group.size)
            has_labels = group.batches[0].labels is not None
            if has_labels:
                labelled.add(group)
        else:
            return
        if not has_labels and not labelled.groups:
            labelled.num_batches = math.inf  # labels are scattered: keep them as they come

    def find_reference(self, samples: KeptSamples) -> Reference | None:
        """Fit the reference of a loader, once for the same training samples; say it if there can be none."""
        key = samples.dataloader_idx, self.training.size
        if key in self.references or not self.training.groups or not samples.groups:
            return self.references.get(key)
        self.references = {other: found for other, found in self.references.items() if other[0] != key[0]}
        num_outputs, has_features = math.prod(self._output_shape or ()), self._features is not None
        try:
            with torch.autocast("cpu", enabled=False):
                self.references[key] = fit_to_kept(self.training, samples, num_outputs, self._task, has_features)
        except (RuntimeError, ValueError) as error:
            self.references[key] = None
            self._reporter.warn(
                "features",
                f"has no reference: {describe_error(error)} Set `features=` to a function `batch -> (N, D)`. Until "
                "then, the estimate does without one.",
            )
        return self.references[key]

    # What the user's functions return, of copies of batches, since they may write to them

    def _find_labels(self, module: LightningModule, batch: object, size: int) -> Tensor | None:
        """Select the labels of a validation batch; None if it has none."""
        try:
            labels = self._select_labels(module, batch, size)
        except (MisconfigurationException, ValueError) as error:
            if self._targets is not None or isinstance(error, ValueError):
                self._reporter.warn("labels", f"takes some validation batches as unlabelled: {describe_error(error)}")
            return None
        return None if bool(has_ignored_value(labels).all()) else labels

    def _select_labels(self, module: LightningModule, batch: object, size: int) -> Tensor:
        """Select the labels of a batch, or raise ValueError if they do not fit the task."""
        with isolated(module) as run:
            labels = run(select_targets, module, batch, self._targets).detach().to("cpu", copy=True)
        if self._output_shape is not None:
            self._task.check(torch.zeros(size, *self._output_shape), labels)
        return labels

    def _select_features(self, module: LightningModule, batch: object, size: int) -> Tensor | None:
        """Call the user's function for the features of a batch, ``(N, D)``; None without one."""
        if self._features is None:
            return None
        try:
            with isolated(module) as run:
                values: object = run(self._features, clone_tensors(batch))
        except Warning:
            raise
        except Exception as error:
            raise MisconfigurationException(
                f"`features` failed on {describe(batch)}: {type(error).__name__}: {error}.{see('features')}"
            ) from error
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != size:
            expected = f"a function that returns a tensor ({size}, D)"
            message = f"`features` should be {expected}, got {describe(values)}.{see('features')}"
            raise MisconfigurationException(message)
        return values.detach().cpu().float().flatten(1)
