"""Output sensitivity from rows: one row of plain sums for each sample, and the estimates that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics.utilities import rank_zero_warn

from lightning_sensitivity.functional.pieces import in_pieces, wide_dtype

# Columns of a row: how many changes a sample gave (draws times positions); the sum and the sum of squares of the
# class-averaged changes; the sum of the mean squared change of the single outputs; K, once for each change.
NUM_COLUMNS = 5
SAME_K = (
    "Expected the same number of outputs K (dimension 1 of `clean` and `noisy`) in every batch, but got {} and {}. If"
    " dimension 1 is a position, move the classes there."
)
_SMALL_SHARE = 0.01  # of what independent outputs would give


class SensitivityEstimate(NamedTuple):
    """What rows say; scalar tensors.

    Attributes:
        sensitivity: S, in squared units of the outputs.
        stderr: One standard error of ``sensitivity``, clustered by sample; nan below two samples.
        mean_square: Mean squared change of the single outputs, without averaging over classes first.
        mean_square_stderr: Its standard error.
        class_mean_share: Share of the class-mean in the change, from 0 to 1; 1/K for independent outputs.
        num_samples: Number of samples behind it.
        num_non_finite: Number of samples that were left out, since an output was nan or inf.
        num_outputs: K; 0 without samples.
    """

    sensitivity: Tensor
    stderr: Tensor
    mean_square: Tensor
    mean_square_stderr: Tensor
    class_mean_share: Tensor
    num_samples: Tensor
    num_non_finite: Tensor
    num_outputs: int


def sensitivity_rows(clean: Tensor, noisy: Tensor | Iterable[Tensor], masked: bool = False) -> Tensor:
    """One row for each sample: number, sum, and sum of squares of its changes, their mean square, and K.

    Args:
        clean: Outputs f(x), floating, shape ``(N, K, ...)`` or ``(N,)``.
        noisy: Outputs f(x + ε) of the same shape, or an iterable of them, one for each noise draw. An iterable is
            consumed one draw at a time.
        masked: Whether outputs that are -inf in both have not changed, and don't count in the class average.

    Returns:
        Shape ``(N, 5)``, float64 (float32 on MPS). Rows of samples with nan or inf are not finite.

    Raises:
        TypeError: If an output is not a floating tensor.
        ValueError: If shapes differ, an output is a scalar or has no class, or there is no draw.
    """
    _check_output(clean, "clean")
    rows: list[Tensor] = []  # one a draw
    for draw in (noisy,) if isinstance(noisy, Tensor) else noisy:
        _check_output(draw, "noisy")
        if draw.shape != clean.shape:
            raise ValueError(
                "Expected `noisy` to have the shape of `clean`, one output per sample and class, but got"
                f" {tuple(draw.shape)} for noisy and {tuple(clean.shape)} for clean outputs."
            )
        pieces = in_pieces(partial(_draw_rows, masked=masked), columns(draw), columns(clean))
        rows.append(torch.cat(pieces) if len(pieces) > 1 else pieces[0])
    if not rows:
        raise ValueError("Expected `noisy` to hold the outputs of at least one noise draw, but got none.")
    return torch.stack(rows).sum(0) if len(rows) > 1 else rows[0]


def _draw_rows(noisy: Tensor, clean: Tensor, masked: bool) -> Tensor:
    """Rows of one draw, from outputs ``(N, K, P)``."""
    change = noisy.to(wide_dtype(noisy.device), copy=True).sub_(clean)
    if masked:
        is_masked = (noisy == -math.inf) & (clean == -math.inf)
        num_left = (~is_masked).sum(1).clamp(min=1)
        means = change.masked_fill_(is_masked, 0.0).sum(1) / num_left
        squares = change.square_().sum(1) / num_left
    else:
        means, squares = change.mean(1), change.square_().mean(1)
    ones = torch.ones_like(means)
    return torch.stack([ones, means, means.square(), squares, change.shape[1] * ones], dim=1).sum(2)


def sensitivity_from_rows(rows: Tensor) -> SensitivityEstimate:
    r"""Output sensitivity and its standard error, from the rows of all samples.

    With :math:`e` a change, m their mean and S the mean of :math:`(e - m)^2` over all W changes, sample i adds
    :math:`z_i = \sum_{e \in i} [(e - m)^2 - S]`, and the standard error of the ratio S is
    :math:`\sqrt{n / (n - 1) \sum_i z_i^2} / W`. Summing within a sample first makes it right for several draws and for
    positions, whose changes are correlated within a sample.

    Args:
        rows: Shape ``(N, 5)``, as :func:`sensitivity_rows` gives them.

    Returns:
        The estimate; nan where no sample is finite.

    Raises:
        ValueError: If K differs.
    """
    found = sorted(set((rows[:, 4] / rows[:, 0])[rows[:, 0] > 0].round().tolist())) or [0]
    if len(found) > 1:
        raise ValueError(SAME_K.format(*(int(each) for each in found[:2])))
    is_finite = rows.isfinite().all(1)
    kept = rows[is_finite]
    count, squares = kept[:, 0], kept[:, 3]
    deviations = squared_deviations(kept)
    sensitivity, mean_square = (values.sum() / count.sum() for values in (deviations, squares))
    total = torch.tensor(len(kept), device=rows.device)

    def stderr(values: Tensor, mean: Tensor) -> Tensor:
        if len(kept) < 2:
            return torch.full_like(mean, math.nan)
        residuals = values - mean * count
        return (residuals.square().sum() * total / (total - 1)).sqrt() / count.sum()

    errors = stderr(deviations, sensitivity), stderr(squares, mean_square)
    share = kept[:, 2].sum() / squares.sum()
    num_non_finite, num_outputs = (~is_finite).sum(), int(found[0])
    return SensitivityEstimate(
        sensitivity, errors[0], mean_square, errors[1], share, total, num_non_finite, num_outputs
    )


def squared_deviations(rows: Tensor) -> Tensor:
    """Each sample's sum of squared deviations from the mean change; divided by the counts, they average to S.

    Args:
        rows: Shape ``(N, 5)``; those that are not finite don't count for the mean, and give nan.

    Returns:
        Shape ``(N,)``.
    """
    is_finite = rows.isfinite().all(1)
    mean = rows[is_finite, 1].sum() / rows[is_finite, 0].sum()
    deviations = rows[:, 2] - 2 * mean * rows[:, 1] + mean.square() * rows[:, 0]
    return deviations.clamp(min=0).where(is_finite, math.nan)


def doubts(estimate: SensitivityEstimate, per_output: bool = False) -> dict[str, str]:
    """What makes a finite value doubtful: a sentence for each kind of doubt.

    Args:
        estimate: The estimate.
        per_output: Whether the mean square is meant, which needs no class-mean.
    """
    found = {}
    if estimate.num_non_finite > 0:
        found["non-finite"] = (
            f"{int(estimate.num_non_finite)} samples gave nan or inf and were left out;"
            f" {int(estimate.num_samples)} remain."
        )
    share, num_outputs = float(estimate.class_mean_share), estimate.num_outputs
    if estimate.mean_square == 0:
        found["no change"] = (
            "No output changed under the perturbation: what is perturbed reaches none of the outputs (see `inputs=` and"
            " `at=`), or the weights behind it are 0."
        )
    elif not per_output and num_outputs > 1 and share * num_outputs < _SMALL_SHARE:
        found["class mean"] = (
            f"The class average holds {share:.1e} of the outputs' change (independent outputs: {1 / num_outputs:.1e})."
            " Probabilities and centred logits sum to the same value, so S sees only rounding; in other networks the"
            " class mean has stayed small, and Equation 9 is far too low. `per_output=True` sees all of the change."
        )
    return found


def output_sensitivity(clean: Tensor, noisy: Tensor | Iterable[Tensor], per_output: bool = False) -> Tensor:
    r"""Output sensitivity of a batch (Forouzesh, Salehi and Thiran, `arXiv:2007.15378`_, Section 3).

    .. math::
        S = \operatorname{Var}\Big(\frac{1}{K} \sum_{k=1}^{K} \big[f_k(x + \varepsilon) - f_k(x)\big]\Big)

    The variance is that of the population (ddof 0), over all samples, noise draws and positions. Samples with nan or
    inf are left out with a warning.

    Args:
        clean: Outputs f(x), before the softmax (logits), floating, shape ``(N, K, ...)``; dimensions after K (pixels,
            tokens) count as further changes of a sample, and ``(N,)`` is K = 1.
        noisy: Outputs f(x + ε), same shape, or an iterable of such tensors, one for each noise draw.
        per_output: Return the mean squared change of the single outputs instead, which does not average over classes
            first and so also means something for probabilities.

    Returns:
        Scalar tensor, float64 (float32 on MPS), in squared units of the outputs.

    Raises:
        TypeError: If an output is not a floating tensor.
        ValueError: If shapes differ, or there is no change to look at.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import output_sensitivity
        >>> clean = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> noisy = torch.tensor([[1.5, 2.5], [2.5, 3.5]])
        >>> output_sensitivity(clean, noisy)
        tensor(0.2500, dtype=torch.float64)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378
    """
    rows = sensitivity_rows(clean, noisy, has_masked(clean))
    if clean.numel() == 0:
        raise ValueError(f"Expected `clean` to hold at least one sample, but got the shape {tuple(clean.shape)}.")
    estimate = sensitivity_from_rows(rows)
    for doubt in doubts(estimate, per_output).values():
        rank_zero_warn(doubt)
    return estimate.mean_square if per_output else estimate.sensitivity


def loss_estimate(
    sensitivity: Tensor | float,
    input_power: Tensor | float,
    noise_std: Tensor | float,
    num_outputs: int,
    offset: Tensor | float = 0.0,
) -> Tensor:
    r"""Cross-entropy on unseen data, estimated from sensitivity (Equation 9 of `arXiv:2007.15378`_).

    .. math::
        L \approx \sqrt{\tfrac{1}{2}\Big(\tfrac{K - 1}{K}\, S\, C + \Sigma\Big)}, \qquad
        C = \frac{\mathbb{E}[x^2]}{\sigma^2}

    Its size is right for networks initialized with N(0, 1) and trained to convergence. It is about ten times too low
    for PyTorch's default initialization, whose class-mean stays small. It assumes that the variance of the prediction
    dominates, so it says nothing about an underfitted network. ``examples/paper/README.md`` has the measurements.

    Args:
        sensitivity: S, scalar or any shape.
        input_power: E[x²], mean square of one input element, in squared units of the model's input; one value, or one
            per channel, as ``noise_std``. C is then the mean over channels.
        noise_std: σ, standard deviation of the noise, in units of the model's input; one value or one per channel.
        num_outputs: K, the number of classes, 2 or more.
        offset: Σ, the part of the variance that sensitivity does not see.

    Returns:
        Tensor of the shape of ``sensitivity``, in nats.

    Raises:
        ValueError: If ``noise_std`` is not positive and finite, ``num_outputs`` is below 2, or ``sensitivity``,
            ``input_power`` or ``offset`` is negative.

    Example:
        >>> from lightning_sensitivity.functional import loss_estimate
        >>> loss_estimate(0.04, input_power=0.25, noise_std=0.1, num_outputs=10)
        tensor(0.6708, dtype=torch.float64)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378
    """
    if isinstance(num_outputs, bool) or not isinstance(num_outputs, int) or num_outputs < 2:
        raise ValueError(f"Expected `num_outputs` to be an int of 2 or more, but got {num_outputs!r}.")
    sensitivity = torch.as_tensor(sensitivity, dtype=None if isinstance(sensitivity, Tensor) else torch.float64)
    like: dict[str, Any] = {"dtype": sensitivity.dtype, "device": sensitivity.device}
    power, std, offset = (torch.as_tensor(each, **like) for each in (input_power, noise_std, offset))
    if not bool(((std > 0) & std.isfinite()).all()):
        raise ValueError(f"Expected `noise_std` to be positive and finite, but got {noise_std}.")
    for name, value in (("sensitivity", sensitivity), ("input_power", power), ("offset", offset)):
        if bool((value < 0).any()):
            raise ValueError(f"Expected `{name}` to be 0 or more, but got {value}.")
    variance = (num_outputs - 1) / num_outputs * sensitivity * (power / std.square()).mean()
    return ((variance + offset) / 2).sqrt()


def num_outputs(outputs: Tensor) -> int:
    """K of outputs ``(N, K, ...)``; 1 of ``(N,)``."""
    return outputs.shape[1] if outputs.ndim > 1 else 1


def has_masked(outputs: Tensor) -> bool:
    """Whether an output is -inf, as logits are that a mask forbids. Waits for the device."""
    return isinstance(outputs, Tensor) and bool((outputs == -math.inf).any())


def columns(outputs: Tensor) -> Tensor:
    """Outputs ``(N, K, ...)`` or ``(N,)`` as ``(N, K, P)``, with P positions."""
    outputs = outputs.detach()
    return outputs[:, None, None] if outputs.ndim == 1 else outputs[..., None].flatten(2)  # of no samples, too


def _check_output(output: Tensor, name: str) -> None:
    if not isinstance(output, Tensor):
        raise TypeError(f"Expected `{name}` to be a tensor of outputs, but got {type(output).__name__}.")
    if not output.is_floating_point():
        raise TypeError(f"Expected `{name}` to be a floating tensor of outputs (logits), but got {output.dtype}.")
    if output.ndim == 0:
        raise ValueError(f"Expected `{name}` to have the shape (N, K, ...) or (N,), but got a scalar.")
    if output.ndim > 1 and output.shape[1] == 0:
        raise ValueError(f"Expected `{name}` to have one output or more in dimension 1, but got {tuple(output.shape)}.")
