"""What an epoch shows of a model's sensitivity, loader by loader: at its inputs or at the outputs of submodules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_sensitivity.arguments import AnyPerturbation
from lightning_sensitivity.batches import Inputs
from lightning_sensitivity.dtypes import accumulation_dtype
from lightning_sensitivity.outputs import Selector, are_log_probabilities
from lightning_sensitivity.probe import Probe, apply, check_submodule
from lightning_sensitivity.readings import NAMES, SITE_NAMES, LoaderStatistics
from lightning_sensitivity.strategies import forward


class SensitivityMeasurement:
    """Runs a model on the batches of an epoch, clean and perturbed, and keeps the statistics of each loader.

    Args:
        perturbation: What is done to a tensor.
        at: As for :class:`~lightning_sensitivity.SensitivityMonitor`.
        method: The same.
        num_draws: The same.
        num_samples: The same.
        inputs: The same.
        outputs: The same.
        per_output: The same.
        nan_strategy: The same.
    """

    def __init__(
        self,
        perturbation: AnyPerturbation,
        at: Sequence[str] | str | None,
        method: str,
        num_draws: int,
        num_samples: int | None,
        inputs: Inputs,
        outputs: Selector,
        per_output: bool,
        nan_strategy: str,
    ) -> None:
        self._perturbation = perturbation
        self._by_gradient = method == "gradient"
        self._num_draws, self._num_samples = num_draws, num_samples
        self._inputs, self._outputs = inputs, outputs
        self._per_output, self._nan_strategy = per_output, nan_strategy
        # What is perturbed, the inputs (None) or the outputs of submodules, and what is put behind the logged names.
        self._sites: dict[str | None, str] = {at: ""} if at is None or isinstance(at, str) else {a: f"/{a}" for a in at}
        # By loader: the statistics, one for each site, and the size of its first batch.
        self._statistics: dict[int, list[LoaderStatistics]] = {}
        self._batch_sizes: dict[int, int] = {}
        self._num_outputs: dict[int, int] = {}  # as last seen, in an earlier epoch perhaps

    @property
    def needs_clean(self) -> bool:
        """Whether clean outputs are compared, which the step may have computed; a gradient takes its own."""
        return not self._by_gradient

    @property
    def runs_user_code(self) -> bool:
        """Whether a probe does, beside the model."""
        return callable(self._inputs) or callable(self._outputs)

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
        self._statistics, self._batch_sizes = {}, {}

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
            clean: Outputs of its first batch; None for a process that has no batch. Then the number of outputs may not
                be known, and need not be: see :func:`~lightning_sensitivity.readings.gather_widest`.
        """
        if dataloader_idx not in self._statistics:
            if clean is not None:
                self._num_outputs[dataloader_idx] = (*clean.shape, 1, 1)[1]
            num_outputs = self._num_outputs.get(dataloader_idx, 1)
            self._statistics[dataloader_idx] = [
                LoaderStatistics(
                    name=f"dataloader {dataloader_idx}",
                    task=None if place else task,
                    names=SITE_NAMES if place else NAMES,
                    suffix=suffix,
                    is_rounded=not self._by_gradient,
                    per_output=self._per_output,
                    num_outputs=num_outputs if self._per_output else None,
                    nan_strategy=self._nan_strategy,
                )
                for place, suffix in enumerate(self._sites.values())
            ]
            for statistics in self._statistics[dataloader_idx]:
                statistics.set_dtype(accumulation_dtype(device)).to(device)
        return self._statistics[dataloader_idx]

    def num_wanted(self, dataloader_idx: int, num_batches: float, world_size: int) -> float:
        """How many batches of a loader are measured in this process; all, until the first one was.

        Args:
            dataloader_idx: Index of the loader.
            num_batches: Of the loader in this process; inf where it does not say.
            world_size: Number of processes.
        """
        if self._num_samples is None or num_batches == math.inf or dataloader_idx not in self._batch_sizes:
            return num_batches
        num_samples = math.ceil(self._num_samples / (world_size * self._num_draws))
        return min(num_batches, math.ceil(num_samples / self._batch_sizes[dataloader_idx]))

    def wants(self, dataloader_idx: int, batch_idx: int, num_batches: float, world_size: int) -> bool:
        """Whether a batch is measured: evenly spaced ones, since loaders are often sorted, and always the same.

        Args:
            dataloader_idx: Index of the loader.
            batch_idx: Index of the batch in it.
            num_batches: As for :meth:`num_wanted`.
            world_size: The same.
        """
        wanted = self.num_wanted(dataloader_idx, num_batches, world_size)
        return batch_idx == 0 or wanted == num_batches or batch_idx * wanted % num_batches < wanted

    def probe(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> Probe:
        """What runs the model on a batch.

        Args:
            trainer: The Trainer.
            pl_module: The module, in eval mode.
            batch: What the loader gave.

        Raises:
            MisconfigurationException: If it can't be told what to perturb.
        """
        run = forward(trainer, pl_module)
        return Probe(pl_module, batch, self._inputs, self._outputs, None in self._sites, run)

    def measure(
        self,
        pl_module: pl.LightningModule,
        probe: Probe,
        generator: Callable[..., torch.Generator],
        dataloader_idx: int,
        task: str | None,
        clean: Tensor | None = None,
    ) -> Tensor:
        """Add a batch to the statistics of its loader.

        Args:
            pl_module: The module, in eval mode.
            probe: Runs it on the batch.
            generator: ``(draw, device=...)`` to the source of the batch's noise.
            dataloader_idx: Index of the loader.
            task: As for :meth:`statistics`.
            clean: Outputs for the batch as it is, if they are known.

        Returns:
            Outputs for the batch as it is.

        Raises:
            MisconfigurationException: If the model can't be run.
            TypeError: If outputs are not floating.
            ValueError: If shapes of outputs or of the noise do not fit, or a gradient can't be taken.
        """
        is_first = dataloader_idx not in self._batch_sizes
        if clean is None and not self._by_gradient:
            clean = probe.clean(is_first)
        all_statistics = self.statistics(dataloader_idx, pl_module.device, task, clean)
        for at, statistics in zip(self._sites, all_statistics, strict=True):
            noisy: Iterable[Tensor]
            if self._by_gradient:
                clean, noisy = self._gradient_outputs(probe, at, statistics, is_first)
            else:
                noisy = map(partial(self._noisy_outputs, probe, at, statistics, generator), range(self._num_draws))
            assert clean is not None
            statistics.update(clean, noisy)
        assert clean is not None
        if is_first:
            self._batch_sizes[dataloader_idx] = max(1, len(clean))
            has_log_probabilities = not self._per_output and are_log_probabilities(clean)
            for statistics in all_statistics:
                statistics.has_log_probabilities = has_log_probabilities
        return clean

    def _noisy_outputs(
        self,
        probe: Probe,
        at: str | None,
        statistics: LoaderStatistics,
        generator: Callable[..., torch.Generator],
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

    def _gradient_outputs(
        self, probe: Probe, at: str | None, statistics: LoaderStatistics, is_first: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Clean outputs, and two for each sample whose changes, ±r, have the mean 0 and the expected square r²."""

        def second_moment(x: Tensor) -> Any:
            statistics.add_inputs(x, self._perturbation)
            return self._perturbation.second_moment(x)  # type: ignore[attr-defined]

        clean, squares = probe.gradient(second_moment, at, is_first)
        clean = clean.to(squares.dtype)
        change = squares.sqrt().reshape(-1, *[1] * (clean.ndim - 1))
        return clean, [clean + change, clean - change]
