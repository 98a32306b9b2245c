"""The score on labels after the best temperature, which is what accuracy feels, and that temperature."""

from typing import NamedTuple

from torch import Tensor

from lightning_sensitivity.functional.sums import TEMPERATURES, LabelSums, label_sums
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.functional.tensors import are_probabilities


class RefinedScore(NamedTuple):
    """Hold the Brier score after the best temperature, and this temperature.

    Attributes:
        score: The Brier score of the probabilities of ``logits / temperature``.
        temperature: The best one; above 1 if the model is too sure of itself.
    """

    score: float
    temperature: float

    @classmethod
    def lowest(cls, scores: Tensor) -> "RefinedScore":
        """Take the lowest of the scores at each temperature, ``(T,)``."""
        place = int(scores.argmin())
        return cls(float(scores[place]), TEMPERATURES[place])


def refined_score(logits: Tensor, targets: Tensor, task: str = "multiclass") -> RefinedScore:
    r"""Compute the Brier score after the best temperature, to choose an epoch for its accuracy.

    A proper score is the sum of a *calibration* error, which a temperature repairs, and of a *refinement*
    error, which accuracy feels. A network that memorizes becomes too sure of itself, so that its score rises
    long before its accuracy falls. The refined score does not (Berta, Holzmüller, Jordan and Bach, *Rethinking
    Early Stopping: Refine, Then Calibrate*, arXiv:2501.19195):

    .. math::
        \min_T \; \frac{1}{n} \sum_i \big\| \operatorname{softmax}(f(x_i) / T) - y_i \big\|^2

    over T = 0.5, 0.71, 1, 1.41, ..., 8. The labels may be noisy. Afterwards divide the logits of the chosen
    epoch by the temperature: then its probabilities are calibrated, too.

    Args:
        logits: Logits of samples that the model was not trained on, ``(N, K)``; ``(N,)`` or ``(N, 1)`` for
            ``"binary"``.
        targets: Their labels, as for :class:`~lightning_sensitivity.RiskEstimate`; those of -100 are ignored.
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.

    Returns:
        The score, and the temperature that gives it.

    Raises:
        ValueError: If labels do not fit the task, no sample has a label and finite logits, or there are probabilities
            in place of logits.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import refined_score
        >>> logits = torch.tensor([[4.0, 0.0], [0.0, 4.0], [4.0, 0.0], [0.0, 4.0]])
        >>> score, temperature = refined_score(logits, torch.tensor([0, 1, 0, 0]))
        >>> round(score, 3), temperature
        (0.376, 4.0)
    """
    kind = find_task(task)
    kind.check(logits, targets)
    if kind.sums_to_one and are_probabilities(logits):
        raise ValueError("Expected `logits`, but got probabilities: take what comes before the softmax.")
    sums = LabelSums(*label_sums(logits.detach(), targets, kind).T)
    if not bool(sums.num_scored.any()):
        raise ValueError("Expected a sample with a label and finite `logits`, but got none.")
    return RefinedScore.lowest(sums.score / sums.num_scored)
