"""Can early stopping trust the risk estimate, which needs no labels? On training runs that are drawn at random.

    python examples/studies/early_stopping/study.py --data FOLDER  # all runs of the report
    python examples/studies/early_stopping/study.py --quick        # three short runs, without FOLDER: does it run

Every run is trained to its end and leaves an NPZ file; runs that have theirs are not trained again, so that a study
that was cut off resumes where it stopped. The pools take turns: the runs that are there at any time are the first of
each. `FOLDER` holds `cifar10.npz`, `mnist.npz` and `fashion.npz` (`x_train`, images uint8 N × C × H × W, and
`y_train`), and `cifar10n.npz` with human labels of CIFAR-10 (`aggre_label` and `worse_label`, of
http://noisylabels.com). `sentences.npz` is made there from installed packages.
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
from rules import Curves
from targets import targets_table
from training import train

HERE = Path(__file__).parent
SEEDS = {"random": range(7030, 7150), "as built": range(8032, 8152), "wide": range(6108, 6133)}
QUICK = {("random", 23): 5, ("as built", 0): 5, ("as built", 8): 5}  # epochs: a teacher, a table, digits
Job = tuple[str, int]


def interleaved() -> list[Job]:
    """Take seeds of the pools in turns, so that those that are done are in proportion."""
    jobs = [(index / len(seeds), pool, seed) for pool, seeds in SEEDS.items() for index, seed in enumerate(seeds)]
    return [(pool, seed) for _, pool, seed in sorted(jobs)]


# %% The report.
def report(curves: list[Curves], runs: pd.DataFrame) -> str:
    found = tables.groups(runs)
    counted = {pool: sum(c.about["pool"] == pool for c in curves) for pool in SEEDS}
    left_out = ", ".join(f"{c.about['pool']} {c.about['seed']}" for c in curves if not c.counts) or "none"
    told = ", ".join(f"{number} of {len(SEEDS[pool])} {pool}" for pool, number in counted.items())
    parts = [
        "# Every table of the study",
        f"Runs that were trained: {told}, the first of each list. {len(curves) - len(runs)} learned nothing or"
        f" diverged, and are left out ({left_out}).\n\nCells with two slashes: accuracy lost in points / regret of the"
        " true score in percent / loss regret in percent, means over runs. In brackets: 95 % bootstrap intervals.",
        f"## Targets\n\n{targets_table(found)}",
        *(f"## Rules: {name}\n\n{tables.rules_table(found[name])}" for name in found if name.endswith(": all")),
        f"## Groups\n\n{tables.groups_table(found)}",
        f"## Differences\n\nMeans with 95 % bootstrap intervals.\n\n{tables.differences_table(found)}",
        f"## Labels as noisy as training's\n\n{tables.labels_table(found, 'noisy')}",
        f"## Correct labels\n\n{tables.labels_table(found, 'correct')}",
        f"## Stopping\n\n{tables.stopping_table(found)}",
        f"## Size\n\nThe estimate over the true score, at the chosen epoch:\n\n{tables.sizes_table(found)}",
        f"## The worst runs\n\n{tables.worst_table(runs)}\n",
    ]
    return "\n\n".join(parts)


def train_missing(files: dict[Job, Path], args: argparse.Namespace) -> None:
    missing = {job: file for job, file in files.items() if not file.exists()}
    if args.quick:
        for (pool, seed), file in missing.items():
            train(pool, seed, args.data, file, QUICK[pool, seed])
        return
    with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
        todo = [pool.submit(train, *job, args.data, file) for job, file in missing.items()]
        for each in tqdm(as_completed(todo), "runs", len(files), initial=len(files) - len(missing)):
            each.result()


def main() -> None:
    parser = argparse.ArgumentParser(description="What early stopping on the risk estimate costs, on random runs.")
    parser.add_argument("--data", type=Path, help="folder with the data sets; --quick needs none")
    parser.add_argument("--runs", type=Path, help="folder of the runs [runs/early_stopping, or ..._quick]")
    parser.add_argument("--out", type=Path, help="folder of the report [beside this file; --quick: that of the runs]")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--tables", action="store_true", help="train nothing: report the runs that are there")
    parser.add_argument("--quick", action="store_true", help="three short runs: does it run, not what it finds")
    args = parser.parse_args()
    folder = args.runs or Path("runs/early_stopping_quick" if args.quick else "runs/early_stopping")
    out = args.out or (folder if args.quick else HERE)
    folder.mkdir(parents=True, exist_ok=True)
    jobs = list(QUICK) if args.quick else interleaved()
    files = {(pool, seed): folder / f"{pool.replace(' ', '_')}_{seed}.npz" for pool, seed in jobs}
    if not args.tables:
        train_missing(files, args)
    # If runs are missing, those after the first gap are left out: a quick one there would count before a slow one.
    curves = [Curves(file) for file in takewhile(Path.exists, files.values())]
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
