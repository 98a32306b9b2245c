"""What left-out predictions need, and how good they are: temperature, errors, class shares, skill, labels in doubt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from lightning_sensitivity.functional.expected import metric_value
from lightning_sensitivity.functional.tasks import FLOOR, NUM_DRAWS, Task, find_task
from lightning_sensitivity.functional.tensors import as_tensor, num_outputs
from lightning_sensitivity.reference.blocks import spread
from lightning_sensitivity.reference.kinds import Array
from lightning_sensitivity.reference.observations import count_groups, stderr_of_mean

_POWERS = tuple(2 ** (quarter / 4) for quarter in range(-3, 15))  # inverse temperatures, 0.6 to 11
_MIN_ROWS, _MAX_NUMBERS = 1000, 2_000_000  # of left-out predictions that it is fitted to
_ERRORS, _MAX_SMOOTHING = 2.0, 0.9  # standard errors of the accuracy, from which on there is smoothing

_FEW, _MANY = torch.tensor([0, 0.01, 0.02, 0.03, 0.05]), torch.arange(0.075, 0.86, 0.025)
_SHARES = torch.cat([_FEW, _MANY]).double()  # r
_SHARPNESS = 2.0 ** torch.arange(0, 7.01, 0.5).double()  # b
_SMALLEST = 1e-3  # share of a class
_UNLIKELY = 1e-12

_ROUNDS = 100  # of expectation maximization

_MAX_ERRORS = 10_000  # errors, of which quantiles are taken
_NEAR_SHARE, _FEWEST_NEAR, _MOST_NEAR = 10, 60, 500  # a tenth of the samples, of which errors are near

_NO_SKILL, _NO_SKILL_PER_SAMPLE = 0.01, 1.5  # permuted labels reach 0.013, and more below 150 samples
_CHANCE = 0.025  # of a label that the reference can't tell to be ranked as well
_ROUNDING = 1e-12  # of scores that are 0
_FEWEST = 60  # labels, or groups of them, of which it may be said that the inputs of a table tell nothing of them


@dataclass
class Sharpening:
    """What makes probabilities of what is predicted for one question.

    Attributes:
        power: The inverse temperature.
        smoothing: The share of each prediction that is spread over classes.
        shares: By what it is spread: the mean label, ``(C,)``; None without smoothing.
        unsmoothed: The best inverse temperature without smoothing.
    """

    power: float = 1.0
    smoothing: float = 0.0
    shares: Tensor | None = None
    unsmoothed: float = 1.0

    def __call__(self, p: Tensor) -> Tensor:
        """Calibrate predictions ``(N, K)``."""
        q = (self.power * _logarithms(p)).softmax(1)
        return q if self.shares is None else (1 - self.smoothing) * q + self.smoothing * self.shares


@dataclass
class Calibration:
    """What makes probabilities of predictions; the numbers of a regression stay.

    Attributes:
        task: The task.
        parts: What to do for each of its questions, by default the least.
        mean_label: What takes the place of all predictions, since they know no more, ``(C,)``; None if they do.
    """

    task: Task
    parts: Sequence[Sharpening] = ()
    mean_label: Tensor | None = None

    def __call__(self, p: Tensor) -> Tensor:
        """Calibrate predictions ``(N, C)``."""
        if self.mean_label is not None:
            return self.mean_label.expand_as(p)
        questions = self.task.questions(p)
        parts = self.parts or [Sharpening()] * len(questions)
        found = [part(q) for part, q in zip(parts, questions, strict=True)]
        return self.task.of_questions(found) if found else p

    @property
    def unsmoothed(self) -> "Calibration":
        """The best one without smoothing."""
        return Calibration(self.task, [Sharpening(part.unsmoothed) for part in self.parts], self.mean_label)

    @property
    def power(self) -> float:
        """The inverse temperature, the mean over questions."""
        return sum(part.power for part in self.parts) / len(self.parts) if self.parts else 1.0

    @property
    def smoothing(self) -> float:
        """The share of predictions that is spread evenly over classes, the mean over questions."""
        return sum(part.smoothing for part in self.parts) / len(self.parts) if self.parts else 0.0


def _logarithms(p: Tensor) -> Tensor:
    """Return the logarithms of numbers near probabilities."""
    p = p.clamp(0, 1)
    return (p / p.sum(1, keepdim=True).clamp(min=_UNLIKELY)).clamp(min=FLOOR).log()


def calibrate(p: Tensor, y: Tensor, task: Task, groups: Tensor | None = None) -> Calibration:
    """Find the temperature of the lowest Brier score, and how much certainty that leaves too much.

    A ridge regression of labels is right more often than it says, which a temperature cures (Guo et al.,
    2017, who take the likelihood: a few redrawn labels would then hide it). Where labels are redrawn at
    random, the rest is surer than it is right: then a share is spread as labels are, and both are fitted anew,
    since a temperature by itself has made all predictions too unsure.

    Args:
        p: Left-out predictions, ``(N, C)``.
        y: Labels, ``(N, C)``, nan where they are unknown.
        task: The task.
        groups: The number of the group of each sample, ``(N,)``; None without groups.
    """
    parts = []
    for rows, q, answers in task.classifications(p, y):
        parts.append(_sharpen(q, answers, None if groups is None else groups[rows]))
    return Calibration(task, parts)


def _sharpen(p: Tensor, y: Tensor, groups: Tensor | None) -> Sharpening:
    """Calibrate predictions and labels of one question, ``(N, K)``."""
    some = spread(len(p), max(_MIN_ROWS, _MAX_NUMBERS // p.shape[1]))
    p, y, groups = p[some], y[some], None if groups is None else groups[some]
    logarithms = _logarithms(p)
    power = min(_POWERS, key=lambda each: float((each * logarithms).softmax(1).sub_(y).square_().sum()))
    certainty, classes = (power * logarithms).softmax(1).max(1)
    is_right = y.gather(1, classes[:, None])[:, 0]
    accuracy = is_right.mean()
    excess = certainty.mean() - accuracy
    by_chance = (accuracy * (1 - accuracy) / len(y)).sqrt() if groups is None else stderr_of_mean(is_right, groups)
    if not excess > _ERRORS * by_chance:  # also without a label
        return Sharpening(power, unsmoothed=power)
    shares = y.mean(0)
    _, best, smoothing = min(_smoothed(logarithms, y, each) for each in _POWERS)
    found = Sharpening(best, smoothing, shares, unsmoothed=power)
    # Redrawn labels are everywhere: samples that look like none of a class have its label as often as that says.
    # Without this, most of a few positives would be random samples.
    q = found(p)
    looks_unlike = (q < 2 * smoothing * shares).double()
    expected, hits = (q * looks_unlike).sum(0), (y * looks_unlike).sum(0)
    if bool((hits >= expected - _ERRORS * expected.sqrt()).all()):
        return found
    smoothing = min(float(excess / (certainty.mean() - 1 / y.shape[1])), _MAX_SMOOTHING)
    return Sharpening(power, smoothing, shares, unsmoothed=power)  # the least that makes it as sure as it is right


def _smoothed(logarithms: Tensor, y: Tensor, power: float) -> tuple[float, float, float]:
    """Fit the share that is spread, in closed form, at a temperature; the Brier score comes first, to compare."""
    q = (power * logarithms).softmax(1)
    towards = y.mean(0) - q
    share = float(((y - q) * towards).sum() / towards.square().sum().clamp(min=_UNLIKELY))
    share = min(max(share, 0.0), _MAX_SMOOTHING)
    return float((q + share * towards - y).square().sum()), power, share


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


def unexplained_share(predictions: object, labels: object, task: str | None = None) -> float:
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
        task: ``"multilabel"`` for labels that are yes, no or unknown, ``(N, L)``, each by itself; None for one class
            a sample.

    Returns:
        N, the expected share, up to 0.85; the mean over several labels, or nan if none is known.

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
    rules = find_task(task or ("binary" if num_outputs(q) == 1 else "multiclass"))
    y = y.double() if y.ndim > 1 else y.to(torch.promote_types(y.dtype, torch.uint8))  # no bools
    rules.check(q, y)
    q, y = rules.label_matrix(q).double(), rules.label_matrix(y, rules.num_columns(tuple(q.shape[1:]))).double()
    are_probabilities = len(q) > 0 and bool(((q >= 0) & (q <= 1)).all())
    if not are_probabilities or not bool(rules.has_label(y).all()):
        raise ValueError("Expected `predictions` to be probabilities from 0 to 1, and a label of each.")
    found = [_unexplained(*question) for _, *question in rules.classifications(q, y) if len(question[0]) > 0]
    return sum(found) / len(found) if found else math.nan


def _unexplained(q: Tensor, y: Tensor) -> float:
    """Compute the share of one question, of probabilities and labels ``(N, K)``."""
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


# The errors of a regression


def error_quantiles(errors: Array) -> Array:
    """Return 20 quantiles of errors ``(N, C)``, which have their mean square; nan is left out."""
    places = (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS
    quantile = np.nanquantile if np.isnan(errors).any() else np.quantile
    found = quantile(errors[:: math.ceil(len(errors) / _MAX_ERRORS)], places, axis=0)
    found = found - found.mean(0)
    size, wanted = (np.sqrt(np.nanmean(np.square(each), axis=0)) for each in (found, errors))
    return found * np.divide(wanted, size, out=np.zeros_like(size), where=size > 0)


def error_quantiles_near(predictions: Array, left_out: Array, labels: Array) -> Array:
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
    return error_quantiles((labels - left_out)[order[np.arange(number)[:, None] + first]])


# How good left-out predictions are


@dataclass(frozen=True)
class Quality:
    """How good left-out predictions are; of several labels, of those that they can tell.

    Attributes:
        score: Their Brier score, or the mean squared error.
        skill: How much lower it is than that of the mean label, up to 1.
        accuracy: The share of labels that they hit, or nan.
        majority: That of the most frequent class, or nan.
        unexplained: The share of labels that can't be explained, or nan.
        auroc: The area under the ROC curve, mean over classes, or nan.
        blind_labels: Which of several labels they can't tell.
        unclear_labels: Which columns of labels are too few, or all alike, to say that inputs tell nothing of them.
        tells_none: Whether they are no better than the mean label, of several labels for none of them.
    """

    score: float
    skill: float
    accuracy: float
    majority: float
    unexplained: float
    auroc: float
    blind_labels: list[int]
    unclear_labels: list[int]
    tells_none: bool


def measure_quality(
    p: Tensor, unsmoothed: Tensor, y: Tensor, groups: Tensor | None, task: Task, blind: list[int] | None = None
) -> Quality:
    """Measure left-out predictions; of all labels, if they can tell none of several.

    Args:
        p: The predictions, ``(N, C)``.
        unsmoothed: The same without smoothing, which would explain redrawn labels.
        y: Labels, ``(N, C)``, nan where they are unknown.
        groups: The number of the group of each sample, ``(N,)``; None without groups.
        task: The task.
        blind: Which of several labels they can't tell, if that is known.
    """
    if blind is None:
        questions = task.classifications(p, y) if task.is_by_column else []
        blind = [label for label, (_, q, answers) in enumerate(questions) if _is_blind(q, answers)]
    unclear, tells_none = _unclear_labels(y, groups, task), len(blind) == y.shape[1]
    if not tells_none:
        y = y.index_fill(1, torch.tensor(blind, dtype=torch.long), math.nan)
    score = float(task.distances(p, y).nanmean())
    chance = float(task.distances(y.nanmean(0).expand_as(y), y).nanmean())
    pairs = zip(task.classifications(p, y), task.classifications(unsmoothed, y), strict=True)
    found = [_describe_answers(q, answers, others) for (_, q, answers), (_, others, _) in pairs]
    columns = torch.tensor(found, dtype=torch.float64).reshape(-1, 3)
    accuracy, majority, unexplained = columns.nanmean(0).tolist()
    auroc = math.nan
    if majority < 1 and (metric := task.default_metrics(y.shape[1]).get("auroc")) is not None:
        auroc = float(metric_value(metric, p, task.hard_labels(y)[None], task))
    skill = _skill(score, chance)
    return Quality(score, skill, accuracy, majority, unexplained, auroc, blind, unclear, tells_none or skill <= 0)


def _unclear_labels(y: Tensor, groups: Tensor | None, task: Task) -> list[int]:
    """Return the columns of labels that are too few, or all alike, to say that inputs tell nothing of them.

    A task of a single question has one such column, and so has a regression.
    """
    questions = [(rows, answers) for rows, _, answers in task.classifications(y, y)] or [(torch.arange(len(y)), y)]
    sizes = [count_groups(None if groups is None else groups[rows], len(rows)) for rows, _ in questions]
    is_alike = [bool((answers == answers[:1]).all()) for _, answers in questions]
    return [column for column, size in enumerate(sizes) if size < _FEWEST or is_alike[column]]


def _describe_answers(q: Tensor, y: Tensor, unsmoothed: Tensor) -> tuple[float, float, float]:
    """Return the accuracy, the share of the most frequent class, and the unexplained share, of one question.

    Args:
        q: Left-out predictions, ``(N, K)``.
        y: Labels, ``(N, K)``.
        unsmoothed: Predictions without smoothing, which would explain redrawn labels.
    """
    if len(y) == 0:
        return math.nan, math.nan, math.nan
    classes = y.argmax(1)
    accuracy = float((q.argmax(1) == classes).double().mean())
    majority = float(classes.bincount().max()) / len(y)
    has_skill = _skill_of(q, y) > max(_NO_SKILL, _NO_SKILL_PER_SAMPLE / len(y))
    return accuracy, majority, unexplained_share(unsmoothed, y) if has_skill else math.nan


def _skill_of(q: Tensor, y: Tensor) -> float:
    """Return the skill of predictions of one question."""
    score, chance = ((each - y).square().sum(1).mean() for each in (q, y.mean(0)))
    return _skill(float(score), float(chance))


def _skill(score: float, chance: float) -> float:
    """Return how much lower a score is than that of the mean label."""
    return 1 - score / chance if chance > _ROUNDING else 0.0


def _is_blind(q: Tensor, y: Tensor) -> bool:
    """Return whether predictions ``(N, 2)`` of no and yes say no more than chance, by their score or their order."""
    no, yes = (q[y.argmax(1) == each, 1].numpy() for each in (0, 1))
    if len(no) == 0 or len(yes) == 0 or not _skill_of(q, y) > 0:
        return True
    return not mannwhitneyu(yes, no, alternative="greater").pvalue < _CHANCE
