"""Measures the batches of a loop, with the clean outputs that the user's step computes where they can be trusted."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from functools import partial
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from lightning_sensitivity.isolation import no_trace
from lightning_sensitivity.loaders import num_batches
from lightning_sensitivity.nested import copied
from lightning_sensitivity.perturbations import noise_generator
from lightning_sensitivity.probe import Probe
from lightning_sensitivity.reuse import Witness, agree, why_not
from lightning_sensitivity.risk_measurement import RiskMeasurement, num_twins
from lightning_sensitivity.sensitivity_measurement import SensitivityMeasurement

log = logging.getLogger(__name__)


class BatchMeasurement:
    """Begins with a batch before the step may change it, and ends after the step, or at once.

    The noise makes one pass a draw. The clean pass is the step's own, if that calls the module on the batch; the first
    batch of each loader is run once more, to see whether it can be trusted.

    Args:
        sensitivity: Gets what is measured.
        risk: Gets it, too, in a fit.
        seed: Of the noise.
    """

    def __init__(self, sensitivity: SensitivityMeasurement, risk: RiskMeasurement, seed: int) -> None:
        self._sensitivity, self._risk, self._seed = sensitivity, risk, seed
        # Of a loop: who watches its steps, the batch of the step that runs, with its outputs by a pass of our own (for
        # the first of a loader), and why the outputs of the steps of a loader can't be used.
        self._witness: Witness | None = None
        self._pending: tuple[Probe, Tensor | None] | None = None
        self._problems: dict[int, str] = {}

    def stop_watching(self) -> None:
        """Leave no hook on the module, and forget what the loop has shown."""
        if self._witness is not None:
            self._witness.close()
        self._witness, self._pending, self._problems = None, None, {}

    def begin(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        """Measure a batch, or watch for the outputs that the step computes.

        Args:
            trainer: The Trainer.
            pl_module: The module, in the mode of the step.
            batch: What the step gets.
            batch_idx: Index of the batch in its loader.
            dataloader_idx: Index of the loader.

        Raises:
            MisconfigurationException: If the model can't be run on it.
        """
        # A process that had no batch of an earlier loader joins the others, who reduced when that loader was done.
        for earlier in range(dataloader_idx):
            for statistics in self._sensitivity.statistics(earlier, pl_module.device, self._risk.task):
                statistics.compute()

        if not self._sensitivity.wants(
            dataloader_idx, batch_idx, num_batches(trainer)[dataloader_idx], trainer.world_size
        ):
            return
        runs_user_code = batch_idx == 0 or self._sensitivity.runs_user_code
        with (
            no_trace(pl_module) if runs_user_code else nullcontext(),
            trainer.precision_plugin.val_step_context(),
        ):
            probe = self._sensitivity.probe(trainer, pl_module, batch)
            if self._sensitivity.needs_clean and dataloader_idx not in self._problems:
                problem = why_not(trainer, pl_module, batch)
                if problem is None:
                    problem = self._watch(trainer, pl_module, batch, probe, batch_idx)
                if problem is None:
                    return
                self._compute_from_now_on(dataloader_idx, problem)
        self._measure(trainer, pl_module, probe, batch_idx, dataloader_idx)

    def end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int, dataloader_idx: int) -> None:
        """Measure the batch, if its step was watched.

        Args:
            trainer: The Trainer.
            pl_module: The module, in the mode of the step.
            batch_idx: Index of the batch in its loader.
            dataloader_idx: Index of the loader.
        """
        if self._pending is None:
            return
        assert self._witness is not None
        (probe, own), self._pending = self._pending, None
        clean, problem = self._witness.outputs(), self._witness.problem
        if clean is not None and own is not None and not agree(clean, own):
            clean, problem = None, "what the step's call gave is not what the module gives after it"
        if clean is None:
            self._compute_from_now_on(dataloader_idx, problem)
            clean = own if self._witness.module_is_as_before() else None
        elif batch_idx == 0:
            log.debug("`SensitivityMonitor` takes the clean outputs of dataloader %d from the step.", dataloader_idx)
        self._measure(trainer, pl_module, probe, batch_idx, dataloader_idx, clean)

    def _watch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, probe: Probe, batch_idx: int
    ) -> str | None:
        """Have the step watched that gets the batch; why it can't be, otherwise."""
        own = self._sensitivity.probe(trainer, pl_module, copied(batch))  # the step may write into its batch
        self._witness = self._witness or Witness(pl_module)
        # What the step changes around its call may leave no trace. The first batch shows it.
        clean = own.clean(is_first=True) if batch_idx == 0 else None
        try:
            self._witness.watch(probe.arguments, probe.select)
        except TypeError as error:
            return f"`forward` does not take what it is given ({error})"
        self._pending = own, clean
        return None

    def _compute_from_now_on(self, dataloader_idx: int, problem: str) -> None:
        self._problems[dataloader_idx] = problem
        log.debug("`SensitivityMonitor` computes the clean outputs of dataloader %d: %s.", dataloader_idx, problem)

    def _measure(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        probe: Probe,
        batch_idx: int,
        dataloader_idx: int,
        clean: Tensor | None = None,
    ) -> None:
        generator = partial(noise_generator, self._seed, trainer.global_rank, dataloader_idx, batch_idx)
        with no_trace(pl_module), trainer.precision_plugin.val_step_context():
            clean = self._sensitivity.measure(pl_module, probe, generator, dataloader_idx, self._risk.task, clean)
            first = self._sensitivity.statistics(dataloader_idx, pl_module.device, self._risk.task)[0]
            if first.task is not None:
                # A process without a batch of this loader adds none of its training samples: it can't be waited for.
                if first.update_count == 1:
                    first.add_risk(self._risk.training_sums(pl_module))
                num_measured = self._sensitivity.num_wanted(
                    dataloader_idx, num_batches(trainer)[dataloader_idx], trainer.world_size
                )
                twins = range(num_twins(num_measured, trainer.world_size))
                generators = (generator(-1 - twin, device=pl_module.device) for twin in twins)
                first.add_risk(self._risk.holdout_sums(pl_module, clean, probe.clean, generators))
