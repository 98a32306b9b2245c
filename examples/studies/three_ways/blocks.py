"""What pages tell of three ways to estimate the test loss without labels."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import kendalltau, spearmanr
from summaries import Number

FOUND = pd.read_csv(Path(__file__).with_name("results.csv"))
NETWORK = ["data", "network", "seed"]
WAYS = {"Equation 9": "equation9", "the network's own entropy": "entropy", "**expected loss**": "expected"}
WAYS |= {"600 labels": "labels"}
GROUPS = {
    "CIFAR-10": "data == 'cifar10' and init == 'default'",
    "CIFAR-10, N(0, 1)": "data == 'cifar10' and init == 'normal'",
    "MNIST": "data == 'mnist' and init == 'default'",
    "MNIST, N(0, 1)": "data == 'mnist' and init == 'normal'",
    "tables": "data == 'tables'",
}


def rows(condition: str, way: str) -> pd.DataFrame:
    return FOUND.query(condition).dropna(subset=[way])


def ratio(condition: str, way: str) -> Number:
    """Return the median of estimate over true loss, over all epochs of all networks."""
    found = rows(condition, way)
    return Number((found[way] / found["loss"]).median())


def off(condition: str, way: str) -> Number:
    """Return by how many percent an estimate is off in the median, over all epochs of all networks."""
    found = rows(condition, way)
    return Number(100 * (found[way] / found["loss"] - 1).abs().median())


def within(condition: str, way: str) -> Number:
    """Return how well an estimate follows the loss over the epochs of a network: Spearman's, mean of networks."""
    parts = [part for _, part in rows(condition, way).groupby(NETWORK)]
    return Number(np.nanmean([spearmanr(part[way], part["loss"]).statistic for part in parts]))


def among(condition: str, way: str) -> Number:
    """Return how well an estimate orders networks after their last epoch: Kendall's."""
    found = rows(condition, way)
    last = found.loc[found.groupby(NETWORK)["epoch"].idxmax()]
    return Number(kendalltau(last[way], last["loss"]).statistic)


def size(condition: str) -> int:
    return len(FOUND.query(condition)[NETWORK].drop_duplicates())


def by(measure: str, least: int = 1) -> str:
    """Give a table of a measure: a row a group of networks, a column a way."""
    function, form = MEASURES[measure]
    head = f"| {measure} | {' | '.join(WAYS)} |\n|---{'|---' * len(WAYS)}|\n"
    lines = []
    for label, condition in GROUPS.items():
        if size(condition) >= least:
            cells = [f"{function(condition, way):{form}}" for way in WAYS.values()]
            lines.append(f"| {label} ({size(condition)}) | {' | '.join(cells)} |")
    return head + "\n".join(lines)


MEASURES = {
    "estimate / true loss, median of all epochs": (ratio, ".2f"),
    "off by, %, median of all epochs": (off, ".0f"),
    "follows the loss within a run, ρ": (within, ".2f"),
    "orders networks by their loss, τ": (among, ".2f"),
}
FEWEST = 3  # networks that are put in order
DEFAULT, NORMAL, PHOTOS = "init == 'default'", "init == 'normal'", "data == 'cifar10' and init == 'default'"
NAMES: dict[str, object] = {}
BLOCKS = {
    "three ways: ratio": by("estimate / true loss, median of all epochs"),
    "three ways: off": by("off by, %, median of all epochs"),
    "three ways: within": by("follows the loss within a run, ρ"),
    "three ways: among": by("orders networks by their loss, τ", FEWEST),
    "three ways: in short": (
        f"**With standard initialization**, over all epochs of {size(DEFAULT)} networks, expected loss is off by "
        f"{off(DEFAULT, 'expected'):.0f} % in the median (the loss of 600 labels by {off(DEFAULT, 'labels'):.0f} %), "
        f"the network's own entropy by {off(DEFAULT, 'entropy'):.0f} %, and Equation 9 by "
        f"{off(DEFAULT, 'equation9'):.0f} %. **With N(0, 1)** ({size(NORMAL)} networks), whose loss is of the order of "
        f"100,000 nats, expected loss is off by {off(NORMAL, 'expected'):.0f} % (600 labels "
        f"{off(NORMAL, 'labels'):.0f} %), Equation 9 by {off(NORMAL, 'equation9'):.0f} %, and entropy is 0."
    ),
    "three ways: encoder": (
        "Of photos, the reference sees patches; by EfficientNet-Lite0 at 96 pixels there, expected loss is off "
        f"by {off(PHOTOS, 'encoder'):.0f} % on CIFAR-10, in place of {off(PHOTOS, 'expected'):.0f} %."
    ),
}
