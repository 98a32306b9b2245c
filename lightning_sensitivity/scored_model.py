"""A model that Lightning's Trainer validates without a step or a label of its own: it scores every sample."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sensitivity.batches import select_targets, uncompiled
from lightning_sensitivity.dtypes import accumulation_dtype
from lightning_sensitivity.extremes import num_outputs_seen
from lightning_sensitivity.image_perturbations import four_shifts
from lightning_sensitivity.metric import OutputSensitivity
from lightning_sensitivity.outputs import Selector
from lightning_sensitivity.perturbations import GaussianNoise, noise_generator
from lightning_sensitivity.probe import Probe
from lightning_sensitivity.sample_scores import ERROR, LOSS, NUM_LABELS, SampleScores
from lightning_sensitivity.tasks import check_task

_BATCH_HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")


class Settings(NamedTuple):
    """How every model of a comparison is run; see :func:`~lightning_sensitivity.compare_models`."""

    perturbation: GaussianNoise
    num_draws: int
    seed: int
    shifts: tuple[int, ...]
    task: str
    inputs: Selector
    outputs: Selector
    targets: Selector


class Scored(NamedTuple):
    """What a pass over the samples gave, over all processes, on the CPU.

    Attributes:
        samples: The :attr:`~lightning_sensitivity.sample_scores.SampleScores.table`, over all batches.
        log_probabilities: One row a sample, one column a class; without columns where there are no classes, or maps.
        sensitivity: S.
        stderr: Its standard error.
        num_outputs: K.
        task: What they are for.
        num_parameters: How many parameters the model has.
        seconds: Of the whole pass, with loading.
    """

    samples: Tensor
    log_probabilities: Tensor
    sensitivity: float
    stderr: float
    num_outputs: int
    task: str
    num_parameters: int
    seconds: float


class ScoredModel(pl.LightningModule):
    """Runs a model on clean and noisy inputs in the Trainer's validation loop.

    Args:
        model: The model. A LightningModule's own hooks for moving and transforming batches are used.
        settings: How to run it.
        file: Where the main process leaves what it found, since a strategy may run it in a process of its own.
    """

    def __init__(self, model: nn.Module, settings: Settings, file: Path) -> None:
        super().__init__()
        self.model: nn.Module | None = model
        self._settings, self._file = settings, file
        self._scored: Scored | None = None
        self._tables: list[Tensor] = []
        self._log_probabilities: list[Tensor] = []
        self._labels_fit = True
        if isinstance(inner := uncompiled(model), pl.LightningModule):
            for hook in _BATCH_HOOKS:
                setattr(self, hook, getattr(inner, hook))

    def result(self) -> Scored:
        """What the pass found.

        Raises:
            ValueError: If it found nothing, since there was no batch.
        """
        if self._scored is None and self._file.exists():
            self._scored = Scored(*torch.load(self._file))
        if self._scored is None:
            raise ValueError("Expected `dataloader` to give two samples or more, but got no batch.")
        return self._scored

    def release(self) -> None:
        """Let go of the model, and of what was measured."""
        self.model = self._scored = None
        self._tables, self._log_probabilities = [], []
        for hook in _BATCH_HOOKS:
            self.__dict__.pop(hook, None)

    def configure_model(self) -> None:
        """Build what the model builds late."""
        assert self.model is not None
        if isinstance(inner := uncompiled(self.model), pl.LightningModule):
            inner.configure_model()

    def on_validation_start(self) -> None:
        """Begin with nothing."""
        if (num_loaders := len(self.trainer.num_val_batches)) != 1:
            raise MisconfigurationException(f"`dataloader` should be one loader, got {num_loaders}.")
        self._sensitivity = _Sensitivity().set_dtype(accumulation_dtype(self.device)).to(self.device)
        self._tables, self._log_probabilities, self._labels_fit = [], [], True
        self._start = time.perf_counter()

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score the samples of a batch."""
        assert self.model is not None
        settings = self._settings
        probe = Probe(self.model, batch, settings.inputs, settings.outputs)
        (x,), clean = probe.tensors, probe.clean()

        def outputs(new: Tensor) -> Tensor:
            return probe.perturbed(lambda _: new)

        scores = SampleScores(clean, settings.task)
        scores.add_inputs(x, settings.perturbation.second_moment(x))

        def noisy_outputs(draw: int) -> Tensor:
            generator = noise_generator(settings.seed, self.global_rank, 0, batch_idx, draw, x.device)
            noisy = outputs(settings.perturbation(x, generator))
            scores.add_noisy(noisy)
            return noisy

        self._sensitivity.update(clean, map(noisy_outputs, range(settings.num_draws)))
        for pixels in settings.shifts:
            for moved in four_shifts(x, pixels):
                scores.add_shifted(outputs(moved))
        if self._labels_fit and (targets := self._targets(batch, clean)) is not None:
            scores.add_targets(targets)
        self._tables.append(scores.table)
        self._log_probabilities.append(scores.log_probabilities)

    def on_validation_epoch_end(self) -> None:
        """Put together what all processes found."""
        samples = self._gathered(self._tables, accumulation_dtype(self.device))
        fits = self._gathered([torch.tensor([[self._labels_fit]], device=self.device)], torch.uint8)
        if not bool(fits.all()):
            samples[:, [NUM_LABELS, LOSS, ERROR]] = torch.nan  # those of earlier batches were none, either
        if len(samples) < 2:
            raise ValueError(f"Expected `dataloader` to give two samples or more, but got {len(samples)}.")
        assert self.model is not None
        assert isinstance(self._sensitivity, OutputSensitivity)
        num_outputs = torch.tensor([[num_outputs_seen(self._sensitivity.extremes)]], device=self.device)
        self._scored = Scored(
            samples,
            self._gathered(self._log_probabilities, torch.float32),
            float(self._sensitivity.compute()),
            float(self._sensitivity.stderr),
            int(self._gathered([num_outputs], torch.int64).max()),
            self._settings.task,
            sum(parameter.numel() for parameter in self.model.parameters() if not is_lazy(parameter)),
            time.perf_counter() - self._start,
        )
        if self.trainer.is_global_zero:
            torch.save(tuple(self._scored), part := self._file.with_suffix(".part"))
            part.replace(self._file)
        self.trainer.strategy.barrier()  # no process ends before it is there

    def _targets(self, batch: Any, clean: Tensor) -> Tensor | None:
        assert self.model is not None
        told = self._settings.targets
        if callable(told) and told(batch) is None:
            return None
        try:
            targets = select_targets(self.model, batch, told)
        except MisconfigurationException:
            if told is not None:
                raise
            return None  # a loader without labels
        try:
            check_task(clean, targets, self._settings.task)
        except ValueError as error:
            if told is not None:
                raise
            rank_zero_warn(
                f"`compare_models` takes the loader for one without labels, since what stands in their place is none:"
                f" {error} If they are elsewhere, say so with `targets=`, or what they are for with `task=`."
            )
            self._labels_fit = False
            return None
        return targets

    def _gathered(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """The parts of all batches and processes, on the CPU; of those that have any."""
        whole = torch.cat(parts).to(dtype) if parts else torch.zeros(0, 0, dtype=dtype, device=self.device)
        if self.trainer.world_size > 1:
            everywhere = [part for part in gather_all_tensors(whole) if len(part)]
            whole = torch.cat(everywhere) if everywhere else whole
        return whole.cpu()


class ComparisonProgressBar(TQDMProgressBar):
    """Says which of the models is running."""

    model_name = ""

    @property
    def validation_description(self) -> str:
        """What stands before the bar of the batches."""
        return self.model_name


class _Sensitivity(OutputSensitivity):
    def _report_non_finite(self, problem: str) -> None:
        raise ValueError(problem)
