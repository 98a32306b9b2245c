"""The training samples of a run: a few that are run in each validation, and more that a reference learns from."""

from __future__ import annotations

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sensitivity.functional.reference import MAX_SAMPLES
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import KeptBatch, KeptSamples

NUM_SCORED = 600  # training samples that are run in each validation, over all processes


class TrainingSamples:
    """Keep training samples as they come: evenly spaced batches of the first epoch of a run.

    Args:
        reader: Reads batches, and their labels.
        task: The task, which says which labels count.
        output_shape: The shape of the outputs for a sample.
        num_processes: How many processes keep samples.

    Attributes:
        scored: Those that are run.
        known: Those that a reference learns from: what it sees of them, and their labels.
    """

    def __init__(self, reader: BatchReader, task: Task, output_shape: tuple[int, ...], num_processes: int = 1) -> None:
        self.output_shape = output_shape
        self.scored = KeptSamples(NUM_SCORED / num_processes)
        self.known = KeptSamples(math.ceil(MAX_SAMPLES / num_processes))
        self._reader = reader
        self._task = task

    @property
    def num_outputs(self) -> int:
        """K, the number of outputs for a sample."""
        return math.prod(self.output_shape)

    @property
    def is_full(self) -> bool:
        """Whether there are as many samples as are wanted, or no more are."""
        return self.scored.is_full and self.known.is_full

    def keep(self, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep a batch, if its turn has come."""
        is_scored, is_known = self.scored.wants(batch_idx), self.known.wants(batch_idx)
        if not is_scored and not is_known:
            return
        labels = self._reader.labels(module, batch, self.output_shape)
        call = self._reader.call(module, batch)
        size = max(1, int(self._task.has_label(labels).sum()))  # most of a batch may be unlabelled, but it has come
        if is_scored:
            self.scored.add(KeptBatch(batch_idx, size, call.copy_to_cpu(), labels))
        if is_known:
            seen = self._reader.seen(module, batch, call, len(labels))
            self.known.add(KeptBatch(batch_idx, size, labels=labels, seen=seen))

    def forget_known(self) -> None:
        """Free what a reference has learned from."""
        self.known = KeptSamples(0)

    def complete(self) -> None:
        """Keep no more: a new epoch repeats the samples."""
        self.scored.complete()
        self.known.complete()


def gather(trainer: Trainer, values: Tensor, padding: float = 0.0) -> Tensor:
    """Concatenate the rows of all processes; every process must call it.

    Args:
        trainer: The Trainer.
        values: Rows on the CPU, ``(N, ...)``, of any N.
        padding: What fills rows that are shorter than those of another process.
    """
    if trainer.world_size == 1:
        return values
    parts = [part.cpu() for part in gather_all_tensors(values.to(trainer.strategy.root_device))]
    if values.ndim != 2:
        return torch.cat(parts)
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=padding) for part in parts])
