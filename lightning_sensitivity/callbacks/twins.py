"""Run simulated twins on the kept samples: each sample goes through few twins, each twin gets many samples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_sensitivity.callbacks.samples import Group, KeptSamples, check_agreement
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.model import ModelCall, noise_generator
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.twins import batch_statistics, has_batch_norm, twin_weights

NUM_TWINS = 8  # with fewer, the variance would depend too much on the noise of each
_MAX_JOINED = 2**16  # elements of outputs
_MIN_PART = 32  # samples, so that statistics of batch norm do not hang on a few of them


class TwinOutputs(NamedTuple):
    """Hold outputs for a part of a group.

    Attributes:
        rows: Which rows of the group the part has.
        twins: Outputs of twins, ``(N, K)`` each; every sample goes through as many twins as there are tensors.
        compared_with: Outputs of the model to compare them with: those with batch statistics, if it has batch norm.
    """

    rows: slice
    twins: list[Tensor]
    compared_with: Tensor


class TwinRunner:
    """Run twins of a module on the kept samples of a loader.

    Args:
        module: The module.
        initial: Its parameters before training, on its device.
        run: Runs the module and leaves no trace.
        samples: The samples.
        key: Seed, rank and loader; see :func:`~lightning_sensitivity.model.noise_generator`.
    """

    def __init__(
        self,
        module: nn.Module,
        initial: Mapping[str, Tensor],
        run: RunIsolated,
        samples: KeptSamples,
        key: tuple[int, int, int],
    ) -> None:
        self._module = module
        self._initial = initial
        self._run = run
        self._samples = samples
        self._key = key
        self._has_batch_norm = has_batch_norm(module)

    def run(self, group: Group, call: ModelCall, outputs: Tensor) -> Iterable[TwinOutputs]:
        """Run twins on a group: part after part if outputs are large, else all at once, which is faster to score.

        Args:
            group: The group.
            call: Its call, on the device of the module.
            outputs: Clean outputs of the group.

        Raises:
            JointPassError: If a part of the group has other outputs by itself.
        """
        found = self._run_parts(group, call, outputs)
        return found if outputs.numel() > _MAX_JOINED else [_join(list(found))]

    def _run_parts(self, group: Group, call: ModelCall, outputs: Tensor) -> Iterator[TwinOutputs]:
        """Yield the outputs for one part after the other."""
        parts = self._parts(group, call, outputs)
        if len(parts) > 1:
            check_agreement(outputs[parts[0]], self._run(call.select(parts[0])), outputs.dtype)
        num_rounds = max(1, math.ceil(NUM_TWINS * group.size / (self._samples.size * len(parts))))
        for place, part in enumerate(parts):
            part_call = call if len(parts) == 1 else call.select(part)
            compared_with = self._call(part_call, None) if self._has_batch_norm else outputs[part]
            twins = []
            for draw in range(place * num_rounds, (place + 1) * num_rounds):
                generator = noise_generator(*self._key, group.batch_indices[0], draw, device=outputs.device)
                weights = twin_weights(self._module, self._initial, generator, TWIN_STRENGTH)
                twins.append(self._call(part_call, weights))
            yield TwinOutputs(part, twins, compared_with)

    def _parts(self, group: Group, call: ModelCall, outputs: Tensor) -> list[slice]:
        """Split the samples of a group into equal parts, which go through different twins."""
        size = len(outputs)
        can_split = self._samples.can_regroup and size == group.size and call.layout() is not None
        part_size = max(_MIN_PART, self._samples.size / NUM_TWINS)
        count = max(1, round(size / part_size)) if can_split else 1
        return [slice(part * size // count, (part + 1) * size // count) for part in range(count)]

    def _call(self, call: ModelCall, weights: Mapping[str, Tensor] | None) -> Tensor:
        """Call the model, with batch statistics if it has batch norm and there are several samples."""
        if self._has_batch_norm and call.size != 1:
            return self._run(_call_with_batch_statistics, self._module, call, weights)
        return self._run(call, None, weights)


def _join(parts: list[TwinOutputs]) -> TwinOutputs:
    """Join the outputs for all parts of a group."""
    twins = [torch.cat(outputs) for outputs in zip(*(part.twins for part in parts), strict=True)]
    rows = slice(parts[0].rows.start, parts[-1].rows.stop)
    return TwinOutputs(rows, twins, torch.cat([part.compared_with for part in parts]))


def _call_with_batch_statistics(module: nn.Module, call: ModelCall, weights: Mapping[str, Tensor] | None) -> Tensor:
    with batch_statistics(module):
        return call(None, weights)
