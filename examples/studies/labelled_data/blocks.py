"""What pages tell of these trials."""

from pathlib import Path

from summaries import Runs, table

MEASURES = ["epoch", "accuracy", "accuracy_lost", "last_line"]
RUNS = Runs.read_long(Path(__file__).with_name("results.csv"), MEASURES, run=["data", "seed"])
TABLE, DIGITS = RUNS.where("data == 'table'"), RUNS.where("data == 'digits'")
ROWS = {
    "a tenth, `validation_labels=True`": "tenth_with_labels",
    "without its labels": "tenth_without_labels",
    "by its loss": "tenth_by_loss",
    "by its Brier score": "tenth_by_brier",
    "the training set": "training_set",
    "500 unlabelled": "unlabelled",
    "the same, 50 labels split off": "split_off",
    "last epoch": "last_epoch",
    "best of nine tenths": "best_of_nine_tenths",
    "best of all": "best_of_all",
}


def lost_by_seed(rule: str) -> str:
    """Tell the points lost on digits, in bold where the reference disagreed; nothing of rules without a last line."""
    told = []
    for _, run in DIGITS.frame.sort_values("seed").iterrows():
        lost, last_line = f"{run[f'{rule}_accuracy_lost']:.1f}".replace("-", "−"), run[f"{rule}_last_line"]
        if isinstance(last_line, str):
            told.append(f"**{lost}**" if "The reference disagrees" in last_line else lost)
    return ", ".join(told)


NAMES = {"table": TABLE, "digits": DIGITS, "lost_by_seed": {rule: lost_by_seed(rule) for rule in ROWS.values()}}
BLOCKS = {
    "labelled data in short": """
**On a tenth, the criterion chose
{table.tenth_by_loss_accuracy_lost.minus[tenth_with_labels_accuracy_lost]:.1f} ±
{table.tenth_by_loss_accuracy_lost.minus[tenth_with_labels_accuracy_lost].stderr:.1f} points better than the loss
(table), {digits.tenth_with_labels_accuracy_lost.minus[tenth_by_loss_accuracy_lost]:.1f} ±
{digits.tenth_with_labels_accuracy_lost.minus[tenth_by_loss_accuracy_lost].stderr:.1f} worse (digits). On the training
set, it lost {digits.training_set_accuracy_lost.minus[tenth_with_labels_accuracy_lost]:.1f} ±
{digits.training_set_accuracy_lost.minus[tenth_with_labels_accuracy_lost].stderr:.1f} more on digits.**""",
    "labelled data": table(
        "validated on",
        ROWS,
        {
            "table": "{table.ROW_accuracy:.3f} ± {table.ROW_accuracy.stderr:.3f}",
            "digits": "{digits.ROW_accuracy:.3f} ± {digits.ROW_accuracy.stderr:.3f}",
            "points lost on digits": "{lost_by_seed[ROW]}",
        },
    ),
}
