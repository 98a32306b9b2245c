"""The risk estimate as a torchmetric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_sensitivity import compat
from lightning_sensitivity.functional import Calibration, Reference, risk, sums
from lightning_sensitivity.functional.reference import reference_score, reference_weight
from lightning_sensitivity.functional.sums import AgreementSums, HoldoutSums, LabelSums
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.functional.tensors import Diagnosis, wide_dtype
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
    ``risk_label_stderr``, ``risk_num_labels``, and R before them, ``risk_without_labels``.

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
    reference_sums: Tensor

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
        self.calibration = Calibration() if calibration is None else calibration
        self.messages: dict[str, Diagnosis] = {}
        self._num_training = num_training
        self._factor = 1.0  # of the variance
        if num_training is not None and num_weights is not None:
            self._factor = risk.variance_factor(num_training, num_weights)
        self._shares = None if reference is None else reference.shares
        self._earlier_calibration = self.calibration  # without this epoch
        dtype = wide_dtype(self.device)
        for name, num_sums in _NUM_SUMS.items():
            self.add_state(name, default=torch.zeros(num_sums, dtype=dtype), dist_reduce_fx="sum")
        self.add_state("reference_sums", default=_sums_of(reference).to(dtype), dist_reduce_fx=_sum_of_different)

    def reset(self) -> None:
        """Forget all samples, and begin another epoch with the calibration so far."""
        super().reset()
        self._earlier_calibration = self.calibration

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
        _check_reference(outputs, reference, self._shares)
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
        if self._shares is not None:
            self._add_agreement("training_agreement", outputs, targets)

    def update_labels(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of validation samples with labels, as in :meth:`update_training`."""
        self._add_labelled("labels_sums", outputs, targets)

    def _add_labelled(self, state: str, outputs: Tensor, targets: Tensor) -> None:
        self.task.check(outputs, targets)
        self._add(state, sums.label_sums(outputs.detach(), targets, self.task))

    def _add_agreement(self, state: str, outputs: Tensor, targets: Tensor) -> None:
        assert self._shares is not None
        if outputs.numel() != len(outputs) * len(self._shares):
            got = f"{tuple(outputs.shape)}, with K = {len(self._shares)} in the reference"
            raise ValueError(f"Expected outputs (N, K), but got {got}.")
        self._add(state, sums.agreement_sums(outputs.detach(), targets, self._shares, self.task))

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
        if self.reference_sums[-1] > 0:
            values |= self._reference_values()
            score, weight = values["risk_reference"], values["risk_reference_weight"]
            if weight > 0:
                values["risk_estimate"] = (terms.estimate + weight * score) / (1 + weight)
        self.messages = risk.diagnostics(holdout, training, values["risk_estimate"], self.task)
        if labels.num_scored > 0:
            has_reference = bool(values.get("risk_reference_weight", 0) > 0)
            values["risk_without_labels"] = values["risk_estimate"]
            values["risk_estimate"] = risk.combine_with_labels(values["risk_estimate"], labels, has_reference)
            values["risk_label_score"] = labels.score / labels.num_scored
            values["risk_label_stderr"] = risk.label_stderr(labels)
            values["risk_num_labels"] = labels.num_scored
        return values

    def _reference_values(self) -> dict[str, Tensor]:
        """Compute C, with a calibration that includes this epoch, and its weight v."""
        score, chance, claim, num_samples = self.reference_sums.tolist()
        weight = reference_weight(score, chance, claim, num_samples, self._num_training or num_samples)
        holdout, training = AgreementSums(*self.holdout_agreement), AgreementSums(*self.training_agreement)
        agreement, training_agreement = (each.agreement / each.num_scored for each in (holdout, training))
        self.calibration = self._earlier_calibration.updated(float(agreement), float(training_agreement))
        value = reference_score(holdout, training, self.calibration)
        return {"risk_reference": value, "risk_reference_weight": torch.full_like(value, weight)}

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


def _sums_of(reference: Reference | None) -> Tensor:
    """Return sums over the samples of a reference, in the order of `reference_weight`."""
    if reference is None:
        return torch.zeros(4, dtype=torch.float64)
    means = [reference.score, reference.chance, reference.claim, 1.0]
    return torch.tensor(means, dtype=torch.float64) * reference.num_samples


def _sum_of_different(rows: Tensor) -> Tensor:
    """Add up the references of all processes; `forward` repeats that of one."""
    different: Tensor = torch.unique(rows, dim=0)
    return different.sum(0)


def _check_reference(outputs: Tensor, reference: Tensor | None, shares: Tensor | None) -> None:
    if reference is None or shares is None:
        if reference is not shares:
            raise ValueError("Expected `reference` in `update` if the metric has one, and only then.")
    elif reference.shape != (len(outputs), len(shares)):
        got = f"{tuple(reference.shape)} for outputs {tuple(outputs.shape)}"
        raise ValueError(f"Expected `reference` to have the shape (N, {len(shares)}), but got {got}.")


def _check_shapes(outputs: Tensor, twins: Sequence[Tensor], compared_with: Tensor) -> None:
    shapes = {tuple(each.shape) for each in (*twins, compared_with)}
    if not twins or shapes != {tuple(outputs.shape)}:
        expected = f"`twin_outputs` and `compared_with` of the shape {tuple(outputs.shape)}"
        raise ValueError(f"Expected {expected}, but got {shapes}.")
