"""Can early stopping trust the risk estimate, which needs no labels? On training runs that are drawn at random.

    python examples/studies/early_stopping/study.py --data FOLDER  # the 120 runs of the report, and 26 with wide networks
    python examples/studies/early_stopping/study.py --quick        # two short runs, without FOLDER: does it run

Every run is trained to its end and leaves a CSV file with a row an epoch; runs that have theirs are not trained again.
Then every rule chooses an epoch from what it could see, and pays its *regret*: the test loss there over the lowest of
the run, minus 1, in percent. `FOLDER` holds `cifar10.npz`, `mnist.npz` and `fashion.npz` (`x_train`, images uint8
N × C × H × W, and `y_train`), and `cifar10n.npz` with people's labels of CIFAR-10 (`aggre_label` and `worse_label`, of
http://noisylabels.com).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from rules import ESTIMATE, LABELS, NAMES, NEVER, OTHER_SEED, PATIENCE, RULES, STOPPING, WAS, Curves, as_it_was
from training import train

HERE = Path(__file__).parent
SEEDS, WIDE_SEEDS = range(5120, 5240), range(6000, 6026)  # those of wide networks are 6,000 and above
QUICK = {23: 5, 156: 5}  # epochs by seed: a teacher's labels, and digits
TWENTY = NAMES["right", 20]
GROUPS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "all": lambda runs: runs["n"] > 0,
    "n = 300 and fewer": lambda runs: runs["n"] <= 300,
    **{f"n = {n:,}": lambda runs, n=n: runs["n"] == n for n in (600, 1000, 2000, 4000)},
    "n = 10,000 and more": lambda runs: runs["n"] >= 10_000,
    "large (n ≥ 4,000) or augmented": lambda runs: runs["is_large"],
    "small": lambda runs: ~runs["is_large"],
    "small, clean": lambda runs: ~runs["is_large"] & (runs["labels"] == "right"),
    "wrong labels at random": lambda runs: runs["labels"] == "random",
    "people's labels": lambda runs: runs["labels"] == "people",
    "wrong labels, both": lambda runs: runs["labels"] != "right",
}


WIDE_GROUPS: dict[str, Callable[[pd.DataFrame], pd.Series]] = {
    "wide networks": lambda runs: runs["is_wide"],
    "500,000 weights and more": lambda runs: runs["weights"] >= 500_000,
}


def judged(c: Curves) -> dict[str, object]:
    """Give a line of results.csv: what a run is, what every rule's choice costs, and how good the estimate is."""
    about, losses, epoch = c.about, c["test_loss"], RULES[ESTIMATE](c)[0]
    line = {"seed": about["seed"], "kind": about["kind"], "n": about["n"], "labels": about["labels"]}
    line |= {"weights": about["weights"], "is_wide": about["seed"] >= WIDE_SEEDS[0], "epochs": len(losses)}
    line |= {"is_large": about["n"] >= 4000 or about["is_augmented"], "best": losses.argmin()}
    line |= {"chosen": epoch, "size": c["val_risk_estimate"][epoch] / c["wrong_brier"][epoch]}
    for name, values in {"the gap": c["wrong_loss"] - c["fitted_loss"], "the test loss": losses}.items():
        line[f"sensitivity with {name}"] = spearmanr(c["val_output_sensitivity"], values).statistic
    return line | {name: 100 * (losses[rule(c)].mean() / losses.min() - 1) for name, rule in RULES.items()}


# %% Tables.
def resampled(num_runs: int) -> np.ndarray:
    """Give the runs, and 2,000 draws of as many of them with replacement."""
    drawn = np.random.default_rng(0).integers(num_runs, size=(2000, num_runs))
    return np.vstack([np.arange(num_runs), drawn])


def worth(runs: pd.DataFrame, rule: str, kind: str) -> str:
    """Say how many labels choose as well in the mean, with a 95 % bootstrap interval over runs."""
    counts, draws = LABELS[kind], resampled(len(runs))
    by_count = runs[[NAMES[kind, count] for count in counts]].to_numpy()[draws].mean(1)
    by_count = np.minimum.accumulate(by_count, axis=1)
    found = []
    for mean, means in zip(runs[rule].to_numpy()[draws].mean(1), by_count, strict=True):
        inside = np.exp(np.interp(-mean, -means, np.log(counts)))
        found.append(0 if mean > means[0] else np.inf if mean < means[-1] else inside)
    low, high = np.quantile(found[1:], (0.025, 0.975), method="nearest")
    told = [
        f"< {counts[0]}" if each == 0 else f"> {counts[-1]:,}" if each == np.inf else f"{each:,.0f}"
        for each in (found[0], low, high)
    ]
    return "{} [{}, {}]".format(*told)


def difference(runs: pd.DataFrame, one: str, other: str) -> tuple[float, str]:
    """Give the difference of two rules' means, and tell it with a 95 % bootstrap interval."""
    found = (runs[one] - runs[other]).to_numpy()[resampled(len(runs))].mean(1)
    low, high = np.quantile(found[1:], (0.025, 0.975))
    return found[0], f"{found[0]:+.1f} [{low:+.1f}, {high:+.1f}]"


def table(header: str, lines: list[str]) -> str:
    return "\n".join([f"| {header} |", "|" + "---|" * (header.count(" | ") + 1), *(f"| {line} |" for line in lines)])


def summary(values: pd.Series) -> str:
    return f"{values.median():.1f} | {values.mean():.1f} | {values.quantile(0.9):.1f} | {values.max():.1f}"


def rules_table(runs: pd.DataFrame) -> str:
    lines = []
    for rule in RULES:
        worths = " | " if rule in NAMES.values() else " | ".join(worth(runs, rule, kind) for kind in LABELS)
        lines.append(f"{rule} | {summary(runs[rule])} | {worths}")
    return table("rule | median | mean | 90 % | worst | worth in right labels | in labels as wrong", lines)


def groups_table(groups: dict[str, pd.DataFrame]) -> str:
    lines = []
    for name, runs in groups.items():
        means = " | ".join(f"{runs[rule].mean():.1f}" for rule in (STOPPING, WAS, NEVER, TWENTY))
        worths = " | ".join(worth(runs, ESTIMATE, kind) for kind in LABELS)
        lines.append(f"{name} | {len(runs)} | {summary(runs[ESTIMATE])} | {means} | {worths}")
    header = f"runs | number | median | mean | 90 % | worst | EarlyStopping(patience={PATIENCE}), mean"
    return table(
        f"{header} | as it was, mean | never stop, mean | {TWENTY}, mean | worth in right labels | in labels as wrong",
        lines,
    )


def means_table(groups: dict[str, pd.DataFrame]) -> str:
    lines = [f"{rule} | " + " | ".join(f"{runs[rule].mean():.1f}" for runs in groups.values()) for rule in RULES]
    return table("rule | " + " | ".join(groups), lines)


def sizes_table(groups: dict[str, pd.DataFrame]) -> str:
    lines = []
    for name, runs in groups.items():
        low, median, high = runs["size"].quantile([0.1, 0.5, 0.9])
        share = runs["size"].between(1 / 1.5, 1.5).mean()
        lines.append(f"{name} | {median:.2f} | {low:.2f} to {high:.2f} | {100 * share:.0f} %")
    return table("runs | median | central 80 % | within a factor of 1.5", lines)


def targets_table(groups: dict[str, pd.DataFrame]) -> str:
    """Check what the study had to reach."""
    runs, lines = groups["all"], []  # without those of wide networks

    def check(target: str, value: float, bound: float, told: str) -> None:
        lines.append(f"{target} | {told} | {'met' if value <= bound else '**missed**'}")

    def against(name: str, what: str, other: str, margin: float) -> None:
        if name in groups:
            own, others = (groups[name][rule].mean() for rule in (ESTIMATE, other))
            told = difference(groups[name], ESTIMATE, other)[1]
            check(f"{name}: {what}", own - others, margin, f"{own:.1f} against {others:.1f} ({told})")

    against("all", f"mean at most that of {TWENTY}", TWENTY, 0)
    high, worst = runs[ESTIMATE].quantile(0.9), runs[ESTIMATE].max()
    check("all: 90 % at most 13", high, 13, f"{high:.1f}")
    check("all: worst at most 70", worst, 70, f"{worst:.1f}")
    against("large (n ≥ 4,000) or augmented", "mean at most 2 points over never stopping", NEVER, 2)
    against("wrong labels, both", f"mean at most that of {TWENTY}", TWENTY, 0)
    against("wide networks", f"mean at most that of {TWENTY}", TWENTY, 0)
    by_seed, told = difference(runs, ESTIMATE, OTHER_SEED)
    check("all: two seeds of the twins differ by at most 0.5 points in the mean", abs(by_seed), 0.5, told)
    return table("target, regret in percent | reached | ", lines)


def report(curves: list[Curves], runs: pd.DataFrame) -> str:
    groups = {name: runs[member(runs) & ~runs["is_wide"]] for name, member in GROUPS.items()}
    groups |= {name: runs[member(runs)] for name, member in WIDE_GROUPS.items()}
    groups = {name: members for name, members in groups.items() if len(members)}
    left_out = ", ".join(str(c.about["seed"]) for c in curves if not c.counts) or "none"
    seeds = [c.about["seed"] for c in curves]
    parts = [
        "# Every table of the study",
        f"{len(curves)} runs were drawn, with seeds from {min(seeds)} to {max(seeds)}. Those from {WIDE_SEEDS[0]} on"
        f" have wide networks, and count in their own rows. {len(curves) - len(runs)} learned nothing or diverged, and"
        f" are left out (seeds: {left_out}). Regret in percent.",
        f"## Targets\n\n{targets_table(groups)}\n\nIn brackets: difference of the means, 95 % bootstrap interval.",
        f"## Rules, {len(groups['all'])} runs\n\n{rules_table(groups['all'])}",
        f"## The estimate by group\n\n{groups_table(groups)}",
        f"## Mean regret of every rule by group\n\n{means_table(groups)}",
        "## Size\n\nThe estimate over the true Brier score, of labels as wrong as in training, at the chosen epoch:\n\n"
        + sizes_table(groups),
        "## Sensitivity\n\nSpearman correlation over the epochs of a run, median run (lowest to highest). The gap is"
        " the test loss minus the training loss, both of labels as wrong as in training.",
    ]
    followed = runs[[name for name in runs if name.startswith("sensitivity with")]]
    parts.append(
        "\n".join(f"- {what}: {v.median():.2f} ({v.min():.2f} to {v.max():.2f})" for what, v in followed.items())
    )
    worst = runs.nlargest(12, ESTIMATE)
    lines = [
        f"{r.seed} | {r.kind} | {r.best} of {r.epochs} | {r.chosen} | {r[ESTIMATE]:.1f} | {r[WAS]:.1f} | {r[NEVER]:.1f}"
        for _, r in worst.iterrows()
    ]
    header = "seed | run | best epoch | chosen | the estimate | as it was | never stop"
    return "\n\n".join([*parts, f"## The worst runs\n\n{table(header, lines)}\n"])


def figure(curves: list[Curves], runs: pd.DataFrame, file: Path) -> None:
    """Draw the regret by the number of samples, and the curves of two runs: of median regret, and the worst."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
    runs = runs[~runs["is_wide"]]
    groups = {name: runs[GROUPS[name](runs)] for name in GROUPS if name.startswith("n = ")}
    groups = {
        name.removeprefix("n = ").replace(" and ", "\nand "): members
        for name, members in groups.items()
        if len(members)
    }
    shown = {NEVER: "0.6", WAS: "C0", TWENTY: "black", ESTIMATE: "C3"}
    for rule, color in shown.items():
        means = [members[rule].mean() for members in groups.values()]
        axes[0].plot(list(groups), means, "o-", color=color, lw=2.5 if rule == ESTIMATE else 1.5, label=rule)
    axes[0].set_yscale("symlog", linthresh=10)
    ticks = [0, 2, 5, 10, 20, 50, 100, 200, 500]
    axes[0].set_yticks(ticks, map(str, ticks), minor=False)
    axes[0].set(xlabel="training samples", ylabel="mean regret, %", title="Regret by the number of samples")
    axes[0].set_ylim(0, max(12, 1.2 * max(line.get_ydata().max() for line in axes[0].lines)))
    axes[0].legend(fontsize=8)
    ordered = runs.sort_values(ESTIMATE)
    by_seed = {c.about["seed"]: c for c in curves}
    for axis, which, line in zip(axes[1:], ("median", "worst"), (len(ordered) // 2, -1), strict=True):
        chosen = ordered.iloc[line]
        c = by_seed[chosen["seed"]]
        axis.plot(c["wrong_brier"], color="black", lw=2.5, label="true score, of labels as wrong as in training")
        axis.plot(c["val_risk_estimate"], color="C3", lw=2.5, label="val_risk_estimate (needs no labels)")
        axis.plot(as_it_was(c), color="C0", lw=1, ls="--", label="the rule as it was")
        for term, color in {"claim": "C4", "overconfidence": "C1", "variance": "C2"}.items():
            axis.plot(c[f"val_risk_{term}"], color=color, lw=1, label=f"val_risk_{term}")
        axis.axvline(chosen["chosen"], color="C3", ls=":", label="minimum of the estimate")
        axis.axvline(chosen["best"], color="black", ls=":", label="lowest test loss")
        low = min(0, np.nanmin(c["val_risk_overconfidence"]))
        axis.set(ylim=(1.1 * low, 1.4 * c["wrong_brier"].max()), xlabel="epoch", ylabel="Brier score")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_title(f"The run of {which} regret ({chosen[ESTIMATE]:.1f} %)\n{chosen['kind']}", fontsize=9)
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(file, dpi=80)


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description="Regret of early stopping on the risk estimate, on random runs.")
    parser.add_argument("--data", type=Path, help="folder with the data sets; --quick needs none")
    parser.add_argument("--seeds", type=int, nargs=2, metavar=("FIRST", "LAST"), help="others than the report's")
    parser.add_argument("--runs", type=Path, help="folder of the runs [runs/early_stopping, or ..._quick]")
    parser.add_argument("--out", type=Path, help="folder of the report [beside this file; --quick: that of the runs]")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--quick", action="store_true", help="two short runs: does it run, not what it finds")
    args = parser.parse_args()
    folder = args.runs or Path(f"runs/early_stopping{'_quick' * args.quick}")
    out = args.out or (folder if args.quick else HERE)
    folder.mkdir(parents=True, exist_ok=True)
    seeds = range(*args.seeds) if args.seeds else [*SEEDS, *WIDE_SEEDS]
    epochs = QUICK if args.quick else dict.fromkeys(seeds)
    files = {seed: folder / f"{seed}.csv" for seed in epochs}
    missing = [seed for seed, file in files.items() if not file.exists()]
    if args.quick:
        for seed in tqdm(missing, "runs"):
            train(seed, args.data, files[seed], epochs=epochs[seed])
    elif missing:
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            todo = [pool.submit(train, seed, args.data, files[seed], seed >= WIDE_SEEDS[0]) for seed in missing]
            for job in tqdm(as_completed(todo), "runs", len(files), initial=len(files) - len(missing)):
                job.result()
    curves = [Curves(pd.read_csv(file)) for file in files.values()]
    if not any(c.counts for c in curves):
        sys.exit("No run learned anything.")
    runs = pd.DataFrame([judged(c) for c in curves if c.counts])
    text = report(curves, runs)
    (out / "report.md").write_text(text)
    runs.to_csv(out / "results.csv", index=False, float_format="%.4g")
    figure(curves, runs, out / "figure.png")
    print(f"{text}\nIn {out}: report.md, results.csv, figure.png.")


if __name__ == "__main__":
    main()
