"""Measures a kept training by the real callback, as if it had been there.

A *replay* is a fit of the real Trainer with the real callback: the same network, the same loaders with the same random
numbers, but steps that learn nothing. At the end of each training epoch, before its validation, the weights of that
epoch are loaded. So the callback sees what it would have seen, and logs the same values to the last digit (a test of
`tests/test_examples.py` compares them).
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finetuning import frozen_body
from lightning.pytorch import Callback, LightningModule, Trainer
from rules import lowest
from runs import Run
from torch import Tensor
from torch.utils.data import DataLoader
from training import QUIET, Samples, be_quiet, split, training_loader
from truth import NUM_HOLDOUT, drawn_once, in_columns, truth_of_epochs

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional import Reference

BATCH_SIZE = 120  # of validation
NO_LABEL = -100


class Replay(LightningModule):
    """Has the weights of a kept training, epoch by epoch."""

    def __init__(self, run: Run, weights: dict[str, Tensor]) -> None:
        super().__init__()
        self.run, self.weights = run, weights
        self.net = run.make_network()
        self._load(0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == 0:  # a monitor may look at the first step
            return self.run.loss(self(batch[0]), batch[1])
        return 0 * next(weight for weight in self.parameters() if weight.requires_grad).sum()

    def on_train_batch_end(self, *args: Any) -> None:
        if self.trainer.is_last_batch:
            self._load(self.current_epoch + 1)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass  # most samples have no labels

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)  # does nothing, but counts steps

    def _load(self, index: int) -> None:
        self.net.load_state_dict({name: values[index] for name, values in self.weights.items()})


class Recorder(Callback):
    """Leaves one row an epoch: what was logged; and the first monitor's reference, with its training samples."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.reference: Reference | None = None
        self.order = torch.empty(0)  # of the training samples in the first epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.order = trainer.train_dataloader.sampler.order.clone()
            self.reference = reference_of(trainer)
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


class ClosingLines(logging.Handler):
    """Collects the last lines of monitors, in the order of the callbacks."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")

    def emit(self, record: logging.LogRecord) -> None:
        if " was lowest at epoch " in record.getMessage():
            self.lines.append(record.getMessage())

    def __enter__(self) -> ClosingLines:
        self.before = self.logger.level, self.logger.propagate
        self.logger.setLevel(logging.INFO)
        self.logger.propagate = False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *args: object) -> None:
        self.logger.removeHandler(self)
        self.logger.setLevel(self.before[0])
        self.logger.propagate = self.before[1]


def reference_of(trainer: Trainer) -> Reference | None:
    """Find the reference of the first monitor."""
    monitor = next(callback for callback in trainer.callbacks if isinstance(callback, RiskMonitor))
    return monitor.kept.references.get(0)


# %% Replays.
def replayed(run: Run, weights: dict[str, Tensor], monitors: list[Callback], x: Tensor, y: Tensor) -> Recorder:
    """Replay a kept training with monitors and these validation samples; see the module."""
    recorder = Recorder()
    trainer = Trainer(max_epochs=run.epochs, accelerator="cpu", callbacks=[*monitors, recorder], **QUIET)
    validation = DataLoader(Samples(x, y), BATCH_SIZE, collate_fn=list, generator=torch.Generator())
    trainer.fit(Replay(run, weights), training_loader(run), validation)
    return recorder


def measure(pool: str, seed: int, data: Path | None, folder: Path) -> None:
    """Replay the training of a run, and leave what monitors have logged and said."""
    be_quiet()
    run, kept = drawn_once(pool, seed, data), torch.load(folder / "full.pt")
    run, options = replace(run, epochs=len(kept["rows"])), options_of(pool, run, data)
    monitors: list[Callback] = [RiskMonitor(**options)]
    if "features" in options:
        monitors.append(RiskMonitor(task=options["task"], prefix="raw_"))
    x = run.x_holdout[:NUM_HOLDOUT]
    with ClosingLines() as closing:
        recorder = replayed(run, kept["weights"], monitors, x, torch.full((len(x),), NO_LABEL))
    columns = in_columns(recorder.rows) | about_reference(run, recorder)
    columns["closing"] = np.array(closing.lines)
    np.savez(folder / "logged.part.npz", **columns)
    (folder / "logged.part.npz").rename(folder / "logged.npz")


def measure_fewer(pool: str, seed: int, data: Path | None, folder: Path) -> None:
    """Replay the training on 90 % of the samples, with the others as labelled validation samples."""
    be_quiet()
    run, kept = drawn_once(pool, seed, data), torch.load(folder / "fewer.pt")
    rest, x_held, y_held = split(replace(run, epochs=len(kept["rows"])))
    x = run.x_holdout[:NUM_HOLDOUT]
    x, y = torch.cat([x_held, x]), torch.cat([y_held, torch.full((len(x),), NO_LABEL)])
    monitor = RiskMonitor(**options_of(pool, run, data), validation_labels=True)
    columns = in_columns(replayed(rest, kept["weights"], [monitor], x, y).rows)
    chosen = lowest(columns["val_risk_criterion"])
    scores = truth_of_epochs(rest, kept["weights"], {chosen})[chosen]
    columns = {f"fewer_{name}": values for name, values in columns.items()}
    columns |= {f"both_{name}": np.array(value) for name, value in scores.items()}
    np.savez(folder / "logged_fewer.part.npz", **columns)
    (folder / "logged_fewer.part.npz").rename(folder / "logged_fewer.npz")


def options_of(pool: str, run: Run, data: Path | None) -> dict[str, Any]:
    """Give the options of a monitor: the defaults, and in fine-tuning the frozen body."""
    options: dict[str, Any] = {"task": "binary" if run.is_binary else "multiclass", "prefix": "val_"}
    if pool == "fine-tuning":
        assert data is not None
        body = frozen_body(run.seed, data)
        options["features"] = lambda batch: body(batch[0])
    return options


def about_reference(run: Run, recorder: Recorder) -> dict[str, np.ndarray]:
    """Give the leave-one-out predictions of the reference, and the labels that it knows."""
    reference = recorder.reference
    if reference is None:
        return {}
    known = recorder.order[: reference.num_samples]
    numbers = {name: getattr(reference, name) for name in ("score", "chance", "claim", "noise")}
    columns = {f"reference_{name}": np.array(value) for name, value in numbers.items()}
    return columns | {"loo": reference.leave_one_out.numpy(), "kept_labels": run.y[known].numpy()}
