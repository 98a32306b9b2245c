"""Draws the picture of the page, from `results.csv`:  MATPLOTLIBRC=docs python examples/studies/three_ways/plot.py"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

HERE = Path(__file__).parent
WAYS = {
    "equation9": ("Equation 9, from sensitivity", "C0", "^"),
    "entropy": ("the network's own entropy", "C2", "s"),
    "expected": ("expected loss", "C1", "o"),
}
CURVES = {
    "CIFAR-10, 4×300": ("cifar10", "fc4x300-s0"),
    "CIFAR-10, 4×300, N(0, 1)": ("cifar10", "fc4x300-normal-s0"),
    "a table": ("tables", None),
}
LOWEST = 1e-3  # that is shown
GROUPS = {"CIFAR-10": "cifar10", "MNIST": "mnist", "tables": "tables"}


def limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Return the lowest and highest values to show; the entropy of N(0, 1) networks is below."""
    values = rows[["loss", *WAYS]].to_numpy()
    return values[values > LOWEST].min() / 1.5, values.max() * 1.5


def curves(axes: Axes, title: str, rows: pd.DataFrame) -> None:
    """Draw the true loss and the estimates over the epochs of a network."""
    axes.plot(rows["epoch"], rows["loss"], color="#808080", lw=3, alpha=0.6, label="true test loss")
    for way, (label, color, marker) in WAYS.items():
        axes.plot(rows["epoch"], rows[way], color=color, marker=marker, ms=4, lw=1, label=label)
    axes.set(title=title, xscale="log", yscale="log", xlabel="epoch", ylabel="cross-entropy (nats)")
    axes.set_ylim(*limits(rows))
    axes.grid(alpha=0.25)


def among_networks(axes: Axes, title: str, rows: pd.DataFrame) -> None:
    """Draw the estimates over the true loss of networks, each after its last epoch."""
    for way, (_, color, marker) in WAYS.items():
        axes.plot(rows["loss"], rows[way], color=color, marker=marker, ms=5, ls="", alpha=0.85)
    ends = [rows["loss"].min() / 1.5, rows["loss"].max() * 1.5]
    axes.plot(ends, ends, color="#808080", lw=1)
    axes.set(title=f"{title}, {len(rows)} networks", xscale="log", yscale="log")
    axes.set_ylim(*limits(rows))
    axes.set(xlabel="true test loss (nats)", ylabel="its estimate (nats)")
    axes.grid(alpha=0.25)


def main() -> None:
    found = pd.read_csv(HERE / "results.csv")
    figure, (above, below) = plt.subplots(2, 3, figsize=(12.6, 7.2))
    for axes, (title, (data, network)) in zip(above, CURVES.items(), strict=True):
        of_data = found[found["data"] == data]
        curves(axes, title, of_data[of_data["network"] == (network or of_data["network"].iloc[0])])
    last = found.loc[found.groupby(["data", "network", "seed"])["epoch"].idxmax()]
    for axes, (title, data) in zip(below, GROUPS.items(), strict=True):
        among_networks(axes, title, last[last["data"] == data])
    handles, labels = above[0].get_legend_handles_labels()
    figure.tight_layout()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, frameon=False)
    figure.savefig(HERE / "three_ways.png", dpi=100, bbox_inches="tight")


if __name__ == "__main__":
    main()
