"""Which epoch each rule keeps of a later training, and how many points of test accuracy that loses.

    python examples/studies/bounds/judge.py RUNS --choose  # the design half, by what may choose the earlier epoch
    python examples/studies/bounds/judge.py RUNS           # results.csv and rises.csv
    python examples/studies/tables.py                      # both -> the pages

`results.csv` has a row for each pair, `rises.csv` one for each training. A rule knows what was measured in the earlier
training, whose best epoch 300 labels tell, and sensitivity in the later one, without labels.
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
from rules import Recorded, by_recipe, refined, sample_scores

TIMES = (1, 1.5, 2, 3, 5, 10)  # k
CHOICES = ("accuracy", "loss", "refined")  # by which labels may tell the best epoch
RISES = (2, 5, 10)
LEARNED = 0.9  # of the last training accuracy
Curves = dict[str, np.ndarray]


@cache
def read(file: Path) -> Curves:
    """Read what was measured in a training, and how good each epoch is by 300 labels; lowest is best."""
    with np.load(file) as found:
        curves = dict(found)
    run = recorded(curves)
    outputs, y = run.outputs("unseen")[:, :NUM_LABELS], curves["y_unseen"][:NUM_LABELS]
    few = Recorded({"unseen": outputs.numpy(), "task": np.array("multiclass")})
    curves["by_accuracy"] = -(outputs.argmax(2).numpy() == y).mean(1)
    curves["by_loss"] = few.losses_of("unseen", y)
    scores = sample_scores(outputs, few.as_matrix(y, outputs.shape[2]))
    curves["by_refined"] = refined(scores, torch.arange(len(y)))
    return curves


def recorded(curves: Curves) -> Recorded:
    task = "binary" if curves["unseen"].shape[2] == 1 else "multiclass"
    return Recorded({"unseen": curves["unseen"], "task": np.array(task)})


def sensitivities(curves: Curves) -> Curves:
    """Give what a bound may be on: sensitivity S or that of single outputs, each in three units."""
    found = {}
    for name, key in (("s", "sensitivity"), ("single", "per_output")):
        found[name] = curves[key]
        found[f"{name}_scaled"] = curves[key] / curves["mean_square"]
        found[f"{name}_grown"] = curves[key] / curves[key][0]
    return found


def before(curve: np.ndarray, bound: float) -> int:
    """Return the epoch before a curve passes a bound, as a callback sees it that stops at nan, too."""
    passed = ~(curve <= bound)
    return max(int(passed.argmax()) - 1, 0) if passed.any() else len(curve) - 1


def chosen(earlier: Curves, later: Curves, by: str) -> dict[str, int]:
    """Return the epoch that each rule keeps of the later training."""
    last, best = len(later["test_accuracy"]) - 1, int(earlier[f"by_{by}"].argmin())
    steps = round((best + 1) * float(earlier["steps"] / later["steps"])) - 1
    found = {"never": last, "epoch": best, "steps": min(max(steps, 0), last)}
    found |= {f"labels_{each}": int(later[f"by_{each}"].argmin()) for each in CHOICES}
    of_earlier, of_later = sensitivities(earlier), sensitivities(later)
    for name, curve in of_later.items():
        for times in TIMES:
            found[f"{name}_{100 * times:.0f}"] = before(curve, times * of_earlier[name][best])
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


def sets(runs: Path, *, only_design: bool = False) -> list[tuple[str, int]]:
    """List the data sets all of whose trainings are there."""
    found = [(kind, index) for kind, number in KINDS.items() for index in range(number)]
    return [
        (kind, index)
        for kind, index in found
        if (is_for_design(kind, index) or not only_design)
        and all(file_of(runs, kind, index, each.name).exists() for each in trainings(noise_of(kind, index)))
    ]


def judged(runs: Path, by: str, *, only_design: bool = False) -> pd.DataFrame:
    """Return what each rule loses on each pair, in points."""
    rows = []
    for kind, index in sets(runs, only_design=only_design):
        of_name = {each.name: each for each in trainings(noise_of(kind, index))}
        for change, (first, second) in pairs(noise_of(kind, index)).items():
            earlier, later = (read(file_of(runs, kind, index, name)) for name in (first, second))
            epochs = chosen(earlier, later, by)
            reference = reference_file(runs, kind, index, of_name[second])
            if reference.exists():
                epochs["recipe"] = by_reference(later, reference)
            lost = 100 * (later["test_accuracy"].max() - later["test_accuracy"])
            row = {"kind": kind, "table": f"{kind} {index}", "change": change, "is_design": is_for_design(kind, index)}
            rows.append(row | {rule: round(float(lost[epoch]), 2) for rule, epoch in epochs.items()})
    return pd.DataFrame(rows)


def risen(runs: Path) -> pd.DataFrame:
    """Return how far test accuracy falls until sensitivity has risen so many times, since most was learned."""
    rows = []
    for kind, index in sets(runs):
        for training in trainings(noise_of(kind, index)):
            curves = read(file_of(runs, kind, index, training.name))
            learned = int((curves["train_accuracy"] >= LEARNED * curves["train_accuracy"][-1]).argmax())
            sensitivity, accuracy = curves["sensitivity"][learned:], 100 * curves["test_accuracy"][learned:]
            row = {"kind": kind, "table": f"{kind} {index}", "training": training.name}
            for times in RISES:
                is_risen = sensitivity >= times * sensitivity[0]
                fall = accuracy[0] - accuracy[int(is_risen.argmax())] if is_risen.any() else np.nan
                row[f"fall_{times}"] = round(float(fall), 2)
            rows.append(row | {"fall_end": round(float(accuracy[0] - accuracy[-1]), 2)})
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Judge the rules on the pairs of trainings.")
    parser.add_argument("runs", type=Path)
    parser.add_argument("--choose", action="store_true", help="print the design half alone, for each way to choose")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    arguments = parser.parse_args()
    if arguments.choose:
        for by in CHOICES:
            found = judged(arguments.runs, by, only_design=True).groupby("change").mean(numeric_only=True).T
            print(f"\nearlier epoch by {by}\n{found.assign(mean=found.mean(axis=1)).round(2).to_string()}")
        return
    judged(arguments.runs, BY).to_csv(arguments.out / "results.csv", index=False)
    risen(arguments.runs).to_csv(arguments.out / "rises.csv", index=False)


BY = "refined"  # lowest on the design half

if __name__ == "__main__":
    main()
