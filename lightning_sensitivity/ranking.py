"""What a comparison of models found: a table, its ties, its rank correlations with the truth, and a picture."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import combinations
from textwrap import shorten
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torchmetrics.functional import kendall_rank_corrcoef

from lightning_sensitivity.scores import ModelScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Comparison", "KendallTau"]

TRUTHS = ("loss", "error")
_SHOWN_APART = ("name", "sensitivity", "sensitivity_stderr", "note")  # in the printed table
_NOT_SCORES = ("name", "sensitivity_stderr", "seconds", "note", *TRUTHS)
_NUM_RESAMPLES = 1000
_MIN_MODELS = 6  # for an interval: of fewer, resamples are too few and too much alike
_ROUNDING = 1e-6  # relative, of scores from float32 outputs
_Z = 1.96  # of a 95 % interval
_MAX_NOTE = 100  # characters in the printed table


class KendallTau(NamedTuple):
    """Kendall's τ-b between a score and the truth, over models.

    Attributes:
        tau: From -1 to 1.
        low: Lower end of the 95 % bootstrap interval over models; nan for fewer than six, and where all
            resamples agree.
        high: Upper end.
    """

    tau: float
    low: float
    high: float


class Comparison:
    """What :func:`~lightning_sensitivity.compare_models` or :func:`~lightning_sensitivity.compare_runs` found.

    Iterating gives :class:`ModelScores`, from the least to the most sensitive model, with those that failed last, and a
    name in brackets those of one. ``print`` shows it as a table.

    Args:
        models: One row a model, in any order.
        by_sample: For each model and score one number a sample, ``(N,)``, with the score as their mean; the same
            samples for all models.
    """

    def __init__(
        self, models: Sequence[ModelScores], by_sample: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        self._models = sorted(models, key=lambda model: (math.isnan(model.sensitivity), model.sensitivity))
        self._by_sample = by_sample or {}

    def __iter__(self) -> Iterator[ModelScores]:
        """The models in their order."""
        return iter(self._models)

    def __len__(self) -> int:
        """How many models there are, with those that failed."""
        return len(self._models)

    def __getitem__(self, name: str) -> ModelScores:
        """The scores of one model.

        Args:
            name: Its name.

        Raises:
            KeyError: If there is none of that name.
        """
        for model in self._models:
            if model.name == name:
                return model
        raise KeyError(f"Expected one of {', '.join(repr(model.name) for model in self)}, but got {name!r}.")

    def rows(self) -> list[dict[str, str | float]]:
        """The table, one dict a model, for :class:`pandas.DataFrame` and its like."""
        return [asdict(model) for model in self]

    def difference(self, first: str, second: str, score: str = "sensitivity") -> tuple[float, float]:
        """How much higher one model scores than another, and the standard error of that.

        Both saw the same samples and the same noise, so that the difference is sharper than the values are.

        Args:
            first: Name of a model.
            second: Name of another one.
            score: A field of :class:`ModelScores`.

        Returns:
            The difference and its standard error over samples (nan where it is not known).
        """
        value = getattr(self[first], score) - getattr(self[second], score)
        if score in self._by_sample.get(first, {}) and score in self._by_sample.get(second, {}):
            deviation = self._by_sample[first][score] - self._by_sample[second][score]
            deviation = deviation[deviation.isfinite()]
            return value, float(deviation.std() / math.sqrt(len(deviation)))
        if score == "sensitivity":
            return value, math.hypot(self[first].sensitivity_stderr, self[second].sensitivity_stderr)
        return value, math.nan

    def ties(self, score: str = "sensitivity") -> dict[str, list[str]]:
        """Which models a score cannot tell apart: zero lies in the 95 % interval of their difference.

        The intervals are those of single pairs, not corrected for their number. Models whose error is not known are
        left out.

        Args:
            score: A field of :class:`ModelScores`.

        Returns:
            For each model the names of those that it ties with, in the order of the table.
        """
        names = [model.name for model in self if self._has_error(model, score)]
        tied: dict[str, list[str]] = {name: [] for name in names}
        for first, second in combinations(names, 2):
            value, stderr = self.difference(first, second, score)
            # Two copies of a model may differ by the rounding of their outputs, more than by its standard error.
            if abs(value) <= max(_Z * stderr, _ROUNDING * abs(getattr(self[first], score))):
                tied[first].append(second)
                tied[second].append(first)
        return tied

    def _has_error(self, model: ModelScores, score: str) -> bool:
        return score in self._by_sample.get(model.name, {}) or (
            score == "sensitivity" and math.isfinite(model.sensitivity_stderr)
        )

    def kendall(self, truth: str = "loss") -> dict[str, KendallTau]:
        """How well each score orders the models, where labels say what the order is.

        Args:
            truth: ``"loss"`` or ``"error"``.

        Returns:
            Kendall's τ-b of each score with the truth. Scores that not all models have, or that are
            the same for all, are left out. Empty without
            labels, or for fewer than three models.

        Raises:
            ValueError: If ``truth`` is something else.
        """
        if truth not in TRUTHS:
            raise ValueError(f"Expected `truth` to be 'loss' or 'error', but got {truth!r}.")
        models = [model for model in self if math.isfinite(getattr(model, truth))]
        if len(models) < 3:
            return {}
        names = [field.name for field in fields(ModelScores) if field.name not in _NOT_SCORES]
        names = [name for name in names if all(math.isfinite(getattr(model, name)) for model in models)]
        scores = torch.tensor([[getattr(model, name) for name in names] for model in models], dtype=torch.float64)
        true = torch.tensor([getattr(model, truth) for model in models], dtype=torch.float64)

        generator = torch.Generator().manual_seed(0)
        resamples = torch.randint(len(models), (_NUM_RESAMPLES, len(models)), generator=generator)
        picks = torch.cat([torch.arange(len(models))[None], resamples])  # the models themselves come first
        columns = scores[picks].permute(1, 0, 2).flatten(1)
        targets = true[picks].T.repeat_interleave(len(names), 1)
        taus = kendall_rank_corrcoef(columns, targets)
        assert isinstance(taus, Tensor)  # without a test there are no p-values beside it
        taus = taus.reshape(-1, len(names))
        low, high = taus[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=taus.dtype), 0)
        is_interval = (low < high) & (len(models) >= _MIN_MODELS)
        low, high = (end.where(is_interval, torch.nan) for end in (low, high))
        rows = zip(names, taus[0], low, high, strict=True)
        return {name: KendallTau(*map(float, triple)) for name, *triple in rows if bool(triple[0].isfinite())}

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table, with all digits; numbers that have no meaning stay empty.

        Args:
            path: Where to; folders on the way are made.
        """
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(ModelScores)])
            writer.writeheader()
            for row in self.rows():
                writer.writerow({key: "" if value != value else value for key, value in row.items()})

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the comparison: with labels, the loss against sensitivity; without, sensitivity alone.

        Args:
            ax: Where to draw; by default a new figure.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        from lightning_sensitivity.plotting import plot_comparison

        return plot_comparison(self, ax)

    def __str__(self) -> str:
        """The table, and under it how well each score orders the models, if labels say so."""
        rank = {model.name: str(place) for place, model in enumerate(self, 1)}
        tied = self.ties()
        columns: dict[str, list[str]] = {
            "": list(rank.values()),
            "model": list(rank),
            "sensitivity": [_with_error(model.sensitivity, model.sensitivity_stderr) for model in self],
            "ties with": [", ".join(rank[other] for other in tied.get(name, [])) for name in rank],
        }
        for name in (field.name for field in fields(ModelScores) if field.name not in _SHOWN_APART):
            values = [getattr(model, name) for model in self]
            if any(map(math.isfinite, values)):
                columns[_title(name)] = list(map(_short, values))
        if any(model.note for model in self):
            columns["note"] = [shorten(model.note, _MAX_NOTE) for model in self]
        lines = _aligned(columns)
        taus = {truth: self.kendall(truth) for truth in TRUTHS}
        if taus["loss"]:
            scores = list(taus["loss"])
            lines += [
                "",
                *_aligned(
                    {"Kendall's τ with": [_title(score) for score in scores]}
                    | {
                        truth: [_interval(of_score[score]) if score in of_score else "" for score in scores]
                        for truth, of_score in taus.items()
                        if of_score
                    }
                ),
            ]
        return "\n".join(lines)

    __repr__ = __str__  # a table is what a notebook is to show


def _aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a table: text to the left, the rest to the right."""
    widths = [max(map(len, [title, *cells])) for title, cells in columns.items()]
    to_left = [title in ("model", "note", "Kendall's τ with") for title in columns]
    return [
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, to_left, strict=True)
        ).rstrip()
        for line in (tuple(columns), *zip(*columns.values(), strict=True))
    ]


def _title(score: str) -> str:
    return score.removeprefix("num_").replace("_", " ")


def _short(value: float) -> str:
    if not math.isfinite(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 1000 and value < 1e9 and value == round(value) else f"{value:.3g}"


def _with_error(value: float, stderr: float) -> str:
    return f"{_short(value)} ± {stderr:.1g}" if math.isfinite(stderr) else _short(value)


def _interval(tau: KendallTau) -> str:
    return f"{tau.tau:+.2f}" + (f" [{tau.low:+.2f}, {tau.high:+.2f}]" if math.isfinite(tau.low) else "")
