"""What is fitted to left-out predictions: a temperature, class shares, and how many labels they can't explain."""

from dataclasses import dataclass, replace
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task, classification_of
from lightning_sensitivity.functional.tensors import as_tensor, num_outputs
from lightning_sensitivity.reference.blocks import spread
from lightning_sensitivity.reference.groups import stderr_of_mean

_POWERS = tuple(2 ** (quarter / 4) for quarter in range(-3, 15))  # inverse temperatures, 0.6 to 11
_MIN_ROWS, _MAX_NUMBERS = 1000, 2_000_000  # of left-out predictions that it is fitted to
_ERRORS, _MAX_SMOOTHING = 2.0, 0.9  # standard errors of the accuracy, from which on there is smoothing

_FEW, _MANY = torch.tensor([0, 0.01, 0.02, 0.03, 0.05]), torch.arange(0.075, 0.86, 0.025)
_SHARES = torch.cat([_FEW, _MANY]).double()  # r
_SHARPNESS = 2.0 ** torch.arange(0, 7.01, 0.5).double()  # b
_SMALLEST = 1e-3  # share of a class
_UNLIKELY = 1e-12

_ROUNDS = 100  # of expectation maximization


@dataclass
class Calibration:
    """What makes probabilities of predictions.

    Attributes:
        task: The task; in a regression, predictions stay.
        power: The inverse temperature.
        smoothing: The share of each prediction that is spread over classes.
        shares: By what it is spread: the mean label, ``(C,)``; None without smoothing.
        unsmoothed: The best inverse temperature without smoothing.
    """

    task: Task
    power: float = 1.0
    smoothing: float = 0.0
    shares: Tensor | None = None
    unsmoothed: float = 1.0

    def __call__(self, p: Tensor) -> Tensor:
        """Calibrate predictions ``(N, C)``."""
        q = self.task.sharpened(p, self.power)
        return q if self.shares is None else (1 - self.smoothing) * q + self.smoothing * self.shares


def calibrate(p: Tensor, y: Tensor, task: Task, groups: Tensor | None = None) -> Calibration:
    """Find the temperature of the lowest Brier score, and how much certainty that leaves too much.

    A ridge regression of labels is right more often than it says, which a temperature cures (Guo et al.,
    2017, who take the likelihood: a few redrawn labels would then hide it). Where labels are redrawn at
    random, the rest is surer than it is right: then a share is spread as labels are, and both are fitted anew,
    since a temperature by itself has made all predictions too unsure.

    Args:
        p: Left-out predictions, ``(N, C)``.
        y: Labels, ``(N, C)``.
        task: The task.
        groups: The number of the group of each sample, ``(N,)``; None without groups.
    """
    if not task.needs_calibration:
        return Calibration(task)
    some = spread(len(p), max(_MIN_ROWS, _MAX_NUMBERS // p.shape[1]))
    p, y, groups = p[some], y[some], None if groups is None else groups[some]
    power = min(_POWERS, key=lambda each: float(task.distances(task.sharpened(p, each), y).sum()))
    certainty, is_right = task.certainties(task.sharpened(p, power), y)
    accuracy = is_right.mean()
    excess = certainty.mean() - accuracy
    by_chance = (accuracy * (1 - accuracy) / len(y)).sqrt() if groups is None else stderr_of_mean(is_right, groups)
    if not excess > _ERRORS * by_chance:
        return Calibration(task, power, unsmoothed=power)
    found = min((_smoothed(p, y, task, each) for each in _POWERS), key=attrgetter("score")).calibration
    if not _are_redrawn(p, y, found):
        return Calibration(task, power, unsmoothed=power)
    return replace(found, unsmoothed=power)


class _Fit(NamedTuple):
    """A calibration, and its Brier score."""

    score: float
    calibration: Calibration


def _smoothed(p: Tensor, y: Tensor, task: Task, power: float) -> _Fit:
    """Fit the share that is spread, at a temperature; its Brier score is lowest in closed form."""
    shares = y.mean(0)
    q = task.sharpened(p, power)
    towards = shares - q
    share = float(((y - q) * towards).sum() / towards.square().sum().clamp(min=_UNLIKELY))
    share = min(max(share, 0.0), _MAX_SMOOTHING)
    return _Fit(float((q + share * towards - y).square().sum()), Calibration(task, power, share, shares))


def _are_redrawn(p: Tensor, y: Tensor, calibration: Calibration) -> bool:
    """Return whether samples that look like none of a class have its label as often as smoothing says.

    Redrawn labels are everywhere. Without this, most of a few positives would be random samples.
    """
    assert calibration.shares is not None
    q, least = calibration(p), calibration.smoothing * calibration.shares
    looks_unlike = (q < 2 * least).double()
    wanted, found = (q * looks_unlike).sum(0), (y * looks_unlike).sum(0)
    return bool((found >= wanted - _ERRORS * wanted.sqrt()).all())


def estimate_class_shares(q: Tensor, training_shares: Tensor) -> Tensor:
    """Estimate the class shares of unseen samples, by expectation maximization (Saerens et al., 2002).

    Args:
        q: Calibrated probabilities of the unseen samples, by a model that has learned from others,
            ``(N, C)``.
        training_shares: The class shares of those others, ``(C,)``.

    Returns:
        The shares, ``(C,)``. They are sure only if classes can be told apart.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.reference.calibration import estimate_class_shares
        >>> q = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.9, 0.1], [0.1, 0.9]])
        >>> estimate_class_shares(q, torch.tensor([0.5, 0.5]))
        tensor([0.8125, 0.1875], dtype=torch.float64)
    """
    shares = training_shares
    for _ in range(_ROUNDS):
        shares = reweigh(q, training_shares, shares).mean(0)
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


def unexplained_share(predictions: object, labels: object) -> float:
    r"""Estimate the share of labels that predictions can't explain, made without the label of each sample.

    Such labels are wrong, or the inputs do not determine them. It takes labels as redrawn at random among the
    K classes that occur, with a chance r, and else from the predictions q after these were sharpened by b
    around the shares s of the classes:

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
            two classes. A :class:`~lightning_sensitivity.Reference` has them as ``left_out_``.
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
    q, y = as_tensor(predictions).cpu(), as_tensor(labels).cpu()
    y = y.double() if y.ndim > 1 else y.to(torch.promote_types(y.dtype, torch.uint8))  # no bools
    task = classification_of(num_outputs(q))
    task.check(q, y)
    q, y = task.label_matrix(q).double(), task.label_matrix(y, task.num_columns(tuple(q.shape[1:]))).double()
    if not len(q) or not bool(((q >= 0) & (q <= 1)).all()) or not bool(task.has_label(y).all()):
        raise ValueError("Expected `predictions` to be probabilities from 0 to 1, and a label of each.")
    occurs = (y > 0).any(0)  # labels are not redrawn among classes without any, such as an unused output
    q, y = q[:, occurs], y[:, occurs]
    q = q / q.sum(1, keepdim=True).clamp(min=_UNLIKELY)
    shares = y.mean(0).clamp(min=_SMALLEST)
    shares = shares / shares.sum()
    redrawn = _SHARES[:, None]
    log_likelihoods = []
    for sharpness in _SHARPNESS:
        p = ((shares.log() + sharpness * (q - shares)).softmax(1) * y).sum(1)
        log_likelihoods.append(((1 - redrawn) * p + redrawn / len(shares)).clamp(min=_UNLIKELY).log().sum(1))
    best = torch.stack(log_likelihoods).amax(0)
    weights = (best - best.max()).exp() * torch.gradient(_SHARES)[0]  # the grid is not even
    return float((weights * _SHARES).sum() / weights.sum()) * (1 - 1 / len(shares))
