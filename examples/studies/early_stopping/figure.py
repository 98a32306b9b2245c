"""The figure of the report: what an epoch costs that was chosen with few labels, with the estimate or without."""

from __future__ import annotations

from pathlib import Path

from rules import AVERAGED, COUNTS, ESTIMATE, FEWER_BY_ACCURACY, NEVER, TRUE, WAYS, named
from tables import Groups, of

LEVELS = {NEVER: "0.6", AVERAGED: "C4", FEWER_BY_ACCURACY: "C5", ESTIMATE: "C3", TRUE: "C2"}


def figure(found: Groups, file: Path) -> None:
    """Draw the accuracy lost by the number of noisy labels, on the runs with noisy labels."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    shown = [name for name in ("random: noisy labels", "as built: noisy labels") if name in found]
    if not shown:
        return
    fig, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        runs = found[name]
        for way, (style, color) in zip(WAYS, (("o--", "C0"), ("o--", "black"), ("o-", "C3")), strict=True):
            lost = [of(runs, named("noisy", count, way)).mean() for count in COUNTS]
            axis.plot(COUNTS, lost, style, color=color, label=f"labels, {way}")
        for rule, color in LEVELS.items():
            axis.axhline(of(runs, rule).mean(), color=color, ls=":", label=f"no labels: {rule}")
        axis.set(xscale="log", xlabel="validation labels, as noisy as training's", title=f"{name}, {len(runs)} runs")
        axis.set(ylabel="accuracy lost, points", ylim=(0, None))
        axis.set_xticks(COUNTS, map(str, COUNTS), minor=False)
        axis.set_xticks([], minor=True)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    fig.savefig(file, dpi=80)
