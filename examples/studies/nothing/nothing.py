"""Where a reference of a table knows no more than the shares of the classes: is there nothing to know, and since when?

    python examples/studies/nothing/nothing.py DATA few   # of how few labels it may be said; DATA: as for ../stopping
    python examples/studies/nothing/nothing.py DATA made  # rules that a network may find where no reference does
    python examples/studies/nothing/nothing.py DATA kept  # tables of kept.txt, which nothing here was tuned on
    python examples/studies/tables.py                     # results.csv -> the pages

`few` fits references to few rows of the tables of the study of stopping. Where one has no skill, and where a rule was
made, a network is trained, and what is lost is measured: by the last epoch, and by what is expected of labels that are
drawn by their shares. A made table has 20 columns, and one label of two classes for each of 500 or more rows. Kept
tables are trained on as they are, and with a fifth of the labels redrawn; there the reference chooses, by the shares
where it has no skill.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "stopping"))
import data
import record
from rules import Recorded, loss, lowest
from runs import Run, _mlp_run, redrawn

from lightning_sensitivity.reference import Reference

SIZES = (15, 30, 60, 120, 250, 500)  # rows in training
RULES: dict[str, Callable[[Tensor], Tensor]] = {
    "sign of a product": lambda x: (x[:, 0] * x[:, 1] > 0).long(),
    "parity of four bits": lambda x: (x[:, :4] > 0).sum(1) % 2,
    "parity of three bits": lambda x: (x[:, :3] > 0).sum(1) % 2,
    "parity of two bits": lambda x: (x[:, :2] > 0).sum(1) % 2,
}
NUM_ROWS, NUM_MADE = (500, 2000), 4  # of made tables, and how many networks of each
KEYS = ("part", "name", "n", "share", "seed")  # of a run; what is there is not run again
Row = dict[str, Any]


def runs_of_few(folder: Path) -> Iterator[tuple[Row, Run]]:
    """Draw few rows of each table: labels as they are, and a fifth redrawn."""
    small, _ = data.table_lines()
    for line in sorted(range(len(small)), key=lambda each: each % 3):
        for place, n in enumerate(SIZES):
            for share in (0.0, 0.2):
                r = np.random.RandomState((line, place, int(10 * share), 61))
                x, y = data.table(small[line], folder)
                run = _mlp_run(r, "nothing", line, line, x, redrawn(r, y, share), y, "multiclass", "", n)
                about = {"name": small[line].split()[1], "n": n, "share": share, "seed": 0}
                yield about | {"is_design": run.is_design}, run


def runs_of_made(folder: Path) -> Iterator[tuple[Row, Run]]:
    """Draw columns that are standard normal, or signs, and networks."""
    for name, rule in RULES.items():
        for n in NUM_ROWS:
            for seed in range(NUM_MADE):
                r = np.random.RandomState((seed, n, 62))
                x = torch.tensor(r.randn(10_000, 20)).float()
                x = x if "product" in name else x.sign()
                run = _mlp_run(r, "nothing", seed, seed, x, rule(x), rule(x), "multiclass", "", n)
                run.epochs = 100
                yield {"name": name, "n": n, "share": 0.0, "seed": seed, "is_design": False}, run


def runs_of_kept(folder: Path) -> Iterator[tuple[Row, Run]]:
    """Draw networks and rows of kept tables: labels as they are, and a fifth redrawn."""
    for place, line in enumerate(Path(__file__).with_name("kept.txt").read_text().splitlines()):
        for share in (0.0, 0.2):
            r = np.random.RandomState((place, int(10 * share), 63))
            x, y = data.table(line, folder)
            run = _mlp_run(r, "nothing", place, place, x, redrawn(r, y, share), y, "multiclass", "")
            yield {"name": line.split()[1], "n": 0, "share": share, "seed": 0, "is_design": False}, run


def measure_kept(run: Run) -> Row:
    """Say what is lost by what the reference expects, or, as before, by the last epoch where it knows nothing."""
    reference = Reference().fit(run.x, run.y)
    recorded = Recorded({name: each for name, each in record.train(run).items()} | {"task": run.task})
    p, y = recorded.predictions("test"), run.y_test.numpy()
    accuracies = np.array([(each.argmax(1) == y).mean() for each in p])
    losses = np.array([loss(each, run.noisy_test.numpy()) for each in p])
    q = np.zeros((len(run.x_unseen), p.shape[2]))
    q[:, reference.classes_] = reference.predict_proba(run.x_unseen)
    curve = recorded.losses("unseen", torch.tensor(q))
    said = recorded.predictions("unseen").argmax(2)
    hits = np.array([np.take_along_axis(q, each[:, None], 1).mean() for each in said])
    by_accuracy = lowest(-hits) if len(set(hits)) > 1 else len(hits) - 1
    found: Row = {"skill": reference.skill_, "learner": reference.learner_, "majority": reference.majority_}
    found |= {"best_accuracy": accuracies.max(), "best_loss": losses.min()}
    found["level_error"] = 100 * np.abs(hits - (p.argmax(2) == run.noisy_test.numpy()).mean(1)).mean()
    of_labels = recorded.losses_of("unseen", run.y_unseen.numpy())
    epochs = {"last": -1, "by_loss": lowest(curve), "by_accuracy": by_accuracy, "labels_600": lowest(of_labels)}
    for rule, epoch in epochs.items():
        found[f"{rule}_accuracy_lost"] = 100 * (accuracies.max() - accuracies[epoch])
        found[f"{rule}_loss_lost"] = 100 * (losses[epoch] / losses.min() - 1)
    return found


def measure(run: Run, is_made: bool) -> Row:
    """Say what a reference knows, and what is lost without it, and by the shares of the classes."""
    reference = Reference().fit(run.x, run.y)
    of_majority = float(run.y.bincount().max()) / len(run.y)
    found: Row = {"skill": reference.skill_, "learner": reference.learner_, "majority": of_majority}
    if reference.skill_ > 0 and not is_made:
        return found
    recorded = Recorded({name: each for name, each in record.train(run).items()} | {"task": run.task})
    p, y = recorded.predictions("test"), run.y_test.numpy()
    accuracies = np.array([(each.argmax(1) == y).mean() for each in p])
    losses = np.array([loss(each, run.noisy_test.numpy()) for each in p])
    shares = run.y.bincount(minlength=p.shape[2]) / len(run.y)
    found |= {"best_accuracy": accuracies.max(), "best_loss": losses.min()}
    by_loss = lowest(recorded.losses("unseen", shares.expand(len(run.x_unseen), -1)))
    hits = shares.numpy()[recorded.predictions("unseen").argmax(2)].mean(1)
    by_accuracy = lowest(-hits) if len(set(hits)) > 1 else len(hits) - 1  # nothing is chosen where all are equal
    for rule, epoch in {"last": -1, "by_loss": by_loss, "by_accuracy": by_accuracy}.items():
        found[f"{rule}_accuracy_lost"] = 100 * (accuracies.max() - accuracies[epoch])
        found[f"{rule}_loss_lost"] = 100 * (losses[epoch] / losses.min() - 1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("part", choices=["few", "made", "kept"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = pd.read_csv(arguments.out).to_dict("records") if arguments.out.exists() else []
    there = {tuple(row[key] for key in KEYS) for row in rows}
    parts = {"few": runs_of_few, "made": runs_of_made, "kept": runs_of_kept}
    for about, run in parts[arguments.part](arguments.data):
        row = {"part": arguments.part, **about}
        if tuple(row[key] for key in KEYS) in there:
            continue
        found = measure_kept(run) if arguments.part == "kept" else measure(run, arguments.part == "made")
        rows.append({**row, "rows": len(run.y), **found})
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(arguments.out, index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
