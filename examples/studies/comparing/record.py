"""Trains the candidates of a task with `RiskMonitor`, and keeps what rules need; what is there is not trained again.

python examples/studies/comparing/record.py DATA RUNS 0 96     # tasks 0 to 95, one folder each
"""

from __future__ import annotations

import sys
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw import Task, draw_candidates, draw_task
from lightning.pytorch import Callback, LightningModule, Trainer
from recorded import record_estimates
from runs import Run
from torch import Tensor
from torch.utils.data import DataLoader
from training import QUIET, Classifier, Samples, be_quiet, training_loader

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional.features import bags_of_words, principal_components
from lightning_sensitivity.functional.reference import Reference, fit_reference
from lightning_sensitivity.model import reference as references

BATCH_SIZE, NUM_TRAINING = 120, 1000
SIGMA = 0.1  # of the noise for S


class Recorder(Callback):
    """Keeps what the monitor has seen in every epoch, and the weights."""

    def __init__(self, run: Run, monitor: RiskMonitor) -> None:
        self.run, self.monitor = run, monitor
        self.columns: dict[str, list[np.ndarray]] = {}
        self.rows: list[dict[str, float]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.found: dict[str, Any] = {}

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        metric: Any = self.monitor.metrics[0]
        kept = {name: torch.cat(values) for name, values in metric.kept.items()}
        for name in ("unseen", "twins", "training", *["baseline"] * self.run.has_batch_norm):
            self.columns.setdefault(name, []).append(kept[name].clamp(-6e4, 6e4).half().numpy())
        self.weights.append({name: value.clone() for name, value in pl_module.net.state_dict().items()})
        self.found = {name: metric.told[name] for name in ("num_training", "num_weights")}
        self.found |= {"training_labels": kept["training_labels"].numpy()}
        reference = metric.told["reference"]
        if reference is not None:
            names = ("score", "chance", "claim", "noise", "shares", "predictions", "leave_one_out")
            self.found |= {f"reference_{name}": np.array(getattr(reference, name)) for name in names}


class Recorded(Classifier):
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        pass


def record_task(seed: int, data: Path, runs: Path) -> None:
    """Train the candidates of a task; leave a file for each, and one for the task."""
    start, folder = time.process_time(), runs / f"task_{seed:03d}"
    if (folder / "task.npz").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    be_quiet()
    task = draw_task(seed, data)
    candidates = draw_candidates(task, data)
    for index, run in enumerate(candidates):
        record_candidate(run, folder / f"{index}.npz", task.features(data))
    columns = about(task, data) | {"candidates": [run.kind for run in candidates]}
    columns["seconds"] = time.process_time() - start
    save(folder / "task.npz", columns)
    print(f"{seed}: {task.kind}, {task.what}, {len(candidates)} candidates, {columns['seconds']:.0f} s", flush=True)


def record_candidate(run: Run, file: Path, features: Any) -> None:
    if file.exists():
        return
    start = time.process_time()
    validation = Samples(run.x_holdout, torch.full((len(run.x_holdout),), -100))
    loader = DataLoader(validation, BATCH_SIZE, collate_fn=list, generator=torch.Generator())
    monitor = RiskMonitor(features=features, prefix="val_")
    recorder = Recorder(run, monitor)
    trainer = Trainer(max_epochs=run.epochs, accelerator="cpu", callbacks=[monitor, recorder], **QUIET)
    trainer.fit(Recorded(run), training_loader(run), loader)
    names = sorted({name for row in recorder.rows for name in row})
    columns: dict[str, Any] = {name: np.stack(values) for name, values in recorder.columns.items()}
    columns |= {name: [row.get(name, np.nan) for row in recorder.rows] for name in names}
    columns |= recorder.found | {"kind": run.kind, "has_batch_norm": run.has_batch_norm}
    criterion = np.array(columns["val_risk_criterion"])
    epoch = int(np.nanargmin(criterion)) if np.isfinite(criterion).any() else run.epochs - 1
    columns |= at_epoch(run, recorder.weights[epoch]) | {"epoch": epoch}
    columns["seconds"] = time.process_time() - start
    stacked = {name: torch.stack([each[name] for each in recorder.weights]) for name in recorder.weights[0]}
    frozen = {name for name in stacked if run.epochs > 1 and bool((stacked[name] == stacked[name][:1]).all())}
    torch.save({name: x[:1] if name in frozen else x for name, x in stacked.items()}, file.with_suffix(".pt"))
    save(file, columns)


def at_epoch(run: Run, weights: dict[str, Tensor]) -> dict[str, Any]:
    """Give outputs for test samples, and S, of an epoch's network."""
    network = run.make_network().eval()
    network.load_state_dict(weights)
    with torch.no_grad():
        found = {"test": torch.cat([network(part) for part in run.x_test.split(250)]).clamp(-6e4, 6e4).half().numpy()}
        sensitivity = float("nan")
        if run.x_holdout.is_floating_point():
            noise = SIGMA * torch.randn(run.x_holdout.shape, generator=torch.Generator().manual_seed(0))
            parts = zip(run.x_holdout.split(250), noise.split(250), strict=True)
            changes = torch.cat([(network(x + more) - network(x)).square().mean(1) for x, more in parts])
            sensitivity = float(changes.mean())
    return found | {"sensitivity": sensitivity}


def about(task: Task, data: Path) -> dict[str, Any]:
    """Give the labels of a task, and what the reference predicts."""
    size = min(NUM_TRAINING, len(task.x))
    places = torch.linspace(0, len(task.x) - 1, size).long()
    labels = torch.eye(task.num_classes)[task.y[places]]
    find: Any = task.features(data) or (lambda batch: batch[0])
    seen = in_parts(find, task.x[places])
    columns: dict[str, Any] = {}
    for name, x in (("unseen", task.x_unseen), ("test", task.x_test)):
        columns[f"reference_{name}"] = fit_reference(*_place(labels, *_reduced(seen, in_parts(find, x)))).predictions
    columns |= {"unseen_correct": task.y_unseen, "unseen_noisy": task.y_unseen_noisy, "test_labels": task.y_test}
    columns |= {"kind": task.kind, "what": task.what, "labels": task.labels, "n": len(task.x), "seed": task.seed}
    return columns | {"wrong": float((task.y != task.y_correct).float().mean()), "num_known": size}


def _place(labels: Tensor, features: Tensor, new_features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return features, labels, new_features


def _reduced(features: Tensor, new_features: Tensor) -> tuple[Tensor, Tensor]:
    if features.is_floating_point():
        return principal_components(features, new_features)
    return principal_components(*bags_of_words(features, new_features))


def in_parts(find: Any, x: Tensor) -> Tensor:
    found: Tensor = torch.cat([find([part]) for part in x.split(250)])
    return found.flatten(1)


def save(file: Path, columns: dict[str, Any]) -> None:
    part = file.with_suffix(".part.npz")
    np.savez(part, **{name: np.asarray(value) for name, value in columns.items()})
    part.rename(file)


def remember_references() -> None:
    """Fit a reference once where candidates share their samples."""
    known: dict[int, Reference] = {}
    fit = references.fit_reference

    def remembered(features: Tensor, labels: Tensor, new_features: Tensor, task: str = "multiclass") -> Reference:
        key = hash((features.numpy().tobytes(), labels.numpy().tobytes(), new_features.numpy().tobytes()))
        if key not in known:
            known.clear()
            known[key] = fit(features, labels, new_features, task)
        return known[key]

    references.fit_reference = remembered


if __name__ == "__main__":
    data, runs, first, last = sys.argv[1:5]
    record_estimates()
    remember_references()
    for seed in range(int(first), int(last)):
        try:
            record_task(seed, Path(data), Path(runs))
        except Exception:
            print(f"{seed} failed", flush=True)
            traceback.print_exc()
