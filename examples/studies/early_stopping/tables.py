"""The tables of the report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from rules import (
    BEFORE,
    COUNTS,
    ESTIMATE,
    HELD_BOTH,
    HELD_BRIER,
    MAIN,
    MORE_COUNTS,
    NEVER,
    PLAIN,
    RAW,
    RAW_REFERENCE,
    REFERENCE,
    TRUE,
    YARDSTICKS,
    Curves,
    alone,
    beside,
    cost,
    lowest,
    rules_of,
)

POOLS = ("random", "as built", "wide", "tables")
Groups = dict[str, pd.DataFrame]
MEMBERS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "all": lambda runs: runs["n"] > 0,
    "noisy labels": lambda runs: runs["is_noisy"],
    "correct labels": lambda runs: ~runs["is_noisy"],
    "something to lose": lambda runs: of(runs, NEVER) > 1,  # by never stopping
    "nothing to lose": lambda runs: of(runs, NEVER) <= 1,
    "large (n ≥ 4,000) or augmented": lambda runs: runs["is_large"],
}
MAIN_GROUPS = (": noisy labels", ": correct labels", ": something to lose")


def judged(c: Curves) -> dict[str, object]:
    """Give a line of results.csv: what a run is, what every rule pays, and how good the estimate is."""
    about, epoch = c.about, lowest(c["val_risk_estimate"])
    line = {name: about[name] for name in ("pool", "seed", "kind", "labels", "n", "weights", "has_batch_norm")}
    line |= {"is_noisy": c.is_noisy, "is_large": about["n"] >= 4000 or about["is_augmented"]}
    line |= {"epochs": len(c["loss"]), "best": int(c["accuracy"].argmax()), "chosen": epoch}
    line |= {"size": c["val_risk_estimate"][epoch] / c["true_score"][epoch]}
    line |= {"reference's weight": float(np.nan_to_num(c["val_risk_reference_weight"]).max())}
    line |= {"reference's weight, permuted labels": about["permuted_weight"]}
    for name in rules_of(c):
        line |= {f"{name}: {yardstick}": value for yardstick, value in cost(c, name).items()}
    return line


def groups(runs: pd.DataFrame) -> Groups:
    """Split the runs, each pool by itself and all four together; those of a few are left out."""
    found = {}
    for pool in (*POOLS, "all pools"):
        members = runs[runs["pool"].isin(POOLS) if pool == "all pools" else runs["pool"] == pool]
        found |= {f"{pool}: {name}": members[is_member(members)] for name, is_member in MEMBERS.items()}
    return {name: members for name, members in found.items() if len(members) >= 5}


# %% Numbers.
def bounds(values: pd.Series) -> tuple[float, float]:
    """Give the 95 % bootstrap interval of a mean, of 2,000 draws of runs with replacement."""
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(values.to_numpy()[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


def interval(values: pd.Series) -> str:
    """Tell a mean with its 95 % bootstrap interval."""
    low, high = bounds(values)
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def of(runs: pd.DataFrame, rule: str, yardstick: str = "accuracy") -> pd.Series:
    return runs[f"{rule}: {yardstick}"]


def means(runs: pd.DataFrame, rule: str) -> str:
    """Tell accuracy lost, regret of the true score, and loss regret."""
    accuracy, true_score, loss = (of(runs, rule, yardstick).mean() for yardstick in YARDSTICKS)
    return f"{accuracy:.2f} / {true_score:.1f} / {loss:.1f}"


def worth(runs: pd.DataFrame, rule: str, kind: str = "noisy") -> float:
    """Give how many labels choose as well by their Brier score: interpolated, by accuracy, from 0 to 400."""
    lost = [of(runs, alone(kind, count)).mean() for count in MORE_COUNTS]
    known = np.minimum.accumulate(lost)[::-1]  # more labels are not worse
    counts = np.log(MORE_COUNTS)[::-1]
    mean = of(runs, rule).mean()
    return 0.0 if mean > known[-1] else float(np.exp(np.interp(mean, known, counts)))


def in_labels(number: float) -> str:
    few, many = MORE_COUNTS[0], MORE_COUNTS[-1]
    return f"under {few}" if number == 0 else f"{many} or more" if number > many - 0.5 else f"{number:.0f}"


def table(header: str, lines: list[str]) -> str:
    return "\n".join([f"| {header} |", "|" + "---|" * (header.count(" | ") + 1), *(f"| {line} |" for line in lines)])


# %% Tables.
def rules_table(runs: pd.DataFrame, rules: tuple[str, ...]) -> str:
    """Tell what each rule pays, and how much more than two others, run by run."""
    lines = []
    for rule in rules:
        lost = of(runs, rule)
        others = " | ".join(f"{of(runs, rule, each).mean():.1f}" for each in ("true_score", "loss"))
        against = " | ".join(interval(lost - of(runs, other)) for other in (BEFORE, NEVER))
        lines.append(f"{rule} | {lost.mean():.2f} | {lost.quantile(0.9):.1f} | {lost.max():.1f} | {others} | {against}")
    header = "rule | accuracy lost | 90 % | worst | regret of the true score, % | loss regret, %"
    return table(f"{header} | against the estimate before | against never stopping", lines)


def groups_table(found: Groups) -> str:
    shown = (NEVER, BEFORE, PLAIN, ESTIMATE, REFERENCE, HELD_BRIER, HELD_BOTH, TRUE)
    lines = []
    for name, runs in found.items():
        lines.append(f"{name} | {len(runs)} | " + " | ".join(means(runs, rule) for rule in shown))
    return table("runs | number | " + " | ".join(shown), lines)


def labels_table(found: Groups, kind: str) -> str:
    names = [name for name in found if name.endswith(": noisy labels" if kind == "noisy" else ": all")]
    lines = []
    for name in names:
        lines.append(f"{name} | none | | {means(found[name], ESTIMATE)} | ")
        for count in COUNTS:
            one, other = alone(kind, count), beside(kind, count)
            cells = " | ".join(means(found[name], rule) for rule in (one, other))
            lines.append(f"{name} | {count} | {cells} | {interval(of(found[name], other) - of(found[name], one))}")
    return table("runs | labels | their Brier score | with the estimate | difference in accuracy lost", lines)


def worth_table(found: Groups) -> str:
    shown = (BEFORE, PLAIN, ESTIMATE, HELD_BRIER, HELD_BOTH)
    lines = []
    for name, runs in found.items():
        if name.endswith(MAIN_GROUPS):
            cells = " | ".join(in_labels(worth(runs, rule)) for rule in shown)
            lines.append(f"{name} | {len(runs)} | {cells}")
    return table("runs | number | " + " | ".join(shown), lines)


def sizes_table(found: Groups) -> str:
    lines = []
    for name, runs in found.items():
        low, median, high = runs["size"].quantile([0.1, 0.5, 0.9])
        shares = [runs["size"].between(*limits).mean() for limits in ((0.8, 1.25), (0.5, 2))]
        told = " | ".join(f"{100 * share:.0f} %" for share in shares)
        lines.append(f"{name} | {len(runs)} | {median:.2f} | {low:.2f} to {high:.2f} | {told}")
    return table("runs | number | median | central 80 % | 0.8 to 1.25 | 0.5 to 2", lines)


def weights_table(found: Groups) -> str:
    """Tell the weight of the reference beside the estimate, and that of one whose labels are permuted."""
    lines = []
    for name, runs in found.items():
        weight, permuted = runs["reference's weight"], runs["reference's weight, permuted labels"]
        told = f"{weight.mean():.2f} | {100 * (weight == 0).mean():.0f} %"
        lines.append(f"{name} | {told} | {permuted.mean():.3f} | {100 * (permuted == 0).mean():.0f} %")
    return table("runs | weight | is 0 in | with permuted labels | is 0 in", lines)


def runs_table(runs: pd.DataFrame) -> str:
    """Tell of each run what was chosen, and what it cost."""
    lines = []
    for _, run in runs.iterrows():
        what = f"{run['pool']} {run['seed']} | {run['kind']} | {run['best']} of {run['epochs']} | {run['chosen']}"
        paid = " | ".join(f"{run[f'{rule}: accuracy']:.1f}" for rule in (ESTIMATE, BEFORE, PLAIN, NEVER, TRUE))
        lines.append(f"{what} | {paid} | {run['size']:.2f}")
    shown = " | ".join((ESTIMATE, BEFORE, PLAIN, NEVER, TRUE))
    return table(f"seed | run | best epoch | chosen | {shown} | estimate over true score", lines)


def worst_table(runs: pd.DataFrame) -> str:
    return runs_table(runs.sort_values(f"{ESTIMATE}: accuracy", ascending=False).head(15))


def finetuning_table(runs: pd.DataFrame) -> str:
    shown = (NEVER, PLAIN, ESTIMATE, REFERENCE, RAW, RAW_REFERENCE, HELD_BRIER, HELD_BOTH, *map(_noisy_alone, COUNTS))
    lines = []
    for name, members in {"noisy labels": runs[runs["is_noisy"]], "correct labels": runs[~runs["is_noisy"]]}.items():
        if len(members):
            for rule in (*shown, TRUE):
                lost = of(members, rule)
                spread = f"{lost.quantile(0.9):.1f} | {lost.max():.1f}"
                difference = interval(lost - of(members, NEVER))
                lines.append(f"{name} ({len(members)}) | {rule} | {means(members, rule)} | {spread} | {difference}")
    return table("runs | rule | lost | 90 % | worst | accuracy lost against never stopping", lines)


def _noisy_alone(count: int) -> str:
    return alone("noisy", count)


def main_rules() -> tuple[str, ...]:
    more = [
        name for kind in ("noisy", "correct") for count in COUNTS for name in (alone(kind, count), beside(kind, count))
    ]
    return (*MAIN, *more)
