"""Batches that a monitor keeps, and that are measured in one joint call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sensitivity.arguments import Selector
from lightning_sensitivity.model import ModelCall, isolated
from lightning_sensitivity.model.call import join_calls


@dataclass(eq=False)
class KeptBatch:
    """Hold what is kept beside the inputs of a batch, on the CPU.

    Attributes:
        index: Its index in its loader.
        size: Its number of samples.
        labels: Its labels; None if it has none, or none are wanted.
        features: What the user's function returns for the reference, ``(N, D)``; None without one.
    """

    index: int
    size: int
    labels: Tensor | None = None
    features: Tensor | None = None


@dataclass
class Group:
    """Hold batches that are measured in one joint call.

    Attributes:
        call: The joint call of the model, on the CPU.
        batches: The batches, in the order of their samples.
    """

    call: ModelCall
    batches: list[KeptBatch]

    @property
    def size(self) -> int:
        """Number of samples."""
        return sum(batch.size for batch in self.batches)

    def rows_of(self, batch: KeptBatch) -> slice:
        """Return which rows of the joint call belong to a batch."""
        place = self.batches.index(batch)
        start = sum(earlier.size for earlier in self.batches[:place])
        return slice(start, start + batch.size)

    def alone(self, batch: KeptBatch) -> Group:
        """Return one of the batches as a group of its own."""
        return self if len(self.batches) == 1 else Group(self.call.select(self.rows_of(batch)), [batch])

    def labelled(self, outputs: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield outputs and labels: at once if all batches have labels of one kind, else those of each that has some.

        Args:
            outputs: The outputs for all batches.
        """
        pairs = [(batch, batch.labels) for batch in self.batches if batch.labels is not None]
        if pairs and len(outputs) != self.size:
            raise ValueError(f"Expected outputs for {self.size} samples, but got {len(outputs)}")
        kinds = {(labels.dtype, labels.shape[1:]) for _, labels in pairs}
        if len(pairs) == len(self.batches) and len(kinds) == 1:
            yield outputs, torch.cat([labels for _, labels in pairs])
            return
        for batch, labels in pairs:
            yield outputs[self.rows_of(batch)], labels


def make_call(module: nn.Module, batch: object, inputs: Selector | None, outputs: Selector | None) -> ModelCall:
    """Make the call on a batch, in isolation if the user's function may draw random numbers."""
    if inputs is None:
        return ModelCall(module, batch, inputs, outputs)
    with isolated(module) as run:
        return run(ModelCall, module, batch, inputs, outputs)


def make_group(
    module: LightningModule, batch: object, batch_idx: int, inputs: Selector | None, outputs: Selector | None
) -> Group:
    """Copy a batch to the CPU; its outputs show its size if its inputs do not, as with graphs."""
    call = make_call(module, batch, inputs, outputs)
    size = call.size
    if size == 0:
        with isolated(module) as run, module.trainer.precision_plugin.val_step_context():
            size = len(run(call))
    return Group(call.to("cpu"), [KeptBatch(batch_idx, size)])


def can_join(group: Group, other: Group) -> bool:
    """Return whether a joint call of two groups can be made."""
    layout = group.call.layout()
    return layout is not None and layout == other.call.layout()


def join_groups(groups: Sequence[Group]) -> Group:
    """Join groups into one."""
    calls = [group.call for group in groups]
    return Group(join_calls(calls), [batch for group in groups for batch in group.batches])
