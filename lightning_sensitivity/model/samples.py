"""What is kept on the CPU: batches of a loader, to be measured again and again, and rows to learn from."""

import math
from bisect import insort
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeVar

import torch
from torch import Tensor

from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.call import ModelCall
from lightning_sensitivity.model.inputs import NOTHING_SEEN, join_seen
from lightning_sensitivity.reference.features import Seen
from lightning_sensitivity.reference.observations import max_samples

Place = TypeVar("Place", float, Tensor)

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_SLACK = 1.25  # by how much rows may exceed what is wanted, so that they are seldom sorted out
# Of the validation samples of all loaders, in all processes together, and as much again of the training samples.
MAX_BYTES = 2**29


@dataclass(eq=False)
class KeptBatch:
    """Call and labels of a batch, on the CPU.

    Attributes:
        index: Its index in its loader.
        size: Its number of samples.
        call: The call of the model on it.
        labels: Its labels; None if it has none, or none are wanted.
        seen: What a reference sees of it, if the call alone does not say that.
        rows: Which of its samples are kept; None for all.
    """

    index: int
    size: int
    call: ModelCall
    labels: Tensor | None = None
    seen: Seen | None = None
    rows: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """The memory of its tensors."""
        tensors = tensors_in([self.labels, self.seen, self.call.arguments])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _priority(place: Place) -> Place:
    """Return the fraction of a multiple of the golden ratio; batches and rows with the lowest ones are kept.

    These are evenly spaced, whatever the period of the data, such as that of a stream whose workers read one part of
    it each.
    """
    return place * _GOLDEN_RATIO % 1


class KeptSamples:
    """Keep whole, evenly spaced batches of a loader, since data may be sorted.

    Of too many batches, that with the highest priority number goes.

    Args:
        num_wanted: How many samples to keep in this process; inf for all.
        dataloader_idx: The index of the loader.
        max_bytes: How many bytes they may take, in this process.

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


@dataclass(eq=False)
class _Rows:
    """Rows of one batch: their priorities, their labels, and what a reference sees of them."""

    priorities: Tensor
    labels: Tensor
    seen: Seen

    def below(self, limit: float) -> "_Rows":
        """Return the rows with priorities below a limit."""
        chosen = self.priorities < limit
        if bool(chosen.all()):
            return self
        return _Rows(self.priorities[chosen], self.labels[chosen], {kind: x[chosen] for kind, x in self.seen.items()})


class KeptRows:
    """Evenly spaced rows of training samples, from which a reference learns.

    Before samples are read, :meth:`wanted` chooses some of them; :meth:`add` takes what was read of these.

    Args:
        num_columns: How many columns labels have as a matrix.
        num_processes: How many processes share what a reference may know, and the memory.
        max_read: How many rows may be read in all processes, where that is expensive; inf for any number.
        num_batches: How many batches will come to this process, if that is known: then none is read in vain.

    Attributes:
        num_seen: How many samples have come.
        size: How many rows there are, which may be a quarter more than are wanted.
        is_seen: Whether a reference sees something of each.
        is_complete: Whether no more rows are wanted.
    """

    def __init__(
        self, num_columns: int, num_processes: int = 1, max_read: float = math.inf, num_batches: float = 0
    ) -> None:
        self.num_seen = 0
        self.size = 0
        self.is_seen = True
        self.is_complete = False
        self._num_columns = num_columns
        self._num_processes = num_processes
        self._num_batches = num_batches if math.isfinite(num_batches) else 0
        self._num_expected = 0.0  # samples, by the size of the first batch
        self._num_to_read = max_read / num_processes
        self._max_rows = min(self._num_to_read, max_samples(("columns",), num_columns) / num_processes)
        self._chosen = torch.zeros(0, dtype=torch.float64)  # priorities of rows that are being read
        self._parts: list[_Rows] = []

    @property
    def is_full(self) -> bool:
        """Whether there are as many rows as are wanted, or fit into memory."""
        return self.num_seen >= max(self._max_rows, self._num_expected)

    @property
    def _limit(self) -> float:
        """Below it are the priorities of rows that are wanted."""
        return self._max_rows / max(1, self.num_seen, self._num_expected)

    def wanted(self, num_samples: int) -> Tensor:
        """Return which of the next samples to read, ``(R,)``; :meth:`add` takes them, unless there are none."""
        if self.is_complete:
            return torch.arange(0)
        priorities = _priority(torch.arange(self.num_seen, self.num_seen + num_samples, dtype=torch.float64))
        self._num_expected = self._num_expected or num_samples * self._num_batches
        self.num_seen += num_samples
        rows = (priorities < self._limit).nonzero()[:, 0]
        rows = rows[: int(min(len(rows), self._num_to_read))]
        self._num_to_read -= len(rows)
        self._chosen = priorities[rows]
        return rows

    def add(self, seen: Seen | None, labels: Tensor) -> None:
        """Keep the rows that were wanted last.

        Args:
            seen: What a reference sees of them, on the CPU; None if there is nothing.
            labels: The label of each.

        Raises:
            ValueError: If there is not one label for each.
        """
        priorities, self._chosen = self._chosen, self._chosen[:0]
        seen_or_not = seen or {}
        if {len(labels), *map(len, seen_or_not.values())} != {len(priorities)}:
            raise ValueError(f"Expected one label for each of {len(priorities)} samples, but got {len(labels)}")
        if len(labels) == 0:
            return
        self.is_seen = self.is_seen and seen is not None
        num_bytes = sum(x[0].numel() * x.element_size() for x in (labels, *seen_or_not.values()))
        known = max_samples(tuple(seen_or_not) or ("columns",), self._num_columns)
        self._max_rows = max(1, min(self._max_rows, min(known, MAX_BYTES / _SLACK / num_bytes) // self._num_processes))
        self._parts.append(_Rows(priorities, labels, seen_or_not))
        self.size += len(labels)
        if self.size > _SLACK * self._max_rows:
            self._thin_out()

    def _thin_out(self) -> None:
        parts = [rows.below(self._limit) for rows in self._parts]
        self._parts = [rows for rows in parts if len(rows.labels)]
        self.size = sum(len(rows.labels) for rows in self._parts)

    @property
    def labels(self) -> Tensor:
        """The labels of the rows, in the order in which they came."""
        return torch.cat([rows.labels for rows in self._parts])

    def complete(self) -> None:
        """Want no more rows, unless none has come."""
        self.is_complete = self.num_seen > 0

    def joined(self) -> tuple[Seen, Tensor]:
        """Return what a reference sees of the rows, and their labels, in the order in which they came.

        Raises:
            ValueError: If there is no row, a reference sees nothing of some, or they can't be joined.
        """
        self._thin_out()
        if not self.is_seen or not self._parts:
            raise ValueError(NOTHING_SEEN)
        return join_seen([rows.seen for rows in self._parts]), torch.cat([rows.labels for rows in self._parts])

    def clear(self) -> None:
        """Free the rows, and want no more."""
        self.is_complete = True
        self.size = 0
        self._parts = []
