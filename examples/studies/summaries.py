"""What a text may say of the runs of a study: counts, means, intervals, differences by run.

A study keeps its runs in one CSV, and beside it `blocks.py`, which says what pages tell of them: texts whose numbers
are fields of `str.format`, filled by `tables.py`.

    RUNS = Runs.read(Path(__file__).with_name("results.csv"))  # a row for each run; or, with a row for each rule:
    RUNS = Runs.read_long(Path(__file__).with_name("results.csv"), measures=["accuracy_lost", "loss_regret"])
    NAMES = {"noisy": RUNS.where("is_noisy")}
    BLOCKS = {"in short": "{noisy.count} runs lose {noisy.criterion_accuracy_lost:.1f} points."}

A column stands for its mean. It has `percent` (of shares), `median`, `worst`, `p90` (or any other percentage), `count`,
`stderr`, `only` (of a single row), `above` and `below` (how many are above and below 0), and a 95 % interval of the
mean: `low`, `high`, `bounds` ("low to high"), `interval` ("mean [low, high]"), and `chance`: " (may be chance)" if 0 is
inside. `minus[COLUMN]`, its difference from another column in the same run, has all of these, too.

Runs of the same table are not independent: if there is a column `table`, the mean is that of the means of tables, and
the interval is one over tables. It is Student's up to 20 of them, and a bootstrap's (BCa) above.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

MOST_FOR_STUDENT = 20  # tables


class NoRunsError(ValueError):
    """No run has a value: those of a text were not recorded, or judged by another version of the package."""


class Number(float):
    """A number with a true minus sign."""

    def __format__(self, form: str) -> str:
        return super().__format__(form).replace("-", "−")


class Numbers:
    """Several numbers that are told together, each in the same format."""

    def __init__(self, text: str, *numbers: Number) -> None:
        self.text = text
        self.numbers = numbers

    def __format__(self, form: str) -> str:
        return self.text.format(*(format(number, form) for number in self.numbers))


class Values:
    """A column of some runs, without those that have no value."""

    def __init__(self, runs: pd.DataFrame, values: pd.Series) -> None:
        self.runs = runs
        self.values = values.dropna()
        if self.values.empty:
            raise NoRunsError(f"no run has a value of {values.name!r}")
        has_tables = "table" in runs and pd.api.types.is_numeric_dtype(values)
        self.means = self.values.groupby(runs["table"]).mean() if has_tables else self.values

    def __format__(self, form: str) -> str:
        return format(self.mean, form)

    @property
    def count(self) -> int:
        return len(self.values)

    @property
    def tables(self) -> int:
        """The number of tables, or of runs where nothing repeats."""
        return len(self.means)

    @property
    def mean(self) -> Number:
        return Number(self.means.mean())

    @property
    def stderr(self) -> Number:
        return Number(self.means.sem())

    @property
    def percent(self) -> Number:
        """The mean of shares, in percent."""
        return Number(100 * self.mean)

    @property
    def median(self) -> Number:
        return Number(self.values.median())

    @property
    def worst(self) -> Number:
        return Number(self.values.max())

    @property
    def above(self) -> Number:
        """The number of values above 0."""
        return Number((self.values > 0).sum())

    @property
    def below(self) -> Number:
        """The number of values below 0."""
        return Number((self.values < 0).sum())

    @property
    def only(self) -> Number | str:
        """The value of a single row."""
        value = self.values.item()
        return value if isinstance(value, str) else Number(value)

    @property
    def low(self) -> Number:
        return self._bounds()[0]

    @property
    def high(self) -> Number:
        return self._bounds()[1]

    @property
    def bounds(self) -> Numbers:
        return Numbers("{} to {}", *self._bounds())

    @property
    def interval(self) -> Numbers:
        return Numbers("{} [{}, {}]", self.mean, *self._bounds())

    @property
    def chance(self) -> str:
        low, high = self._bounds()
        return "" if low > 0 or high < 0 else " (may be chance)"

    @property
    def minus(self) -> Differences:
        return Differences(self)

    def __getattr__(self, name: str) -> Number:
        """Give a quantile: `p90` is the value that nine runs of ten are below."""
        if not name.startswith("p") or not name[1:].isdigit():
            raise AttributeError(f"a column has no {name!r}")
        return Number(self.values.quantile(int(name[1:]) / 100))

    def _bounds(self) -> tuple[Number, Number]:
        means = self.means.to_numpy(float)
        if len(means) < 2 or np.ptp(means) == 0:
            return (self.mean, self.mean) if len(means) > 1 else (Number("nan"), Number("nan"))
        if len(means) <= MOST_FOR_STUDENT:
            low, high = stats.t.interval(0.95, len(means) - 1, means.mean(), stats.sem(means))
        else:
            low, high = stats.bootstrap([means], np.mean, rng=np.random.default_rng(0)).confidence_interval
        return Number(low), Number(high)


class Differences:
    """The differences of one column from others: `differences["never_stop_accuracy_lost"]`."""

    def __init__(self, values: Values) -> None:
        self.values = values

    def __getitem__(self, column: str) -> Values:
        runs = self.values.runs
        return Values(runs, (self.values.values - runs[column]).rename(f"{self.values.values.name} - {column}"))


class Runs:
    """Some runs of a study; each column of its CSV is an attribute."""

    def __init__(self, frame: pd.DataFrame) -> None:
        self.frame = frame

    @classmethod
    def read(cls, file: Path) -> Runs:
        """Read a CSV with one row a run."""
        return cls(pd.read_csv(file))

    @classmethod
    def read_long(cls, file: Path, measures: Sequence[str], run: Sequence[str] = ("run",), rule: str = "rule") -> Runs:
        """Read a CSV with one row a run and rule: each measure becomes a column `RULE_MEASURE`.

        Args:
            file: The CSV.
            measures: The columns that differ between rules, such as `["accuracy_lost", "loss_regret"]`.
            run: The columns that tell one run from another.
            rule: The column with the name of the rule.

        Raises:
            ValueError: If another column differs between the rules of a run, or a run has a rule twice.
        """
        frame = pd.read_csv(file)
        about = frame.drop(columns=[rule, *measures]).drop_duplicates()
        repeated = about[about.duplicated([*run])]
        if len(repeated):
            raise ValueError(f"a run differs between its rules in more than {measures}: {repeated.iloc[0].to_dict()}")
        wide = frame.pivot(index=[*run], columns=rule, values=[*measures])
        wide.columns = [f"{each}_{measure}" for measure, each in wide.columns]
        return cls(about.merge(wide.infer_objects().reset_index(), on=[*run]))

    @property
    def count(self) -> int:
        return len(self.frame)

    def where(self, condition: str) -> Runs:
        """Give the runs for which a condition holds, such as `is_noisy and n < 400`."""
        return Runs(self.frame.query(condition))

    def __getattr__(self, column: str) -> Values:
        if self.frame.empty and not column.startswith("_"):
            raise NoRunsError(f"there are no runs to tell {column!r} of")
        if column.startswith("_") or column not in self.frame:
            raise AttributeError(f"the runs have no column {column!r}")
        return Values(self.frame, self.frame[column])


def lines(rows: dict[str, str], columns: dict[str, str]) -> str:
    """Give the text of the lines of a table: in each column's text, ROW stands for what the row is of."""
    filled = [[label, *(cell.replace("ROW", row) for cell in columns.values())] for label, row in rows.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in filled)


def table(corner: str, rows: dict[str, str], columns: dict[str, str]) -> str:
    """Give the text of a table, by what its rows and its columns are called; none without rows or columns."""
    if not rows or not columns:
        return ""
    head = " | ".join([corner, *columns])
    rule = "|---" * (1 + head.count(" | "))
    return f"| {head} |\n{rule}|\n{lines(rows, columns)}"


def across(columns: dict[str, str], cell: str) -> dict[str, str]:
    """Give columns that have the same cell, in which COLUMN stands for what the column is of."""
    return {label: cell.replace("COLUMN", column) for label, column in columns.items()}
