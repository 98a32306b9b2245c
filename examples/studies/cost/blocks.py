"""What pages tell of the cost of monitors."""

from pathlib import Path

import pandas as pd

FIGURES = pd.read_csv(Path(__file__).with_name("results.csv"), dtype=str, keep_default_na=False)  # digits as they are
NETWORKS = (
    "ResNet-18",
    "ViT",
    "small CNN",
    "MLP 784-128-128-10",
    "MLP 64-64-10",
    "language model's head",
    "segmentation",
)


def figures(what: str, figure: str) -> dict[str, pd.Series]:
    """Give the lines of a network, by what was measured: "sensitivity", "risk" or "both"."""
    found = FIGURES[(FIGURES["what"] == what) & (FIGURES["figure"] == figure)]
    return {line["case"]: line for _, line in found.iterrows()}


def beside_passes(what: str) -> str:
    found = figures(what, "added to a validation / bare passes")
    wanted = [line["wanted"].removeprefix("≤ ") for line in found.values()]
    limits = ", ".join(dict.fromkeys(f"{float(each):g}" for each in wanted if each))
    cells = [f"{each['median']} ({each['lowest']} to {each['highest']})" for each in found.values()]
    cells += [""] * (2 - len(cells))
    return f"| {what} | {f'≤ {limits}' if limits else ''} | {' | '.join(cells)} |"


def shares_of_epoch(samples: int) -> str:
    told = []
    for what in ("small CNN", "ResNet-18"):
        found = figures(what, f"added to an epoch of training on {samples:,} samples, as a share")
        percents = [100 * float(found[case]["median"]) for case in ("sensitivity", "risk")]
        told.append(", ".join(f"{percent:.1f}" if samples > 10_000 else f"{percent:.0f}" for percent in percents))
    return f"| {samples:,} | {' | '.join(told)} |"


NAMES: dict[str, object] = {}
BLOCKS = {
    "cost beside passes": "\n".join(
        [
            "| | wanted | `SensitivityMonitor` | both |",
            "|---|---|---|---|",
            *map(beside_passes, NETWORKS),
        ]
    ),
    "cost of an epoch": "\n".join(
        [
            "| training samples | small CNN, 28 × 28 | ResNet-18, 32 × 32 |",
            "|---|---|---|",
            *map(shares_of_epoch, (2_000, 10_000, 50_000)),
        ]
    ),
}
