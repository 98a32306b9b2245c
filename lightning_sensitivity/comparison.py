"""The result of a comparison of models, and its printed table."""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from textwrap import fill

from torch import Tensor

from lightning_sensitivity.functional.scores import ModelScores

_Z = 1.96  # of a 95 % interval
_ROUNDING = 1e-6  # relative, of scores from float32 outputs
_EXPLANATIONS = {
    "consensus_error": (
        "Sorted by consensus_error: the share of wrong predictions, if labels were drawn from the joint prediction of "
        "all models. consensus_loss: the loss, if labels were what the other models predict. The order of both tells "
        "more than their size. "
    ),
    "sensitivity": (
        "Sorted by sensitivity, which does not rank quality. There is no consensus_error: it needs a `task`, one "
        "prediction per sample, and three models or more that have learned something and predict the same classes. "
    ),
}


class Comparison:
    """Hold the scores of the models that :func:`~lightning_sensitivity.compare_models` compared.

    Iteration yields :class:`ModelScores` sorted by ``sorted_by``, with failed models last. ``result["wide"]`` has the
    scores of one model. ``print`` shows the main columns, ``pandas.DataFrame(result)`` has all of them.

    Args:
        models: One row per model, in any order.
        by_sample: For each model and score, one number per sample, ``(N,)``, whose mean is the score. The samples are
            the same for all models.

    Attributes:
        models: The scores of each model, sorted.
        sorted_by: ``"consensus_error"`` if there is one, else ``"sensitivity"``.

    Example:
        >>> from lightning_sensitivity.comparison import Comparison, ModelScores
        >>> result = Comparison([ModelScores("wide", 0.2, 0.01, loss=0.5), ModelScores("small", 0.1, 0.01)])
        >>> result["wide"].loss, result.models[0].name, result.sorted_by
        (0.5, 'small', 'sensitivity')
    """

    def __init__(
        self, models: Sequence[ModelScores], by_sample: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> None:
        self._by_sample = by_sample or {}
        has_consensus = any(math.isfinite(model.consensus_error) for model in models)
        self.sorted_by = "consensus_error" if has_consensus else "sensitivity"
        self.models = tuple(sorted(models, key=self._rank))

    def _rank(self, model: ModelScores) -> float:
        score: float = getattr(model, self.sorted_by)
        return math.inf if math.isnan(score) else score

    def __iter__(self) -> Iterator[ModelScores]:
        """Iterate over the models in their order."""
        return iter(self.models)

    def __len__(self) -> int:
        """Count the models, including those that failed."""
        return len(self.models)

    def __getitem__(self, name: str) -> ModelScores:
        """Return the scores of one model, by its name."""
        for model in self.models:
            if model.name == name:
                return model
        names = ", ".join(repr(model.name) for model in self.models)
        raise KeyError(f"Expected the name of a model ({names}), got {name!r}. To select by position, use `.models`.")

    def difference(self, first: str, second: str, score: str | None = None) -> tuple[float, float]:
        """Compute how much higher one model scores than another, and the standard error of the difference.

        Args:
            first: Name of a model.
            second: Name of another one.
            score: A field of :class:`ModelScores`; by default the one that sorts the table.

        Returns:
            The difference, and its standard error, or nan if it is not known.
        """
        score = score or self.sorted_by
        value = getattr(self[first], score) - getattr(self[second], score)
        one = self._by_sample.get(first, {}).get(score)
        other = self._by_sample.get(second, {}).get(score)
        if one is None or other is None:
            return value, math.nan
        return value, float((one - other).std() / math.sqrt(len(one)))

    def ties(self, score: str | None = None) -> dict[str, list[str]]:
        """List for each model the models that it ties with: zero lies in the 95 % interval of their difference.

        Each interval is for a single pair, without a correction for the number of pairs. Models whose standard error is
        unknown are left out.

        Args:
            score: A field of :class:`ModelScores`; by default the one that sorts the table.
        """
        score = score or self.sorted_by
        names = [model.name for model in self.models if score in self._by_sample.get(model.name, {})]
        tied: dict[str, list[str]] = {name: [] for name in names}
        for first, second in combinations(names, 2):
            value, stderr = self.difference(first, second, score)
            # Two copies of a model may differ through rounding of their outputs, by more than the standard error.
            rounding = _ROUNDING * abs(getattr(self[first], score))
            if abs(value) <= max(_Z * stderr, rounding):
                tied[first].append(second)
                tied[second].append(first)
        return tied

    def __str__(self) -> str:
        """Return a table of the main columns, with what it is sorted by, and the notes."""
        columns = {title: cells for title, cells in self._columns().items() if any(cells)}
        notes = [fill(f"* {model.name}: {model.note}", 100) for model in self.models if model.note]
        lines = [*_lay_out(columns), "", fill(self._explain(has_ties="ties with" in columns), 100)]
        if notes:
            lines += ["", *notes]
        return "\n".join(lines)

    __repr__ = __str__  # notebooks show the table

    def _columns(self) -> dict[str, list[str]]:
        """Lay out the columns of the table."""
        models = self.models
        tied = self.ties()
        return {
            "model": [f"{model.name} *" if model.note else model.name for model in models],
            "consensus_error": [_number(model.consensus_error) for model in models],
            "ties with": [", ".join(tied.get(model.name, [])) for model in models],
            "consensus_loss": [_number(model.consensus_loss) for model in models],
            "sensitivity": [_number(model.sensitivity, model.sensitivity_stderr) for model in models],
            "loss": [_number(model.loss) for model in models],
            "error": [_number(model.error) for model in models],
        }

    def _explain(self, has_ties: bool) -> str:
        """Explain what the table is sorted by, and what ties are."""
        explanation = _EXPLANATIONS[self.sorted_by]
        if has_ties:
            explanation += f"`ties with` names models whose {self.sorted_by} could be the same (95 % intervals)."
        return explanation


def _lay_out(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    padded = []
    for title, cells in columns.items():
        width = max(map(len, [title, *cells]))
        padded.append([cell.ljust(width) for cell in (title, *cells)])
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _number(value: float, stderr: float = math.nan) -> str:
    """Print a number in three digits with its error bar; nothing for nan."""
    if not math.isfinite(value):
        return ""
    if not math.isfinite(stderr):
        return f"{value:.3g}"
    return f"{value:.3g} ± {stderr:.1g}"
