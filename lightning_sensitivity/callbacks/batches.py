"""The batches of a validation: which ones are measured, and which ones wait to be measured together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_sensitivity.arguments import Selector
from lightning_sensitivity.model import ModelCall
from lightning_sensitivity.model.forward import join_calls
from lightning_sensitivity.model.isolation import RunIsolated

_MAX_ELEMENTS = 2**20  # in the largest tensor of a joint pass, so that it fits into a cache; larger batches do not wait


@dataclass
class Batch:
    """A batch that is measured.

    Attributes:
        call: The call of the model on it.
        batch_idx: Its index in the loader.
        dataloader_idx: The index of its loader.
        size: Number of samples.
        num_elements: Elements of the largest tensor that a pass on it makes.
        targets: Its labels, if the monitor scores them.
    """

    call: ModelCall
    batch_idx: int
    dataloader_idx: int
    size: int
    num_elements: float
    targets: Tensor | None = None

    def layout(self) -> tuple[object, ...] | None:
        """Return what batches must have in common to be measured together; None if this one is measured by itself."""
        layout = self.call.layout()
        if layout is None:
            return None
        labels = None if self.targets is None else (self.targets.shape[1:], self.targets.dtype)
        return (self.dataloader_idx, labels, *layout)


class Group:
    """Batches of one loader that are measured together.

    Args:
        batches: The batches, all of one layout.

    Attributes:
        batches: The batches.
        call: The joint call of the model.
    """

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = list(batches)
        self.call = join_calls([batch.call for batch in batches])
        self.dataloader_idx = batches[0].dataloader_idx

    def targets(self) -> Tensor:
        """Return the labels of all batches."""
        return torch.cat([batch.targets for batch in self.batches if batch.targets is not None])

    @property
    def key(self) -> tuple[int, ...]:
        """Key that identifies the group within a validation."""
        return self.dataloader_idx, *(batch.batch_idx for batch in self.batches)

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(batch.size for batch in self.batches)


class BatchSelection:
    """Choose which batches of a loader are measured: always the same ones, evenly spaced, since data may be sorted.

    Args:
        num_batches: Number of batches of the loader; inf if unknown.
        budget: How many samples of the loader this process should measure.

    Attributes:
        num_batches: Number of batches of the loader.
        num_selected: How many batches are measured: all of them until the size of a batch is known.
    """

    def __init__(self, num_batches: int | float, budget: float) -> None:
        self.num_batches = num_batches
        self.num_selected: int | float = num_batches
        self._budget = budget
        self._indices: set[int] | None = None  # None for every batch, until the budget is spent
        self._num_samples = 0

    def start(self, batch_size: int) -> None:
        """Choose the batches, once the batch size is known."""
        if math.isinf(self._budget):
            return
        num_needed = math.ceil(self._budget / max(1, batch_size))
        self.num_selected = min(self.num_batches, num_needed)
        if math.isfinite(self.num_batches):
            count, chosen = int(self.num_batches), int(self.num_selected)
            self._indices = {-(-index * count // chosen) for index in range(chosen)}

    def includes(self, batch_idx: int) -> bool:
        """Decide whether to measure a batch: always the first one, and none after the budget is spent."""
        is_within_budget = batch_idx == 0 or self._num_samples < self._budget
        return is_within_budget and (self._indices is None or batch_idx in self._indices)

    def count(self, batch: Batch) -> None:
        """Count a batch that is measured."""
        self._num_samples += batch.size

    def is_complete(self, batch_idx: int) -> bool:
        """Return whether no batch after this one will be measured."""
        last = self.num_batches - 1 if self._indices is None else max(self._indices, default=0)
        return batch_idx >= last or self._num_samples >= self._budget


class Queue:
    """Hold batches until there are enough to measure them together.

    Args:
        measure: Function that measures batches of one loader and layout.
        can_wait: Whether batches may wait at all.
    """

    def __init__(self, measure: Callable[[list[Batch]], None], can_wait: bool = True) -> None:
        self._measure = measure
        self._can_wait = can_wait
        self._batches: list[Batch] = []
        self._layout: tuple[object, ...] | None = None
        self._num_elements = 0.0

    def add(self, batch: Batch, is_last: bool) -> None:
        """Add a batch, and measure the batches that must not wait any longer."""
        layout = batch.layout() if self._can_wait else None
        is_full = self._num_elements + batch.num_elements > _MAX_ELEMENTS
        if layout is None or layout != self._layout or is_full:
            self.flush()
        self._layout = layout
        self._num_elements += batch.num_elements
        if layout is None or is_last or batch.num_elements > _MAX_ELEMENTS / 2:
            self._batches.append(batch)
            self.flush()
        else:
            batch.call = batch.call.copied()  # the user's step may write to the batch
            self._batches.append(batch)

    def flush(self) -> None:
        """Measure the batches that wait."""
        batches, self._batches = self._batches, []
        self._num_elements = 0.0
        if batches:
            self._measure(batches)


class CleanOutputs:
    """Share the clean outputs of a group among monitors that call the model in the same way.

    Args:
        inputs: The ``inputs`` of these monitors.
        outputs: The ``outputs`` of these monitors.
        num_users: How many monitors ask for the outputs of each group.
    """

    def __init__(self, inputs: Selector | None, outputs: Selector | None, num_users: int = 1) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.num_users = num_users
        self._key: tuple[int, ...] = ()
        self._outputs: Tensor | None = None
        self._num_asked = 0

    def get(self, run: RunIsolated, group: Group) -> Tensor:
        """Return the outputs of a group; the first monitor that asks runs the pass."""
        outputs = self._outputs if self._key == group.key else None
        if outputs is None:
            outputs = run(group.call)
            self._num_asked = 0
        self._num_asked += 1
        is_needed = self._num_asked < self.num_users
        self._key = group.key if is_needed else ()
        self._outputs = outputs if is_needed else None
        return outputs


def are_independent(joint: Tensor, single: Tensor, size: int) -> bool:
    """Return whether the outputs for some samples are the same with and without other samples in the pass.

    Args:
        joint: Outputs for these samples from a pass that includes others.
        single: Outputs from a pass on these samples only.
        size: The number of these samples.
    """
    if len(single) != size or joint.shape != single.shape:
        return False
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-3}.get(single.dtype, 5e-2)
    scale = float(single.nan_to_num(0, 0, 0).abs().max()) if single.numel() else 0.0
    return torch.allclose(joint, single, rtol=0, atol=tolerance * scale, equal_nan=True)
