"""The statistics of a stream of output changes in one small tensor that batches and processes merge.

The *moments*, which :func:`batch_moments` makes, :func:`merge_moments` joins in any order and grouping, and
:func:`sensitivity_estimate` reads. Beside them the *extremes* hold what is needed to refuse input that would give a
wrong number; keeping them on the device lets every check wait until a value is asked for, so that no batch has to wait
for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Layout of the moments, one row each, with D the number of outputs that are kept apart (1 after class-averaging).
# A sample's features are (weight, square, sum_1 ... sum_D): how many changes it gave (noise draws times positions),
# the sum of their mean squares over the D outputs, and their sums.
_ELEMENTS = 0  # (samples, M2 of the single changes, mean of the single changes 1 ... D)
_MEANS = 1  # mean over samples of the features
_WITH_WEIGHT = 2  # co-moments, summed over samples, of the weight with each feature
_WITH_SQUARE = 3  # co-moments of the square with each feature
_SELF = 4  # co-moment of each feature with itself
_NUM_ROWS = 5

# Layout of the extremes; all are minima, so that one ``min`` merges them.
_FIRST_BAD_CLEAN, _FIRST_BAD_NOISY = 0, 1  # index of the first update with nan or inf, else inf
_MIN_OUTPUTS, _NEG_MAX_OUTPUTS = 2, 3  # K
_MIN_VALUE = 4
_MIN_ROW_SUM, _NEG_MAX_ROW_SUM = 5, 6
_NEG_ROUNDING = 7  # relative rounding of an output
_NEG_MAX_SIZE = 8  # the largest sum over a row of absolute values
_NEG_MAX_CHANGE = 9  # the largest change of one output
_NUM_EXTREMES = 10


class SensitivityEstimate(NamedTuple):
    """Output sensitivity with its error bar.

    Attributes:
        sensitivity: Scalar tensor, in squared units of the model's output.
        stderr: Scalar tensor, one standard error of ``sensitivity``; ``nan`` below two samples.
        num_samples: Scalar tensor, the number of samples behind it. Noise draws and positions of one sample are
            not independent and do not add to it.
        num_changes: Scalar tensor, the number of output changes: samples times noise draws times positions.
    """

    sensitivity: Tensor
    stderr: Tensor
    num_samples: Tensor
    num_changes: Tensor


def accumulation_dtype(device: torch.device) -> torch.dtype:
    """The widest floating type of a device: float64, or float32 on MPS, which has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def empty_moments(num_outputs: int = 1, device: torch.device | str = "cpu") -> Tensor:
    """Moments of nothing, the neutral element of :func:`merge_moments`; shape ``(5, 2 + num_outputs)``."""
    device = torch.device(device)
    return torch.zeros(_NUM_ROWS, 2 + num_outputs, dtype=accumulation_dtype(device), device=device)


def empty_extremes(device: torch.device | str = "cpu") -> Tensor:
    """Extremes of nothing, the neutral element of ``torch.minimum``; shape ``(10,)``."""
    device = torch.device(device)
    return torch.full((_NUM_EXTREMES,), math.inf, dtype=accumulation_dtype(device), device=device)


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
    columns = _columns(clean).to(accumulation_dtype(clean.device))
    num_samples, num_outputs, num_positions = columns.shape
    width = num_outputs if per_output else 1
    # One draw's moments are joined with the next by plain sums and Chan's update, in constant memory.
    count, mean, m2 = 0, columns.new_zeros(width), columns.new_zeros(())
    sums, squares = columns.new_zeros(num_samples, width), columns.new_zeros(num_samples)
    extremes = _output_extremes(clean, _FIRST_BAD_CLEAN, update_idx)
    num_draws = 0
    for draw in (noisy,) if isinstance(noisy, Tensor) else noisy:
        _check_output(draw, "noisy")
        if draw.shape != clean.shape:
            raise ValueError(
                "Expected `noisy` to have the shape of `clean`, one output per sample and class,"
                f" but got {tuple(draw.shape)} for noisy and {tuple(clean.shape)} for clean outputs."
            )
        num_draws += 1
        draw_extremes = _output_extremes(draw, _FIRST_BAD_NOISY, update_idx)
        if num_samples and num_positions:
            change = _columns(draw) - columns  # in the wider type
            lowest, highest = change.aminmax()
            draw_extremes[_NEG_MAX_CHANGE] = torch.minimum(lowest, -highest)
            if not per_output:
                change = change.mean(1, keepdim=True)
            draw_mean = change.mean((0, 2))
            added = num_samples * num_positions
            shift = draw_mean - mean
            m2 = (
                m2
                + (change - draw_mean[:, None]).square().mean(1).sum()
                + shift.square().mean() * (count * added / (count + added))
            )
            count += added
            mean = mean + shift * (added / count)
            sums += change.sum(2)
            squares += change.square().mean(1).sum(1)
        extremes = torch.minimum(extremes, draw_extremes)
    if num_draws == 0:
        raise ValueError("Expected `noisy` to hold the outputs of at least one noise draw, but got none.")

    moments = empty_moments(width, columns.device)
    if count:
        features = torch.cat([sums.new_full((num_samples, 1), count / num_samples), squares[:, None], sums], dim=1)
        centred = features - features.mean(0)
        moments[_ELEMENTS, 0] = num_samples
        moments[_ELEMENTS, 1] = m2
        moments[_ELEMENTS, 2:] = mean
        moments[_MEANS] = features.mean(0)
        moments[_WITH_SQUARE] = centred[:, 1] @ centred
        moments[_SELF] = centred.square().sum(0)  # the weight is the same within a batch: _WITH_WEIGHT stays 0
    return moments, extremes


def merge_moments(moments: Tensor) -> Tensor:
    """Merge moments of disjoint sets of samples; the result does not depend on how the samples were split.

    Args:
        moments: Shape ``(R, 5, 2 + D)``, the moments of R sets.

    Returns:
        Shape ``(5, 2 + D)``: the moments of their union (Chan, Golub and LeVeque, 1983, for R sets at once).
    """
    samples, mean = moments[:, _ELEMENTS, 0], moments[:, _ELEMENTS, 2:]
    feature_means = moments[:, _MEANS]
    changes = samples * feature_means[:, 0]
    merged = moments.sum(0)  # right for the sums over samples and for M2; the rest is put in below
    total_samples, total_changes = samples.sum().clamp(min=1), changes.sum().clamp(min=1)

    merged_mean = (changes @ mean) / total_changes
    merged[_ELEMENTS, 1] += (changes * (mean - merged_mean).square().mean(1)).sum()
    merged[_ELEMENTS, 2:] = merged_mean
    merged[_MEANS] = (samples @ feature_means) / total_samples
    shift = feature_means - merged[_MEANS]
    merged[_WITH_WEIGHT] += (samples * shift[:, 0]) @ shift
    merged[_WITH_SQUARE] += (samples * shift[:, 1]) @ shift
    merged[_SELF] += samples @ shift.square()
    return merged


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
    samples, m2, mean = moments[_ELEMENTS, 0], moments[_ELEMENTS, 1], moments[_ELEMENTS, 2:]
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
        sensitivity, torch.where(samples > 1, stderr, torch.nan), samples.round().long(), changes.round().long()
    )


def find_non_finite(extremes: Tensor) -> str | None:
    """Describe the nan or inf among the outputs behind the extremes, if there was any."""
    values: list[float] = extremes.tolist()
    bad = [
        f"the {name} outputs of batch {int(values[index])}"
        for name, index in (("clean", _FIRST_BAD_CLEAN), ("noisy", _FIRST_BAD_NOISY))
        if math.isfinite(values[index])
    ]
    return f"Expected finite outputs, but met nan or inf in {' and in '.join(bad)} (counted from 0)." if bad else None


def check_outputs(extremes: Tensor) -> str | None:
    """Look for finite outputs whose class-averaged change means nothing.

    Args:
        extremes: Shape ``(10,)``.

    Returns:
        None, or a warning: the rows of the outputs sum to the same value, within rounding. That is so for centred
        logits, but also for a network whose class-mean training has shrunk to nothing.

    Raises:
        ValueError: If the outputs are probabilities, whose rows sum to 1.
    """
    values: list[float] = extremes.tolist()
    lowest, highest, rounding = values[_MIN_ROW_SUM], -values[_NEG_MAX_ROW_SUM], -values[_NEG_ROUNDING]
    if values[_MIN_OUTPUTS] < 2 or lowest > highest:
        return None
    # A softmax in float32 adds a few roundings of its own to those of its output.
    furthest = max(abs(lowest - 1), abs(highest - 1))
    if values[_MIN_VALUE] >= 0 and furthest <= rounding + 16 * torch.finfo(torch.float32).eps:
        raise ValueError(
            "Expected logits, but got probabilities: outputs of 0 or more whose rows all sum to 1, so that the class"
            " average of their changes is always 0. Pass the logits, or use `per_output=True`."
        )
    # The roundings of K outputs add up as independent ones do.
    row_rounding = rounding * -values[_NEG_MAX_SIZE] / math.sqrt(values[_MIN_OUTPUTS])
    if highest - lowest <= row_rounding and values[_NEG_MAX_CHANGE] < 0:
        return (
            "The rows of the outputs all sum to the same value, within rounding, so that sensitivity, which sees their"
            " class average only, is rounding, too. `per_output=True` sees the outputs themselves."
        )
    return None


def check_num_outputs(extremes: Tensor) -> None:
    """Raise ValueError if the number of outputs changed between batches."""
    fewest, most = int(extremes[_MIN_OUTPUTS].clamp(max=2**52)), num_outputs_seen(extremes)
    if fewest < most:
        raise ValueError(
            "Expected the same number of outputs K (dimension 1 of `clean` and `noisy`) in every batch,"
            f" but got {fewest} to {most}. If dimension 1 is a position, move the classes there."
        )


def num_outputs_seen(extremes: Tensor) -> int:
    """K of the batches behind the extremes, 0 if there was none."""
    return int(-extremes[_NEG_MAX_OUTPUTS].clamp(max=0))


def _check_output(output: Tensor, name: str) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected `{name}` to be a tensor of outputs, but got {type(output).__name__}.")
    if not output.is_floating_point():
        raise TypeError(f"Expected `{name}` to be a floating tensor of outputs (logits), but got {output.dtype}.")
    if output.ndim == 0:
        raise ValueError(f"Expected `{name}` to have the shape (N, K, ...) or (N,), but got a scalar.")


def _columns(output: Tensor) -> Tensor:
    """(N, K, ...) or (N,) as (N, K, P)."""
    output = output.detach()
    output = output[:, None] if output.ndim == 1 else output
    return output.reshape(*output.shape[:2], math.prod(output.shape[2:]))


def _output_extremes(output: Tensor, index_if_bad: int, update_idx: int) -> Tensor:
    columns = _columns(output)
    extremes = empty_extremes(output.device)
    extremes[_MIN_OUTPUTS], extremes[_NEG_MAX_OUTPUTS] = columns.shape[1], -columns.shape[1]
    extremes[_NEG_ROUNDING] = -4 * torch.finfo(output.dtype).eps
    if columns.numel():
        lowest, highest = columns.aminmax()  # both nan if one output is
        finite = lowest.isfinite() & highest.isfinite()
        extremes[index_if_bad] = torch.where(finite, extremes[index_if_bad], update_idx)
        extremes[_MIN_VALUE] = lowest
        row_sums = columns.sum(1, dtype=extremes.dtype)
        extremes[_MIN_ROW_SUM], extremes[_NEG_MAX_ROW_SUM] = row_sums.min(), -row_sums.max()
        extremes[_NEG_MAX_SIZE] = -torch.linalg.vector_norm(columns, 1, dim=1, dtype=extremes.dtype).max()
    return extremes
