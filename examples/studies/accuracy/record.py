"""Trains a run with the monitors beside it, and keeps all outputs that a rule may look at, epoch by epoch.

So a rule is tried in seconds, and judged by the package's own `RiskEstimate`, which is fed with the kept outputs
(`replayed.py`). Monitors do not change a training by a bit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "early_stopping"))
from recorded import record_estimates
from runs import Run
from training import QUIET, Classifier, Samples, be_quiet, split, training_loader

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.risk import NUM_SCORED
from lightning_sensitivity.model.samples import KeptBatch, spread

BATCH_SIZE, NUM_UNSEEN, NUM_TEST, NO_LABEL = 120, 600, 2000, -100
SIGMA = 0.1


class Recorder(Callback):
    """Keeps outputs of every epoch: what the monitor has seen, and those for the test samples."""

    def __init__(self, run: Run, monitor: RiskMonitor) -> None:
        self.run, self.monitor = run, monitor
        self.columns: dict[str, list[np.ndarray]] = {}
        self.rows: list[dict[str, float]] = []
        self.order = torch.empty(0, dtype=torch.long)

    def keep(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.columns.setdefault(name, []).append(value.clamp(-6e4, 6e4).half().numpy())

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.order = trainer.train_dataloader.sampler.order.clone()
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        kept = {name: torch.cat(values) for name, values in self.monitor.metrics[0].kept.items()}
        self.keep(**{name: kept[name] for name in ("unseen", "twins", "training")})
        if self.run.has_batch_norm:
            self.keep(baseline=kept["baseline"])
        pl_module.eval()
        with torch.no_grad():
            self.keep(test=in_parts(pl_module, self.run.x_test[:NUM_TEST]))
            if self.run.is_augmented:
                self.keep(training_raw=in_parts(pl_module, self.run.x[self.indices(scored(self.monitor))]))
        pl_module.train()

    def indices(self, batches: Iterable[KeptBatch]) -> Tensor:
        """Give the places of the training samples of kept batches."""
        size = self.run.batch_size
        return torch.cat([self.order[batch.index * size : (batch.index + 1) * size] for batch in batches])


def scored(monitor: RiskMonitor) -> list[KeptBatch]:
    return spread(monitor.kept.samples.batches, NUM_SCORED)


def in_parts(network: Any, x: Tensor) -> Tensor:
    return torch.cat([network(part) for part in x.split(250)])


class Recorded(Classifier):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass


def record(run: Run, file: Path, features: Any = None, held_out: bool = False) -> None:
    """Train a run, on 90 % of its samples if a tenth is held out, and leave a file; what is there is not made again."""
    if file.exists():
        return
    be_quiet()
    record_estimates()
    start = time.process_time()
    x = run.x_holdout[:NUM_UNSEEN]
    y = torch.full((len(x),), NO_LABEL)
    labels = {"correct": run.y_holdout[: len(x)], "noisy": run.y_holdout_noisy[: len(x)]}
    if held_out:
        rest, x_held, y_held = split(run)
        number = len(x_held)
        correct = run.y_correct[:number]
        x, y = torch.cat([x_held, x]), torch.cat([y_held, y])
        labels = {"correct": torch.cat([correct, labels["correct"]]), "noisy": torch.cat([y_held, labels["noisy"]])}
        run = replace(rest, y_correct=run.y_correct[number:])
    validation = DataLoader(Samples(x, y), BATCH_SIZE, collate_fn=list, generator=torch.Generator())
    monitor = RiskMonitor(
        "binary" if run.is_binary else "multiclass", validation_labels=held_out, features=features, prefix="val_"
    )
    recorder = Recorder(run, monitor)
    monitors: list[Callback] = [monitor]
    if x.is_floating_point() and not held_out:
        monitors.append(SensitivityMonitor(SIGMA, per_output=run.is_binary, prefix="val_"))
    trainer = Trainer(max_epochs=run.epochs, accelerator="cpu", callbacks=[*monitors, recorder], **QUIET)
    keeper = Finder(recorder)
    trainer.callbacks.append(keeper)
    trainer.fit(Recorded(run), training_loader(run), validation)
    columns: dict[str, Any] = {name: np.stack(values) for name, values in recorder.columns.items()}
    names = sorted({name for row in recorder.rows for name in row})
    columns |= {name: np.array([row.get(name, np.nan) for row in recorder.rows]) for name in names}
    columns |= keeper.found | about(run, labels, x, y)
    columns["seconds"] = np.array(time.process_time() - start)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(".part.npz")
    np.savez_compressed(part, **columns)
    part.rename(file)


class Finder(Callback):
    """Takes the reference and the places of kept samples from the monitor, before it forgets them."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder, self.found = recorder, dict[str, Any]()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        monitor, recorder = self.recorder.monitor, self.recorder
        metric = monitor.metrics[0]
        self.found = {
            "kept_indices": recorder.indices(monitor.kept.samples.batches).numpy(),
            "scored_indices": recorder.indices(scored(monitor)).numpy(),
            "scored_labels": torch.cat(metric.kept["training_labels"]).numpy(),
            "unseen_batches": np.array([batch.index for batch in monitor.samples[0].batches]),
            "num_weights": np.array(monitor.record.num_weights),
            "num_training": np.array(monitor.record.num_training),
        }
        reference = monitor.kept.references.get(0)
        if reference is not None:
            numbers = {name: getattr(reference, name) for name in ("score", "chance", "claim", "noise", "shares")}
            self.found |= {f"reference_{name}": np.array(value) for name, value in numbers.items()}
            self.found["reference_predictions"] = reference.predictions.numpy()
            self.found["reference_leave_one_out"] = reference.leave_one_out.numpy()


def about(run: Run, labels: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Any]:
    """Tell what a run is, and the labels of unseen, test and training samples."""
    expected = run.y_test_noisy[:NUM_TEST].numpy()
    chances = np.empty(0) if run.chances is None else run.chances.numpy()
    return {
        "unseen_correct": labels["correct"].numpy(), "unseen_noisy": labels["noisy"].numpy(), "unseen_given": y.numpy(),
        "test_labels": run.y_test[:NUM_TEST].numpy(), "test_noisy": expected, "chances": chances,
        "train_labels": run.y.numpy(), "train_correct": run.y_correct.numpy(),
        "input_power": np.array(float(x.float().square().mean())),
        "about_kind": run.kind, "about_seed": run.seed, "about_labels": run.labels, "about_n": len(run.x),
        "about_num_classes": run.num_classes, "about_is_augmented": run.is_augmented, "about_is_binary": run.is_binary,
        "about_schedule": run.schedule, "about_has_batch_norm": run.has_batch_norm, "about_smoothing": run.smoothing,
    }  # fmt: skip
