"""Runs as people build them: everything that they put together is drawn, one choice after the other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tasks
import torch
from networks import ACTIVATIONS, Recipe, compose
from runs import NUM_HOLDOUT, Request, Run, scaled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

PHOTOS = ("mnist", "fashion", "cifar10", "people")
SOURCES = ("mnist", "fashion", "cifar10", "cifar10", "people", "digits", "digits")
SOURCES += ("table", "table", "teacher", "breast cancer", "sentences")
NUM_TEST = 2000
_SHARES = {"correct": 0.0, "random": 1.0, "by class": 0.8}  # of the noise that is drawn
NUM_PRETRAINING = 2000


@dataclass
class Task:
    """Samples to choose from, in the order in which they are taken."""

    source: str
    what: str
    x: Tensor
    y: Tensor
    num_classes: int
    y_people: Tensor | None = None  # what people said, if labels are theirs
    before: tuple[Tensor, Tensor] | None = None  # samples of other classes, on which a network was trained before


def draw_as_built(seed: int, data: Path | None = None, request: Request | None = None) -> Run:
    """Draw the run of a seed; a request changes sizes and noise."""
    r = np.random.RandomState((seed, 5))  # the order of its calls makes the run
    source = str(r.choice(SOURCES))
    recipe = draw_recipe(r, source)
    batch_size = int(r.choice([32, 64, 128]))
    n = int(300 * (20000 / 300) ** (r.rand() ** 2)) if source in PHOTOS else int(150 * (20000 / 150) ** (r.rand() ** 2))
    n = n if request is None else request.size(seed, n)
    n = min(n, {"mlp": 20000, "words": 2000}.get(recipe.body, 4000))
    task = _draw_task(r, source, n, data)
    n = min(n, max(150, len(task.x) // 2))
    batch_size = max(batch_size, 128) if n >= 4000 else batch_size
    if r.rand() < 0.25 and source not in ("digits", "breast cancer"):  # these are too few
        task = _imbalanced(r, task, n + NUM_HOLDOUT + NUM_TEST)
        n = min(n, len(task.x) // 2)
    chosen, holdout, test = torch.arange(len(task.x)).split(sizes(n, len(task.x)))[:3]
    labels, noise, chances = _draw_noise(r, task)
    if request is not None:
        labels, noise, chances = noise_as_requested(seed, labels, task.num_classes, request) or (labels, noise, chances)
    y, y_holdout_noisy, y_test_noisy = (_noisy(r, task, part, chances) for part in (chosen, holdout, test))
    make_optimizer, optimizer = draw_optimizer(r, recipe)
    schedule = str(r.choice(["", "", "", "cosine", "one-cycle", "plateau", "steps"]))
    is_augmented = bool(task.x.ndim == 4 and recipe.body != "mlp" and r.rand() < 0.3)
    is_normalized = bool(source in PHOTOS and r.rand() < 0.5)
    smoothing = float(r.choice([0, 0, 0, 0, 0, 0.1]))
    is_binary = bool(task.num_classes == 2 and r.rand() < 0.5)
    num_outputs = 1 if is_binary else task.num_classes
    x = scaled(task.x[: n + NUM_HOLDOUT + NUM_TEST])
    x = (x - x.mean((0, 2, 3), keepdim=True)) / x.std((0, 2, 3), keepdim=True) if is_normalized else x

    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        network = compose(recipe, x.shape[1:], num_outputs, tasks.NUM_WORDS)
        return network if task.before is None else _trained_before(network, *task.before, task.num_classes)

    extras = {schedule: schedule, "augmented": is_augmented, "normalized": is_normalized, "smoothed": smoothing}
    extras |= {"one output": is_binary, "trained before": task.before is not None}
    names = [name for name, is_there in extras.items() if is_there]
    noise_name = "correct labels" if labels == "correct" else f"{100 * noise:.0f} % noisy {labels}"
    return Run(
        seed=seed,
        kind=", ".join([task.what, noise_name, f"{n} samples", str(recipe), optimizer, *names]),
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
        is_augmented=is_augmented,
        is_flipped=source in ("fashion", "cifar10", "people"),
        schedule=schedule,
        smoothing=smoothing,
        is_binary=is_binary,
        has_batch_norm=recipe.norm == "batch norm",
        chances=chances,
        y_correct=task.y[chosen],
    )


def draw_recipe(r: np.random.RandomState, source: str) -> Recipe:
    body = "mlp"
    if source == "sentences":
        body = "words"
    elif source in PHOTOS or source == "digits":
        bodies = ["convolutions", "mlp", "transformer"]
        body = str(r.choice(bodies, p=[0.7, 0.2, 0.1]))
    norms = ["no norm", "batch norm", "batch norm", "group norm"]
    is_residual = bool(r.rand() < 0.25)
    return Recipe(
        body=body,
        norm=str(r.choice(norms)) if body in ("mlp", "convolutions") else "layer norm",
        down=str(r.choice(["max-pooling", "max-pooling", "average pooling", "stride"])),
        head=str(r.choice(["flatten", "mean", "hidden"])),
        dropout=float(r.choice([0, 0, 0.1, 0.25, 0.5])),
        is_residual=is_residual,
        depth=int(r.choice([2, 3, 4] if body == "convolutions" else [1, 2, 3])),
        width=int(r.choice([64, 128, 256])),
        activation=ACTIVATIONS[r.choice([0, 0, 0, 1, 2, 3])],
    )


def _draw_task(r: np.random.RandomState, source: str, n: int, data: Path | None) -> Task:
    if source in ("table", "teacher"):
        num_classes = int(r.choice([2, 2, 3, 5, 10]))
        total = 4 * (n + NUM_HOLDOUT + NUM_TEST)  # some classes may be taken less often
        if source == "table":
            return Task(
                source, f"table, {num_classes} classes", *tasks.generated_table(r, total, num_classes), num_classes
            )
        num_inputs = int(r.choice([5, 20, 100]))
        return Task(
            source, f"teacher, {num_classes} classes", *tasks.teacher(r, total, num_inputs, num_classes), num_classes
        )
    people = str(r.choice(["aggre_label", "worse_label"]))
    if source == "breast cancer":
        x, y = tasks.breast_cancer()
    elif source == "sentences":
        x, y = tasks.sentences(data)
    else:
        x, y = tasks.digits() if source == "digits" else tasks.images(data, "cifar10" if source == "people" else source)
    order = torch.tensor(r.permutation(len(x)))
    num_classes = int(y.max()) + 1
    if source in ("mnist", "fashion", "cifar10") and r.rand() < 0.2:
        is_other = y[order] >= 5
        before, order = order[is_other][:NUM_PRETRAINING], order[~is_other]
        task = Task(source, f"{source}, 5 classes", x[order], y[order], 5)
        task.before = scaled(x[before]), y[before] - 5
        return task
    task = Task(source, source, x[order], y[order], num_classes)
    if source == "people":
        task.what, task.y_people = f"people's {people}", tasks.labels_by_people(data, people)[order]
    return task


def _imbalanced(r: np.random.RandomState, task: Task, number: int) -> Task:
    """Take fewer samples of some classes, up to ten times, in training and elsewhere."""
    shares = 10.0 ** -r.rand(task.num_classes)
    is_kept = torch.tensor(r.rand(len(task.y)) < shares[task.y.numpy()])
    y_people = None if task.y_people is None else task.y_people[is_kept][:number]
    x, y = task.x[is_kept][:number], task.y[is_kept][:number]
    return Task(task.source, f"{task.what}, imbalanced", x, y, task.num_classes, y_people, task.before)


def sizes(n: int, total: int) -> list[int]:
    rest = total - n
    num_holdout = min(NUM_HOLDOUT, rest // 3)
    num_test = min(NUM_TEST, rest - num_holdout)
    return [n, num_holdout, num_test, rest - num_holdout - num_test]


def _draw_noise(r: np.random.RandomState, task: Task) -> tuple[str, float, Tensor | None]:
    kind, noise = str(r.choice(["correct", "correct", "random", "random", "by class"])), float(r.uniform(0.1, 0.5))
    if task.y_people is not None:
        return "people", float((task.y_people != task.y).float().mean()), None
    noise = _SHARES[kind] * noise
    return kind, noise, tasks.transition(kind, noise, task.num_classes)


def noise_as_requested(seed: int, labels: str, num_classes: int, request: Request) -> tuple[str, float, Tensor] | None:
    """Give other noise, if this is not as requested."""
    if request.is_noisy == (labels != "correct"):
        return None
    r = np.random.RandomState((seed, 12))
    kind = str(r.choice(["random", "random", "by class"])) if request.is_noisy else "correct"
    noise = _SHARES[kind] * float(r.uniform(0.1, 0.5))
    return kind, noise, tasks.transition(kind, noise, num_classes)


def _noisy(r: np.random.RandomState, task: Task, part: Tensor, chances: Tensor | None) -> Tensor:
    if chances is not None:
        return tasks.noisy(r, task.y[part], chances)
    assert task.y_people is not None
    return task.y_people[part]


def draw_optimizer(r: np.random.RandomState, recipe: Recipe) -> tuple[Callable[[Any], torch.optim.Optimizer], str]:
    kinds = ["adam", "adamw", "adamw", "sgd"]
    kind = str(r.choice(kinds if recipe.body in ("mlp", "convolutions") else kinds[:3]))
    rate = 10 ** r.uniform(0, 1) * (5e-3 if kind == "sgd" else 3e-4)
    decay = float(r.choice([1e-4, 5e-4, 5e-3])) if kind == "sgd" else 10 ** r.uniform(-2, -1)
    make: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adam": lambda parameters: torch.optim.Adam(parameters, rate),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=decay),
        "sgd": lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay),
    }
    return make[kind], f"{kind} {rate:.2g}" + f", decay {decay:.2g}" * (kind != "adam")


def num_epochs(recipe: Recipe, n: int, batch_size: int) -> int:
    """Spend fewer steps on networks whose steps take long."""
    num_steps = {64: 500, 128: 400, 256: 300}[recipe.width]
    num_steps, most = (1500, 50) if recipe.body == "mlp" else (num_steps, 30)
    return int(np.clip(num_steps // -(-n // batch_size), 10, most))


def _trained_before(network: nn.Module, x: Tensor, y: Tensor, num_classes: int) -> nn.Module:
    """Train a network on other classes, and give it a new head."""
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(5):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            cross_entropy(network(x[batch]), y[batch]).backward()
            optimizer.step()
    network.head = nn.Linear(network.head.in_features, num_classes)
    return network
