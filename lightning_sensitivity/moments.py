"""The statistics of a stream of output changes in one small tensor that batches and processes merge.

The *moments*, which :func:`batch_moments` makes, :func:`merge_moments` joins in any order and grouping, and
:func:`sensitivity_estimate` reads.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.dtypes import accumulation_dtype, rounding_variance
from lightning_sensitivity.extremes import (
    FIRST_BAD_CLEAN,
    FIRST_BAD_NOISY,
    NEG_MAX_CHANGE,
    output_columns,
    output_extremes,
)

# Layout of the moments, one row each, with D the number of outputs that are kept apart (1 after class-averaging).
# A sample's features are (weight, square, sum_1 ... sum_D): how many changes it gave (noise draws times positions),
# the sum of their mean squares over the D outputs, and their sums.
_TOTALS = 0  # (samples, M2 of the single changes, sum over changes of the variance that rounding adds, 0 ...)
_MEANS = 1  # mean over samples of the features
_WITH_WEIGHT = 2  # co-moments, summed over samples, of the weight with each feature
_WITH_SQUARE = 3  # co-moments of the square with each feature
_SELF = 4  # co-moment of each feature with itself
_NUM_ROWS = 5


class SensitivityEstimate(NamedTuple):
    """Output sensitivity with its error bar.

    Attributes:
        sensitivity: Scalar tensor, in squared units of the model's output.
        stderr: Scalar tensor, one standard error of ``sensitivity``; ``nan`` below two samples.
        num_samples: Scalar tensor, the number of samples behind it. Noise draws and positions of one sample are
            not independent and do not add to it.
        num_changes: Scalar tensor, the number of output changes: samples times noise draws times positions.
        rounding: Scalar tensor, what the rounding of the outputs adds to ``sensitivity``, where their changes are
            above it. Roundings inside the model come on top.
    """

    sensitivity: Tensor
    stderr: Tensor
    num_samples: Tensor
    num_changes: Tensor
    rounding: Tensor


def empty_moments(num_outputs: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """Moments of nothing, the neutral element of :func:`merge_moments`; shape ``(5, 2 + num_outputs)``."""
    device = torch.device(device)
    return torch.zeros(_NUM_ROWS, 2 + num_outputs, dtype=accumulation_dtype(device), device=device)


def batch_moments(
    clean: Tensor, noisy: Tensor | Iterable[Tensor], per_output: bool = False, update_idx: int = 0
) -> tuple[Tensor, Tensor]:
    """Moments and extremes of the output changes of one batch.

    Args:
        clean: Outputs for the clean inputs, floating, shape ``(N, K, ...)`` or ``(N,)``.
        noisy: Outputs for the perturbed inputs, of the same shape, or an iterable of such tensors, one per noise
            draw. An iterable is consumed one draw at a time, so that a generator never holds two.
        per_output: Keep the K outputs apart instead of averaging them first.
        update_idx: What an error message calls this batch.

    Returns:
        Moments, shape ``(5, 2 + D)`` with D = K if ``per_output`` else 1, and extremes, shape ``(10,)``.

    Raises:
        TypeError: If an output is not a floating tensor.
        ValueError: If clean and noisy outputs differ in shape, or have no dimension, or if there is no draw.
    """
    _check_output(clean, "clean")
    columns = output_columns(clean).to(accumulation_dtype(clean.device))
    num_samples, num_outputs, num_positions = columns.shape
    width = num_outputs if per_output else 1
    extremes = output_extremes(clean, FIRST_BAD_CLEAN, update_idx)
    # One draw is joined with those before by plain sums and Chan's update, in constant memory.
    count, num_draws = 0, 0
    mean = m2 = sums = squares = columns.new_zeros(())
    for draw in (noisy,) if isinstance(noisy, Tensor) else noisy:
        _check_output(draw, "noisy")
        if draw.shape != clean.shape:
            raise ValueError(
                "Expected `noisy` to have the shape of `clean`, one output per sample and class,"
                f" but got {tuple(draw.shape)} for noisy and {tuple(clean.shape)} for clean outputs."
            )
        num_draws += 1
        draw_extremes = output_extremes(draw, FIRST_BAD_NOISY, update_idx)
        if added := num_samples * num_positions:
            change = output_columns(draw) - columns  # in the wider type
            draw_extremes[NEG_MAX_CHANGE] = -torch.linalg.vector_norm(change, math.inf)
            if not per_output:
                change = change.mean(1, keepdim=True)
            variance, draw_mean = torch.var_mean(change, (0, 2), correction=0)
            shift = draw_mean - mean
            m2 = m2 + variance.mean() * added + shift.square().mean() * (count * added / (count + added))
            mean = mean + shift * (added / (count + added))
            sums, squares = sums + change.sum(2), squares + change.square().mean(1).sum(1)
            count += added
        extremes = torch.minimum(extremes, draw_extremes)
    if num_draws == 0:
        raise ValueError("Expected `noisy` to hold the outputs of at least one noise draw, but got none.")

    moments = empty_moments(width, columns.device)
    if count:
        features = torch.cat([squares[:, None], sums], dim=1)  # the weight is the same for all of the batch
        means = features.mean(0)
        centred = features - means
        # Clean and noisy outputs are about as large, and rounded independently; so are the outputs that are averaged.
        size = columns.square().sum() * (num_draws * width / num_outputs**2)
        moments[_TOTALS, 0] = num_samples
        moments[_TOTALS, 1] = m2
        moments[_TOTALS, 2] = size * (2 * rounding_variance(clean))
        moments[_MEANS, 0] = count / num_samples
        moments[_MEANS, 1:] = means
        moments[_WITH_SQUARE, 1:] = centred[:, 0] @ centred
        moments[_SELF, 1:] = centred.square().sum(0)
    return moments, extremes


def merge_moments(moments: Tensor) -> Tensor:
    """Merge moments of disjoint sets of samples; the result does not depend on how the samples were split.

    Args:
        moments: Shape ``(R, 5, 2 + D)``, the moments of R sets.

    Returns:
        Shape ``(5, 2 + D)``: the moments of their union (Chan, Golub and LeVeque, 1983, for R sets at once).
    """
    samples, means = moments[:, _TOTALS, 0], moments[:, _MEANS]
    merged = moments.sum(0)  # right for the totals and for what is within the sets; the rest is put in below
    merged_means = (samples @ means) / samples.sum().clamp(min=1)
    shift = means - merged_means
    weighted = samples[:, None] * shift
    merged[_MEANS] = merged_means
    merged[_WITH_WEIGHT : _WITH_SQUARE + 1] += weighted[:, :2].T @ shift
    merged[_SELF] += (weighted * shift).sum(0)
    shift_of_changes = _mean_change(means) - _mean_change(merged_means)
    merged[_TOTALS, 1] += (samples * means[:, 0]) @ shift_of_changes.square().mean(1)
    return merged


def _mean_change(means: Tensor) -> Tensor:
    """The mean of single changes, for each of D outputs, from the features' means over samples; 0 of none."""
    return means[..., 2:] / means[..., :1].clamp(min=1)


def sensitivity_estimate(moments: Tensor) -> SensitivityEstimate:
    r"""Output sensitivity and its standard error from moments.

    With :math:`e` a change, :math:`m` its mean over all W changes, and S the mean of
    :math:`(e - m)^2`, sample i contributes :math:`z_i = \sum_{e \in i} [(e - m)^2 - S]`, and the standard error of
    the ratio S is :math:`\sqrt{n / (n - 1) \sum_i z_i^2} / W` over n samples. Summing within a sample first makes the
    error bar right for several draws and for maps of outputs, whose changes are correlated within a sample. For one
    draw of one averaged output this is the textbook error from the fourth moment. With ``per_output`` the mean over
    outputs stands for the square, and the cross terms between the means of different outputs are replaced by their
    Cauchy-Schwarz bound: the error bar is then at most too wide, and exact where the mean changes vanish.

    Args:
        moments: Shape ``(5, 2 + D)``.

    Returns:
        The estimate; all of it ``nan`` (and 0 samples) where there was no change.
    """
    samples, m2, rounding = moments[_TOTALS, :3]
    mean = _mean_change(moments[_MEANS])
    changes = samples * moments[_MEANS, 0]
    sensitivity = m2 / changes
    # z = square + weight_factor * weight - sum_factors . sums, written out in co-moments.
    weight_factor = mean.square().mean() - sensitivity
    sum_factors = 2 * mean / mean.numel()
    with_weight, with_square, itself = moments[_WITH_WEIGHT], moments[_WITH_SQUARE], moments[_SELF]
    squared_deviation = (
        itself[1]
        + weight_factor.square() * itself[0]
        + 2 * weight_factor * with_square[0]
        - 2 * sum_factors @ (with_square[2:] + weight_factor * with_weight[2:])
        + (sum_factors.abs() @ itself[2:].sqrt()).square()
    )
    stderr = (squared_deviation.clamp(min=0) * samples / (samples - 1)).sqrt() / changes
    return SensitivityEstimate(
        sensitivity,
        torch.where(samples > 1, stderr, torch.nan),
        samples.round().long(),
        changes.round().long(),
        rounding / changes,
    )


def _check_output(output: Tensor, name: str) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected `{name}` to be a tensor of outputs, but got {type(output).__name__}.")
    if not output.is_floating_point():
        raise TypeError(f"Expected `{name}` to be a floating tensor of outputs (logits), but got {output.dtype}.")
    if output.ndim == 0:
        raise ValueError(f"Expected `{name}` to have the shape (N, K, ...) or (N,), but got a scalar.")
    if output.ndim > 1 and output.shape[1] == 0:
        raise ValueError(f"Expected `{name}` to have one output or more in dimension 1, but got {tuple(output.shape)}.")
