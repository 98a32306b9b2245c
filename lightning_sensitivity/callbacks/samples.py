"""The samples that a monitor measures in every validation: kept once, on the CPU, and joined into a few large calls."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_sensitivity import compat
from lightning_sensitivity.arguments import Selector
from lightning_sensitivity.model import ModelCall, isolated
from lightning_sensitivity.model.call import join_calls, tensors_in
from lightning_sensitivity.model.isolation import RunIsolated

MAX_BYTES = 2**29  # of the validation samples that a process keeps, and as much again for its training samples
MAX_ELEMENTS = 2**20  # in the largest tensor of a joint pass, so that it fits into a cache
_MAX_SHARED = 2**22  # elements of clean outputs that are shared by monitors


@dataclass
class Group:
    """Hold batches that are measured in one joint call.

    Attributes:
        call: The joint call of the model, on the CPU.
        batch_indices: The index of each batch in its loader.
        sizes: The number of samples of each batch.
    """

    call: ModelCall
    batch_indices: list[int]
    sizes: list[int]

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(self.sizes)

    def rows(self) -> dict[int, slice]:
        """Return which rows of the joint call belong to each batch, by the index of the batch."""
        stops = torch.tensor(self.sizes).cumsum(0).tolist()
        slices = [slice(stop - size, stop) for size, stop in zip(self.sizes, stops, strict=True)]
        return dict(zip(self.batch_indices, slices, strict=True))

    def batch(self, batch_idx: int) -> Group:
        """Return one of the batches as a group of its own."""
        if len(self.sizes) == 1:
            return self
        rows = self.rows()[batch_idx]
        return Group(self.call.select(rows), [batch_idx], [rows.stop - rows.start])


class JointPassError(Exception):
    """A batch gives other outputs by itself than together with others."""


class KeptSamples:
    """Keep whole batches of a loader: evenly spaced ones, since data may be sorted, or the first ones of a stream.

    Args:
        dataloader_idx: The index of the loader.
        num_batches: Number of batches of the loader; inf if it is unknown, or to keep the first ones.
        num_wanted: How many samples to keep in this process; inf for all.
        max_bytes: How many bytes the samples may take.

    Attributes:
        num_batches: Number of batches of the loader.
        groups: The batches: one group each until :meth:`complete` joins them.
        is_complete: Whether no more batches are kept.
        is_truncated: Whether samples were left out for lack of memory.
        can_regroup: Whether samples may be measured in other groups than the batches that they came in.
    """

    def __init__(self, dataloader_idx: int, num_batches: float, num_wanted: float, max_bytes: float) -> None:
        self.dataloader_idx = dataloader_idx
        self.groups: list[Group] = []
        self.is_complete = False
        self.is_truncated = False
        self.can_regroup = True
        self.num_batches = num_batches
        self._num_wanted = num_wanted
        self._max_bytes = max_bytes
        self._chosen: set[int] | None = None  # indices of batches; None for every batch, until there are enough
        self._num_bytes = 0
        self._num_checked = 0  # validations in which batches were run by themselves
        self._clean: dict[int, Tensor] = {}  # outputs of this validation, by the place of the group

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(group.size for group in self.groups)

    @property
    def is_full(self) -> bool:
        """Whether there are as many samples as wanted."""
        return self.size >= self._num_wanted

    @property
    def batch_indices(self) -> list[int]:
        """The indices of the kept batches."""
        return [index for group in self.groups for index in group.batch_indices]

    # The first validation: collect

    def wants(self, batch_idx: int) -> bool:
        """Return whether to keep a batch."""
        if self.is_complete or batch_idx in self.batch_indices:
            return False
        is_chosen = self._chosen is None or batch_idx in self._chosen
        return is_chosen and (not self.groups or not self.is_full)

    def stop(self) -> None:
        """Want no more batches, since they would repeat samples."""
        self._num_wanted = 0

    def add(self, call: ModelCall, batch_idx: int, size: int) -> bool:
        """Keep a batch, unless it is empty or too large; the size of the first one decides which others are kept.

        Args:
            call: The call on the batch.
            batch_idx: Its index.
            size: Its number of samples, from :func:`count_samples`.

        Returns:
            Whether it is kept.
        """
        if size == 0:
            return False
        if not self.groups:
            self._choose(size, call.num_bytes)
        elif self._num_bytes + call.num_bytes > self._max_bytes:
            self.is_truncated = True
            self.stop()
            return False
        self._num_bytes += call.num_bytes
        self.groups.append(Group(call.to(torch.device("cpu")), [batch_idx], [size]))
        return True

    def _choose(self, size: int, num_bytes: int) -> None:
        """Choose batches by the size of the first one."""
        num_chosen = self.num_batches
        if math.isfinite(self._num_wanted):
            num_chosen = min(num_chosen, math.ceil(self._num_wanted / size))
        num_possible = max(1, self._max_bytes // max(1, num_bytes))
        if math.isfinite(num_chosen) and num_chosen > num_possible:
            self.is_truncated = True
            num_chosen = num_possible
        if math.isfinite(self.num_batches):
            count, chosen = int(self.num_batches), int(num_chosen)
            self._chosen = {-(-index * count // chosen) for index in range(chosen)}

    def complete(self, model: nn.Module, run: RunIsolated, device: torch.device) -> None:
        """Keep no more batches, and join those that are kept.

        Args:
            model: The module.
            run: Runs the module and leaves no trace.
            device: The device of the module.
        """
        if self.is_complete or not self.groups:
            return
        self.is_complete = True
        if not self.can_regroup:
            return
        first = self.groups[0]
        num_elements = run(_largest_tensor, model, first.call.to(device)) / first.size
        joined: list[list[Group]] = []
        for group in self.groups:
            if joined and _can_join(joined[-1], group, MAX_ELEMENTS / num_elements):
                joined[-1].append(group)
            else:
                joined.append([group])
        self.groups = [_join(groups) for groups in joined]

    # Every validation: run

    def clean_outputs(self, run: RunIsolated, place: int, call: ModelCall) -> Tensor:
        """Return the outputs of a group; in a validation, the first monitor that asks runs the pass.

        Args:
            run: Runs the module and leaves no trace.
            place: The place of the group in :attr:`groups`.
            call: The call of the group, on the module's device.
        """
        if place not in self._clean:
            outputs = run(call)
            if sum(each.numel() for each in self._clean.values()) + outputs.numel() > _MAX_SHARED:
                return outputs
            self._clean[place] = outputs
        return self._clean[place]

    def checks(self) -> dict[int, list[int]]:
        """Choose the joined batches that are also run by themselves: all in the first validation, then one in each.

        Returns:
            Their indices in the loader, by the place of their group in :attr:`groups`.
        """
        joint = {place: group.batch_indices for place, group in enumerate(self.groups) if len(group.sizes) > 1}
        self._num_checked += 1
        if self._num_checked == 1 or not joint:
            return joint
        batches = [(place, index) for place, indices in joint.items() for index in indices]
        place, index = batches[-self._num_checked % len(batches)]
        return {place: [index]}

    def separate(self) -> None:
        """Measure each batch by itself from now on."""
        self.can_regroup = False
        self.groups = [group.batch(index) for group in self.groups for index in group.batch_indices]
        self.forget_outputs()

    def forget_outputs(self) -> None:
        """Free the clean outputs of this validation."""
        self._clean = {}


def make_call(module: nn.Module, batch: Any, inputs: Selector | None, outputs: Selector | None) -> ModelCall:
    """Make the call on a batch, in isolation if the user's function may draw random numbers."""
    if inputs is None:
        return ModelCall(module, batch, inputs, outputs)
    with isolated(module) as run:
        return run(ModelCall, module, batch, inputs, outputs)


def count_samples(module: LightningModule, call: ModelCall) -> int:
    """Count the samples of a batch, by the outputs of the module if the inputs do not tell, as with graphs."""
    if call.size > 0:
        return call.size
    with isolated(module) as run, module.trainer.precision_plugin.val_step_context():
        return len(run(call))


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


def _can_join(groups: list[Group], new: Group, max_samples: float) -> bool:
    """Return whether a group can be joined to others."""
    layout = new.call.layout()
    size = sum(group.size for group in groups) + new.size
    return layout is not None and layout == groups[-1].call.layout() and size <= max_samples


def _join(groups: list[Group]) -> Group:
    indices = [index for group in groups for index in group.batch_indices]
    sizes = [size for group in groups for size in group.sizes]
    return Group(join_calls([group.call for group in groups]), indices, sizes)


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
