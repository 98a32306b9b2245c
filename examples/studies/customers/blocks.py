"""What pages tell of copies of rows, and of the threshold of F1."""

from pathlib import Path

import pandas as pd

FOUND = pd.read_csv(Path(__file__).with_name("results.csv"))
MEANS = FOUND.groupby(["part", "case"]).mean()
SEEDS = FOUND["seed"].nunique()


def copies(case: str) -> str:
    left_out, new = 100 * MEANS.loc[("copies", case), ["left_out", "new"]]
    return f"{left_out:.0f} % of the labels that it has not seen, and {new:.0f} % of those of new customers"


def epochs(part: str, case: str) -> str:
    found = FOUND.query("part == @part and case == @case")["epoch"]
    return f"{found.min():.0f} to {found.max():.0f}"


def f1(part: str, case: str, column: str = "f1") -> str:
    return f"{MEANS.loc[(part, case), column]:.2f}"


FEW = FOUND.query("part == 'few positives' and case == 'half'")
NAMES: dict[str, object] = {}
BLOCKS = {
    "customers: copies": f"""
Of the front page's customers, a reference predicts {copies("as they are")} ({SEEDS} splits); with SMOTE
{copies("SMOTE")}; with two jittered copies of each row {copies("jitter")}; with mixup {copies("mixup")}.""",
    "customers: F1": f"""
Of the front page's customers with 8 % positives ({SEEDS} splits), expected F1 at a threshold of 0.5 is 0 after the first
epoch in {(FEW["first_expected"] == 0).sum()}, and chooses epochs {epochs("few positives", "half")} of 40, of F1
{f1("few positives", "half")}. At the share of positives it chooses epochs {epochs("few positives", "share")}, of F1
{f1("few positives", "share")}; the last epoch has {f1("few positives", "share", "last_f1")} there. With the
{100 * MEANS.loc[("as they are", "share"), "threshold"]:.0f} % that there are, it is {f1("as they are", "half")} and
{f1("as they are", "share")}.""",
}
