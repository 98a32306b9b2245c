"""Compares calibrations of a reference on the design half, where the one that the package has was chosen.

    python calibrations.py RUNS DATA

Written for commit 57b7d4e, whose references are as they were fitted. Each is fitted to left-out predictions of training
samples and their labels; nothing of the check half is read.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from judge import fit, training_rows
from pools import draw
from rules import Recorded, lowest, reference_says
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from lightning_sensitivity.functional import expected_score
from lightning_sensitivity.functional.tasks import find_task, of_all_classes

Calibrate = Callable[[np.ndarray], np.ndarray]
POWERS = 2.0 ** (np.arange(-3, 15) / 4)
SHARES = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5])  # of a uniform distribution
POOLS = ("tables", "few", "texts", "photos", "redrawn")


def powered(q: np.ndarray, power: float) -> np.ndarray:
    found = np.maximum(q, 1e-6) ** power
    return found / found.sum(1, keepdims=True)


def brier(q: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(q - y).sum(1).mean())


def none(q: np.ndarray, y: np.ndarray) -> Calibrate:
    return lambda new: new


def temperature(q: np.ndarray, y: np.ndarray) -> Calibrate:
    power = min(POWERS, key=lambda each: brier(powered(q, each), y))
    return lambda new: powered(new, power)


def temperature_by_likelihood(q: np.ndarray, y: np.ndarray) -> Calibrate:
    power = min(POWERS, key=lambda each: -float((y * np.log(powered(q, each))).sum()))
    return lambda new: powered(new, power)


def temperature_and_share(q: np.ndarray, y: np.ndarray) -> Calibrate:
    """One temperature, and a share r that is uniform, by the Brier score."""
    pairs = [(power, share) for power in POWERS for share in SHARES]
    power, r = min(pairs, key=lambda each: brier((1 - each[1]) * powered(q, each[0]) + each[1] / q.shape[1], y))
    return lambda new: (1 - r) * powered(new, power) + r / new.shape[1]


def slope_and_share(q: np.ndarray, y: np.ndarray) -> Calibrate:
    """(1 - r) softmax(log s + b (q - s)) + r / K, by likelihood; s are the classes' shares."""
    s = np.maximum(y.mean(0), 1e-6)

    def form(numbers: np.ndarray, new: np.ndarray) -> np.ndarray:
        b, r = np.exp(numbers[0]), 1 / (1 + np.exp(-numbers[1]))
        return (1 - r) * softmax(np.log(s) + b * (new - s), 1) + r / new.shape[1]

    found = minimize(lambda each: -(y * np.log(form(each, q))).sum() / len(y), [1.0, -3.0], method="Nelder-Mead").x
    return lambda new: form(found, new)


def each_class(make: Callable[[np.ndarray, np.ndarray], Calibrate]) -> Callable[[np.ndarray, np.ndarray], Calibrate]:
    """Calibrate one class against all others, and scale to a sum of 1, as scikit-learn does."""

    def calibrate(q: np.ndarray, y: np.ndarray) -> Calibrate:
        each = [make(q[:, k], y[:, k]) for k in range(q.shape[1])]

        def apply(new: np.ndarray) -> np.ndarray:
            found = np.stack([of_class(new[:, k]) for k, of_class in enumerate(each)], 1) + 1e-9
            return found / found.sum(1, keepdims=True)

        return apply

    return calibrate


def isotonic(q: np.ndarray, y: np.ndarray) -> Calibrate:
    return IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(q, y).predict


def sigmoid(q: np.ndarray, y: np.ndarray) -> Calibrate:
    x, labels = np.repeat(q, 2)[:, None], np.tile([0, 1], len(q))
    weights = np.stack([1 - y, y], 1).clip(1e-9).ravel()  # labels may be soft
    model = LogisticRegression(C=1e6).fit(x, labels, weights)
    return lambda new: model.predict_proba(new[:, None])[:, 1]


CALIBRATIONS = {
    "none": none, "temperature": temperature, "temperature by likelihood": temperature_by_likelihood,
    "temperature and share": temperature_and_share, "slope and share, by likelihood": slope_and_share,
    "isotonic": each_class(isotonic), "sigmoid": each_class(sigmoid),
}  # fmt: skip


def pairs(file: Path, data: Path) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return left-out predictions, labels, and predictions of unseen samples, by judge."""
    pool, index = file.stem.split("-")
    run, found = draw(pool, int(index), data), {}
    x, y = training_rows(run)
    for judge, see in {"": lambda x: x, **run.judges}.items():
        reference = fit(run, see(x), y)
        task = find_task(run.task)
        known = [of_all_classes(each.double(), task).numpy() for each in (reference.left_out, reference.labels)]
        found[judge] = (*known, reference_says(reference, see(run.x_unseen)).double().numpy())
    return found


def rows(file: Path, data: Path) -> list[dict[str, object]]:
    """Return a row for each judge and calibration: the level, and what the chosen epochs lose."""
    run = Recorded.read(file)
    p, y_unseen = run.predictions("unseen"), run.found["y_unseen"]
    accuracy = (p.argmax(2) == y_unseen).mean(1)
    of_test = 100 * (run.predictions("test").argmax(2) == run.found["y_test"]).mean(1)
    found = []
    for judge, (left_out, labels, unseen) in pairs(file, data).items():
        np.savez_compressed(f"/tmp/cal/{file.stem}-{judge}.npz", left_out=left_out, labels=labels, unseen=unseen)
        for name, calibration in CALIBRATIONS.items():
            q = calibration(left_out, labels)(unseen)
            expected = np.take_along_axis(q[None], p.argmax(2)[..., None], 2).mean((1, 2))
            scores = np.array([expected_score(each, Tensor(q)).score for each in run.outputs("unseen")])
            row = {"run": file.stem, "pool": file.stem.split("-")[0], "judge": judge, "calibration": name}
            row |= {"level": 100 * np.abs(expected - accuracy).mean(), "bias": 100 * (expected - accuracy).mean()}
            row |= {"score": brier(q, np.eye(q.shape[1])[y_unseen])}
            epochs = {"by_score": lowest(scores), "by_accuracy": lowest(-expected), "never": -1}
            found.append(row | {each: of_test.max() - of_test[epoch] for each, epoch in epochs.items()})
    return found


def main() -> None:
    runs, data = map(Path, sys.argv[1:])
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    file = Path("/tmp/calibrations.csv")
    known = pd.read_csv(file, keep_default_na=False) if file.exists() else pd.DataFrame({"run": []})
    for pool in POOLS:
        for each in sorted(runs.glob(f"{pool}-???.npz")):
            if each.stem not in set(known["run"]) and bool(np.load(each)["is_design"]):
                known = pd.concat([known, pd.DataFrame(rows(each, data))])
                known.to_csv(file, index=False)
                print(time.strftime("%H:%M:%S"), each.stem, flush=True)


if __name__ == "__main__":
    main()
