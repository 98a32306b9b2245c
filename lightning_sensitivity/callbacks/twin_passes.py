"""Passes of simulated twins over parts of a batch: each sample goes through few twins, each twin gets many samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_sensitivity.callbacks.batches import are_independent
from lightning_sensitivity.callbacks.run import RunFacts
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.model import ModelCall, noise_generator
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.twins import call_with_batch_statistics, twin

NUM_TWINS = 8  # with fewer, the variance would depend too much on the noise of each
_MAX_WAITING = 2**15  # elements of outputs that wait to be scored together, which saves small networks time
_MIN_PART = 32  # samples, for statistics of batch norm that do not depend on the size of validation batches


@dataclass(frozen=True)
class TwinPass:
    """Hold the outputs of a twin for a part of a batch.

    Attributes:
        samples: Which samples of the batch; from several passes if outputs are small.
        reference: Outputs of the model to compare the twin with.
        outputs: Outputs of the twin.
        weight: Weight of a sample: 1 over the number of twins that it goes through.
    """

    samples: Tensor | slice
    reference: Tensor
    outputs: Tensor
    weight: float


@dataclass(frozen=True)
class TwinPasses:
    """Run twins of a module.

    Attributes:
        model: The module.
        initial: Its parameters before training, on its device.
        has_batch_norm: Whether it has batch norm with running statistics; twins use those of the part instead.
        facts: What is known about the run: whether batches can be split.
    """

    model: nn.Module
    initial: Mapping[str, Tensor]
    has_batch_norm: bool
    facts: RunFacts

    def passes(
        self,
        run: RunIsolated,
        call: ModelCall,
        outputs: Tensor,
        key: tuple[int, int, int, int],
        num_total: float,
    ) -> Iterator[TwinPass]:
        """Yield the passes of twins over a batch, one in memory at a time.

        Args:
            run: Calls a function that runs the model, and leaves no trace.
            call: Calls the model on the batch.
            outputs: Clean outputs for the batch.
            key: Seed, rank, loader and batch; see :func:`~lightning_sensitivity.model.noise_generator`.
            num_total: How many samples of the loader a validation measures, over all processes.

        Raises:
            ValueError: If batch norm needs more samples.
        """
        size = len(outputs)
        if self.has_batch_norm and size < 2:
            raise ValueError(
                "Batch norm needs more than 1 value per channel: use a validation batch size of 2 or more, so that "
                "batches can be measured"
            )
        part_size = min(num_total, max(_MIN_PART, num_total / NUM_TWINS))
        num_parts = self._num_parts(run, call, outputs, part_size)
        twins_per_part = max(1, math.ceil(NUM_TWINS * size / (num_total * num_parts)))
        draw = 0
        for part in range(num_parts):
            samples = slice(part * size // num_parts, (part + 1) * size // num_parts)
            part_call = call if num_parts == 1 else call.select(samples)
            reference = outputs[samples]
            if self.has_batch_norm:
                reference = run(call_with_batch_statistics, self.model, part_call)
            for _ in range(twins_per_part):
                draw -= 1
                generator = noise_generator(*key, draw, device=outputs.device)
                with twin(self.model, self.initial, generator, TWIN_STRENGTH):
                    twin_outputs = run(call_with_batch_statistics, self.model, part_call)
                yield TwinPass(samples, reference, twin_outputs, 1 / twins_per_part)
                del twin_outputs  # before the next ones come

    def _num_parts(self, run: RunIsolated, call: ModelCall, outputs: Tensor, part_size: float) -> int:
        """Choose in how many parts to split a batch; 1 if the outputs for a sample depend on the others."""
        size = sum(call.sizes)
        num_parts = max(1, round(size / part_size))
        if num_parts == 1 or call.layout() is None or len(outputs) != size:
            return 1
        if self.facts.can_join is None:
            self.facts.can_join = _can_be_split(run, call, outputs)
        return num_parts if self.facts.can_join else 1


def _can_be_split(run: RunIsolated, call: ModelCall, outputs: Tensor) -> bool:
    """Return whether the model accepts half of a batch, and gives the same outputs for it."""
    half = slice(0, len(outputs) // 2)
    try:
        single = run(call.select(half))
    except Exception:  # the batch may be a graph, such as nodes and their adjacency matrix
        return False
    return are_independent(outputs[half], single, len(outputs) // 2)


def join_small(passes: Iterable[TwinPass]) -> Iterator[TwinPass]:
    """Join the passes over a batch while their outputs are small, to score them together."""
    waiting: list[TwinPass] = []
    for twin_pass in passes:
        waiting.append(twin_pass)
        if sum(each.outputs.numel() for each in waiting) > _MAX_WAITING:
            yield _join(waiting)
            waiting = []
        del twin_pass  # before the next one comes
    if waiting:
        yield _join(waiting)


def _join(passes: list[TwinPass]) -> TwinPass:
    if len(passes) == 1:
        return passes[0]
    device = passes[0].outputs.device
    slices = [each.samples for each in passes if isinstance(each.samples, slice)]
    samples = [torch.arange(part.start, part.stop) for part in slices]
    return TwinPass(
        samples=torch.cat(samples).to(device),
        reference=torch.cat([each.reference for each in passes]),
        outputs=torch.cat([each.outputs for each in passes]),
        weight=passes[0].weight,
    )
