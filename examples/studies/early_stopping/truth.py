"""What is true of a kept training, epoch by epoch, and what some samples' logits are: all that needs no monitor."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pools import DRAWS
from runs import Run, logits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from training import be_quiet, split

NUM_HOLDOUT, NUM_TEST = 600, 1000  # samples
YARDSTICKS = ("accuracy", "true_score", "loss")


def drawn_once(pool: str, seed: int, data: Path | None) -> Run:
    """Draw a run whose network is made once, since some are trained before, with the test samples that are used."""
    run = DRAWS[pool](seed, data)
    network = run.make_network()
    test = {name: getattr(run, name)[:NUM_TEST] for name in ("x_test", "y_test", "y_test_noisy")}
    return replace(run, make_network=lambda: copy.deepcopy(network), **test)


def observe(pool: str, seed: int, data: Path | None, folder: Path) -> None:
    """Leave the truth of both trainings of a run, and the logits of samples whose labels a rule may see."""
    be_quiet()
    run = drawn_once(pool, seed, data)
    rest, x_held, y_held = split(run)
    x = run.x_holdout[:NUM_HOLDOUT]
    columns: dict[str, Any] = {
        "correct": run.y_holdout[: len(x)].numpy(),
        "noisy": run.y_holdout_noisy[: len(x)].numpy(),
    }
    columns |= {"held_labels": y_held.numpy()}
    kept, fewer = (torch.load(folder / f"{name}.pt") for name in ("full", "fewer"))
    rows = truth_of_epochs(run, kept["weights"])
    columns |= in_columns([one | other for one, other in zip(kept["rows"], rows, strict=True)])
    columns |= {"holdout": logits_of_epochs(run, kept["weights"], x)}
    columns |= {"fewer_held": logits_of_epochs(rest, fewer["weights"], x_held)}
    columns |= {f"about_{name}": value for name, value in about(pool, run).items()}
    np.savez(folder / "truth.part.npz", **columns)
    (folder / "truth.part.npz").rename(folder / "truth.npz")


def networks_of_epochs(run: Run, weights: dict[str, Tensor]) -> Iterator[nn.Module]:
    """Give the network as it was after each epoch, one after the other."""
    network = run.make_network().eval()
    for epoch in range(1, len(next(iter(weights.values())))):
        network.load_state_dict({name: values[epoch] for name, values in weights.items()})
        yield network


def truth_of_epochs(
    run: Run, weights: dict[str, Tensor], epochs: Collection[int] | None = None
) -> list[dict[str, float]]:
    """Score the network on the test samples after each epoch, or after some epochs; the others are nan."""
    rows = []
    for epoch, network in enumerate(networks_of_epochs(run, weights)):
        is_scored = epochs is None or epoch in epochs
        rows.append(truth(run, in_parts(network, run.x_test)) if is_scored else dict.fromkeys(YARDSTICKS, np.nan))
    return rows


def logits_of_epochs(run: Run, weights: dict[str, Tensor], x: Tensor) -> np.ndarray:
    """Give the logits of samples after each epoch, in half the size."""
    found = [logits(run, in_parts(network, x)) for network in networks_of_epochs(run, weights)]
    return torch.stack(found).clamp(-6e4, 6e4).half().numpy()


def in_parts(network: Any, x: Tensor) -> Tensor:
    """Give the outputs for many samples, a part at a time, without a graph."""
    with torch.no_grad():
        return torch.cat([network(part) for part in x.split(250)])


def truth(run: Run, outputs: Tensor) -> dict[str, float]:
    """Score outputs for the test samples, by correct labels and by noisy ones.

    The true score is what is estimated: the Brier score of labels as noisy as training's. Where chance made them noisy,
    it is the expected one.
    """
    found = logits(run, outputs)
    p, y, noisy = found.softmax(1), run.y_test, run.y_test_noisy
    squares = p.square().sum(1)
    people_said = p.gather(1, noisy[:, None])[:, 0]
    agreement = people_said if run.chances is None else (p * run.chances[y]).sum(1)
    return {
        "accuracy": float((p.argmax(1) == y).float().mean()),
        "loss": float(cross_entropy(found, y)),
        "true_score": float((1 + squares - 2 * agreement).mean()) / (1 + run.is_binary),  # as the package scores it
    }


def in_columns(rows: list[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([row.get(name, np.nan) for row in rows]) for name in rows[-1]}


def about(pool: str, run: Run) -> dict[str, Any]:
    """Tell what a run is."""
    assert run.y_correct is not None
    weights = list(run.make_network().parameters())
    return {
        "pool": pool, "seed": run.seed, "kind": run.kind, "labels": run.labels, "n": len(run.x),
        "num_classes": run.num_classes, "weights": sum(weight.numel() for weight in weights),
        "has_frozen_body": not all(weight.requires_grad for weight in weights),
        "is_augmented": run.is_augmented, "has_batch_norm": run.has_batch_norm, "is_binary": run.is_binary,
        "share_wrong": float((run.y != run.y_correct).float().mean()),
    }  # fmt: skip
