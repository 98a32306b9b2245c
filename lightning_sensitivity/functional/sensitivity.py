"""Output sensitivity from rows: one row of sums for each sample, and the estimates computed from the rows."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import Numbers, as_tensor, by_position, in_chunks, wide_dtype

# Columns of a row: the number of changes of a sample (draws times positions); the sum of its class-averaged
# changes; the sum of their squares; the sum of the mean squared changes of its single outputs; K times the
# number of changes.
NUM_COLUMNS = 5
_SMALL_SHARE = 0.01  # of the class mean that independent outputs would have


class SensitivityEstimate(NamedTuple):
    """Estimates from rows, scalar tensors except ``num_outputs``.

    Attributes:
        value: S, or the mean squared change of the single outputs, in squared units of the outputs.
        stderr: One standard error of ``value``, clustered by sample; nan below two samples.
        class_mean_share: Share of the class mean in the change, from 0 to 1; 1/K for independent outputs; nan
            without any change.
        num_samples: Number of samples.
        num_non_finite: Number of samples that were left out because an output was nan or inf.
        num_outputs: K; 0 without samples.
    """

    value: Tensor
    stderr: Tensor
    class_mean_share: Tensor
    num_samples: Tensor
    num_non_finite: Tensor
    num_outputs: int


def sensitivity_sums(clean: Tensor, noisy: Tensor | Sequence[Tensor]) -> Tensor:
    """Sum up the output changes of each sample.

    Args:
        clean: Outputs f(x), floating, shape ``(N, K, ...)`` or ``(N,)``.
        noisy: Outputs f(x + ε) of the same shape, or a list with one such tensor per noise draw.

    Returns:
        One row per sample, ``(N, 5)``, float64 (float32 on MPS); not finite for samples with nan or inf.

    Raises:
        TypeError: If an output is not a floating tensor.
        ValueError: If shapes differ, an output is a scalar or has no class, or there is no draw.
    """
    _check_outputs("clean", clean)
    rows: list[Tensor] = []
    for draw in (noisy,) if isinstance(noisy, Tensor) else noisy:
        _check_outputs("noisy", draw)
        if draw.shape != clean.shape:
            shapes = f"{tuple(clean.shape)}, but got {tuple(draw.shape)}"
            raise ValueError(f"Expected `noisy` to have the shape {shapes}.")
        chunks = in_chunks(_rows_of_draw, by_position(draw), by_position(clean))
        rows.append(chunks[0] if len(chunks) == 1 else torch.cat(chunks))
    if not rows:
        raise ValueError("Expected `noisy` to hold the outputs of at least one noise draw, but got none.")
    return rows[0] if len(rows) == 1 else torch.stack(rows).sum(0)


def _rows_of_draw(noisy: Tensor, clean: Tensor) -> Tensor:
    change = noisy.to(wide_dtype(noisy.device), copy=True).sub_(clean)
    means, squares = change.mean(1), change.square_().mean(1)
    ones = torch.ones_like(means)
    return torch.stack([ones, means, means.square(), squares, change.shape[1] * ones], dim=1).sum(2)


def sensitivity_from_sums(rows: Tensor, per_output: bool = False) -> SensitivityEstimate:
    r"""Estimate output sensitivity and its standard error from the rows of all samples.

    Let :math:`e` be a change, m the mean of all W changes, and S the mean of :math:`(e - m)^2`. Sample i of n
    adds :math:`z_i = \sum_{e \in i} [(e - m)^2 - S]`, and the standard error of S is
    :math:`\sqrt{n / (n - 1) \sum_i z_i^2} / W`. Because the sum is first taken within a sample, the standard
    error is right for several draws and positions, whose changes are correlated.

    Args:
        rows: Shape ``(N, 5)``, from :func:`sensitivity_sums`.
        per_output: Estimate the mean squared change of the single outputs instead.

    Returns:
        The estimate; nan where no sample is finite.

    Raises:
        ValueError: If K differs between samples.
    """
    has_changes = rows[:, 0] > 0  # also of samples that are not finite
    sizes = sorted({*(rows[:, 4] / rows[:, 0])[has_changes].round().tolist()})
    if len(sizes) > 1:
        got = f"{int(sizes[0])} and {int(sizes[1])}. If dimension 1 is a position, move the classes there."
        raise ValueError(f"Expected the same number of outputs K (dimension 1) in every batch, but got {got}")
    is_finite = rows.isfinite().all(1)
    kept = rows[is_finite]
    count, squares = kept[:, 0], kept[:, 3]
    sums = squares if per_output else squared_deviations(kept)
    value = sums.sum() / count.sum()
    correction = math.sqrt(len(kept) / (len(kept) - 1)) if len(kept) > 1 else math.nan
    return SensitivityEstimate(
        value=value,
        stderr=correction * (sums - value * count).square().sum().sqrt() / count.sum(),
        class_mean_share=kept[:, 2].sum() / squares.sum(),
        num_samples=is_finite.sum(),
        num_non_finite=(~is_finite).sum(),
        num_outputs=int(sizes[0]) if sizes else 0,
    )


def end_of_plateau(values: Tensor) -> int:
    r"""Find the last value of a curve that is within the curve's own noise of the lowest.

    With d the differences of successive values, the noise is
    :math:`1.4826 \operatorname{median} |d - \operatorname{median} d| / \sqrt 2`: the standard deviation of a value,
    if noise is normal, whatever the curve's slow course.

    Args:
        values: The curve, ``(T,)``, finite.

    Returns:
        The index.
    """
    changes = values.diff()
    spread = (changes - changes.quantile(0.5)).abs().quantile(0.5)
    noise = 1.4826 / math.sqrt(2) * spread
    return int((values <= values.min() + noise).nonzero()[-1])


def squared_deviations(rows: Tensor) -> Tensor:
    """Sum up each sample's squared deviations from the mean change; their total over the total count is S.

    Args:
        rows: Shape ``(N, 5)``, finite.

    Returns:
        Shape ``(N,)``.
    """
    count, sums, squares = rows[:, 0], rows[:, 1], rows[:, 2]
    own_mean = sums / count.clamp(min=1)
    within = (squares - own_mean * sums).clamp(min=0)  # 0 of a single change, however far it is from 0
    return within + count * (own_mean - sums.sum() / count.sum()).square()


def diagnostics(estimate: SensitivityEstimate, per_output: bool = False) -> dict[str, str]:
    """Explain what makes a finite value doubtful, by its entry on the page on troubleshooting.

    Args:
        estimate: The estimate.
        per_output: Whether the value is the mean square, which needs no class mean.
    """
    messages = {}
    if estimate.num_non_finite > 0:
        count = int(estimate.num_non_finite)
        messages["nan"] = f"{count} samples gave nan or inf, and were left out."
    share, num_outputs = float(estimate.class_mean_share), estimate.num_outputs
    if estimate.num_samples > 0 and math.isnan(share):
        messages["no-change"] = (
            "No output changed: the noise does not reach the outputs (see `inputs=` and `at=`), or weights are 0."
        )
    elif not per_output and num_outputs > 1 and share * num_outputs < _SMALL_SHARE:
        messages["class-mean"] = (
            f"Only {share:.1e} of the change in the outputs survives averaging over classes, as with two-class heads, "
            "probabilities and centred logits. `per_output=True` measures all of it."
        )
    return messages


def output_sensitivity(clean: Numbers, noisy: Numbers, per_output: bool = False) -> Tensor:
    r"""Compute the output sensitivity of a batch (Forouzesh, Salehi and Thiran, arXiv:2007.15378, Section 3).

    .. math::
        S = \operatorname{Var}\Big(\frac{1}{K} \sum_{k=1}^{K} \big[f_k(x + \varepsilon) - f_k(x)\big]\Big)

    The variance is the population variance (ddof 0) over samples, draws and positions. Samples with nan or
    inf are left out.

    Args:
        clean: Outputs f(x) before the softmax (logits), floating, shape ``(N, K, ...)``; a tensor or an
            array. Dimensions after K (pixels, tokens) count as further changes of a sample; ``(N,)`` means
            K = 1.
        noisy: Outputs f(x + ε) of the same shape, or a list with one such tensor per noise draw.
        per_output: Return the mean squared change of the single outputs instead, which also has a meaning for
            probabilities and for heads of two classes.

    Returns:
        Scalar tensor, float64 (float32 on MPS), in squared units of the outputs.

    Raises:
        TypeError: If an output is not a floating tensor.
        ValueError: If shapes differ, or there is no sample.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import output_sensitivity
        >>> clean = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> noisy = torch.tensor([[1.5, 2.5], [2.5, 3.5]])
        >>> output_sensitivity(clean, noisy)
        tensor(0.2500, dtype=torch.float64)
    """
    clean = as_tensor(clean)
    draws = noisy if isinstance(noisy, list | tuple) else [noisy]
    rows = sensitivity_sums(clean, [as_tensor(draw) for draw in draws])
    if clean.numel() == 0:
        raise ValueError(f"Expected `clean` to hold a sample, but got the shape {tuple(clean.shape)}.")
    return sensitivity_from_sums(rows, per_output).value


def loss_estimate(
    sensitivity: Tensor | float,
    input_power: Tensor | float,
    noise_std: float,
    num_outputs: int,
    offset: Tensor | float = 0.0,
) -> Tensor:
    r"""Estimate the cross-entropy on unseen data from sensitivity (Equation 9 of arXiv:2007.15378).

    .. math::
        L \approx \sqrt{\tfrac{1}{2}\Big(\tfrac{K - 1}{K}\, S\, C + \Sigma\Big)}, \qquad
        C = \frac{\mathbb{E}[x^2]}{\sigma^2}

    The estimate has the right size for networks initialized with N(0, 1) and trained to convergence. It is
    about ten times too low for PyTorch's default initialization, with which the class mean stays small.

    Args:
        sensitivity: S, scalar or any shape.
        input_power: E[x²], the mean square of an input element, one number.
        noise_std: σ, standard deviation of the noise, in units of the model's input.
        num_outputs: K, the number of classes, 2 or more.
        offset: Σ, the part of the variance that sensitivity does not see.

    Returns:
        Tensor of the shape of ``sensitivity``, in nats.

    Raises:
        ValueError: If ``num_outputs`` is below 2.

    Example:
        >>> from lightning_sensitivity.functional import loss_estimate
        >>> loss_estimate(0.04, input_power=0.25, noise_std=0.1, num_outputs=10)
        tensor(0.6708, dtype=torch.float64)
    """
    if num_outputs < 2:
        raise ValueError(f"Expected `num_outputs` to be 2 or more, but got {num_outputs}.")
    if not isinstance(sensitivity, Tensor) or not sensitivity.is_floating_point():
        sensitivity = torch.as_tensor(sensitivity, dtype=torch.float64)
    dtype, device = sensitivity.dtype, sensitivity.device
    factor = torch.as_tensor(input_power, dtype=dtype, device=device) / noise_std**2
    variance = (num_outputs - 1) / num_outputs * sensitivity * factor
    return ((variance + offset) / 2).sqrt()


def _check_outputs(name: str, outputs: object) -> None:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        got = getattr(outputs, "dtype", type(outputs))
        raise TypeError(f"Expected `{name}` to be a floating tensor of outputs (logits), but got {got}.")
    if outputs.ndim == 0 or (outputs.ndim > 1 and outputs.shape[1] == 0):
        got = tuple(outputs.shape)
        raise ValueError(f"Expected `{name}` to have the shape (N, K, ...) or (N,), but got {got}.")
