"""What is fitted to left-out predictions: one temperature, and how many labels they can't explain; and class shares."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import as_tensor

_POWERS = tuple(2 ** (quarter / 4) for quarter in range(-3, 15))  # inverse temperatures, 0.6 to 11

_CHANCE = 2.0  # standard errors

_SHARES = torch.cat([torch.tensor([0, 0.01, 0.02, 0.03, 0.05]), torch.arange(0.075, 0.86, 0.025)]).double()  # r
_SHARPNESS = 2.0 ** torch.arange(0, 7.01, 0.5).double()  # b
_SMALLEST = 1e-3  # share of a class
_UNLIKELY = 1e-12

_MAX_ROUNDS = 1000  # of expectation maximization
_STILL = 1e-8  # change of a share in a round, at which it ends


class Calibration(NamedTuple):
    """What left-out predictions need to be right as often as they say.

    Attributes:
        power: The inverse of a temperature.
        uniform: The share r of a uniform distribution among the classes, as if labels were redrawn.
    """

    power: float = 1.0
    uniform: float = 0.0

    def apply(self, p: Tensor, task: Task) -> Tensor:
        """Calibrate predictions ``(N, C)``."""
        return (1 - self.uniform) * task.sharpen(p, self.power) + self.uniform / p.shape[1]


def calibrate(p: Tensor, y: Tensor, task: Task) -> Calibration:
    """Find the temperature of the lowest score (Guo et al., 2017, who take the likelihood).

    A ridge regression of labels is right more often than it says. By likelihood, a few redrawn labels would keep it
    so. Where many are redrawn, the temperature leaves it too sure; if that is beyond chance, a uniform share mends it.

    Args:
        p: Left-out predictions ``(N, C)``, as ``task.clip`` gives them.
        y: Labels ``(N, C)``.
        task: The task; predictions of a regression stay as they are.
    """
    if not task.has_classes:
        return Calibration()
    power = min(_POWERS, key=lambda each: float(task.distances(task.sharpen(p, each), y).mean()))
    largest, classes = task.sharpen(p, power).max(1)
    certainty, accuracy = float(largest.mean()), float(y.gather(1, classes[:, None]).mean())
    stderr = math.sqrt(accuracy * (1 - accuracy) / len(y))
    is_too_sure = certainty - accuracy > _CHANCE * stderr
    return Calibration(power, (certainty - accuracy) / (certainty - 1 / p.shape[1]) if is_too_sure else 0.0)


def estimate_class_shares(q: Tensor, training_shares: Tensor) -> Tensor:
    """Estimate the class shares of unseen samples, by expectation maximization (Saerens, Latinne, Decaestecker, 2002).

    Args:
        q: Calibrated probabilities of the unseen samples, by a model that has learned from others, ``(N, C)``.
        training_shares: The class shares of those others, ``(C,)``.

    Returns:
        The shares, ``(C,)``. They are sure only if classes can be told apart: see :func:`shares_differ`.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.reference.calibration import estimate_class_shares
        >>> q = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])
        >>> estimate_class_shares(q, torch.tensor([0.5, 0.5]))
        tensor([0.8125, 0.1875], dtype=torch.float64)
    """
    q = q.double()
    shares = training_shares.double()
    for _ in range(_MAX_ROUNDS):
        before, shares = shares, reweigh(q, training_shares, shares).mean(0)
        if bool((shares - before).abs().max() < _STILL):
            break
    return shares


def reweigh(q: Tensor, training_shares: Tensor, shares: Tensor) -> Tensor:
    """Turn probabilities that hold for some class shares into those that hold for others, ``(N, C)``.

    Args:
        q: Probabilities, by a model that has learned from samples of other shares, ``(N, C)``.
        training_shares: The class shares of those samples, ``(C,)``.
        shares: The class shares of the samples that are predicted, ``(C,)``.
    """
    weights = shares.double() / training_shares.double().clamp(min=_UNLIKELY)
    p = q.double() * weights
    return p / p.sum(1, keepdim=True).clamp(min=_UNLIKELY)


def shares_differ(left_out: Tensor, q: Tensor) -> float:
    """Test whether class shares of unseen samples differ from those of training samples.

    Args:
        left_out: Left-out predictions of the training samples, ``(N, C)``.
        q: Predictions of the unseen samples, by the same model, ``(M, C)``.

    Returns:
        The largest difference of mean predictions, in standard errors. Above 3.5, shares differ, or inputs do.
    """
    first, second = left_out.double(), q.double()
    variance = first.var(0) / len(first) + second.var(0) / len(second)
    z = (first.mean(0) - second.mean(0)).abs() / variance.sqrt()
    return float(z.nan_to_num(0.0, 0.0).max())


def unexplained_share(predictions: object, labels: object) -> float:
    r"""Estimate the share of labels that predictions can't explain, made without the label of each sample.

    Such labels are wrong, or the inputs do not determine them. It takes labels as redrawn at random among the K
    classes that occur, with a chance r, and else from the predictions q after these were sharpened by b around
    the shares s of the classes:

    .. math::
        L(r, b) = \prod_i \big[(1 - r)\, \operatorname{softmax}(\log s + b\,(q_i - s))_{y_i} + r / K\big], \qquad
        N = (1 - 1/K)\, \mathbb{E}\,r

    The mean is over r from 0 to 0.85, weighed by :math:`\max_b L(r, b)`. A label that is redrawn is right
    by chance in 1 of K cases.

    It can't see noise that always turns one class into the same other one. Correct labels count, too, where
    classes overlap so much that inputs do not tell them. To find *which* labels are wrong, use
    `cleanlab <https://github.com/cleanlab/cleanlab>`_.

    Args:
        predictions: Probabilities of the classes, ``(N, K)``; those of class 1, ``(N,)`` or ``(N, 1)``, for
            two classes. A :class:`Reference` has them as ``left_out_``.
        labels: Class indices ``(N,)``, or probabilities, such as one-hot labels, of the shape of
            ``predictions``.

    Returns:
        N, the expected share, up to 0.85.

    Raises:
        ValueError: If shapes do not fit, there is no sample, or numbers are no probabilities or class
            indices.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.reference import unexplained_share
        >>> labels, certainty = torch.arange(1000) % 4, torch.linspace(0, 1, 1000)[:, None]
        >>> predictions = certainty * torch.eye(4)[labels] + (1 - certainty) / 4
        >>> noisy = labels.where(torch.arange(1000) % 10 < 8, (labels + 1) % 4)  # 20 % are wrong
        >>> [round(unexplained_share(predictions, each), 2) for each in (labels, noisy)]
        [0.0, 0.2]
    """
    q, y = _as_classes(as_tensor(predictions), as_tensor(labels))
    num_classes = q.shape[1]
    shares = y.mean(0).clamp(min=_SMALLEST)
    shares = shares / shares.sum()
    redrawn = _SHARES[:, None]
    log_likelihoods = []
    for sharpness in _SHARPNESS:
        p = ((shares.log() + sharpness * (q - shares)).softmax(1) * y).sum(1)
        log_likelihoods.append(((1 - redrawn) * p + redrawn / num_classes).clamp(min=_UNLIKELY).log().sum(1))
    best = torch.stack(log_likelihoods).amax(0)
    weights = (best - best.max()).exp() * torch.gradient(_SHARES)[0]  # the grid is not even
    return float((weights * _SHARES).sum() / weights.sum()) * (1 - 1 / num_classes)


def _as_classes(predictions: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return predictions and labels as probabilities of classes, ``(N, K)``, in float64."""
    got = f"{tuple(predictions.shape)} and {tuple(labels.shape)}"
    q, y = predictions.cpu().double(), labels.cpu()
    if q.ndim < 2 or q.shape[1] == 1:  # of class 1
        q, y = (torch.stack([1 - each, each], 1) for each in (q.flatten(), y.double().flatten()))
    elif y.ndim == 1 and bool(((y >= 0) & (y < q.shape[1])).all()):
        y = torch.nn.functional.one_hot(y.long(), q.shape[1])
    _check_classes(q, y, got)
    occurs = (y > 0).any(0)  # a class without labels, such as an unused output, is none that labels are redrawn among
    q, y = q[:, occurs], y[:, occurs]
    return q / q.sum(1, keepdim=True).clamp(min=_UNLIKELY), y.double()


def _check_classes(q: Tensor, y: Tensor, got: str) -> None:
    if q.shape != y.shape or not len(q):
        expected = "`predictions` (N, K) and `labels` (N,) or (N, K), of classes 0 to K - 1"
        raise ValueError(f"Expected {expected}, but got {got}.")
    if not bool((torch.cat([q, y]).clamp(0, 1) == torch.cat([q, y])).all()):
        raise ValueError("Expected `predictions` and `labels` to be probabilities, from 0 to 1.")
