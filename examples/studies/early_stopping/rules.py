"""The rules: each chooses an epoch of a run from what it could see."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from runs import learned
from training import RIGHT_COUNTS, WRONG_COUNTS

from lightning_sensitivity.functional import variance_factor

PATIENCE = 10


class Curves:
    """What a run left: a row an epoch."""

    def __init__(self, rows: pd.DataFrame) -> None:
        self.rows, self.about = rows, rows.iloc[0]

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows[name].to_numpy(float)

    @property
    def counts(self) -> bool:
        """Whether the run learned something, and did not diverge."""
        accuracies, num_classes = self["test_accuracy"], int(self.about["num_classes"])
        return learned(accuracies, num_classes) and bool(np.isfinite(self["test_loss"]).all())


def lowest(values: np.ndarray) -> int:
    return int(np.nanargmin(values)) if np.isfinite(values).any() else len(values) - 1


def patient(values: np.ndarray) -> int:
    """Give the epoch of the checkpoint that is left when `EarlyStopping(patience=PATIENCE)` ends a run."""
    best = 0
    for epoch, value in enumerate(values):
        if value < values[best]:
            best = epoch
        elif epoch - best >= PATIENCE:
            break
    return best


def first(is_it: np.ndarray, number: int = 1) -> int:
    """Give the `number`-th epoch where this holds, or the last one."""
    found = np.flatnonzero(is_it)
    return int(found[number - 1]) if len(found) >= number else len(is_it) - 1


def label_wave(changed: np.ndarray) -> int:
    """Give the first local minimum of the changes of predictions, averaged over three epochs."""
    smooth = np.convolve(changed[1:], np.ones(3) / 3, "valid")  # smooth[i] belongs to epoch i + 3
    return first(np.append(np.diff(smooth) > 0, True)) + 3


def with_factor(c: Curves, factor: float, gap: float = 0.0) -> np.ndarray:
    """Give the estimate with another factor of the variance, and so many times memorization."""
    variance = c["val_risk_variance"] * factor / variance_factor(c.about["n"], c.about["weights"])
    return c["val_risk_claim"] + c["val_risk_overconfidence"] + gap * c["val_risk_memorization"] + variance


def as_it_was(c: Curves) -> np.ndarray:
    """Give the estimate without the numbers of samples and weights."""
    return with_factor(c, 1.0)


def by_labels(c: Curves, kind: str, count: int) -> list[int]:
    return [lowest(c[name]) for name in c.rows if name.startswith(f"{kind}_{count}_")]


Rule = Callable[[Curves], list[int]]  # the epochs that it chooses; several if it depends on which samples have labels
NEVER, ESTIMATE, STOPPING = "never stop", "the estimate", f"the estimate, EarlyStopping(patience={PATIENCE})"
OTHER_SEED, WAS = "the estimate, other seed of the twins", "the rule as it was"
LABELS = {"right": RIGHT_COUNTS, "wrong": WRONG_COUNTS}
NAMES = {
    (kind, count): f"{count:,} {'right labels' if kind == 'right' else 'labels as wrong as in training'}"
    for kind, counts in LABELS.items()
    for count in counts
}
RULES: dict[str, Rule] = {
    NEVER: lambda c: [len(c.rows) - 1],
    "lowest val_output_sensitivity": lambda c: [lowest(c["val_output_sensitivity"])],
    "lowest training loss": lambda c: [lowest(c["train_loss"])],
    "Label Wave": lambda c: [label_wave(c["changed"])],
    "gradient disparity": lambda c: [first(np.diff(c["disparity"], prepend=np.inf) > 0, 5)],
    "evidence-based criterion": lambda c: [first(c["evidence"] > 0)],
    ESTIMATE: lambda c: [lowest(c["val_risk_estimate"])],
    STOPPING: lambda c: [patient(c["val_risk_estimate"])],
    OTHER_SEED: lambda c: [lowest(c["seed1_risk_estimate"])],
    WAS: lambda c: [lowest(as_it_was(c))],
    "the rule of the second page, √(150 / n)": lambda c: [
        lowest(with_factor(c, min(1.0, (150 / c.about["n"]) ** 0.5), 1.0))
    ],
    **{name: lambda c, of=of: by_labels(c, *of) for of, name in NAMES.items()},
}
