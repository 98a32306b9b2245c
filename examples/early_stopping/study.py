"""Can early stopping trust the risk estimate, which needs no labels? Real training runs, never stopped.

    python examples/early_stopping/study.py --data FOLDER         # the 40 fresh runs, about 45 minutes on two cores
    python examples/early_stopping/study.py --data FOLDER --more  # also the other pools, and twins trained beside
    python examples/early_stopping/study.py --quick               # two short runs on digits: does it run

Every run has `SensitivityMonitor()` and `RiskMonitor()` at their defaults in its Trainer, and ends in a CSV file with a
row an epoch; runs that have theirs are not trained again. Then every rule chooses an epoch from what it could see, and
pays its *regret*: the test loss there over the best of the run, minus 1. `FOLDER` holds `cifar10.npz`, `mnist.npz` and
`fashion.npz` (`x_train, y_train, x_test, y_test`; images uint8, N × C × H × W), and `cifar10n.npz` with people's labels
of CIFAR-10 (`aggre_label` and `worse_label`, of http://noisylabels.com).
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from runs import LABELLED, POOLS, QUICK, Run, train

HERE = Path(__file__).parent
PATIENCE = 10
VARIANTS = ("real", "bootstrap", "held_out")  # trained beside the first NUM_TWINS fresh runs
NUM_TWINS = 20


class Curves(NamedTuple):
    """What a run left: a row an epoch, predictions on the holdout set, and the same of its twins."""

    run: Run
    rows: pd.DataFrame
    twins: dict[str, pd.DataFrame]
    variances: dict[str, np.ndarray]  # E|p - p'|² with each twin
    claim: np.ndarray

    def __getitem__(self, name: str) -> np.ndarray:
        return self.rows[name].to_numpy()


def read(folder: Path, run: Run) -> Curves:
    p = np.load(folder / f"{run.name}.npy").astype(np.float32)
    twins, variances = {}, {}
    for variant in VARIANTS:
        file = folder / f"{run.name}-{variant}.csv"
        if file.exists():
            twins[variant] = pd.read_csv(file)
            if variant != "held_out":
                other = np.load(file.with_suffix(".npy")).astype(np.float32)
                variances[variant] = np.square(p - other).sum(2).mean(1)
    return Curves(run, pd.read_csv(folder / f"{run.name}.csv"), twins, variances, 1 - np.square(p).sum(2).mean(1))


# %% Rules: each gives the epochs that it chooses in a run, several if it depends on which samples are labelled.
def lowest(values: np.ndarray) -> int:
    return int(np.nanargmin(values))


def patient(values: np.ndarray) -> int:
    """The checkpoint that is left when `EarlyStopping(patience=PATIENCE)` ends a run."""
    best = 0
    for epoch, value in enumerate(values):
        if value < values[best]:
            best = epoch
        elif epoch - best >= PATIENCE:
            break
    return best


def first(where: np.ndarray, number: int = 1) -> int:
    """The `number`-th epoch where this holds, or the last."""
    found = np.flatnonzero(where)
    return int(found[number - 1]) if len(found) >= number else len(where) - 1


def label_wave(c: Curves) -> int:
    """Yuan et al., ICLR 2025: the first local minimum of the prediction changes, averaged over three epochs."""
    smooth = np.convolve(c["changed"][1:], np.ones(3) / 3, "valid")  # smooth[i] belongs to epoch i + 3
    return first(np.diff(smooth) > 0) + 3 if (np.diff(smooth) > 0).any() else len(c.rows) - 1


def every_second(values: np.ndarray) -> int:
    return 1 + 2 * lowest(values[1::2])


def labelled(c: Curves, size: int) -> list[int]:
    size = max(s for s in LABELLED if s <= size and f"labelled_{s}_0" in c.rows)  # tables have no 200 samples
    return [lowest(c[name]) for name in c.rows if name.startswith(f"labelled_{size}_")]


def with_twin(c: Curves, variant: str, times: int) -> list[int]:
    """The estimate with a trained twin in place of a simulated one; the identity that it rests on is exact then."""
    return [lowest(c["train_brier"] + c.claim - c["train_claim"] + times * c.variances[variant])]


Rule = Callable[[Curves], list[int]]
ESTIMATE, STOPPING = "**val_risk_estimate, minimum**", f"**val_risk_estimate, EarlyStopping({PATIENCE})**"
RULES: dict[str, Rule] = {
    "never stop": lambda c: [len(c.rows) - 1],
    "lowest training loss": lambda c: [lowest(c["train_loss"])],
    "lowest val_sensitivity": lambda c: [lowest(c["val_sensitivity"])],
    "training loss + Equation 9": lambda c: [lowest(c["train_loss"] + c["val_loss_estimate"])],
    "Label Wave": lambda c: [label_wave(c)],
    "evidence of gradients": lambda c: [first(c["evidence"] > 0)],
    "gradient disparity, fifth rise": lambda c: [first(np.diff(c["disparity"], prepend=np.inf) > 0, 5)],
    ESTIMATE: lambda c: [lowest(c["val_risk_estimate"])],
    STOPPING: lambda c: [patient(c["val_risk_estimate"])],
    **{f"{size} labels": lambda c, size=size: labelled(c, size) for size in LABELLED},
    "1,000 labels as wrong as training's": lambda c: [lowest(c["noisy_brier"])],
}
TRAINED: dict[str, Rule] = {
    "a fifth held out, trained again": lambda c: [lowest(c.twins["held_out"]["holdout_loss"].to_numpy())],
    "bootstrap twin: B + G + 2V": lambda c: with_twin(c, "bootstrap", 2),
    "real twin: B + G + V": lambda c: with_twin(c, "real", 1),
}
BUDGETS: dict[str, Rule] = {
    "default (1,200 samples)": RULES[ESTIMATE],
    "600 samples": lambda c: [lowest(c["n600_risk_estimate"])],
    "300 samples": lambda c: [lowest(c["n300_risk_estimate"])],
    "every second epoch": lambda c: [every_second(c["val_risk_estimate"])],
    "every second epoch, 300 samples": lambda c: [every_second(c["n300_risk_estimate"])],
    "every second epoch, in hindsight": lambda c: [every_second(c["test_loss"])],
}


# %% What the choices cost.
def losses(c: Curves, rule: Rule) -> np.ndarray:
    """Mean over a rule's choices: epoch, regret of the loss in percent, regret of the error in points."""
    chosen, loss, error = rule(c), c["test_loss"], c["test_error"]
    found = [(e, 100 * (loss[e] / loss.min() - 1), 100 * (error[e] - error.min())) for e in chosen]
    return np.mean(found, axis=0)


def regrets(runs: list[Curves], rule: Rule) -> np.ndarray:
    return np.array([losses(c, rule)[1] for c in runs])


def summary(values: np.ndarray) -> str:
    return f"{np.median(values):.1f} | {values.mean():.1f} | {np.quantile(values, 0.9):.1f} | {values.max():.1f}"


def worth(runs: list[Curves], values: np.ndarray) -> str:
    """In labels: where the mean regret of choices by labels is the same, with a 95 % bootstrap interval over runs."""
    by_labels = np.array([regrets(runs, RULES[f"{size} labels"]) for size in LABELLED])

    def at(index: np.ndarray) -> float:
        means = np.minimum.accumulate(by_labels[:, index].mean(1))
        return float(np.exp(np.interp(-values[index].mean(), -means, np.log(LABELLED))))

    def told(size: float) -> str:
        return "< 20" if size < LABELLED[0] + 0.5 else "> 500" if size > 499 else f"{size:.0f}"

    everything, rng = np.arange(len(runs)), np.random.default_rng(0)
    drawn = [at(rng.integers(0, len(runs), len(runs))) for _ in range(1000)]
    return f"{told(at(everything))} [{told(np.quantile(drawn, 0.025))}, {told(np.quantile(drawn, 0.975))}]"


def table(header: str, rows: list[str]) -> list[str]:
    return ["", f"| {header} |", "|" + "---|" * (header.count("|") + 1), *(f"| {row} |" for row in rows), ""]


def compared(runs: list[Curves], rules: dict[str, Rule]) -> list[str]:
    rows = []
    for name, rule in rules.items():
        found = np.array([losses(c, rule) for c in runs])
        labels = "" if name.endswith("labels") else worth(runs, found[:, 1])
        rows.append(f"{name} | {summary(found[:, 1])} | {found[:, 2].mean():.1f} | {labels}")
    fixed = min(range(min(len(c.rows) for c in runs)), key=lambda e: regrets(runs, lambda c: [e]).mean())
    found = np.array([losses(c, lambda c: [fixed]) for c in runs])
    rows.append(
        f"best fixed epoch in hindsight ({fixed}) | {summary(found[:, 1])} | {found[:, 2].mean():.1f} |"
        f" {worth(runs, found[:, 1])}"
    )
    return table("rule | median | mean | 90 % | worst | error, points | worth in labels", rows)


def chance(c: Curves) -> float:
    return 0.5 if c.run.data == "cancer" else 2 / 3 if c.run.data == "diabetes" else 0.9


def claimed(c: Curves) -> float:
    """The claim where the estimate is lowest, over the risk of chance."""
    return float(c["val_risk_claim"][lowest(c["val_risk_estimate"])] / chance(c))


def size(c: Curves) -> float:
    """The estimate where it is lowest, over the true score there, of labels as wrong as training's."""
    epoch = lowest(c["val_risk_estimate"])
    return float(c["val_risk_estimate"][epoch] / c["noisy_brier"][epoch])


def sizes(runs: list[Curves]) -> str:
    return "{1:.2f} [{0:.2f}, {2:.2f}]".format(*np.quantile([size(c) for c in runs], (0.1, 0.5, 0.9)))


GROUPS: dict[str, Callable[[Curves], bool]] = {
    "all": lambda c: True,
    **{kind: lambda c, kind=kind: c.run.kind == kind for kind in dict.fromkeys(run.kind for run in POOLS["fresh"])},
    "labels right": lambda c: c.run.noise == 0.0,
    "labels wrong": lambda c: c.run.noise != 0.0,
    "claim at least 1/4 of chance": lambda c: claimed(c) >= 0.25,
    "claim below 1/4 of chance": lambda c: claimed(c) < 0.25,
}


def by_kind(runs: list[Curves]) -> list[str]:
    groups = {name: [c for c in runs if member(c)] for name, member in GROUPS.items()}
    groups = {name: members for name, members in groups.items() if members}
    rows = []
    for name, members in groups.items():
        values = regrets(members, RULES[ESTIMATE])
        means = " | ".join(f"{regrets(members, RULES[rule]).mean():.1f}" for rule in (STOPPING, "never stop"))
        rows.append(
            f"{name} | {len(members)} | {summary(values)} | {means} | {worth(members, values)} | {sizes(members)}"
        )
    header = "runs | number | median | mean | 90 % | worst | EarlyStopping, mean | never stop, mean | worth in labels |"
    lines = table(f"{header} estimate / true score", rows)
    rows = [
        f"{name} | " + " | ".join(f"{regrets(members, rule).mean():.1f}" for members in groups.values())
        for name, rule in RULES.items()
    ]
    return [*lines, "Mean regret:", *table("rule | " + " | ".join(groups), rows)]


def by_draw(runs: list[Curves], *prefixes: str) -> np.ndarray:
    """Regrets of the runs, a row for each monitor's draw of its twins."""
    return np.array([regrets(runs, lambda c, p=p: [lowest(c[f"{p}risk_estimate"])]) for p in prefixes])


def spread(found: np.ndarray) -> float:
    """Standard deviation of the mean regret over draws, from the scatter within runs."""
    return float(np.sqrt(found.var(axis=0, ddof=1).sum()) / found.shape[1])


def draws(runs: list[Curves]) -> str:
    found = by_draw(runs, "val_", "seed1_", "seed2_")
    means = ", ".join(f"{values.mean():.2f}" for values in found)
    return (
        f"Draws of the twins: three monitors with other seeds, in {len(runs)} runs, have mean regrets of {means}; from"
        f" the scatter within runs, the standard deviation of the mean regret is {spread(found):.2f} points."
    )


def more_twins(runs: list[Curves]) -> str:
    few, many = by_draw(runs, "val_", "seed1_"), by_draw(runs, "many0_", "many1_")
    told = [
        f"{name} twins {values[0].mean():.1f} and {values[1].mean():.1f}"
        f" (standard deviation over draws {spread(values):.2f})"
        for name, values in (("10", few), ("30", many))
    ]
    difference = many.mean(0) - few.mean(0)
    rng = np.random.default_rng(0)
    resampled = [difference[rng.integers(len(runs), size=len(runs))].mean() for _ in range(4000)]
    low, high = np.quantile(resampled, (0.025, 0.975))
    return (
        f"Mean regret with two seeds of the twins, in {len(runs)} runs: {', '.join(told)}. 30 instead of 10 twins"
        f" change it by {difference.mean():.2f} points [{low:.2f}, {high:.2f}]."
    )


FOLLOWED: list[tuple[str, Callable[[Curves], np.ndarray]]] = [
    ("test loss minus training loss", lambda c: c["test_loss"] - c["train_loss"]),
    ("test loss", lambda c: c["test_loss"]),
]


def report(runs: list[Curves], title: str) -> str:
    within = np.mean([1 / 1.5 <= size(c) <= 1.5 for c in runs])
    lines = [f"## {title}: {len(runs)} runs", *compared(runs, RULES), "By kind, the minimum of the estimate:"]
    lines += by_kind(runs)
    lines += [f"Within a factor of 1.5 of the true score at the minimum: {within:.0%} of the runs.", ""]
    found = {
        what: [pd.Series(c["val_sensitivity"]).corr(pd.Series(of(c)), "spearman") for c in runs]
        for what, of in FOLLOWED
    }
    lines += ["Sensitivity over epochs, Spearman correlation in the median run (lowest to highest): with the"]
    lines += [
        f"- {what} {np.median(values):.2f} ({min(values):.2f} to {max(values):.2f})" for what, values in found.items()
    ]
    lines += [""]
    if with_others := [c for c in runs if "n300_risk_estimate" in c.rows]:
        lines += [draws(with_others), "", f"Budgets, in {len(with_others)} runs:"]
        lines += [*compared(with_others, BUDGETS)[:-2], ""]
    if with_many := [c for c in runs if "many0_risk_estimate" in c.rows]:
        lines += [more_twins(with_many), ""]
    twins = [c for c in runs if len(c.twins) == len(VARIANTS)]
    if twins:
        lines += [f"Trained beside, in {len(twins)} of the runs:", *compared(twins, RULES | TRAINED)]
    return "\n".join(lines)


def listed(runs: list[Curves]) -> str:
    rows = []
    for c in sorted(runs, key=lambda c: (c.run.kind, c.run.seed)):
        epoch, regret, _ = losses(c, RULES[ESTIMATE])
        (stopped, stopping, _), never = losses(c, RULES[STOPPING]), losses(c, RULES["never stop"])[1]
        best = lowest(c["test_loss"])
        chosen = f"{epoch:.0f} | {regret:.1f} | {stopped:.0f} | {stopping:.1f}"
        rows.append(f"{c.run.kind} | {c.run.name} | {best} | {chosen} | {never:.1f} | {claimed(c):.2f} | {size(c):.2f}")
    header = "kind | run | best | minimum | regret | EarlyStopping | regret | never stop | claim / chance"
    return "\n".join(["## Every run", *table(f"{header} | estimate / true score", rows)])


def figure(runs: list[Curves], file: Path) -> None:
    """The estimate, its terms and the truth: the run of median regret, and the worst."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    ordered = sorted(runs, key=lambda c: losses(c, RULES[ESTIMATE])[1])
    shown = {"the median": ordered[len(ordered) // 2], "the worst": ordered[-1]}
    fig, axes = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    for axis, (which, c) in zip(axes, shown.items(), strict=True):
        axis.plot(c["noisy_brier"], color="black", lw=2.5, label="true score, of labels as wrong as in training")
        axis.plot(c["val_risk_estimate"], color="C3", lw=2.5, label="val_risk_estimate (needs no labels)")
        for term, color in {"claim": "C0", "overconfidence": "C1", "variance": "C2"}.items():
            axis.plot(c[f"val_risk_{term}"], color=color, label=f"val_risk_{term}")
        axis.axvline(lowest(c["val_risk_estimate"]), color="C3", ls=":", label="minimum of the estimate")
        axis.axvline(lowest(c["test_loss"]), color="black", ls=":", label="lowest test loss")
        low, high = min(0, c["val_risk_overconfidence"].min()), c["noisy_brier"].max()
        axis.set(ylim=(1.1 * low, 1.25 * high), xlabel="epoch")
        regret = losses(c, RULES[ESTIMATE])[1]
        axis.set_title(f"{which} of {len(runs)} runs: regret {regret:.1f} %\n{c.run.name}", fontsize=9)
    axes[0].set_ylabel("Brier score")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    fig.savefig(file, dpi=100)


def results(runs: list[Curves], file: Path) -> None:
    rows = []
    for c in runs:
        rules = RULES | (BUDGETS if "n300_risk_estimate" in c.rows else {})
        rules |= TRAINED if len(c.twins) == len(VARIANTS) else {}
        found = {name: losses(c, rule) for name, rule in rules.items()}
        rows += [(c.run.seed, name.replace("*", ""), *values) for name, values in found.items()]
    columns = ["seed", "rule", "epoch", "regret_percent", "error_points"]
    pd.DataFrame(rows, columns=columns).to_csv(file, index=False, float_format="%.4g")


# %%
def main() -> None:
    parser = argparse.ArgumentParser(description="Regret of early stopping on the risk estimate.")
    parser.add_argument("--data", type=Path, help="folder with the data sets; --quick needs none")
    parser.add_argument("--runs", type=Path, help="folder of the runs [runs/early_stopping_study or ..._quick]")
    parser.add_argument("--out", type=Path, help="folder of the report [beside this file; --quick: with the runs]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--more", action="store_true", help="also twins beside, and the pools `report` and `second`")
    parser.add_argument("--quick", action="store_true", help="two short runs: does it run, not what it finds")
    parser.add_argument("--report", action="store_true", help="train nothing: report the runs that are there")
    args = parser.parse_args()
    folder = args.runs or Path(f"runs/early_stopping_study{'_quick' * args.quick}")
    out = args.out or (folder if args.quick else HERE)
    folder.mkdir(parents=True, exist_ok=True)
    pools = {"fresh": QUICK} if args.quick else POOLS
    jobs = [(run, "main") for run in pools["fresh"]]
    if args.more or args.quick:
        jobs += [(run, variant) for run in pools["fresh"][:NUM_TWINS] for variant in VARIANTS]
        jobs += [(run, "main") for name in ("report", "second") for run in pools.get(name, [])]
    files = {job: folder / (job[0].name + f"-{job[1]}" * (job[1] != "main") + ".csv") for job in jobs}
    missing = {} if args.report else {job: file for job, file in files.items() if not file.exists()}
    if args.quick:
        for (run, variant), file in tqdm(missing.items(), "runs"):
            train(args.data, file, run, variant)
    elif missing:
        with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
            todo = [pool.submit(train, args.data, file, *job) for job, file in missing.items()]
            for job in tqdm(as_completed(todo), "runs", len(files), initial=len(files) - len(missing)):
                job.result()
    done = {
        name: [read(folder, run) for run in runs if (folder / f"{run.name}.csv").exists()]
        for name, runs in pools.items()
    }
    done = {name: runs for name, runs in done.items() if runs}
    everything = [c for runs in done.values() for c in runs]
    parts = [report(runs, f"Pool `{name}`") for name, runs in done.items()]
    if "second" in done:
        parts.insert(0, report(done["fresh"] + done["second"], "Pools `fresh` and `second`"))
    parts += [listed(everything)]
    (out / "report.md").write_text("# Every table of the study\n\n" + "\n\n".join(parts).replace("\n\n\n", "\n\n"))
    figure(done["fresh"], out / "figure.png")
    results(everything, out / "results.csv")
    print("\n\n".join(parts), f"\n\nIn {out}: report.md, figure.png, results.csv.", sep="")


if __name__ == "__main__":
    main()
