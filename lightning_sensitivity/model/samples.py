"""The samples that are measured again and again: batches of a loader, kept once, on the CPU."""

import math
from bisect import insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from lightning_sensitivity.functional.tasks import has_label
from lightning_sensitivity.model.call import ModelCall

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
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
        has_rows: Whether rows of its inputs may be samples; not so if the first dimension is time.
    """

    index: int
    call: ModelCall
    size: int
    labels: Tensor | None = None
    features: Tensor | None = None
    has_rows: bool = True

    @property
    def num_bytes(self) -> int:
        """The memory of its inputs and features."""
        return self.call.num_bytes + (0 if self.features is None else self.features.nbytes)


def _turn(batch_idx: int) -> float:
    """Return when it is a batch's turn: by the fraction of a multiple of the golden ratio.

    Batches with the lowest fractions are evenly spaced, whatever the period of the data, such as that of a
    stream whose workers read one part of it each.
    """
    return batch_idx * _GOLDEN_RATIO % 1


def _turn_of(batch: KeptBatch) -> float:
    return _turn(batch.index)


class _EvenlySpaced:
    """Keep evenly spaced batches of however many: of too many, that with the last turn goes.

    Args:
        num_wanted: How many samples to keep; inf for all.
        max_bytes: How many bytes they may take.
    """

    def __init__(self, num_wanted: float, max_bytes: float) -> None:
        self.batches: list[KeptBatch] = []  # by their turn
        self.size = 0
        self.is_truncated = False  # for lack of memory
        self.num_wanted = num_wanted
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._last_turn = 1.0

    def wants(self, batch_idx: int) -> bool:
        return _turn(batch_idx) < self._last_turn

    def add(self, batch: KeptBatch) -> None:
        insort(self.batches, batch, key=_turn_of)
        self.size += batch.size
        self._num_bytes += batch.num_bytes
        while self._num_bytes > self._max_bytes and len(self.batches) > 1:
            self.is_truncated = True
            self._drop_last()
        self.reduce_to(self.num_wanted)

    def reduce_to(self, num_samples: float) -> None:
        """Keep as few batches as hold a number of samples."""
        while self.batches and self.size - self.batches[-1].size >= num_samples:
            self._drop_last()

    def _drop_last(self) -> None:
        batch = self.batches.pop()
        self.size -= batch.size
        self._num_bytes -= batch.num_bytes
        self._last_turn = _turn_of(batch)


class KeptSamples:
    """Keep whole batches of a loader, evenly spaced, since data may be sorted.

    Args:
        dataloader_idx: The index of the loader.
        num_wanted: How many samples to keep in this process; inf for all.
        num_labelled: How many samples with labels to keep first, wherever they are.
        max_bytes: How many bytes the samples may take.

    Attributes:
        is_complete: Whether no more batches are wanted.
    """

    def __init__(
        self, dataloader_idx: int, num_wanted: float, num_labelled: float = 0, max_bytes: float = MAX_BYTES
    ) -> None:
        self.dataloader_idx = dataloader_idx
        self.is_complete = False
        max_bytes /= 2 if num_labelled > 0 else 1
        self._labelled, self._others = (_EvenlySpaced(num, max_bytes) for num in (num_labelled, num_wanted))

    @property
    def batches(self) -> list[KeptBatch]:
        """The batches, in the order of the loader."""
        return sorted(self._labelled.batches + self._others.batches, key=attrgetter("index"))

    @property
    def size(self) -> int:
        """Number of samples."""
        return self._labelled.size + self._others.size

    @property
    def is_full(self) -> bool:
        """Whether there are as many samples as are wanted, or no more are."""
        return self.is_complete or self.size >= self._others.num_wanted

    @property
    def is_truncated(self) -> bool:
        """Whether samples are missing for lack of memory."""
        return self._others.is_truncated and self.size < self._others.num_wanted

    def wants(self, batch_idx: int, has_labels: bool = False) -> bool:
        """Return whether to keep a batch: one without labels only until those with labels are enough."""
        is_needed = has_labels or self._labelled.size < self._others.num_wanted
        return is_needed and not self.is_complete and self._part(has_labels).wants(batch_idx)

    def add(self, batch: KeptBatch) -> None:
        """Keep a batch, unless it is empty."""
        if batch.size > 0:
            self._part(batch.labels is not None).add(batch)

    def complete(self) -> None:
        """Want no more, unless none has come, and keep as few as are wanted: those with labels first."""
        if not self.is_complete and self.size > 0:
            self.is_complete = True
            self._others.reduce_to(self._others.num_wanted - self._labelled.size)

    def split(self, values: Tensor | None) -> Sequence[Tensor | None]:
        """Split values of all samples, ``(N, ...)``, into those of each batch, if there are any."""
        sizes = [batch.size for batch in self.batches]
        return [None] * len(sizes) if values is None else torch.split(values, sizes)

    def _part(self, has_labels: bool) -> _EvenlySpaced:
        return self._labelled if has_labels and self._labelled.num_wanted > 0 else self._others


def count_labels(labels: Iterable[Tensor | None]) -> int:
    """Count the samples that have a label that is not ignored, in the labels of several batches."""
    return sum(int(has_label(each).sum()) for each in labels if each is not None)


def spread(batches: Sequence[KeptBatch], num_samples: float) -> list[KeptBatch]:
    """Choose evenly spaced batches that hold a number of samples, or a little more."""
    chosen = _EvenlySpaced(num_samples, math.inf)
    for batch in batches:
        chosen.add(batch)
    return sorted(chosen.batches, key=attrgetter("index"))
