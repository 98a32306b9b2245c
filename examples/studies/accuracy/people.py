"""Runs on labels by people: CIFAR-10 images with the labels of CIFAR-10N, networks and optimizers as people build them.

Half of the runs are augmented and have a schedule; a third fine-tunes a body that was pretrained on other images, all
weights or a new head. Seeds 0 to 29 are for design, seeds from 1000 on for the report.
"""

from __future__ import annotations

import copy
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1] / "early_stopping"))
import tasks
from as_built import draw_optimizer, draw_recipe
from bodies import RECIPE, Frozen, trained_on_test_images
from networks import compose
from runs import Run, scaled

FEWEST, MOST = 500, 10_000  # training samples
NUM_UNSEEN, NUM_TEST = 600, 2000
EPOCHS, FEWEST_EPOCHS = 25, 12
WORSE_SHARES = (0.0, 0.25, 0.25, 1.0)  # of the images that have their "worse" label: 9, 17, 17 or 40 % are wrong
MOST_SECONDS = 40.0  # of a training, by a count of operations
SECONDS_A_STEP, SECONDS_A_LAYER, SECONDS_A_GIGAFLOP = 1e-3, 3e-4, 0.05
SHAPE = torch.Size((3, 32, 32))


def draw_people(seed: int, data: Path) -> Run:
    """Draw the run of a seed; every third one fine-tunes a pretrained body."""
    r = np.random.RandomState((seed, 45))  # the order of its calls makes the run
    n = int(FEWEST * (MOST / FEWEST) ** r.rand())
    share, batch_size = float(r.choice(WORSE_SHARES)), int(r.choice([32, 64, 128]))
    recipe = draw_recipe(r, "people")
    is_finetuned, is_augmented = seed % 3 == 0, bool(r.rand() < 0.5) and (recipe.body != "mlp" or seed % 3 == 0)
    schedule = str(r.choice(["cosine", "one-cycle", "plateau", "steps"])) if is_augmented else ""
    is_normalized, smoothing = bool(r.rand() < 0.5) and not is_finetuned, float(r.choice([0, 0, 0, 0, 0, 0.1]))
    source, is_full = int(r.randint(2)), bool(r.rand() < 0.6)
    make_optimizer, optimizer = draw_optimizer(r, RECIPE if is_finetuned else recipe)
    x, y = tasks.images(data, "cifar10")
    said, worse = tasks.labels_by_people(data, "aggre_label"), tasks.labels_by_people(data, "worse_label")
    said = torch.where(torch.tensor(r.rand(len(said)) < share), worse, said)
    order = torch.tensor(r.permutation(len(x)))[: n + NUM_UNSEEN + NUM_TEST]
    chosen, unseen, test = order.split([n, NUM_UNSEEN, NUM_TEST])

    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        if not is_finetuned:
            return compose(recipe, SHAPE, 10)
        body = copy.deepcopy(trained_on_test_images("people", source, data))
        head = nn.Linear(body.size, 10)
        return nn.Sequential(OrderedDict(body=body if is_full else Frozen(body), head=head))

    images = scaled(x[order])
    if is_normalized:
        images = (images - images.mean((0, 2, 3), keepdim=True)) / images.std((0, 2, 3), keepdim=True)
    network = f"fine-tuned, {'all weights' if is_full else 'head'}" if is_finetuned else str(recipe)
    names = [network, optimizer, *[schedule] * is_augmented, *["augmented"] * is_augmented]
    wrong = float((said[chosen] != y[chosen]).float().mean())
    run = Run(
        seed=seed,
        kind=", ".join([f"{100 * wrong:.0f} % wrong by people", f"{n} samples", *names]),
        labels="people",
        num_classes=10,
        make_network=make_network,
        make_optimizer=make_optimizer,
        x=images[:n],
        y=said[chosen],
        x_holdout=images[n : n + NUM_UNSEEN],
        y_holdout=y[unseen],
        y_holdout_noisy=said[unseen],
        x_test=images[n + NUM_UNSEEN :],
        y_test=y[test],
        y_test_noisy=said[test],
        batch_size=batch_size,
        epochs=EPOCHS,
        is_augmented=is_augmented,
        schedule=schedule,
        smoothing=smoothing,
        has_batch_norm=(is_full if is_finetuned else recipe.norm == "batch norm"),
        y_correct=y[chosen],
    )
    return affordable(run)


def affordable(run: Run) -> Run:
    """Give a run fewer epochs, and then fewer samples, if its training takes too long; known before training."""
    network = run.make_network()
    with FlopCounterMode(display=False) as counter:
        network(run.x[: run.batch_size])
    num_layers = sum(1 for module in network.modules() if not list(module.children()))
    seconds = SECONDS_A_STEP + SECONDS_A_LAYER * num_layers + SECONDS_A_GIGAFLOP * 3 * counter.get_total_flops() / 1e9
    steps = MOST_SECONDS / seconds
    n = min(len(run.x), int(steps / FEWEST_EPOCHS * run.batch_size))
    epochs = int(np.clip(steps * run.batch_size / n, FEWEST_EPOCHS, EPOCHS))
    kind = run.kind.replace(f"{len(run.x)} samples", f"{n} samples")
    assert run.y_correct is not None
    return replace(run, kind=kind, x=run.x[:n], y=run.y[:n], y_correct=run.y_correct[:n], epochs=epochs)


def features_of(seed: int, data: Path) -> Any:
    """Give the function from a batch to the features of the body before fine-tuning; None for other seeds."""
    if seed % 3:
        return None
    r = np.random.RandomState((seed, 45))
    r.rand(), r.choice(WORSE_SHARES), r.choice([32, 64, 128])
    draw_recipe(r, "people")
    if bool(r.rand() < 0.5):
        r.choice(["cosine", "one-cycle", "plateau", "steps"])
    r.rand(), r.choice([0, 0, 0, 0, 0, 0.1])
    body = trained_on_test_images("people", int(r.randint(2)), data)

    def features(batch: list[Tensor]) -> Tensor:
        with torch.no_grad():
            found: Tensor = body(batch[0])
        return found

    return features
