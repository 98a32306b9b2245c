"""The risk estimate as a torchmetric."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_sensitivity import compat
from lightning_sensitivity.compat import AxType, PlotType
from lightning_sensitivity.functional import Calibration, Reference, risk, sums
from lightning_sensitivity.functional.reference import ReferenceSums, reference_score
from lightning_sensitivity.functional.refinement import RefinedScore
from lightning_sensitivity.functional.sums import TEMPERATURES, UNCHANGED, AgreementSums, LabelSums, UnseenSums
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.functional.tensors import Diagnosis, wide_dtype
from lightning_sensitivity.metric.wide import WideMetric, refuse_labels

_SHAPES: dict[str, tuple[int, ...]] = {
    "unseen_sums": (len(TEMPERATURES), len(UnseenSums._fields)),
    "training_sums": (len(TEMPERATURES), len(LabelSums._fields)),
    "labels_sums": (len(TEMPERATURES), len(LabelSums._fields)),
    "unseen_agreement": (len(TEMPERATURES), len(AgreementSums._fields)),
    "training_agreement": (len(TEMPERATURES), len(AgreementSums._fields)),
    "reference_sums": (len(ReferenceSums._fields),),
}


class RiskEstimate(WideMetric):
    r"""Estimate the Brier score on unseen samples from training labels and unlabelled samples.

    The estimate R is that of :func:`~lightning_sensitivity.functional.risk.risk_terms`. With a reference (see
    :func:`~lightning_sensitivity.functional.fit_reference`) it becomes :math:`(R + v\,C) / (1 + v)`, with

    .. math::
        C = \mathbb{E}\|y\|^2 + \mathbb{E}\|p\|^2 - 2\,\big[\mathbb{E}\,p \cdot s + c\,\mathbb{E}\,p \cdot (q - s)\big]

    for training labels y, their mean s, predictions p of the model and q of the reference, and a factor c,
    see :class:`~lightning_sensitivity.functional.Calibration`. For its weight v see
    :func:`~lightning_sensitivity.functional.reference_weight`. M validation labels of mean score S give
    :math:`(M S + M_0 R) / (M + M_0)`, with an :math:`M_0` of 200 if v is above 0, else 40.

    The estimate is for the loss. The *criterion* is what to choose by, for accuracy: it takes scores at their
    best temperature (see :func:`~lightning_sensitivity.functional.refined_score`). With R at each temperature T
    and the score B on training samples it is

    .. math::
        B + k\,(\min_T R_T - B), \qquad
        \text{or with labels} \quad (M \min_T S_T + k M_0 \min_T R_T) / (M + k M_0)

    k is 1 if 5 % of the training labels or more look wrong, 0 if no noise is found, and else 0.7.

    ``compute`` returns a dict of scalar tensors: ``risk_estimate``, nan without training or unseen samples;
    its terms ``risk_claim``, ``risk_overconfidence``, ``risk_memorization``, ``risk_variance``; with a
    reference C and v, ``risk_reference`` and ``risk_reference_weight``; with labels ``risk_label_score``, their
    score at its best temperature, and ``risk_num_labels``. ``risk_label_noise`` is N, the share of training
    labels that look wrong; ``risk_criterion`` is what to choose by. Logits divided by ``risk_temperature`` are
    calibrated: it is the best temperature of the labels, or else of the estimate if noise is found, or 1.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        strength: λ of the simulated twins; None for real ones.
        num_training: n, the number of training samples.
        num_weights: The number of weights that are trained; see
            :func:`~lightning_sensitivity.functional.variance_factor`.
        reference: The reference of this process; ``update`` takes its predictions.
        calibration: What earlier epochs say about c, to resume a fit.
        gap_weight: k, if an earlier epoch has chosen it; None to choose it anew.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Attributes:
        calibration: What the epochs so far say about c; ``reset`` keeps it.
        gap_weight: k of the last value.
        messages: What makes the last value doubtful, by kind.

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

    higher_is_better: bool = False

    unseen_sums: Tensor
    training_sums: Tensor  # `training` is the mode of a module
    labels_sums: Tensor
    unseen_agreement: Tensor
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
        gap_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if strength is not None and not strength > 0:
            raise ValueError(f"Expected `strength` to be above 0, or None for real twins, but got {strength}.")
        self.task = find_task(task)
        self.strength = strength
        self.calibration = Calibration() if calibration is None else calibration
        self.messages: dict[str, Diagnosis] = {}
        self.gap_weight = 1.0 if gap_weight is None else gap_weight
        self._chooses_gap_weight = gap_weight is None
        self._num_training = num_training
        self._factor = 1.0  # of the variance
        if num_training is not None and num_weights is not None:
            self._factor = risk.variance_factor(num_training, num_weights)
        self._shares = None if reference is None else reference.shares
        self._reference_sums = None if reference is None else ReferenceSums.of(reference)
        self._earlier_calibration = self.calibration  # without this epoch
        for name, shape in _SHAPES.items():
            zeros = torch.zeros(shape, dtype=wide_dtype(self.device))
            self.add_state(name, default=zeros, dist_reduce_fx="sum")
        self.reset()

    def reset(self) -> None:
        """Forget all samples but those of the reference, and begin another epoch with the calibration so far."""
        super().reset()
        self._earlier_calibration = self.calibration
        if self._reference_sums is not None:
            self.reference_sums = self.reference_sums.new_tensor(self._reference_sums)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Add a batch of unseen samples as :meth:`update` does, and compute the values so far of this process.

        A batch by itself has no estimate, since it has no training samples.
        """
        self.update(*args, **kwargs)
        return type(self).compute(self)  # does not wait for other processes, as `self.compute` does

    def update(
        self,
        outputs: Tensor,
        twin_outputs: Tensor | Sequence[Tensor],
        *,
        baseline_outputs: Tensor | None = None,
        reference: Tensor | None = None,
    ) -> None:
        """Add a batch of unseen samples.

        Args:
            outputs: Logits of the model, ``(N, K, ...)`` or ``(N,)``.
            twin_outputs: Logits of a twin for the same samples; of several twins a list, whose mean counts.
            baseline_outputs: Logits to compare the twins with, if not ``outputs``: those computed like the
                twins', with the statistics of the batch.
            reference: The reference's predictions for these samples, ``(N, K)``; with a reference only.
        """
        twins = [twin_outputs] if isinstance(twin_outputs, Tensor) else twin_outputs
        refuse_labels(self, "twin_outputs", twin_outputs, "outputs=..., twin_outputs=...")
        _check_reference(outputs, reference, self._shares)
        values = sums.unseen_sums(outputs, twins, self.task, baseline_outputs)
        if reference is not None:
            self._add_agreement("unseen_agreement", outputs, reference)
        self._add("unseen_sums", values)

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
        compat.mark_updated(self)

    def compute(self) -> dict[str, Tensor]:
        """Compute the estimate and its terms over all processes; they are nan without samples."""
        unseen, training = UnseenSums(*self.unseen_sums.T), LabelSums(*self.training_sums.T)
        terms = risk.risk_terms(unseen, training, self.strength, self._factor)
        values = {f"risk_{name}": term[UNCHANGED] for name, term in terms._asdict().items()}
        estimates, weight = terms.estimate, 0.0
        reference = ReferenceSums(*self.reference_sums.tolist())
        if reference.num_samples > 0:
            scores, weight = self._reference_scores(), reference.weight(self._num_training)
            values |= _reference_values(scores[UNCHANGED], weight, reference)
            estimates = (estimates + weight * scores) / (1 + weight) if weight > 0 else estimates
        if self._chooses_gap_weight:
            self.gap_weight = reference.gap_weight
        self.messages = risk.diagnostics(unseen, training, estimates[UNCHANGED], self.task)
        training_score = (training.score / training.num_scored)[UNCHANGED]
        label_weight = risk.LABEL_WEIGHT_WITH_REFERENCE if weight > 0 else risk.LABEL_WEIGHT
        return values | self._chosen_values(estimates, training_score, label_weight)

    def _chosen_values(self, estimates: Tensor, training_score: Tensor, label_weight: int) -> dict[str, Tensor]:
        """Compute criterion and estimate, combined with any validation labels, and the temperature."""
        labels = LabelSums(*self.labels_sums.T)
        values: dict[str, Tensor] = {}
        if bool(labels.num_scored.any()):
            score, temperature = RefinedScore.lowest(labels.score / labels.num_scored)
            values["risk_label_score"] = estimates.new_tensor(score)
            values["risk_num_labels"] = labels.num_scored[UNCHANGED]
            values["risk_criterion"] = risk.criterion_with_labels(estimates, labels, self.gap_weight * label_weight)
            estimate = risk.combine_with_labels(estimates, labels, label_weight)[UNCHANGED]
        else:
            temperature = RefinedScore.lowest(estimates).temperature if self.gap_weight == 1 else 1.0
            values["risk_criterion"] = risk.criterion(estimates, training_score, self.gap_weight)
            estimate = estimates[UNCHANGED]
        values["risk_temperature"] = estimates.new_tensor(temperature)
        return values | {"risk_estimate": estimate}

    def _reference_scores(self) -> Tensor:
        """Compute C at each temperature, with a calibration that includes this epoch."""
        unseen, training = AgreementSums(*self.unseen_agreement.T), AgreementSums(*self.training_agreement.T)
        agreements, training_agreements = (each.agreement / each.num_scored for each in (unseen, training))
        self.calibration = self._earlier_calibration.updated(agreements, training_agreements)
        return reference_score(unseen, training, self.calibration)

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


def _reference_values(score: Tensor, weight: float, reference: ReferenceSums) -> dict[str, Tensor]:
    """Name C, v and, if it is known, N."""
    values = {"risk_reference": score, "risk_reference_weight": torch.full_like(score, weight)}
    if not math.isnan(reference.mean_noise):
        values["risk_label_noise"] = torch.full_like(score, reference.mean_noise)
    return values


def _check_reference(outputs: Tensor, reference: Tensor | None, shares: Tensor | None) -> None:
    if (reference is None) != (shares is None):
        raise ValueError("Expected `reference` in `update` if the metric has one, and only then.")
    if reference is not None and shares is not None and reference.shape != (len(outputs), len(shares)):
        got = f"{tuple(reference.shape)} for outputs {tuple(outputs.shape)}"
        raise ValueError(f"Expected `reference` to have the shape (N, {len(shares)}), but got {got}.")
