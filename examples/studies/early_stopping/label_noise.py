"""Shares of wrong labels by others than the monitor: cleanlab, on the same predictions, and on those of a network.

cleanlab's own way is to train the network itself, five times, each time on four fifths of the samples, and to take its
predictions for the others. Which epoch to take is left to the user: here the last one, and the one with the lowest loss
on the left-out labels.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pools import DRAWS
from runs import Run, logits
from torch.nn.functional import cross_entropy
from training import be_quiet, trained
from truth import in_parts

NUM_FOLDS = 5


def predict_by_folds(pool: str, seed: int, epochs: int, data: Path | None, folder: Path) -> None:
    """Leave the predictions for each training sample of networks that were trained on other samples."""
    be_quiet()
    run = replace(DRAWS[pool](seed, data), epochs=epochs)
    fold = torch.randperm(len(run.x), generator=torch.Generator().manual_seed(seed)) % NUM_FOLDS
    found = {name: torch.zeros(len(run.x), run.num_classes) for name in ("last", "best")}
    for index in range(NUM_FOLDS):
        is_left_out = fold == index
        part = replace(run, x=run.x[~is_left_out], y=run.y[~is_left_out])
        for name, values in _predictions(part, run.x[is_left_out], run.y[is_left_out]).items():
            found[name][is_left_out] = values
    np.savez(folder / "folds.part.npz", labels=run.y.numpy(), **{name: p.numpy() for name, p in found.items()})
    (folder / "folds.part.npz").rename(folder / "folds.npz")


def _predictions(run: Run, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
    """Train a run, and predict other samples in its last epoch, and in that of their lowest loss."""
    weights = trained(run)["weights"]
    network = run.make_network().eval()
    found, losses = [], []
    for epoch in range(1, run.epochs + 1):
        network.load_state_dict({name: values[epoch] for name, values in weights.items()})
        found.append(logits(run, in_parts(network, x)))
        losses.append(float(cross_entropy(found[-1], y).nan_to_num(torch.inf)))
    return {"last": found[-1].softmax(1), "best": found[int(np.argmin(losses))].softmax(1)}


def shares_by_cleanlab(labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """Give the share of labels that cleanlab calls wrong, in its three ways; nan where it fails."""
    from cleanlab.count import num_label_issues
    from cleanlab.filter import find_label_issues

    classes, labels = np.unique(labels, return_inverse=True)  # it wants every class to have a label
    predictions = predictions[:, classes].clip(1e-6)
    predictions = predictions / predictions.sum(1, keepdims=True)
    ways = {
        "off_diagonal": lambda: num_label_issues(labels, predictions, estimation_method="off_diagonal"),
        "calibrated": lambda: num_label_issues(labels, predictions, estimation_method="off_diagonal_calibrated"),
        "issues": lambda: int(find_label_issues(labels, predictions, n_jobs=1).sum()),
    }
    found = {}
    for name, count in ways.items():
        try:
            found[name] = float(count()) / len(labels)
        except (ValueError, ZeroDivisionError, IndexError):
            found[name] = float("nan")
    return found
