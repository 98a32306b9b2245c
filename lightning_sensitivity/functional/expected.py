"""What metrics to expect on unlabelled samples, if labels are drawn as a reference predicts; how sure that is."""

import math
import warnings
from collections.abc import Callable, Sequence
from statistics import fmean, median_high
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from scipy.special import stdtrit
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAUROC, MultilabelAUROC

from lightning_sensitivity.compat import stay_alone
from lightning_sensitivity.functional.tasks import AUROC, AnyMetric, ClosedForm, Measured, Task, find_task
from lightning_sensitivity.functional.tensors import Numbers, as_tensor, number_units

ESTIMATES = 2  # the version of expected values, raised with whatever changes one, so that studies can tell theirs
VALIDATIONS = 3  # of which the median says how many labels a reference counts as
WEIGHT = 1000  # how many labels a reference counts as, beside labels
# How sure a reference is of a network, which may err elsewhere, as a number of labels: by what it sees, a whole table,
# what `features=` shows it, or a part, such as patches and words. Chosen on the design half of
# `examples/studies/sureness`.
_EQUIVALENT_LABELS = {
    "table": {"accuracy": 500, "auroc": 500, "loss": 200},
    "features": {"accuracy": 200, "auroc": 50, "loss": 100},
    "part": {"accuracy": 30, "auroc": 30, "loss": 30},
}
_FEWEST = 1.5  # groups, or positives, from which on these have a variance; sizes of groups differ, and draws have means
_TRIED = 32  # samples on which a loss is tried
_BEYOND_CHANCE = 2.0  # standard errors by which labels and a reference differ, from which on it counts for less
QUANTILE = 1.645  # of the normal distribution, for an interval of 90 %

Loss: TypeAlias = Callable[[Tensor, Tensor], Any]  # of outputs and labels


def draw_labels(q: Numbers, task: str = "multiclass", residuals: Numbers = None) -> Tensor:
    """Draw labels from the predictions of a reference: 20 per sample, at evenly spaced quantiles.

    The quantiles of a sample begin at an offset of its own, so that rare classes get their share. There are
    no random numbers: the same predictions give the same labels.

    Args:
        q: Predictions ``(N, C)``; for ``"binary"`` also probabilities of class 1, ``(N,)`` or ``(N, 1)``.
        task: The task.
        residuals: In a regression, quantiles of the left-out errors, which are added, ``(20, C)``; see
            ``Reference.residuals_``.

    Returns:
        Class indices ``(20, N)``; for ``"multilabel"`` labels ``(20, N, L)``; for a regression targets
        ``(20, N, C)``, or ``(1, N, C)`` without residuals.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import draw_labels
        >>> int((draw_labels(torch.tensor([[0.75, 0.25]])) == 0).sum())
        15
    """
    task_rules, q = find_task(task), as_tensor(q)
    _check_predictions(task_rules, q)
    return task_rules.draw(task_rules.label_matrix(q), None if residuals is None else as_tensor(residuals))


def label_draws(y: Tensor, task: Task) -> Tensor:
    """Return labels ``(N, C)`` as they are drawn, ``(1, N, ...)``, nan where unknown; of soft ones 20 draws."""
    if task.is_regression or not bool(((y > 0) & (y < 1)).any()):
        return task.hard_labels(y)[None]
    draws = task.draw(y, None)
    return draws.where(~y.isnan(), math.nan) if task.is_by_column else draws


def complete_labels(labels: Tensor, draws: Tensor, indices: Tensor) -> Tensor:
    """Complete labels by drawn ones where they are unknown.

    Args:
        labels: Labels as they are drawn, ``(1, N, ...)`` or ``(R, N, ...)``, nan where unknown.
        draws: Labels that are drawn for some of the samples, ``(R, M, ...)``.
        indices: Which samples these are, ``(M,)``.

    Returns:
        The labels ``(R, N, ...)``; as they are if all are known.
    """
    if not bool(labels.isnan().any()):
        return labels
    completed = labels.repeat(len(draws) // len(labels), *[1] * (labels.ndim - 1))
    some = completed[:, indices]
    completed[:, indices] = some.where(~some.isnan(), draws.to(some))
    return completed


def expected_loss(outputs: Numbers, q: Numbers, task: str = "multiclass", residuals: Numbers = None) -> Tensor:
    r"""Compute the loss to expect on unlabelled samples, if labels are drawn from the predictions of a reference.

    It is the cross-entropy, exactly:

    .. math::
        L = -\mathbb{E}\, \sum_k q_k \log \operatorname{softmax}(f)_k

    for logits f of the network and predictions q of the reference; in a regression the squared error, that
    between both and the mean square of ``residuals`` on top. For a loss of your own, take its mean over
    :func:`draw_labels`.

    Args:
        outputs: Outputs of the network for unseen samples: logits ``(N, K)``, or ``(N,)`` for ``"binary"``;
            the numbers of a regression, ``(N,)`` or ``(N, D)``.
        q: Predictions of the same samples by a reference: probabilities ``(N, C)``, also those of class 1,
            ``(N,)`` or ``(N, 1)``, for ``"binary"``; see ``Reference.predict_proba``, in a regression
            ``Reference.predict``.
        task: The task.
        residuals: In a regression, where they are needed, quantiles of the left-out errors, ``(20, C)``; see
            ``Reference.residuals_``.

    Returns:
        The loss, a scalar tensor in double precision.

    Raises:
        ValueError: If shapes do not fit, or there are no ``residuals`` in a regression.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import expected_loss
        >>> q = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> expected_loss(10 * q.log(), q)  # a network that is too sure
        tensor(2.4849, dtype=torch.float64)
    """
    task_rules, outputs, q = _of_same_samples(task, outputs, q, residuals)
    return task_rules.losses(outputs, task_rules.label_matrix(q), draw_labels(q, task, residuals)).double().nanmean()


def expected_metric(
    metric: Metric, logits: Numbers, q: Numbers, task: str = "multiclass", residuals: Numbers = None
) -> Tensor:
    """Compute the value of a metric to expect, if labels are drawn from the predictions of a reference.

    Args:
        metric: A torchmetrics metric with ``update(preds, target)``; it stays as it is.
        logits: Logits of unseen samples, ``(N, K)``; ``(N,)`` or ``(N, 1)`` for ``"binary"``.
        q: Predictions of the same samples by a reference: probabilities ``(N, C)``, also those of class 1,
            ``(N,)`` or ``(N, 1)``, for ``"binary"``; see ``Reference.predict_proba``.
        task: The task.
        residuals: As for :func:`expected_loss`.

    Returns:
        The value, a scalar tensor.

    Raises:
        ValueError: If shapes do not fit, or there are no ``residuals`` in a regression.

    Example:
        >>> import torch
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> from lightning_sensitivity.functional import expected_metric
        >>> q = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> expected_metric(MulticlassAccuracy(2, average="micro"), q.log(), q)
        tensor(0.8500)
    """
    task_rules, logits, q = _of_same_samples(task, logits, q, residuals)
    return metric_value(metric, task_rules.predictions(logits), draw_labels(q, task, residuals), task_rules)


def _of_same_samples(task: str, outputs: Numbers, q: Numbers, residuals: Numbers) -> tuple[Task, Tensor, Tensor]:
    """Return the task and both tensors, or raise ValueError if sizes differ, or errors of a regression lack."""
    task_rules, outputs, q = find_task(task), as_tensor(outputs), as_tensor(q)
    if len(outputs) != len(q):
        sizes = f"{len(outputs)} and {len(q)}"
        raise ValueError(f"Expected outputs of the network and `q` of the same samples, but got {sizes}.")
    _check_predictions(task_rules, q)
    columns = task_rules.output_matrix(outputs).shape[1], task_rules.label_matrix(q).shape[1]
    if columns[0] != columns[1]:
        raise ValueError(
            f"Expected outputs of the network and `q` to have as many columns, but got {columns[0]} and {columns[1]}. "
            "One logit for two classes is the task 'binary'."
        )
    if task_rules.is_regression and residuals is None:
        raise ValueError("Expected `residuals` in a regression: without them, predictions would be taken for targets.")
    return task_rules, outputs, q


def _check_predictions(task: Task, q: Tensor) -> None:
    """Raise ValueError if predictions have no column for each class."""
    if task.has_indices and q.ndim != 2:
        raise ValueError(f"Expected `q` to be probabilities (N, C), but got the shape {tuple(q.shape)}.")


def metric_value(metric: AnyMetric, predictions: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Compute a metric of predictions and labels, in this process alone.

    Args:
        metric: The metric, which stays as it is.
        predictions: Probabilities of the classes, or numbers in a regression, ``(N, C)``.
        labels: Several labels for each sample, ``(R, N)``; ``(R, N, C)`` if a sample has several, or in a regression.
        task: The task.
    """
    if isinstance(metric, ClosedForm):
        return torch.tensor(metric.measure(predictions, labels).value)
    copied = metric.clone()
    copied.reset()
    stay_alone(copied)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that no draw has
        for target in labels:
            copied.update(*task.metric_inputs(copied, predictions, target))
        value: Tensor = copied.compute()
    return value


def is_area(metric: AnyMetric) -> bool:
    """Return whether a metric is the area under a ROC curve, which is a half where inputs tell nothing of labels."""
    return isinstance(metric, AUROC | BinaryAUROC | MulticlassAUROC | MultilabelAUROC)


def losses(loss: Loss, outputs: Tensor, draws: Tensor, task: Task, like: Tensor) -> Tensor:
    """Compute a user's loss for each of several labels of a sample, ``(R,)`` or ``(R, N)``, on the CPU.

    Args:
        loss: The loss: of outputs and labels, a number, or one for each sample.
        outputs: Outputs ``(N, ...)``.
        draws: Labels ``(R, N)``; ``(R, N, C)`` if a sample has several, or in a regression.
        task: The task.
        like: Labels in the form and on the device that the loss takes, of any number.
    """
    outputs = outputs.to(like.device)
    pairs = ((outputs.clone(), task.as_labels(each, like).clone()) for each in draws)  # it may write to both
    return torch.stack([torch.as_tensor(loss(*pair)) for pair in pairs]).detach().double().cpu()


def mean_loss(loss: Loss, outputs: Tensor, labels: Tensor) -> float:
    """Compute the mean of a user's loss, which may write to what it gets, or raise ValueError if it is a tuple."""
    value = loss(outputs.clone(), labels.clone())
    if isinstance(value, list | tuple):
        example = "`lambda f, y: loss(f, y)[0]`"
        raise ValueError(f"`loss` should be a function that returns one tensor, such as {example}, got {value!r}.")
    return float(torch.as_tensor(value).double().mean())


def check_pairs(loss: Loss, outputs: Tensor, labels: Tensor) -> None:
    """Raise ValueError if a loss compares each output with every label, as torch broadcasts ``(N, 1)`` and ``(N,)``.

    Of one sample at a time it can't. A loss of pairs of samples differs from that, too, but also in one shape.
    """
    shapes = f"outputs {tuple(outputs.shape)} and labels {tuple(labels.shape)}"
    of_sample = outputs.shape[1:], labels.shape[1:]
    if of_sample[0] == of_sample[1] or of_sample[0].numel() != of_sample[1].numel():
        return
    labels = labels[:_TRIED]
    # Outputs of an untrained network may all be below the labels: then a mean of differences is the same.
    outputs = labels.reshape(len(labels), *outputs.shape[1:]).to(outputs)
    try:
        one_by_one = fmean(mean_loss(loss, *pair) for pair in zip(outputs[:, None], labels[:, None], strict=True))
        both = mean_loss(loss, outputs, labels), mean_loss(loss, outputs.reshape(labels.shape), labels)
    except Exception:  # it needs several samples, or these shapes
        return
    is_right, is_right_in_one_shape = (math.isclose(each, one_by_one, rel_tol=1e-3, abs_tol=1e-12) for each in both)
    if is_right_in_one_shape and not is_right:
        raise ValueError(
            f"Expected a loss of each output and its own label, but {shapes} are broadcast: give both one shape, "
            "`loss=lambda outputs, labels: loss(outputs.flatten(), labels.flatten())`."
        )


# How sure a value is, and what a reference and labels say together


class Estimate(NamedTuple):
    """A value that was measured on samples.

    Attributes:
        value: The value.
        variance: Its variance if these samples have one label each; nan if that is unknown.
        size: How many samples there are; those of one group count as one.
        degrees: The degrees of freedom of the variance.
    """

    value: float
    variance: float
    size: float
    degrees: float = math.inf

    @property
    def of_label(self) -> float:
        """The variance of the value of one label."""
        return self.variance * self.size


class Combined(NamedTuple):
    """What an expectation and labels say together.

    Attributes:
        value: The value.
        stderr: Its standard error, 1.645 of which are an interval of 90 %; nan if that is unknown.
        equivalent_labels: How many labels the reference counts as, beside labels, by this value alone.
    """

    value: float
    stderr: float
    equivalent_labels: float


def equivalent_labels_of(sees: str, value: str) -> int:
    """Return how many labels would be as sure of a value of a network as a reference is.

    Of a value that nobody has measured, that is the fewest.

    Args:
        sees: What the reference sees: a whole ``"table"``, ``"features"``, or a ``"part"``.
        value: The name of the value, such as ``"loss"``.
    """
    numbers = _EQUIVALENT_LABELS[sees]
    return numbers.get(value, min(numbers.values()))


def combine(
    expected: Estimate | None,
    by_labels: Estimate | None,
    num_calibrating: float = math.inf,
    equivalent_labels: float = WEIGHT,
    earlier: Sequence[float] = (),
    weight: float | None = None,
) -> Combined:
    """Combine what a reference expects, what labels say, or both; one of them may be None.

    The variance by the reference is the sum of three: that of as many labels as there are unseen samples, that of as
    many as calibrated it, and that of as many as it is sure of a network, which may err elsewhere. Beside labels it
    weighs as 1,000 of them, or fewer if they differ from it: the median of some validations, so that a changing weight
    decides no epoch.

    Args:
        expected: The value to expect by the reference.
        by_labels: The value on labels.
        num_calibrating: By how many left-out labels the reference was calibrated; those of one group count as one.
        equivalent_labels: How many labels would be as sure of a network as it is.
        earlier: How many labels it counted as in earlier validations.
        weight: How many it weighs as; by default the median of the last few counts.
    """
    counts_now = float(WEIGHT)
    if expected is not None and by_labels is not None:
        counts_now = weight_beside(expected, by_labels)
        if not by_labels.variance > 0:  # of few labels, which tell nothing of their spread
            by_labels = by_labels._replace(variance=expected.of_label / by_labels.size, degrees=expected.degrees)
    if weight is None:
        weight = median_high([*earlier, counts_now][-VALIDATIONS:])

    parts = []  # weights, values and variances
    if expected is not None:
        of_reference = 1 / num_calibrating + 1 / min(weight, equivalent_labels)
        variance = expected.variance + expected.of_label * of_reference
        parts.append((weight, expected.value, variance * _of_normal(expected.degrees)))
    if by_labels is not None:
        parts.append((by_labels.size, by_labels.value, by_labels.variance * _of_normal(by_labels.degrees)))
    weights, values, variances = np.array(parts).T

    shares = weights / weights.sum()
    stderr = math.sqrt(float((shares**2 * variances).sum()))
    # There is no variance where samples say nothing of their spread.
    return Combined(float((shares * values).sum()), stderr or math.nan, counts_now)


def weight_beside(expected: Estimate, by_labels: Estimate, least: float = _BEYOND_CHANCE) -> float:
    """Return how many labels a reference counts as, beside labels: 1,000, unless they differ by more than chance.

    Then its variance is what the difference allows.

    Args:
        expected: The value to expect by the reference.
        by_labels: The value on labels.
        least: By how many standard errors of the labels both differ, from which on it counts for less.
    """
    of_label = np.fmax(expected.of_label, by_labels.of_label)  # of few labels it may be 0
    difference, chance = (expected.value - by_labels.value) ** 2, of_label / by_labels.size
    if not difference > least**2 * chance:
        return WEIGHT
    return min(WEIGHT, max(1.0, float(of_label / (difference - chance))))


def _of_normal(degrees: float) -> float:
    """Return the factor of a variance by which a normal distribution has the 90 % interval of Student's t."""
    return 1.0 if math.isinf(degrees) else float(stdtrit(degrees, 0.95) / QUANTILE) ** 2


def estimate(measured: Measured, size: float, groups: Tensor | None) -> Estimate:
    """Tell how sure a value is, in closed form: the sum of squared influences of samples, or of groups of them.

    Args:
        measured: The value.
        size: How many labels there are.
        groups: The number of the group of each sample, ``(N,)``, whose labels are alike; None without groups.
    """
    value, influences, num_answers = measured
    if influences is None:
        return Estimate(value, math.nan, size)
    units = number_units(groups, influences.shape[1])
    shares = units.bincount().double() / len(units)
    number = 1 / float(shares.square().sum())  # of groups, as many as if they were equally large
    if number < _FEWEST:
        return Estimate(value, math.nan, size)
    num_answers *= number / len(units)
    influences = influences.new_zeros(len(influences), len(shares)).index_add(1, units, influences)
    # The mean is nearer to a unit the larger that is (Bell and McCaffrey, 2002).
    variance = float((influences.square().mean(0) / (1 - shares)).sum())
    if variance == 0 and num_answers > 0:
        # All answers are right, or none: two more of each are taken to be there (Agresti and Coull, 1998).
        variance = 2 * (num_answers + 2) / (num_answers + 4) ** 3
        return Estimate(value, variance, size, number - 1)
    # The mean over few positives is nearer to these, too.
    fewest = min(number, num_answers or number)
    if fewest < _FEWEST:
        return Estimate(value, math.nan, size)
    return Estimate(value, variance * (1 - 1 / number) / (1 - 1 / fewest), size, fewest - 1)
