"""What a comparison of models found: a table, its ties, its rank correlations with the truth, and a picture."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from itertools import combinations
from textwrap import fill
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.comparison.scores import ModelScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRUTHS = ("loss", "error")
_NAMES = [field.name for field in fields(ModelScores)]
_RANKED = [name for name in _NAMES if name not in ("name", "sensitivity_stderr", "seconds", "note", *_TRUTHS)]
# In columns of the printed table, if a model has them; the others are in rows and files alone.
_PRINTED = [name for name in _RANKED if name not in ("sensitivity", "variance", "num_parameters")] + [*_TRUTHS]
_WIDTH = 100  # of notes in the printed table
_NUM_RESAMPLES = 1000
_MIN_MODELS = 6  # for an interval: of fewer, resamples are too few and too much alike
_ROUNDING = 1e-6  # relative, of scores from float32 outputs
_Z = 1.96  # of a 95 % interval


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
    name in brackets those of one. ``print`` shows the main columns; :meth:`rows` and :meth:`to_csv` have all.

    Args:
        models: One row a model, in any order.
        by_sample: For each model and score one number a sample, ``(N,)``, with the score as their mean; the same
            samples for all models.

    Example:
        >>> from lightning_sensitivity.comparison import Comparison, ModelScores
        >>> result = Comparison([ModelScores("wide", 0.2, 0.01, entropy=0.5), ModelScores("small", 0.1, 0.01)])
        >>> print(result)
          model sensitivity ties entropy
        1 small  0.1 ± 0.01
        2 wide   0.2 ± 0.01          0.5
        <BLANKLINE>
        Sorted by sensitivity, which is no order of quality.
        >>> result["wide"].entropy, result.ties()
        (0.5, {'small': [], 'wide': []})
    """

    def __init__(
        self, models: Sequence[ModelScores], by_sample: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        ordered = sorted(models, key=lambda model: (math.isnan(model.sensitivity), model.sensitivity))
        self._models, self._by_sample = {model.name: model for model in ordered}, by_sample or {}

    def __iter__(self) -> Iterator[ModelScores]:
        """The models in their order."""
        return iter(self._models.values())

    def __len__(self) -> int:
        """How many models there are, with those that failed."""
        return len(self._models)

    def __getitem__(self, name: str) -> ModelScores:
        """The scores of one model, by its name."""
        return self._models[name]

    def rows(self) -> list[dict[str, str | float]]:
        """The table, one dict a model, for :class:`pandas.DataFrame` and its like."""
        return [asdict(model) for model in self]

    def to_csv(self, path: str | os.PathLike[str]) -> None:
        """Write the table, with all digits; numbers that have no meaning stay empty.

        Args:
            path: Where to; folders on the way are made.
        """
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, _NAMES)
            writer.writeheader()
            writer.writerows(
                {key: "" if value != value else value for key, value in row.items()} for row in self.rows()
            )

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
        one, other = self[first], self[second]
        value, stderr = getattr(one, score) - getattr(other, score), math.nan
        samples = [self._by_sample.get(name, {}).get(score) for name in (first, second)]
        if samples[0] is not None and samples[1] is not None:
            stderr = float((samples[0] - samples[1]).std() / math.sqrt(len(samples[0])))
        elif score == "sensitivity":
            stderr = math.hypot(one.sensitivity_stderr, other.sensitivity_stderr)
        return value, stderr

    def ties(self, score: str = "sensitivity") -> dict[str, list[str]]:
        """Which models a score cannot tell apart: zero lies in the 95 % interval of their difference.

        The intervals are those of single pairs, not corrected for their number. Models whose error is not known are
        left out.

        Args:
            score: A field of :class:`ModelScores`.

        Returns:
            For each model the names of those that it ties with, in the order of the table.
        """
        names = [model.name for model in self if math.isfinite(self.difference(model.name, model.name, score)[1])]
        tied: dict[str, list[str]] = {name: [] for name in names}
        for first, second in combinations(names, 2):
            value, stderr = self.difference(first, second, score)
            # Two copies of a model may differ by the rounding of their outputs, more than by its standard error.
            if abs(value) <= max(_Z * stderr, _ROUNDING * abs(getattr(self[first], score))):
                tied[first].append(second)
                tied[second].append(first)
        return tied

    def kendall(self, truth: str = "loss") -> dict[str, KendallTau]:
        """How well each score orders the models, where labels say what the order is.

        Args:
            truth: ``"loss"`` or ``"error"``.

        Returns:
            Kendall's τ-b of each score with the truth. Scores that not all models have, or that are the same for all,
            are left out. Empty without labels, or for fewer than three models.

        Raises:
            ValueError: If ``truth`` is something else.
        """
        if truth not in _TRUTHS:
            raise ValueError(f"Expected `truth` to be 'loss' or 'error', but got {truth!r}.")
        models = [model for model in self if math.isfinite(getattr(model, truth))]
        names = [name for name in _RANKED if all(math.isfinite(getattr(model, name)) for model in models)]
        if len(models) < 3 or not names:
            return {}
        scores = torch.tensor([[getattr(model, name) for name in (*names, truth)] for model in models]).double()
        signs = (scores[:, None] - scores).sign()  # of each pair of models, by score
        generator = torch.Generator().manual_seed(0)
        resamples = torch.randint(len(models), (_NUM_RESAMPLES, len(models)), generator=generator)
        picks = (signs[pick][:, pick] for pick in (torch.arange(len(models)), *resamples))
        products = [(each.mul(each[..., -1:]).sum((0, 1)), each.square().sum((0, 1))) for each in picks]
        taus = torch.stack([(both / (pairs * pairs[-1]).sqrt())[:-1] for both, pairs in products])
        ends = taus[1:].nanquantile(torch.tensor([0.025, 0.975], dtype=taus.dtype), 0)
        ends = ends.where((ends[0] < ends[1]) & (len(models) >= _MIN_MODELS), torch.nan)
        rows = zip(names, taus[0].tolist(), *ends.tolist(), strict=True)
        return {name: KendallTau(tau, low, high) for name, tau, low, high in rows if math.isfinite(tau)}

    def plot(self, ax: Axes | None = None) -> tuple[Figure, Axes]:
        """Draw the comparison: with labels, the loss against sensitivity; without, sensitivity alone.

        Error bars are of 95 %; the dashed line is Equation 9. Models without a positive sensitivity can't be shown in
        a logarithm.

        Args:
            ax: Where to draw; by default a new figure.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        try:
            from matplotlib import pyplot as plt
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError("A plot needs matplotlib: `pip install matplotlib`.") from error

        shown = [model for model in self if model.sensitivity > 0]
        labelled = [model for model in shown if model.loss > 0]
        if ax is None:
            height = 4.5 if labelled else max(2.5, 0.25 * len(shown))
            _, ax = plt.subplots(figsize=(8, height), layout="constrained")
        shown = labelled or shown
        x = [model.sensitivity for model in shown]
        y = [model.loss for model in shown] if labelled else list(range(len(shown)))
        ax.set_xscale("log")
        ax.set_xlabel("sensitivity S (squared units of the outputs)")
        ax.errorbar(x, y, xerr=[_Z * model.sensitivity_stderr for model in shown], fmt="o", capsize=3)
        if labelled:
            for model in shown:
                place = (model.sensitivity, model.loss)
                ax.annotate(model.name, place, (4, 4), textcoords="offset points", rotation=30, parse_math=False)
            ax.plot(x, [model.loss_estimate for model in shown], "--", color="gray", label="Equation 9")
            ax.margins(0.1)
            ax.set_yscale("log")
            ax.set_ylabel("loss")
            ax.legend()
        else:
            ax.set_yticks(y, [model.name for model in shown], parse_math=False)
            ax.invert_yaxis()  # the first of the table on top
        figure = ax.get_figure()
        assert figure is not None
        return figure, ax  # type: ignore[return-value]

    def __str__(self) -> str:
        """The main columns; under them the notes, and how well each score orders the models, if labels say so."""
        places = {model.name: str(place) for place, model in enumerate(self, 1)}
        tied = self.ties()
        columns: dict[str, list[str]] = {
            "": list(places.values()),
            "model": [model.name + " *" * bool(model.note) for model in self],
            "sensitivity": [_with_error(model.sensitivity, model.sensitivity_stderr) for model in self],
            "ties": [",".join(places[other] for other in tied.get(name, [])) for name in places],
        }
        for name in _PRINTED:
            if any(cells := [_short(getattr(model, name)) for model in self]):
                columns[name.replace("_", "\n")] = cells
        lines = [*_aligned(columns), "", "Sorted by sensitivity, which is no order of quality."]
        if notes := [fill(f"* {model.name}: {model.note}", _WIDTH) for model in self if model.note]:
            lines += ["", *notes]
        taus = {truth: self.kendall(truth) for truth in _TRUTHS}
        if scores := list(taus["loss"]):
            columns = {"Kendall's τ with": [score.removeprefix("num_").replace("_", " ") for score in scores]}
            for truth, of_score in taus.items():
                columns[truth] = [_interval(of_score[score]) if score in of_score else "" for score in scores]
            lines += ["", *_aligned(columns)]
        return "\n".join(lines)

    __repr__ = __str__  # a table is what a notebook is to show


def _aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a table, with titles of one or two lines."""
    padded = []
    height = max(title.count("\n") for title in columns)
    for title, cells in columns.items():
        column = [*[""] * (height - title.count("\n")), *title.split("\n"), *cells]
        width = max(map(len, column))
        to_left = title in ("model", "Kendall's τ with")
        padded.append([cell.ljust(width) if to_left else cell.rjust(width) for cell in column])
    return [" ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""


def _with_error(value: float, stderr: float) -> str:
    return f"{_short(value)} ± {stderr:.1g}" if math.isfinite(stderr) else _short(value)


def _interval(tau: KendallTau) -> str:
    return f"{tau.tau:+.2f}" + (f" [{tau.low:+.2f}, {tau.high:+.2f}]" if math.isfinite(tau.low) else "")
