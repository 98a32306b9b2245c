"""The rules: each chooses an epoch of a run from what it could see, and pays for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from runs import learned

COUNTS = (20, 50, 100)  # of labels by which an epoch is chosen, with the estimate or without
MORE_COUNTS = (10, *COUNTS, 200, 400)  # those that tell what the estimate is worth
NUM_DRAWS = 20  # of samples that have labels, for each count
YARDSTICKS = ("accuracy", "true_score", "loss")
TERMS = ("claim", "overconfidence", "memorization")


class Curves:
    """What a run left: arrays of one number an epoch, the logits of some samples, and their labels."""

    def __init__(self, file: Path) -> None:
        with np.load(file) as found:
            self.found = dict(found)
        prefix = "about_"
        self.about = {n.removeprefix(prefix): v.item() for n, v in self.found.items() if n.startswith(prefix)}

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

    @cached_property
    def plain_estimate(self) -> np.ndarray:
        """The estimate without the reference."""
        return self._terms + self["val_risk_variance"]

    @cached_property
    def estimate_before(self) -> np.ndarray:
        """The estimate of the report before: no reference, and the variance scaled by 0.7, with batch norm by 1.4."""
        scale = 1.4 if self.about["has_batch_norm"] else 0.7
        return self._terms + self["val_risk_variance"] * scale / self.about["variance_scale"]

    @property
    def _terms(self) -> np.ndarray:
        return sum((self[f"val_risk_{name}"] for name in TERMS), np.zeros(len(self["loss"])))

    @cached_property
    def held_probabilities(self) -> np.ndarray:
        """Those of the 10 % of the training samples that were held out, by the training on the others."""
        return softmax(self["fewer_held"])

    @cached_property
    def held_scores(self) -> np.ndarray:
        return brier(self.held_probabilities, self["held_labels"]).mean(1)

    @cached_property
    def held_losses(self) -> np.ndarray:
        return -np.log(of_labels(self.held_probabilities, self["held_labels"]) + 1e-12).mean(1)

    @cached_property
    def held_accuracies(self) -> np.ndarray:
        return (self.held_probabilities.argmax(-1) == self["held_labels"]).mean(1)

    @cached_property
    def label_scores(self) -> dict[str, np.ndarray]:
        """The Brier score of each holdout sample in each epoch, by correct and by noisy labels."""
        p, scale = softmax(self["holdout"]), 1 + self.about["is_binary"]  # as the package scores it
        return {kind: brier(p, self[kind]) / scale for kind in ("correct", "noisy")}


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def of_labels(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.take_along_axis(p, labels[None, :, None], 2)[..., 0]


def brier(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score each sample (a column) in each epoch (a row)."""
    return 1 + np.square(p).sum(-1) - 2 * of_labels(p, labels)


# %% How an epoch is chosen.
def lowest(values: np.ndarray) -> int:
    return int(np.nanargmin(values)) if np.isfinite(values).any() else len(values) - 1


def patient(values: np.ndarray, patience: int) -> int:
    """Give the epoch of the checkpoint that is lowest when `EarlyStopping` ends a run."""
    last, best = 0, values[0]
    for epoch, value in enumerate(values):
        if not value >= best:
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


def with_labels(scores: np.ndarray, count: int, estimate: np.ndarray | None = None, weight: float = 0) -> list[int]:
    """Choose by the scores of a few random samples, with the estimate or without, once for each draw of samples."""
    r, chosen = np.random.RandomState(count), []
    for _ in range(NUM_DRAWS):
        mean = scores[:, r.permutation(scores.shape[1])[:count]].mean(1)
        if estimate is not None:
            mean = (count * mean + weight * estimate) / (count + weight)
        chosen.append(lowest(mean))
    return chosen


# %% The table of them. A rule gives epochs: several if they depend on which samples have labels.
Rule = Callable[[Curves], list[int]]
NEVER, TRUE = "never stop", "the true score (out of reach)"
BEFORE, PLAIN = "the estimate before", "the estimate without the reference"
ESTIMATE, REFERENCE = "**the estimate**", "the reference by itself"
HELD_BRIER, HELD_LOSS = "10 % held out, by its Brier score", "10 % held out, by its loss"
HELD_ACCURACY, HELD_BOTH = "10 % held out, by its accuracy", "10 % held out, with `validation_labels=True`"
STOPPING = "`EarlyStopping` on the estimate, patience a third"
PATIENCE = "`EarlyStopping` on the estimate, patience 10"
DISPARITY, WAVE = "gradient disparity", "Label Wave"

ON_FEWER: dict[str, Rule] = {  # those that train on 90 % of the samples
    HELD_BRIER: lambda c: [lowest(c.held_scores)],
    HELD_LOSS: lambda c: [lowest(c.held_losses)],
    HELD_ACCURACY: lambda c: [lowest(-c.held_accuracies)],
    HELD_BOTH: lambda c: [lowest(c["fewer_val_risk_estimate"])],
}
RULES: dict[str, Rule] = {
    NEVER: lambda c: [len(c["loss"]) - 1],
    BEFORE: lambda c: [lowest(c.estimate_before)],
    PLAIN: lambda c: [lowest(c.plain_estimate)],
    ESTIMATE: lambda c: [lowest(c["val_risk_estimate"])],
    REFERENCE: lambda c: [lowest(c["val_risk_reference"])],
    STOPPING: lambda c: [patient(c["val_risk_estimate"], -(-len(c["loss"]) // 3))],
    PATIENCE: lambda c: [patient(c["val_risk_estimate"], 10)],
    **ON_FEWER,
    DISPARITY: lambda c: [first(np.diff(c["disparity"], prepend=np.inf) > 0, 5)],
    WAVE: lambda c: [label_wave(c["changed"])],
    TRUE: lambda c: [lowest(c["true_score"])],
}


def alone(kind: str, count: int) -> str:
    return f"{count} {kind} labels"


def beside(kind: str, count: int) -> str:
    return f"{count} {kind} labels and the estimate"


def _by_labels(c: Curves, kind: str, count: int) -> list[int]:
    return with_labels(c.label_scores[kind], count)


def _by_both(c: Curves, kind: str, count: int) -> list[int]:
    return with_labels(c.label_scores[kind], count, c["val_risk_estimate"], c.about["label_weight"])


for _kind in ("noisy", "correct"):
    for _count in MORE_COUNTS:
        RULES[alone(_kind, _count)] = lambda c, of=(_kind, _count): _by_labels(c, *of)
    for _count in COUNTS:
        RULES[beside(_kind, _count)] = lambda c, of=(_kind, _count): _by_both(c, *of)
RAW, RAW_REFERENCE = "the estimate, reference on raw pixels", "that reference by itself"
FINE_TUNING: dict[str, Rule] = {  # where the others know the features of the frozen body
    RAW: lambda c: [lowest(c["raw_risk_estimate"])],
    RAW_REFERENCE: lambda c: [lowest(c["raw_risk_reference"])],
}
MAIN = tuple(name for name in RULES if " labels" not in name)


def rules_of(c: Curves) -> dict[str, Rule]:
    return RULES | FINE_TUNING if c.about["pool"] == "fine-tuning" else RULES


def cost(c: Curves, name: str) -> dict[str, float]:
    """Give what a rule pays: accuracy lost in points, and how much higher scores are than the lowest, in percent."""
    epochs, prefix = rules_of(c)[name](c), "fewer_" if name in ON_FEWER else ""
    found = {each: float(c[prefix + each][epochs].mean()) for each in YARDSTICKS}
    return {
        "accuracy": 100 * (float(c["accuracy"].max()) - found["accuracy"]),
        "true_score": 100 * (found["true_score"] / float(c["true_score"].min()) - 1),
        "loss": 100 * (found["loss"] / float(c["loss"].min()) - 1),
    }
