"""Two-class tables and texts, as people build them; with noisy labels, if nothing else is requested."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tasks
import torch
from as_built import NUM_TEST, Task, draw_optimizer, draw_recipe, noise_as_requested, num_epochs, sizes
from networks import compose
from runs import NUM_HOLDOUT, Request, Run
from torch import nn

TABLE_SOURCES = ("table", "table", "table", "teacher", "teacher", "breast cancer", "sentences", "sentences")


def draw_table(seed: int, data: Path | None = None, request: Request | None = None) -> Run:
    """Draw a two-class table or sentences, with 15 to 45 % of the labels drawn anew (or 12 to 36 %, by class).

    A request changes sizes and noise.
    """
    r = np.random.RandomState((seed, 7))  # the order of its calls makes the run
    source = str(r.choice(TABLE_SOURCES))
    recipe = draw_recipe(r, source)
    batch_size = int(r.choice([32, 64, 128]))
    n = int(300 * (5000 / 300) ** r.rand())
    n = n if request is None else request.size(seed, n)
    n = min(n, 2000) if source == "sentences" else n
    if source == "table":
        task = Task(source, "table", *tasks.generated_table(r, n + NUM_HOLDOUT + NUM_TEST, 2), 2)
    elif source == "teacher":
        num_inputs = int(r.choice([5, 20, 100]))
        task = Task(source, "teacher", *tasks.teacher(r, n + NUM_HOLDOUT + NUM_TEST, num_inputs, 2), 2)
    else:
        x, y = tasks.breast_cancer() if source == "breast cancer" else tasks.sentences(data)
        if source == "sentences" and r.rand() < 0.5:  # two of the packages
            pair = r.choice(int(y.max()) + 1, 2, replace=False)
            is_kept = torch.tensor(np.isin(y.numpy(), pair))
            x, y = x[is_kept], (y[is_kept] == int(pair[1])).long()
        order = torch.tensor(r.permutation(len(x)))
        num_classes = int(y.max()) + 1
        task = Task(source, f"{source}, {num_classes} classes", x[order], y[order], num_classes)
    n = min(n, max(150, len(task.x) // 2))
    chosen, holdout, test = torch.arange(len(task.x)).split(sizes(n, len(task.x)))[:3]
    labels, noise = str(r.choice(["random", "random", "by class"])), float(r.uniform(0.15, 0.45))
    noise = 0.8 * noise if labels == "by class" else noise
    chances = tasks.transition(labels, noise, task.num_classes)
    if request is not None:
        labels, noise, chances = noise_as_requested(seed, labels, task.num_classes, request) or (labels, noise, chances)
    y, y_holdout_noisy, y_test_noisy = (tasks.noisy(r, task.y[part], chances) for part in (chosen, holdout, test))
    make_optimizer, optimizer = draw_optimizer(r, recipe)
    schedule = str(r.choice(["", "", "", "cosine", "one-cycle", "plateau", "steps"]))
    is_binary = bool(task.num_classes == 2 and r.rand() < 0.5)
    num_outputs = 1 if is_binary else task.num_classes
    x = task.x

    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        return compose(recipe, x.shape[1:], num_outputs, tasks.NUM_WORDS)

    extras = {schedule: bool(schedule), "one output": is_binary}
    names = [name for name, is_there in extras.items() if is_there]
    what = f"{task.what}, {100 * noise:.0f} % noisy {labels}, {n} samples"
    return Run(
        seed=seed,
        kind=", ".join([what, str(recipe), optimizer, *names]),
        labels=labels,
        num_classes=task.num_classes,
        make_network=make_network,
        make_optimizer=make_optimizer,
        x=x[chosen],
        y=y,
        x_holdout=x[holdout],
        y_holdout=task.y[holdout],
        y_holdout_noisy=y_holdout_noisy,
        x_test=x[test],
        y_test=task.y[test],
        y_test_noisy=y_test_noisy,
        batch_size=batch_size,
        epochs=num_epochs(recipe, n, batch_size),
        schedule=schedule,
        is_binary=is_binary,
        has_batch_norm=recipe.norm == "batch norm",
        chances=chances,
        y_correct=task.y[chosen],
    )
