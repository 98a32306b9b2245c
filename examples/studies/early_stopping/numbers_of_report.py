"""The numbers of the report in one file, `numbers.json`, from which every page takes them (`quotes.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
from rules import HELD_BRIER, NEVER, RAW
from tables import FEWEST, SAID, Groups, bounds, in_labels, main_rules, noise_numbers, of, worth
from targets import targets

DIFFERENCES = {"against_never": NEVER, "against_held_out": HELD_BRIER, "against_raw": RAW}


def numbers(found: Groups) -> dict[str, Any]:
    """Give for each group and rule what it pays, and how well shares of wrong labels are found."""
    told: dict[str, Any] = {name: _group(runs) for name, runs in found.items() if is_quoted(name)}
    everything = found["all pools: all"]
    told["said"] = {
        f"{kind}, {told_of}": int(
            ((everything["is_noisy"] == (kind == "noisy")) & (everything["said of labels"] == said)).sum()
        )
        for kind in ("noisy", "correct")
        for said, told_of in SAID.items()
    }
    columns = ["label noise", *(name for name in everything if str(name).startswith("noise by "))]
    told["noise"] = {name: noise_numbers(everything[everything[name].notna()], name) for name in columns}
    lines = targets(found)
    told["targets"] = {str(line["target"]): line for line in lines}
    told["targets met"], told["targets set"] = sum(bool(line["met"]) for line in lines), len(lines)
    return told


def is_quoted(group: str) -> bool:
    """Whether pages may quote a group: of single pools, only the largest parts."""
    pool, name = group.split(": ", 1)
    return name in ("all", "noisy labels", "correct labels", "all weights", "head alone") or (
        pool == "all pools" and ", told: " not in name
    )


def _group(runs: pd.DataFrame) -> dict[str, Any]:
    told: dict[str, Any] = {"runs": len(runs)}
    for rule in (*main_rules(), RAW):
        lost = of(runs, rule) if f"{rule}: accuracy" in runs else pd.Series(dtype=float)
        if lost.notna().sum() < FEWEST:
            continue
        told[rule.strip("*")] = line = {
            "runs": int(lost.notna().sum()),
            "lost": lost.mean(), "median": lost.median(), "p90": lost.quantile(0.9), "worst": lost.max(),
            "loss": of(runs, rule, "loss").mean(), "true_score": of(runs, rule, "true_score").mean(),
            "worth": in_labels(worth(runs, rule)),
        }  # fmt: skip
        for name, other in DIFFERENCES.items():
            difference = lost - of(runs, other) if f"{other}: accuracy" in runs else pd.Series(dtype=float)
            if difference.notna().sum() >= FEWEST:
                low, high = bounds(difference)
                line[name] = {"mean": difference.mean(), "low": low, "high": high}
    return told


def write(found: Groups, file: Path) -> None:
    file.write_text(json.dumps(_rounded(numbers(found)), indent=1, ensure_ascii=False) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value if isinstance(value, str | bool | int) else round(float(value), 4)
