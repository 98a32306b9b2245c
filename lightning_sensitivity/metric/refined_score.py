"""The refined score as a torchmetric, and how far predictions are from those of a reference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_sensitivity import compat
from lightning_sensitivity.functional.criterion import rank_disagreement
from lightning_sensitivity.functional.refined_score import (
    TEMPERATURES,
    Refined,
    ScoreSums,
    check_scored,
    score_sums,
)
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.functional.tensors import wide_dtype
from lightning_sensitivity.metric.wide import WideMetric

_MANY = 50  # so many samples of a trained network have a logit that is no probability


class RefinedScore(WideMetric):
    r"""Compute the Brier score after the best temperature: what to choose an epoch by, with labels.

    .. math::
        \min_T \; \frac{1}{n} \sum_i \big\| \operatorname{softmax}(f(x_i) / T) - y_i \big\|^2

    It follows accuracy, and does not rise only because a network becomes too sure of itself. See
    :func:`~lightning_sensitivity.functional.refined_score` for the source. The state is one row of sums for
    each of nine temperatures, so the value depends on neither the batch size nor the number of processes.

    ``forward`` and ``update`` accept:

    - ``logits`` (:class:`~torch.Tensor`): outputs before softmax or sigmoid, ``(N, K)``; ``(N,)`` or ``(N, 1)``
      for ``"binary"``.
    - ``targets`` (:class:`~torch.Tensor`): class indices ``(N,)``; or probabilities ``(N, K)``, such as soft
      labels or the predictions of another model. Those of -100 are ignored.

    ``forward`` and ``compute`` return a scalar tensor; lower is better. Samples with nan or inf are left out,
    with a warning.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``, whose score is the mean squared error.
        shares: The mean label in training, ``(K,)``, from which ``sums.agreement`` is counted; by default zeros.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the task is unknown; in ``update``, if targets do not fit the task, or logits are dense.

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

    def __init__(self, task: str = "multiclass", *, shares: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = find_task(task)
        self.shares = shares
        zeros = torch.zeros(len(TEMPERATURES), len(ScoreSums._fields), dtype=wide_dtype(self.device))
        self.add_state("packed_sums", default=zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        check_scored(logits, targets, self.task)
        # not in place: the state may belong to inference mode
        self.packed_sums = self.packed_sums + score_sums(logits, targets, self.task, self.shares)

    def compute(self) -> Tensor:
        """Compute the score of all samples so far, over all processes; nan without any."""
        sums = self.sums
        self._warn(sums)
        return self.packed_sums.new_tensor(Refined.lowest(sums.scores).score)

    def _warn(self, sums: ScoreSums) -> None:
        num_non_finite = int(sums.num_non_finite[0])
        if num_non_finite > 0:
            rank_zero_warn(f"{num_non_finite} samples gave nan or inf, and were left out.", stacklevel=6)
        if self.task.has_classes and sums.num_scored[0] >= _MANY and sums.num_logits[0] == 0:
            expected = "take what comes before softmax or sigmoid"
            rank_zero_warn(f"All `logits` look like probabilities. If they are, {expected}.", stacklevel=6)

    @property
    def sums(self) -> ScoreSums:
        """The sums at each temperature; over all processes in ``compute`` alone."""
        return ScoreSums(*self.packed_sums.T)

    @property
    def temperature(self) -> float:
        """The best temperature over all processes. Logits divided by it are calibrated.

        Like ``compute``, reading it is a collective operation.
        """
        with self.sync_context():
            return Refined.lowest(self.sums.scores).temperature


class Agreement(Metric):
    """Compare a network's predictions with a reference's: how alike they rank samples, and choose classes.

    ``compute`` returns two scalars: :func:`~lightning_sensitivity.functional.criterion.rank_disagreement`, and the
    share of samples for which both choose different classes.

    Args:
        task: ``"multiclass"`` or ``"binary"``.
        num_outputs: K.
    """

    def __init__(self, task: str, num_outputs: int) -> None:
        super().__init__()
        self.task = find_task(task)
        self.rows: list[Tensor] | Tensor = []  # one tensor while it is synchronized
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        # A process without samples must also take part when rows are gathered.
        self.rows = [torch.zeros(0, 2, num_outputs, device=self.device)]
        compat.mark_updated(self)

    def update(self, logits: Tensor, predictions: Tensor) -> None:
        """Add a batch: logits of the network, and predictions ``(N, K)`` of the reference, or labels."""
        assert isinstance(self.rows, list)
        p = self.task.predictions(logits.detach())
        q = self.task.as_matrix(predictions, p.shape[1]).to(p.dtype).to(p.device)
        has_both = p.isfinite().all(1) & self.task.has_label(predictions).to(p.device)
        self.rows.append(torch.stack([p, q], dim=1)[has_both].float())

    def compute(self) -> tuple[float, float]:
        """Compute both, over all processes; nan without samples."""
        rows = dim_zero_cat(self.rows).cpu()  # an Apple GPU has no float64
        p, q = rows[:, 0], rows[:, 1]
        return rank_disagreement(p, q), float((self.task.classes(p) != self.task.classes(q)).double().mean())


def computed_sums(metric: RefinedScore) -> ScoreSums:
    """Return the sums of a metric over all processes; every process must call it."""
    compat.mark_updated(metric)  # a process may have no samples
    with metric.sync_context():
        return metric.sums
