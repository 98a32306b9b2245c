"""The refined score as a torchmetric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_sensitivity.functional.refined_score import TEMPERATURES, Refined, ScoreSums, check_scored, score_sums
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.functional.tensors import wide_dtype
from lightning_sensitivity.metric.base import DoublePrecisionMetric


class RefinedScore(DoublePrecisionMetric):
    r"""Compute the Brier score after the best temperature: what to choose an epoch by, with labels.

    .. math::
        \min_T \; \frac{1}{n} \sum_i \big\| \operatorname{softmax}(f(x_i) / T) - y_i \big\|^2

    It follows accuracy, and does not rise only because a network becomes too sure of itself. See
    :func:`~lightning_sensitivity.functional.refined_score` for the source. The state is one row of sums for
    each of nine temperatures, so the value depends on neither the batch size nor the number of processes.

    ``forward`` and ``update`` accept:

    - ``logits`` (:class:`~torch.Tensor`): outputs before softmax or sigmoid, ``(N, K)``; ``(N,)`` or
      ``(N, 1)`` for ``"binary"``.
    - ``targets`` (:class:`~torch.Tensor`): class indices ``(N,)``; or probabilities ``(N, K)``, such as soft
      labels or the predictions of another model. Those of -100 are ignored.

    ``forward`` and ``compute`` return a scalar tensor; lower is better. Samples with nan or inf are left out,
    with a warning; probabilities give one, too.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``, whose score is the mean squared error.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the task is unknown; in ``update``, if targets do not fit the task, or logits are
            dense.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import RefinedScore
        >>> metric = RefinedScore("multiclass")
        >>> metric.update(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.3757, dtype=torch.float64)
        >>> metric.temperature
        4.0
    """

    higher_is_better: bool = False

    packed_sums: Tensor

    def __init__(self, task: str = "multiclass", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = find_task(task)
        self._temperature = 1.0  # as of the last `compute`
        zeros = torch.zeros(len(TEMPERATURES), len(ScoreSums._fields), dtype=wide_dtype(self.device))
        self.add_state("packed_sums", default=zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        check_scored(logits, targets, self.task)
        if self.task.look_like_probabilities(logits):
            rank_zero_warn("`logits` look like probabilities: take what comes before softmax or sigmoid.", stacklevel=5)
        # not in place: the state may belong to inference mode
        self.packed_sums = self.packed_sums + score_sums(logits, targets, self.task)

    def compute(self) -> Tensor:
        """Compute the score of all samples so far, over all processes; nan without any."""
        sums = ScoreSums(*self.packed_sums.T)
        num_non_finite = int(sums.num_non_finite[0])
        if num_non_finite > 0:
            rank_zero_warn(f"{num_non_finite} samples gave nan or inf, and were left out.", stacklevel=5)
        score, self._temperature = Refined.lowest(sums.scores)
        return self.packed_sums.new_tensor(score)

    @property
    def temperature(self) -> float:
        """The best temperature over all processes. Logits divided by it are calibrated.

        Like ``compute``, reading it is a collective operation unless a value is cached.
        """
        self.compute()  # this is cached, and sets the temperature
        return self._temperature
