"""Trains the runs of some pools, and keeps the outputs of all epochs: what a rule may look at, and what judges it.

    python record.py RUNS DATA tables few ... [--part 0/2] [--until 120]
    python record.py RUNS DATA tables few ... --tenth  # the check half once more, without a tenth of the samples

RUNS gets one .npz a run; what is there is not made again. What the reference sees is drawn again by `runs.py`.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pools import draw, size
from runs import Run, augmented, without_tenth
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss


def loss(run: Run, outputs: Tensor, y: Tensor) -> Tensor:
    """Compute the loss, with class weights if the run has them."""
    if run.task == "regression":
        return mse_loss(outputs[:, 0], y)
    counts = run.y.bincount(minlength=run.num_classes).float()
    if run.task == "binary":
        weight = counts[0] / counts[1] if run.way == "weights" else None
        return binary_cross_entropy_with_logits(outputs[:, 0], y.float(), pos_weight=weight)
    weights = len(run.y) / run.num_classes / counts.clamp(min=1) if run.way == "weights" else None
    return cross_entropy(outputs, y, weights)


def order(run: Run, generator: torch.Generator) -> Tensor:
    """Return the training samples of an epoch."""
    if run.way == "sampler":
        weights = 1 / run.y.bincount(minlength=run.num_classes).float()
        return torch.multinomial(weights[run.y], len(run.y), True, generator=generator)
    return torch.randperm(len(run.y), generator=generator)


def is_image(x: Tensor) -> bool:
    return x.ndim == 4


def forward(run: Run, network: nn.Module, x: Tensor) -> Tensor:
    """Run a network; large ones in mixed precision where that is faster: EfficientNet's training is not."""
    x = x.contiguous(memory_format=torch.channels_last) if is_image(x) else x
    is_mixed = run.pool == "minilm" or (is_image(x) and not (run.pool == "pretrained" and network.training))
    with torch.autocast("cpu", torch.bfloat16, enabled=is_mixed):
        found: Tensor = network(x)
    return found


def outputs_of(run: Run, network: nn.Module, x: Tensor) -> np.ndarray:
    """Return the outputs of a network in half precision."""
    with torch.no_grad():
        found = torch.cat([forward(run, network, part) for part in x.split(250)])
    return found.clamp(-6e4, 6e4).half().numpy()


def train(run: Run) -> dict[str, np.ndarray]:
    """Train, and return the outputs of all epochs."""
    network = run.make_network()
    if is_image(run.x):
        network = network.to(memory_format=torch.channels_last)
    optimizer = run.make_optimizer([p for p in network.parameters() if p.requires_grad])
    generator = torch.Generator().manual_seed(run.index)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.epochs) if run.has_schedule else None
    kept: dict[str, list[np.ndarray]] = {"unseen": [], "test": []}
    for _ in range(run.epochs):
        network.train()
        for batch in order(run, generator).split(run.batch_size):
            if len(batch) == 1:  # batch norm needs more
                continue
            x = augmented(run.x[batch], generator) if run.is_augmented else run.x[batch]
            optimizer.zero_grad()
            loss(run, forward(run, network, x), run.y[batch]).backward()
            optimizer.step()
        if schedule is not None:
            schedule.step()
        network.eval()
        for name, x in (("unseen", run.x_unseen), ("test", run.x_test)):
            kept[name].append(outputs_of(run, network, x))
    return {name: np.stack(values) for name, values in kept.items()}


def record(run: Run, file: Path) -> None:
    """Train a run, and leave a file."""
    start = time.process_time()
    found: dict[str, Any] = train(run)
    found |= {"y": run.y.numpy(), "y_unseen": run.y_unseen.numpy(), "correct_unseen": run.correct_unseen.numpy()}
    found |= {"y_test": run.y_test.numpy(), "kind": run.kind, "task": run.task, "is_design": run.is_design}
    found |= {"num_classes": run.num_classes, "seconds": time.process_time() - start}
    part = file.with_suffix(".part.npz")
    np.savez_compressed(part, **found)
    part.rename(file)
    print(f"{time.strftime('%H:%M:%S')} {run.name} {found['seconds']:.0f} s {run.kind}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("pools", nargs="+")
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--until", type=int, default=10**6)
    parser.add_argument("--tenth", action="store_true", help="train on nine tenths of the samples")
    arguments = parser.parse_args()
    part, number = map(int, arguments.part.split("/"))
    torch.set_num_threads(1)
    arguments.runs.mkdir(parents=True, exist_ok=True)
    for pool in arguments.pools:
        for index in range(min(arguments.until, size(pool, arguments.data))):
            file = arguments.runs / f"{pool}-{index:03d}{'-tenth' * arguments.tenth}.npz"
            if index % number == part and not file.exists():
                run = draw(pool, index, arguments.data)
                if not (arguments.tenth and run.is_design):
                    record(without_tenth(run) if arguments.tenth else run, file)


if __name__ == "__main__":
    main()
