"""Can early stopping trust the risk criterion, which needs no labels? On training runs that are drawn at random.

    python examples/studies/early_stopping/study.py --data FOLDER  # all runs, and results.csv of them
    python examples/studies/early_stopping/study.py --quick        # eight short runs, without FOLDER: does it run

`examples/studies/tables.py` puts the numbers of results.csv into all pages, `figure.py` draws it.

Every run is trained to its end, without a monitor, and its weights of every epoch are kept. Then the callback measures
them. Each run has a folder, and what is there is not made again, so that a study that was cut off resumes where it
stopped. The pools take turns: the runs that are there at any time are the first of each. `FOLDER` holds `cifar10.npz`,
`mnist.npz` and `fashion.npz` (`x_train`, images uint8 N × C × H × W, and `y_train`), and `cifar10n.npz` with human
labels of CIFAR-10 (`aggre_label` and `worse_label`, of http://noisylabels.com). What comes from installed packages
(sentences, signals of `aeon`, pretrained networks) is put there.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import takewhile
from pathlib import Path

import pandas as pd
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))
from held_out import score_chosen
from label_noise import predict_by_folds
from pools import NUMBERS, plan
from replay import measure, measure_fewer
from results import line_of
from rules import Curves
from training import train
from truth import observe

HERE = Path(__file__).parent
QUICK = {  # seeds and epochs
    "random": [(23, 5), (24, 5), (25, 5)],
    "as built": [(8, 5), (9, 5)],
    "tables": [(2, 5), (3, 5), (7, 5)],
}
NUM_FOLDED = 12  # first runs of each pool whose networks are also trained five times, for cleanlab
Job = tuple[str, int, int]  # pool, seed, epochs


def planned(data: Path | None, root: Path) -> dict[str, list[tuple[int, int]]]:
    """Give the seeds and epochs of each pool; they are kept in a file, since it takes a minute to find them."""
    file = root / "plan.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    for pool in NUMBERS:
        if pool not in found:
            found[pool] = plan(pool, data)
            file.write_text(json.dumps(found))
    return {pool: [(seed, epochs) for seed, epochs in found[pool] if epochs] for pool in NUMBERS}


def interleaved(plans: dict[str, list[tuple[int, int]]]) -> list[Job]:
    """Take runs of the pools in turns, so that those that are done are in proportion."""
    jobs = [(index / len(runs), pool, *run) for pool, runs in plans.items() for index, run in enumerate(runs)]
    return [(pool, seed, epochs) for _, pool, seed, epochs in sorted(jobs)]


def folder_of(job: Job, root: Path) -> Path:
    return root / f"{job[0].replace(' ', '_')}_{job[1]}"


# %% What is made of a run.
def make_training(job: Job, data: Path | None, root: Path) -> None:
    train(*job[:2], data, folder_of(job, root), job[2])


def make_truth(job: Job, data: Path | None, root: Path) -> None:
    folder = folder_of(job, root)
    if not (folder / "truth.npz").exists():
        observe(*job[:2], data, folder)
    if not (folder / "fewer.npz").exists():
        score_chosen(*job[:2], data, folder)


def make_logged(job: Job, data: Path | None, root: Path) -> None:
    if not (folder_of(job, root) / "logged.npz").exists():
        measure(*job[:2], data, folder_of(job, root))


def make_logged_fewer(job: Job, data: Path | None, root: Path) -> None:
    if not (folder_of(job, root) / "logged_fewer.npz").exists():
        measure_fewer(*job[:2], data, folder_of(job, root))


def make_folds(job: Job, data: Path | None, root: Path) -> None:
    if not (folder_of(job, root) / "folds.npz").exists():
        predict_by_folds(*job, data, folder_of(job, root))


Step = Callable[[Job, Path | None, Path], None]
STEPS: dict[str, Step] = {
    "train": make_training,
    "observe": make_truth,
    "measure": make_logged,
    "measure fewer": make_logged_fewer,
    "folds": make_folds,
}


def make(steps: Iterable[str], plans: dict[str, list[tuple[int, int]]], args: argparse.Namespace, root: Path) -> None:
    """Make what is missing, one kind of step after the other."""
    for name in steps:
        used = {pool: runs[:NUM_FOLDED] for pool, runs in plans.items() if pool != "larger"}
        jobs = interleaved(used if name == "folds" else plans)
        if args.processes == 1:
            for job in jobs:
                STEPS[name](job, args.data, root)
            continue
        with ProcessPoolExecutor(args.processes, multiprocessing.get_context("spawn")) as pool:
            todo = [pool.submit(STEPS[name], job, args.data, root) for job in jobs]
            for each in tqdm(as_completed(todo), name, len(todo)):
                each.result()


# %% The results.
def measured(plans: dict[str, list[tuple[int, int]]], root: Path) -> list[Curves]:
    """Give the first runs of each pool: those after a gap would be there only because they are quick."""
    found = []
    for pool, runs in plans.items():
        folders = [folder_of((pool, *run), root) for run in runs]
        found += [Curves(folder) for folder in takewhile(lambda f: (f / "logged.npz").exists(), folders)]
    return found


def write_results(curves: list[Curves], plans: dict[str, list[tuple[int, int]]], file: Path) -> None:
    """Write a line for each run that learned something, and tell which did not."""
    counted = {pool: sum(c.about["pool"] == pool for c in curves) for pool in plans}
    print("Made:", ", ".join(f"{number} of {len(plans[pool])} {pool}" for pool, number in counted.items()))
    left_out = [f"{c.about['pool']} {c.about['seed']}" for c in curves if not c.counts]
    print("Learned nothing or diverged, and left out:", ", ".join(left_out) or "none")
    runs = pd.DataFrame([line_of(c) for c in curves if c.counts])
    runs.to_csv(file, index=False, float_format="%.3g")
    print(f"In {file}: {len(runs)} runs.")


def main() -> None:
    parser = argparse.ArgumentParser(description="What early stopping on the risk criterion costs, on random runs.")
    parser.add_argument("--data", type=Path, help="folder with the data sets; --quick needs none")
    parser.add_argument("--runs", type=Path, help="folder of the runs [runs/early_stopping, or ..._quick]")
    parser.add_argument("--out", type=Path, help="folder of results.csv [beside this file; --quick: that of the runs]")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, each on one core")
    parser.add_argument("--only", choices=STEPS, help="make this alone, and no results")
    parser.add_argument("--results", action="store_true", help="make nothing: results.csv of the runs that are there")
    parser.add_argument("--quick", action="store_true", help="eight short runs: does it run, not what it finds")
    args = parser.parse_args()
    root = args.runs or Path("runs/early_stopping_quick" if args.quick else "runs/early_stopping")
    out = args.out or (root if args.quick else HERE)
    for each in (root, out):
        each.mkdir(parents=True, exist_ok=True)
    args.processes = 1 if args.quick else args.processes
    plans = QUICK if args.quick else planned(args.data, root)
    if not args.results:
        make([args.only] if args.only else list(STEPS)[:-1] if args.quick else STEPS, plans, args, root)
    if args.only:
        return
    curves = measured(plans, root)
    if not any(c.counts for c in curves):
        sys.exit("No run learned anything.")
    write_results(curves, plans, out / "results.csv")


if __name__ == "__main__":
    main()
