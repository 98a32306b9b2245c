"""What metrics to expect on unlabelled samples, if labels are drawn from the predictions of a reference."""

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor
from torchmetrics import MeanSquaredError, Metric
from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, MulticlassAccuracy, MulticlassAUROC
from torchmetrics.utilities import dim_zero_cat

from lightning_sensitivity.compat import stay_alone
from lightning_sensitivity.functional.refined_score import Refined, lowest_score, refined_score
from lightning_sensitivity.functional.tasks import Task, find_task
from lightning_sensitivity.functional.tensors import Numbers, as_tensor

NUM_DRAWS = 20  # of labels for each sample
MAX_AUROC_CLASSES = 100
_GOLDEN_RATIO = (5**0.5 - 1) / 2
# Labels that count as much as a reference: for the score of classes, and for all else.
SCORE_WORTH, METRIC_WORTH = 200, 1000


def expected_score(logits: Numbers, q: Numbers, task: str = "multiclass", error: float = 0.0) -> Refined:
    r"""Compute the refined score to expect, if labels are drawn from the predictions of a reference.

    .. math::
        \min_T \; \mathbb{E}\,\|p_T - q\|^2 + \mathbb{E}\, q \cdot (1 - q)

    for predictions :math:`p_T` of the network at temperature T, and q of the reference. It is in the units of
    :func:`refined_score`, and lowest where the network is closest to the reference.

    Args:
        logits: Logits of unseen samples, ``(N, K)``; ``(N,)`` or ``(N, 1)`` for ``"binary"``; the outputs of
            a regression.
        q: Predictions of the same samples by a reference: probabilities ``(N, C)``, also those of class 1,
            ``(N,)`` or ``(N, 1)``, for ``"binary"``; see ``Reference.predict_proba``.
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``.
        error: In a regression, the left-out squared error of the reference, ``Reference.score_``, which is
            added.

    Returns:
        The score, and the temperature that gives it.

    Raises:
        ValueError: As by :func:`refined_score`.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import expected_score
        >>> q = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> round(expected_score(q.log(), q).score, 3)  # E q(1 - q) alone: both say the same
        0.25
    """
    rules, logits, q = find_task(task), as_tensor(logits), as_tensor(q)
    score, temperature = refined_score(logits, q, task)
    is_finite = rules.as_outputs(logits).isfinite().all(1)
    return Refined(score + uncertainty(rules.as_matrix(q)[is_finite.to(q.device)], rules, error), temperature)


def uncertainty(q: Tensor, task: Task, error: float) -> float:
    """Return the score of a reference's predictions: E q(1 - q), or its error in a regression."""
    return float(task.uncertainties(q.double()).mean()) + (0.0 if task.has_classes else error)


def draw_labels(q: Numbers, task: str = "multiclass", residuals: Numbers = None) -> Tensor:
    """Draw labels from the predictions of a reference: 20 a sample, at evenly spaced quantiles.

    The quantiles of a sample begin at an offset of its own, so that rare classes get their share. There are
    no random numbers: the same predictions give the same labels.

    Args:
        q: Predictions ``(N, C)``; for ``"binary"`` also probabilities of class 1, ``(N,)`` or ``(N, 1)``.
        task: The task.
        residuals: In a regression, quantiles of the left-out errors, which are added, ``(20, C)``; see
            ``Reference.residuals_``.

    Returns:
        Class indices ``(20, N)``; for a regression targets ``(20, N, C)``, or ``(1, N, C)`` without
        residuals.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import draw_labels
        >>> int((draw_labels(torch.tensor([[0.75, 0.25]])) == 0).sum())
        15
    """
    rules = find_task(task)
    p = rules.as_matrix(as_tensor(q))
    if not rules.has_classes:
        return p[None] if residuals is None else p + as_tensor(residuals).to(p)[:, None]
    p = p.double().cpu()
    offsets = torch.arange(1, len(p) + 1, dtype=torch.float64) * _GOLDEN_RATIO % 1
    quantiles = (torch.arange(NUM_DRAWS)[:, None] + offsets) / NUM_DRAWS  # (20, N)
    ends = p.cumsum(1)
    labels = torch.searchsorted(ends / ends[:, -1:], quantiles.T.contiguous(), right=True)
    return labels.clamp(max=p.shape[1] - 1).T


def expected_metric(metric: Metric, logits: Numbers, q: Numbers, task: str = "multiclass") -> Tensor:
    """Compute the value of a metric to expect, if labels are drawn from the predictions of a reference.

    Args:
        metric: A torchmetrics metric with ``update(preds, target)``; it stays as it is.
        logits: Logits of unseen samples, ``(N, K)``; ``(N,)`` or ``(N, 1)`` for ``"binary"``.
        q: Predictions of the same samples by a reference, as for :func:`expected_score`.
        task: ``"multiclass"`` or ``"binary"``.

    Returns:
        The value, a scalar tensor.

    Raises:
        ValueError: If shapes do not fit.

    Example:
        >>> import torch
        >>> from torchmetrics.classification import MulticlassAccuracy
        >>> from lightning_sensitivity.functional import expected_metric
        >>> q = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        >>> expected_metric(MulticlassAccuracy(2, average="micro"), q.log(), q)
        tensor(0.8500)
    """
    rules, logits, q = find_task(task), as_tensor(logits), as_tensor(q)
    if len(logits) != len(q):
        sizes = f"{len(logits)} and {len(q)}"
        raise ValueError(f"Expected `logits` and `q` of the same samples, but got {sizes}.")
    return metric_value(metric, rules.predictions(logits), draw_labels(q, task), rules)


def metric_value(metric: Metric, predictions: Tensor, labels: Tensor, task: Task) -> Tensor:
    """Compute a metric of predictions and labels, in this process alone.

    Args:
        metric: The metric, which stays as it is.
        predictions: Probabilities of the classes, or numbers in a regression, ``(N, C)``.
        labels: Several labels for each sample, ``(R, N)``; in a regression ``(R, N, C)``.
        task: The task.
    """
    copied = metric.clone()
    copied.reset()
    stay_alone(copied)
    preds = task.metric_inputs(predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of classes that no draw has
        for target in labels:
            fitting = target if task.has_classes else target.reshape(preds.shape).to(preds).contiguous()
            copied.update(preds, fitting)
        value: Tensor = copied.compute()
    return value


def all_values(
    outputs: Tensor, y: Tensor, draws: Tensor, metrics: Mapping[str, Metric], task: Task
) -> dict[str, float]:
    """Compute the refined score, its temperature, and metrics, by labels or by what a reference predicts.

    Args:
        outputs: Outputs ``(N, C)``, finite.
        y: Labels as a matrix, or predictions, ``(N, C)``.
        draws: The same as one or more labels for each sample, ``(R, N)``; in a regression ``(R, N, C)``.
            Metrics of no label, or of a single class, are nan.
        metrics: Metrics by name.
        task: The task.
    """
    score, temperature = lowest_score(outputs, y, task)
    found = {"score": score, "temperature": temperature} | dict.fromkeys(metrics, math.nan)
    if draws.numel() > 0 and (not task.has_classes or bool((draws != draws[0, 0]).any())):
        p = task.predictions(outputs)
        found |= {name: float(metric_value(metric, p, draws, task)) for name, metric in metrics.items()}
    return found


def join_values(
    expected: Mapping[str, float], labels: Mapping[str, float], num_labels: int, task: Task
) -> dict[str, float]:
    """Join expected values with those by m labels: (m s + w E) / (m + w); the labels give the temperature.

    The reference counts as w = 200 labels for the score of classes, and as 1,000 for metrics, of which a
    label says less, and in a regression.

    Args:
        expected: What is expected.
        labels: What labels say; where it is nan, what is expected counts.
        num_labels: m.
        task: The task.
    """
    found = dict(labels)
    for name, value in expected.items():
        of_labels = value if math.isnan(labels[name]) else labels[name]
        worth = SCORE_WORTH if name == "score" and task.has_classes else METRIC_WORTH
        found[name] = (num_labels * of_labels + worth * value) / (num_labels + worth)
    return found | {"temperature": labels["temperature"] if num_labels > 0 else expected["temperature"]}


class _MeanAUROC(MulticlassAUROC):
    """The mean of the AUROC of each class (``average="none"``) that occurs; others would count as 0."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """Compute it."""
        return super().compute()[torch.unique(dim_zero_cat(self.target))].mean()


def default_metrics(task: Task, num_columns: int) -> dict[str, Metric]:
    """Make the metrics that are expected by default, by name: accuracy and AUROC, or the mean squared error.

    Args:
        task: The task.
        num_columns: C. There is no AUROC of more than 100 classes, which would take long.
    """
    if not task.has_classes:
        return {"mse": MeanSquaredError()}
    if task.has_one_output:
        return {"accuracy": BinaryAccuracy(), "auroc": BinaryAUROC()}
    found: dict[str, Metric] = {"accuracy": MulticlassAccuracy(num_columns, average="micro")}
    if num_columns <= MAX_AUROC_CLASSES:
        found["auroc"] = _MeanAUROC(num_columns, average="none")
    return found
