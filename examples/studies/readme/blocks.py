"""README's numbers: settings for each kind of data, what they are worth, and why not a tenth."""

import runpy
from pathlib import Path
from typing import Any, NamedTuple

from stopping.parts import NAMES as STOPPING
from stopping.parts import dagger, heaviest

__all__ = ["BLOCKS", "NAMES"]
STUDIES = Path(__file__).parents[1]


def names_of(study: str) -> dict[str, Any]:
    """Give the runs of a study, by the names of its own report."""
    found = runpy.run_path(str(STUDIES / study / "blocks.py"))["NAMES"]
    return {f"{study}_{name}": runs for name, runs in found.items()}


NAMES: dict[str, Any] = STOPPING | names_of("molecules") | names_of("groups")
WORTH = runpy.run_path(str(STUDIES / "stopping" / "blocks.py"))["labels_worth"]


VALUES = {"accuracy": "accuracy", "auc": "auroc", "loss": "loss, min"}


class Setting(NamedTuple):
    """A row of the table of settings: what to write for which data, and where its numbers are.

    `columns` are those of the kept and the last epoch, of a study that calls them otherwise than that of stopping.
    """

    data: str
    write: str
    runs: str
    measure: str = "accuracy"
    columns: tuple[str, str] | None = None

    def lost(self, rule: str) -> str:
        return f"{rule}_{self.measure}_lost"

    @property
    def kept(self) -> str:
        return self.columns[0] if self.columns else self.lost(f"expected_{self.measure}")

    @property
    def last(self) -> str:
        return self.columns[1] if self.columns else self.lost("never_stop")

    @property
    def count(self) -> int:
        """The number of runs that were judged by this version."""
        return int(NAMES[self.runs].frame[self.kept].notna().sum())

    def line(self) -> str:
        unit = " %" * (self.measure == "loss")
        kept, last = (f"{{{self.runs}.{column}:.1f}}{unit}" for column in (self.kept, self.last))
        if getattr(NAMES[self.runs], self.kept).minus[self.last].chance:
            kept = "no gain shown"
        return f"| {self.data}{dagger(NAMES[self.runs])} | {self.write} | {VALUES[self.measure]} | {kept} ({last}) |"


SETTINGS = [
    Setting("table", "`RiskMonitor()`", "as_they_are"),
    Setting(
        "several samples of one person or machine",
        "[`RiskMonitor(inputs=…, targets=…, groups=…)`](docs/guide/hold_out.md#groups)",
        "groups_all",
        columns=("groups_by_accuracy_accuracy_lost", "never_accuracy_lost"),
    ),
    Setting(
        "[few positives](docs/guide/few_positives.md), but one in a hundred or more: churn, fraud",
        '`RiskMonitor("binary")`',
        "few",
        "auc",
    ),
    Setting(
        "[several labels, some unknown](docs/guide/several_labels.md): molecules, by fingerprints",
        '`RiskMonitor("multilabel")`',
        "molecules_all",
        "auc",
        ("expected_auroc_auroc_lost", "never_auroc_lost"),
    ),
    Setting(
        "[a number](docs/guide/regression.md), half with added noise", '`RiskMonitor("regression")`', "numbers", "loss"
    ),
    Setting("texts, from scratch", "`RiskMonitor()`", "texts"),
    Setting("photos, from scratch", "[`RiskMonitor(features=encoder)`](docs/guide/encoders.md)", "photos_lite0"),
    Setting("photos, fine-tuned; the encoder is larger", "`RiskMonitor(features=encoder)`", "tuned_lite0"),
]
SETTINGS = [each for each in SETTINGS if each.count > 1]
TABLE = [
    "| your data | write | value | kept epoch (last) loses |",
    "|---|---|---|---|",
    *(each.line() for each in SETTINGS),
]


def price() -> str:
    """Say what a stop saves and costs, over the rows of the study of stopping that tell points."""
    shares, more = [], []
    for each in SETTINGS:
        runs, stopped = NAMES[each.runs], each.lost(f"stopped_{each.measure}")
        if not each.columns and each.measure != "loss" and runs.frame[stopped].notna().any():
            shares.append(getattr(runs, f"stopped_{each.measure}_epochs").mean)
            more.append(getattr(runs, stopped).minus[each.kept].mean)
    if not shares:
        return ""
    return f"""
**To save time**, stop where the value has not improved for a third of all epochs, by
`EarlyStopping("val/expected_accuracy", mode="max", patience=10)`: that runs {min(shares):.0f} to {max(shares):.0f} % of
them, and loses up to {max(more):.1f} points more."""


def how_good() -> str:
    """Say what an estimate on tables is worth."""
    worth = f"On tables as they are, it is as good as that of {WORTH('as_they_are')} validation labels."
    if NAMES["tables"].frame["off_where_it_leads"].isna().all():
        return worth
    too_low = -NAMES["tables"].off_where_it_leads.mean
    return f"{worth} Networks better than the reference are underestimated by {too_low:.1f} points."


BLOCKS = {
    "settings": "\n".join(TABLE),
    "price": price(),
    "sizes": f"- **Measured** up to {heaviest()}." if heaviest() else "",
    "worth in labels": f"**How good is the estimate?** {how_good()}" if NAMES["as_they_are"].count else "",
    "tenth": """
**Why not choose by a tenth?** Over {tables_held.gained.count} runs on tables, that cost
{tables_held.gained.interval:.1f} points more than `RiskMonitor`; with a second training on all labels,
{tables_held.retrained_accuracy_lost.minus[expected_accuracy_accuracy_lost]:.1f}.""",
}
