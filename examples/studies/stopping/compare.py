"""What ranks several networks of the same data, each at the epoch that its expected accuracy chose."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from rules import COUNTS, Recorded, draws_of, refined, sample_scores
from scipy.stats import entropy, kendalltau
from torch import Tensor

from lightning_sensitivity.functional.expected import ESTIMATES, WEIGHT


def numbers(run: Recorded, q: Tensor, is_trusted: bool, epoch: int) -> dict[str, list[float]]:
    """Return what each rule says of a network, the lower the better: one number, or one for each draw of labels."""
    p, y = run.predictions("unseen")[epoch], run.found["y_unseen"]
    classes, places, worth = p.argmax(1), np.arange(len(y)), WEIGHT if is_trusted else 0
    expected = float(q.numpy()[places, classes].mean())
    disagreement = float((classes != q.numpy().argmax(1)).mean())
    found = {
        "expected": [-expected * is_trusted],  # equal ones are drawn from
        "disagreement": [disagreement * is_trusted],
        "confidence": [float(entropy(p, axis=1).mean())],
        "random": [0.0],
    }
    scores = sample_scores(run.outputs("unseen")[epoch : epoch + 1], run.labels("y_unseen", p.shape[1]))
    for count in COUNTS:
        rows = draws_of(run, count)
        right = np.array([(classes[each] == y[each]).mean() for each in rows])
        number = min(count, len(y))
        found[f"labels_{count}"] = list(-right)
        found[f"labels_{count}_refined"] = [float(refined(scores, each)[0]) for each in rows]
        found[f"labels_{count}_combined"] = list(-(number * right + worth * expected) / (number + worth))
    return found


def lost(scores: np.ndarray, accuracy: np.ndarray) -> float:
    """Return the points that the first network loses against the best; several first ones share a place."""
    return float(accuracy.max() - accuracy[scores == scores.min()].mean())


def compare(measured: list[dict[str, Any]]) -> pd.DataFrame:
    """Return a row for each group of networks of the same data, from what `judge.py` measured of each."""
    if not measured:
        return pd.DataFrame(columns=["pool", "judge", "version", "group", "table"])
    frame, rows = pd.DataFrame(measured), []
    for (pool, judge, group), part in frame.groupby(["pool", "judge", "group"]):
        accuracy = part["accuracy"].to_numpy()
        table = part["kind"].iloc[0].split(",")[0] if pool == "alike" else f"{pool}-{group}"
        row = {
            "pool": pool,
            "judge": judge,
            "version": ESTIMATES,
            "group": group,
            "table": table,
            "num_models": len(part),
            "best": accuracy.max(),
        }
        for rule in part["numbers"].iloc[0]:
            draws = np.array([each[rule] for each in part["numbers"]]).T
            row[f"{rule}_lost"] = np.mean([lost(scores, accuracy) for scores in draws])
            row[f"{rule}_tau"] = np.mean([np.nan_to_num(kendalltau(scores, -accuracy).statistic) for scores in draws])
        rows.append(row)
    return pd.DataFrame(rows)
