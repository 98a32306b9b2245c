"""Judges every rule on the recorded runs, and leaves one row a run in `results.csv`.

    python judge.py RUNS DATA [--half design] [--output results.csv]

A rule pays by test labels that are correct (where they are known): how much lower accuracy, AUC and balanced accuracy are than
in the best epoch, in points; and by how many percent the loss is higher.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rules import Recorded, auc, chosen_epochs, is_used
from runs import draw

from lightning_sensitivity.functional import fit_reference


def accuracy(p: np.ndarray, y: np.ndarray) -> float:
    return float((p.argmax(1) == y).mean())


def balanced_accuracy(p: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([(p[y == each].argmax(1) == each).mean() for each in np.unique(y)]))


def log_loss(p: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(p[np.arange(len(y)), y].clip(1e-12)).mean())


def squared_error(p: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(p[:, 0] - y).mean())


GAINS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy, "auc": auc, "balanced": balanced_accuracy,
}  # fmt: skip


def lost(run: Recorded) -> dict[str, np.ndarray]:
    """Compute what is lost by each epoch, against the best one."""
    p, y = run.predictions("test").double().numpy(), run.found["y_test"]
    losses = np.array([(squared_error if run.task == "regression" else log_loss)(each, y) for each in p])
    found = {"loss": 100 * (losses / losses.min() - 1)}
    if run.task != "regression":
        for name, measure in GAINS.items():
            values = np.array([measure(each, y) for each in p])
            found[name] = 100 * (values.max() - values)
    return found


def judge(name: str, runs: Path, data: Path) -> dict[str, object]:
    """Return the row of a run."""
    torch.set_num_threads(1)
    pool, index = name.split("-")
    run, recorded = draw(pool, int(index), data), Recorded.read(runs / f"{name}.npz")
    if run.features is None:
        seen, unseen = run.x_kept, run.x_unseen
    else:
        seen, unseen = run.features(run.x_kept), run.features(run.x_unseen)
    row: dict[str, object] = {"run": name, "pool": pool, "is_design": run.is_design, "kind": run.kind, "n": len(run.y)}
    inputs = {"": (seen, unseen)} if run.features is None else {"": (run.x_kept, run.x_unseen), "features_": (seen, unseen)}
    for prefix, (x, new_x) in inputs.items():
        reference = fit_reference(x, run.y, new_x, run.task)
        row |= {f"{prefix}skill": reference.skill, f"{prefix}is_used": is_used(reference)}
        row |= {f"{prefix}claim_by_score": reference.claim / reference.score, f"{prefix}made_of": reference.features}
        for rule, epochs in chosen_epochs(recorded, reference).items():
            row |= {f"{prefix}{rule}_{what}_lost": values[epochs].mean() for what, values in lost(recorded).items()}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--half", choices=["design", "check", "both"], default="both")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.csv"))
    arguments = parser.parse_args()
    wanted = {"design": [True], "check": [False], "both": [True, False]}[arguments.half]
    files = sorted(file for file in arguments.runs.glob("*-???.npz"))
    names = [file.stem for file in files if bool(np.load(file)["is_design"]) in wanted]
    with ProcessPoolExecutor(2) as executor:
        rows = list(executor.map(partial(judge, runs=arguments.runs, data=arguments.data), names))
    pd.DataFrame(rows).to_csv(arguments.output, index=False, float_format="%.3f")


if __name__ == "__main__":
    main()
