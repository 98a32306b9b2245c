"""What is kept on the CPU: batches of a loader, to be measured again and again, and samples to learn from."""

import sys
from dataclasses import dataclass

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor

from lightning_sensitivity.functional.tensors import evenly_spaced, spaced_fraction
from lightning_sensitivity.reference.kinds import Seen
from lightning_sensitivity.reference.observations import Observations, max_samples
from lightning_sensitivity.running.batches import take, tensors_in
from lightning_sensitivity.running.call import ModelCall

# Of the validation samples of all loaders, in all processes, and as much again of the training samples.
MAX_BYTES = 2**29
_SLACK = 1.25  # by how much samples may exceed what is wanted, so that they are seldom sorted out
NUM_BATCHES = 20  # over which samples are spread, since data may be sorted


@dataclass(eq=False)
class KeptBatch:
    """Call and labels of a batch, on the CPU.

    Attributes:
        index: Its index in its loader.
        size: How many of its samples are kept.
        whole_size: How many it had.
        call: The call of the model on it.
        seen: What a reference sees of it, if that can't be found in the call.
        groups: The number of the group of each sample; None without groups.
        indices: Which of its samples are kept; None for all.
        labels: Its labels; None if it has none, or none are wanted.
    """

    index: int
    size: int
    whole_size: int
    call: ModelCall
    seen: Seen | None = None
    groups: Tensor | None = None
    indices: Tensor | None = None
    labels: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """The memory of its tensors."""
        return num_bytes([self.labels, self.seen, self.call.arguments])

    def cut(self, share: float) -> None:
        """Keep a share of its samples, evenly spaced, if it is known what a sample is."""
        indices = torch.arange(self.call.size) if self.indices is None else self.indices
        rows = evenly_spaced(indices, share * self.whole_size)
        if rows is not None:
            self.size, self.call, self.indices = len(rows), self.call.take(rows), indices[rows]
            held = self.seen, self.groups, self.labels
            self.seen, self.groups, self.labels = apply_to_collection(held, Tensor, take, rows)


def num_bytes(value: object) -> int:
    """Return the memory of the tensors in a value."""
    return sum(x.numel() * x.element_size() for _, x in tensors_in(value))


class KeptSamples:
    """Evenly spaced batches of a loader, since data may be sorted: twenty or more, of which a share is kept.

    If there are too many, or they take too much memory, the one with the highest priority number goes.

    Args:
        num_wanted: How many samples to keep in this process; inf for all.
        dataloader_idx: The index of the loader.
        max_bytes: How many bytes they may take in this process.

    Attributes:
        dataloader_idx: The index of the loader.
        num_wanted: How many samples to keep.
        max_bytes: How many bytes they may take.
        batches: The batches, in the order of the loader.
        size: The number of samples.
        is_truncated: Whether samples are missing for lack of memory.
    """

    def __init__(self, num_wanted: float, dataloader_idx: int = 0, max_bytes: float = MAX_BYTES) -> None:
        self.dataloader_idx = dataloader_idx
        self.size = 0
        self.is_truncated = False
        self.batches: list[KeptBatch] = []
        self.num_wanted = num_wanted
        self.max_bytes = max_bytes
        self._num_bytes = 0
        self._threshold = 1.0  # of priority numbers: 1 if all batches are wanted, 0 if none is

    def wants(self, batch_idx: int) -> bool:
        """Return whether to keep a batch."""
        return self._threshold == 1.0 or spaced_fraction(batch_idx) < self._threshold

    def add(self, batch: KeptBatch) -> None:
        """Keep a batch, unless it is empty, and no others than are needed for the wanted number of samples."""
        if batch.size == 0:
            return
        self.batches.append(batch)
        self.size += batch.size
        self._num_bytes += batch.num_bytes
        self.is_truncated |= batch.size < min(self.num_wanted, batch.whole_size)
        while len(self.batches) > 1 and (self.size > self.num_wanted or self._num_bytes > self.max_bytes):
            last = max(self.batches, key=lambda each: spaced_fraction(each.index))
            fits = self._num_bytes <= self.max_bytes
            are_few = last.call.size > 0 and len(self.batches) <= min(NUM_BATCHES, self.num_wanted)
            if fits and (are_few or self.size - last.size < self.num_wanted):
                break
            self.batches.remove(last)
            self.size -= last.size
            self._num_bytes -= last.num_bytes
            self.is_truncated |= not fits
            self._threshold = spaced_fraction(last.index)

    def complete(self) -> None:
        """Want no more batches, unless none has come, and of those that there are only as much as is wanted."""
        if self.size > 0 and self._threshold > 0:
            self._threshold = 0.0
            if self.size > self.num_wanted:
                share = self.num_wanted / sum(batch.whole_size for batch in self.batches)
                for batch in self.batches:
                    batch.cut(share)
                self.size = sum(batch.size for batch in self.batches)
            self.is_truncated &= self.size < self.num_wanted


class KeptObservations:
    """Training samples, from which a reference learns: as many as there is memory for.

    Only those that are to be kept are read: evenly spaced ones, whose priorities are below a limit.

    Args:
        num_columns: How many columns labels have as a matrix.
        num_processes: How many processes share what a reference may know, and the memory.
        max_read: How many samples may be read in all processes, where that is expensive.

    Attributes:
        num_columns: How many columns labels have as a matrix.
        num_wanted: How many samples are wanted in the end.
        num_to_read: How many more may be read.
        num_expected: How many will come; by this number those to read are evenly spaced. 0 if it is not known.
        num_seen: How many have come.
        size: How many there are, which may be a quarter more than are wanted.
    """

    def __init__(self, num_columns: int, num_processes: int = 1, max_read: int = sys.maxsize) -> None:
        most = max_samples({"columns": torch.zeros(1, 1)}, num_columns) // num_processes
        self.num_columns = num_columns
        self.num_to_read = max_read // num_processes
        self.num_wanted = min(most, self.num_to_read)
        self.num_expected = 0
        self.num_seen = 0
        self.size = 0
        self._num_processes = num_processes
        self._shapes: dict[str, torch.Size] | None = None  # of what is seen of a sample
        self._parts: list[tuple[Tensor, Observations]] = []  # with the priority of each

    @property
    def is_full(self) -> bool:
        """Whether as many samples have come as are wanted, or may be read."""
        return self.size > 0 and (self.num_to_read == 0 or self.num_seen >= self.num_wanted)

    @property
    def _limit(self) -> float:
        """What the priorities of samples must be below."""
        return self.num_wanted / max(1, self.num_seen, self.num_expected)

    def choose(self, num_samples: int) -> tuple[Tensor, Tensor]:
        """Return which of so many next samples are wanted, by their indices ``(R,)``, and their priorities."""
        priorities = spaced_fraction(torch.arange(self.num_seen, self.num_seen + num_samples, dtype=torch.float64))
        self.num_seen += num_samples
        indices = (priorities < self._limit).nonzero()[: self.num_to_read, 0]
        self.num_to_read -= len(indices)
        return indices, priorities[indices]

    def add(self, samples: Observations, priorities: Tensor) -> None:
        """Keep samples that were chosen: on the CPU, each with a label."""
        shapes = {kind: x.shape[1:] for kind, x in samples.seen.items()}
        if shapes != self._shapes:
            self._shapes = shapes
            of_sample = num_bytes([x[0] for x in (samples.labels, *samples.seen.values())])
            most = min(max_samples(samples.seen, self.num_columns), int(MAX_BYTES / _SLACK / of_sample))
            self.num_wanted = max(1, min(self.num_wanted, most // self._num_processes))
        self._parts.append((priorities, samples))
        self.size += len(priorities)
        if self.size > _SLACK * self.num_wanted:
            self._thin_out()

    def _thin_out(self) -> None:
        """Keep no more samples than are wanted."""
        parts, self._parts, limit = self._parts, [], self._limit
        for priorities, samples in parts:
            is_wanted = priorities < limit
            if bool(is_wanted.all()):
                self._parts.append((priorities, samples))
            elif bool(is_wanted.any()):
                self._parts.append((priorities[is_wanted], samples.take(is_wanted)))
        self.size = sum(len(samples) for _, samples in self._parts)

    def joined(self) -> Observations:
        """Return the samples, in the order in which they came.

        Raises:
            ValueError: If there is none, or as by :func:`join_seen`.
        """
        self._thin_out()
        if not self._parts:
            raise ValueError("No sample has a label")
        joined = Observations.join([samples for _, samples in self._parts])
        self._parts = [(torch.cat([priorities for priorities, _ in self._parts]), joined)]  # which frees the parts
        return joined
