"""Which epoch each rule keeps of a final training, and what that loses.

    python examples/studies/bounds/judge.py RUNS --choose  # the design half alone
    python examples/studies/bounds/judge.py RUNS           # results.csv.gz, a row for each pair
    python examples/studies/tables.py                      # results.csv.gz -> the pages

A rule knows what was measured in the earlier training, with 300 labels for validation, and in the later one what needs
no validation labels. All that it takes from the earlier one is of one epoch: the best by loss or accuracy, or the last
that is within the curve's own noise of the best. If that is the last of all, no rule stops. Frozen on the design half,
before the check half was looked at: that last epoch, by the loss, and (t / t*) (S / S*) > 1 with t in epochs.
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
from rules import Recorded, by_recipe, epochs_run, gain_curve

PATIENCE = (3, 5, 10)  # with which a tuning run may have ended
BY_PATIENCE = ("clocks", "clocks_15", "epochs", "bound")  # judged with such runs, too
CONDITION = 0.05  # S alone stops nothing where the earlier validation loss rose by less at its end
Curves = dict[str, np.ndarray]


@cache
def read(file: Path) -> Curves:
    """Read what was measured in a training, and loss and wrong answers of each epoch on 300 labels; low is good."""
    with np.load(file) as found:
        curves = dict(found)
    few = Recorded({"unseen": curves["unseen"][:, :NUM_LABELS], "task": curves["task"]})
    y = curves["y_unseen"][:NUM_LABELS]
    curves["loss"] = few.losses_of("unseen", y)
    if few.task != "regression":
        curves["accuracy"] = -gain_curve("accuracy", few.predictions("unseen"), y)
    return curves


def first(condition: np.ndarray) -> int:
    """Return the first epoch for which a condition holds, or the last one."""
    return int(condition.argmax()) if condition.any() else len(condition) - 1


def passing(curve: np.ndarray, bound: float) -> int:
    """Return the epoch in which a curve passes a bound, where `EarlyStopping` stops; it stops at nan, too."""
    return first(~(curve <= bound))


def last_best(curve: np.ndarray, times: float = 1) -> int:
    """Return the last epoch whose value is within the curve's own noise of the lowest."""
    changes = np.diff(curve)
    noise = 1.4826 * np.median(np.abs(changes - np.median(changes))) / np.sqrt(2)
    return int(np.flatnonzero(curve <= curve.min() + times * noise)[-1])


def stops(earlier: Curves, later: Curves, best: int, rise: float) -> dict[str, int]:
    """Return where each rule stops the later training, by what was measured in one epoch of the earlier one."""
    last = len(later["per_output"]) - 1
    epochs = np.arange(1, last + 2) / (best + 1)
    sensitivity = later["per_output"] / earlier["per_output"][best]
    steps = epochs * float(later["steps"] / earlier["steps"])
    return {
        "clocks": passing(epochs * sensitivity, 1),
        "clocks_15": passing(epochs * sensitivity, 1.5),
        "clocks_steps": passing(steps * sensitivity, 1),
        "epochs": first(epochs >= 1),
        "epochs_15": first(epochs >= 1.5),
        "steps": first(steps >= 0.999),
        "train_loss": first(later["train_loss"] <= earlier["train_loss"][best]),
        "bound": passing(sensitivity, 2) if rise >= CONDITION else last,
    }


def chosen(earlier: Curves, later: Curves) -> dict[str, int]:
    """Return the epoch that each rule keeps of the later training, by MONITOR_PATIENCE_PLACE_RULE."""
    last = len(later["per_output"]) - 1
    found = {"never": last}
    for monitor in [each for each in ("loss", "accuracy") if each in earlier]:
        found[f"{monitor}_labels"] = int(later[monitor].argmin())
        for patience in (0, *PATIENCE):
            whole = earlier[monitor]
            number = epochs_run(whole, patience / len(whole)) if patience else len(whole)
            curve, losses = whole[:number], earlier["loss"][:number]
            places = {"best": int(curve.argmin()), "noise": last_best(curve), "wide": last_best(curve, 2)}
            for place, best in places.items():
                may_stop = place == "best" or best < number - 1
                for rule, epoch in stops(earlier, later, best, losses[-1] / losses.min() - 1).items():
                    if rule in BY_PATIENCE or not patience:
                        found[f"{monitor}_{patience}_{place}_{rule}"] = epoch if may_stop else last
    return found


def by_reference(later: Curves, file: Path) -> int:
    """Return the epoch of `RiskMonitor`'s recipe, or the last one, where the reference sees too little."""
    with np.load(file) as found:
        q = torch.tensor(found["reference"])
    if not bool(q.isfinite().all()):
        return len(later["per_output"]) - 1
    run = Recorded(later)
    curves = {"loss": run.losses("unseen", q)}
    if run.task != "regression":  # as `expected_metric` counts them
        hits = run.outputs("unseen").argmax(2)[:, None] == draw_labels(q, "multiclass")
        curves["accuracy"] = hits.double().mean((1, 2)).numpy()
    return by_recipe(curves)


def judged(runs: Path, *, only_design: bool = False) -> pd.DataFrame:
    """Return what each rule loses on each pair: points of accuracy, or percent of the squared error."""
    rows = []
    places = [(kind, index) for kind, number in KINDS.items() for index in range(number)]
    for kind, index in [(kind, index) for kind, index in places if is_for_design(index) or not only_design]:
        of_name = {each.name: each for each in trainings(noise_of(kind, index))}
        for change, names in pairs(noise_of(kind, index)).items():
            files = [file_of(runs, kind, index, name) for name in names]
            if not all(file.exists() for file in files):
                continue
            earlier, later = map(read, files)
            epochs = chosen(earlier, later)
            reference = reference_file(runs, kind, index, of_name[names[1]])
            if reference.exists():
                epochs["recipe"] = by_reference(later, reference)
            errors, lowest = later["test_error"], later["test_error"].min()
            if not np.isfinite(errors).all():  # a training that diverged
                continue
            lost = 100 * (errors / lowest - 1 if later["task"] == "regression" else errors - lowest)
            table = f"{kind.removesuffix(' noisy')} {index}"
            row = {"kind": kind, "table": table, "change": change, "is_design": is_for_design(index)}
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
        print(found.groupby("kind", sort=False).mean(numeric_only=True).T.round(2).to_string())
        return
    found.to_csv(arguments.out / "results.csv.gz", index=False)


if __name__ == "__main__":
    main()
