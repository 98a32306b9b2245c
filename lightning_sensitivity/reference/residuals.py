"""The left-out errors of a regression: quantiles of all of them, and near a prediction."""

import math

import numpy as np

from lightning_sensitivity.functional.tasks import NUM_DRAWS
from lightning_sensitivity.reference.kinds import Array

_MAX_ERRORS = 10_000  # errors, of which quantiles are taken
_NEAR_SHARE, _FEWEST_NEAR, _MOST_NEAR = 10, 60, 500  # a tenth of the samples, of which errors are near


def quantiles(errors: Array) -> Array:
    """Return 20 quantiles of errors ``(N, C)``, which have their mean square; nan is left out."""
    places = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    quantile = np.nanquantile if np.isnan(errors).any() else np.quantile
    found = quantile(errors[:: math.ceil(len(errors) / _MAX_ERRORS)], places, axis=0)
    found = found - found.mean(0)
    size, wanted = (np.sqrt(np.nanmean(np.square(each), axis=0)) for each in (found, errors))
    return found * np.divide(wanted, size, out=np.zeros_like(size), where=size > 0)


def quantiles_near(predictions: Array, left_out: Array, labels: Array) -> Array:
    """Return 20 quantiles of the errors near each of some predictions, of one column, ``(20, M)``.

    Args:
        predictions: Predictions, ``(M,)``.
        left_out: Left-out predictions, ``(N,)``.
        labels: Their labels, ``(N,)``; nan is unknown.
    """
    known = ~np.isnan(labels)
    left_out, labels = left_out[known], labels[known]
    number = min(len(labels), max(_FEWEST_NEAR, min(len(labels) // _NEAR_SHARE, _MOST_NEAR)))
    order = left_out.argsort(kind="stable")
    first = (np.searchsorted(left_out[order], predictions) - number // 2).clip(0, len(order) - number)
    return quantiles((labels - left_out)[order[np.arange(number)[:, None] + first]])
