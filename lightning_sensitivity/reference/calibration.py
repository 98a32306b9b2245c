"""What left-out predictions need, and how good they are: temperature, errors, class shares, skill, labels in doubt."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.stats import norm, rankdata
from torch import Tensor

from lightning_sensitivity.functional.expected import metric_value
from lightning_sensitivity.functional.tasks import NUM_DRAWS, Task
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
_FLOOR = 1e-6  # of probabilities, whose logarithms are taken
_MAX_ERRORS = 10_000  # errors, of which quantiles are taken

_NO_SKILL, _NO_SKILL_PER_SAMPLE = 0.01, 1.5  # permuted labels reach 0.013, and more below 150 samples
_CHANCE, _NOTHING = 0.1, 0.3  # that labels without a relation to the inputs are told as well: blind, and surely so
_ROUNDING = 1e-12  # relative: below it, gains are 0, and labels all equal
_FEWEST = 60  # labels, or groups of them, of which it may be said that the inputs of a table tell nothing of them


@dataclass
class Sharpening:
    """What makes probabilities of what is predicted for one question.

    Attributes:
        power: The inverse temperature.
        smoothing: The share of each prediction that is spread over classes.
        shares: By what it is spread: the mean label, ``(C,)``; None without smoothing.
    """

    power: float = 1.0
    smoothing: float = 0.0
    shares: Tensor | None = None

    def __call__(self, logarithms: Tensor) -> Tensor:
        """Turn logarithms of predictions ``(N, K)`` into probabilities."""
        q = (self.power * logarithms).softmax(1)
        return q if self.shares is None else (1 - self.smoothing) * q + self.smoothing * self.shares


@dataclass
class Calibration:
    """What makes probabilities of predictions; the numbers of a regression stay.

    Attributes:
        task: The task.
        parts: What to do for each of its questions, by default the least.
        temperatures: What a temperature by itself does for each.
    """

    task: Task
    parts: Sequence[Sharpening] = ()
    temperatures: Sequence[Sharpening] = ()

    def __call__(self, p: Tensor) -> Tensor:
        """Calibrate predictions ``(N, C)``."""
        questions = self.task.questions(p)
        parts = self.parts or [Sharpening()] * len(questions)
        calibrated = [part(_logarithms(q)) for part, q in zip(parts, questions, strict=True)]
        return self.task.of_questions(calibrated) if calibrated else p

    @property
    def power(self) -> float:
        """The inverse temperature, the mean over questions."""
        return sum(part.power for part in self.parts) / len(self.parts) if self.parts else 1.0

    @property
    def smoothing(self) -> float:
        """The share of predictions that is spread over classes, the mean over questions."""
        return sum(part.smoothing for part in self.parts) / len(self.parts) if self.parts else 0.0


@dataclass
class MeanLabel:
    """What stands in place of a calibration where predictions know no more than the mean label, ``(C,)``."""

    label: Tensor
    power, smoothing = 1.0, 1.0

    def __call__(self, p: Tensor) -> Tensor:
        """Return the mean label in place of predictions ``(N, C)``."""
        return self.label.expand_as(p)


def _logarithms(p: Tensor) -> Tensor:
    """Return the logarithms of numbers near probabilities."""
    p = p.clamp(0, 1)
    return (p / p.sum(1, keepdim=True).clamp(min=_UNLIKELY)).clamp(min=_FLOOR).log()


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
    parts, temperatures = [], []
    for rows, q, answers in task.classifications(p, y):
        some = spread(len(q), max(_MIN_ROWS, _MAX_NUMBERS // q.shape[1]))  # which are enough
        logarithms, labels = _logarithms(q[some]), answers[some]
        power = min(_POWERS, key=lambda each: float((each * logarithms).softmax(1).sub_(labels).square_().sum()))
        temperatures.append(Sharpening(power))
        parts.append(_sharpen(logarithms, labels, power, None if groups is None else groups[rows[some]]))
    return Calibration(task, parts, temperatures)


def _sharpen(logarithms: Tensor, y: Tensor, power: float, groups: Tensor | None) -> Sharpening:
    """Smooth predictions of one question, of which these are logarithms, if a temperature leaves them too sure."""
    shares = y.mean(0)
    q = (power * logarithms).softmax(1)
    certainty, classes = q.max(1)
    is_right = y.gather(1, classes[:, None])[:, 0]
    accuracy = is_right.mean()
    excess = certainty.mean() - accuracy
    by_chance = (accuracy * (1 - accuracy) / len(y)).sqrt() if groups is None else stderr_of_mean(is_right, groups)
    if not excess > _ERRORS * by_chance:  # also without a label
        # The most frequent class hides it where predictions of the others are too sure.
        share = _share_beyond_chance(q, y, groups)
        return Sharpening(power, share, shares) if share > 0 else Sharpening(power)
    _, best = min((_smoothed(logarithms, y, each) for each in _POWERS), key=lambda each: each[0])
    # Redrawn labels are everywhere: samples that look like none of a class have its label as often as that says.
    # Without this, most of a few positives would be random samples.
    q = best(logarithms)
    looks_unlike = (q < 2 * best.smoothing * shares).double()
    expected, hits = (q * looks_unlike).sum(0), (y * looks_unlike).sum(0)
    if bool((hits >= expected - _ERRORS * expected.sqrt()).all()):
        return best
    smoothing = min(float(excess / (certainty.mean() - 1 / y.shape[1])), _MAX_SMOOTHING)
    return Sharpening(power, smoothing, shares)  # the least that makes it as sure as it is right


def _smoothed(logarithms: Tensor, y: Tensor, power: float) -> tuple[float, Sharpening]:
    """Fit the share that is spread at a temperature, and return the Brier score of both, to compare."""
    q, shares = (power * logarithms).softmax(1), y.mean(0)
    towards = shares - q
    best = float(((y - q) * towards).sum() / towards.square().sum().clamp(min=_UNLIKELY))
    share = min(max(best, 0.0), _MAX_SMOOTHING)
    return float((q + share * towards - y).square().sum()), Sharpening(power, share, shares)


def _share_beyond_chance(q: Tensor, y: Tensor, groups: Tensor | None) -> float:
    """Return the share of the lowest score, of predictions as sharp as they are, up to 1; 0 if it may be chance."""
    towards = y.mean(0) - q
    size = float(towards.square().sum().clamp(min=_UNLIKELY))
    share = float(((y - q) * towards).sum()) / size
    rest = ((y - q - share * towards) * towards).sum(1)
    stderr = stderr_of_mean(rest, groups) * len(y) / size
    return min(share, 1.0) if share > _ERRORS * stderr else 0.0


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


def _unexplained(q: Tensor, y: Tensor) -> float:
    """Compute the share of labels that can't be explained, of probabilities and labels ``(N, K)`` of one question."""
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
    quantiles = quantile(errors[:: math.ceil(len(errors) / _MAX_ERRORS)], places, axis=0)
    quantiles = quantiles - quantiles.mean(0)
    size, wanted = (np.sqrt(np.nanmean(np.square(each), axis=0)) for each in (quantiles, errors))
    return quantiles * np.divide(wanted, size, out=np.zeros_like(size), where=size > 0)


# How good left-out predictions are


class Evidence(NamedTuple):
    """What left-out predictions tell of one question, or of one target of a regression.

    Attributes:
        is_blind: Whether they may be no better than the mean label, by score and by order.
        is_nothing: Whether they are almost certainly no better: inputs that tell something seldom score so badly.
        is_clear: Whether labels are enough, and not all alike, so that it is the inputs that tell nothing otherwise.
    """

    is_blind: bool
    is_nothing: bool
    is_clear: bool


def judge(p: Tensor, y: Tensor, groups: Tensor | None, task: Task) -> list[Evidence]:
    """Judge how far left-out predictions tell labels better than chance, question by question.

    Args:
        p: The predictions, ``(N, C)``.
        y: Labels, ``(N, C)``, nan where they are unknown.
        groups: The number of the group of each sample, ``(N,)``; None without groups.
        task: The task.
    """
    targets = ((~each.isnan()).nonzero()[:, 0] for each in y.T) if task.is_regression else ()
    of_targets = [(rows, p[rows, place, None], y[rows, place, None]) for place, rows in enumerate(targets)]
    evidence = []
    for rows, q, answers in of_targets or task.classifications(p, y):
        own_groups = None if groups is None else groups[rows]
        is_clear = count_groups(own_groups, len(rows)) >= _FEWEST and not bool((answers == answers[:1]).all())
        p_value = _p_value(q, answers, own_groups)
        evidence.append(Evidence(p_value >= _CHANCE, p_value >= _NOTHING, is_clear))
    return evidence


def _p_value(q: Tensor, y: Tensor, groups: Tensor | None) -> float:
    """Return how likely it is by chance that predictions ``(N, K)`` are so much better than the mean label.

    What counts is the largest of the gains: that of the score, and that of the order, which is a rank correlation
    with each column of labels (of two classes one says all). Whole groups are independent.
    """
    differences = y - y.mean(0)
    ranks = torch.from_numpy(rankdata(q.numpy(), axis=0))
    of_order = (ranks - ranks.mean(0)) * differences
    of_score = differences.square().sum(1) - (y - q).square().sum(1)
    least = _ROUNDING * differences.square().sum(1).mean() + _ROUNDING**2 * y.square().sum(1).mean()
    of_score = of_score.where(of_score.abs() > least, 0.0)
    gains = [of_score, *of_order.T[int(y.shape[1] == 2) :]]
    errors = torch.stack([gain.mean() / stderr_of_mean(gain, groups) for gain in gains]).nan_to_num(0.0)
    return len(gains) * float(norm.sf(errors.max()))


def measure_quality(p: Tensor, tempered: Tensor, y: Tensor, task: Task, blind: Sequence[int]) -> tuple[float, ...]:
    """Measure left-out predictions; of all labels, if they can tell none of several.

    Args:
        p: The predictions, ``(N, C)``.
        tempered: The same without smoothing, which would explain redrawn labels.
        y: Labels, ``(N, C)``, nan where they are unknown.
        task: The task.
        blind: Which of several labels they can't predict.

    Returns:
        Their Brier score, or the mean squared error; how much lower it is than that of the mean label, up to 1; the
        share of labels that they hit; that of the most frequent class; that of labels that can't be explained; and the
        area under the ROC curve, mean over classes. All but the first two may be nan.
    """
    if len(blind) < y.shape[1]:
        y = y.index_fill(1, torch.tensor(blind, dtype=torch.long), math.nan)
    score = float(task.distances(p, y).nanmean())
    chance = float(task.distances(y.nanmean(0).expand_as(y), y).nanmean())
    pairs = zip(task.classifications(p, y), task.questions(tempered), strict=True)
    described = [_describe_answers(q, answers, others[rows]) for (rows, q, answers), others in pairs]
    columns = torch.tensor(described, dtype=torch.float64).reshape(-1, 3)
    accuracy, majority, unexplained = columns.nanmean(0).tolist()
    auroc = math.nan
    if majority < 1 and (metric := task.default_metrics(y.shape[1]).get("auroc")) is not None:
        auroc = float(metric_value(metric, p, task.hard_labels(y)[None], task))
    return score, _skill(score, chance, y), accuracy, majority, unexplained, auroc


def _describe_answers(q: Tensor, y: Tensor, tempered: Tensor) -> tuple[float, float, float]:
    """Return the accuracy, the share of the most frequent class, and the unexplained share, of one question.

    Args:
        q: Left-out predictions, ``(N, K)``.
        y: Labels, ``(N, K)``.
        tempered: Predictions without smoothing.
    """
    if len(y) == 0:
        return math.nan, math.nan, math.nan
    classes = y.argmax(1)
    accuracy = float((q.argmax(1) == classes).double().mean())
    majority = float(classes.bincount().max()) / len(y)
    score, chance = (float((each - y).square().sum(1).mean()) for each in (q, y.mean(0)))
    has_skill = _skill(score, chance, y) > max(_NO_SKILL, _NO_SKILL_PER_SAMPLE / len(y))
    return accuracy, majority, _unexplained(tempered, y) if has_skill else math.nan


def _skill(score: float, chance: float, y: Tensor) -> float:
    """Return how much lower a score is than that of the mean label; 0 if all labels are equal."""
    return 1 - score / chance if chance > _ROUNDING**2 * float(y.square().nanmean()) else 0.0
