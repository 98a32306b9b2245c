"""What pages tell of quantiles, and of means with deviations."""

from pathlib import Path

import pandas as pd

FOUND = pd.read_csv(Path(__file__).with_name("results.csv"))
FOUND["above"] = FOUND["loss"] - FOUND["best_loss"]
FOUND["above_percent"] = 100 * FOUND["above"] / FOUND["best_loss"]
FOUND["off_percent"] = 100 * FOUND["off_chosen"].abs() / FOUND["loss"]
FOUND["off"] = FOUND["off_chosen"].abs()
FOUND["off_median_percent"] = 100 * FOUND["off_median"] / FOUND["best_loss"]
MEASURES = ["above", "above_percent", "off", "off_percent", "off_median", "off_median_percent"]
BY_TABLE = FOUND.groupby(["network", "rule", "table"])[MEASURES].mean()
TABLES = FOUND["table"].nunique()
RULES = {
    "the last epoch": "last",
    "**expected loss**": "pooled",
    "600 targets": "targets",
}


def cell(network: str, rule: str, column: str, form: str) -> str:
    """Give the mean over tables, and the worst table."""
    found = BY_TABLE.loc[(network, rule), column]
    return "–" if found.isna().all() else f"{found.mean():{form}} ({found.max():{form}})"


def table(what: str, network: str, unit: str, columns: list[str], form: str) -> str:
    """Give a table with a row for each rule."""
    heads = [f"{what}, {TABLES} tables: mean (worst)", f"chosen epoch above the lowest, {unit}"]
    heads += ["value told of it, off by", "that of the median epoch, off by"]
    lines = [[label, *(cell(network, rule, column, form) for column in columns)] for label, rule in RULES.items()]
    return (
        "\n".join(f"| {' | '.join(line)} |" for line in [heads, ["---"] * len(heads), *lines])
        .replace("| --- ", "|---")
        .replace("--- |", "---|")
    )


def mean(network: str, rule: str, column: str) -> float:
    return float(BY_TABLE.loc[(network, rule), column].mean())


def against(network: str, column: str, form: str) -> str:
    """Give the means of the last epoch and of 600 targets."""
    return f"last epoch {mean(network, 'last', column):{form}}, 600 targets {mean(network, 'targets', column):{form}}"


PERCENT = ["above_percent", "off_percent", "off_median_percent"]
NAMES: dict[str, object] = {}
BLOCKS = {
    "losses: quantiles": table("quantiles", "quantiles", "%", PERCENT, ".1f"),
    "losses: deviation": table("mean and deviation", "deviation", "nats", ["above", "off", "off_median"], ".2f"),
    "losses: in words": f"""
On {TABLES} real tables, the pinball loss of the chosen epoch was {mean("quantiles", "pooled", "above_percent"):.1f} %
above the lowest ({against("quantiles", "above_percent", ".1f")}), and the negative log-likelihood of a mean with a
deviation {mean("deviation", "pooled", "above"):.2f} nats ({against("deviation", "above", ".2f")}). **The level is not
promised**: the pinball loss told was {mean("quantiles", "pooled", "off_percent"):.0f} % off, on one table
{BY_TABLE.loc[("quantiles", "pooled"), "off_percent"].max():.0f} % (600 targets
{mean("quantiles", "targets", "off_percent"):.0f} %), the likelihood in the median epoch
{mean("deviation", "pooled", "off_median"):.1f} nats (600 targets {mean("deviation", "targets", "off_median"):.1f}).""",
}
