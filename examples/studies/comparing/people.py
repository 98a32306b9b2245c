"""A body for fine-tuning: convolutions trained on five classes of CIFAR-10's test images, which no task uses."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from networks import Recipe, compose
from runs import augmented, scaled
from torch import nn
from torch.nn.functional import cross_entropy

WORSE_SHARES = (0.0, 0.25, 0.25, 1.0)  # of the images that have their "worse" label: 9, 17, 17 or 40 % are wrong
SHAPE = torch.Size((3, 32, 32))
BODY_SIZE = 64
RECIPE = Recipe("convolutions", "batch norm", "stride", "mean", 0.0, False, 4, 256, nn.ReLU)


@cache
def pretrained_body(source: int, data: Path) -> Any:
    """Give a body that was trained on five classes; do not change it."""
    file = data / "bodies" / f"strides_{source}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source)
        network: Any = compose(RECIPE, SHAPE, 5)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            _pretrain(network, source, data)
            part = file.with_suffix(f".{os.getpid()}")
            torch.save(network.body.state_dict(), part)
            part.rename(file)
        network.body.load_state_dict(torch.load(file))
    return network.body.eval()


def _pretrain(network: nn.Module, source: int, data: Path) -> None:
    with np.load(data / "cifar10.npz") as found:
        x, y = torch.tensor(found["x_test"]), torch.tensor(found["y_test"]).long()
    is_used = (y % 2 == source).nonzero()[:, 0]
    x, y = scaled(x[is_used]), y[is_used] // 2
    optimizer, generator = torch.optim.Adam(network.parameters(), 2e-3), torch.Generator().manual_seed(source)
    for _ in range(8):
        for batch in torch.randperm(len(x), generator=generator).split(64):
            optimizer.zero_grad()
            cross_entropy(network(augmented(x[batch], generator)), y[batch]).backward()
            optimizer.step()
