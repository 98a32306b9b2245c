"""The end of a fit: a summary for programs, and the last line for people, which says the same."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, TypeAlias

from lightning_sensitivity.expected.doubts import REASONS
from lightning_sensitivity.expected.record import EXPECTED, Row, Verdict
from lightning_sensitivity.functional.expected import QUANTILE
from lightning_sensitivity.messages import BLIND

Summary: TypeAlias = dict[str, Any]  # numbers, names and flags, as ``json`` takes them: None for what is not known

_SAID = 0.05  # share of labels that is worth a sentence
_LEARNERS = {"forest": "random forest", "ridge": "ridge regression on {}"}
_WORDS = {"loss": "a loss of", "accuracy": "an accuracy of", "auroc": "an AUROC of"}


class Curve(NamedTuple):
    """A value of a loader, and whether the highest is the best."""

    value: str
    dataloader_idx: int
    is_highest: bool


def summarize(
    monitored: Iterable[str],
    curves: Mapping[str, Curve],
    history: Sequence[Row],
    verdict: Verdict | None,
    doubts: Iterable[str] = (),
) -> tuple[Summary, str]:
    """Say which epoch is best by the value that is monitored, what chose it, and what is known of the labels.

    Args:
        monitored: The names of values that callbacks and schedulers monitor, the first of ours chooses.
        curves: What each name that can be monitored stands for; if none is monitored, the first that tells
            epochs apart chooses.
        history: A row for each validation and loader.
        verdict: What is known of the reference of this fit; None without one.
        doubts: What makes the network's values doubtful.

    Returns:
        The summary, and the same in sentences.
    """
    telling = [name for name, curve in curves.items() if _choose(curve, history)[0]]
    name = [*(name for name in monitored if name in curves), *telling, *curves][0]
    curve = curves[name]
    best, curve_rows, finite, rows = _choose(curve, history)
    num_labels = int(best.get("num_labels", 0))
    chosen_by = ["reference"] * (best.get("reference_score") is not None) + ["labels"] * (num_labels > 0)
    summary = {
        "monitored": name,
        "direction": "highest" if curve.is_highest else "lowest",
        "epoch": best.get("epoch"),
        "network": best.get(curve.value),
        "chosen_by": " and ".join(chosen_by) or "nothing",
        "num_labels": num_labels,
        "is_tied": bool(curve_rows) and not best,
        "is_improving": len(curve_rows) > 1 and best is rows[-1],
        "num_validations": len(rows),
        "num_gaps": len(rows) - len(finite),
        "doubts": [*doubts],
        **{each: value for each, value in best.items() if EXPECTED in each},
        **({"learner": None, "is_trusted": False} if verdict is None else asdict(verdict)),
    }
    summary = {key: None if isinstance(each, float) and math.isnan(each) else each for key, each in summary.items()}
    return summary, _line(summary, curve.value.removeprefix(EXPECTED))


def _choose(curve: Curve, history: Sequence[Row]) -> tuple[Row, list[Row], list[Row], list[Row]]:
    """Return the best row of a loader, those to choose from, those with a value, and all.

    One chooses from those of the last reference. Of none, or of several that are all equal, the best one is empty.
    """
    rows = [row for row in history if row["dataloader_idx"] == curve.dataloader_idx]
    finite = [row for row in rows if math.isfinite(row.get(curve.value, math.nan))]
    curve_rows = [row for row in finite if row["reference_score"] == finite[-1]["reference_score"]]
    if not curve_rows or (len(curve_rows) > 1 and len({row[curve.value] for row in curve_rows}) == 1):
        return {}, curve_rows, finite, rows
    best = (max if curve.is_highest else min)(curve_rows, key=lambda row: row[curve.value])
    return best, curve_rows, finite, rows


# The last line


def _line(s: Summary, value: str) -> str:
    """Say a summary in sentences."""
    if s["is_tied"]:
        sentences = [f"All values of `{s['monitored']}` are equal, so that no epoch was chosen."]
    else:
        sentences = [_why_nothing(s)] if s["epoch"] is None else _of_best(s, value)
    if (s.get("unexplained") or 0.0) >= _SAID:
        sentences.append(
            f"About {s['unexplained']:.0%} of the training labels can't be explained: they are wrong, or not to be "
            "known from the inputs."
        )
    if s["is_improving"]:
        sentences.append("It was still improving.")
    return " ".join(filter(None, sentences))


def _of_best(s: Summary, value: str) -> list[str]:
    """Say what is known of the best epoch; what there is nothing to say of is empty."""
    blind, num_gaps = ", ".join(map(str, s.get("blind_labels", ()))), s["num_gaps"]
    nothing = "The inputs seem to tell nothing of the labels: no network is expected to beat the mean label."
    return [
        f"`{s['monitored']}` was {s['direction']} at epoch {s['epoch']}.",
        _what_chose(s),
        *[f"This is doubtful: {REASONS[each]}" for each in s["doubts"]],
        nothing * bool(s.get("inputs_tell_nothing")),
        _reached(s, value),
        f"The reference has no skill on these labels: {blind}. Averages leave them out, but for your own."
        * bool(blind),
        f"There is no value for {num_gaps} of {s['num_validations']} validations." * (num_gaps > 0),
    ]


def _what_chose(s: Summary) -> str:
    """Say what chose the epoch."""
    labels = f"{s['num_labels']} validation labels"
    if "reference" not in s["chosen_by"]:
        return f"Chosen by {labels}."
    if s["learner"] is None:
        return "Chosen by the reference of an earlier part of this fit."
    learner: str = s["learner"]
    name = _LEARNERS.get(learner, learner).format(s["features"])
    both = f"{labels} and the" if s["num_labels"] else "the"
    return f"Chosen by {both} reference ({name}, {s['num_training']:,} training labels)."


def _why_nothing(s: Summary) -> str:
    """Say why nothing was expected."""
    none = f"`{s['monitored']}` has no value to choose by"
    if s["learner"] is None:
        return f"{none}: the reference is missing{BLIND}"
    if s["is_trusted"]:
        return f"{none}: no validation after the reference gave one."
    return f"{none}: {why_blind(s['majority'], s['skill'])}"


def why_blind(majority: float, skill: float) -> str:
    """Say why a reference may not choose, and what to do."""
    if majority == 1:
        return f"the reference has seen labels of only one class{BLIND}"
    better = f"{max(0.0, skill):.0%} better than chance"
    return f"the reference sees too little of the inputs (on labels that it has not seen, it is {better}){BLIND}"


def _reached(s: Summary, value: str) -> str:
    """Say what is expected of the network, and how sure that is."""
    what, stderr = _WORDS.get(value, f"`{value}` ="), s.get(f"{EXPECTED}{value}_stderr")
    sure = "" if stderr is None else f" ± {_short(QUANTILE * stderr, 1)}"
    return f"There the network is expected to reach {what} {_short(s['network'])}{sure}."


def _short(number: float, digits: int = 3) -> str:
    """Round a number to some digits; below a million it has no exponent."""
    return f"{float(f'{number:.{digits}g}'):g}"
