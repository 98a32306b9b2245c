"""The samples that a monitor measures in every validation: batches of a loader, kept once, on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import Selector
from lightning_sensitivity.functional.tasks import has_ignored_value
from lightning_sensitivity.model import ModelCall, isolated

MAX_BYTES = 2**29  # of the validation samples in a process, and as much again for training samples


@dataclass(eq=False)
class KeptBatch:
    """Hold a batch as it came from the loader, on the CPU.

    Attributes:
        index: Its index in its loader.
        call: The call of the model on it.
        size: Its number of samples.
        labels: Its labels; None if it has none, or none are wanted.
        features: What the user's function returns for the reference, ``(N, D)``; None without one.
    """

    index: int
    call: ModelCall
    size: int
    labels: Tensor | None = None
    features: Tensor | None = None


class KeptSamples:
    """Keep whole batches of a loader, evenly spaced, since data may be sorted; of a stream, the first ones.

    Args:
        dataloader_idx: The index of the loader.
        num_batches: Number of batches of the loader; inf if it is unknown, or to keep the first ones.
        num_wanted: How many samples to keep in this process; inf for all.
        num_labelled: How many samples with labels to keep first, wherever they are.
        max_bytes: How many bytes the samples may take.

    Attributes:
        batches: The batches, in the order of the loader.
        is_complete: Whether no more batches are wanted.
        is_truncated: Whether samples were left out for lack of memory.
    """

    def __init__(
        self,
        dataloader_idx: int,
        num_batches: float,
        num_wanted: float,
        num_labelled: float = 0,
        max_bytes: float = MAX_BYTES,
    ) -> None:
        self.dataloader_idx = dataloader_idx
        self.batches: list[KeptBatch] = []
        self.is_complete = num_wanted == 0
        self.is_truncated = False
        self._num_batches = num_batches
        self._num_wanted = num_wanted
        self._num_labelled = num_labelled
        self._max_bytes = max_bytes
        self._chosen: set[int] | None = None  # indices; None for every batch, until there are enough
        self._num_seen, self._stride = 0, 1  # of batches with labels, of which one in a stride is kept

    @property
    def size(self) -> int:
        """Number of samples."""
        return _count(self.batches)

    def split(self, values: Tensor) -> Sequence[Tensor]:
        """Split values of all samples, ``(N, ...)``, into those of each batch."""
        return torch.split(values, [batch.size for batch in self.batches])

    def wants(self, batch_idx: int, has_labels: bool = False) -> bool:
        """Return whether to keep a batch."""
        if self.is_complete:
            return False
        if has_labels and self._num_labelled > 0:
            return True
        is_chosen = self._chosen is None or batch_idx in self._chosen
        return is_chosen and _count(self._with_labels(False)) < self._num_wanted

    def add(self, batch: KeptBatch) -> None:
        """Keep a batch, unless it is empty or too large; the size of the first one decides which others."""
        if batch.size == 0 or not self._takes_labels_of(batch):
            return
        num_bytes = sum(each.call.num_bytes for each in self.batches)
        if not self.batches:
            self._choose(batch.size, batch.call.num_bytes)
        elif num_bytes + batch.call.num_bytes > self._max_bytes:
            self.is_truncated = self.is_complete = True
            return
        self.batches.append(batch)
        labelled = self._with_labels(True)
        if _count(labelled) > 2 * self._num_labelled:  # a loader may have labels everywhere
            self.batches = [batch for batch in self.batches if batch not in labelled[1::2]]
            self._stride *= 2

    def _takes_labels_of(self, batch: KeptBatch) -> bool:
        """Count a batch with labels, and return whether it is its turn; the others are always taken."""
        if self._num_labelled == 0 or batch.labels is None:
            return True
        self._num_seen += 1
        return (self._num_seen - 1) % self._stride == 0

    def complete(self) -> None:
        """Want no more, unless none has come, and keep as few as are wanted: those with labels first."""
        self.is_complete = self.is_complete or bool(self.batches)
        labelled, others = spread(self._with_labels(True), self._num_labelled), self._with_labels(False)
        if labelled:
            others = spread(others, self._num_wanted - _count(labelled))
        self.batches = sorted(labelled + others, key=lambda batch: batch.index)

    def _with_labels(self, has_labels: bool) -> list[KeptBatch]:
        is_wanted = self._num_labelled > 0
        return [batch for batch in self.batches if (is_wanted and batch.labels is not None) == has_labels]

    def _choose(self, size: int, num_bytes: int) -> None:
        """Choose batches by the size of the first one."""
        num_chosen = min(self._num_batches, self._num_wanted / size)
        num_possible = max(1, self._max_bytes // max(1, num_bytes))
        if num_possible < num_chosen < math.inf:
            self.is_truncated = True
            num_chosen = num_possible
        if self._num_batches < math.inf:
            self._chosen = set(_evenly_spaced(int(self._num_batches), math.ceil(num_chosen)))


def _count(batches: Sequence[KeptBatch]) -> int:
    """Count the samples of batches."""
    return sum(batch.size for batch in batches)


def count_labels(batches: Sequence[KeptBatch]) -> int:
    """Count the samples of batches that have a label that is not ignored."""
    labels = [batch.labels for batch in batches if batch.labels is not None]
    return sum(int((~has_ignored_value(each)[:, None].flatten(1).any(1)).sum()) for each in labels)


def spread(batches: Sequence[KeptBatch], num_samples: float) -> list[KeptBatch]:
    """Choose evenly spaced batches that hold a number of samples, or a little more."""
    count, size = len(batches), _count(batches)
    num_chosen = count if size <= num_samples or size == 0 else math.ceil(max(0, num_samples) * count / size)
    return [batches[index] for index in _evenly_spaced(count, num_chosen)]


def _evenly_spaced(count: int, num_chosen: int) -> list[int]:
    """Choose some of the numbers from 0 to ``count`` - 1."""
    return [-(-index * count // num_chosen) for index in range(num_chosen)]


def keep_validation_samples(trainer: Trainer, num_samples: int | None, num_labelled: int) -> list[KeptSamples]:
    """Prepare to keep samples of each validation loader.

    Args:
        trainer: The Trainer, at the start of a validation.
        num_samples: How many samples of each loader, over all processes; None for all.
        num_labelled: How many samples with labels to keep first, over all processes.
    """
    counts = compat.num_batches(trainer)
    num_wanted = math.inf if num_samples is None else num_samples / trainer.world_size
    max_bytes = MAX_BYTES / max(1, len(counts))
    num_labelled_here = num_labelled / trainer.world_size
    return [KeptSamples(i, count, num_wanted, num_labelled_here, max_bytes) for i, count in enumerate(counts)]


def make_call(module: nn.Module, batch: object, inputs: Selector | None, outputs: Selector | None) -> ModelCall:
    """Make the call on a batch, in isolation if the user's function may draw random numbers."""
    if inputs is None:
        return ModelCall(module, batch, inputs, outputs)
    with isolated(module) as run:
        return run(ModelCall, module, batch, inputs, outputs)


def copy_batch(
    module: LightningModule, batch: object, batch_idx: int, inputs: Selector | None, outputs: Selector | None
) -> KeptBatch:
    """Copy a batch to the CPU; its outputs show its size if its inputs do not, as with graphs."""
    call = make_call(module, batch, inputs, outputs)
    size = call.size
    if size == 0:
        with isolated(module) as run, module.trainer.precision_plugin.val_step_context():
            size = len(run(call))
    return KeptBatch(batch_idx, call.copy_to_cpu(), size)
