"""A line of results.csv: what a run is, what every rule pays, and what the last line says."""

from __future__ import annotations

import numpy as np
from label_noise import shares_by_cleanlab
from rules import Curves, cost, lowest, rules_of

ABOUT = ("pool", "seed", "kind", "labels", "n", "num_classes", "weights", "has_batch_norm", "has_frozen_body")


def line_of(c: Curves) -> dict[str, object]:
    line: dict[str, object] = {name: c.about[name] for name in (*ABOUT, "share_wrong")}
    line |= {"is_noisy": c.is_noisy, "epochs": len(c["loss"]), "best_epoch": int(c["accuracy"].argmax())}
    epoch = lowest(c["val_risk_estimate"])
    line |= {
        "criterion_epoch": lowest(c["val_risk_criterion"]),
        "estimate_over_score": c["val_risk_estimate"][epoch] / c["true_score"][epoch],
        "reference_says": c.reference_says,
        "said_of_epoch": c.said_of_epoch,
        "said_of_labels": c.said_of_labels,
        "label_noise": c.label_noise,
    }
    line |= noise_by_others(c)
    for rule in rules_of(c):
        line |= {f"{rule}_{measure}": value for measure, value in cost(c, rule).items()}
    return line


def noise_by_others(c: Curves) -> dict[str, float]:
    """Give the shares of wrong labels by cleanlab, on predictions of the reference and of networks."""
    found = {}
    if "loo" in c.found:
        labels, p = c["kept_labels"], c["loo"]
        p = np.concatenate([1 - p, p], 1) if p.shape[1] == 1 else p
        found |= {f"cleanlab_{way}_reference": share for way, share in shares_by_cleanlab(labels, p).items()}
        found["noise_by_leave_one_out"] = float((p.argmax(1) != labels).mean())
    file = c.folder / "folds.npz"
    if file.exists():
        with np.load(file) as folds:
            for epoch in ("last", "best"):
                shares = shares_by_cleanlab(folds["labels"], folds[epoch])
                found |= {f"cleanlab_{way}_{epoch}_epoch": share for way, share in shares.items()}
    return found
