"""What pages tell of how sure expected values are, of labels beside them, and of how far the reference leads."""

from collections.abc import Iterable
from itertools import chain, product
from pathlib import Path

import pandas as pd
from stopping.parts import SIGNALS

from lightning_sensitivity.functional.expected import ESTIMATES, equivalent_labels_of

QUANTILE = 1.645  # of the normal distribution, for an interval of 90 %
FOUND = pd.read_csv(Path(__file__).with_name("results.csv.gz"))
FOUND["pool"] = FOUND["run"].str.split("-").str[0]
OF_TABLES = FOUND["pool"].isin(["tables", "large", "transformer", "few", "few_large", "numbers", "numbers_large"])
SEES = (FOUND["judge"] == "inputs").map({True: "part", False: "features"}).mask(OF_TABLES, "table")
NUMBERS = [equivalent_labels_of(*both) for both in zip(SEES, FOUND["value_of"], strict=True)]


def variance(rows: pd.DataFrame, equivalent: float | pd.Series) -> pd.Series:
    """Return the variance of expected values, if a reference is as sure as so many labels."""
    return rows["variance"] * (1 + rows["num_unseen"] / rows["num_training"] + rows["num_unseen"] / equivalent)


VARIANCE = variance(FOUND, pd.Series(NUMBERS, FOUND.index))
FOUND = FOUND.assign(
    half=QUANTILE * VARIANCE**0.5,
    error=FOUND["error"].abs(),
    of_both=QUANTILE * (VARIANCE + FOUND["truth_variance"]) ** 0.5,
    lead=FOUND["lead"] / VARIANCE**0.5,
)
PHOTOS, TEXTS = "pool in ['photos', 'photos_more', 'resnet18']", "pool in ['texts', 'texts_more', 'few_texts']"
TUNED = "pool in ['tuned', 'pretrained', 'minilm', 'minilm_more']"
KINDS = {
    "tables": "pool in ['tables', 'large', 'transformer']",
    "few positives": "pool in ['few', 'few_large']",
    "regressions": "pool in ['numbers', 'numbers_large']",
    "photos, by an encoder": f"{PHOTOS} and judge in ['lite0', 'lite2']",
    "photos, by patches": f"{PHOTOS} and judge == 'inputs'",
    "signals, by patches": SIGNALS,
    "texts, by an encoder": f"{TEXTS} and judge == 'minilm'",
    "texts, by words": f"{TEXTS} and judge == 'inputs'",
    "fine-tuned, by an encoder": f"{TUNED} and judge in ['lite0', 'lite2']",
    "fine-tuned, by its own body": f"{TUNED} and judge == 'body'",
    "fine-tuned, by patches or words": f"{TUNED} and judge == 'inputs'",
}
GROUPS = {label: FOUND.query(condition) for label, condition in KINDS.items()}
GROUPS = {label: rows for label, rows in GROUPS.items() if len(rows)}


def marked(label: str) -> str:
    """Mark a kind of which a run was judged by an older version of the estimates."""
    return f"{label}†" if (GROUPS[label]["version"] < ESTIMATES).any() else label


SEE_ALL = ("tables", "few positives", "regressions")
ASKED = (*SEE_ALL, "photos, by an encoder")
VALUES = {"accuracy": "accuracy", "AUROC": "auroc", "loss": "loss"}
COUNTS = (50, 200, 600)
CHOOSE = ("+ 1,000", "**both**", "each")
RULES = {"labels": "labels", "the reference as 1,000": "today", "2 errors": "at_2.0", "2.5": "at_2.5", "3": "at_3.0"}


def head(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def table(columns: list[str], lines: Iterable[str]) -> str:
    return "\n".join([head(*columns), *lines])


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def runs(rows: pd.DataFrame) -> int:
    return int(rows[["run", "judge"]].drop_duplicates().shape[0])


# %% How sure.
def held(rows: pd.DataFrame, by: str) -> str:
    """Say in how many percent an interval holds the truth."""
    return "–" if rows.empty else f"{100 * (rows['error'] <= rows[by]).mean():.0f}"


def sure(label: str) -> str:
    rows, cells = GROUPS[label], []
    check = rows[~rows["is_design"]]
    for value in VALUES.values():
        some = check[check["value_of"] == value]
        cells.append("–" if some.empty else f"{held(some, 'half')}, {held(some, 'of_both')}")
    share = 100 * (check["error"] <= check["of_both"]).mean()
    met = ("yes" if share >= 85 else "**no**") if label in ASKED else ""
    design = rows[rows["is_design"]]
    of_both = held(check, "of_both"), f"{held(design, 'of_both')} ({runs(design)})"
    return line(f"{marked(label)} ({runs(check)})", *cells, *of_both, met)


# %% As how many labels.
TRIED = (1000, 500, 300, 200, 100, 50, 30, 20)


def held_as(rows: pd.DataFrame, equivalent: int) -> str:
    """Say in how many percent an interval holds the truth, if a reference is as sure as so many labels."""
    half = QUANTILE * (variance(rows, equivalent) + rows["truth_variance"]) ** 0.5
    return f"{100 * (rows['error'] <= half).mean():.0f}"


def numbers(label: str, value: str) -> list[str]:
    """Say how often intervals hold on the design half, by each number tried; on the other by that taken."""
    rows = GROUPS[label][GROUPS[label]["value_of"] == value]
    design, check = rows[rows["is_design"]], rows[~rows["is_design"]]
    if design.empty or check.empty:
        return []
    sees = "table" if label in SEE_ALL else "features" if label.endswith(("encoder", "body")) else "part"
    taken = equivalent_labels_of(sees, value)
    cells = [f"**{held_as(design, each)}**" if each == taken else held_as(design, each) for each in TRIED]
    return [line(f"{marked(label)}, {value} ({len(design)})", *cells, f"{held_as(check, taken)} ({len(check)})")]


# %% Labels.
def off(rows: pd.DataFrame, rule: str, count: int) -> float:
    return float(rows[f"off_{rule}_{count}"].mean())


def beside(label: str, value: str) -> list[str]:
    rows = GROUPS[label]
    rows = rows[(rows["value_of"] == value) & ~rows["is_design"]]
    if rows.empty:
        return []
    form, factor = (".1f", 100) if value == "accuracy" else (".3f", 1)
    cells = []
    for count in COUNTS:
        cells += [f"{factor * off(rows, rule, count):{form}}" for rule in ("labels", "today", "at_2.0")]
    worst = max(off(rows, "at_2.0", count) / off(rows, "labels", count) for count in COUNTS)
    more = 100 * max(off(rows, "at_2.0", count) - off(rows, "today", count) for count in COUNTS)
    met = worst <= 1.3 and (value != "accuracy" or more <= 1)
    return [line(f"{marked(label)} ({runs(rows)}), {value}", *cells, f"{worst:.2f}", "yes" if met else "**no**")]


def thresholds() -> list[str]:
    """Say what each threshold would cost on the design half, at worst of all kinds, values and numbers of labels."""
    found = []
    design = [rows[rows["is_design"]] for rows in GROUPS.values()]
    for name, rule in list(RULES.items())[1:]:
        halves = [rows[rows["value_of"] == value] for rows in design for value in ("accuracy", "loss")]
        pairs = [(rows, count) for rows in halves for count in COUNTS if len(rows)]
        worst = max(off(rows, rule, count) / off(rows, "labels", count) for rows, count in pairs)
        of_accuracy = [pair for pair in pairs if (pair[0]["value_of"] == "accuracy").all()]
        more = max(off(rows, rule, count) - off(rows, "today", count) for rows, count in of_accuracy)
        found.append(line(name, f"{worst:.2f}", f"{100 * more:.1f}"))
    return found


def chosen(label: str) -> str:
    """Say what accuracy the epoch loses that is chosen by labels and a reference."""
    rows = GROUPS[label]
    rows = rows[rows["value_of"] == "accuracy"]
    lost = (
        f"{100 * rows[f'lost_{rule}_{count}'].mean():.2f}"
        for count in COUNTS
        for rule in ("today", "at_2.0", "each_2.0")
    )
    return line(f"{marked(label)} ({runs(rows)})", *lost)


# %% How far the reference leads.
def led(label: str, value: str) -> list[str]:
    rows = GROUPS[label]
    rows = rows[(rows["value_of"] == value) & ~rows["is_design"]]
    if rows.empty:
        return []
    cells = []
    for least, gain in ((0.0, "reference_gain"), (0.0, "mean_gain"), (0.5, "mean_gain"), (1.0, "reference_gain")):
        some = rows.loc[rows["lead"] >= least, gain]
        cells.append(f"{(some > 0).sum()} of {len(some)}" if len(some) else "–")
    said = rows[rows["lead"] >= 0.5]
    form, factor = ("+.1f", 100) if value != "loss" else ("+.3f", 1)
    by = f"{factor * said['mean_gain'].mean():{form}}".replace("-", "−") if len(said) else "–"
    return [line(f"{marked(label)}, {value}", *cells, by)]


NAMES: dict[str, object] = {}
TOLD = [label for label, rows in GROUPS.items() if not rows["is_design"].all()]
BLOCKS = {
    "sureness: coverage": table(
        ["90 % intervals that hold the truth, %", *VALUES, "all", "design half", "85 or more"], map(sure, TOLD)
    ),
    "sureness: numbers": table(
        ["design half", *(f"{each:,}" for each in TRIED), "check half"],
        chain(*(numbers(*each) for each in product(GROUPS, VALUES.values()))),
    ),
    "sureness: labels": table(
        ["off, by", *(f"{count}: {rule}" for count in COUNTS for rule in ("labels", "+ 1,000", "**both**")),
         "at worst, of labels", "met"],
        chain(*(beside(*each) for each in product(TOLD, ("accuracy", "loss")))),
    ),
    "sureness: thresholds": table(
        ["design half: counts for less from", "at worst, of labels alone", "points of accuracy more than as 1,000"],
        thresholds(),
    ),
    "sureness: chosen": table(
        ["all runs; accuracy lost by", *(f"{count}: {rule}" for count, rule in product(COUNTS, CHOOSE))],
        (chosen(label) for label, rows in GROUPS.items() if (rows["value_of"] == "accuracy").any()),
    ),
    "sureness: leads": table(
        ["all runs", "the reference is better", "the mean is", "by half an error: the mean is", "by a whole: it is",
         "by half: the mean gains"],
        chain(*(led(*each) for each in product(TOLD, VALUES.values()))),
    ),
}  # fmt: skip
