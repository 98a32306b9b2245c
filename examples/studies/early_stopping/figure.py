"""The figure of the report: what an epoch costs that was chosen with few labels, with the criterion or without.

python examples/studies/early_stopping/figure.py  # draws figure.png from results.csv
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

HERE = Path(__file__).parent
POOLS = ("random", "as built", "tables", "fine-tuning")
COUNTS, MORE_COUNTS = [20, 50, 100], [10, 20, 50, 100, 200, 400]  # of labels: beside the criterion, and by themselves
LEVELS = {
    "never_stop": ("never stopping", "0.6"),
    "held_out_brier": ("10 % held out, by its Brier score", "C1"),
    "estimate_without_reference": ("the estimate without the reference", "C0"),
    "criterion": ("the criterion", "C3"),
    "true_score": ("the true score (out of reach)", "C2"),
}


def draw(runs: pd.DataFrame, axis: plt.Axes) -> None:
    """Draw the accuracy lost by the number of noisy labels."""
    lost = runs.filter(like="_accuracy_lost").mean()
    by_labels = [lost[f"noisy_labels_{count}_accuracy_lost"] for count in MORE_COUNTS]
    axis.plot(MORE_COUNTS, by_labels, "o--", color="0.5", label="noisy labels, by their Brier score")
    with_criterion = [lost[f"criterion_noisy_labels_{count}_accuracy_lost"] for count in COUNTS]
    axis.plot(COUNTS, with_criterion, "o-", color="C3", label="noisy labels and the criterion")
    for rule, (label, color) in LEVELS.items():
        axis.axhline(lost[f"{rule}_accuracy_lost"], color=color, ls=":", label=f"no labels: {label}")
    axis.set(xscale="log", xlabel="validation labels", ylim=(0, None))
    axis.set_xticks(MORE_COUNTS, map(str, MORE_COUNTS), minor=False)
    axis.set_xticks([], minor=True)


def main() -> None:
    runs = pd.read_csv(HERE / "results.csv")
    fig, axes = plt.subplots(1, len(POOLS), figsize=(3.6 * len(POOLS), 4.2), layout="constrained")
    for axis, pool in zip(axes, POOLS, strict=True):
        noisy = runs[runs["is_noisy"] & (runs["pool"] == pool)]
        draw(noisy, axis)
        axis.set(title=f"{pool}: noisy labels, {len(noisy)} runs")
    axes[0].set(ylabel="accuracy lost, points")
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    fig.savefig(HERE / "figure.png", dpi=80)


if __name__ == "__main__":
    main()
