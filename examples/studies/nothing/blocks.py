"""What pages tell of tables that tell nothing, of few labels, and of rules that a network alone finds."""

from pathlib import Path

import pandas as pd
from summaries import Number, Runs

FOUND = pd.read_csv(Path(__file__).with_name("results.csv"))
FEW = FOUND[(FOUND["part"] == "few") & (FOUND["skill"] <= 0) & (FOUND["majority"] < 1)]
MADE = FOUND[FOUND["part"] == "made"]
KEPT = FOUND[FOUND["part"] == "kept"]
IS_NOTHING = KEPT["skill"] <= 0


def head(*columns: str) -> str:
    return f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|"


def line(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


# %% Few labels: the design half, by which the number was chosen, and the check half.
def few(n: int, is_design: bool) -> str:
    tried = FOUND[(FOUND["part"] == "few") & (FOUND["n"] == n) & (FOUND["is_design"] == is_design)]
    rows = FEW[(FEW["n"] == n) & (FEW["is_design"] == is_design)]
    if rows.empty:
        return line(n, "design" if is_design else "check", f"0 of {len(tried)}", "–", "–", "–", "–", "–")
    accuracy = (f"{rows[f'{rule}_accuracy_lost'].mean():.1f}" for rule in ("last", "by_accuracy", "by_loss"))
    losses = (f"{rows[f'{rule}_loss_lost'].mean():.0f}" for rule in ("last", "by_loss"))
    return line(n, "design" if is_design else "check", f"{len(rows)} of {len(tried)}", *accuracy, *losses)


# %% Rules that were made.
def made(name: str, n: int) -> str:
    rows = MADE[(MADE["name"] == name) & (MADE["n"] == n)]
    blind = rows[rows["skill"] <= 0]
    best, skill = 100 * rows["best_accuracy"].mean(), Number(rows["skill"].mean())
    lost = (f"{blind[f'{rule}_accuracy_lost'].mean():.1f}" for rule in ("last", "by_accuracy", "by_loss"))
    cells = ["–"] * 3 if blind.empty else lost
    return line(f"{name}, {n:,} rows", f"{skill:.2f}", f"{len(blind)} of {len(rows)}", f"{best:.0f}", *cells)


# %% Kept tables.
def kept(label: str, rows: pd.DataFrame) -> str:
    """Say what is lost by the last epoch, before, now, and by 600 labels: accuracy, and the loss."""
    cells = []
    for what, form in (("accuracy", ".2f"), ("loss", ".1f")):
        now = rows[f"by_{what}_{what}_lost"]
        before = now.where(rows["skill"] > 0, rows[f"last_{what}_lost"])
        lost = rows[f"last_{what}_lost"], before, now, rows[f"labels_600_{what}_lost"]
        cells += [f"{each.mean():{form}}" for each in lost]
    return line(f"{label} ({len(rows)})", *cells)


def met(value: float, limit: float) -> str:
    return f"{value:.2f} | {limit:.2f} | {'yes' if value <= limit else '**no**'}"


SIZES, SOME = sorted(FOUND.loc[FOUND["part"] == "few", "n"].unique()), MADE[["name", "n"]].drop_duplicates()
NAMES: dict[str, object] = {"kept": Runs(KEPT), "nothing": Runs(KEPT[IS_NOTHING])}
BLOCKS = {
    "nothing: few labels": "\n".join([
        head("labels", "half", "no skill", "accuracy lost: the last epoch", "expected accuracy", "expected loss",
             "loss above its lowest, %: the last", "expected loss"),
        *(few(n, is_design) for is_design in (True, False) for n in SIZES),
    ]),
    "nothing: made": "\n".join([
        head("20 columns", "skill", "said to tell nothing", "best accuracy, %", "there lost: the last epoch",
             "by expected accuracy", "by expected loss"),
        *(made(*each) for each in SOME.itertuples(index=False)),
    ]),
    "nothing: kept": "\n".join([
        head("kept tables (runs)", "accuracy lost: the last epoch", "before", "**now**", "600 labels",
             "loss above its lowest, %: the last epoch", "before", "**now**", "600 labels"),
        kept("all", KEPT), *([kept("the inputs tell nothing", KEPT[IS_NOTHING])] if IS_NOTHING.any() else []),
    ]),
    "nothing: asked for": "\n".join([
        head("asked for: at most", "came", "limit", "met"),
        f"| accuracy lost on kept tables, points | {met(KEPT['by_accuracy_accuracy_lost'].mean(), 0.65)} |",
        f"| the chosen loss above its lowest, % | {met(KEPT['by_loss_loss_lost'].mean(), 2.0)} |",
    ]),
}  # fmt: skip
