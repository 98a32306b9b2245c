"""The rules: each chooses an epoch of a run from what it could see, and pays for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np
from runs import learned
from truth import YARDSTICKS

COUNTS = (20, 50, 100)  # of labels by which an epoch is chosen, with the criterion or without
MORE_COUNTS = (10, *COUNTS, 200, 400)  # those that tell what the criterion is worth
NUM_DRAWS = 20  # of samples that have labels, for each count
TERMS = ("claim", "overconfidence", "memorization", "variance")
LABEL_WEIGHT = 200  # of the estimate beside labels; 40 if the reference has no weight
LABEL_WEIGHT_ALONE = 40
MAX_DISTANCE = 1 / 20  # of the package: between epochs of the criterion and the reference that agree, of all epochs


class Curves:
    """What a run left: arrays of one number an epoch, the logits of some samples, and their labels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.found: dict[str, np.ndarray] = {}
        for name in ("truth", "fewer", "logged", "logged_fewer"):
            if (folder / f"{name}.npz").exists():
                with np.load(folder / f"{name}.npz") as found:
                    self.found |= found
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

    # What the last line of the monitor says

    @property
    def closing(self) -> str:
        return str(self["closing"][0])

    @property
    def said_of_epoch(self) -> str:
        """What the line says of the epoch."""
        for said in ("disagrees", "may be the better model", "agrees", "no reference", "still falling"):
            if said in self.closing:
                return said
        return "nothing"

    @property
    def said_of_labels(self) -> str:
        """What the line says of the labels: "wrong", "no noise" or "nothing"."""
        if "of the training labels look wrong" in self.closing:
            return "wrong"
        return "no noise" if "No noise was found" in self.closing else "nothing"

    @cached_property
    def reference_says(self) -> str:
        """Whether the reference would choose the same epoch, or nearly: "agree", "disagree" or "no reference"."""
        if not self.has_reference:
            return "no reference"
        distance = abs(lowest(self["val_risk_criterion"]) - lowest(self["val_risk_reference"]))
        return "agree" if distance <= MAX_DISTANCE * len(self["loss"]) else "disagree"

    @property
    def label_noise(self) -> float:
        """The share of wrong labels, as the monitor has it; nan without a reference."""
        found = self.found.get("val_risk_label_noise")
        known = np.array([]) if found is None else found[np.isfinite(found)]
        return float(known[-1]) if len(known) else float("nan")

    # What rules look at

    @cached_property
    def plain_estimate(self) -> np.ndarray:
        """The estimate without the reference."""
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

    @property
    def has_reference(self) -> bool:
        return bool(np.nan_to_num(self.found.get("val_risk_reference_weight", np.zeros(1))).max() > 0)

    @property
    def looks_clean(self) -> bool:
        """Whether the criterion is the training score, since no noise was found."""
        return not np.array_equal(self["val_risk_criterion"], self["val_risk_estimate"], equal_nan=True)

    def beside(self, kind: str, count: int) -> list[int]:
        """Choose by the criterion with the labels of a few random samples, once for each draw of samples."""
        if self.looks_clean:
            return [lowest(self["val_risk_criterion"])]
        weight = LABEL_WEIGHT if self.has_reference else LABEL_WEIGHT_ALONE
        total = count + weight
        scores = drawn(self.label_scores[kind], count)
        return [lowest((count * each + weight * self["val_risk_estimate"]) / total) for each in scores]


def softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def of_labels(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return np.take_along_axis(p, labels[None, :, None], 2)[..., 0]


def brier(p: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Score each sample (a column) in each epoch (a row)."""
    return 1 + np.square(p).sum(-1) - 2 * of_labels(p, labels)


def drawn(scores: np.ndarray, count: int) -> list[np.ndarray]:
    """Give the mean scores of a few random samples in each epoch, once for each draw."""
    r = np.random.RandomState(count)
    return [scores[:, r.permutation(scores.shape[1])[:count]].mean(1) for _ in range(NUM_DRAWS)]


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


# %% All of them, by their names in results.csv. A rule gives epochs: several if they depend on what has labels.
Rule = Callable[[Curves], list[int]]
NEVER, TRUE = "never_stop", "true_score"
CRITERION, ESTIMATE, REFERENCE = "criterion", "estimate", "reference"
WITHOUT_REFERENCE, PATIENCE = "estimate_without_reference", "criterion_patience_10"
HELD_BRIER, HELD_LOSS, HELD_ACCURACY = "held_out_brier", "held_out_loss", "held_out_accuracy"
HELD_BOTH = "held_out_criterion"  # with `validation_labels=True`
DISPARITY, WAVE = "gradient_disparity", "label_wave"

HELD: dict[str, Rule] = {  # those that train on 90 % of the samples, and need no monitor
    HELD_BRIER: lambda c: [lowest(c.held_scores)],
    HELD_LOSS: lambda c: [lowest(c.held_losses)],
    HELD_ACCURACY: lambda c: [lowest(-c.held_accuracies)],
}
RULES: dict[str, Rule] = {
    NEVER: lambda c: [len(c["loss"]) - 1],
    CRITERION: lambda c: [lowest(c["val_risk_criterion"])],
    ESTIMATE: lambda c: [lowest(c["val_risk_estimate"])],
    WITHOUT_REFERENCE: lambda c: [lowest(c.plain_estimate)],
    REFERENCE: lambda c: [lowest(c["val_risk_reference"] if c.has_reference else c["val_risk_estimate"])],
    PATIENCE: lambda c: [patient(c["val_risk_criterion"], 10)],
    **HELD,
    HELD_BOTH: lambda c: [lowest(c["fewer_val_risk_criterion"])],
    DISPARITY: lambda c: [first(np.diff(c["disparity"], prepend=np.inf) > 0, 5)],
    WAVE: lambda c: [label_wave(c["changed"])],
    TRUE: lambda c: [lowest(c["true_score"])],
}


def alone(kind: str, count: int) -> str:
    return f"{kind}_labels_{count}"


def beside(kind: str, count: int) -> str:
    return f"criterion_{kind}_labels_{count}"


def _by_labels(c: Curves, kind: str, count: int) -> list[int]:
    return [lowest(scores) for scores in drawn(c.label_scores[kind], count)]


for _kind in ("noisy", "correct"):
    for _count in MORE_COUNTS:
        RULES[alone(_kind, _count)] = lambda c, of=(_kind, _count): _by_labels(c, *of)
    for _count in COUNTS:
        RULES[beside(_kind, _count)] = lambda c, of=(_kind, _count): c.beside(*of)
RAW, RAW_REFERENCE = "criterion_without_features", "reference_without_features"
FINE_TUNING: dict[str, Rule] = {  # where the others know the features of the frozen body
    RAW: lambda c: [lowest(c["raw_risk_criterion"])],
    RAW_REFERENCE: lambda c: [lowest(c.found.get("raw_risk_reference", c["raw_risk_estimate"]))],
}


def rules_of(c: Curves) -> dict[str, Rule]:
    return RULES | FINE_TUNING if c.about["pool"] == "fine-tuning" else RULES


def cost(c: Curves, name: str) -> dict[str, float]:
    """Give what a rule pays: accuracy lost in points, and how much higher scores are than the lowest, in percent."""
    if name == HELD_BOTH:
        found = {each: float(c.found.get(f"both_{each}", np.nan)) for each in YARDSTICKS}
    else:
        epochs, prefix = rules_of(c)[name](c), "fewer_" if name in HELD else ""
        found = {each: float(c[prefix + each][epochs].mean()) for each in YARDSTICKS}
    return {
        "accuracy_lost": 100 * (float(c["accuracy"].max()) - found["accuracy"]),
        "score_regret": 100 * (found["true_score"] / float(c["true_score"].min()) - 1),
        "loss_regret": 100 * (found["loss"] / float(c["loss"].min()) - 1),
    }
