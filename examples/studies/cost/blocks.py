"""What pages tell of the cost of monitors."""

from pathlib import Path

import pandas as pd

FIGURES = pd.read_csv(Path(__file__).with_name("results.csv")).set_index(["what", "case"])
ENCODERS = pd.read_csv(Path(__file__).with_name("encoders.csv")).set_index(["encoder", "size", "threads"]).sort_index()
ENCODED = 3_000  # training samples, as many as a monitor encodes
NETWORKS = {"MLP on a table": "MLP, 20 columns", "small CNN": "small CNN, 28 × 28", "ResNet-18": "ResNet-18, 32 × 32"}
CASES = ("sensitivity", "risk", "both")
SAMPLES = (2_000, 10_000, 50_000)


def share(network: str, case: str, samples: int) -> float:
    """What a validation adds to an epoch of training on so many samples, in percent."""
    row = FIGURES.loc[(network, case)]
    return 100 * row["seconds"] / row["epoch_seconds"] * row["epoch_samples"] / samples


def row(network: str) -> str:
    cells = [", ".join(f"{share(network, case, samples):.2g}" for case in CASES) for samples in SAMPLES]
    return f"| {NETWORKS[network]} | {' | '.join(cells)} |"


def fit(case: str) -> str:
    found = FIGURES.loc[("a fit", case)]
    return f"| {case} | {found['seconds']:.1f} s |"


def between(case: str) -> str:
    """The epochs of 1 / n samples that a validation is, over the networks."""
    values = [round(share(network, case, 1) / 100, -1) for network in ("small CNN", "ResNet-18")]
    return f"{min(values):,.0f} to {max(values):,.0f}"


def encoder(name: str, size: str) -> str:
    found = ENCODERS.loc[(name, size), "seconds"] * ENCODED
    return f"| {name}, {size} | {found[1]:.0f} s | {found[2]:.0f} s |"


NAMES: dict[str, object] = {}
BLOCKS = {
    "cost of an epoch": "\n".join(
        ["| | 2,000 training samples | 10,000 | 50,000 |", "|---|---|---|---|", *map(row, NETWORKS)]
    ),
    "cost of a fit": "\n".join(
        ["| | time |", "|---|---|", *map(fit, FIGURES.loc["a fit"].index)],
    ),
    "cost of encoders": "\n".join(
        [
            f"| {ENCODED:,} samples | one thread | two |",
            "|---|---|---|",
            *(encoder(*case) for case in ENCODERS.xs(1, level="threads").sort_values("seconds").index),
            "",
            "By `python examples/studies/cost/encoders.py`, on a server's processor.",
        ]
    ),
    "cost as samples": f"""
A validation of `SensitivityMonitor` costs as much as training on {between("sensitivity")} samples, one of `RiskMonitor`
as training on {between("risk")}.""",
}
