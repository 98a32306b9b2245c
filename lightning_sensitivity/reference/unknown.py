"""Labels of which some are unknown, column by column, for learners that need them all."""

from typing import Any, TypeAlias

import numpy as np

from lightning_sensitivity.reference.blocks import Matrix
from lightning_sensitivity.reference.kinds import Array

# Which samples to learn from, and which to predict then; None where each is left out by itself.
Folds: TypeAlias = list[tuple[Array, Array]] | None

_FEWEST = 4  # known labels of a column, from which on there is something to learn
_SMALL = 1e-3  # weight of what is known among the targets of a forest, too small for it to split by
_LEAST = 1e-6  # share of known labels around a sample


class KnownTargets:
    """What a forest learns in place of labels of which some are unknown, and predicts by it.

    A tree predicts means over the labels in a leaf. So it gets the label's difference from its mean, 0 where it
    is unknown, and beside it a small number where it is known: the ratio of both is the mean of known labels.

    Args:
        y: Labels ``(N, C)``, nan where they are unknown.

    Attributes:
        targets: What to learn, ``(N, C)`` or ``(N, 2 C)``.
        forest: The forest that has learned it.
    """

    def __init__(self, y: Array) -> None:
        self.forest: Any = None
        is_known = ~np.isnan(y)
        self._are_all_known = bool(is_known.all())
        self._means = _column_means(y)
        differences = np.where(is_known, y - self._means, 0.0)
        self.targets = y if self._are_all_known else np.hstack([differences, _SMALL * is_known])

    def labels(self, predicted: Array) -> Array:
        """Turn what was predicted of the targets into labels, ``(M, C)``."""
        if self._are_all_known:
            return predicted
        differences, shares = np.split(predicted, 2, axis=1)
        return self._means + differences / np.maximum(shares / _SMALL, _LEAST)

    def predict(self, matrix: Matrix) -> Array:
        """Predict labels, ``(M, C)``."""
        return self.labels(self.forest.predict(matrix))


class ByColumns:
    """Models of some columns each, which were fitted to other samples; a column without one has the mean of its labels.

    Args:
        y: Labels ``(N, C)``, nan where they are unknown.

    Attributes:
        parts: The columns, and their model.
    """

    def __init__(self, y: Array) -> None:
        self._means = _column_means(y)
        self.parts: list[tuple[Array, Any]] = []

    def predict(self, matrix: Matrix) -> Array:
        """Predict all columns, ``(M, C)``."""
        predicted = np.tile(self._means, (matrix.shape[0], 1))
        for columns, model in self.parts:
            predicted[:, columns] = model.predict(matrix).reshape(len(predicted), -1)
        return predicted

    def filled(self, left_out: Array, matrix: Matrix) -> Array:
        """Fill in missing left-out predictions, of samples without a label."""
        is_missing = np.isnan(left_out)
        return np.where(is_missing, self.predict(matrix), left_out) if is_missing.any() else left_out


def _column_means(y: Array) -> Array:
    """Return the mean of the known labels of each column, ``(C,)``; ½ without one."""
    is_known = ~np.isnan(y)
    return np.where(is_known.any(0), np.nansum(y, 0) / np.maximum(is_known.sum(0), 1), 0.5)


def same_samples(y: Array, folds: Folds) -> list[tuple[Array, Array, Folds]]:
    """List columns that are known for the same samples: these samples, ``(M,)``, the columns, and folds of them."""
    parts = []
    masks, which = np.unique(~np.isnan(y), axis=1, return_inverse=True)
    for place, is_known in enumerate(masks.T):
        if is_known.sum() >= _FEWEST:
            samples = is_known.nonzero()[0]
            own_folds = None if folds is None else _within(folds, samples)
            parts.append((samples, (which.ravel() == place).nonzero()[0], own_folds))
    return parts


def _within(folds: list[tuple[Array, Array]], samples: Array) -> list[tuple[Array, Array]]:
    """Return folds of some samples ``(M,)``, by their places among these; none that has nothing to learn from."""
    known_and_new = [[np.isin(samples, each).nonzero()[0] for each in fold] for fold in folds]
    return [(known, new) for known, new in known_and_new if len(known) > 0 and len(new) > 0]
