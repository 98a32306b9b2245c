"""The rules of the study: scores of a task's candidates, lowest for the one to choose. Frozen before a look at any run.

    python examples/studies/comparing/judges.py RUNS results.csv     # applies them to what record.py has left

What the report promises or misses was fixed with them: over all tasks the jury with the reference loses at most 1.5
points of test accuracy, no more than 100 noisy labels (the interval of the difference holds 0 or lies below it), and
less than mean confidence and than the lowest criterion where n is 3,000 or more; where candidates are of several
families, its τ with the true error is at least 0.75.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

Array = NDArray[Any]
NUM_LABELS = (20, 50, 100, 200)
NUM_DRAWS = 200  # of labelled samples
LABEL_WEIGHT = 100  # how many labels the jury counts as
CRITERION_WEIGHT = 2
FIRST_OF_CHECK = 72  # this rule was chosen on the tasks before this one, and fixed before a look at those from it on
SMALL = 1e-12
CRITERIA = ("71489a3", "estimate", "today")  # that of the commit with which runs were made, and those of `again.py`


@dataclass
class Handful:
    """What a rule may look at, and the truth, which none does."""

    task: dict[str, Any]
    p: Array  # probabilities for the unlabelled samples, (models, samples, classes), each at its chosen epoch
    criterion: Array  # lowest over epochs, (models,)
    sensitivity: Array
    reference: Array  # for the unlabelled samples, (samples, classes)
    share_known: float  # min(1, m / n), of the training samples
    wrong: dict[str, Array]  # whether predictions differ from "correct" and "noisy" labels, (models, samples)
    error: Array  # true, on test samples, (models,)
    p_test: Array
    reference_test: Array
    y_test: Array


def load(folder: Path, criterion: str) -> Handful:
    """Load a task, each candidate at its epoch of the lowest criterion, without those that give nan."""
    task = dict(np.load(folder / "task.npz"))
    runs = [load_candidate(folder, index, criterion) for index in range(len(task["candidates"]))]
    runs = [run for run in runs if np.isfinite(run["unseen"][run["epoch"]]).all()]
    p = np.stack([softmax(run["unseen"][run["epoch"]]) for run in runs])
    p_test = np.stack([softmax(run["test"]) for run in runs])
    predicted = p.argmax(2)
    return Handful(
        task=task,
        p=p,
        criterion=np.array([np.nanmin(run["val_risk_criterion"]) for run in runs]),
        sensitivity=np.array([float(run["sensitivity"]) for run in runs]),
        reference=task["reference_unseen"],
        share_known=min(1.0, float(task["num_known"] / task["n"])),
        wrong={name: predicted != task[f"unseen_{name}"] for name in ("correct", "noisy")},
        error=(p_test.argmax(2) != task["test_labels"]).mean(1),
        p_test=p_test,
        reference_test=task["reference_test"],
        y_test=task["test_labels"],
    )


def load_candidate(folder: Path, index: int, criterion: str) -> dict[str, Array]:
    """Load what is kept of a candidate, with its epoch by a criterion."""
    run = dict(np.load(folder / f"{index}.npz"))
    return run if criterion == CRITERIA[0] else run | dict(np.load(folder / f"{index}.{criterion}.npz"))


def softmax(logits: Array) -> Array:
    found: Array = torch.tensor(logits.astype(np.float64)).softmax(-1).numpy()
    return found


# %% Juries.
def sharpened(reference: Array, p: Array) -> Array:
    """Sharpen a reference until its mean largest probability is the share of models that predict its class."""
    share = float((p.argmax(2) == reference.argmax(1)).mean())
    share = min(max(share, 1.2 / p.shape[2]), 0.995)
    log_r = np.log(reference.clip(SMALL))
    low, high = 0.05, 20.0
    for _ in range(20):
        scale = math.sqrt(low * high)
        is_unsure = softmax(scale * log_r).max(1).mean() < share
        low, high = (scale, high) if is_unsure else (low, scale)
    return softmax(math.sqrt(low * high) * log_r)


def with_reference(p: Array, reference: Array, share_known: float) -> Array:
    """Add the reference to the sum of probabilities; it is sharpened on its own samples."""
    found: Array = p.sum(0) + len(p) / 2 * share_known * sharpened(reference, p)
    return found


def disagreement(p: Array, verdict: Array) -> Array:
    """Give the share of samples for which each model predicts another class."""
    found: Array = (p.argmax(2) != verdict).mean(1)
    return found


def consensus_error(p: Array) -> Array:
    """Give what `compare_models` computed before: expected errors by the product of calibrated votes (71489a3)."""
    votes = np.zeros(p.shape[1:])
    for index, own in enumerate(p):
        others = np.delete(p, index, 0)
        votes += np.log(sharpened(own, others).clip(SMALL))
    joint = softmax(votes)
    predicted = p.argmax(2)[..., None]
    found: Array = 1 - np.take_along_axis(np.broadcast_to(joint, p.shape), predicted, 2)[..., 0].mean(1)
    return found


def scores(handful: Handful) -> dict[str, Array]:
    """Give the scores of all rules that need no label; lowest is best."""
    p, reference = handful.p, handful.reference
    found = {
        "jury": disagreement(p, with_reference(p, reference, handful.share_known).argmax(1)),
        "jury_without_reference": disagreement(p, p.mean(0).argmax(1)),
        "reference": disagreement(p, reference.argmax(1)),
        "consensus_error": consensus_error(p),
        "criterion": handful.criterion,
        "confidence": -p.max(2).mean(1),
        "random": np.zeros(len(p)),
    }
    found["jury_and_criterion"] = found["jury"] + CRITERION_WEIGHT * handful.criterion  # see FIRST_OF_CHECK
    if np.isfinite(handful.sensitivity).all():
        found["sensitivity"] = handful.sensitivity
    return found


# %% What a rule is worth.
def lost(scores: Array, error: Array) -> float:
    """Give the points of accuracy that choices lose against the best candidate; ties are broken at random.

    Args:
        scores: For a number of draws, ``(draws, models)``.
        error: True errors, ``(models,)``.
    """
    chosen = scores <= scores.min(1, keepdims=True) + SMALL
    return float(100 * ((chosen * error).sum(1) / chosen.sum(1) - error.min()).mean())


def tau(scores: Array, error: Array) -> float:
    """Give Kendall's τ-b with the true error, the mean over draws; 0 where all scores are equal."""
    signs, true_signs = (np.sign(each[..., :, None] - each[..., None, :]) for each in (scores, error))
    num_untied = np.sqrt(np.abs(signs).sum((1, 2)) * np.abs(true_signs).sum())
    return float(((signs * true_signs).sum((1, 2)) / np.maximum(num_untied, 1)).mean())


def judge(handful: Handful) -> Iterator[tuple[str, float, float]]:
    """Give a rule, what its choice loses, and its τ, rule by rule."""
    found = scores(handful)
    for name, score in found.items():
        yield name, lost(score[None], handful.error), tau(score[None], handful.error)
    r = np.random.RandomState(0)
    jury = found["jury"]
    for labels, wrong in handful.wrong.items():
        for number in NUM_LABELS:
            places = [r.permutation(wrong.shape[1])[:number] for _ in range(NUM_DRAWS)]
            by_labels = np.stack([wrong[:, place].mean(1) for place in places])
            yield f"labels_{number}_{labels}", lost(by_labels, handful.error), tau(by_labels, handful.error)
            if labels == "noisy":
                joint = (number * by_labels + LABEL_WEIGHT * jury) / (number + LABEL_WEIGHT)
                yield f"jury_and_{number}_labels", lost(joint, handful.error), tau(joint, handful.error)
    p, y = handful.p_test, handful.y_test
    means = {"mean_of_all": p.sum(0)}
    means["mean_with_reference"] = with_reference(p, handful.reference_test, handful.share_known)
    means["reference_deployed"] = handful.reference_test
    for name, mean in means.items():
        yield name, float(100 * ((mean.argmax(1) != y).mean() - handful.error.min())), math.nan


def table(runs: Path) -> pd.DataFrame:
    """Judge all tasks; a row for each task and criterion."""
    rows = []
    for folder, criterion in product(sorted(runs.glob("task_*")), CRITERIA):
        if not (folder / "task.npz").exists():
            continue
        handful = load(folder, criterion)
        task = handful.task
        families = "several" if "several families" in str(task["candidates"][0]) else "one"
        about = {name: task[name].item() for name in ("seed", "kind", "labels", "n")}
        about |= {"families": families, "criterion": criterion}
        measured = {rule: {"accuracy_lost": lost, "tau": tau} for rule, lost, tau in judge(handful)}
        rows.append(about | {f"{rule}_{name}": x for rule, found in measured.items() for name, x in found.items()})
    return pd.DataFrame(rows).rename(columns={"seed": "task"})


if __name__ == "__main__":
    torch.set_num_threads(1)
    table(Path(sys.argv[1])).to_csv(sys.argv[2], index=False, float_format="%.4g")
