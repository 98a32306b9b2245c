"""The figure of the report: what an epoch costs that was chosen with few labels, with the criterion or without."""

from __future__ import annotations

from pathlib import Path

from rules import COUNTS, CRITERION, HELD_BRIER, MORE_COUNTS, NEVER, PLAIN, TRUE, alone, beside
from tables import POOLS, Groups, of

LEVELS = {NEVER: "0.6", HELD_BRIER: "C1", PLAIN: "C0", CRITERION: "C3", TRUE: "C2"}


def figure(found: Groups, file: Path) -> None:
    """Draw the accuracy lost by the number of noisy labels, on the runs with noisy labels."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = [f"{pool}: noisy labels" for pool in POOLS if f"{pool}: noisy labels" in found]
    if not shown:
        return
    fig, axes = plt.subplots(1, len(shown), figsize=(3.6 * len(shown), 4.2), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        runs = found[name]
        lost = [of(runs, alone("noisy", count)).mean() for count in MORE_COUNTS]
        axis.plot(MORE_COUNTS, lost, "o--", color="0.5", label="noisy labels, by their Brier score")
        lost = [of(runs, beside("noisy", count)).mean() for count in COUNTS]
        axis.plot(COUNTS, lost, "o-", color="C3", label="noisy labels and the criterion")
        for rule, color in LEVELS.items():
            axis.axhline(of(runs, rule).mean(), color=color, ls=":", label=f"no labels: {rule.strip('*')}")
        axis.set(xscale="log", xlabel="validation labels", title=f"{name}, {len(runs)} runs", ylim=(0, None))
        axis.set_xticks(MORE_COUNTS, map(str, MORE_COUNTS), minor=False)
        axis.set_xticks([], minor=True)
    axes[0, 0].set(ylabel="accuracy lost, points")
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    fig.savefig(file, dpi=80)
