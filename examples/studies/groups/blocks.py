"""What pages tell of rows of the same person, with and without `groups=`."""

from pathlib import Path
from typing import Any

import pandas as pd
from summaries import Runs, Values, table

RUNS = Runs.read(Path(__file__).with_name("results.csv"))
KINDS = ("patients", "households", "persons", "mothers", "schools and districts")
NAMES: dict[str, Any] = {kind.split()[0]: RUNS.where(f"groups == '{kind}'") for kind in KINDS} | {"all": RUNS}
NAMES |= {f"{name}_heard": runs.where("groups_is_blind == 0") for name, runs in NAMES.items()}
ROWS = {f"{kind} ({{{kind.split()[0]}.count}})": kind.split()[0] for kind in KINDS} | {"**all** ({all.count})": "all"}
WAYS = {"without": "rows", "with": "groups"}


def pair(column: str, form: str = ".1f", runs: str = "ROW") -> str:
    """Give the same value without groups and with them."""
    return ", ".join(f"{{{runs}.{way}_{column}:{form}}}" for way in WAYS.values())


def difference(column: str) -> str:
    return f"{{ROW.groups_{column}.minus[rows_{column}].interval:+.1f}}"


LIKELY = pd.read_csv(Path(__file__).with_name("likely.csv"))
LIKELY["is_said"] = LIKELY["farther"] > 0
TOO_SURE = LIKELY.merge(RUNS.frame, on=["table", "seed"]).query("rows_left_out_error >= 10")["is_said"]
NO_GROUPS = {
    "at random": "split at random",
    "400 rows": "of 400 rows",
    "repeated rows": "with rows that a sampler repeats",
}
NO_GROUPS |= {"undersampled": "with as many known rows of each class"}


def said(label: str, is_of: pd.Series) -> str:
    found = LIKELY[is_of]
    return f"| {label} | {found['table'].nunique()} | {len(found)} | {found['is_said'].sum()} |"


LEVEL = {
    "left-out accuracy − that on new ones": pair("left_out_error"),
    "expected accuracy off": pair("accuracy_level_error", runs="ROW_heard"),
    "expected loss off, %": pair("loss_level_error", ".0f", "ROW_heard"),
}
CHOICE = {
    "accuracy lost, points": pair("by_accuracy_accuracy_lost"),
    "never stopping": "{ROW.never_accuracy_lost:.1f}",
    "loss above the lowest, %": pair("by_loss_loss_lost", ".0f"),
    "never": "{ROW.never_loss_lost:.0f}",
}
SAYS = {
    "the reference is right, it says, in %": pair("left_out", ".0f"),
    "on new ones in %": pair("reference", ".0f"),
    "it says nothing, runs": "{ROW.rows_is_blind.above:.0f}, {ROW.groups_is_blind.above:.0f}",
}


def met(ours: Values, limit: float) -> str:
    return f"{ours:.1f} | {limit:.1f} | {'yes' if ours.mean <= limit else '**no**'}"


BLOCKS = {
    "groups: asked for": "\n".join(
        [
            "| asked for with `groups=`, points off new persons' | came | at most | met |",
            "|---|---|---|---|",
            f"| left-out accuracy | {met(RUNS.groups_left_out_error, 3)} |",
            f"| expected accuracy | {met(RUNS.groups_accuracy_level_error, 3)} |",
        ]
    ),
    "groups: likely": "\n".join(
        [
            "| groups that nobody has named | tables | runs | said |",
            "|---|---|---|---|",
            *(said(kind, LIKELY["what"] == kind) for kind in KINDS),
            said("**all with groups**", LIKELY["what"].isin(KINDS)),
            *(said(f"without groups, {label}", LIKELY["what"] == what) for what, label in NO_GROUPS.items()),
        ]
    )
    + f"\n\nOf the {len(TOO_SURE)} runs in which the reference was 10 points too sure of itself, or more, it is said "
    f"in {TOO_SURE.sum()}.",
    "groups: says": table("without, with `groups=` (runs)", ROWS, SAYS),
    "groups: level": table("points off: without, with `groups=` (runs)", ROWS, LEVEL),
    "groups: choice": table("without, with `groups=` (runs)", ROWS, CHOICE),
    "groups: spread": table(
        "with − without `groups=` (runs)",
        ROWS,
        {
            "left-out accuracy off, points [95 %]": difference("left_out_error"),
            "expected accuracy off": difference("accuracy_level_error"),
            "accuracy lost": difference("by_accuracy_accuracy_lost"),
        },
    ),
    "groups: in words": """
Without `groups=`, the left-out accuracy is {all.rows_left_out_error:.1f} points off that on new ones, with it
{all.groups_left_out_error:.1f}; expected accuracy is {all_heard.rows_accuracy_level_error:.1f} and
{all_heard.groups_accuracy_level_error:.1f} points off, expected loss {all_heard.rows_loss_level_error:.0f} and
{all_heard.groups_loss_level_error:.0f} %. Without a person that tells of another, nothing
is expected with `groups=`, and the last epoch is kept: so in {all.groups_is_blind.above:.0f} of {all.count} runs.""",
}
