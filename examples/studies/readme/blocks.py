"""README's numbers: settings for each kind of data, what they are worth, and why not a tenth."""

import runpy
from pathlib import Path
from typing import Any, NamedTuple

from stopping.parts import NAMES as STOPPING
from stopping.parts import sizes

__all__ = ["BLOCKS", "NAMES"]
STUDIES = Path(__file__).parents[1]


def names_of(study: str) -> dict[str, Any]:
    """Give the runs of a study, by the names of its own report."""
    found = runpy.run_path(str(STUDIES / study / "blocks.py"))["NAMES"]
    return {f"{study}_{name}": runs for name, runs in found.items()}


NAMES: dict[str, Any] = STOPPING | names_of("molecules") | names_of("groups")
WORTH = runpy.run_path(str(STUDIES / "stopping" / "blocks.py"))["labels_worth"]


class Setting(NamedTuple):
    """A row of the table of settings: what to write for which data, and where its numbers are."""

    data: str
    write: str
    runs: str
    kept: str = "expected_accuracy_accuracy_lost"
    last: str = "never_stop_accuracy_lost"
    off: str = "{RUNS.level_error:.1f}"
    unit: str = ""
    keep_by: str = "accuracy, max"

    def line(self) -> str:
        kept = getattr(NAMES[self.runs], self.kept)
        lost = [f"{{{self.runs}.{column}:.1f}}{self.unit}" for column in (self.kept, self.last)]
        if kept.minus[self.last].chance:
            lost[0] = "no gain shown"
        off = self.off.replace("RUNS", self.runs)
        return f"| {' | '.join([self.data, self.write, self.keep_by, str(kept.count), off, *lost])} |"


AUC = {"keep_by": "AUROC, max", "kept": "expected_auc_auc_lost", "last": "never_stop_auc_lost"}
MOLECULES = {
    "keep_by": "AUROC, max",
    "kept": "expected_auroc_auroc_lost",
    "last": "never_auroc_lost",
    "off": "{RUNS.auroc_level_error:.1f}",
}
NUMBERS = {
    "keep_by": "loss, min",
    "kept": "expected_loss_loss_lost",
    "last": "never_stop_loss_lost",
    "off": "{RUNS.loss_error:.0f} %",
    "unit": " %",
}
GROUPS = {
    "kept": "groups_by_accuracy_accuracy_lost",
    "last": "never_accuracy_lost",
    "off": "{groups_all_heard.groups_accuracy_level_error:.1f}",
}
SETTINGS = [
    Setting("table", "`RiskMonitor()`", "as_they_are"),
    Setting(
        "several samples of one person or machine; measured on tables",
        "[`RiskMonitor(inputs=…, targets=…, groups=…)`](docs/guide/hold_out.md#groups)",
        "groups_all",
        **GROUPS,
    ),
    Setting(
        "[few positives](docs/guide/few_positives.md), but one in a hundred or more: churn, fraud",
        '`RiskMonitor("binary")`',
        "few",
        **AUC,
    ),
    Setting(
        "[several labels, some unknown](docs/guide/several_labels.md): molecules",
        '`RiskMonitor("multilabel")`',
        "molecules_all",
        **MOLECULES,
    ),
    Setting(
        "[a number](docs/guide/regression.md), in half of the runs with added noise",
        '`RiskMonitor("regression")`',
        "numbers",
        **NUMBERS,
    ),
    Setting("texts, from scratch", "`RiskMonitor()`", "texts"),
    Setting("[signals](docs/guide/data.md#signals)", "`RiskMonitor()`", "signals"),
    Setting("photos, from scratch", "[`RiskMonitor(features=encoder)`](docs/guide/encoders.md)", "photos_lite0"),
    Setting("photos, fine-tuned; the encoder is larger", "`RiskMonitor(features=encoder)`", "tuned_lite0"),
    Setting("the same; the encoder is no larger", "`RiskMonitor(features=encoder)`", "pretrained_lite0"),
]
too_low = -NAMES["tables"].off_where_it_leads.mean
TABLE = [
    "| your data | write | keep by | runs | estimate is off | kept epoch loses | last epoch loses |",
    "|---|---|---|---|---|---|---|",
    *(each.line() for each in SETTINGS if NAMES[each.runs].count),
]
BLOCKS = {
    "settings": "\n".join(TABLE),
    "sizes": f"- **Measured.** {sizes()}",
    "worth in labels": f"""
On tables, it is as good as that of {WORTH("as_they_are")} validation labels. Networks better than the reference are
underestimated by {too_low:.1f} points.""",
    "tenth": """
Over {tables_held.gained.count} runs on tables, that cost {tables_held.gained.interval:.1f} points more than
`RiskMonitor`; with a second training on all labels,
{tables_held.retrained_accuracy_lost.minus[expected_accuracy_accuracy_lost]:.1f}.""",
}
