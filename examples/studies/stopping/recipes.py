"""Chooses the recipe on the design half: what to stop by, and with which patience, beside keeping the best epoch.

    python recipes.py RUNS  # a table; RUNS as of `judge.py fit`

Rows are kinds of data by the value that one keeps by, columns are recipes: what the kept epoch loses on test labels
against the best one of its run (points, or % of the squared error), and in how many percent of all epochs.

The rule, written down when tables and few positives were there, before numbers, texts and photos came: of the recipes
that in no row lose over 0.1 points (1 % of the squared error) more than without a stop, the one of the fewest epochs.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from judge import JUDGES, measures, runs_of
from pools import POOLS
from rules import Recorded, epochs_run, expected_curves, lowest, watched
from said import Said, file_of

OWN = "what one keeps by"
RECIPES = {
    "no stop": ("", 1.0),
    "by the loss, 10 epochs": ("loss", 10.0),
    "by its own, 5 epochs": (OWN, 5.0),
    "by its own, 10 epochs": (OWN, 10.0),
    "by its own, a third": (OWN, 1 / 3),
}  # patience of 1 and more in epochs, else as a share of all


def of_run(file: Path, judge: str) -> list[dict[str, object]]:
    """Return what each recipe loses of a run, and how much of it is trained."""
    run, said = Recorded.read(file), Said.read(file_of(file, judge))
    reference = said.reference()
    name = {"few": "auc", "numbers": "loss"}.get(file.stem.split("-")[0], "accuracy")
    curves = expected_curves(run, reference, said.predictions(reference)[0], [name])
    own, lost = watched(curves, name), measures(run)[0][name]
    found: list[dict[str, object]] = []
    for label, (by, patience) in RECIPES.items():
        epochs = len(own)
        if by and reference.is_trusted_:
            share = patience / epochs if patience > 1 else patience
            epochs = epochs_run(own if by == OWN else curves[by], share)
        kept = lowest(own[:epochs]) if reference.is_trusted_ else len(own) - 1
        row = {"data": f"{file.stem.split('-')[0]}, {judge}, {name}", "run": file.stem, "recipe": label}
        found.append(row | {"lost": lost[kept], "epochs": 100 * epochs / len(own), "last": lost[-1]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("pools", nargs="*", default=list(POOLS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows: list[dict[str, object]] = []
    for file in runs_of(arguments.runs, arguments.pools, "0/1", 10**6):
        if np.load(file)["is_design"]:
            for judge in JUDGES:
                rows += of_run(file, judge) if file_of(file, judge).exists() else []
    frame = pd.DataFrame(rows)
    means = frame.groupby(["data", "recipe"])[["lost", "epochs"]].mean()
    cells = means.apply(lambda row: f"{row['lost']:.2f} ({row['epochs']:.0f} %)", axis=1).unstack()[list(RECIPES)]
    of_data = frame[frame["recipe"] == "no stop"].groupby("data")
    cells.insert(0, "runs", of_data.size())
    print(cells.assign(last=of_data["last"].mean().round(2)).to_string())


if __name__ == "__main__":
    main()
