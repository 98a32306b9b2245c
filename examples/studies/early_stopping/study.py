"""Can early stopping trust the risk estimate, which needs no labels? On training runs that are drawn at random.

    python examples/studies/early_stopping/study.py --data FOLDER  # all runs of the report
    python examples/studies/early_stopping/study.py --quick        # four short runs, without FOLDER: does it run

Every run is trained to its end, without a monitor, and its weights of every epoch are kept (about 20 GB in all). Then
the callback measures them. Each run has a folder, and what is there is not made again, so that a study that was cut off
resumes where it stopped. The pools take turns: the runs that are there at any time are the first of each. `FOLDER`
holds `cifar10.npz`, `mnist.npz` and `fashion.npz` (`x_train`, images uint8 N × C × H × W, and `y_train`), and
`cifar10n.npz` with human labels of CIFAR-10 (`aggre_label` and `worse_label`, of http://noisylabels.com).
`sentences.npz` is made there from installed packages.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import takewhile
from pathlib import Path

import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
import tables
from figure import figure
from replay import measure
from rules import Curves
from targets import targets_table
from training import train

HERE = Path(__file__).parent
SEEDS = {
    "random": range(7150, 7250),
    "as built": range(8152, 8232),
    "wide": range(6133, 6153),
    "tables": range(100, 140),
    "fine-tuning": range(100, 120),
    "large teachers": range(100, 105),
}
QUICK = {("random", 23): 5, ("as built", 0): 5, ("as built", 8): 5, ("tables", 3): 5}  # epochs
Job = tuple[str, int]


def interleaved() -> list[Job]:
    """Take seeds of the pools in turns, so that those that are done are in proportion."""
    jobs = [(index / len(seeds), pool, seed) for pool, seeds in SEEDS.items() for index, seed in enumerate(seeds)]
    return [(pool, seed) for _, pool, seed in sorted(jobs)]


def make(job: Job, data: Path | None, folder: Path, epochs: int | None) -> None:
    """Train a run, and measure it."""
    train(*job, data, folder, epochs)
    measure(*job, data, folder)


def make_missing(folders: dict[Job, Path], args: argparse.Namespace) -> None:
    missing = {job: folder for job, folder in folders.items() if not (folder / "curves.npz").exists()}
    if args.quick:
        for job, folder in missing.items():
            make(job, args.data, folder, QUICK[job])
        return
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        todo = [pool.submit(make, job, args.data, folder, None) for job, folder in missing.items()]
        for each in tqdm(as_completed(todo), "runs", len(folders), initial=len(folders) - len(missing)):
            each.result()


# %% The report.
def measured(folders: dict[Job, Path]) -> list[Curves]:
    """Give the first runs of each pool: those after a gap would be there only because they are quick."""
    found = []
    for pool in SEEDS:
        files = [folder / "curves.npz" for job, folder in folders.items() if job[0] == pool]
        found += [Curves(file) for file in takewhile(Path.exists, files)]
    return found


def report(curves: list[Curves], runs: pd.DataFrame) -> str:
    found = tables.groups(runs)
    counted = {pool: sum(c.about["pool"] == pool for c in curves) for pool in SEEDS}
    left_out = ", ".join(f"{c.about['pool']} {c.about['seed']}" for c in curves if not c.counts) or "none"
    told = ", ".join(f"{number} of {len(SEEDS[pool])} {pool}" for pool, number in counted.items())
    rules, teachers = tables.main_rules(), runs[runs["pool"] == "large teachers"]
    parts = [
        "# Every table of the study",
        f"Runs that were made: {told}, the first of each list. {len(curves) - len(runs)} learned nothing or"
        f" diverged, and are left out ({left_out}).\n\nCells with two slashes: accuracy lost in points / regret of the"
        " true score in percent / loss regret in percent, means over runs. In brackets: 95 % bootstrap intervals.",
        f"## Targets\n\n{targets_table(found, teachers)}",
        *(f"## Rules: {name} ({len(each)})\n\n{tables.rules_table(each, rules)}" for name, each in found.items()
          if name.endswith((": all", *tables.MAIN_GROUPS))),
        f"## Groups\n\n{tables.groups_table(found)}",
        f"## What rules without labels are worth in labels as noisy as training's\n\n{tables.worth_table(found)}",
        f"## Labels as noisy as training's\n\n{tables.labels_table(found, 'noisy')}",
        f"## Correct labels\n\n{tables.labels_table(found, 'correct')}",
        f"## Size\n\nThe estimate over the true score, at the chosen epoch:\n\n{tables.sizes_table(found)}",
        f"## The reference's weight\n\n{tables.weights_table(found)}",
        f"## Fine-tuning\n\n{tables.finetuning_table(runs[runs['pool'] == 'fine-tuning'])}",
        f"## 5,000 correct samples of 20 inputs\n\n{tables.runs_table(teachers)}",
        f"## The worst runs\n\n{tables.worst_table(runs[runs['pool'].isin(tables.POOLS)])}\n",
    ]  # fmt: skip
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description="What early stopping on the risk estimate costs, on random runs.")
    parser.add_argument("--data", type=Path, help="folder with the data sets; --quick needs none")
    parser.add_argument("--runs", type=Path, help="folder of the runs [runs/early_stopping, or ..._quick]")
    parser.add_argument("--out", type=Path, help="folder of the report [beside this file; --quick: that of the runs]")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--tables", action="store_true", help="make nothing: report the runs that are there")
    parser.add_argument("--quick", action="store_true", help="four short runs: does it run, not what it finds")
    args = parser.parse_args()
    root = args.runs or Path("runs/early_stopping_quick" if args.quick else "runs/early_stopping")
    out = args.out or (root if args.quick else HERE)
    out.mkdir(parents=True, exist_ok=True)
    jobs = list(QUICK) if args.quick else interleaved()
    folders = {(pool, seed): root / f"{pool.replace(' ', '_')}_{seed}" for pool, seed in jobs}
    if not args.tables:
        make_missing(folders, args)
    curves = measured(folders)
    if not any(c.counts for c in curves):
        sys.exit("No run learned anything.")
    runs = pd.DataFrame([tables.judged(c) for c in curves if c.counts])
    text = report(curves, runs)
    (out / "report.md").write_text(text)
    runs.to_csv(out / "results.csv", index=False, float_format="%.3g")
    figure(tables.groups(runs), out / "figure.png")
    print(f"{text}\nIn {out}: report.md, results.csv, figure.png.")


if __name__ == "__main__":
    main()
