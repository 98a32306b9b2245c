"""Where a reference says that the inputs of a table tell nothing of its labels: is that so, and what does it cost?

    python examples/studies/nothing/nothing.py DATA tables  # of tables.txt; DATA: as for ../stopping
    python examples/studies/nothing/nothing.py DATA made    # labels by chance, and by rules that are hard to find
    python examples/studies/tables.py                       # results.csv -> the page

Of a table 600 rows with a fifth of the labels redrawn, or 2,000 with three fifths, train an MLP and a reference. What
is lost by the last epoch and by what the reference expects is measured on test labels, as they are. A logistic
regression on up to 6,000 rows of the same labels says, by its left-out AUROC, whether there is something to know.
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
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import cross_val_predict
from torch import Tensor

sys.path.append(str(Path(__file__).parents[1] / "stopping"))
import data
import record
from rules import Recorded, expected_curves, gain_curve, lowest
from runs import _mlp_run, redrawn

from lightning_sensitivity.reference.reference import Reference

SETTINGS = ((600, 0.2), (2000, 0.6))  # rows in training, and the share of labels that is redrawn
MOST_ROWS, NUM_SEEDS, NUM_OTHERS = 6000, 10, 3000
KEYS = ["part", "name", "n", "share", "seed"]  # of a run; what is there is not run again
Row = dict[str, Any]
RULES: dict[str, tuple[tuple[int, ...], Callable[[np.ndarray], np.ndarray]]] = {  # rows, and the chance of class 1
    "chance alone": ((120, 600, 2000), lambda x: np.full(len(x), 0.3)),
    "1 % positive, linear": ((600,), lambda x: logistic(1.5 * x[:, 0] + x[:, 1] - 6)),
    "a sign, nine in ten labels redrawn": ((600,), lambda x: 0.45 + 0.1 * (x[:, 0] > 0)),
    "weak linear": ((500,), lambda x: logistic(0.5 * x.sum(1) / x.shape[1] ** 0.5)),
    "parity of three signs": ((500,), lambda x: (x[:, :3] > 0).sum(1) % 2.0),
    "parity of four signs": ((500,), lambda x: (x[:, :4] > 0).sum(1) % 2.0),
}


def logistic(z: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-z)))


def area(x: Tensor, y: Tensor) -> float:
    """Return the left-out AUROC of a logistic regression, the mean over classes."""
    rows = np.random.RandomState(0).permutation(len(y))[:MOST_ROWS]
    model = LogisticRegression(C=0.1, max_iter=200)
    p = cross_val_predict(model, x[rows], y[rows], cv=3, method="predict_proba")
    return float(np.mean([roc_auc_score(y[rows] == k, p[:, place]) for place, k in enumerate(y[rows].unique())]))


def of_tables(folder: Path) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give the runs of the tables."""
    for place, (n, share) in enumerate(SETTINGS):
        for number, line in enumerate(Path(__file__).with_name("tables.txt").read_text().splitlines()):
            about = {"name": line.split()[1], "n": n, "share": share, "seed": 0}
            yield about, lambda each=(number, line, place, n, share): of_table(folder, *each)


def of_table(folder: Path, number: int, line: str, place: int, n: int, share: float) -> Row:
    """Train a network and a reference on some rows of a table, and say what each rule loses."""
    r = np.random.RandomState((number, place, 78))
    x, y = data.table(line, folder)
    noisy = redrawn(r, y, share)
    run = _mlp_run(r, "nothing", number, number, x, noisy, y, "multiclass", line, n)
    reference = Reference().fit(run.x, run.y)
    recorded = Recorded({**record.train(run), "task": run.task})
    p, labels = recorded.predictions("test"), run.y_test.numpy()
    q = torch.zeros(len(run.x_unseen), p.shape[2], dtype=torch.float64)
    q[:, reference.classes_] = torch.from_numpy(reference.predict_proba(run.x_unseen))
    curves = expected_curves(recorded, reference, q, ["accuracy", "auc"])
    if reference.inputs_tell_nothing_:
        curves["auc"][:] = 0.5  # labels that depend on nothing
    losses = recorded.losses_of("test", run.noisy_test.numpy())
    found = said(reference) | {"rows": len(run.y), "of_all_rows": area(x, noisy), "last_loss_lost": lost(-losses, -1)}
    found["by_loss_loss_lost"] = lost(-losses, chosen(-curves["loss"], reference))
    for name in ("accuracy", "auc"):
        gains = 100 * gain_curve(name, p, labels)
        found[f"last_{name}_lost"] = gains.max() - gains[-1]
        found[f"by_{name}_{name}_lost"] = gains.max() - gains[chosen(curves[name], reference)]
    return found


def chosen(curve: np.ndarray, reference: Reference) -> int:
    """Return the epoch of the highest value; the last one where all are equal, or none is expected."""
    return lowest(-curve) if reference.is_trusted_ and np.ptp(curve) > 0 else len(curve) - 1


def lost(gains: np.ndarray, epoch: int) -> float:
    """Return by how many percent a loss, with a minus sign, is above the lowest."""
    return float(100 * (gains[epoch] / gains.max() - 1))


def said(reference: Reference) -> Row:
    return {"tells_nothing": reference.inputs_tell_nothing_, "skill": reference.skill_, "learner": reference.learner_}


def of_made(folder: Path) -> Iterator[tuple[Row, Callable[[], Row]]]:
    """Give the made tables."""
    for name, (sizes, rule) in RULES.items():
        for n in sizes:
            for seed in range(2 * NUM_SEEDS if name == "chance alone" else NUM_SEEDS):
                about = {"name": name, "n": n, "share": 0.0, "seed": seed}
                yield about, lambda each=(rule, n, seed): of_rule(*each)


def of_rule(rule: Callable[[np.ndarray], np.ndarray], n: int, seed: int) -> Row:
    """Fit a reference to labels by a rule; the AUROC is that of who knows the rule."""
    r = np.random.RandomState((seed, n, 79))
    x = r.randn(n + NUM_OTHERS, 10)
    p = rule(x)
    y = (r.rand(len(x)) < p).astype(int)
    return said(Reference("binary").fit(x[:n].astype("float32"), y[:n])) | {
        "rows": n,
        "of_all_rows": roc_auc_score(y, p),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("part", choices=["tables", "made"])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results.csv"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    rows = pd.read_csv(arguments.out).to_dict("records") if arguments.out.exists() else []
    there = {tuple(row[key] for key in KEYS) for row in rows}
    for about, measure in {"tables": of_tables, "made": of_made}[arguments.part](arguments.data):
        row = {"part": arguments.part, **about}
        if tuple(row.values()) not in there:
            rows.append(row | measure())
            print(rows[-1], flush=True)
            pd.DataFrame(rows).to_csv(arguments.out, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
