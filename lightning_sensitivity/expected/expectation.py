"""What to expect of a network: by labels that were drawn from a reference, by labels of its samples, or by both."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.expected.doubts import Doubts
from lightning_sensitivity.expected.record import EXPECTED, Row, Unseen, Values
from lightning_sensitivity.functional.expected import (
    Estimate,
    Loss,
    combine,
    complete_labels,
    jackknife,
    losses,
    metric_value,
    one_draw,
)
from lightning_sensitivity.functional.tasks import OfKnownLabels, Task
from lightning_sensitivity.functional.tensors import in_32_bits, may_be_probabilities
from lightning_sensitivity.reference.observations import count_groups

_ROUNDING = 1e-6  # of a number of labels


class Known(NamedTuple):
    """What is known of the samples of a loader.

    Attributes:
        labels: Their labels, ``(N, C)``, nan where a sample has none.
        groups: The number of the group of each, ``(N,)``, whose labels count as one; None without groups.
        unseen: What the reference predicts for them; None if that is nothing.
    """

    labels: Tensor
    groups: Tensor | None
    unseen: Unseen | None


class Expectation:
    """The values of the validations of a run.

    Args:
        task: The task.
        loss: The loss of the user; None for that of the task.
        metrics: The metrics by name.
        outputs: Outputs of any samples, whose shape and type those of all processes have.
        labels: Labels of any samples, in the form that the loss takes.
        doubts: Notes what is doubtful, and warns.
        are_predictions: Whether outputs are what a reference predicts, and not, say, logarithms of rates.

    Attributes:
        metrics: The metrics by name.
        are_predictions: The same.
        no_outputs: Outputs of no sample.
    """

    def __init__(
        self,
        task: Task,
        loss: Loss | None,
        metrics: Mapping[str, Metric],
        outputs: Tensor,
        labels: Tensor,
        doubts: Doubts,
        are_predictions: bool = True,
    ) -> None:
        self._task = task
        self._loss = loss
        self.metrics = dict(metrics)
        self.no_outputs = in_32_bits(outputs[:0]).cpu()
        self._like = in_32_bits(labels[:0]).to(outputs.device)
        self._doubts = doubts
        self.are_predictions = are_predictions
        self._of_reference: dict[int, Values] = {}  # what to expect of the reference itself, by loader

    def values(self, dataloader_idx: int, outputs: Tensor, known: Known, history: Sequence[Row]) -> Values:
        """Compute what to expect on a loader, by the reference and by labels, and note what makes it doubtful.

        Args:
            dataloader_idx: The index of the loader.
            outputs: Outputs ``(N, ...)``.
            known: What is known of the samples.
            history: The values of earlier validations.

        Returns:
            The values by name, nan if all outputs are; none if neither the reference nor a label says anything.
        """
        is_finite = self._are_finite(outputs)
        if not bool(is_finite.all()):
            number = int((~is_finite).sum())
            message = f"on dataloader {dataloader_idx}: {number} samples gave nan or inf, and were left out."
            self._doubts.warn("nan", message, kind=str(dataloader_idx))
        if len(outputs) > 0 and not bool(is_finite.any()):
            return dict.fromkeys([EXPECTED + name for name in (*self.metrics, "loss")], math.nan)
        if len(outputs) > 0 and dataloader_idx == 0:  # once in a validation
            self._note(outputs, is_finite, known.unseen)
        expected, by_labels, num_labels = self._estimates(outputs, is_finite, known)
        found: Values = {}
        earlier = [row for row in history if row["dataloader_idx"] == dataloader_idx]
        for name in expected | by_labels:
            found |= _joined(name, expected.get(name), by_labels.get(name), known.unseen, earlier)
        facts = {"num_labels": num_labels, "reference": None if known.unseen is None else known.unseen.score}
        return found | facts if found else {}

    def values_of_reference(self, dataloader_idx: int, outputs: Tensor, known: Known) -> Values:
        """Compute what to expect of the reference itself, by names that say so; none if it has no such outputs."""
        if dataloader_idx in self._of_reference:  # the samples stay the same
            return self._of_reference[dataloader_idx]
        if known.unseen is None or not self.are_predictions:
            return {}
        own = self._task.outputs_of(known.unseen.q, outputs.shape[1:])
        if own is None:
            return {}
        outputs = torch.full_like(outputs, math.nan)  # for samples that it can't read
        outputs[known.unseen.indices] = own.to(outputs)
        has_labels = not bool(known.labels.isnan().all())  # only beside these it matters how sure the values are
        expected, by_labels, _ = self._estimates(outputs, self._are_finite(outputs), known, has_labels)
        values: Values = {}
        for name in expected | by_labels:
            both = _joined(name, expected.get(name), by_labels.get(name), known.unseen, earlier=())
            values[f"reference_{name}"] = both[name]
        self._of_reference[dataloader_idx] = values
        return values

    def _are_finite(self, outputs: Tensor) -> Tensor:
        """Return which samples have finite predictions, ``(N,)``; a logit of -inf masks a class."""
        return self._task.predictions(outputs).isfinite().all(1)

    def _note(self, outputs: Tensor, is_finite: Tensor, unseen: Unseen | None) -> None:
        """Note what several validations tell of the outputs of a network."""
        self._doubts.note_outputs(self._task.link != "identity" and may_be_probabilities(outputs[is_finite]))
        if unseen is None or not self._task.is_regression or not self.are_predictions:
            return
        rows = is_finite[unseen.indices]
        numbers, q = self._task.output_matrix(outputs[unseen.indices][rows]), unseen.q[rows]
        if numbers.shape == q.shape:  # the numbers themselves, and not quantiles, or a distribution
            by_mean = q.var(0, correction=0).mean()
            self._doubts.note_score(float(self._task.distances(numbers, q).mean()), float(by_mean))

    def _estimates(
        self, outputs: Tensor, is_finite: Tensor, known: Known, have_variances: bool = True
    ) -> tuple[dict[str, Estimate], dict[str, Estimate], int]:
        """Return what the reference and what labels say, each by name, and the number of these labels."""
        labels, groups, unseen = known
        counts = self._task.has_label(labels) & is_finite
        num_known = float(self._task.known(labels[counts]).double().mean(1).sum())  # of all columns
        num_labels = math.ceil(num_known - _ROUNDING)
        y, hard = labels[counts], self._task.hard_labels(labels)
        drawn = (hard[None] if unseen is None else complete_labels(hard, unseen.draws, unseen.indices))[:, counts]
        expected: dict[str, Estimate] = {}
        if unseen is not None:
            rows = is_finite[unseen.indices]
            indices = unseen.indices[rows]
            of_rows = None if groups is None else groups[indices]
            those = outputs[indices], unseen.q[rows], unseen.draws[:, rows], of_rows, len(indices)
            expected = self._estimate(*those, have_variances)
            y = y.where(~unseen.q.isnan().all(0), math.nan)  # without labels that the reference can't tell
        of_counted = None if groups is None else groups[counts]
        return expected, self._estimate(outputs[counts], y, drawn, of_counted, num_labels), num_labels

    def _estimate(
        self, outputs: Tensor, y: Tensor, draws: Tensor, groups: Tensor | None, size: int, has_variance: bool = True
    ) -> dict[str, Estimate]:
        """Compute the loss and metrics by labels, or by what a reference predicts, and what they vary by chance.

        Args:
            outputs: Outputs ``(N, ...)``, finite.
            y: Labels as a matrix, or predictions, ``(N, C)``; nan is unknown, and left out by default.
            draws: The same as one or more labels for each sample, ``(R, N)``, or ``(R, N, C)``. No metric is
                computed if all are of one class.
            groups: The number of the group of each sample, ``(N,)``; None without groups.
            size: How many samples, or labels, there are; those of one group count as one.
            has_variance: Whether to compute by how much they vary.
        """
        if draws.numel() == 0:
            return {}
        values, variances = self._measure(outputs, y, draws), dict[str, float]()
        if self._loss is not None and not math.isfinite(value := values[f"{EXPECTED}loss"]):
            self._doubts.warn("loss", f"gets {value} from `loss`, and logs no `{EXPECTED}loss` then.")
        if has_variance:
            one = one_draw(draws, groups)
            drawn = self._task.label_matrix(one[0], y.shape[1]).where(~y.isnan(), math.nan)
            variances = jackknife(
                lambda rows: self._measure(outputs[rows], drawn[rows], one[:, rows]), len(outputs), groups
            )
        size = count_groups(groups, size)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return {name: Estimate(value, variances.get(name, math.nan), size) for name, value in finite.items()}

    def _measure(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Values:
        """Compute the loss of the task or of the user, and metrics where these say something."""
        if self._loss is None:
            of_samples = self._task.losses(outputs, y, draws).double()
        else:  # it needs samples of which all labels are known
            whole = ~draws.isnan().transpose(0, 1).flatten(1).any(1)
            of_samples = losses(self._loss, outputs[whole], draws[:, whole], self._task, self._like)
        found: Values = {"loss": float(of_samples.nanmean())}
        if self._task.can_measure(draws):
            p = self._task.predictions(outputs)
            for name, metric in self.metrics.items():
                labels = draws.where(~y.isnan(), math.nan) if isinstance(metric, OfKnownLabels) else draws
                found[name] = float(metric_value(metric, p, labels, self._task))
        return {EXPECTED + name: value for name, value in found.items()}


def _joined(
    name: str, expected: Estimate | None, by_labels: Estimate | None, unseen: Unseen | None, earlier: Sequence[Row]
) -> Values:
    """Join what a reference and labels say of a value, by names that begin with its own."""
    sureness = (0, 0) if unseen is None else (unseen.num_training, unseen.sure_as)
    worths = [row[f"{name}_worth"] for row in earlier if f"{name}_worth" in row]
    both = combine(expected, by_labels, *sureness, worths)
    found: Values = {name: both.value, f"{name}_stderr": both.stderr}
    if expected and by_labels:
        found[f"{name}_worth"] = both.worth
        if both.is_contradicted:
            found |= {f"{name}_by_reference": expected.value, f"{name}_by_labels": by_labels.value}
    return found
