"""Output sensitivity and what follows from it, as pure functions on tensors: no model, no state, no Lightning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from lightning_sensitivity.extremes import check_outputs, check_rounding, find_non_finite
from lightning_sensitivity.moments import batch_moments, sensitivity_estimate
from lightning_sensitivity.risk import RiskEstimate, has_training, holdout_sums, risk_terms, training_sums
from lightning_sensitivity.tasks import TASKS, check_logits, check_task

__all__ = ["RiskEstimate", "loss_estimate", "output_sensitivity", "risk_estimate"]


def output_sensitivity(clean: Tensor, noisy: Tensor | Iterable[Tensor], per_output: bool = False) -> Tensor:
    r"""Output sensitivity of a batch (Forouzesh, Salehi and Thiran, `arXiv:2007.15378`_, Section 3).

    .. math::
        S = \operatorname{Var}\Big(\frac{1}{K} \sum_{k=1}^{K} \big[f_k(x + \varepsilon) - f_k(x)\big]\Big)

    The variance is that of the population (ddof 0), over all samples, noise draws and further positions.

    Args:
        clean: Outputs f(x), before the softmax (logits, not log-probabilities), floating, shape ``(N, K, ...)``;
            dimensions after K (pixels, tokens) count as further samples, and ``(N,)`` is K = 1.
        noisy: Outputs f(x + ε), same shape, or an iterable of such tensors, one per noise draw.
        per_output: Give the mean over k of Var(f_k(x + ε) − f_k(x)) instead, which does not average over the outputs
            first and so is meaningful for probabilities, too.

    Returns:
        Scalar tensor, float64 (float32 on MPS), in squared units of the outputs.

    Raises:
        TypeError: If an output is not a floating tensor.
        ValueError: If shapes differ, an output is nan or inf, there is no change to look at, or the outputs are
            probabilities and ``per_output`` is False.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import output_sensitivity
        >>> clean = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        >>> noisy = torch.tensor([[1.5, 2.5], [2.5, 3.5]])
        >>> output_sensitivity(clean, noisy)
        tensor(0.2500, dtype=torch.float64)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378
    """
    moments, extremes = batch_moments(clean, noisy, per_output)
    if (non_finite := find_non_finite(extremes)) is not None:
        raise ValueError(non_finite)
    estimate = sensitivity_estimate(moments)
    warning = (None if per_output else check_outputs(extremes)) or check_rounding(estimate, extremes)
    if warning is not None:
        warnings.warn(warning, stacklevel=2)
    if clean.numel() == 0:
        raise ValueError(f"Expected `clean` to hold at least one sample, but got the shape {tuple(clean.shape)}.")
    return estimate.sensitivity


def loss_estimate(
    sensitivity: Tensor | float,
    input_power: Tensor | float,
    noise_std: Tensor | float,
    num_outputs: int,
    offset: Tensor | float = 0.0,
) -> Tensor:
    r"""Cross-entropy on unseen data as estimated from sensitivity (Equation 9 of `arXiv:2007.15378`_).

    .. math::
        L \approx \sqrt{\tfrac{1}{2}\Big(\tfrac{K - 1}{K}\, S\, C + \Sigma\Big)}, \qquad
        C = \frac{\mathbb{E}[x^2]}{\sigma^2}

    How far its size can be believed, measured on CIFAR-10 (README has the table and its command): within about 10 % for
    the mean over ten fully connected networks initialized with N(0, 1) and trained to convergence; nine times too low
    for the same networks with PyTorch's default initialization, whose class-mean is small. It assumes that the variance
    of the prediction is the dominant term, so it says nothing about an underfitted network, and an untrained one looks
    best.

    Args:
        sensitivity: S, scalar or any shape.
        input_power: E[x²], mean square of one input element, in squared units of the model's input. A tensor holds
            one value per channel, as ``noise_std`` may; C is then the mean over channels.
        noise_std: σ, standard deviation of the noise, in units of the model's input; scalar or one per channel.
        num_outputs: K, the number of classes, 2 or more.
        offset: Σ, the part of the variance that sensitivity does not see.

    Returns:
        Tensor of the shape of ``sensitivity``, in nats.

    Raises:
        ValueError: If ``noise_std`` is not positive, ``num_outputs`` is below 2, or ``sensitivity``, ``input_power``
            or the sum under the root is negative.

    Example:
        >>> from lightning_sensitivity.functional import loss_estimate
        >>> loss_estimate(0.04, input_power=0.25, noise_std=0.1, num_outputs=10)
        tensor(0.6708, dtype=torch.float64)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378
    """
    if isinstance(num_outputs, bool) or not isinstance(num_outputs, int) or num_outputs < 2:
        raise ValueError(f"Expected `num_outputs` to be an int of 2 or more, but got {num_outputs!r}.")
    sensitivity = sensitivity if isinstance(sensitivity, Tensor) else torch.tensor(sensitivity, dtype=torch.float64)
    power, std, offset = (
        torch.as_tensor(value, dtype=sensitivity.dtype, device=sensitivity.device)
        for value in (input_power, noise_std, offset)
    )
    if not bool(((std > 0) & std.isfinite()).all()):
        raise ValueError(f"Expected `noise_std` to be positive and finite, but got {noise_std}.")
    for name, value in (("sensitivity", sensitivity), ("input_power", power)):
        if bool((value < 0).any()):
            raise ValueError(f"Expected `{name}` to be 0 or more, but got {value}.")
    variance = (num_outputs - 1) / num_outputs * sensitivity * (power / std.square()).mean()
    under_root = (variance + offset) / 2
    if bool((under_root < 0).any()):
        raise ValueError(f"Expected `offset` to be at least minus the variance term, but got {offset}.")
    return under_root.sqrt()


def risk_estimate(
    outputs: Tensor,
    twin_outputs: Tensor,
    train_outputs: Tensor,
    train_targets: Tensor,
    task: Literal["multiclass", "binary", "multilabel", "regression"] = "multiclass",
) -> RiskEstimate:
    r"""Brier score (or mean squared error) on unseen samples, from training labels and unlabelled samples.

    .. math::
        R = \underbrace{\mathbb{E}_\text{train}\|p - y\|^2}_\text{training}
            + \underbrace{\mathbb{E}\,p \cdot (1 - p) - \mathbb{E}_\text{train}\,p \cdot (1 - p)}_\text{uncertainty}
            + \underbrace{\mathbb{E}\|p - p'\|^2}_\text{variance}

    p are the probabilities, y the labels, and p' what a twin says of the same sample: a network that was trained on
    other data. The second term is the difference in Gini impurity. In a regression p are the outputs, and it is left
    out. This is the chain L = bias + variance of `arXiv:2007.15378`_ (Section 4). Half of the last term is the variance
    of p over training sets. The bias is known from the training labels, less what the network has adapted to them; that
    is the other half.

    With a real twin it is exact where unseen labels agree with a network as its twins do, up to what it is
    miscalibrated by on its training samples,
    :math:`\mathbb{E}\,p \cdot y = \mathbb{E}\,p \cdot p' + \mathbb{E}_\text{train}\,p \cdot (y - p)`. (With one
    probability for each label, :math:`\mathbb{E}(y - p)` has to be that of training, too.)
    :mod:`lightning_sensitivity.twin` has a stand-in for a twin, a heuristic that costs no second training.

    Where training labels are wrong, it estimates the score against labels that are as wrong.

    Args:
        outputs: Outputs of the network for unlabelled samples that it was not trained on, before softmax or sigmoid,
            floating, shape ``(N, K, ...)`` or ``(N,)``.
        twin_outputs: Outputs of the twin for the same samples.
        train_outputs: Outputs of the network for training samples, in eval mode, shape ``(M, K, ...)`` or ``(M,)``.
        train_targets: Their labels: ``(M, ...)`` integers, or soft labels of the shape of ``train_outputs``, for
            ``"multiclass"``; of the shape of ``train_outputs`` (where a dimension 1 of one output may be missing) for
            the others.
        task: What is scored: ``"multiclass"``, the sum over classes of (p − y)²; ``"binary"`` and ``"multilabel"``,
            the mean over labels of (p − y)²; ``"regression"``, the mean squared error.

    Returns:
        The estimate and its three terms, scalar tensors, float64 (float32 on MPS): ``risk``, ``training``,
        ``uncertainty``, ``variance``.

    Raises:
        ValueError: If labels do not fit the task, shapes do not fit, there is no sample, or outputs for
            ``"multiclass"`` are probabilities already.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import risk_estimate
        >>> outputs, twin_outputs = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
        >>> train_outputs, train_targets = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1])
        >>> risk_estimate(outputs, twin_outputs, train_outputs, train_targets).risk
        tensor(0.3832, dtype=torch.float64)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378
    """
    if task not in TASKS:
        raise ValueError(f"Expected `task` to be one of {', '.join(map(repr, TASKS))}, but got {task!r}.")
    check_task(train_outputs, train_targets, task)
    if outputs.shape != twin_outputs.shape or outputs.shape[1:2] != train_outputs.shape[1:2]:
        raise ValueError(
            "Expected `twin_outputs` to have the shape of `outputs`, and `train_outputs` as many outputs, but got"
            f" {tuple(outputs.shape)}, {tuple(twin_outputs.shape)} and {tuple(train_outputs.shape)}."
        )
    for name, tensor in (("outputs", outputs), ("twin_outputs", twin_outputs), ("train_outputs", train_outputs)):
        if not tensor.is_floating_point():
            raise ValueError(f"Expected `{name}` to be a floating tensor, but got {tensor.dtype}.")
        if tensor.numel() == 0:
            raise ValueError(f"Expected `{name}` to hold at least one sample, but got the shape {tuple(tensor.shape)}.")
    check_logits(train_outputs, task)
    sums = holdout_sums(outputs, twin_outputs, task) + training_sums(train_outputs, train_targets, task)
    if not has_training(sums):
        raise ValueError("Expected `train_targets` to hold a label that counts, but all are -100.")
    return risk_terms(sums, task)
