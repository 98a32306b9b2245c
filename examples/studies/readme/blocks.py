"""README's numbers: settings for each kind of data, what they are worth, and why not a tenth."""

import runpy
from pathlib import Path

from stopping.parts import NAMES

__all__ = ["BLOCKS", "NAMES"]
PAGES = runpy.run_path(str(Path(__file__).parents[1] / "pages" / "blocks.py"))
WORTH = {name.removeprefix("README: "): text.strip() for name, text in PAGES["BLOCKS"].items()}


def cell(part: str, rule: str, measure: str, end: str = "") -> str:
    """Give what an epoch loses, without labels and in the last one, with a sign where it may be chance."""
    column, last = f"{rule}_{measure}_lost", f"never_stop_{measure}_lost"
    values = getattr(NAMES[part], column)
    doubt = " (?)" if values.minus[last].chance else ""
    return f"{{{part}.{column}:.1f}}{end}{doubt} | {{{part}.{last}:.1f}}{end}{doubt}"


def off(part: str) -> str:
    """Give how far the expected accuracy is off."""
    return f"{{{part}.level_error:.1f}}"


ROWS = {
    "table | `RiskMonitor()`": ("as_they_are", "expected_accuracy", "accuracy", ""),
    "table, a fifth of the labels wrong | the same": ("fifth", "expected_accuracy", "accuracy", ""),
    "table of 5,000 to 20,000 rows | the same": ("large", "expected_accuracy", "accuracy", ""),
    '[few positives](docs/guide/few_positives.md): AUROC | `RiskMonitor("binary")`': ("few", "expected_auc", "auc", ""),
    '[a number](docs/guide/regression.md): squared error | `RiskMonitor("regression")`': (
        "numbers",
        "expected_loss",
        "loss",
        " %",
    ),
    "texts | `RiskMonitor()`": ("texts", "expected_accuracy", "accuracy", ""),
    "signals | `RiskMonitor()`": ("signals", "expected_accuracy", "accuracy", ""),
    "photos | [`RiskMonitor(features=encoder)`](docs/guide/encoders.md), pretrained": (
        "photos_lite0",
        "expected_accuracy",
        "accuracy",
        "",
    ),
    "a fine-tuned ResNet | the same, stronger than yours": ("tuned_lite0", "expected_accuracy", "accuracy", ""),
    "a fine-tuned EfficientNet-Lite0 | the same": ("pretrained_lite0", "expected_accuracy", "accuracy", ""),
}


def settings() -> str:
    """Give a row for each kind of data: what to write, and what it is worth."""
    lines = ["| your data | write | off | kept | last |", "|---|---|---|---|---|"]
    for label, (part, rule, measure, end) in ROWS.items():
        level = off(part) if NAMES[part].frame["level_error"].notna().any() else ""
        if part == "numbers":
            level = "{numbers.loss_error:.0f} %"
        lines.append(f"| {label} | {level} | {cell(part, rule, measure, end)} |")
    return "\n".join(lines)


TENTH = """
Because training then loses a tenth of its labels, and few, noisy ones choose: on @tenth of tables@ that was
@tenth gained@ points worse (@tenth, trained again@, if then trained again on all), on large ones @tenth of large@.
"""
WORTH_IN_LABELS = runpy.run_path(str(Path(__file__).parents[1] / "stopping" / "blocks.py"))["labels_worth"]
LABELS = f"On tables, the estimate of accuracy is as good as {WORTH_IN_LABELS('as_they_are')} labels would be"
LABELS += ", and that of the loss as 600: @expected loss@."
BLOCKS = {
    "tenth": TENTH,
    "worth in labels": LABELS,
    "settings": settings(),
    "falls short": "on tables by {tables.off_where_it_leads:.1f} points, in the epochs where it is",
}
for name, text in WORTH.items():
    BLOCKS = {block: whole.replace(f"@{name}@", text) for block, whole in BLOCKS.items()}
