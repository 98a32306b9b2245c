"""The tables of the report."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
from label_noise import shares_by_cleanlab
from rules import (
    COUNTS,
    CRITERION,
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
    Curves,
    alone,
    beside,
    cost,
    lowest,
    rules_of,
)

POOLS = ("random", "as built", "tables", "fine-tuning")
HALVES = {"agree": "the reference agrees", "disagree": "it disagrees", "no reference": "no reference"}
SAID = {"wrong": "labels look wrong", "no noise": "no noise found", "nothing": "cannot tell"}
TOLD = ("agrees", "may be the better model", "disagrees", "no reference", "still falling", "nothing")  # of the epoch
Groups = dict[str, pd.DataFrame]
MEMBERS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "all": lambda runs: runs["n"] > 0,
    "noisy labels": lambda runs: runs["is_noisy"],
    "correct labels": lambda runs: ~runs["is_noisy"],
    "something to lose": lambda runs: of(runs, NEVER) > 1,  # by never stopping
    **{f"noisy labels, {told}": lambda runs, of=half: runs["is_noisy"] & (runs["halves"] == of)
       for half, told in HALVES.items()},
    **{f"correct labels, {told}": lambda runs, of=half: ~runs["is_noisy"] & (runs["halves"] == of)
       for half, told in HALVES.items()},
    **{f"noisy labels, {told}": lambda runs, of=said: runs["is_noisy"] & (runs["said of labels"] == of)
       for said, told in SAID.items()},
    **{f"correct labels, {told}": lambda runs, of=said: ~runs["is_noisy"] & (runs["said of labels"] == of)
       for said, told in SAID.items()},
    **{f"noisy labels, told: {said}": lambda runs, of=said: runs["is_noisy"] & (runs["said of epoch"] == of)
       for said in TOLD},
    **{f"correct labels, told: {said}": lambda runs, of=said: ~runs["is_noisy"] & (runs["said of epoch"] == of)
       for said in TOLD},
    "noisy labels, under 400 samples": lambda runs: runs["is_noisy"] & (runs["n"] < 400),
    "noisy labels, by class": lambda runs: runs["labels"] == "by class",
    "noisy labels, people": lambda runs: runs["labels"] == "people",
    "all weights": lambda runs: (runs["pool"] == "fine-tuning") & ~runs["has_frozen_body"],
    "head alone": lambda runs: (runs["pool"] == "fine-tuning") & runs["has_frozen_body"],
}  # fmt: skip
FEWEST = 5  # runs of a group


def judged(c: Curves) -> dict[str, object]:
    """Give a line of results.csv: what a run is, what every rule pays, and what is said of it."""
    about = c.about
    names = ("pool", "seed", "kind", "labels", "n", "num_classes", "weights", "has_batch_norm", "has_frozen_body")
    line = {name: about[name] for name in names}
    line |= {"share wrong": about["share_wrong"], "is_noisy": c.is_noisy, "epochs": len(c["loss"])}
    line |= {"best": int(c["accuracy"].argmax()), "chosen": lowest(c["val_risk_criterion"])}
    epoch = lowest(c["val_risk_estimate"])
    line |= {"size": c["val_risk_estimate"][epoch] / c["true_score"][epoch]}
    line |= {
        "halves": c.halves,
        "said of epoch": c.said_of_epoch,
        "said of labels": c.said_of_labels,
        "label noise": c.label_noise,
    }
    line |= {f"noise by {name}": value for name, value in noise_by_others(c).items()}
    for name in rules_of(c):
        line |= {f"{name}: {yardstick}": value for yardstick, value in cost(c, name).items()}
    return line


def noise_by_others(c: Curves) -> dict[str, float]:
    """Give the shares of wrong labels by cleanlab, on predictions of the reference and of networks."""
    found = {}
    if "loo" in c.found:
        labels, p = c["kept_labels"], c["loo"]
        p = np.concatenate([1 - p, p], 1) if p.shape[1] == 1 else p
        shares = shares_by_cleanlab(labels, p)
        found |= {f"cleanlab, {way}, reference": share for way, share in shares.items()}
        found["leave-one-out error"] = float((p.argmax(1) != labels).mean())
    file = c.folder / "folds.npz"
    if file.exists():
        found["the monitor, where networks were trained for cleanlab"] = c.label_noise
        with np.load(file) as folds:
            for epoch in ("last", "best"):
                shares = shares_by_cleanlab(folds["labels"], folds[epoch])
                found |= {f"cleanlab, {way}, network's {epoch} epoch": share for way, share in shares.items()}
    return found


def groups(runs: pd.DataFrame) -> Groups:
    """Split the runs, each pool by itself and all four together, beside the larger ones, without groups of a few."""
    found = {}
    for pool in (*POOLS, "all pools", "larger"):
        members = runs[runs["pool"].isin(POOLS) if pool == "all pools" else runs["pool"] == pool]
        found |= {f"{pool}: {name}": members[is_member(members)] for name, is_member in MEMBERS.items()}
    return {name: members for name, members in found.items() if len(members) >= FEWEST}


# %% Numbers.
def bounds(values: pd.Series) -> tuple[float, float]:
    """Give the 95 % bootstrap interval of a mean, of 2,000 draws of runs with replacement."""
    values = values.dropna()
    if values.empty:
        return float("nan"), float("nan")
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
    """Tell accuracy lost, its median, and loss regret."""
    lost = of(runs, rule)
    return f"{lost.mean():.2f} / {lost.median():.2f} / {of(runs, rule, 'loss').mean():.1f}"


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
        against = " | ".join(interval(lost - of(runs, other)) for other in (NEVER, HELD_BRIER))
        spread = f"{lost.mean():.2f} | {lost.median():.2f} | {lost.quantile(0.9):.1f} | {lost.max():.1f}"
        lines.append(f"{rule} | {spread} | {others} | {against}")
    header = "rule | accuracy lost | median | 90 % | worst | regret of the true score, % | loss regret, %"
    return table(f"{header} | against never stopping | against 10 % held out", lines)


def groups_table(found: Groups) -> str:
    shown = (NEVER, CRITERION, ESTIMATE, PLAIN, REFERENCE, HELD_BRIER, HELD_BOTH, TRUE)
    lines = []
    for name, runs in found.items():
        lines.append(f"{name} | {len(runs)} | " + " | ".join(means(runs, rule) for rule in shown))
    return table("runs | number | " + " | ".join(shown), lines)


def labels_table(found: Groups, kind: str) -> str:
    asked = "noisy labels" if kind == "noisy" else "all"
    names = [name for name in found if name.split(": ")[1].startswith(asked) and ", told: " not in name]
    lines = []
    for name in names:
        lines.append(f"{name} | none | | {means(found[name], CRITERION)} | ")
        for count in COUNTS:
            one, other = alone(kind, count), beside(kind, count)
            cells = " | ".join(means(found[name], rule) for rule in (one, other))
            lines.append(f"{name} | {count} | {cells} | {interval(of(found[name], other) - of(found[name], one))}")
    return table("runs | labels | their Brier score | with the criterion | difference in accuracy lost", lines)


def worth_table(found: Groups) -> str:
    shown = (CRITERION, ESTIMATE, PLAIN, HELD_BRIER, HELD_BOTH)
    lines = []
    for name, runs in found.items():
        if name.endswith((": noisy labels", ": something to lose")):
            cells = " | ".join(in_labels(worth(runs, rule)) for rule in shown)
            lines.append(f"{name} | {len(runs)} | {cells}")
    return table("runs | number | " + " | ".join(shown), lines)


def sizes_table(found: Groups) -> str:
    lines = []
    for name, runs in found.items():
        if name.endswith((": all", ": noisy labels", ": correct labels")):
            low, median, high = runs["size"].quantile([0.1, 0.5, 0.9])
            shares = [runs["size"].between(*limits).mean() for limits in ((0.8, 1.25), (0.5, 2))]
            told = " | ".join(f"{100 * share:.0f} %" for share in shares)
            lines.append(f"{name} | {len(runs)} | {median:.2f} | {low:.2f} to {high:.2f} | {told}")
    return table("runs | number | median | central 80 % | 0.8 to 1.25 | 0.5 to 2", lines)


def closing_table(found: Groups) -> str:
    """Tell what runs lose by what the last line says of the halves and of the labels."""
    lines = []
    for name, runs in found.items():
        if name.endswith((*HALVES.values(), *SAID.values())) or ", told: " in name:
            paid = " | ".join(f"{of(runs, rule).mean():.2f}" for rule in (CRITERION, ESTIMATE, NEVER, HELD_BRIER, TRUE))
            lost = of(runs, CRITERION)
            lines.append(f"{name} | {len(runs)} | {paid} | {lost.quantile(0.9):.1f} | {lost.max():.1f}")
    shown = " | ".join((CRITERION, ESTIMATE, NEVER, HELD_BRIER, TRUE))
    return table(f"runs | number | {shown} | {CRITERION}, 90 % | worst", lines)


def runs_table(runs: pd.DataFrame) -> str:
    """Tell of each run what was chosen, and what it cost."""
    shown = (CRITERION, ESTIMATE, PLAIN, NEVER, HELD_BRIER, TRUE)
    lines = []
    for _, run in runs.iterrows():
        what = f"{run['pool']} {run['seed']} | {run['kind']} | {run['best']} of {run['epochs']} | {run['chosen']}"
        paid = " | ".join(f"{run[f'{rule}: accuracy']:.1f}" for rule in shown)
        lines.append(f"{what} | {paid} | {run['halves']} | {run['said of labels']} | {run['label noise']:.2f}")
    header = "seed | run | best epoch | chosen | " + " | ".join(shown)
    return table(f"{header} | halves | labels | share wrong, found", lines)


def worst_table(runs: pd.DataFrame) -> str:
    return runs_table(runs.sort_values(f"{CRITERION}: accuracy", ascending=False).head(15))


def finetuning_table(found: Groups) -> str:
    labels = [alone("noisy", count) for count in COUNTS]
    shown = (NEVER, CRITERION, RAW, ESTIMATE, PLAIN, REFERENCE, RAW_REFERENCE, HELD_BRIER, HELD_BOTH, *labels, TRUE)
    lines = []
    for name in ("all", "noisy labels", "correct labels", "all weights", "head alone"):
        runs = found.get(f"fine-tuning: {name}")
        for rule in () if runs is None else shown:
            lost = of(runs, rule)
            spread = f"{lost.quantile(0.9):.1f} | {lost.max():.1f}"
            difference = " | ".join(interval(lost - of(runs, other)) for other in (NEVER, RAW))
            lines.append(f"{name} ({len(runs)}) | {rule} | {means(runs, rule)} | {spread} | {difference}")
    return table("runs | rule | lost | 90 % | worst | against never stopping | against none of `features=`", lines)


def main_rules() -> tuple[str, ...]:
    more = [
        name for kind in ("noisy", "correct") for count in COUNTS for name in (alone(kind, count), beside(kind, count))
    ]
    return (*MAIN, *more)


# %% The share of wrong labels.
OURS = "the monitor"


def noise_table(runs: pd.DataFrame) -> str:
    """Compare shares of wrong labels: AUC for any against none, errors, and right labels that are called wrong."""
    names = {OURS: "label noise"} | {n.removeprefix("noise by "): n for n in runs if str(n).startswith("noise by ")}
    lines = []
    for name, column in names.items():
        known = runs[runs[column].notna()]
        told = noise_numbers(known, column)
        if told:
            errors = " | ".join(f"{told[each]:.1f}" for each in ("error", "error_noisy", "found_in_correct"))
            lines.append(f"{name} | {len(known)} | {told['auc']:.3f} | {errors}")
    return table(
        "by | runs | AUC | mean error of the share, points | with noisy labels | share found where all are right", lines
    )


def noise_numbers(runs: pd.DataFrame, column: str) -> dict[str, float]:
    """Give how well a share of wrong labels is found, in points; nothing without both kinds of runs."""
    noisy, correct = runs[runs["is_noisy"]], runs[~runs["is_noisy"]]
    if noisy.empty or correct.empty:
        return {}
    above = noisy[column].to_numpy()[:, None] - correct[column].to_numpy()
    errors = 100 * (runs[column] - runs["share wrong"]).abs()
    return {
        "runs": len(runs),
        "auc": float((above > 0).mean() + 0.5 * (above == 0).mean()),
        "error": float(errors.mean()),
        "error_noisy": float(errors[runs["is_noisy"]].mean()),
        "found_in_correct": 100 * float(correct[column].mean()),
    }
