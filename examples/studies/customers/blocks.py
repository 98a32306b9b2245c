"""What pages tell of copies of rows, and of the threshold of F1."""

from pathlib import Path

import pandas as pd

FOUND = pd.read_csv(Path(__file__).with_name("results.csv")).set_index(["part", "case"]).sort_index()
SPLITS = FOUND["seed"].nunique()
COPIES = {
    "as they are": "as they are",
    "with SMOTE": "SMOTE",
    "each row three times, jittered": "jitter",
    "with mixup": "mixup",
}
THRESHOLDS = {"0.5": "half", "their share": "share"}


def copies(label: str, case: str) -> str:
    left_out, new = 100 * FOUND.loc[("copies", case), ["left_out", "new"]].mean()
    return f"| {label} | {left_out:.0f} % | {new:.0f} % |"


def chosen(part: str, label: str, case: str) -> str:
    rows = FOUND.loc[(part, case)]
    share = 100 * FOUND.loc[(part, "share"), "threshold"].mean()
    epochs = f"{rows['epoch'].min():.0f} to {rows['epoch'].max():.0f}"
    return f"| {share:.0f} % | {label} | {epochs} | {rows['f1'].mean():.2f} | {rows['last_f1'].mean():.2f} |"


NAMES: dict[str, object] = {}
BLOCKS = {
    "customers: copies": "\n".join(
        [
            f"| 1,000 of the front page's customers ({SPLITS} splits) | left-out labels predicted | new ones |",
            "|---|---|---|",
            *(copies(*case) for case in COPIES.items()),
        ]
    ),
    "customers: F1": "\n".join(
        [
            f"| positives ({SPLITS} splits) | threshold | expected F1 is highest in epoch | F1 then | in the last |",
            "|---|---|---|---|---|",
            *(chosen(part, *case) for part in ("few positives", "as they are") for case in THRESHOLDS.items()),
        ]
    ),
}
