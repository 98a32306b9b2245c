"""What the page tells of tables that tell nothing."""

from pathlib import Path

import pandas as pd

FOUND = pd.read_csv(Path(__file__).with_name("results.csv"))
TABLES = FOUND[FOUND["part"] == "tables"]
COLUMNS = [f"{rule}_{what}_lost" for what in ("accuracy", "auc", "loss") for rule in ("last", f"by_{what}")]


def line(label: str, rows: pd.DataFrame) -> str:
    """Say what is lost by the last epoch, and by what is expected."""
    areas = f"{rows['of_all_rows'].min():.2f} to {rows['of_all_rows'].max():.2f}"
    return f"| {label} ({len(rows)}) | {areas} | {' | '.join(f'{rows[column].mean():.1f}' for column in COLUMNS)} |"


NAMES: dict[str, object] = {}
BLOCKS = {
    "nothing: tables": "\n".join([
        "| runs | AUROC of all rows | accuracy lost: the last epoch | as expected | AUROC lost: the last | as expected "
        "| loss above its lowest, %: the last | as expected |\n|---|---|---|---|---|---|---|---|",
        line("said to tell nothing", TABLES[TABLES["tells_nothing"]]),
        line("all others", TABLES[~TABLES["tells_nothing"]]),
    ]),
}  # fmt: skip
