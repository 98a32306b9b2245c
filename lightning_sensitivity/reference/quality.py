"""How good the left-out predictions of a reference are."""

import math
from dataclasses import dataclass

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor

from lightning_sensitivity.functional.expected import metric_value
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.reference.calibration import unexplained_share
from lightning_sensitivity.reference.learners import Learner
from lightning_sensitivity.reference.observations import count_groups

_NO_SKILL, _NO_SKILL_PER_SAMPLE = 0.01, 1.5  # permuted labels reach 0.013, and more below 150 samples
_CHANCE = 0.025  # of a label that the reference can't tell to be ranked as well
_ROUNDING = 1e-12  # of scores that are 0
_FEWEST = 60  # labels, or groups of them, of which it may be said that the inputs of a table tell nothing of them


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
        tells_none: Whether they are no better than the mean label, of several labels for none of them.
    """

    score: float
    skill: float
    accuracy: float
    majority: float
    unexplained: float
    auroc: float
    blind_labels: list[int]
    tells_none: bool


def measure_quality(learner: Learner, task: Task, blind: list[int] | None = None) -> Quality:
    """Measure the left-out predictions of a learner; of all labels, if it can tell none of several.

    Args:
        learner: The learner.
        task: The task.
        blind: Which of several labels it can't tell, if that is known.
    """
    p, y = learner.left_out, learner.labels
    if blind is None:
        questions = task.classifications(p, y) if task.is_by_column else []
        blind = [label for label, (_, q, answers) in enumerate(questions) if _is_blind(q, answers)]
    tells_none = len(blind) == y.shape[1]
    if not tells_none:
        y = y.index_fill(1, torch.tensor(blind, dtype=torch.long), math.nan)
    score = float(task.distances(p, y).nanmean())
    chance = float(task.distances(y.nanmean(0).expand_as(y), y).nanmean())
    pairs = zip(task.classifications(p, y), task.classifications(learner.unsmoothed, y), strict=True)
    found = [_describe_answers(q, answers, unsmoothed) for (_, q, answers), (_, unsmoothed, _) in pairs]
    columns = torch.tensor(found, dtype=torch.float64).reshape(-1, 3)
    accuracy, majority, unexplained = columns.nanmean(0).tolist()
    auroc = math.nan
    if majority < 1 and (metric := task.default_metrics(y.shape[1]).get("auroc")) is not None:
        auroc = float(metric_value(metric, p, task.hard_labels(y)[None], task))
    skill = _skill(score, chance)
    return Quality(score, skill, accuracy, majority, unexplained, auroc, blind, tells_none or skill <= 0)


def unclear_labels(learner: Learner, task: Task) -> list[int]:
    """Return the columns of labels that are too few, or all alike, to say that inputs tell nothing of them.

    A task of a single question has one such column, and so has a regression.
    """
    y, groups = learner.labels, learner.groups
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
