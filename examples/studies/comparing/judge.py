"""Judges what ranks the models of each task: by Kendall's tau with the test error, and by the accuracy that is lost.

python examples/studies/comparing/judge.py RUNS results.csv
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from torch import Tensor

from lightning_sensitivity.functional import refined_score

NUM_DRAWS = 20  # of labels
NUM_LABELS = (50, 100, 200)
LABELS_OF_REFERENCE = 200  # as in `compare_models`


def scores_of(run: dict[str, Any], r: np.random.RandomState) -> dict[str, list[Tensor]]:
    """Return a score of each model, the lower the better, by each rule, and for each draw of labels."""
    logits, reference = run["unseen"], run["reference"]
    is_refused = isinstance(run["compared"], str)
    found = [0.0 if is_refused else run["compared"][name]["disagreement"] for name in run["names"]]
    disagreements = torch.tensor(found, dtype=torch.float64)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean(1)
    scores = {
        "compare": [disagreements],
        "distance": [torch.tensor([refined_score(each, reference).score for each in logits])],
        "confidence": [entropy],
        "random": [torch.zeros(len(logits))],
    }
    is_wrong = (logits.argmax(2) != run["y_unseen"]).double()
    for number in NUM_LABELS:
        drawn = [torch.from_numpy(r.permutation(logits.shape[1])[:number]) for _ in range(NUM_DRAWS)]
        errors = [is_wrong[:, each].sum(1) for each in drawn]
        weight = 0 if is_refused else LABELS_OF_REFERENCE
        scores[f"labels_{number}"] = [each / number for each in errors]
        scores[f"both_{number}"] = [(each + weight * disagreements) / (number + weight) for each in errors]
        if number == 100:
            scores["refined_100"] = [refined_of(logits[:, each], run["y_unseen"][each]) for each in drawn]
    return scores


def refined_of(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.tensor([refined_score(each, labels).score for each in logits])


def lost(scores: Tensor, errors: Tensor) -> float:
    """Return the points of accuracy that the first model loses against the best; several first ones share a place."""
    return float(100 * (errors[scores == scores.min()].mean() - errors.min()))


def tau(scores: Tensor, errors: Tensor) -> float:
    """Return Kendall's tau-b; 0 if all scores are equal."""
    return float(np.nan_to_num(kendalltau(scores.numpy(), errors.numpy()).statistic))


def judge(run: dict[str, Any], number: int) -> dict[str, Any]:
    """Return the row of a task."""
    errors = (run["test"].argmax(2) != run["y_test"]).double().mean(1)
    mean_of_all = run["test"].softmax(2).mean(0).argmax(1)
    row = {name: run[name] for name in ("kind", "data", "redrawn", "num_training", "skill", "is_trusted")}
    row = {"task": number} | row | {"num_models": len(errors), "best_error": float(100 * errors.min())}
    row["mean_of_all_lost"] = float(100 * ((mean_of_all != run["y_test"]).double().mean() - errors.min()))
    if not isinstance(run["compared"], str):
        may_be_best = torch.tensor([run["compared"][name]["may_be_best"] for name in run["names"]])
        row["may_be_best"] = int(may_be_best.sum())
        row["has_best"] = float((errors[may_be_best] == errors.min()).any())
        row["left_lost"] = float(100 * (errors[may_be_best].min() - errors.min()))
    for rule, draws in scores_of(run, np.random.RandomState((51, 26, number))).items():
        row[f"{rule}_lost"] = float(np.mean([lost(each, errors) for each in draws]))
        row[f"{rule}_tau"] = float(np.mean([tau(each, errors) for each in draws]))
    return row


def main() -> None:
    runs, table = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    rows = [judge(torch.load(file), int(file.stem)) for file in sorted(runs.glob("*.pt"))]
    pd.DataFrame(rows).to_csv(table, index=False, float_format="%.4g")


if __name__ == "__main__":
    main()
