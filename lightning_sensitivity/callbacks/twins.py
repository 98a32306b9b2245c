"""Run simulated twins on the kept samples: each sample goes through few twins, each twin gets many samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_sensitivity.callbacks.samples import KeptSamples, Pass, check_agreement
from lightning_sensitivity.functional.risk import TWIN_STRENGTH
from lightning_sensitivity.model import ModelCall, noise_generator
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.twins import batch_statistics, has_batch_norm, twin_weights

NUM_TWINS = 8  # with fewer, the variance would depend too much on the noise of each
_MIN_PART = 32  # samples, so that statistics of batch norm do not hang on a few of them


class TwinOutputs(NamedTuple):
    """Hold what twins give for a group.

    Attributes:
        twins: Outputs of twins, ``(N, K)`` each; every sample goes through as many twins as there are
            tensors.
        compared_with: Outputs of the model to compare them with: those with batch statistics, if it has batch
            norm.
    """

    twins: list[Tensor]
    compared_with: Tensor


class TwinRunner:
    """Run twins of a module on the kept samples of a loader.

    Args:
        module: The module.
        initial: Its parameters before training, on any device.
        run: Runs the module and leaves no trace.
        samples: The samples.
        seed: The seed of the twins.
    """

    def __init__(
        self,
        module: LightningModule,
        initial: Mapping[str, Tensor],
        run: RunIsolated,
        samples: KeptSamples,
        seed: int,
    ) -> None:
        self._module = module
        self._initial = {name: weight.to(module.device) for name, weight in initial.items()}
        self._run = run
        self._samples = samples
        self._key = seed, module.global_rank, samples.dataloader_idx
        self._has_batch_norm = has_batch_norm(module)

    def run(self, measured: Pass) -> TwinOutputs:
        """Run twins on a group, in parts that go through different twins.

        Args:
            measured: The group, its call and its clean outputs.

        Raises:
            JointPassError: If a part of the group has other outputs by itself.
        """
        group, outputs, parts = measured.group, measured.outputs, self._parts(measured)
        if len(parts) > 1:
            rows, call = parts[0]
            check_agreement(outputs[rows], self._run(call), outputs.dtype)
        compared_with = outputs
        if self._has_batch_norm:
            compared_with = torch.cat([self._call(call) for _, call in parts])
        num_rounds = max(1, math.ceil(NUM_TWINS * group.size / (self._samples.size * len(parts))))
        twins = [torch.empty_like(outputs) for _ in range(num_rounds)]
        for place, (rows, call) in enumerate(parts):
            for number, twin in enumerate(twins, place * num_rounds):
                twin[rows] = self._call_twin(call, (*self._key, group.batches[0].index, number))
        return TwinOutputs(twins, compared_with)

    def _parts(self, measured: Pass) -> list[tuple[slice, ModelCall]]:
        """Split the samples of a group into equal parts."""
        size, call = len(measured.outputs), measured.call
        count = round(size / max(_MIN_PART, self._samples.size / NUM_TWINS))
        if count < 2 or not self._samples.can_regroup or not measured.can_split():
            return [(slice(size), call)]
        slices = [slice(part * size // count, (part + 1) * size // count) for part in range(count)]
        return [(rows, call.select(rows)) for rows in slices]

    def _call_twin(self, call: ModelCall, key: tuple[int, ...]) -> Tensor:
        generator = noise_generator(*key, device=self._module.device)
        return self._call(call, twin_weights(self._module, self._initial, generator, TWIN_STRENGTH))

    def _call(self, call: ModelCall, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Call the model, with batch statistics if it has batch norm and there are several samples."""
        if self._has_batch_norm and call.size != 1:
            return self._run(_call_with_batch_statistics, self._module, call, weights)
        return self._run(call, None, weights)


def _call_with_batch_statistics(module: nn.Module, call: ModelCall, weights: Mapping[str, Tensor] | None) -> Tensor:
    with batch_statistics(module):
        return call(None, weights)
