"""Draws tasks of the study at random: samples, noisy labels, and 6 to 8 candidates to choose from.

The kind of a task follows from its seed, so that the first tasks are a fair sample of all.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "early_stopping"))
import tasks
from as_built import draw_recipe
from bodies import Frozen, trained_on_test_images
from networks import Recipe, compose
from runs import Run, scaled

WORSE_SHARES = (0.0, 0.25, 0.25, 1.0)  # of the images that have their "worse" label: 9, 17, 17 or 40 % are wrong
KINDS = (
    "small images",
    "large images",
    "small tables",
    "people",
    "fine-tuned",
    "large tables",
    "small images",
    "large images",
    "texts",
    "people",
    "fine-tuned",
    "small images",
)
SIZES = {"small": (250, 1000), "large": (3000, 10_000), "people": (500, 10_000), "fine-tuned": (250, 1000)}
SIZES["texts"] = (300, 2000)
LABELS = {"correct": 0.25, "random": 0.4, "by class": 0.35}  # how often each is drawn, where labels are not by people
LEAST_WRONG, MOST_WRONG = 0.2, 0.4
NUM_UNSEEN, NUM_TEST = 600, 4000
FEWEST_EPOCHS, MOST_EPOCHS, NUM_STEPS = 6, 30, 400
MOST_SECONDS = {"small": 1.5, "large": 3.0}  # of a training, by a count of operations; large from 1,500 samples on
SECONDS_A_STEP, SECONDS_A_LAYER, SECONDS_A_GIGAFLOP = 1e-3, 3e-4, 0.05
MOST_FAILED = 40  # candidates that take too long are drawn anew at most this often
NUM_MONITORED = 1100  # training samples that take as long as the monitor's passes


@dataclass
class Task:
    """The samples that all candidates share."""

    seed: int
    kind: str
    what: str
    labels: str  # "correct", "random", "by class" or "people"
    num_classes: int
    x: Tensor  # of training, and so on
    y: Tensor
    y_correct: Tensor
    x_unseen: Tensor
    y_unseen: Tensor  # correct
    y_unseen_noisy: Tensor
    x_test: Tensor
    y_test: Tensor  # correct
    batch_size: int
    source: str
    body: int | None = None  # the pretrained body that is fine-tuned

    def features(self, data: Path) -> Callable[[Any], Tensor] | None:
        """Give the function from a batch to the features of the body before fine-tuning."""
        if self.body is None:
            return None
        body = trained_on_test_images("strides", self.body, data)

        def features(batch: Any) -> Tensor:
            with torch.no_grad():
                found: Tensor = body(batch[0])
            return found

        return features


def draw_task(seed: int, data: Path) -> Task:
    """Draw the samples of a task."""
    r = np.random.RandomState((seed, 46))  # the order of its calls makes the task
    kind = KINDS[seed % len(KINDS)]
    fewest, most = SIZES.get(kind) or SIZES[kind.split()[0]]
    n = int(fewest * (most / fewest) ** r.rand())
    source, what, x, y, said = _draw_samples(r, kind, n, data)
    n = min(n, len(x) // 3)
    num_unseen = min(NUM_UNSEEN, len(x) // 3)
    order = torch.tensor(r.permutation(len(x)))[: n + num_unseen + NUM_TEST]
    chosen, unseen, test = order.split([n, num_unseen, len(order) - n - num_unseen])
    num_classes = int(y.max()) + 1
    labels, wrong = str(r.choice(list(LABELS), p=list(LABELS.values()))), float(r.uniform(LEAST_WRONG, MOST_WRONG))
    if said is not None:
        labels, noisy = "people", said
    else:
        wrong = 0.0 if labels == "correct" else 0.75 * wrong if num_classes == 2 else wrong
        redrawn = wrong * num_classes / (num_classes - 1) if labels == "random" else wrong
        noisy = tasks.noisy(r, y, tasks.transition(labels, redrawn, num_classes))
    share = float((noisy[chosen] != y[chosen]).float().mean())
    body = int(r.randint(2)) if kind == "fine-tuned" or (kind == "people" and r.rand() < 0.3) else None
    return Task(
        seed=seed,
        kind=kind,
        what=f"{what}, {n} samples, {100 * share:.0f} % wrong {labels}" + ", fine-tuned" * (body is not None),
        labels=labels,
        num_classes=num_classes,
        x=scaled(x[chosen]),
        y=noisy[chosen],
        y_correct=y[chosen],
        x_unseen=scaled(x[unseen]),
        y_unseen=y[unseen],
        y_unseen_noisy=noisy[unseen],
        x_test=scaled(x[test]),
        y_test=y[test],
        batch_size=int(r.choice([32, 64] if n < 1500 else [64, 128])),
        source=source,
        body=body,
    )


def _draw_samples(r: np.random.RandomState, kind: str, n: int, data: Path) -> tuple[str, str, Tensor, Tensor, Any]:
    """Draw a source; give its name, what it is, inputs, correct labels, and what people said, if they did."""
    if kind.endswith("tables"):
        num_classes, num_inputs = int(r.choice([2, 3, 5, 10])), int(r.choice([5, 20, 100]))
        total = n + NUM_UNSEEN + NUM_TEST
        if r.rand() < 0.5:
            return "table", f"table, {num_classes} classes", *tasks.generated_table(r, total, num_classes), None
        x, y = tasks.teacher(r, total, num_inputs, num_classes)
        return "teacher", f"teacher, {num_inputs} inputs, {num_classes} classes", x, y, None
    if kind == "texts":
        x, y = tasks.sentences(data)
        if r.rand() < 0.5:
            pair = r.choice(int(y.max()) + 1, 2, replace=False)
            is_kept = torch.tensor(np.isin(y.numpy(), pair))
            x, y = x[is_kept], (y[is_kept] == int(pair[1])).long()
        return "sentences", f"sentences, {int(y.max()) + 1} classes", x, y, None
    if kind == "people":
        x, y = tasks.images(data, "cifar10")
        share = float(r.choice(WORSE_SHARES))
        said, worse = tasks.labels_by_people(data, "aggre_label"), tasks.labels_by_people(data, "worse_label")
        return "people", "cifar10", x, y, torch.where(torch.tensor(r.rand(len(said)) < share), worse, said)
    if kind == "fine-tuned":
        return "cifar10", "cifar10", *tasks.images(data, "cifar10"), None
    source = str(r.choice(["digits", "mnist", "fashion", "cifar10"][kind == "large images" :]))
    x, y = tasks.digits() if source == "digits" else tasks.images(data, source)
    return source, source, x, y, None


# %% Candidates.
def draw_candidates(task: Task, data: Path) -> list[Run]:
    """Draw the networks to choose from: of one family with hyperparameters drawn, or of several families."""
    r = np.random.RandomState((task.seed, 47))
    number, is_mixed = int(r.randint(6, 9)), bool(r.rand() < 0.5)
    first = draw_recipe(r, task.source)
    candidates: list[Run] = []
    num_failed = 0
    while len(candidates) < number:
        candidate = _draw_candidate(r, task, first, is_mixed, len(candidates), data)
        is_affordable = candidate.epochs >= FEWEST_EPOCHS
        if is_affordable or num_failed >= MOST_FAILED:
            candidates.append(replace(candidate, epochs=max(candidate.epochs, FEWEST_EPOCHS)))
        else:
            num_failed += 1
            if not is_mixed:  # try another family
                first, candidates = draw_recipe(r, task.source), []
    return candidates


def _draw_candidate(r: np.random.RandomState, task: Task, first: Recipe, is_mixed: bool, index: int, data: Path) -> Run:
    """Draw a candidate, with as many epochs as there is time for, which is known before training."""
    drawn = draw_recipe(r, task.source)
    recipe = drawn if is_mixed else replace(first, width=drawn.width, depth=drawn.depth, dropout=drawn.dropout)
    is_linear, is_full, dropout = bool(is_mixed and r.rand() < 0.1), bool(r.rand() < 0.5), float(r.choice([0, 0, 0.3]))
    is_linear = is_linear and task.source != "sentences"
    make_optimizer, optimizer = _draw_optimizer(r, 5.0 if task.body is not None and not is_full else 1.0)
    schedule, smoothing = str(r.choice(["", "", "cosine"])), float(r.choice([0, 0, 0, 0, 0, 0.1]))
    is_augmented = bool(r.rand() < 0.2) and task.x.ndim == 4 and recipe.body != "mlp" and task.source != "digits"
    shape = task.x.shape[1:]

    def make_network() -> nn.Module:
        torch.manual_seed(100 * task.seed + index)
        if task.body is not None:
            body = copy.deepcopy(trained_on_test_images("strides", task.body, data))
            head = nn.Sequential(nn.Dropout(dropout), nn.Linear(body.size, task.num_classes))
            return nn.Sequential(OrderedDict(body=body if is_full else Frozen(body), head=head))
        if is_linear:
            return nn.Sequential(nn.Flatten(), nn.Linear(shape.numel(), task.num_classes))
        return compose(recipe, shape, task.num_classes, tasks.NUM_WORDS)

    network = "linear" if is_linear else str(recipe)
    if task.body is not None:
        network = "all weights" if is_full else "head"
    names = [network, optimizer, *[schedule] * bool(schedule), *["augmented"] * is_augmented]
    return Run(
        seed=task.seed,  # all candidates see the samples in the same order
        kind=", ".join([*names, *["smoothed"] * bool(smoothing), "several families" if is_mixed else "one family"]),
        labels=task.labels,
        num_classes=task.num_classes,
        make_network=make_network,
        make_optimizer=make_optimizer,
        x=task.x,
        y=task.y,
        x_holdout=task.x_unseen,
        y_holdout=task.y_unseen,
        y_holdout_noisy=task.y_unseen_noisy,
        x_test=task.x_test,
        y_test=task.y_test,
        y_test_noisy=task.y_test,
        batch_size=task.batch_size,
        epochs=_num_epochs(task, make_network()),
        is_augmented=is_augmented,
        is_flipped=task.source != "mnist",
        schedule=schedule,
        smoothing=smoothing,
        has_batch_norm=any("BatchNorm" in type(module).__name__ for module in make_network().modules()),
        y_correct=task.y_correct,
    )


def _draw_optimizer(r: np.random.RandomState, factor: float) -> tuple[Callable[[Any], torch.optim.Optimizer], str]:
    """Draw an optimizer, as in a search of hyperparameters: rates over two orders of magnitude."""
    kind = str(r.choice(["adam", "adamw", "adamw", "sgd"]))
    rate = factor * 10 ** r.uniform(-1, 1) * (0.02 if kind == "sgd" else 1e-3)
    decay = 10 ** r.uniform(-4, -2.3) if kind == "sgd" else 10 ** r.uniform(-3, -0.5)
    make: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
        "adam": lambda parameters: torch.optim.Adam(parameters, rate),
        "adamw": lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=decay),
        "sgd": lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=decay),
    }
    return make[kind], f"{kind} {rate:.2g}" + f", decay {decay:.2g}" * (kind != "adam")


def _num_epochs(task: Task, network: nn.Module) -> int:
    """Give as many epochs as there is time for."""
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(task.x[: task.batch_size])
    num_layers = sum(1 for module in network.modules() if not list(module.children()))
    num_passes = 3 if all(weight.requires_grad for weight in network.parameters()) else 1
    gigaflops = num_passes * counter.get_total_flops() / 1e9
    seconds = SECONDS_A_STEP + SECONDS_A_LAYER * num_layers + SECONDS_A_GIGAFLOP * gigaflops
    an_epoch = seconds * (len(task.x) + NUM_MONITORED) / task.batch_size
    affordable = int(MOST_SECONDS["small" if len(task.x) < 1500 else "large"] / an_epoch)
    wanted = int(np.clip(NUM_STEPS * task.batch_size // len(task.x), FEWEST_EPOCHS, MOST_EPOCHS))
    return min(affordable, wanted)
