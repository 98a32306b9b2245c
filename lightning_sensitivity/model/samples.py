"""What is kept on the CPU: batches of a loader, to be measured again and again, and rows to learn from."""

import math
from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor

from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.call import ModelCall

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_SLACK = 1.25  # by how much rows may exceed what is wanted, so that they are seldom sorted out
MAX_BYTES = 2**29  # of the validation samples in a process, and as much again for what a reference learns from


@dataclass(eq=False)
class KeptBatch:
    """Call, labels and features of a batch, on the CPU.

    Attributes:
        index: Its index in its loader.
        size: Its number of samples.
        call: The call of the model on it.
        labels: Its labels; None if it has none, or none are wanted.
        features: What a reference sees of it; None if that is not wanted, or there is nothing.
        rows: Which of its samples are kept; None for all.
    """

    index: int
    size: int
    call: ModelCall
    labels: Tensor | None = None
    features: Tensor | None = None
    rows: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """The memory of its tensors."""
        tensors = tensors_in([self.labels, self.features, self.call.arguments])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _priority(batch_idx: int) -> float:
    """Return the fraction of a multiple of the golden ratio; the lowest ones are kept.

    Batches with the lowest fractions are evenly spaced, whatever the period of the data, such as that of a
    stream whose workers read one part of it each.
    """
    return batch_idx * _GOLDEN_RATIO % 1


class KeptSamples:
    """Keep whole, evenly spaced batches of a loader, since data may be sorted.

    Of too many batches, that with the highest priority number goes.

    Args:
        num_wanted: How many samples to keep in this process; inf for all.
        dataloader_idx: The index of the loader.
        max_bytes: How many bytes they may take.

    Attributes:
        dataloader_idx: The index of the loader.
        num_wanted: How many samples to keep.
        size: The number of samples.
        is_complete: Whether no more batches are wanted.
        is_truncated: Whether samples are missing for lack of memory.
    """

    def __init__(self, num_wanted: float, dataloader_idx: int = 0, max_bytes: float = MAX_BYTES) -> None:
        self.dataloader_idx = dataloader_idx
        self.size = 0
        self.is_complete = False
        self.is_truncated = False
        self._by_priority: list[KeptBatch] = []
        self.num_wanted = num_wanted
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._threshold = 1.0

    @property
    def batches(self) -> list[KeptBatch]:
        """The batches, in the order of the loader."""
        return sorted(self._by_priority, key=attrgetter("index"))

    def wants(self, batch_idx: int) -> bool:
        """Return whether to keep a batch."""
        return not self.is_complete and _priority(batch_idx) < self._threshold

    def add(self, batch: KeptBatch) -> None:
        """Keep a batch, unless it is empty, and as few others as hold the wanted number of samples."""
        if batch.size == 0:
            return
        insort(self._by_priority, batch, key=lambda each: _priority(each.index))
        self.size += batch.size
        self._num_bytes += batch.num_bytes
        while self._num_bytes > self._max_bytes and len(self._by_priority) > 1:
            self.is_truncated = True
            self._drop_last()
        while self.size - self._by_priority[-1].size >= self.num_wanted:
            self._drop_last()

    def complete(self) -> None:
        """Want no more batches, unless none has come."""
        self.is_complete = self.size > 0

    def _drop_last(self) -> None:
        batch = self._by_priority.pop()
        self.size -= batch.size
        self._num_bytes -= batch.num_bytes
        self._threshold = _priority(batch.index)


class KeptRows:
    """Evenly spaced rows of training samples, from which a reference learns.

    Args:
        max_rows: How many rows to keep.
        max_bytes: How many bytes they may take.

    Attributes:
        num_seen: How many rows have come.
        has_features: Whether all of them had features.
        is_complete: Whether no more rows are wanted.
    """

    def __init__(self, max_rows: int, max_bytes: float = MAX_BYTES) -> None:
        self.num_seen = 0
        self.has_features = True
        self.is_complete = False
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._rows: list[tuple[Tensor, ...]] = []  # priorities, labels and features of a batch

    @property
    def size(self) -> int:
        """The number of rows, which may be a quarter more than are wanted."""
        return sum(len(rows[0]) for rows in self._rows)

    @property
    def is_full(self) -> bool:
        """Whether there are as many rows as are wanted, or fit into memory."""
        return self.num_seen >= self._max_rows

    def add(self, features: Tensor | None, labels: Tensor) -> None:
        """Copy those rows of a batch that are wanted.

        Args:
            features: What a reference sees of each sample, on the CPU; None if there is nothing.
            labels: The labels, with the same rows.
        """
        if self.is_complete or len(labels) == 0:
            return
        self.has_features = self.has_features and features is not None
        rows = (labels,) if features is None else (labels, features)
        num_bytes = sum(each[0].numel() * each.element_size() for each in rows)
        self._max_rows = max(1, int(min(self._max_rows, self._max_bytes / num_bytes)))
        places = torch.arange(self.num_seen, self.num_seen + len(labels), dtype=torch.float64)
        self.num_seen += len(labels)
        self._rows.append(self._wanted(((places * _GOLDEN_RATIO).frac(), *rows)))
        if self.size > _SLACK * self._max_rows:
            self._thin_out()

    def _wanted(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Copy those rows whose priority is low enough for the number of rows so far."""
        is_wanted = rows[0] < self._max_rows / self.num_seen
        return tuple(each[is_wanted] for each in rows)

    def _thin_out(self) -> None:
        for place, rows in enumerate(self._rows):
            if bool((rows[0] >= self._max_rows / self.num_seen).any()):
                self._rows[place] = self._wanted(rows)

    def complete(self) -> None:
        """Want no more rows, unless none has come."""
        self.is_complete = self.num_seen > 0

    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return features and labels, in the order in which they came; no features if some samples had none."""
        self._thin_out()
        rows = [rows for rows in self._rows if len(rows[0])]
        return [each[2] for each in rows] if self.has_features else [], [each[1] for each in rows]

    def clear(self) -> None:
        """Free the rows, and want no more."""
        self.is_complete = True
        self._rows = []
