"""Judges every rule on the recorded runs: one row a run in `results.csv`, one a group of alike runs in `compared.csv`.

Rows of runs that are not in RUNS stay as they are, and so do the columns of those that were trained without a tenth.

    python judge.py RUNS DATA measure [POOL ...] [--part 0/2]  # NAME.json beside NAME.npz: what each number would lose
    python judge.py RUNS DATA table                            # what the rules make of it

A rule pays by test labels, which are correct where that is known: how much lower accuracy, AUC, balanced accuracy and
macro F1 are than in the best epoch, in points; and by how many percent the loss (cross-entropy, or squared error) is
higher, also on test labels as noisy as those of training (`noisy_loss`).
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from compare import compare, numbers
from pools import POOLS, draw
from record import order
from rules import (
    GAINS,
    HELD_OUT,
    Recorded,
    against_the_reference,
    as_fitted,
    by_recipe,
    candidates,
    epochs_of_tenth,
    expected_curves,
    gain_curve,
    level,
    loss,
    lowest,
    reference_says,
    rules,
)
from runs import ALIKE, NUM_ALIKE, RATERS, SHIFTED, Run
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity.reference import Reference
from lightning_sensitivity.reference.calibration import estimate_class_shares, reweigh
from lightning_sensitivity.reference.observations import largest_difference

OF_LABELS = {"accuracy", "auc", "loss", "noisy_loss"}  # what labels are judged by


def training_rows(run: Run) -> tuple[Tensor, Tensor]:
    """Return training samples as a monitor gets them: augmented, or as a sampler draws them in the first epoch."""
    if run.way == "sampler":
        rows = order(run, torch.Generator().manual_seed(run.index))
        return run.x[rows], run.y[rows]
    return run.x_kept, run.y


@lru_cache(maxsize=4)
def reference_of_alike(pool: str, group: int, judge: str, data: Path) -> Reference:
    """Fit the one reference of runs on the same data."""
    run = draw(pool, group * NUM_ALIKE, data)
    return fit(run, seen_by(run)[judge](run.x), run.y)


def seen_by(run: Run) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what each judge sees of inputs."""
    return {"inputs": lambda x: x, **run.judges}


def fit(run: Run, x: Tensor, y: Tensor) -> Reference:
    """Fit a reference; of all classes, also of those that no training sample has."""
    return Reference(run.task).fit(x, one_hot(y, run.num_classes).float() if run.task == "multiclass" else y)


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


def measure(run: Run, recorded: Recorded, reference: Reference, q: Tensor, q_test: Tensor) -> dict[str, Any]:
    """Return what each number by itself would lose, and what is known of the reference."""
    lost, values = measures(recorded)
    noisy = run.noisy_test.numpy()
    lost = lost | {"noisy_loss": above_lowest(recorded.losses_of("test", noisy))}
    curves = expected_curves(recorded, reference, q)
    found: dict[str, Any] = {}
    for name, epochs in candidates(recorded, curves, q).items():
        found |= {f"{name}_{what}_lost": float(each[epochs].mean()) for what, each in lost.items()}
    chosen = by_recipe(curves) if reference.is_trusted_ else -1
    for name, curve in values.items():
        best = curve.min() if name == "loss" else curve.max()
        found |= {f"best_{name}": float(best), f"last_{name}": float(curve[-1]), f"chosen_{name}": float(curve[chosen])}
    found |= with_the_reference(recorded, q_test, chosen)
    truth = values["loss" if recorded.task == "regression" else "accuracy"]
    found |= level(recorded, curves, truth, noisy) | against_the_reference(recorded, curves, q_test, noisy)
    found |= as_built(recorded, reference, q, lost, truth, noisy)
    names = ("learner", "features", "kind", "skill", "unexplained", "is_trusted", "accuracy", "auroc", "majority")
    return found | {f"its_{name}": getattr(reference, f"{name}_") for name in (*names, "temperature", "smoothing")}


def as_built(
    recorded: Recorded, reference: Reference, q: Tensor, lost: dict[str, np.ndarray], truth: np.ndarray,
    noisy: np.ndarray,
) -> dict[str, float]:  # fmt: skip
    """Return what the same reference would lose as it was fitted, before it was calibrated."""
    if recorded.task == "regression":
        return {}
    curves = expected_curves(recorded, reference, as_fitted(q, reference), ("accuracy", "auc"))
    levels = level(recorded, curves, truth, noisy)
    found = {f"before_{name}": levels[name] for name in ("level_error", "level_bias", "loss_error", "loss_bias")}
    for rule, curve in curves.items():
        epoch = lowest(curve if rule == "loss" else -curve)
        for what in ("loss", "accuracy", "auc"):
            found[f"before_expected_{rule}_{what}_lost"] = float(lost[what][epoch])
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


def of_shares(run: Run, reference: Reference, *predictions: Tensor) -> dict[str, list[Tensor]]:
    """Return predictions for the class shares of unseen samples, known or estimated, where training has others."""
    if run.way not in SHIFTED:
        return {}
    s, known = torch.tensor(reference.labels_.mean(0)), one_hot(run.y_test, 2).double().mean(0)
    shares = {"known shares": known, "estimated shares": estimate_class_shares(predictions[0], s)}
    return {name: [reweigh(q, s, each) for q in predictions] for name, each in shares.items()}


def measure_file(file: Path, data: Path, judges: list[str] | None = None) -> None:
    """Measure a recorded run, by all judges or some that are not there yet, and leave a .json beside it."""
    start, there = time.process_time(), file.with_suffix(".json")
    pool, index = file.stem.split("-")
    run, recorded = draw(pool, int(index), data), Recorded.read(file)
    row: dict[str, Any] = {"run": run.name, "pool": pool, "is_design": run.is_design, "task": run.task}
    row |= {"way": run.way, "n": len(run.y), "kind": run.kind, "group": run.index // NUM_ALIKE}
    found: dict[str, dict[str, Any]] = json.loads(there.read_text())["found"] if there.exists() else {}
    for judge, see in seen_by(run).items():
        if judge in found or (judges and judge not in judges):
            continue
        if pool in ALIKE:
            reference = reference_of_alike(pool, run.index // NUM_ALIKE, judge, data)
            found[judge] = measure_alike(recorded, reference, reference_says(reference, see(run.x_unseen)))
            continue
        x, y = training_rows(run)
        reference = fit(run, see(x), y)
        q = [reference_says(reference, see(each)) for each in (run.x_unseen, run.x_test)]
        found[judge] = measure(run, recorded, reference, *q)
        if run.task != "regression":
            found[judge]["shares_z"] = largest_difference(torch.tensor(reference.left_out_), q[0])[1]
        for name, each in of_shares(run, reference, *q).items():
            found[name] = measure(run, recorded, reference, *each)
    keep({"about": row, "found": found}, file)
    print(f"{time.strftime('%H:%M:%S')} {run.name} {time.process_time() - start:.0f} s", flush=True)


def keep(found: dict[str, Any], file: Path) -> None:
    """Leave a .json beside a recorded run."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.rename(file.with_suffix(".json"))


def measure_all(runs: Path, data: Path, pools: list[str], part: str, until: int, judges: list[str] | None) -> None:
    """Measure what is not there yet of the check half; of several processes, each takes its part of the groups."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    number, of = map(int, part.split("/"))
    for pool in pools:
        for file in sorted(runs.glob(f"{pool}-???.npz")):
            index = int(file.stem.split("-")[1])
            is_ours = index < until and index // (NUM_ALIKE if pool in ALIKE else 1) % of == number
            is_there = file.with_suffix(".json").exists() and not judges
            if is_ours and not is_there and not np.load(file)["is_design"]:
                measure_file(file, data, judges)
        for file in sorted(runs.glob(f"{pool}-???-tenth.npz")):
            if number == 0 and not file.with_suffix(".json").exists():
                whole = file.with_stem(file.stem.removesuffix("-tenth"))
                keep(held_out(Recorded.read(whole), Recorded.read(file)), file)


def row_of(about: dict[str, Any], found: dict[str, Any], judge: str) -> dict[str, Any]:
    """Return the row of a run: what is known of it, and what each rule loses."""
    row = about | {"judge": judge, "table": about["kind"].split(",")[0]}
    row["is_redrawn"] = "redrawn" in row["kind"] and " 0 % redrawn" not in row["kind"]
    if row["pool"] in ("photos", "texts", "redrawn", "tuned", "pretrained", "minilm", "made"):
        row["table"] = row["run"]  # nothing is there twice
    if row["pool"] == "annotators":
        row["group"] = int(row["run"].split("-")[1]) // len(RATERS)
        row["table"] = f"annotators {row['group']}"
    row |= {name: value for name, value in found.items() if not name.endswith("_lost") or name.startswith("before")}
    for rule, candidate in rules(found["its_is_trusted"]).items():
        for measure in ("loss", "noisy_loss", *GAINS):
            name = f"{candidate}_{measure}_lost"
            is_shown = measure in OF_LABELS or rule.startswith(("never", "expected", "recipe", "former"))
            if rule.startswith(("tenth_by", "labels_600_by")) and rule != "labels_600_by_loss":
                is_shown = rule.endswith(f"_by_{measure}")
            if is_shown and name in found:
                row[f"{rule}_{measure}_lost"] = found[name]
    return row


def tables(runs: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return what the rules lose, one row a run and judge, and a group of alike runs and judge."""
    rows, alike = [], []
    for file in sorted(runs.glob("*-???.json")):
        read = json.loads(file.read_text())
        tenth = file.with_stem(f"{file.stem}-tenth")
        if tenth.exists():
            read["found"]["inputs"] |= json.loads(tenth.read_text())
        for judge, found in read["found"].items():
            if "compared" in found:
                more = {"judge": judge, "numbers": found["compared"], "accuracy": found["chosen_accuracy"]}
                alike.append(read["about"] | more)
            else:
                rows.append(row_of(read["about"], found, judge))
    return pd.DataFrame(rows), compare(alike)


def joined(rows: pd.DataFrame, before: pd.DataFrame, run: list[str]) -> pd.DataFrame:
    """Put new rows in the place of those that were there before, and keep what was lost by a tenth that is not new."""
    if rows.empty:
        return before
    rows, before = rows.set_index([*run, "judge"]), before.set_index([*run, "judge"])
    of_tenth = [name for name in before if name.startswith(tuple(HELD_OUT))]
    kept = before.reindex(rows.index)[of_tenth]
    rows = rows.reindex(columns=[*dict.fromkeys([*rows, *of_tenth])])
    rows[of_tenth] = rows[of_tenth].astype(float).fillna(kept)
    others = before[~before.index.isin(rows.index)].reindex(columns=rows.columns)
    return pd.concat([rows, others]).sort_index().reset_index()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("step", choices=["measure", "table"])
    parser.add_argument("pools", nargs="*", default=list(POOLS))
    parser.add_argument("--part", default="0/1")
    parser.add_argument("--until", type=int, default=10**6)
    parser.add_argument("--judges", nargs="*", help="these alone, such as inputs and lite0")
    arguments = parser.parse_args()
    if arguments.step == "measure":
        some = arguments.pools, arguments.part, arguments.until, arguments.judges
        measure_all(arguments.runs, arguments.data, *some)
        return
    runs_of = {"results": ["run"], "compared": ["pool", "group"]}
    for (name, run), found in zip(runs_of.items(), tables(arguments.runs), strict=True):
        file = Path(__file__).with_name(f"{name}.csv")
        joined(found, pd.read_csv(file), run).to_csv(file, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
