"""The samples that a monitor measures in every validation: kept once, on the CPU, and joined into a few large calls."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.callbacks.groups import Group, KeptBatch, can_join, join_groups
from lightning_sensitivity.model import ModelCall
from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.isolation import RunIsolated

MAX_BYTES = 2**29  # of the validation samples that a process keeps, and as much again for its training samples
MAX_ELEMENTS = 2**20  # in the largest tensor of a joint pass, so that it fits into a cache
_MAX_SHARED = 2**22  # elements of clean outputs that are shared by monitors


class Pass(NamedTuple):
    """Hold a group that is being measured.

    Attributes:
        group: The group.
        call: Its call, on the device of the module.
        outputs: Its clean outputs.
        checked: Those of its batches that are also run by themselves, to see whether the joint call is right.
    """

    group: Group
    call: ModelCall
    outputs: Tensor
    checked: list[Group]

    def can_split(self) -> bool:
        """Return whether the call can be made on a part of the samples."""
        return len(self.outputs) == self.group.size and self.call.layout() is not None


class JointPassError(Exception):
    """A batch gives other outputs by itself than together with others."""


class KeptSamples:
    """Keep whole batches of a loader.

    They are evenly spaced, since data may be sorted, or the first ones of a stream.

    Args:
        dataloader_idx: The index of the loader.
        num_batches: Number of batches of the loader; inf if it is unknown, or to keep the first ones.
        num_wanted: How many samples to keep in this process; inf for all.
        max_bytes: How many bytes the samples may take.
        is_growing: Whether more batches may come after the first validation, as in training.

    Attributes:
        size: Number of samples.
        num_batches: Number of batches of the loader.
        max_bytes: How many bytes the samples may take.
        groups: The batches: one group each until :meth:`complete` joins them.
        is_complete: Whether no more batches are kept.
        is_truncated: Whether samples were left out for lack of memory.
        can_regroup: Whether samples may be measured in other groups than the batches that they came in.
        has_worked: Whether they have been measured in their present groups.
    """

    def __init__(
        self,
        dataloader_idx: int,
        num_batches: float,
        num_wanted: float,
        max_bytes: float = MAX_BYTES,
        is_growing: bool = False,
    ) -> None:
        self.dataloader_idx = dataloader_idx
        self.size = 0
        self.groups: list[Group] = []
        self.is_complete = False
        self.is_truncated = False
        self.can_regroup = True
        self.has_worked = False
        self.num_batches = num_batches
        self._num_wanted = num_wanted
        self.max_bytes = max_bytes
        self._is_growing = is_growing
        self._chosen: set[int] | None = None  # indices of batches; None for every batch, until there are enough
        self._batches: dict[int, KeptBatch] = {}  # by index, in the order of their samples
        self._num_bytes = 0
        self._num_checked = 0  # times that batches were run by themselves
        self._clean: dict[int, Tensor] = {}  # outputs of this validation, by the place of the group

    @property
    def batches(self) -> list[KeptBatch]:
        """The kept batches, in the order of their samples."""
        return list(self._batches.values())

    # The first validation: collect

    def wants(self, batch_idx: int) -> bool:
        """Return whether to keep a batch."""
        if self.is_complete or batch_idx in self._batches:
            return False
        is_chosen = self._chosen is None or batch_idx in self._chosen
        return is_chosen and not self._has_enough()

    def find(self, batch_idx: int) -> KeptBatch | None:
        """Return the kept batch of an index; None if it is not kept."""
        return self._batches.get(batch_idx)

    def stop(self) -> None:
        """Want no more batches, since they would repeat samples."""
        self._num_wanted = 0

    def add(self, group: Group) -> None:
        """Keep a batch, unless it is empty or too large; the size of the first one decides which others are kept."""
        num_bytes = group.call.num_bytes
        if group.size == 0:
            return
        if not self.groups:
            self._choose(group.size, num_bytes)
        elif self._num_bytes + num_bytes > self.max_bytes:
            self.is_truncated = True
            self.stop()
            return
        self._num_bytes += num_bytes
        self.size += group.size
        self._batches.update({batch.index: batch for batch in group.batches})
        self.groups.append(group)

    def _has_enough(self) -> bool:
        return self.size >= self._num_wanted

    def _choose(self, size: int, num_bytes: int) -> None:
        """Choose batches by the size of the first one."""
        num_chosen = min(self.num_batches, self._num_wanted / size)
        num_possible = max(1, self.max_bytes // max(1, num_bytes))
        if num_possible < num_chosen < math.inf:
            self.is_truncated = True
            num_chosen = num_possible
        if self.num_batches < math.inf:
            count, chosen = int(self.num_batches), math.ceil(num_chosen)
            self._chosen = {-(-index * count // chosen) for index in range(chosen)}

    def complete(self, module: LightningModule, run: RunIsolated) -> None:
        """Keep no more batches, and join those that are kept; growing samples must be enough.

        Args:
            module: The module.
            run: Runs the module and leaves no trace.
        """
        if self.is_complete or not self.groups or (self._is_growing and not self._has_enough()):
            return
        self.is_complete = True
        if self.can_regroup:
            first = self.groups[0]
            num_elements = run(_largest_tensor, module, first.call.to(module.device))
            self.groups = _join_all(self.groups, max_samples=MAX_ELEMENTS * first.size / num_elements)
            self.has_worked = False

    # Every validation: run

    def passes(self, module: LightningModule, run: RunIsolated) -> Iterator[Pass]:
        """Yield the groups with their clean outputs, which monitors share with the samples.

        Args:
            module: The module.
            run: Runs the module and leaves no trace.
        """
        to_check = self._batches_to_check()
        for place, group in enumerate(self.groups):
            call = group.call.to(module.device)
            checked = [group.alone(batch) for batch in group.batches if batch in to_check]
            yield Pass(group, call, self._clean_outputs(run, place, call), checked)

    def _clean_outputs(self, run: RunIsolated, place: int, call: ModelCall) -> Tensor:
        if place not in self._clean:
            outputs = run(call)
            if sum(each.numel() for each in self._clean.values()) + outputs.numel() > _MAX_SHARED:
                return outputs
            self._clean[place] = outputs
        return self._clean[place]

    def _batches_to_check(self) -> set[KeptBatch]:
        """Choose the joined batches that are also run by themselves: all at first, then one each time."""
        joined = [batch for group in self.groups if len(group.batches) > 1 for batch in group.batches]
        self._num_checked += 1
        if self._num_checked > 1 and joined:
            return {joined[-self._num_checked % len(joined)]}
        return set(joined)

    def separate(self) -> None:
        """Measure each batch by itself from now on."""
        self.can_regroup = False
        self.groups = [group.alone(batch) for group in self.groups for batch in group.batches]
        self.forget_outputs()

    def forget_outputs(self) -> None:
        """Free the clean outputs of this validation."""
        self._clean = {}


def keep_validation_samples(trainer: Trainer, num_samples: int | None) -> list[KeptSamples]:
    """Prepare to keep samples of each validation loader.

    Args:
        trainer: The Trainer, at the start of a validation.
        num_samples: How many samples of each loader, over all processes; None for all.
    """
    counts = compat.num_batches(trainer)
    num_wanted = math.inf if num_samples is None else num_samples / trainer.world_size
    max_bytes = MAX_BYTES / max(1, len(counts))
    return [KeptSamples(index, count, num_wanted, max_bytes) for index, count in enumerate(counts)]


def check_agreement(joint: Tensor, alone: Tensor, dtype: torch.dtype) -> None:
    """Raise JointPassError if a batch gives something else by itself than in a joint pass, rounding aside.

    Args:
        joint: What the joint pass gave for the samples of the batch, ``(N, ...)``.
        alone: What a pass on the batch gave.
        dtype: The type of the outputs, which determines how much rounding there is.
    """
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-2}.get(dtype, 0.5)
    has_same_shape = joint.shape == alone.shape
    if has_same_shape:
        is_finite = bool((joint.isfinite() == alone.isfinite()).all())
        joint, alone = joint.nan_to_num(0, 0, 0), alone.nan_to_num(0, 0, 0)
        difference, scale = (joint - alone).abs().amax(0), alone.abs().amax(0)
        if is_finite and bool((difference <= tolerance * scale).all()):
            return
    raise JointPassError("Samples influence each other in a joint pass")


def may_be_of_joint_calls(error: Exception, kept: Sequence[KeptSamples]) -> bool:
    """Return whether an error may be due to joint calls: not if these have worked, unless the error is of their kind.

    Args:
        error: What has been raised when samples were measured.
        kept: The samples.
    """
    if isinstance(error, Warning | MisconfigurationException) or not any(each.can_regroup for each in kept):
        return False
    is_of_their_kind = isinstance(error, JointPassError) or is_oom_error(error)
    return is_of_their_kind or not all(each.has_worked for each in kept)


def _join_all(groups: list[Group], max_samples: float) -> list[Group]:
    """Join neighbours into as few groups as possible."""
    joined, size = [groups[:1]], groups[0].size
    for group in groups[1:]:
        size += group.size
        if size <= max_samples and can_join(joined[-1][-1], group):
            joined[-1].append(group)
        else:
            joined.append([group])
            size = group.size
    return list(map(join_groups, joined))


def _largest_tensor(model: nn.Module, call: ModelCall) -> int:
    """Run the model, and count the elements of the largest tensor that it gets or that one of its layers returns."""
    largest = _num_elements([call.args, call.kwargs])

    def note(module: nn.Module, args: object, result: object) -> None:
        nonlocal largest
        largest = max(largest, _num_elements(result))

    with ExitStack() as hooks:
        for module in model.modules():
            if not list(module.children()):
                hooks.enter_context(module.register_forward_hook(note))
        outputs = call()
    return max(1, largest, outputs.numel())


def _num_elements(value: object) -> int:
    return max((tensor.numel() for tensor in tensors_in(value) if not tensor.is_nested), default=0)
