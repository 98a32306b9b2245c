"""The samples that are measured again and again: batches of a loader, kept once, on the CPU."""

import math
from bisect import insort
from dataclasses import dataclass
from operator import attrgetter

from torch import Tensor

from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.call import ModelCall

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
MAX_BYTES = 2**29  # of the validation samples in a process, and as much again for training samples


@dataclass(eq=False)
class KeptBatch:
    """Hold what is kept of a batch, on the CPU.

    Attributes:
        index: Its index in its loader.
        size: Its number of samples.
        call: The call of the model on it; None if it is not run.
        labels: Its labels; None if it has none, or none are wanted.
        seen: What a reference sees of it; None if that is not wanted, or there is nothing.
    """

    index: int
    size: int
    call: ModelCall | None = None
    labels: Tensor | None = None
    seen: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """The memory of its tensors."""
        arguments = None if self.call is None else self.call.arguments
        tensors = tensors_in([self.labels, self.seen, arguments])
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _turn(batch_idx: int) -> float:
    """Return when it is a batch's turn: by the fraction of a multiple of the golden ratio.

    Batches with the lowest fractions are evenly spaced, whatever the period of the data, such as that of a
    stream whose workers read one part of it each.
    """
    return batch_idx * _GOLDEN_RATIO % 1


class KeptSamples:
    """Keep whole, evenly spaced batches of a loader, since data may be sorted.

    Of too many batches, that with the last turn goes.

    Args:
        num_wanted: How many samples to keep in this process; inf for all.
        dataloader_idx: The index of the loader.
        max_bytes: How many bytes they may take.

    Attributes:
        size: The number of samples.
        is_complete: Whether no more batches are wanted.
        is_truncated: Whether samples are missing for lack of memory.
    """

    def __init__(self, num_wanted: float, dataloader_idx: int = 0, max_bytes: float = MAX_BYTES) -> None:
        self.dataloader_idx = dataloader_idx
        self.size = 0
        self.is_complete = False
        self.is_truncated = False
        self._by_turn: list[KeptBatch] = []
        self._num_wanted = num_wanted
        self._max_bytes = max_bytes
        self._num_bytes = 0
        self._last_turn = 1.0

    @property
    def batches(self) -> list[KeptBatch]:
        """The batches, in the order of the loader."""
        return sorted(self._by_turn, key=attrgetter("index"))

    @property
    def labels(self) -> list[Tensor]:
        """The labels of the batches that have some, in the order of the loader."""
        return [batch.labels for batch in self.batches if batch.labels is not None]

    @property
    def is_full(self) -> bool:
        """Whether there are as many samples as are wanted, or no more are."""
        return self.is_complete or self.size >= self._num_wanted

    def wants(self, batch_idx: int) -> bool:
        """Return whether to keep a batch."""
        return not self.is_complete and _turn(batch_idx) < self._last_turn

    def add(self, batch: KeptBatch) -> None:
        """Keep a batch, unless it is empty, and as few others as hold the wanted number of samples."""
        if batch.size == 0:
            return
        insort(self._by_turn, batch, key=lambda each: _turn(each.index))
        self.size += batch.size
        self._num_bytes += batch.num_bytes
        while self._num_bytes > self._max_bytes and len(self._by_turn) > 1:
            self.is_truncated = True
            self._drop_last()
        while self.size - self._by_turn[-1].size >= self._num_wanted:
            self._drop_last()

    def complete(self) -> None:
        """Want no more batches, unless none has come."""
        self.is_complete = self.size > 0

    def _drop_last(self) -> None:
        batch = self._by_turn.pop()
        self.size -= batch.size
        self._num_bytes -= batch.num_bytes
        self._last_turn = _turn(batch.index)
