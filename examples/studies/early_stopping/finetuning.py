"""Fine-tuning: a network that was trained on five classes of CIFAR-10 learns the other five, from noisy labels."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tasks
import torch
from networks import Recipe, compose
from runs import NUM_HOLDOUT, Run, scaled
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

NUM_BEFORE, EPOCHS_BEFORE = 10_000, 5
NUM_TEST = 2000
RECIPE = Recipe("convolutions", "batch norm", "max-pooling", "mean", 0.0, False, 4, 256, nn.ReLU)


@cache
def body_before(data: Path, split: int) -> dict[str, Tensor]:
    """Give the weights of the body of a network that was trained on five classes; they are kept in the folder."""
    file = data / f"trained_before_{split}.pt"
    if not file.exists():
        before, _ = _classes(split)
        x, y = _samples(data, before, np.random.RandomState((split, 9)), NUM_BEFORE)
        torch.manual_seed(split)
        network = compose(RECIPE, x.shape[1:], len(before))
        optimizer = torch.optim.Adam(network.parameters(), 1e-3)
        for _ in range(EPOCHS_BEFORE):
            for batch in torch.randperm(len(x)).split(64):
                optimizer.zero_grad()
                cross_entropy(network(x[batch]), y[batch]).backward()
                optimizer.step()
        part = file.with_suffix(".part")
        torch.save(network.body.state_dict(), part)
        part.rename(file)
    return torch.load(file)


def draw_finetuning(seed: int, data: Path | None = None) -> Run:
    """Draw the run of a seed: which classes, how many samples, how noisy, and how it is trained."""
    assert data is not None, "--data is needed: a folder with cifar10.npz"
    r = np.random.RandomState((seed, 8))  # the order of its calls makes the run
    split = seed % 5
    n, noise = int(300 * (2000 / 300) ** r.rand()), float(r.choice([0.0, 0.2, 0.3, 0.4]))
    x, y = _samples(data, _classes(split)[1], r, n + NUM_HOLDOUT + NUM_TEST)
    chances = tasks.transition("random", noise, 5)
    training, holdout, test = torch.arange(len(x)).split([n, NUM_HOLDOUT, NUM_TEST])
    noisy = tasks.noisy(r, y, chances)
    rate, batch_size = float(r.choice([3e-4, 1e-3])), int(r.choice([32, 64]))
    shape = x.shape[1:]

    def make_network() -> nn.Module:
        torch.manual_seed(seed)
        network: Any = compose(RECIPE, shape, 5)
        network.body.load_state_dict(body_before(data, split))
        return network

    return Run(
        seed=seed,
        kind=f"fine-tuning, {100 * noise:.0f} % noisy, {n} samples, adam {rate:g}",
        labels="random" if noise else "correct",
        num_classes=5,
        make_network=make_network,
        make_optimizer=lambda parameters: torch.optim.Adam(parameters, rate),
        x=x[training],
        y=noisy[training],
        x_holdout=x[holdout],
        y_holdout=y[holdout],
        y_holdout_noisy=noisy[holdout],
        x_test=x[test],
        y_test=y[test],
        y_test_noisy=noisy[test],
        batch_size=batch_size,
        epochs=int(np.clip(400 // -(-n // batch_size), 10, 30)),
        has_batch_norm=True,
        chances=chances,
    )


def frozen_body(seed: int, data: Path) -> nn.Module:
    """Give the body as it was before fine-tuning."""
    network: Any = draw_finetuning(seed, data).make_network()
    return network.body.eval().requires_grad_(False)


def _classes(split: int) -> tuple[np.ndarray, np.ndarray]:
    """Split the classes into those that were learned before, and the others."""
    order = np.random.RandomState((split, 10)).permutation(10)
    return order[:5], order[5:]


def _samples(data: Path, classes: np.ndarray, r: np.random.RandomState, number: int) -> tuple[Tensor, Tensor]:
    """Choose images of five classes, which get the labels 0 to 4."""
    x, y = tasks.images(data, "cifar10")
    labels = torch.full((10,), -1)
    labels[torch.tensor(classes)] = torch.arange(len(classes))
    found = torch.tensor(r.permutation(len(x)))
    found = found[labels[y[found]] >= 0][:number]
    return scaled(x[found]), labels[y[found]]
