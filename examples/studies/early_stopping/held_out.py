"""What it costs to choose by a tenth of the training samples, held out of the training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rules import HELD, Curves
from training import be_quiet, split
from truth import drawn_once, in_columns, truth_of_epochs


def score_chosen(pool: str, seed: int, data: Path | None, folder: Path) -> None:
    """Leave the truth of the training on fewer samples in the epochs that rules choose, which are few."""
    be_quiet()
    run = split(drawn_once(pool, seed, data))[0]
    curves = Curves(folder)
    chosen = {epoch for rule in HELD.values() for epoch in rule(curves)}
    rows = truth_of_epochs(run, torch.load(folder / "fewer.pt")["weights"], chosen)
    np.savez(folder / "fewer.part.npz", **{f"fewer_{name}": values for name, values in in_columns(rows).items()})
    (folder / "fewer.part.npz").rename(folder / "fewer.npz")
