"""The end of a fit: a summary for programs, and the last line for people, which says the same."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from lightning.pytorch import Trainer

from lightning_sensitivity.callbacks.checks import BLIND, EXPECTED, LOGITS, callbacks_that_monitor
from lightning_sensitivity.callbacks.history import Row
from lightning_sensitivity.callbacks.predicted import Verdict, is_same

_SAID = 0.05  # share of labels that is worth a sentence
_FACTS = (  # in the dict of a summary
    *("monitored", "direction", "epoch", "checkpoint", "network", "reference", "chosen_by", "num_labels"),
    *("is_tied", "is_improving", "num_validations", "num_gaps"),
)
_ENDED = 0.01  # of the first learning rate
_LEARNERS = {"forest": "random forest", "ridge": "ridge regression on {}"}
_WORDS = {"loss": "a loss of", "accuracy": "an accuracy of", "auroc": "an AUROC of"}
CONSTANT, PROBABILITIES, ANSWER = "worse than a constant", "probabilities", "knows the answer"
_DOUBTS = {  # what makes numbers doubtful, so that there is no advice
    CONSTANT: "The network is worse than a constant prediction: if your step scales targets or takes logarithms, do "
    "the same in `targets=`.",
    PROBABILITIES: f"All outputs lie in [0, 1], and logits are needed: set {LOGITS}.",
    ANSWER: "The reference explains all but a hundredth of the labels: look whether its inputs hold the answer, which "
    "`inputs=` or `features=` leaves out.",
}


class Curve(NamedTuple):
    """A value of a loader, and whether the highest is the best."""

    value: str
    dataloader_idx: int
    is_highest: bool


@dataclass(frozen=True)
class Summary:
    """What is known at the end of a fit.

    Attributes:
        monitored: The logged name that chose.
        curve: What it stands for.
        best: The row of the best epoch; empty if none was chosen.
        checkpoint: The file of that epoch, if one was saved.
        is_tied: Whether no epoch was chosen since all values are equal.
        is_improving: Whether more epochs are likely to be better.
        num_validations: How many validations there were.
        num_gaps: How many of them have no value.
        verdict: What is known of the reference; None without one.
        doubts: What makes the numbers doubtful.
    """

    monitored: str
    curve: Curve
    best: Row
    checkpoint: str
    is_tied: bool
    is_improving: bool
    num_validations: int
    num_gaps: int
    verdict: Verdict | None
    doubts: tuple[str, ...]

    @property
    def epoch(self) -> int | None:
        """The best epoch; None if none was chosen."""
        return self.best.get("epoch")

    @property
    def network(self) -> float | None:
        """What the network is expected to reach there."""
        return self.best.get(self.curve.value)

    @property
    def reference(self) -> float | None:
        """What the reference by itself is expected to reach on the same samples."""
        return self.best.get(f"reference_{self.curve.value}")

    @property
    def num_labels(self) -> int:
        """How many validation labels judged it."""
        return int(self.best.get("num_labels", 0))

    @property
    def has_reference(self) -> bool:
        """Whether a reference judged it."""
        return self.best.get("reference") is not None

    @property
    def direction(self) -> str:
        """Where the value is best."""
        return "highest" if self.curve.is_highest else "lowest"

    @property
    def chosen_by(self) -> str:
        """What chose the epoch."""
        names = ["reference"] * self.has_reference + ["labels"] * (self.num_labels > 0)
        return " and ".join(names) or "nothing"

    def as_dict(self) -> dict[str, Any]:
        """Return numbers, names and flags, as ``json`` takes them: None for what is not known."""
        facts = {name: getattr(self, name) for name in _FACTS} | {"doubts": [*self.doubts]}
        expected = {name: value for name, value in self.best.items() if EXPECTED in name}
        known = {"learner": None, "is_trusted": False} if self.verdict is None else asdict(self.verdict)
        return {name: _known(value) for name, value in {**facts, **expected, **known}.items()}

    def line(self) -> str:
        """Say it in sentences."""
        return " ".join(filter(None, [*self._choice(), self._unexplained(), self._longer()]))

    def _choice(self) -> list[str]:
        """Say which epoch was chosen, and by what, or why none was."""
        if self.is_tied:
            return [f"All values of `{self.monitored}` are equal, so that no epoch was chosen."]
        if not self.best:
            return [self._why_nothing()]
        doubts = [_DOUBTS[each] for each in self.doubts]
        return [self._best(), self._what_chose(), *doubts, self._rival(), self._blind(), self._gaps()]

    def _best(self) -> str:
        """Say which epoch and file."""
        file = f", in the checkpoint {self.checkpoint}" if self.checkpoint else ""
        return f"`{self.monitored}` was {self.direction} at epoch {self.epoch}{file}."

    def _what_chose(self) -> str:
        """Say what chose."""
        labels = f"{self.num_labels} validation labels"
        if not self.has_reference:
            return f"{labels} chose."
        if self.verdict is None:
            return "The reference of an earlier part of this fit chose."
        learner = self.verdict.learner
        name = _LEARNERS.get(learner, learner).format(self.verdict.features)
        both = f"{labels} and the" if self.num_labels else "The"
        return f"{both} reference ({name}, {self.verdict.num_training:,} training labels) chose."

    def _why_nothing(self) -> str:
        """Say why nothing was expected."""
        none = f"`{self.monitored}` has no value to choose by"
        if self.verdict is None:
            return f"{none}: the reference is missing{BLIND}"
        if self.verdict.is_trusted:
            return f"{none}: no validation after the reference gave one."
        if self.verdict.majority == 1:
            return f"{none}: the reference has seen labels of only one class{BLIND}"
        better = f"{max(0.0, self.verdict.skill):.0%} better than chance"
        reason = f"sees too little of the inputs (on labels that it has not seen, it is {better})"
        return f"{none}: the reference {reason}{BLIND}"

    def _rival(self) -> str:
        """Compare what is expected of the network and of the reference, on the same samples."""
        if self.network is None or self.reference is None:
            return ""
        gain = self.reference - self.network if self.curve.is_highest else self.network - self.reference
        advice = ": consider it, or the mean of both" if gain >= 0 and not self.doubts else ""
        name = self.curve.value.removeprefix(EXPECTED)
        what = _WORDS.get(name, f"`{name}` =")
        reached = f"{what} {self.network:.3g}, the reference by itself {self.reference:.3g}"
        return f"There the network is expected to reach {reached}{advice}."

    def _blind(self) -> str:
        """Name the labels that the reference can't tell, if there are several."""
        if self.verdict is None or not self.verdict.blind_labels:
            return ""
        names = ", ".join(map(str, self.verdict.blind_labels))
        return f"The reference can't tell these labels, which means by default leave out: {names}."

    def _gaps(self) -> str:
        """Say how many validations have no value."""
        if self.num_gaps == 0:
            return ""
        return f"There is no value for {self.num_gaps} of {self.num_validations} validations."

    def _longer(self) -> str:
        """Say if more epochs are likely to be better."""
        return "It was still improving: train for longer." if self.is_improving and not self.doubts else ""

    def _unexplained(self) -> str:
        """Say how many labels can't be explained, if that is worth a sentence."""
        share = 0.0 if self.verdict is None else self.verdict.unexplained
        if math.isnan(share) or share < _SAID:
            return ""
        return (
            f"About {share:.0%} of the training labels can't be explained: they are wrong, or not to be known from the "
            "inputs."
        )


def summarize(
    trainer: Trainer,
    curves: Mapping[str, Curve],
    history: Sequence[Row],
    verdict: Verdict | None,
    doubts: Iterable[str] = (),
) -> Summary:
    """Say which epoch is best by the value that is monitored, what chose it, and what is known of the labels.

    Args:
        trainer: The Trainer, at the end of a fit.
        curves: What each name that can be monitored stands for; if none is monitored, the first that tells
            epochs apart chooses.
        history: A row for each validation and loader.
        verdict: What is known of the reference of this fit; None without one.
        doubts: What makes the network's values doubtful.
    """
    name = _name_that_chooses(trainer, curves, history)
    curve = curves[name]
    rows, finite, found = _rows_of(curve, history)
    best = _best_row(found, curve)
    knows_answer = verdict is not None and verdict.knows_too_much
    return Summary(
        monitored=name,
        curve=curve,
        best=best,
        checkpoint=_checkpoint_of(trainer, name, best.get(curve.value)),
        is_tied=bool(found) and not best,
        is_improving=len(found) > 1 and best is rows[-1] and not _has_ended(trainer),
        num_validations=len(rows),
        num_gaps=len(rows) - len(finite),
        verdict=verdict,
        doubts=(*doubts, ANSWER) if knows_answer else (*doubts,),
    )


def _name_that_chooses(trainer: Trainer, curves: Mapping[str, Curve], history: Sequence[Row]) -> str:
    """Return the name that is monitored, else the first whose values tell epochs apart, else the first."""
    watched = [name for _, name in callbacks_that_monitor(trainer) if name in curves]
    telling = [name for name, curve in curves.items() if _best_row(_rows_of(curve, history)[2], curve)]
    return [*watched, *telling, *curves][0]


def _rows_of(curve: Curve, history: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Return the rows of a loader, those with a value, and those of them by the same reference as the last one."""
    rows = [row for row in history if row["dataloader_idx"] == curve.dataloader_idx]
    finite = [row for row in rows if math.isfinite(row.get(curve.value, math.nan))]
    return rows, finite, [row for row in finite if is_same(row["reference"], finite[-1]["reference"])]


def _best_row(rows: Sequence[Row], curve: Curve) -> Row:
    """Return the row of the best value; an empty one if there is none, or several are all equal."""
    if not rows or (len(rows) > 1 and len({row[curve.value] for row in rows}) == 1):
        return {}
    best: Row = (max if curve.is_highest else min)(rows, key=lambda row: row[curve.value])
    return best


def _checkpoint_of(trainer: Trainer, name: str, value: float | None) -> str:
    """Name the checkpoint that was saved for a value, if there is one."""
    for callback, monitor in callbacks_that_monitor(trainer):
        score = getattr(callback, "best_model_score", None)
        if monitor != name or score is None or value is None:
            continue
        if math.isclose(score, value, rel_tol=1e-5, abs_tol=1e-9):
            return str(getattr(callback, "best_model_path", ""))
    return ""


def _has_ended(trainer: Trainer) -> bool:
    """Return whether a callback has stopped the run, or a schedule has ended, so that more epochs are of no use."""
    has_stopped = any(getattr(owner, "stopped_epoch", 0) for owner, _ in callbacks_that_monitor(trainer))
    groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return has_stopped or any(group["lr"] <= _ENDED * group.get("initial_lr", 0.0) for group in groups)


def _known(value: Any) -> Any:
    """Return a value, and None for nan."""
    return None if isinstance(value, float) and math.isnan(value) else value
