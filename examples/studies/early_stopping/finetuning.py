"""Fine-tuning: pretrained bodies learn other data, all weights or a new head alone.

Design seeds are 0 to 23, those of the report begin at 9700.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bodies
import machines
import numpy as np
import tasks
import torch
from as_built import sizes
from bodies import new_body, pretrained
from runs import NUM_HOLDOUT, Run
from torch import Tensor, nn

KINDS = ("cnn", "vit", "signals", "words", "mobilenet")
CHANCES = (0.25, 0.2, 0.23, 0.2, 0.12)
NUM_TEST = 1000
LEAST, MOST = 200, {"mobilenet": 400}  # samples; 2,000 for the others
BUDGETS = {"cnn": 18, "vit": 18, "signals": 30, "words": 15, "mobilenet": 3}  # thousand samples in all epochs
FASTEST = {"adam": 1e-3, "adamw": 1e-3, "sgd": 3e-2}  # learning rate of all weights; the lowest is a tenth of it
HEAD_FACTOR = 10  # a new head alone learns this much faster


def draw_finetuning(seed: int, data: Path | None = None) -> Run:
    """Draw the run of a seed. A third of the seeds have correct labels, the others 10 to 45 % wrong ones."""
    assert data is not None, "--data is needed: a folder with the data sets"
    r = np.random.RandomState((seed, 13))  # the order of its calls makes the run
    kind, source = _draw_body(r)
    n = int(LEAST * (MOST.get(kind, 2000) / LEAST) ** r.rand())
    what, x, y = _draw_task(r, kind, source, data, n + NUM_HOLDOUT + NUM_TEST)
    num_classes = int(y.max()) + 1
    labels, wrong = str(r.choice(["random", "random", "by class"])), float(r.uniform(0.1, 0.45))
    labels, wrong = ("correct", 0.0) if seed % 3 == 0 else (labels, wrong)
    wrong *= 0.8 if labels == "by class" or num_classes == 2 else 1
    redrawn = wrong * num_classes / (num_classes - 1) if labels == "random" else wrong
    chances = tasks.transition(labels, redrawn, num_classes)
    chosen, holdout, test = torch.arange(len(x)).split(sizes(n, len(x)))[:3]
    noisy, noisy_holdout, noisy_test = (tasks.noisy(r, y[part], chances) for part in (chosen, holdout, test))
    is_full, has_hidden_layer = bool(r.rand() < 0.6), bool(r.rand() < 0.3)
    make_optimizer, optimizer = _draw_optimizer(r, is_full)
    batch_size, dropout = int(r.choice([16, 32, 64])), float(r.choice([0, 0, 0.2]))
    batch_size = {"mobilenet": min(batch_size, 32), "words": max(batch_size, 32)}.get(kind, batch_size)
    schedule = str(r.choice(["", "", "cosine", "one-cycle"]))
    size: Any = pretrained(kind, source, data).size

    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        body = new_body(kind, source, data, is_full)
        layers: list[nn.Module] = [nn.Dropout(dropout)] if dropout else []
        layers += [nn.Linear(size, 64), nn.ReLU()] if has_hidden_layer else []
        head = nn.Sequential(*layers, nn.Linear(64 if has_hidden_layer else size, num_classes))
        return nn.Sequential(OrderedDict(body=body, head=head))

    parts = {"all weights": is_full and kind != "mobilenet", "last blocks": is_full and kind == "mobilenet"}
    parts |= {"head": not is_full, "hidden layer": has_hidden_layer, "dropout": dropout > 0, schedule: bool(schedule)}
    names = [name for name, is_there in parts.items() if is_there]
    told = "correct labels" if labels == "correct" else f"{100 * wrong:.0f} % wrong {labels}"
    return Run(
        seed=seed,
        kind=", ".join([f"{kind} {source}".strip() + f" to {what}", told, f"{n} samples", *names, optimizer]),
        labels=labels,
        num_classes=num_classes,
        make_network=make_network,
        make_optimizer=make_optimizer,
        x=x[chosen],
        y=noisy,
        x_holdout=x[holdout],
        y_holdout=y[holdout],
        y_holdout_noisy=noisy_holdout,
        x_test=x[test],
        y_test=y[test],
        y_test_noisy=noisy_test,
        batch_size=batch_size,
        epochs=int(np.clip(1000 * BUDGETS[kind] // n, 10, 30)),
        schedule=schedule,
        has_batch_norm=is_full and kind in ("cnn", "signals", "mobilenet"),
        chances=chances,
        y_correct=y[chosen],
    )


def frozen_body(seed: int, data: Path) -> Callable[[Tensor], Tensor]:
    """Give the function from inputs to the features of the body as it was before fine-tuning."""
    body = pretrained(*_draw_body(np.random.RandomState((seed, 13))), data)

    def features(x: Tensor) -> Tensor:
        with torch.no_grad():
            found: Tensor = body(x)
        return found

    return features


def _draw_body(r: np.random.RandomState) -> tuple[str, str]:
    """Draw a kind of body, and what it was trained on."""
    kind, source, split = str(r.choice(KINDS, p=CHANCES)), str(r.choice(bodies.SOURCES)), int(r.randint(2))
    return kind, {"words": "", "mobilenet": "", "signals": str(split)}.get(kind, source)


def _draw_task(r: np.random.RandomState, kind: str, source: str, data: Path, number: int) -> tuple[str, Tensor, Tensor]:
    """Draw samples of other data than those that the body has learned."""
    if kind == "words":
        x, y = bodies.sentences(data)[:2]
        num_classes = int(r.choice([2, 3, 4]))
        chosen = r.permutation(int(y.max()) + 1)[:num_classes]
        labels = torch.full((int(y.max()) + 1,), -1)
        labels[torch.tensor(chosen)] = torch.arange(num_classes)
        found = torch.tensor(r.permutation(len(x)))
        found = found[labels[y[found]] >= 0][:number]
        return f"sentences, {num_classes} classes", x[found], labels[y[found]]
    if kind == "signals":
        machine = int(r.randint(100, 1000))
        conditions = bodies.classes(source, len(machines.CONDITIONS))[1]
        return "another machine", *bodies.signals(r, range(machine, machine + 1), conditions, number)
    if kind == "mobilenet":
        name = str(r.choice(["cifar10", "cifar10", "fashion"]))
        return name, *bodies.images(r, data, name, r.permutation(10)[: int(r.choice([5, 10]))], number)
    if source.startswith("cifar10"):
        return "other classes", *bodies.images(r, data, "cifar10", bodies.classes(source)[1], number)
    name = {"fashion": "mnist", "mnist": "fashion"}[source]
    return name, *bodies.images(r, data, name, np.arange(10), number)


def _draw_optimizer(r: np.random.RandomState, is_full: bool) -> tuple[Callable[[Any], torch.optim.Optimizer], str]:
    kind, decay = str(r.choice(["adam", "adamw", "adamw", "sgd"])), float(r.choice([0.01, 0.1]))
    rate = FASTEST[kind] * 10 ** -r.rand() * (1 if is_full else HEAD_FACTOR)
    make: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adam": lambda parameters: torch.optim.Adam(parameters, rate),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=decay),
        "sgd": lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay / 100),
    }
    return make[kind], f"{kind} {rate:.1g}"
