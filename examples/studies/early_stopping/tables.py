"""The tables of the report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from rules import ALL, COUNTS, ESTIMATE, FEWER, NEVER, STOPPINGS, TRUE, WAS, WAYS, YARDSTICKS, Curves, cost, named

POOLS = ("random", "as built", "wide")
Groups = dict[str, pd.DataFrame]
MEMBERS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "all": lambda runs: runs["n"] > 0,
    "noisy labels": lambda runs: runs["is_noisy"],
    "correct labels": lambda runs: ~runs["is_noisy"],
    "batch norm, noisy labels": lambda runs: runs["has_batch_norm"] & runs["is_noisy"],
    "no batch norm, noisy labels": lambda runs: ~runs["has_batch_norm"] & runs["is_noisy"],
    "human labels": lambda runs: runs["labels"] == "people",
    "n up to 500": lambda runs: runs["n"] <= 500,
    "n of 500 to 2,000": lambda runs: runs["n"].between(501, 2000),
    "n above 2,000": lambda runs: runs["n"] > 2000,
    "large (n ≥ 4,000) or augmented": lambda runs: runs["is_large"],
}


def judged(c: Curves) -> dict[str, object]:
    """Give a line of results.csv: what a run is, what every rule pays, and how good the estimate is."""
    about = c.about
    epoch = int(np.nanargmin(c["val_risk_estimate"]))
    line = {name: about[name] for name in ("pool", "seed", "kind", "labels", "n", "weights", "has_batch_norm")}
    line |= {"is_noisy": c.is_noisy, "is_large": about["n"] >= 4000 or about["is_augmented"]}
    line |= {"epochs": len(c["loss"]), "best": int(c["accuracy"].argmax()), "chosen": epoch}
    line |= {"size": c["val_risk_estimate"][epoch] / c["true_score"][epoch]}
    for name in ALL:
        line |= {f"{name}: {yardstick}": value for yardstick, value in cost(c, name).items()}
    return line


def groups(runs: pd.DataFrame) -> Groups:
    """Split the runs; those of a few are left out."""
    found = {}
    for pool in POOLS:
        members = runs[runs["pool"] == pool]
        found |= {f"{pool}: {name}": members[is_member(members)] for name, is_member in MEMBERS.items()}
    return {name: members for name, members in found.items() if len(members) >= 5}


# %% Numbers.
def resampled(num_runs: int) -> np.ndarray:
    """Draw as many runs with replacement, 2,000 times."""
    return np.random.default_rng(0).integers(num_runs, size=(2000, num_runs))


def bounds(values: pd.Series) -> tuple[float, float]:
    """Give the 95 % bootstrap interval of a mean."""
    low, high = np.quantile(values.to_numpy()[resampled(len(values))].mean(1), (0.025, 0.975))
    return float(low), float(high)


def interval(values: pd.Series) -> str:
    """Tell a mean with its 95 % bootstrap interval."""
    low, high = bounds(values)
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def of(runs: pd.DataFrame, rule: str, yardstick: str = "accuracy") -> pd.Series:
    return runs[f"{rule}: {yardstick}"]


def spread(values: pd.Series) -> str:
    """Tell how much the worst tenth and the worst run lose."""
    return f"{values.quantile(0.9):.1f} | {values.max():.1f}"


def means(runs: pd.DataFrame, rule: str) -> str:
    """Tell accuracy lost, regret of the true score, and loss regret."""
    accuracy, true_score, loss = (of(runs, rule, yardstick).mean() for yardstick in YARDSTICKS)
    return f"{accuracy:.2f} / {true_score:.1f} / {loss:.1f}"


def table(header: str, lines: list[str]) -> str:
    return "\n".join([f"| {header} |", "|" + "---|" * (header.count(" | ") + 1), *(f"| {line} |" for line in lines)])


# %% Tables.
def rules_table(runs: pd.DataFrame) -> str:
    lines = []
    for rule in ALL:
        lost = of(runs, rule)
        others = " | ".join(f"{of(runs, rule, each).mean():.1f}" for each in ("true_score", "loss"))
        lines.append(f"{rule} | {interval(lost)} | {spread(lost)} | {others}")
    return table("rule | accuracy lost | 90 % | worst | regret of the true score, % | loss regret, %", lines)


def groups_table(found: Groups) -> str:
    shown = (ESTIMATE, WAS, NEVER, named("noisy", 20, "with the estimate"), named("noisy", 50, "Brier score"), TRUE)
    lines = []
    for name, runs in found.items():
        start = f"{name} | {len(runs)} | {spread(of(runs, ESTIMATE))} | "
        lines.append(start + " | ".join(means(runs, rule) for rule in shown))
    return table("runs | number | 90 % | worst | " + " | ".join(shown), lines)


def labels_table(found: Groups, kind: str) -> str:
    names = [name for name in found if name.endswith(": noisy labels" if kind == "noisy" else ": all")]
    lines = []
    for name in names:
        lines.append(f"{name} | none | | | {means(found[name], ESTIMATE)}")
        for count in COUNTS:
            cells = " | ".join(means(found[name], named(kind, count, way)) for way in WAYS)
            lines.append(f"{name} | {count} | {cells}")
    return table("runs | labels | " + " | ".join(WAYS), lines)


def differences_table(found: Groups) -> str:
    """Compare rules run by run: below 0, the first of a pair loses less accuracy."""
    pairs = [(ESTIMATE, other) for other in (NEVER, WAS, FEWER, named("correct", 50, "log-loss"))]
    for kind, count in (("noisy", 20), ("noisy", 50), ("correct", 20), ("correct", 50)):
        pairs.append((named(kind, count, "with the estimate"), named(kind, count, "Brier score")))
    names = [name for name in found if name.endswith((": all", ": noisy labels", ": correct labels"))]
    lines = []
    for ours, other in pairs:
        cells = " | ".join(interval(of(found[name], ours) - of(found[name], other)) for name in names)
        lines.append(f"{ours} − {other} | {cells}")
    return table("accuracy lost | " + " | ".join(names), lines)


def stopping_table(found: Groups) -> str:
    shown = (ESTIMATE, *STOPPINGS, NEVER)
    lines = [f"{name} | " + " | ".join(means(runs, rule) for rule in shown) for name, runs in found.items()]
    return table("runs | " + " | ".join(shown), lines)


def sizes_table(found: Groups) -> str:
    lines = []
    for name, runs in found.items():
        low, median, high = runs["size"].quantile([0.1, 0.5, 0.9])
        shares = [runs["size"].between(*limits).mean() for limits in ((0.8, 1.25), (0.5, 2))]
        told = " | ".join(f"{100 * share:.0f} %" for share in shares)
        lines.append(f"{name} | {len(runs)} | {median:.2f} | {low:.2f} to {high:.2f} | {told}")
    return table("runs | number | median | central 80 % | 0.8 to 1.25 | 0.5 to 2", lines)


def worst_table(runs: pd.DataFrame) -> str:
    worst = runs.sort_values(f"{ESTIMATE}: accuracy", ascending=False).head(15)
    lines = []
    for _, run in worst.iterrows():
        what = f"{run['pool']} {run['seed']} | {run['kind']} | {run['best']} of {run['epochs']} | {run['chosen']}"
        paid = " | ".join(f"{run[f'{rule}: accuracy']:.1f}" for rule in (ESTIMATE, WAS, NEVER, TRUE))
        lines.append(f"{what} | {paid} | {run['size']:.2f}")
    header = f"seed | run | best epoch | chosen | {ESTIMATE} | {WAS} | {NEVER} | {TRUE} | estimate over true score"
    return table(header, lines)
