"""Chooses each candidate's epoch anew, by the criterion of the package as it is, from what `record.py` has left.

python examples/studies/comparing/again.py DATA RUNS     # a file more for each candidate, which judges.py takes
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from draw import draw_candidates, draw_task
from record import at_epoch, save
from torch import Tensor
from training import be_quiet

from lightning_sensitivity import RiskEstimate
from lightning_sensitivity.functional.reference import Reference
from lightning_sensitivity.functional.risk import TWIN_STRENGTH

REFERENCE = ("score", "chance", "claim", "noise", "shares", "predictions", "leave_one_out")


def criteria(run: Any) -> np.ndarray:
    """Give the criterion of each epoch."""
    reference = None
    if "reference_predictions" in run:
        values = {name: run[f"reference_{name}"] for name in REFERENCE}
        reference = Reference(**{name: torch.tensor(x) if x.ndim else float(x) for name, x in values.items()})
    carried: dict[str, Any] = {"calibration": None, "gap_weight": None}
    columns = {name: torch.tensor(run[name]).float() for name in ("unseen", "twins", "training")}
    columns["baseline"] = torch.tensor(run["baseline"]).float() if "baseline" in run else columns["unseen"]
    found = []
    for epoch in range(len(columns["unseen"])):
        unseen, twins, training, baseline = (
            columns[name][epoch] for name in ("unseen", "twins", "training", "baseline")
        )
        numbers = {name: int(run[name]) for name in ("num_training", "num_weights")}
        metric = RiskEstimate(strength=TWIN_STRENGTH, reference=reference, **numbers, **carried)
        predictions = None if reference is None else reference.predictions
        metric.update(unseen, list(twins.unbind(1)), baseline_outputs=baseline, reference=predictions)
        metric.update_training(training, torch.tensor(run["training_labels"]))
        found.append(float(metric.compute()["risk_criterion"]))
        findings: Any = metric.findings
        carried = {"calibration": metric.calibration, "gap_weight": findings.gap_weight}
    return np.array(found)


def choose_again(folder: Path, data: Path, name: str) -> None:
    """Leave a file for each candidate of a task: its scores, and outputs at the epoch where they are lowest."""
    candidates = None
    for index in range(len(np.load(folder / "task.npz")["candidates"])):
        file, run = folder / f"{index}.{name}.npz", np.load(folder / f"{index}.npz")
        if file.exists():
            continue
        found = criteria(run) if name == "today" else run["val_risk_estimate"]
        epoch = int(np.nanargmin(found)) if np.isfinite(found).any() else len(found) - 1
        columns = {"test": run["test"], "sensitivity": run["sensitivity"]}
        if epoch != int(run["epoch"]):
            candidates = candidates or draw_candidates(draw_task(int(folder.name[5:]), data), data)
            kept: dict[str, Tensor] = torch.load(folder / f"{index}.pt")
            columns = at_epoch(candidates[index], {key: x[min(epoch, len(x) - 1)] for key, x in kept.items()})
        save(file, columns | {"epoch": epoch, "val_risk_criterion": found})


if __name__ == "__main__":
    be_quiet()
    data, runs = map(Path, sys.argv[1:3])
    for folder in sorted(runs.glob("task_*")):
        if (folder / "task.npz").exists():
            choose_again(folder, data, sys.argv[3])
            print(folder.name, flush=True)
