"""Trains the models of each task, asks `compare_models`, and keeps all outputs for `judge.py`.

    python examples/studies/comparing/record.py DATA RUNS

RUNS gets one file a task; what is there is not made again.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from draw import NUM_TASKS, Setting, Task, draw, make_model
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity import compare_models
from lightning_sensitivity.functional import fit_reference


def train(setting: Setting, task: Task) -> nn.Module:
    """Train a model with Adam, 64 samples at a time."""
    torch.manual_seed(task.number)
    model = make_model(setting, task.x, task.num_classes)
    optimizer = torch.optim.Adam(model.parameters(), setting.rate)
    for _ in range(setting.epochs):
        for batch in torch.randperm(len(task.x)).split(64):
            if len(batch) == 1:  # batch norm needs more
                continue
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(task.x[batch]), task.y[batch]).backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def outputs_of(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(250)])


def record(task: Task) -> dict[str, Any]:
    """Return what the models and the reference say, and what `compare_models` makes of it."""
    models = {name: train(setting, task) for name, setting in task.settings.items()}
    reference = fit_reference(task.x, task.y, task.x_unseen)
    try:
        rows = compare_models(models, [task.x_unseen], training=[(task.x, task.y)], noise=None)
        compared: Any = {row.name: row._asdict() for row in rows}
    except MisconfigurationException as refusal:
        if reference.is_trusted:
            raise
        compared = str(refusal)
    return {
        "unseen": torch.stack([outputs_of(model, task.x_unseen) for model in models.values()]),
        "test": torch.stack([outputs_of(model, task.x_test) for model in models.values()]),
        "reference": reference.predictions,
        "is_trusted": reference.is_trusted,
        "skill": reference.skill,
        "compared": compared,
        "names": list(models),
    }


def main() -> None:
    data, runs = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    runs.mkdir(parents=True, exist_ok=True)
    for number in range(NUM_TASKS):
        file = runs / f"{number:02d}.pt"
        if file.exists():
            continue
        start, task = time.process_time(), draw(number, data)
        found = record(task)
        about = {"kind": task.kind, "data": task.data, "redrawn": task.redrawn, "num_training": len(task.x)}
        torch.save(found | about | {"y_unseen": task.y_unseen, "y_test": task.y_test}, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
        seconds = time.process_time() - start
        print(f"{time.strftime('%H:%M:%S')} {number} {task.kind}, {task.data}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
