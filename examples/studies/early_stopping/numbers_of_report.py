"""The numbers of the report in one file, from which every page takes them.

    python examples/studies/early_stopping/numbers_of_report.py  # brings the pages up to date

`study.py` writes `numbers.json`. What pages quote of it is in `quotes.md`: under a heading `page: name` a text, with
the place of each number. The page has the text with the numbers between `<!-- numbers: name -->` and `<!-- end -->`; a
test compares them.
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
ROOT = HERE.parents[2]
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


def write(found: Groups, file: Path) -> None:
    file.write_text(json.dumps(_rounded(numbers(found)), indent=1, ensure_ascii=False) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return value if isinstance(value, str | bool | int) else round(float(value), 4)


# %% The pages.
def quotes() -> dict[tuple[str, str], str]:
    """Give what each page quotes, by page and name, with the numbers."""
    told = json.loads((HERE / "numbers.json").read_text())
    parts = re.split(r"^## (.+?): (.+)$", (HERE / "quotes.md").read_text(), flags=re.MULTILINE)[1:]
    return {(page, name): filled(text.strip(), told) for page, name, text in zip(*[iter(parts)] * 3, strict=True)}


def filled(text: str, told: dict[str, Any]) -> str:
    """Put numbers into a text: `{group > rule > what:.1f}`, with `+` before the dot for a sign."""

    def put(found: re.Match[str]) -> str:
        place, _, form = found[1].rpartition(":")
        value: Any = told
        for key in place.split(" > "):
            value = value[key]
        return format(value, form).replace("-", "−") if form != "s" else str(value)

    return re.sub(r"\{([^{}]+)\}", put, text)


def block(page: str, name: str) -> re.Match[str] | None:
    """Find where a page has a quote."""
    start = re.escape(f"<!-- numbers: {name} -->")
    return re.search(rf"(?<={start}\n).*?(?=\n<!-- end -->)", page, flags=re.DOTALL)


def update_pages() -> None:
    for (page, name), text in quotes().items():
        file = ROOT / page
        found = block(file.read_text(), name)
        assert found is not None, f"{page} has no place for {name}"
        file.write_text(found.string[: found.start()] + text + found.string[found.end() :])


if __name__ == "__main__":
    update_pages()
