"""README's numbers of `RiskMonitor`: what its epoch loses, and what the estimate is worth."""

import runpy
from pathlib import Path

from stopping.parts import NAMES

__all__ = ["BLOCKS", "NAMES"]
WORTH = runpy.run_path(str(Path(__file__).parents[1] / "stopping" / "blocks.py"))["labels_worth"]

BLOCKS = {
    "gain": f"""
On tables, the kept epoch loses {{as_they_are.expected_accuracy_accuracy_lost:.1f}} points of accuracy against the best
one, the last epoch {{as_they_are.never_stop_accuracy_lost:.1f}}. The estimate is as good as that of
{WORTH("as_they_are")} validation labels."""
    if NAMES["as_they_are"].count
    else "",
}
