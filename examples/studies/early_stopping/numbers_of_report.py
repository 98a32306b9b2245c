"""The numbers of the report in one file, from which every page takes them.

`study.py` writes `numbers.json`. A page that quotes numbers has its sentences in `quotes.toml`, with the place of each
number in that file; `filled` puts the numbers in, and a test looks for the filled sentences in the pages.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
from rules import HELD_BRIER, NEVER, RAW
from tables import Groups, bounds, in_labels, main_rules, noise_numbers, of, worth
from targets import targets

HERE = Path(__file__).parent
DIFFERENCES = {"against_never": NEVER, "against_held_out": HELD_BRIER, "against_raw": RAW}


def numbers(found: Groups) -> dict[str, Any]:
    """Give for each group and rule what it pays, and how well shares of wrong labels are found."""
    told: dict[str, Any] = {name: _group(runs) for name, runs in found.items()}
    everything = found["all pools: all"]
    columns = ["label noise", *(name for name in everything if str(name).startswith("noise by "))]
    told["noise"] = {name: noise_numbers(everything[everything[name].notna()], name) for name in columns}
    told["targets"] = targets(found)
    return told


def _group(runs: pd.DataFrame) -> dict[str, Any]:
    told: dict[str, Any] = {"runs": len(runs)}
    for rule in (*main_rules(), RAW):
        lost = of(runs, rule) if f"{rule}: accuracy" in runs else pd.Series(dtype=float)
        if len(lost) == 0 or lost.isna().any():
            continue
        told[rule.strip("*")] = line = {
            "lost": lost.mean(), "median": lost.median(), "p90": lost.quantile(0.9), "worst": lost.max(),
            "loss": of(runs, rule, "loss").mean(), "true_score": of(runs, rule, "true_score").mean(),
            "worth": in_labels(worth(runs, rule)),
        }  # fmt: skip
        for name, other in DIFFERENCES.items():
            if f"{other}: accuracy" in runs and not of(runs, other).isna().any():
                difference = lost - of(runs, other)
                low, high = bounds(difference)
                line[name] = {"mean": difference.mean(), "low": low, "high": high}
    return told


def filled(sentence: str, told: dict[str, Any]) -> str:
    """Put numbers into a sentence: `{group > rule > what:.1f}`; a minus sign is a real one."""

    def put(found: re.Match[str]) -> str:
        value: Any = told
        place, _, form = found[1].partition(":.")
        for key in place.split(" > "):
            value = value[key]
        return format(value, f".{form}").replace("-", "−") if form else str(value)

    return re.sub(r"\{([^{}]+)\}", put, sentence)


def write(found: Groups, file: Path) -> None:
    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: rounded(each) for name, each in value.items()}
        return round(value, 3) if isinstance(value, float) else value

    file.write_text(json.dumps(rounded(numbers(found)), indent=1, ensure_ascii=False, default=float) + "\n")
