"""Judges every rule on the recorded runs, and leaves one row a run in `results.csv`.

    python judge.py RUNS DATA measure [POOL ...]  # NAME.json beside each NAME.npz: what each number would lose
    python judge.py RUNS DATA table               # results.csv: what the rules make of it

A rule pays by test labels, which are correct where that is known: how much lower accuracy, AUC and balanced accuracy
are than in the best epoch, in points; and by how many percent the loss (log-loss, or squared error) is higher.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from rules import Recorded, auc, candidates, is_used, rules
from runs import NUM_ALIKE, POOLS, Run, draw
from torch import Tensor

from lightning_sensitivity.functional import Reference, fit_reference
from lightning_sensitivity.functional.tasks import find_task


def accuracy(p: np.ndarray, y: np.ndarray) -> float:
    return float((p.argmax(1) == y).mean())


def balanced_accuracy(p: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean([(p[y == each].argmax(1) == each).mean() for each in np.unique(y)]))


def log_loss(p: np.ndarray, y: np.ndarray) -> float:
    return float(-np.log(p[np.arange(len(y)), y].clip(1e-12)).mean())


def squared_error(p: np.ndarray, y: np.ndarray) -> float:
    return float(np.square(p[:, 0] - y).mean())


GAINS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": accuracy, "auc": auc, "balanced": balanced_accuracy,
}  # fmt: skip


def measures(run: Recorded) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Compute what is lost by each epoch, against the best one; and how good each epoch is."""
    p, y = run.predictions("test").double().numpy(), run.found["y_test"]
    values = {"loss": np.array([(squared_error if run.task == "regression" else log_loss)(each, y) for each in p])}
    lost = {"loss": 100 * (values["loss"] / values["loss"].min() - 1)}
    if run.task != "regression":
        for name, gain in GAINS.items():
            values[name] = 100 * np.array([gain(each, y) for each in p])
            lost[name] = values[name].max() - values[name]
    return lost, values


def measure(run: Run, recorded: Recorded, inputs: tuple[Tensor, Tensor]) -> dict[str, object]:
    """Return what each number by itself would lose, and what is known of the reference."""
    reference = fit_reference(inputs[0], run.y, inputs[1], run.task)
    lost, values = measures(recorded)
    chosen = candidates(recorded, reference)
    losses: dict[str, object] = {}
    for name, epochs in chosen.items():
        losses |= {f"{name}_{what}_lost": float(each[epochs].mean()) for what, each in lost.items()}
    about: dict[str, object] = {"skill": reference.skill, "claim_by_score": reference.claim / reference.score}
    about |= {"inputs": reference.kind, "features": reference.features, "unexplained": reference.unexplained}
    if run.task != "regression":
        for name in ("distance", "training_score"):
            (epoch,) = chosen[name]
            about |= {f"{name}_disagreement": disagreement(recorded, reference, epoch)}
            about |= {f"{name}_accuracy": float(values["accuracy"][epoch])}
    return about | losses


def disagreement(run: Recorded, reference: Reference, epoch: int) -> float:
    """Return the share of unseen samples whose class is not the reference's."""
    classes = find_task(run.task).classes(reference.predictions).numpy()
    return float((run.predictions("unseen")[epoch].argmax(1).numpy() != classes).mean())


def measure_all(runs: Path, data: Path, pools: Sequence[str]) -> None:
    torch.set_num_threads(1)
    files = [file for pool in pools for file in sorted(runs.glob(f"{pool}-???.npz"))]
    for file in files:
        pool, index = file.stem.split("-")
        if file.with_suffix(".json").exists():
            continue
        file.with_suffix(".json").touch()  # so that no other process takes it
        run, recorded = draw(pool, int(index), data), Recorded.read(file)
        row: dict[str, object] = {"run": run.name, "pool": pool, "is_design": run.is_design, "task": run.task}
        row |= {"way": run.way, "n": len(run.y), "kind": run.kind, "group": run.index // NUM_ALIKE}
        found = {"": measure(run, recorded, (run.x_kept, run.x_unseen))}
        if run.features is not None:
            found["features"] = measure(run, recorded, (run.features(run.x_kept), run.features(run.x_unseen)))
        file.with_suffix(".json").write_text(json.dumps({"about": row, "found": found}))


def table(runs: Path, half: str) -> pd.DataFrame:
    """Return what the rules lose, one row a run; fine-tuned ones have another with `features=`."""
    rows = []
    for file in sorted(runs.glob("*-???.json")):
        read = json.loads(file.read_text() or "{}")
        for features, found in read.get("found", {}).items():
            used = is_used(found["inputs"], found["skill"], found["claim_by_score"])
            about = read["about"] | {"given_features": features == "features", "is_used": used}
            about["is_redrawn"] = "redrawn" in about["kind"] and " 0 % redrawn" not in about["kind"]
            about |= {name: found[name] for name in ("skill", "claim_by_score", "features", "unexplained")}
            for name in ("disagreement", "accuracy"):
                about[f"criterion_{name}"] = found.get(f"{rules(used)['criterion']}_{name}")
            for rule, candidate in rules(used).items():
                names = [name for name in found if name.startswith(f"{candidate}_") and name.endswith("_lost")]
                names = [name for name in names if name[len(candidate) + 1 :].count("_") == 1]
                about |= {rule + name[len(candidate) :]: found[name] for name in names}
            if half == "all" or about["is_design"]:
                rows.append(about)
    return pd.DataFrame(rows)


def main() -> None:
    runs, data, step, *rest = sys.argv[1:]
    if step == "measure":
        measure_all(Path(runs), Path(data), rest or list(POOLS))
    else:
        half, file = rest or ["all", str(Path(__file__).with_name("results.csv"))]
        table(Path(runs), half).to_csv(file, index=False, float_format="%.3f")


if __name__ == "__main__":
    main()
