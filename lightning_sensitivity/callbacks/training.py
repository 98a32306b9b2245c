"""The training samples that a RiskMonitor keeps in a fit."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import IterableDataset

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import Selector, see
from lightning_sensitivity.callbacks.companions import BatchReader, Companions
from lightning_sensitivity.callbacks.risk_passes import check_outputs
from lightning_sensitivity.callbacks.samples import MAX_BYTES, KeptSamples, make_call
from lightning_sensitivity.functional.tasks import TASKS, has_ignored_value
from lightning_sensitivity.functional.tensors import num_outputs
from lightning_sensitivity.model import isolated

NUM_SAMPLES = 1000  # over all processes


class TrainingSamples:
    """Keep the first training batches of a fit, and count how many different samples there are.

    Args:
        task: The kind of classification.
        reader: Reads labels and features.
        inputs: How the model is called; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: How outputs are selected.
        world_size: Number of processes.

    Attributes:
        samples: The samples.
        companions: Their labels and features.
    """

    def __init__(
        self, task: str, reader: BatchReader, inputs: Selector | None, outputs: Selector | None, world_size: int
    ) -> None:
        self.samples = KeptSamples(0, math.inf, math.ceil(NUM_SAMPLES / world_size), MAX_BYTES)
        self.companions = Companions()
        self._task = TASKS[task]
        self._reader = reader
        self._inputs = inputs
        self._outputs = outputs

    def keep(self, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep a batch with its labels and features; the first one shows whether there can be an estimate.

        Raises:
            MisconfigurationException: If labels or outputs have no estimate.
        """
        call = make_call(module, batch, self._inputs, self._outputs)
        with isolated(module) as run, module.trainer.precision_plugin.val_step_context():
            labels = run(self._reader.labels, module, batch)
            features = run(self._reader.features, batch, len(labels)) if self._reader.has_features else None
            if self.companions.num_outputs == 0:
                outputs = run(call)
                check_outputs(outputs, self._task)
                self._check_labels(outputs, labels)
                self.companions.num_outputs = num_outputs(outputs)
        self._check_labels(torch.zeros(call.size or len(labels), self.companions.num_outputs), labels)
        if self.samples.add(call, batch_idx, len(labels)):
            self.companions.labels[batch_idx] = labels
            if features is not None:
                self.companions.features[batch_idx] = features

    def check_number(self, trainer: Trainer, given: int | None) -> None:
        """Raise MisconfigurationException if the number of different samples is neither known nor given."""
        if given is None and count_training_samples(trainer, self.samples.size) is None:
            raise MisconfigurationException(
                "the number of different training samples is unknown, since the loader is a stream or there are "
                f"several: set `num_training=`.{see('num-training')}"
            )

    def count_labelled(self, trainer: Trainer, given: int | None) -> int:
        """Count the labelled samples by the share of kept ones that have a label; every process must call it.

        Args:
            trainer: The Trainer.
            given: The number of samples, if the user gives it.
        """
        labels = self.companions.labels.values()
        counts = torch.tensor([sum(map(_num_labelled, labels)), sum(map(len, labels))], dtype=torch.float32)
        counts = counts.to(trainer.strategy.root_device)
        num_labelled, num_kept = trainer.strategy.reduce(counts, reduce_op="sum").tolist()
        size = given or count_training_samples(trainer, len(next(iter(labels)))) or 1
        return max(1, int(size * num_labelled / num_kept + 0.5))

    def _check_labels(self, outputs: Tensor, labels: Tensor) -> None:
        try:
            self._task.check(outputs, labels)
        except ValueError as error:
            raise MisconfigurationException(f"{error}.{see('task')}") from error


def count_training_samples(trainer: Trainer, batch_size: int) -> int | None:
    """Count the different samples that a fit trains on, over all processes; None if that is unknown.

    Args:
        trainer: The Trainer in a fit.
        batch_size: The number of samples of the first batch.
    """
    loader, *others = compat.training_loaders(trainer)[0]
    dataset = getattr(loader, "dataset", None)
    size = sized_len(dataset)
    if others or size is None or isinstance(dataset, IterableDataset):
        return None
    if getattr(loader, "batch_sampler", None) is None:  # each item is a batch
        return size * batch_size
    num_drawn = sized_len(getattr(loader, "sampler", None))
    return size if num_drawn is None else min(size, num_drawn * trainer.world_size)


def _num_labelled(labels: Tensor) -> int:
    """Count the samples of a batch that have a label."""
    return int((~has_ignored_value(labels)[:, None].flatten(1).all(1)).sum())
