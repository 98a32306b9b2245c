"""What is remembered of outputs to refuse those that would give a wrong number.

The *extremes* are kept on the device and merged by ``torch.minimum``, so that no batch has to wait for a check: the
checks read them when a value is asked for.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_sensitivity.dtypes import accumulation_dtype, rounding_epsilon

if TYPE_CHECKING:
    from lightning_sensitivity.moments import SensitivityEstimate

# Layout of the extremes; all are minima, so that one ``min`` merges them.
FIRST_BAD_CLEAN, FIRST_BAD_NOISY = 0, 1  # index of the first update with nan or inf, else inf
_MIN_OUTPUTS, _NEG_MAX_OUTPUTS = 2, 3  # K
_NEG_EPSILON = 4  # of the type that the outputs were rounded to
NEG_MAX_CHANGE = 5  # the largest change of one output
_MIN_VALUE = 6
_MIN_ROW_SUM, _NEG_MAX_ROW_SUM = 7, 8
_NEG_MAX_SIZE = 9  # the largest sum over a row of absolute values
_NUM_EXTREMES = 10

# All roundings in a network are worth up to 10 times those of its outputs, 1.5 times in the median: as measured on 64
# small ones of 10 outputs, wherever the bias was above the error bars. (With 100 outputs or 20 layers, 20 times and
# more: there the warning may come late.)
_ALL_ROUNDINGS = 10


def empty_extremes(device: torch.device | str = "cpu") -> Tensor:
    """Extremes of nothing, the neutral element of ``torch.minimum``; shape ``(10,)``."""
    device = torch.device(device)
    return torch.full((_NUM_EXTREMES,), math.inf, dtype=accumulation_dtype(device), device=device)


def output_extremes(output: Tensor, index_if_bad: int, update_idx: int) -> Tensor:
    """Extremes of the clean, or of the noisy outputs of a batch.

    Args:
        output: Outputs, ``(N, K, ...)`` or ``(N,)``.
        index_if_bad: :data:`FIRST_BAD_CLEAN` or :data:`FIRST_BAD_NOISY`.
        update_idx: What an error message calls the batch.
    """
    columns = output_columns(output)
    extremes = empty_extremes(output.device)
    extremes[_MIN_OUTPUTS], extremes[_NEG_MAX_OUTPUTS] = columns.shape[1], -columns.shape[1]
    extremes[_NEG_EPSILON] = -rounding_epsilon(output)
    if columns.numel():
        lowest, highest = columns.sum(1, dtype=extremes.dtype).aminmax()
        largest = columns.abs().sum(1, dtype=extremes.dtype).max()
        extremes[_MIN_VALUE:] = torch.stack([columns.min().to(largest), lowest, -highest, -largest])
        # Not finite, if one output is not.
        extremes[index_if_bad] = torch.where(largest.isfinite(), math.inf, float(update_idx))
    return extremes


def find_non_finite(extremes: Tensor) -> str | None:
    """Describe the nan or inf among the outputs behind the extremes, if there was any."""
    values: list[float] = extremes.tolist()
    bad = [
        f"the {name} outputs of batch {int(values[index])}"
        for name, index in (("clean", FIRST_BAD_CLEAN), ("noisy", FIRST_BAD_NOISY))
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
    lowest, highest, rounding = values[_MIN_ROW_SUM], -values[_NEG_MAX_ROW_SUM], -4 * values[_NEG_EPSILON]
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
    if highest - lowest <= row_rounding and values[NEG_MAX_CHANGE] < 0:
        return (
            "The rows of the outputs all sum to the same value, within rounding, so that sensitivity, which sees their"
            " class average only, is rounding, too. `per_output=True` sees the outputs themselves."
        )
    return None


def check_rounding(estimate: SensitivityEstimate, extremes: Tensor) -> str | None:
    """Look for a sensitivity that the rounding of the outputs may have moved out of its error bars.

    Args:
        estimate: The estimate.
        extremes: Shape ``(10,)``, behind the same outputs.

    Returns:
        None, or a warning: what roundings may add is above three standard errors, and not negligible (above 1 % of
        the sensitivity).
    """
    values: list[float] = torch.stack([estimate.sensitivity, estimate.stderr, estimate.rounding]).tolist()
    sensitivity, stderr, rounding = values
    if not _ALL_ROUNDINGS * rounding > max(3 * stderr, 0.01 * sensitivity):
        return None
    epsilon = -float(extremes[_NEG_EPSILON])
    is_16_bit = epsilon > torch.finfo(torch.float32).eps
    if not is_16_bit and extremes[NEG_MAX_CHANGE] == 0:  # the model ignores its input
        return None
    wider = 32 if is_16_bit else 64
    return (
        f"Output sensitivity, {sensitivity:.2g} ± {stderr:.2g}, may be off by more than its error bar: the rounding of"
        f" the outputs (epsilon {epsilon:.2g}) is worth {rounding:.2g} of it, and with that inside the model it may be"
        f' {_ALL_ROUNDINGS} times as much. Use a larger σ of the noise, or a wider type (`precision="{wider}-true"`).'
    )


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


def output_columns(output: Tensor) -> Tensor:
    """Outputs ``(N, K, ...)`` or ``(N,)`` as ``(N, K, P)``, with P positions."""
    output = output.detach()
    output = output[:, None] if output.ndim == 1 else output
    return output.reshape(*output.shape[:2], math.prod(output.shape[2:]))
