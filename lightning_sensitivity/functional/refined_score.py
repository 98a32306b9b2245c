"""The refined score: how well outputs fit labels, or other predictions, after the best temperature."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_sensitivity.functional.tasks import Task, find_task
from lightning_sensitivity.functional.tensors import Numbers, as_tensor, in_chunks, wide_dtype

TEMPERATURES = tuple(2.0 ** (half / 2) for half in range(-2, 7))  # from 0.5 to 8
_UNCHANGED = TEMPERATURES.index(1.0)  # the place of the logits as they are


class ScoreSums(NamedTuple):
    """Sums over samples, each ``(T,)``: one number for each of :data:`TEMPERATURES`.

    Attributes:
        num_scored: Samples with a label and finite outputs.
        score: Squared differences between predictions and labels.
        num_non_finite: Samples with nan or inf, left out.
    """

    num_scored: Tensor
    score: Tensor
    num_non_finite: Tensor

    @property
    def scores(self) -> Tensor:
        """The mean score at each temperature; nan without samples."""
        return self.score / self.num_scored


class Refined(NamedTuple):
    """The score after the best temperature, and this temperature.

    Attributes:
        score: The score of the predictions from ``logits / temperature``.
        temperature: The best one of a grid; above 1 if the model is too sure of itself.
    """

    score: float
    temperature: float

    @classmethod
    def lowest(cls, scores: Tensor) -> "Refined":
        """Take the lowest of the scores at each temperature, ``(T,)``; if all are equal, that at 1."""
        place = int(scores.argmin())
        place = place if bool(scores[place] < scores[_UNCHANGED]) else _UNCHANGED
        return cls(float(scores[place]), TEMPERATURES[place])


def score_sums(outputs: Tensor, targets: Tensor, task: Task) -> Tensor:
    """Sum up scores over a batch, at each temperature.

    Args:
        outputs: Logits ``(N, K)`` or ``(N,)``, or their matrix; for a regression, its outputs.
        targets: Labels that fit the task, or predictions, as probabilities ``(N, C)``.
        task: The task.

    Returns:
        The entries of :class:`ScoreSums` as columns, ``(T, 3)``, float64 (float32 on MPS).
    """
    outputs, dtype = task.output_matrix(outputs.detach()), wide_dtype(outputs.device)
    counts = task.has_label(targets).to(outputs.device)
    # The type before the device: some have no float64.
    y = task.label_matrix(targets, outputs.shape[1]).to(dtype).to(outputs.device)
    temperatures = outputs.new_tensor(TEMPERATURES)

    def sums(outputs: Tensor, y: Tensor, counts: Tensor) -> Tensor:
        divided = task.tempered(outputs, temperatures)
        p = task.predictions(divided.flatten(0, 1)).reshape(divided.shape).to(dtype)
        is_finite = p.isfinite().all(2)
        is_scored = is_finite & counts
        score = task.distances(p, y).where(is_scored, 0.0)
        return torch.stack([is_scored.sum(1), score.sum(1), (~is_finite & counts).sum(1)], 1)

    return torch.stack(in_chunks(sums, outputs, y, counts)).sum(0)


def refined_score(logits: Numbers, targets: Numbers, task: str = "multiclass") -> Refined:
    r"""Compute the Brier score after the best temperature, to choose an epoch for its accuracy.

    A proper score is the sum of a *calibration* error, which a temperature repairs, and of a *refinement*
    error, which accuracy feels. A network that memorizes becomes too sure of itself, so that its score rises
    long before its accuracy falls. The refined score does not (Berta, Holzmüller, Jordan and Bach,
    *Rethinking Early Stopping: Refine, Then Calibrate*, arXiv:2501.19195):

    .. math::
        \min_T \; \frac{1}{n} \sum_i \big\| \operatorname{softmax}(f(x_i) / T) - y_i \big\|^2

    over T = 0.5, 0.71, 1, 1.41, ..., 8. The labels may be noisy. Afterwards divide the logits of the chosen
    epoch by the temperature: then its probabilities are calibrated, too. A regression has no temperature; its
    score is the mean squared error.

    Args:
        logits: Logits of samples that the model was not trained on, ``(N, K)``; ``(N,)`` or ``(N, 1)`` for
            ``"binary"``. Tensors, arrays and lists are taken.
        targets: Class indices ``(N,)``, or probabilities, such as soft labels or the predictions of another
            model, ``(N, K)``; those of -100 are ignored. For ``"binary"`` numbers from 0 to 1.
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``.

    Returns:
        The score, and the temperature that gives it.

    Raises:
        ValueError: If labels do not fit the task, no sample has a label and finite logits, or there are
            probabilities in place of logits.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import refined_score
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 4.0]])
        >>> score, temperature = refined_score(logits, torch.tensor([0, 1, 0, 0]))
        >>> round(score, 3), temperature
        (0.376, 4.0)
    """
    kind, logits, targets = find_task(task), as_tensor(logits), as_tensor(targets)
    check_scored(logits, targets, kind)
    if kind.look_like_probabilities(logits):
        raise ValueError("Expected `logits`, but got probabilities: take what comes before softmax or sigmoid.")
    found = Refined.lowest(ScoreSums(*score_sums(logits, targets, kind).T).scores)
    if math.isnan(found.score):
        raise ValueError("Expected a sample with a label and finite `logits`, but got none.")
    return found


def check_scored(logits: Tensor, targets: Tensor, task: Task) -> None:
    """Raise ValueError if logits are dense or no floating numbers, or targets do not fit them."""
    if not logits.is_floating_point() or logits.ndim not in (1, 2):
        got = f"{logits.dtype} of shape {tuple(logits.shape)}"
        raise ValueError(f"Expected floating `logits` (N, K) or (N,), but got {got}.")
    task.check(logits, targets)
