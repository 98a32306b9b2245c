"""What pages tell of stopping by sensitivity."""

from pathlib import Path
from typing import Any

from summaries import Runs, table

RUNS = Runs.read(Path(__file__).with_name("results.csv"))
NAMES: dict[str, Any] = {"runs": RUNS, "augmented": RUNS.where("is_augmented and labels == 'people'")}
RULES = {
    "last epoch": "never_stop",
    "lowest sensitivity": "sensitivity_lowest",
    "lowest Equation 9": "equation_9",
    "knee of log S": "sensitivity_knee",
}
BLOCKS = {
    "stop by sensitivity": table(
        "{runs.count} runs",
        RULES,
        {
            "accuracy lost, points: mean": "{runs.ROW_accuracy_lost:.1f}",
            "median": "{runs.ROW_accuracy_lost.median:.1f}",
            "loss above the lowest, %: mean": "{runs.ROW_loss_regret:.0f}",
        },
    ),
    "augmented runs": """
On {augmented.count} such runs with human labels (at most 10,000 images), the last epoch lost
{augmented.never_stop_accuracy_lost:.1f} points against the best one.""",
}
