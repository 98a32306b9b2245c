"""Compares the refined score with that of `probmetrics`, by Berta, Holzmüller, Jordan and Bach, on the report's tenths.

pip install probmetrics
python examples/studies/accuracy/beside_probmetrics.py RUNS
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from probmetrics.metrics import Metrics
from rules import Recorded, is_of_report, lowest

NAME = "refinement_brier_ts-mix_all"


def main() -> None:
    torch.set_num_threads(1)
    metrics, lost, gaps, same = Metrics.from_names([NAME]), [], [], []
    for folder in sorted(folder for folder in Path(sys.argv[1]).iterdir() if is_of_report(folder)):
        full, run = Recorded(folder / "full.npz"), Recorded(folder / "fewer.npz")
        if not full.counts or run.task == "binary":
            continue
        labels = run.labels("unseen_given")
        rows = (labels >= 0).nonzero()[:, 0]
        ours = run.scores(labels, rows).mean(-1).min(0).values.numpy()
        logits = run.logits("unseen")[:, rows]
        given = [metrics.compute_all_from_labels_logits(labels[rows], each) for each in logits]
        theirs = np.array([float(each[NAME]) for each in given])
        best, epochs = full.accuracy.max(), (lowest(ours), lowest(theirs))
        lost.append([best - run.accuracy[epoch] for epoch in epochs])
        gaps.append(float(np.abs(ours - theirs).mean()))
        same.append(epochs[0] == epochs[1])
    mean = np.mean(lost, axis=0)
    print(f"{len(lost)} runs: accuracy lost {mean[0]:.2f} (ours), {mean[1]:.2f} (probmetrics); the same epoch in "
          f"{100 * np.mean(same):.0f} %; scores differ by {np.mean(gaps):.4f} on average")  # fmt: skip


if __name__ == "__main__":
    main()
