"""The rules: each chooses an epoch of a run from what it could see, and pays for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from runs import learned

from lightning_sensitivity.functional.risk import BATCH_NORM_SCALE, LABEL_WEIGHT, VARIANCE_SCALE

COUNTS = (10, 20, 50, 100, 200)  # of labels by which an epoch is chosen, with the estimate or without
NUM_SUBSETS = 20  # of holdout samples that have labels, for each count
MIN_DELTA = 1e-3
YARDSTICKS = ("accuracy", "true_score", "loss")


class Curves:
    """What a run left: arrays of one number an epoch, and the logits of the holdout samples."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as found:
            self.found = dict(found)
        prefix = "about_"
        self.about = {n.removeprefix(prefix): v.item() for n, v in self.found.items() if n.startswith(prefix)}
        self.scores: dict[tuple[str, str], np.ndarray] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        return self.found[name]

    @property
    def counts(self) -> bool:
        """Whether the run learned something, and did not diverge."""
        is_finite = np.isfinite(self["loss"]).all() and np.isfinite(self["holdout"]).all()
        return learned(self["accuracy"], self.about["num_classes"]) and bool(is_finite)

    @property
    def is_noisy(self) -> bool:
        return self.about["labels"] != "correct"

    def label_scores(self, kind: str, score: str) -> np.ndarray:
        """Score each holdout sample in each epoch, by correct or noisy labels."""
        if (kind, score) not in self.scores:
            logits, labels = self["holdout"].astype(np.float64), self[kind]
            logits = logits - logits.max(-1, keepdims=True)
            p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            of_label = np.take_along_axis(p, labels[None, :, None], 2)[..., 0]
            brier = (1 + np.square(p).sum(-1) - 2 * of_label) / (1 + self.about["is_binary"])
            self.scores[kind, "Brier score"], self.scores[kind, "log-loss"] = brier, -np.log(of_label + 1e-12)
        return self.scores[kind, score]


def lowest(values: np.ndarray) -> int:
    return int(np.nanargmin(values)) if np.isfinite(values).any() else len(values) - 1


def patient(values: np.ndarray, patience: int, min_delta: float = 0.0) -> int:
    """Give the epoch of the checkpoint that is lowest when `EarlyStopping` ends a run."""
    last, best = 0, values[0]
    for epoch, value in enumerate(values):
        if not value >= best - min_delta:
            last, best = epoch, value
        elif epoch - last >= patience:
            return lowest(values[: epoch + 1])
    return lowest(values)


def first(is_it: np.ndarray, number: int = 1) -> int:
    """Give the `number`-th epoch where this holds, or the last one."""
    found = np.flatnonzero(is_it)
    return int(found[number - 1]) if len(found) >= number else len(is_it) - 1


def label_wave(changed: np.ndarray) -> int:
    """Give the first local minimum of the changes of predictions, averaged over three epochs."""
    smooth = np.convolve(changed[1:], np.ones(3) / 3, "valid")  # smooth[i] belongs to epoch i + 3
    return first(np.append(np.diff(smooth) > 0, True)) + 3


def with_labels(scores: np.ndarray, count: int, estimate: np.ndarray | None = None) -> list[int]:
    """Choose by the scores of a few random samples, with the estimate or without, once for each draw of samples."""
    r, chosen = np.random.RandomState(count), []
    for _ in range(NUM_SUBSETS):
        mean = scores[:, r.permutation(scores.shape[1])[:count]].mean(1)
        if estimate is not None:
            mean = (count * mean + LABEL_WEIGHT * estimate) / (count + LABEL_WEIGHT)
        chosen.append(lowest(mean))
    return chosen


def scale(c: Curves) -> float:
    return BATCH_NORM_SCALE if c.about["has_batch_norm"] else VARIANCE_SCALE


def third(c: Curves) -> int:
    return -(-len(c["loss"]) // 3)


# %% The table of them. A rule gives epochs: several if they depend on which samples have labels.
Rule = Callable[[Curves], list[int]]
NEVER, ESTIMATE, TRUE = "never stop", "the estimate", "the true score (out of reach)"
WAS, FEWER = "the variance not scaled", "10 % held out, by its loss"
FEWER_BY_ACCURACY = "10 % held out, by its accuracy"
AVERAGED = "never stop, averaged weights"
STOPPINGS: dict[str, Callable[[Curves], int]] = {
    f"EarlyStopping(patience={patience})": lambda c, patience=patience: patient(c["val_risk_estimate"], patience)
    for patience in (5, 10, 20)
}
STOPPING = "EarlyStopping(patience=max_epochs / 3)"  # what is recommended
STOPPINGS[STOPPING] = lambda c: patient(c["val_risk_estimate"], third(c))
STOPPINGS[f"EarlyStopping(patience=10, min_delta={MIN_DELTA})"] = lambda c: patient(
    c["val_risk_estimate"], 10, MIN_DELTA
)
RULES: dict[str, Rule] = {
    NEVER: lambda c: [len(c["loss"]) - 1],
    "lowest training loss": lambda c: [lowest(c["train_loss"])],
    "Label Wave": lambda c: [label_wave(c["changed"])],
    "gradient disparity": lambda c: [first(np.diff(c["disparity"], prepend=np.inf) > 0, 5)],
    "evidence-based criterion": lambda c: [first(c["evidence"] > 0)],
    WAS: lambda c: [lowest(c["val_risk_estimate"] + (1 / scale(c) - 1) * c["val_risk_variance"])],
    ESTIMATE: lambda c: [lowest(c["val_risk_estimate"])],
    **{name: lambda c, stop=stop: [stop(c)] for name, stop in STOPPINGS.items()},
    FEWER: lambda c: [lowest(c["fewer_held_loss"])],
    FEWER_BY_ACCURACY: lambda c: [lowest(-c["fewer_held_accuracy"])],
    TRUE: lambda c: [lowest(c["true_score"])],
}
LABELS = {(kind, count): f"{count} {kind} labels" for kind in ("noisy", "correct") for count in COUNTS}
WAYS: dict[str, tuple[str, bool]] = {
    "log-loss": ("log-loss", False),
    "Brier score": ("Brier score", False),
    "with the estimate": ("Brier score", True),
}


def named(kind: str, count: int, way: str) -> str:
    return f"{LABELS[kind, count]}, {way}"


def _by_labels(c: Curves, kind: str, count: int, way: str) -> list[int]:
    score, is_beside = WAYS[way]
    return with_labels(c.label_scores(kind, score), count, c["val_risk_estimate"] if is_beside else None)


for _kind, _count in LABELS:
    for _way in WAYS:
        RULES[named(_kind, _count, _way)] = lambda c, of=(_kind, _count, _way): _by_labels(c, *of)
ALL = [*RULES, AVERAGED]


def cost(c: Curves, name: str) -> dict[str, float]:
    """Give what a rule pays: accuracy lost in points, and how much higher scores are than the lowest, in percent."""
    prefix = "fewer_" if name in (FEWER, FEWER_BY_ACCURACY) else ""
    if name == AVERAGED:
        found: dict[str, Any] = {each: c.about[f"averaged_{each}"] for each in YARDSTICKS}
    else:
        epochs = RULES[name](c)
        found = {each: c[prefix + each][epochs] for each in YARDSTICKS}
    return {
        "accuracy": float(100 * (c["accuracy"].max() - found["accuracy"]).mean()),
        "true_score": float(100 * (np.mean(found["true_score"]) / c["true_score"].min() - 1)),
        "loss": float(100 * (np.mean(found["loss"]) / c["loss"].min() - 1)),
    }
