"""What a comparison of models gives: scores, a table, ties, and rank correlations with the truth."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from textwrap import fill

import torch
from torchmetrics.functional import kendall_rank_corrcoef

from lightning_sensitivity.functional.scores import ModelScores, Samples

_MIN_RANKED = 6  # of fewer models, a rank correlation says nothing
_ROUNDING = 1e-6  # relative, of scores from float32 outputs
_Z = 1.96  # of a 95 % interval
_WIDTH = 100  # of notes in the printed table


class Comparison:
    """Show what :func:`~lightning_sensitivity.compare_models` gives.

    Iterating gives :class:`ModelScores`, sorted by ``consensus_error`` where there are three models or more, else by
    sensitivity, with those that failed last; an index or a name in brackets gives those of one. ``print`` shows the
    main columns; :meth:`rows` has all.

    Args:
        models: One row per model, in any order.
        by_sample: For each model and score one number per sample, ``(N,)``, with the score as their mean; the same
            samples for all models.

    Example:
        >>> from lightning_sensitivity.comparison import Comparison, ModelScores
        >>> result = Comparison([ModelScores("wide", 0.2, 0.01, loss=0.5), ModelScores("small", 0.1, 0.01)])
        >>> print(result)
        model sensitivity loss
        small  0.1 ± 0.01
        wide   0.2 ± 0.01  0.5
        <BLANKLINE>
        Sorted by sensitivity, which is no order of quality.
        >>> result["wide"].loss, result[0].name
        (0.5, 'small')
    """

    def __init__(self, models: Sequence[ModelScores], by_sample: Mapping[str, Samples] | None = None) -> None:
        self._by_sample = by_sample or {}
        has_consensus = any(math.isfinite(model.consensus_error) for model in models)  # of three models or more
        self._order = "consensus_error" if has_consensus else "sensitivity"
        ranks = {model.name: getattr(model, self._order) for model in models}
        self._models = sorted(models, key=lambda model: (math.isnan(ranks[model.name]), ranks[model.name]))

    def __iter__(self) -> Iterator[ModelScores]:
        """Iterate over the models in their order."""
        return iter(self._models)

    def __len__(self) -> int:
        """Count the models, with those that failed."""
        return len(self._models)

    def __getitem__(self, key: int | str) -> ModelScores:
        """Return the scores of one model, by its place or its name."""
        return self._models[key] if isinstance(key, int) else {model.name: model for model in self}[key]

    def rows(self) -> list[dict[str, str | float]]:
        """Return the table, one dict per model, for :class:`pandas.DataFrame` and its like."""
        return [asdict(model) for model in self]

    def difference(self, first: str, second: str, score: str = "sensitivity") -> tuple[float, float]:
        """Compute how much higher one model scores than another, and the standard error of that.

        Both saw the same samples and the same noise, so that the difference is sharper than the values are.

        Args:
            first: Name of a model.
            second: Name of another one.
            score: A field of :class:`ModelScores`.

        Returns:
            The difference and its standard error over samples (nan where it is not known).
        """
        value = getattr(self[first], score) - getattr(self[second], score)
        one, other = (self._by_sample.get(name, {}).get(score, torch.full((2,), math.nan)) for name in (first, second))
        return value, float((one - other).std() / math.sqrt(len(one))) if one.shape == other.shape else math.nan

    def ties(self, score: str = "sensitivity") -> dict[str, list[str]]:
        """Name the models that a score cannot tell apart: zero lies in the 95 % interval of their difference.

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

    def kendall(self, truth: str = "loss") -> dict[str, float]:
        """Compute how well each score orders the models, where labels say what the order is.

        Args:
            truth: ``"loss"`` or ``"error"``.

        Returns:
            Kendall's τ-b of each score with the truth. Scores that not all models have, or that are the same for all,
            are left out. Empty without labels, or for fewer than six models.

        Raises:
            ValueError: If ``truth`` is something else.
        """
        if truth not in ("loss", "error"):
            raise ValueError(f"Expected `truth` to be 'loss' or 'error', but got {truth!r}.")
        models = [model for model in self if math.isfinite(getattr(model, truth))]
        if len(models) < _MIN_RANKED:
            return {}
        columns = {
            name: torch.tensor([getattr(model, name) for model in models], dtype=torch.float64)
            for name in (truth, "sensitivity", "loss_estimate", "consensus_error", "consensus_loss", "num_parameters")
        }
        ranks = {name: x for name, x in columns.items() if x.isfinite().all() and x.std() > 0}
        if (true := ranks.pop(truth, None)) is None:
            return {}
        return {name: float(torch.as_tensor(kendall_rank_corrcoef(x, true, variant="b"))) for name, x in ranks.items()}

    def __str__(self) -> str:
        """Print the main columns, the notes, and, where there are labels, how well each score orders the models."""
        tied = self.ties()
        columns = {
            "model": [model.name + " *" * bool(model.note) for model in self],
            "consensus_error": [_short(model.consensus_error) for model in self],
            "consensus_loss": [_short(model.consensus_loss) for model in self],
            "sensitivity": [_with_error(model.sensitivity, model.sensitivity_stderr) for model in self],
            "ties with": [", ".join(tied.get(model.name, [])) for model in self],
            "loss": [_short(model.loss) for model in self],
            "error": [_short(model.error) for model in self],
        }
        order = "sensitivity, which is no order of quality"
        if self._order == "consensus_error":
            order = "consensus_error: how often the other models disagree. It ranks by the error"
        lines = [*_aligned({title: cells for title, cells in columns.items() if any(cells)}), "", f"Sorted by {order}."]
        if notes := [fill(f"* {model.name}: {model.note}", _WIDTH) for model in self if model.note]:
            lines += ["", *notes]
        for truth in ("loss", "error"):
            if taus := self.kendall(truth):
                listed = ", ".join(f"{name} {tau:+.2f}" for name, tau in taus.items())
                lines += ["", fill(f"Kendall's τ with the {truth}: {listed}", _WIDTH)]
        return "\n".join(lines)

    __repr__ = __str__  # a table is what a notebook is to show


def _aligned(columns: Mapping[str, Sequence[str]]) -> list[str]:
    """Lay out columns with their titles in lines, names to the left."""
    padded = []
    for title, cells in columns.items():
        width = max(map(len, [title, *cells]))
        to_left = title in ("model", "ties with")
        padded.append([cell.ljust(width) if to_left else cell.rjust(width) for cell in (title, *cells)])
    return [" ".join(line).rstrip() for line in zip(*padded, strict=True)]


def _short(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else ""


def _with_error(value: float, stderr: float) -> str:
    return f"{_short(value)} ± {stderr:.1g}" if math.isfinite(stderr) else _short(value)
