"""What an epoch shows of a model's sensitivity, loader by loader: at its inputs or at the outputs of submodules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sensitivity.arguments import AnyPerturbation
from lightning_sensitivity.batches import Inputs
from lightning_sensitivity.dtypes import accumulation_dtype
from lightning_sensitivity.outputs import Selector
from lightning_sensitivity.perturbations import noise_generator
from lightning_sensitivity.probe import Probe, apply, check_submodule
from lightning_sensitivity.readings import NAMES, SITE_NAMES, LoaderStatistics
from lightning_sensitivity.strategies import forward


class Measured(NamedTuple):
    """What the risk estimate can use of a batch that was measured.

    Attributes:
        clean: Outputs of the model.
        run: Gives the outputs of the weights that the model has at the time.
        generator: ``(draw, device=...)`` to the source of the batch's noise.
    """

    clean: Tensor
    run: Callable[[], Tensor]
    generator: Callable[..., torch.Generator]


class SensitivityMeasurement:
    """Runs a model on the batches of an epoch, clean and perturbed, and keeps the statistics of each loader.

    Args:
        perturbation: What is done to a tensor.
        at: As for :class:`~lightning_sensitivity.SensitivityMonitor`.
        num_draws: The same.
        seed: The same.
        inputs: The same.
        outputs: The same.
        per_output: The same.
        nan_strategy: The same.
    """

    def __init__(
        self,
        perturbation: AnyPerturbation,
        at: Sequence[str] | str | None,
        num_draws: int,
        seed: int,
        inputs: Inputs,
        outputs: Selector,
        per_output: bool,
        nan_strategy: str,
    ) -> None:
        self._perturbation = perturbation
        self._num_draws, self._seed = num_draws, seed
        self._inputs, self._outputs = inputs, outputs
        self._per_output, self._nan_strategy = per_output, nan_strategy
        # What is perturbed, the inputs (None) or the outputs of submodules, and what is put behind the logged names.
        self._sites: dict[str | None, str] = {at: ""} if at is None or isinstance(at, str) else {a: f"/{a}" for a in at}
        self._statistics: dict[int, list[LoaderStatistics]] = {}  # by loader; one for each site

    def check(self, model: nn.Module) -> None:
        """Require the submodules, after ``configure_model`` may have built them.

        Args:
            model: The module.

        Raises:
            MisconfigurationException: If one of them is none.
        """
        for at in self._sites:
            if at is not None:
                check_submodule(model, at)

    def forget(self) -> None:
        """Begin an epoch with nothing."""
        self._statistics = {}

    def values(self) -> dict[int, dict[str, Tensor]]:
        """What was found so far, by loader and logged name; without loaders of which nothing has a meaning."""
        found = {
            idx: {name: value for statistics in sites for name, value in statistics.named_values().items()}
            for idx, sites in self._statistics.items()
        }
        return {idx: values for idx, values in found.items() if values}

    def statistics(
        self, dataloader_idx: int, device: torch.device, task: str | None, clean: Tensor | None = None
    ) -> list[LoaderStatistics]:
        """The statistics of a loader, one for each site; the first has the risk estimate.

        Args:
            dataloader_idx: Index of the loader.
            device: Where they are kept.
            task: The task of the risk estimate, or None.
            clean: Outputs of its first batch; None for a process that has no batch. Then the number of outputs is not
                known, and need not be: see :func:`~lightning_sensitivity.readings.gather_widest`.
        """
        if dataloader_idx not in self._statistics:
            num_outputs = 1 if clean is None else (*clean.shape, 1, 1)[1]
            self._statistics[dataloader_idx] = [
                LoaderStatistics(
                    name=f"dataloader {dataloader_idx}",
                    task=None if place else task,
                    names=SITE_NAMES if place else NAMES,
                    suffix=suffix,
                    per_output=self._per_output,
                    num_outputs=num_outputs if self._per_output else None,
                    nan_strategy=self._nan_strategy,
                )
                for place, suffix in enumerate(self._sites.values())
            ]
            for statistics in self._statistics[dataloader_idx]:
                statistics.set_dtype(accumulation_dtype(device)).to(device)
        return self._statistics[dataloader_idx]

    def measure(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, key: tuple[int, int], task: str | None
    ) -> Measured:
        """Add a batch to the statistics of its loader.

        Args:
            trainer: The Trainer.
            pl_module: The module, in eval mode.
            batch: What the loader gave.
            key: Index of the loader, and of the batch in it.
            task: As for :meth:`statistics`.

        Raises:
            MisconfigurationException: If it can't be told what to perturb, or the model can't be run.
        """
        dataloader_idx = key[0]
        run = forward(trainer, pl_module)
        probe = Probe(pl_module, batch, self._inputs, self._outputs, None in self._sites, run)
        clean = probe.clean() if dataloader_idx in self._statistics else probe.first_clean()
        generator = partial(noise_generator, self._seed, trainer.global_rank, *key)
        all_statistics = self.statistics(dataloader_idx, pl_module.device, task, clean)
        for at, statistics in zip(self._sites, all_statistics, strict=True):
            noisy = partial(self._noisy_outputs, probe, at, generator, statistics)
            statistics.update(clean, map(noisy, range(self._num_draws)))
        return Measured(clean, probe.clean, generator)

    def _noisy_outputs(
        self,
        probe: Probe,
        at: str | None,
        generator: Callable[..., torch.Generator],
        statistics: LoaderStatistics,
        draw: int,
    ) -> Tensor:
        @cache  # one for all tensors of the draw
        def source(device: torch.device) -> torch.Generator:
            return generator(draw, device=device)

        def perturb(x: Tensor) -> Tensor:
            if draw == 0:
                statistics.add_inputs(x, self._perturbation)
            return apply(self._perturbation, x, source(x.device))

        return probe.perturbed(perturb, at)
