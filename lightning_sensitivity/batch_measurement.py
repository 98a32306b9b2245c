"""Measures the batches of a loop, with the clean outputs that the user's step computes where they can be trusted."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sensitivity.isolation import no_trace
from lightning_sensitivity.loaders import num_batches
from lightning_sensitivity.nested import copied
from lightning_sensitivity.perturbations import noise_generator
from lightning_sensitivity.probe import Probe
from lightning_sensitivity.reuse import WROTE_INTO_MODULE, Witness, copies_of, sizes_of, why_not
from lightning_sensitivity.risk_measurement import RiskMeasurement, num_twins
from lightning_sensitivity.sensitivity_measurement import SensitivityMeasurement

log = logging.getLogger(__name__)


class _Shown(NamedTuple):
    """What the first batch of a loader has shown before its step: the clean outputs, and the weights."""

    clean: Tensor
    sizes: Tensor


class BatchMeasurement:
    """Begins with a batch before the step may change it, and ends after the step, or at once.

    The noise makes one pass a draw. The clean pass is the step's own, if that calls the module on the batch. The first
    batch of each loader is measured by passes of our own, which show whether those of the step can be trusted.

    Args:
        sensitivity: Gets what is measured.
        risk: Gets it, too, in a fit.
        seed: Of the noise.
    """

    def __init__(self, sensitivity: SensitivityMeasurement, risk: RiskMeasurement, seed: int) -> None:
        self._sensitivity, self._risk, self._seed = sensitivity, risk, seed
        # Of a loop: who watches its steps, the loaders whose steps give what our passes do, and why others' do not.
        self._witness: Witness | None = None
        self._trusted: set[int] = set()
        self._problems: dict[int, str] = {}
        # Of the step that is watched: the batch, and what our own passes have shown, where trust is still missing.
        self._pending: Probe | None = None
        self._shown: _Shown | None = None
        # Of a run: loaders of which a batch was measured, and those of which one was left out.
        self._measured: set[int] = set()
        self._left_out: set[int] = set()

    def begin_run(self) -> None:
        """Expect other loaders."""
        self._measured, self._left_out = set(), set()

    def stop_watching(self) -> None:
        """Leave no hook on the module, and forget what the loop has shown."""
        if self._witness is not None:
            self._witness.close()
        self._witness, self._trusted, self._problems, self._pending, self._shown = None, set(), {}, None, None

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
        for earlier in range(dataloader_idx if batch_idx == 0 else 0):
            for statistics in self._sensitivity.statistics(earlier, pl_module.device, self._risk.task):
                statistics.compute()

        if not self._sensitivity.wants(
            dataloader_idx, batch_idx, num_batches(trainer)[dataloader_idx], trainer.world_size
        ):
            return
        may_watch = self._sensitivity.needs_clean and dataloader_idx not in self._problems
        if may_watch and (problem := why_not(trainer, pl_module)) is not None:
            self._compute_from_now_on(dataloader_idx, problem)
            may_watch = False
        runs_user_code = self._sensitivity.runs_user_code
        with (
            no_trace(pl_module) if runs_user_code else nullcontext(),
            trainer.precision_plugin.val_step_context(),
        ):
            # Copies, since the step may write into its batch, and the user's functions, too.
            own = copied(batch) if may_watch or runs_user_code else batch
            copies = copies_of(batch, own)
            try:
                if batch is None:
                    raise MisconfigurationException("Expected a batch, got None.")
                probe = self._sensitivity.probe(trainer, pl_module, own)
            except MisconfigurationException as error:
                if dataloader_idx not in self._measured:
                    raise
                # Where samples are corrupt, say: no reason to end a run.
                if dataloader_idx not in self._left_out:
                    self._left_out.add(dataloader_idx)
                    rank_zero_warn(f"`SensitivityMonitor` leaves a batch of dataloader {dataloader_idx} out: {error}")
                return
        is_trusted = may_watch and dataloader_idx in self._trusted
        clean = None if is_trusted else self._measure(trainer, pl_module, probe, batch_idx, dataloader_idx)
        if may_watch:  # from now on, since our own passes are no steps
            self._watch(trainer, pl_module, probe, copies, dataloader_idx, clean)
        if is_trusted and self._pending is None:
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
        (probe, shown), (self._pending, self._shown) = (self._pending, self._shown), (None, None)
        result, problem, clean = self._witness.result(), self._witness.problem, None
        if result is not None:
            with no_trace(pl_module) if self._sensitivity.runs_user_code else nullcontext():
                clean = probe.select(result)
        if shown is not None and clean is not None:
            if not torch.equal(sizes_of(pl_module), shown.sizes):
                clean, problem = None, WROTE_INTO_MODULE
            elif clean.dtype != shown.clean.dtype or not torch.equal(clean, shown.clean):
                clean, problem = None, "what the step's call gave is not what the module gave before it"
        if shown is None:
            self._measure(trainer, pl_module, probe, batch_idx, dataloader_idx, clean)
        elif clean is not None:
            self._trusted.add(dataloader_idx)
            log.debug("`SensitivityMonitor` takes the clean outputs of dataloader %d from the step.", dataloader_idx)
        # DDP broadcasts buffers in the first step of a validation: the next batch will show.
        is_broadcast = problem == WROTE_INTO_MODULE and batch_idx == 0 and trainer.world_size > 1
        if clean is None and not is_broadcast:
            self._compute_from_now_on(dataloader_idx, problem)

    def _watch(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        probe: Probe,
        copies: Sequence[tuple[Tensor, Tensor]],
        dataloader_idx: int,
        clean: Tensor | None,
    ) -> None:
        """Have the step watched that gets the batch, if it can be; `clean` is what our own pass gave, if one ran."""
        try:
            shown = None if clean is None else _Shown(clean, sizes_of(pl_module))
            self._witness = self._witness or Witness(pl_module)
            with trainer.precision_plugin.val_step_context():
                self._witness.watch(probe.arguments, copies)
        except Exception as error:  # over weights of some kind: no run is to fail by what only saves a pass
            self._compute_from_now_on(dataloader_idx, f"the step can't be watched ({type(error).__name__}: {error})")
        else:
            self._pending, self._shown = probe, shown

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
    ) -> Tensor:
        generator = partial(noise_generator, self._seed, trainer.global_rank, dataloader_idx, batch_idx)
        with no_trace(pl_module), trainer.precision_plugin.val_step_context():
            clean = self._sensitivity.measure(pl_module, probe, generator, dataloader_idx, self._risk.task, clean)
            self._measured.add(dataloader_idx)
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
        return clean
