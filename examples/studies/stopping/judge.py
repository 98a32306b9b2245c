"""Judges every rule on the recorded runs: a row a run in `results.csv.gz`, one a group of runs in `compared.csv.gz`.

A row tells the version of the estimates that it was judged by. Rows of older versions stay in the files: `parts.py`
takes the newest of each run, and pages mark what is older than the package.

    python judge.py RUNS DATA fit [POOL ...] [--part 0/2]  # NAME.JUDGE.npz beside NAME.npz: what a reference says
    python judge.py RUNS DATA measure [POOL ...]           # NAME.json: what each number would lose; seconds a run
    python judge.py RUNS DATA table                        # what the rules make of it

A rule pays by test labels, which are correct where that is known: how much lower accuracy, AUC, balanced accuracy and
macro F1 are than in the best epoch, in points; and by how many percent the loss (cross-entropy, or squared error) is
higher, also on test labels as noisy as those of training (`noisy_loss`).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from compare import compare, numbers
from pools import POOLS
from rules import (
    GAINS,
    PATIENCE,
    VALUES,
    Recorded,
    against_the_reference,
    by_recipe,
    candidates,
    epochs_of_tenth,
    epochs_run,
    expected_curves,
    gain_curve,
    level,
    loss,
    lowest,
    rules,
    watched,
)
from runs import ALIKE, NUM_ALIKE, RATERS, SHIFTED
from said import Said, file_of, fit_run
from torch import Tensor

from lightning_sensitivity.functional.expected import ESTIMATES
from lightning_sensitivity.reference.calibration import reweigh
from lightning_sensitivity.reference.observations import largest_difference
from lightning_sensitivity.reference.reference import Reference

NEVER_TWICE = (
    "photos", "texts", "redrawn", "tuned", "pretrained", "minilm", "made", "photos_more", "texts_more", "minilm_more",
    "resnet18",
)  # fmt: skip
JUDGES = ("inputs", "body", "lite0", "lite2", "minilm")


@cache
def measures(run: Recorded) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Compute what is lost by each epoch, against the best one; and how good each epoch is."""
    p, y = run.predictions("test"), run.found["y_test"]
    values = {"loss": run.losses_of("test", y)}
    lost = {"loss": above_lowest(values["loss"])}
    if run.task != "regression":
        for name in GAINS:
            values[name] = 100 * gain_curve(name, p, y)
            lost[name] = values[name].max() - values[name]
    return lost, values


def above_lowest(losses: np.ndarray) -> np.ndarray:
    """Return by how many percent losses are above the lowest."""
    return 100 * (losses / losses.min() - 1)


def with_the_reference(run: Recorded, p_reference: Tensor, epoch: int) -> dict[str, float]:
    """Say how good the reference is on test samples by itself, and the mean of its predictions and the network's."""
    y, found = run.found["y_test"], {}
    of_network = run.predictions("test")[epoch]
    for name, p in {"reference": p_reference.numpy(), "mean": (p_reference.numpy() + of_network) / 2}.items():
        found[f"{name}_loss"] = loss(p, y)
        if run.task != "regression":
            found |= {f"{name}_{gain}": 100 * GAINS[gain](p, y) for gain in ("accuracy", "auc")}
    return found


def measure(recorded: Recorded, noisy: np.ndarray, reference: Reference, q: Tensor, q_test: Tensor) -> dict[str, Any]:
    """Return what each number by itself would lose, and what is known of the reference."""
    lost, values = measures(recorded)
    lost = lost | {"noisy_loss": above_lowest(recorded.losses_of("test", noisy))}
    curves = expected_curves(recorded, reference, q)
    found: dict[str, Any] = {}
    for name, epochs in candidates(recorded, curves, q, reference.num_samples_).items():
        found |= {f"{name}_{what}_lost": float(each[epochs].mean()) for what, each in lost.items()}
    found |= shares_run(curves, reference.is_trusted_)
    chosen = by_recipe(curves) if reference.is_trusted_ else -1
    for name, curve in values.items():
        best = curve.min() if name == "loss" else curve.max()
        found |= {f"best_{name}": float(best), f"last_{name}": float(curve[-1]), f"chosen_{name}": float(curve[chosen])}
    found |= with_the_reference(recorded, q_test, chosen)
    truth = values["loss" if recorded.task == "regression" else "accuracy"]
    found |= level(recorded, curves, truth, noisy) | against_the_reference(recorded, curves, q_test, noisy)
    names = ("learner", "features", "kind", "skill", "unexplained", "is_trusted", "accuracy", "auroc", "majority")
    return found | {f"its_{name}": getattr(reference, f"{name}_") for name in (*names, "temperature", "smoothing")}


def shares_run(curves: dict[str, np.ndarray], is_trusted: bool) -> dict[str, float]:
    """Say how many percent of all epochs run until one stops, by what one keeps by."""
    found = {}
    for name in VALUES:
        if name in curves:
            share = epochs_run(watched(curves, name), PATIENCE) / len(curves[name]) if is_trusted else 1
            found[f"stopped_{name}_epochs"] = 100 * share
    return found


def held_out(whole: Recorded, tenth: Recorded) -> dict[str, float]:
    """Return what is lost, against the best epoch of the whole training, by one on nine tenths that a tenth stops.

    The tenth has noisy labels, as people's has. `retrained` takes its epoch in the whole training.
    """
    lost, best = measures(whole)
    _, reached = measures(tenth)
    found = {}
    for rule, epoch in epochs_of_tenth(tenth).items():
        for what, each in reached.items():
            top = best[what].min() if what == "loss" else best[what].max()
            value = 100 * (each[epoch] / top - 1) if what == "loss" else top - each[epoch]
            found[f"held_out_by_{rule}_{what}_lost"] = float(value)
    epoch = epochs_of_tenth(tenth)["loss"]
    return found | {f"retrained_{what}_lost": float(each[epoch]) for what, each in lost.items()}


def measure_alike(recorded: Recorded, reference: Reference, q: Tensor) -> dict[str, Any]:
    """Return what ranks a network, at the epoch that its expected accuracy chose, and its accuracy there."""
    curve = expected_curves(recorded, reference, q, ["accuracy"])["accuracy"]
    epoch = lowest(-curve) if reference.is_trusted_ else len(curve) - 1
    accuracy = 100 * GAINS["accuracy"](recorded.predictions("test")[epoch], recorded.found["y_test"])
    return {"chosen_accuracy": accuracy, "compared": numbers(recorded, q, reference.is_trusted_, epoch)}


def of_shares(recorded: Recorded, way: str, reference: Reference, *predictions: Tensor) -> dict[str, list[Tensor]]:
    """Return predictions for the class shares of unseen samples, which are known, where training has others."""
    if way not in SHIFTED:
        return {}
    s, known = torch.tensor(reference.labels_.mean(0)), recorded.labels("y_test", 2).double().mean(0)
    return {"known shares": [reweigh(q, s, known) for q in predictions]}


def measure_file(file: Path, judges: list[str]) -> dict[str, dict[str, Any]]:
    """Measure a recorded run by some judges."""
    pool, recorded = file.stem.split("-")[0], Recorded.read(file)
    found: dict[str, dict[str, Any]] = {}
    for judge in judges:
        said = Said.read(file_of(file, judge))
        reference = said.reference()
        q, q_test = said.predictions(reference)
        if pool in ALIKE:
            found[judge] = measure_alike(recorded, reference, q)
            continue
        noisy, way = said.noisy_test, said.about["way"]
        found[judge] = measure(recorded, noisy, reference, q, q_test)
        if recorded.task != "regression":
            found[judge]["shares_z"] = largest_difference(torch.tensor(reference.left_out_), q)[1]
        for name, each in of_shares(recorded, way, reference, q, q_test).items():
            found[name] = measure(recorded, noisy, reference, *each)
    return {judge: each | {"version": ESTIMATES} for judge, each in found.items()}


def about(file: Path, judge: str) -> dict[str, Any]:
    """Return what is known of a recorded run."""
    (pool, index), way = file.stem.split("-"), Said.read(file_of(file, judge)).about["way"]
    with np.load(file) as found:
        row: dict[str, Any] = {"run": file.stem, "pool": pool, "is_design": bool(found["is_design"])}
        row |= {"task": str(found["task"]), "way": way, "n": len(found["y"]), "kind": str(found["kind"])}
    return row | {"group": int(index) // NUM_ALIKE}


def keep(found: dict[str, Any], file: Path) -> None:
    """Leave a .json beside a recorded run."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file.with_suffix(".json"))


def runs_of(runs: Path, pools: list[str], part: str, until: int) -> Iterator[Path]:
    """Give the recorded runs of some pools; of several processes, each takes its part of the groups."""
    number, of = map(int, part.split("/"))
    for pool in pools:
        for file in sorted(runs.glob(f"{pool}-???.npz")):
            index = int(file.stem.split("-")[1])
            if index < until and index // (NUM_ALIKE if pool in ALIKE else 1) % of == number:
                yield file


def measure_all(runs: Path, pools: list[str], part: str, until: int) -> None:
    """Measure what is fitted of the check half, and was not measured by this version yet."""
    for file in runs_of(runs, pools, part, until):
        there = file.with_suffix(".json")
        found = json.loads(there.read_text())["found"] if there.exists() else {}
        found = {judge: each for judge, each in found.items() if each["version"] == ESTIMATES}
        fitted = [name for name in JUDGES if file_of(file, name).exists()]
        new = [name for name in fitted if name not in found]
        if new and not np.load(file)["is_design"]:
            start = time.process_time()
            keep({"about": about(file, new[0]), "found": found | measure_file(file, new)}, file)
            print(f"{time.strftime('%H:%M:%S')} {file.stem} {time.process_time() - start:.1f} s", flush=True)
        tenth = file.with_stem(f"{file.stem}-tenth")
        if tenth.exists() and not tenth.with_suffix(".json").exists():
            keep(held_out(Recorded.read(file), Recorded.read(tenth)), tenth)


def shown(rule: str) -> list[str]:
    """Return the measures by which tables tell what a rule loses."""
    if rule in ("never_stop", "expected_accuracy", "expected_loss"):
        return ["loss", "noisy_loss", *GAINS]
    more = {"labels_600": ["auc"], "labels_600_by_loss": ["noisy_loss"]}.get(rule, [])
    own = [each for each in GAINS if rule.endswith(f"_{each}") and each != "accuracy"]
    return ["loss", "accuracy", *own, *more]


def row_of(about: dict[str, Any], found: dict[str, Any], judge: str) -> dict[str, Any]:
    """Return the row of a run: what is known of it, and what each rule loses."""
    row = about | {"judge": judge, "table": about["kind"].split(",")[0]}
    row["is_redrawn"] = "redrawn" in row["kind"] and " 0 % redrawn" not in row["kind"]
    if row["pool"] in NEVER_TWICE:
        row["table"] = row["run"]
    if row["pool"] == "signals_more":
        row["table"] = row["kind"].split(" rises")[0]
    if row["pool"] == "annotators":
        row["group"] = int(row["run"].split("-")[1]) // len(RATERS)
        row["table"] = f"annotators {row['group']}"
    row |= {name: value for name, value in found.items() if not name.endswith("_lost")}
    for rule, candidate in rules(found["its_is_trusted"]).items():
        row |= {f"{rule}_{measure}_lost": found.get(f"{candidate}_{measure}_lost") for measure in shown(rule)}
    return row


def tables(runs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what the rules lose, one row a run and judge, and a group of alike runs and judge."""
    rows, alike = [], []
    for file in sorted(runs.glob("*-???.json")):
        read = json.loads(file.read_text())
        tenth = file.with_stem(f"{file.stem}-tenth")
        if tenth.exists() and "inputs" in read["found"]:
            read["found"]["inputs"] |= json.loads(tenth.read_text())
        for judge, found in read["found"].items():
            if found["version"] != ESTIMATES:
                continue
            if "compared" in found:
                more = {"judge": judge, "numbers": found["compared"], "accuracy": found["chosen_accuracy"]}
                alike.append(read["about"] | more)
            else:
                rows.append(row_of(read["about"], found, judge))
    return pd.DataFrame(rows), compare(alike)


def with_those_of(file: Path, found: pd.DataFrame) -> pd.DataFrame:
    """Add the rows that a file has of older versions, and of runs that are not recorded here."""
    rows = pd.concat([found, pd.read_csv(file)])
    return rows.drop_duplicates(["run" if "run" in rows else "group", "pool", "judge", "version"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("step", choices=["fit", "measure", "table"])
    parser.add_argument("pools", nargs="*", default=list(POOLS))
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--until", type=int, default=10**6)
    parser.add_argument("--judges", nargs="*", help="these alone, such as inputs and lite0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    some = arguments.runs, arguments.pools, arguments.part, arguments.until
    if arguments.step == "fit":
        for file in runs_of(*some):
            fit_run(file, arguments.data, arguments.judges)
    elif arguments.step == "measure":
        measure_all(*some)
    else:
        packed = {"method": "gzip", "mtime": 1}
        for name, found in zip(("results", "compared"), tables(arguments.runs), strict=True):
            file = Path(__file__).with_name(f"{name}.csv.gz")
            with_those_of(file, found).to_csv(file, index=False, float_format="%.4g", compression=packed)


if __name__ == "__main__":
    main()
