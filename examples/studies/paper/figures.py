# %% [markdown]
# # What the figures of this folder share

# %%
from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from measure import KINDS
from PIL import Image

plt.style.use(Path(__file__).parents[3] / "docs" / "matplotlibrc")
MARKERS = dict(zip(KINDS, "oDs^vPX*", strict=True))
COLORS = dict(zip(KINDS, plt.get_cmap("tab10").colors, strict=False))
TITLES = {"cifar10": "CIFAR-10", "mnist": "MNIST", "digits": "digits"}
SENSITIVITY = "output sensitivity S (logits²)"
LOSS = "test cross-entropy (nats)"


def panels(rows: int, columns: int, width: float = 4.6, height: float = 3.6) -> tuple[Figure, list[list[Axes]]]:
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    return figure, axes.tolist()


def points(axes: Axes, table: pd.DataFrame, x: str, y: str) -> None:
    """The networks of a table by their kind; hollow ones have not reached the training loss of the others."""
    for name in KINDS:
        style = {"marker": MARKERS[name], "color": COLORS[name], "ls": "", "ms": 6, "alpha": 0.85}
        of_kind = table[table["kind"] == name]
        if len(of_kind):
            axes.plot([], [], label=name, **style)
        for converged, part in of_kind.groupby("converged"):
            axes.plot(part[x], part[y], mfc=COLORS[name] if converged else "none", **style)


def log_ticks(axis: Axis) -> None:
    """Over two decades or less, label 1, 2 and 5; over more, the powers of ten alone."""
    low, high = axis.get_view_interval()
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_minor_formatter("{x:g}" if high < 100 * low else NullFormatter())
    if high < 100 * low:
        axis.set_major_formatter("{x:g}")


def log_log(axes: Axes, x: str, y: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    log_ticks(axes.xaxis)
    log_ticks(axes.yaxis)
    axes.grid(alpha=0.25)


def legend_below(figure: Figure, axes: Iterable[Axes], columns: int = 4) -> None:
    """One legend for all panels, under them."""
    entries = {}
    for part in axes:
        handles, labels = part.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.tight_layout()
    figure.legend(
        entries.values(), entries, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=columns, frameon=False, fontsize=9
    )


class Report:
    """What a script found: printed, and written with its figure and its data to `results/`.

    The results of --quick go to `quick/` in the folder of the checkpoints.
    """

    def __init__(self, args: Namespace, name: str) -> None:
        folder = args.out / "quick" if args.quick else Path(__file__).parent / "results"
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{name}.md"
        self.parts: list[str] = []
        self.say(f"`python examples/studies/paper/{name}.py {'--quick' if args.quick else '--data FOLDER'}`")

    def say(self, text: str) -> None:
        print(f"\n{text}")
        self.parts.append(text)
        self.path.write_text("\n\n".join(self.parts) + "\n")

    def table(self, title: str, table: pd.DataFrame) -> None:
        lines = [[f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in row] for row in table.to_numpy()]
        lines = [list(table), ["---"] * len(table.columns), *lines]
        self.say(f"**{title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))

    def figure(self, figure: Figure, table: pd.DataFrame) -> None:
        """Write the figure, and the table that it shows."""
        table.to_csv(self.path.with_suffix(".csv"), index=False, float_format="%.5g")
        save(figure, self.path.with_suffix(".png"))


def save(figure: Figure, png: Path) -> None:
    """Write a figure for light and dark pages, in 256 colours, a third of the size."""
    figure.savefig(png, dpi=100, bbox_inches="tight")
    Image.open(png).quantize(256, Image.Quantize.FASTOCTREE).save(png, optimize=True)
    print(f"\n{png}")
