"""The risk estimate as a torchmetric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from lightning_sensitivity import compat
from lightning_sensitivity.functional import Calibration, Reference, risk, sums
from lightning_sensitivity.functional.reference import reference_score, reference_weight
from lightning_sensitivity.functional.sums import AgreementSums, HoldoutSums, LabelSums
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.functional.tensors import wide_dtype
from lightning_sensitivity.metric.wide import WideMetric

if TYPE_CHECKING:
    from lightning_sensitivity.compat import AxType, PlotType

_NUM_SUMS = {
    "holdout_sums": len(HoldoutSums._fields),
    "training_sums": len(LabelSums._fields),
    "labels_sums": len(LabelSums._fields),
    "holdout_agreement": len(AgreementSums._fields),
    "training_agreement": len(AgreementSums._fields),
}


class RiskEstimate(WideMetric):
    r"""Estimate the Brier score on unseen samples from training labels and unlabelled samples.

    The estimate R is that of :func:`~lightning_sensitivity.functional.risk_estimate`. With a reference (see
    :func:`~lightning_sensitivity.functional.fit_reference`) it becomes :math:`(R + v\,C) / (1 + v)`, with

    .. math::
        C = \mathbb{E}\|y\|^2 + \mathbb{E}\|p\|^2 - 2\,\big[\mathbb{E}\,p \cdot s + c\,\mathbb{E}\,p \cdot (q - s)\big]

    for training labels y, their mean s, predictions p of the model and q of the reference, and a factor c,
    see :class:`~lightning_sensitivity.functional.Calibration`. For its weight v see
    :func:`~lightning_sensitivity.functional.reference_weight`. Last, M validation labels of mean score S give
    :math:`(M S + M_0 R) / (M + M_0)`, with an :math:`M_0` of 200 if v is above 0, else of 40.

    ``compute`` returns a dict of scalar tensors: ``risk_estimate``, nan without training or unseen samples;
    its terms ``risk_claim``, ``risk_overconfidence``, ``risk_memorization``, ``risk_variance``; with a
    reference C and v, ``risk_reference`` and ``risk_reference_weight``; with labels ``risk_label_score``,
    ``risk_label_stderr`` and ``risk_num_labels``.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        strength: λ of the simulated twins; None for real ones.
        num_training: n, the number of training samples.
        num_weights: The number of weights that are trained; see
            :func:`~lightning_sensitivity.functional.variance_factor`.
        reference: The reference; ``update`` takes its predictions.
        calibration: What earlier epochs say about c, to resume a fit.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Attributes:
        calibration: What the epochs so far say about c; ``reset`` keeps it.
        messages: What makes the last value doubtful, by the kind of problem.
        estimate_without_labels: The last value before it was combined with validation labels.

    Raises:
        ValueError: If an argument is invalid, or labels do not fit the task.

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
    holdout_agreement: Tensor
    training_agreement: Tensor

    def __init__(
        self,
        task: str = "multiclass",
        *,
        strength: float | None = None,
        num_training: int | None = None,
        num_weights: int | None = None,
        reference: Reference | None = None,
        calibration: Calibration | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        risk.check_strength(strength)
        self.task = find_task(task)
        self.strength = strength
        self.messages: dict[str, str] = {}
        self.estimate_without_labels = math.nan
        self.calibration = Calibration() if calibration is None else calibration
        self._earlier_calibration = self.calibration  # without this epoch
        self._reference = reference
        self._num_training: int | None = None
        self._factor = 1.0  # of the variance
        self.set_size(num_training, num_weights)
        for name, num_sums in _NUM_SUMS.items():
            default = torch.zeros(num_sums, dtype=wide_dtype(self.device))
            self.add_state(name, default=default, dist_reduce_fx="sum")
        self.references: list[Tensor] | Tensor = []  # one tensor while it is synchronized
        self.add_state("references", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all samples, and begin another epoch with the calibration so far."""
        super().reset()
        self._earlier_calibration = self.calibration
        # A process without a reference must also take part when rows are gathered.
        self.references = [_reference_row(self._reference).to(wide_dtype(self.device)).to(self.device)]

    def set_reference(self, reference: Reference | None) -> None:
        """Set the reference, which may not be known at first, and forget all samples."""
        self._reference = reference
        self.reset()

    def set_size(self, num_training: int | None, num_weights: int | None) -> None:
        """Set the numbers of training samples and weights, which may not be known at first.

        Args:
            num_training: n; None for no scaling.
            num_weights: w; None for no scaling.
        """
        self._num_training = num_training
        self._factor = 1.0
        if num_training is not None and num_weights is not None:
            self._factor = risk.variance_factor(num_training, num_weights)
        compat.forget_computed(self)

    def update(
        self,
        outputs: Tensor,
        twin_outputs: Tensor | Sequence[Tensor],
        *,
        compared_with: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Add a batch of unseen samples.

        Args:
            outputs: Logits of the model, ``(N, K, ...)`` or ``(N,)``.
            twin_outputs: Logits of a twin for the same samples, or those of several twins, whose mean counts.
            compared_with: Logits to compare the twins with, if not ``outputs``: those computed like the
                twins', with the statistics of the batch.
            reference: The reference's predictions for these samples, ``(N, K)``; with a reference only.
        """
        twins = [twin_outputs] if isinstance(twin_outputs, Tensor) else list(twin_outputs)
        _check_shapes(outputs, twins, outputs if compared_with is None else compared_with)
        if (reference is None) != (self._reference is None):
            raise ValueError("Expected `reference` in `update` if the metric has one, and only then.")
        if reference is not None:
            self._add_agreement("holdout_agreement", outputs, reference)
        self._add("holdout_sums", sums.holdout_sums(outputs, twins, self.task, compared_with))

    def update_training(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of training samples, in eval mode.

        Args:
            outputs: Logits of the model, ``(N, K, ...)`` or ``(N,)``.
            targets: Their labels; those of -100 are ignored.
        """
        self._add_labelled("training_sums", outputs, targets)
        if self._reference is not None:
            outputs = outputs.detach()
            y, counts = self.task.target_probabilities(self.task.probabilities(outputs), targets)
            has_label = counts.flatten() > 0
            self._add_agreement("training_agreement", outputs[has_label], y[has_label])

    def update_labels(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of validation samples with labels, as in :meth:`update_training`."""
        self._add_labelled("labels_sums", outputs, targets)

    def _add_labelled(self, state: str, outputs: Tensor, targets: Tensor) -> None:
        self.task.check(outputs, targets)
        self._add(state, sums.label_sums(outputs.detach(), targets, self.task))

    def _add_agreement(self, state: str, outputs: Tensor, others: Tensor) -> None:
        assert self._reference is not None
        shares = self._reference.shares
        if others.shape != (len(outputs), len(shares)) or outputs.numel() != others.numel():
            got = f"{tuple(others.shape)} for outputs {tuple(outputs.shape)}"
            raise ValueError(f"Expected `reference` to have the shape (N, {len(shares)}), but got {got}.")
        self._add(state, sums.agreement_sums(outputs, others, shares, self.task))

    def _add(self, state: str, values: Tensor) -> None:
        setattr(self, state, getattr(self, state) + values)  # not in place: it may belong to inference mode
        compat.forget_computed(self)
        compat.mark_updated(self)

    def compute(self) -> dict[str, Tensor]:
        """Compute the estimate and its terms over all processes; they are nan without samples."""
        holdout, training = HoldoutSums(*self.holdout_sums), LabelSums(*self.training_sums)
        labels = LabelSums(*self.labels_sums)
        terms = risk.risk_terms(holdout, training, self.strength, self._factor)
        values = {f"risk_{name}": term for name, term in terms._asdict().items()}
        estimate, weight = terms.estimate, self._reference_weight()
        if weight is not None:
            score = self._reference_score()
            if weight > 0:
                estimate = (estimate + weight * score) / (1 + weight)
            values["risk_reference"] = score
            values["risk_reference_weight"] = torch.full_like(score, weight)
        self.messages = risk.diagnostics(holdout, training, estimate, self.task)
        self.estimate_without_labels = float(estimate)
        if labels.num_scored > 0:
            estimate = risk.combine_with_labels(estimate, labels, has_reference=bool(weight))
            values["risk_label_score"] = labels.score / labels.num_scored
            values["risk_label_stderr"] = risk.label_stderr(labels)
            values["risk_num_labels"] = labels.num_scored
        return {**values, "risk_estimate": estimate}

    def _reference_weight(self) -> float | None:
        """Compute w, from the references of all processes; None if there is none."""
        rows = torch.unique(dim_zero_cat(self.references).cpu(), dim=0)  # `forward` repeats them
        if not len(rows):
            return None
        score, chance, claim, num_samples = rows.sum(0).tolist()
        return reference_weight(score, chance, claim, num_samples, self._num_training or num_samples)

    def _reference_score(self) -> Tensor:
        """Compute C, with a calibration that includes this epoch."""
        holdout, training = AgreementSums(*self.holdout_agreement), AgreementSums(*self.training_agreement)
        agreement, training_agreement = (each.agreement / each.num_scored for each in (holdout, training))
        self.calibration = self._earlier_calibration.updated(float(agreement), float(training_agreement))
        return reference_score(holdout, training, self.calibration)

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: AxType | None = None
    ) -> PlotType:
        """Plot the estimate, for one result or for a list of them, such as one per epoch.

        Args:
            val: A result of ``metric.compute`` or a list of them; by default that of ``metric.compute``.
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


def _reference_row(reference: Reference | None) -> Tensor:
    """Return sums over the samples of a reference, in the order of `reference_weight`; no row without one."""
    if reference is None:
        return torch.zeros(0, 4, dtype=torch.float64)
    num_samples = reference.num_samples
    sums = [num_samples * each for each in (reference.score, reference.chance, reference.claim)]
    return torch.tensor([[*sums, num_samples]], dtype=torch.float64)


def _check_shapes(outputs: Tensor, twins: Sequence[Tensor], compared_with: Tensor) -> None:
    shapes = {tuple(each.shape) for each in (*twins, compared_with)}
    if not twins or shapes != {tuple(outputs.shape)}:
        expected = f"`twin_outputs` and `compared_with` of the shape {tuple(outputs.shape)}"
        raise ValueError(f"Expected {expected}, but got {shapes}.")
