"""Which epoch each rule keeps of a later training, and how many points of test accuracy that loses.

    python examples/studies/bounds/judge.py RUNS --choose  # the design half alone
    python examples/studies/bounds/judge.py RUNS           # results.csv, a row for each pair
    python examples/studies/tables.py                      # results.csv -> the pages

A rule knows what was measured in the earlier training, whose best epoch is that of its lowest validation loss on 300
labels, and in the later one what needs no validation labels: sensitivity and the training loss. Frozen on the design
half, before the check half was looked at: single outputs, k = 2, the epoch that passes; and where the earlier
validation loss rises by less than 5 % till its end, no rule stops.
"""

from __future__ import annotations

import argparse
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pairs import KINDS, NUM_LABELS, file_of, is_for_design, noise_of, pairs, reference_file, trainings

from lightning_sensitivity.functional import draw_labels

sys.path.insert(0, str(Path(__file__).parents[1] / "stopping"))
from rules import Recorded, by_recipe

TIMES = (1, 1.25, 1.5, 2, 3)  # k
CURVES = {"single": "per_output", "mean": "sensitivity"}  # of single outputs, and of their mean
Curves = dict[str, np.ndarray]


@cache
def read(file: Path) -> Curves:
    """Read what was measured in a training, and the loss of each epoch on 300 labels."""
    with np.load(file) as found:
        curves = dict(found)
    few = Recorded({"unseen": curves["unseen"][:, :NUM_LABELS], "task": recorded(curves).found["task"]})
    return curves | {"loss": few.losses_of("unseen", curves["y_unseen"][:NUM_LABELS])}


def recorded(curves: Curves) -> Recorded:
    task = "binary" if curves["unseen"].shape[2] == 1 else "multiclass"
    return Recorded({"unseen": curves["unseen"], "task": np.array(task)})


def first(condition: np.ndarray) -> int:
    """Return the first epoch for which a condition holds, or the last one."""
    return int(condition.argmax()) if condition.any() else len(condition) - 1


def passing(curve: np.ndarray, bound: float) -> int:
    """Return the epoch in which a curve passes a bound, where `EarlyStopping` stops; it stops at nan, too."""
    return first(~(curve <= bound))


def chosen(earlier: Curves, later: Curves) -> dict[str, int]:
    """Return the epoch that each rule keeps of the later training."""
    last, best = len(later["test_accuracy"]) - 1, int(earlier["loss"].argmin())
    steps = round((best + 1) * float(earlier["steps"] / later["steps"])) - 1
    found = {"never": last, "epoch": best, "steps": min(max(steps, 0), last)}
    found["train_loss"] = first(later["train_loss"] <= earlier["train_loss"][best])
    found["labels"] = int(later["loss"].argmin())
    for name, key in CURVES.items():
        for times in TIMES:
            found[f"{name}_{100 * times:.0f}"] = passing(later[key], times * earlier[key][best])
            is_passed = (later[key] > times * earlier[key][best]).any()
            if name == "single":
                found[f"before_{100 * times:.0f}"] = max(found[f"single_{100 * times:.0f}"] - int(is_passed), 0)
    return found


def by_reference(later: Curves, file: Path) -> int:
    """Return the epoch of `RiskMonitor`'s recipe, or the last one, where the reference sees too little."""
    with np.load(file) as found:
        q = torch.tensor(found["reference"])
    if not bool(q.isfinite().all()):
        return len(later["test_accuracy"]) - 1
    run = recorded(later)
    hits = run.outputs("unseen").argmax(2)[:, None] == draw_labels(q, "multiclass")  # as `expected_metric` counts them
    return by_recipe({"loss": run.losses("unseen", q), "accuracy": hits.double().mean((1, 2)).numpy()})


def sets(runs: Path, *, only_design: bool) -> list[tuple[str, int]]:
    """List the data sets all of whose trainings are there."""
    found = [(kind, index) for kind, number in KINDS.items() for index in range(number)]
    return [
        (kind, index)
        for kind, index in found
        if (is_for_design(kind, index) or not only_design)
        and all(file_of(runs, kind, index, each.name).exists() for each in trainings(noise_of(kind, index)))
    ]


def judged(runs: Path, *, only_design: bool = False) -> pd.DataFrame:
    """Return what each rule loses on each pair, in points, and by how much the earlier validation loss rose at last."""
    rows = []
    for kind, index in sets(runs, only_design=only_design):
        of_name = {each.name: each for each in trainings(noise_of(kind, index))}
        for change, (first, second) in pairs(noise_of(kind, index)).items():
            earlier, later = (read(file_of(runs, kind, index, name)) for name in (first, second))
            epochs = chosen(earlier, later)
            reference = reference_file(runs, kind, index, of_name[second])
            if reference.exists():
                epochs["recipe"] = by_reference(later, reference)
            lost = 100 * (later["test_accuracy"].max() - later["test_accuracy"])
            row = {"kind": kind, "table": f"{kind} {index}", "change": change, "is_design": is_for_design(kind, index)}
            row["rise"] = round(float(earlier["loss"][-1] / earlier["loss"].min() - 1), 3)
            rows.append(row | {rule: round(float(lost[epoch]), 2) for rule, epoch in epochs.items()})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the rules on the pairs of trainings.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--choose", action="store_true", help="print the design half alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    found = judged(arguments.runs, only_design=arguments.choose)
    if arguments.choose:
        print(f"{found['table'].nunique()} data sets, {len(found)} pairs")
        by_change = found.groupby("change").mean(numeric_only=True).T
        print(by_change.assign(all=found.mean(numeric_only=True)).round(2).to_string())
        calm = found[found["rise"] < 0.05]
        print(f"\nrise below 5 %, {len(calm)} pairs\n{calm.mean(numeric_only=True).round(2).to_string()}")
        return
    found.to_csv(arguments.out / "results.csv", index=False)


if __name__ == "__main__":
    main()
