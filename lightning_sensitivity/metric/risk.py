"""The risk estimate as a torchmetric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sensitivity import compat
from lightning_sensitivity.functional import risk, risk_sums
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import wide_dtype
from lightning_sensitivity.metric.wide import WideMetric

if TYPE_CHECKING:
    from lightning_sensitivity.compat import AxType, PlotType

_NUM_SUMS = {
    "holdout": len(risk_sums.HoldoutSums._fields),
    "training": len(risk_sums.LabelSums._fields),
    "labels": len(risk_sums.LabelSums._fields),
}


class RiskEstimate(WideMetric):
    r"""Estimate the Brier score on unseen samples from training labels and unlabelled samples.

    See :func:`~lightning_sensitivity.functional.risk_estimate` for the formula. The states are sums in double
    precision over all processes.

    ``update`` accepts ``outputs`` and ``twin_outputs``, logits ``(N, K, ...)`` or ``(N,)`` for unseen samples, from the
    model and from a twin. Add training samples with :meth:`update_training`, and labelled validation samples, if there
    are any, with :meth:`update_labels`.

    ``compute`` returns a dict of scalar tensors: ``risk_estimate`` and its terms ``risk_claim``,
    ``risk_overconfidence``, ``risk_memorization``, ``risk_variance``; with labelled validation samples also
    ``risk_label_score`` and ``risk_num_labels``. Without training or unseen samples, the estimate is nan.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        strength: λ of the simulated twins; None for real ones.
        num_training: n, the number of training samples; with ``num_weights`` it scales the variance of simulated
            twins, see :func:`~lightning_sensitivity.functional.variance_factor`.
        num_weights: w, the number of weights that are trained.
        has_batch_norm: Whether the model has batch norm, which also scales the variance.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Attributes:
        messages: What makes the last computed value doubtful, with one message per problem.

    Raises:
        ValueError: If an argument is invalid; in the updates, if labels do not fit the task.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import RiskEstimate
        >>> metric = RiskEstimate("multiclass")
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> metric.update_training(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
        >>> metric.compute()["risk_estimate"]
        tensor(0.3832, dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    plot_lower_bound: float = 0.0

    holdout_sums: Tensor
    training_sums: Tensor  # `training` is the mode of a module
    labels_sums: Tensor

    def __init__(
        self,
        task: str = "multiclass",
        *,
        strength: float | None = None,
        num_training: int | None = None,
        num_weights: int | None = None,
        has_batch_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if task not in TASKS:
            raise ValueError(f"Expected `task` to be one of {', '.join(map(repr, TASKS))}, but got {task!r}.")
        if strength is not None and not strength > 0:
            raise ValueError(f"Expected `strength` to be above 0, or None for real twins, but got {strength}.")
        self.task = TASKS[task]
        self.strength = strength
        self.has_batch_norm = has_batch_norm
        self.messages: dict[str, str] = {}
        self._factor = 1.0  # of the variance
        self.set_size(num_training, num_weights)
        for kind, size in _NUM_SUMS.items():
            default = torch.zeros(size, dtype=wide_dtype(self.device))
            self.add_state(f"{kind}_sums", default=default, dist_reduce_fx="sum")

    def set_size(self, num_training: int | None, num_weights: int | None) -> None:
        """Set the numbers of training samples and weights, which may not be known at first.

        Args:
            num_training: n; None for no scaling.
            num_weights: w; None for no scaling.
        """
        self._factor = 1.0
        if num_training is not None and num_weights is not None:
            self._factor = risk.variance_factor(num_training, num_weights, self.has_batch_norm)
        compat.forget_computed(self)

    def update(self, outputs: Tensor, twin_outputs: Tensor) -> None:
        """Add a batch of unseen samples."""
        _check_same_shape(outputs, twin_outputs)
        self.add_sums("holdout", risk_sums.holdout_sums(outputs, twin_outputs, self.task))

    def update_training(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of training samples, in eval mode.

        Args:
            outputs: Outputs of the model, ``(N, K, ...)`` or ``(N,)``.
            targets: Their labels; those of -100 are ignored.
        """
        self.task.check(outputs, targets)
        self.add_sums("training", risk_sums.label_sums(outputs, targets, self.task))

    def update_labels(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of validation samples with labels, as in :meth:`update_training`."""
        self.task.check(outputs, targets)
        self.add_sums("labels", risk_sums.label_sums(outputs, targets, self.task))

    def add_sums(self, kind: str, sums: Tensor) -> None:
        """Add sums from :mod:`lightning_sensitivity.functional.risk_sums` to one of the states."""
        state = f"{kind}_sums"
        setattr(self, state, getattr(self, state) + sums)  # not in place: it may belong to inference mode
        compat.forget_computed(self)
        compat.mark_updated(self)

    def compute(self) -> dict[str, Tensor]:
        """Compute the estimate and its terms over all processes; they are nan without samples."""
        holdout = risk_sums.HoldoutSums(*self.holdout_sums)
        training = risk_sums.LabelSums(*self.training_sums)
        labels = risk_sums.LabelSums(*self.labels_sums)
        terms = risk.risk_terms(holdout, training, self.strength, self._factor)
        self.messages = risk.diagnostics(holdout, training, terms.estimate, self.task)
        values = {f"risk_{name}": term for name, term in terms._asdict().items()}
        if labels.num_scored > 0:
            values["risk_estimate"] = risk.combine_with_labels(terms.estimate, labels)
            values["risk_label_score"] = labels.score / labels.num_scored
            values["risk_num_labels"] = labels.num_scored
        return values

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: AxType | None = None
    ) -> PlotType:
        """Plot the estimate, for one result or for a list of them, such as one per epoch.

        Args:
            val: A result of ``metric.compute`` or a list of results; by default the result of ``metric.compute``.
            ax: The matplotlib axes to plot on; by default new ones.

        Returns:
            Figure and axes object.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.

        Example:
            >>> import torch
            >>> from lightning_sensitivity import RiskEstimate
            >>> metric = RiskEstimate("multiclass")
            >>> metric.update(torch.randn(8, 3), torch.randn(8, 3))
            >>> metric.update_training(torch.randn(8, 3), torch.randint(3, (8,)))
            >>> figure, axes = metric.plot()
        """
        results = self.compute() if val is None else val
        if isinstance(results, Mapping):
            return self._plot(results["risk_estimate"], ax)
        return self._plot([result["risk_estimate"] for result in results], ax)


def _check_same_shape(outputs: Tensor, twin_outputs: Tensor) -> None:
    if twin_outputs.shape != outputs.shape:
        got = tuple(twin_outputs.shape)
        raise ValueError(f"Expected `twin_outputs` to have the shape {tuple(outputs.shape)}, but got {got}.")
