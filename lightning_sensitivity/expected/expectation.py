"""What to expect of a network: by labels that were drawn from a reference, by labels of its samples, or by both."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric

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

_SOME_VALIDATIONS = 3  # after which a network is better than a constant prediction
_ROUNDING = 1e-6  # of a number of labels
_FALLING = 0.9  # of the last score: below, a network is still learning


class Expectation:
    """The values of the validations of a run, and what makes them doubtful.

    Args:
        task: The task.
        loss: The loss of the user; None for that of the task.
        metrics: The metrics by name.
        outputs: Outputs of any samples, whose shape and type those of all processes have.
        labels: Labels of any samples, in the form that the loss takes.
        warn: Warns, by an entry of the page on troubleshooting, and a message.
        are_predictions: Whether outputs are what a reference predicts, and not, say, logarithms of rates.

    Attributes:
        metrics: The metrics by name.
        are_predictions: The same.
        is_worse_than_constant: Whether a regression was worse than a constant prediction in several validations.
        no_outputs: Outputs of no sample.
    """

    def __init__(
        self,
        task: Task,
        loss: Loss | None,
        metrics: Mapping[str, Metric],
        outputs: Tensor,
        labels: Tensor,
        warn: Callable[..., None],
        are_predictions: bool = True,
    ) -> None:
        self._task = task
        self._loss = loss
        self.metrics = dict(metrics)
        self.no_outputs = in_32_bits(outputs[:0]).cpu()
        self._like = in_32_bits(labels[:0]).to(outputs.device)
        self.warn = warn
        self.are_predictions = are_predictions
        self.is_worse_than_constant = False
        self._num_bad = 0  # validations in which a regression was worse than a constant prediction
        self._last_score = 0.0  # of it

    def values(
        self,
        outputs: Tensor,
        labels: Tensor,
        groups: Tensor | None,
        unseen: Unseen | None,
        earlier: Sequence[Row] = (),
    ) -> Values:
        """Compute what to expect on a loader: by the reference, which counts as 1,000 labels, and by labels.

        Labels of one group count as one.

        Args:
            outputs: Outputs ``(N, ...)``.
            labels: Labels ``(N, C)``, nan where a sample has none.
            groups: The number of the group of each sample, ``(N,)``; None without groups.
            unseen: What the reference predicts for them; None if that is nothing.
            earlier: The values of earlier validations.

        Returns:
            The values by name, nan if all outputs are; none if neither the reference nor a label says anything.
        """
        is_finite = self._are_finite(outputs)
        if len(outputs) > 0 and not bool(is_finite.any()):
            return dict.fromkeys(self._names, math.nan)
        counts = self._task.has_label(labels) & is_finite
        num_known = float(self._task.known(labels[counts]).double().mean(1).sum())  # of all columns
        num_labels = math.ceil(num_known - _ROUNDING)
        expected: dict[str, Estimate] = {}
        y, hard = labels[counts], self._task.hard_labels(labels)
        drawn = (hard[None] if unseen is None else complete_labels(hard, unseen.draws, unseen.indices))[:, counts]
        if unseen is not None:
            rows = is_finite[unseen.indices]
            indices = unseen.indices[rows]
            of_rows = None if groups is None else groups[indices]
            expected = self._estimate(outputs[indices], unseen.q[rows], unseen.draws[:, rows], of_rows, len(indices))
            y = y.where(~unseen.q.isnan().all(0), math.nan)  # without labels that the reference can't tell
        by_labels = self._estimate(outputs[counts], y, drawn, None if groups is None else groups[counts], num_labels)
        known: Values = {}
        for name in expected | by_labels:
            known |= _joined(name, expected.get(name), by_labels.get(name), unseen, earlier)
        facts = {"num_labels": num_labels, "reference": None if unseen is None else unseen.score}
        return known | facts if known else {}

    def values_of_reference(self, outputs: Tensor, labels: Tensor, groups: Tensor | None, unseen: Unseen) -> Values:
        """Compute what to expect of the reference itself, by names that say so; none if it has no such outputs."""
        own = self._task.outputs_of(unseen.q, outputs.shape[1:]) if self.are_predictions else None
        if own is None:
            return {}
        outputs = torch.full_like(outputs, math.nan)  # for samples that it can't read
        outputs[unseen.indices] = own.to(outputs)
        found = self.values(outputs, labels, groups, unseen)
        return {f"reference_{name}": found[name] for name in self._names if name in found}

    @property
    def _names(self) -> list[str]:
        """The names of all values."""
        return [EXPECTED + name for name in (*self.metrics, "loss")]

    def _estimate(
        self, outputs: Tensor, y: Tensor, draws: Tensor, groups: Tensor | None, size: int
    ) -> dict[str, Estimate]:
        """Compute the loss and metrics by labels, or by what a reference predicts, and what they vary by chance.

        Args:
            outputs: Outputs ``(N, ...)``, finite.
            y: Labels as a matrix, or predictions, ``(N, C)``; nan is unknown, and left out by default.
            draws: The same as one or more labels for each sample, ``(R, N)``, or ``(R, N, C)``. No metric is
                computed if all are of one class.
            groups: The number of the group of each sample, ``(N,)``; None without groups.
            size: How many samples, or labels, there are; those of one group count as one.
        """
        if draws.numel() == 0:
            return {}
        values, one = self._measure(outputs, y, draws), one_draw(draws, groups)
        if self._loss is not None and not math.isfinite(value := values[f"{EXPECTED}loss"]):
            self.warn("loss", f"gets {value} from `loss`, and logs no `{EXPECTED}loss` then.")
        drawn = self._task.label_matrix(one[0], y.shape[1]).where(~y.isnan(), math.nan)

        def measure(rows: Tensor) -> Values:
            return self._measure(outputs[rows], drawn[rows], one[:, rows])

        variances, size = jackknife(measure, len(outputs), groups), count_groups(groups, size)
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        return {name: Estimate(value, variances.get(name, math.nan), size) for name, value in finite.items()}

    def _measure(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Values:
        """Compute the loss, and metrics where these say something."""
        found: Values = {"loss": float(self._losses(outputs, y, draws).nanmean())}
        if self._task.can_measure(draws):
            p = self._task.predictions(outputs)
            for name, metric in self.metrics.items():
                labels = draws.where(~y.isnan(), math.nan) if isinstance(metric, OfKnownLabels) else draws
                found[name] = float(metric_value(metric, p, labels, self._task))
        return {EXPECTED + name: value for name, value in found.items()}

    def _losses(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Compute the loss of the task, or that of the user, which needs samples of which all labels are known."""
        if self._loss is None:
            return self._task.losses(outputs, y, draws).double()
        whole = ~draws.isnan().transpose(0, 1).flatten(1).any(1)
        return losses(self._loss, outputs[whole], draws[:, whole], self._task, self._like)

    def _are_finite(self, outputs: Tensor) -> Tensor:
        """Return which samples have finite predictions, ``(N,)``; a logit of -inf masks a class."""
        return self._task.predictions(outputs).isfinite().all(1)

    # Doubts

    def may_be_probabilities(self, outputs: Tensor) -> bool | None:
        """Return whether outputs may be probabilities; None if that can't be said, since none is finite."""
        is_finite = self._are_finite(outputs)
        if not bool(is_finite.any()):
            return None
        return self._task.link != "identity" and may_be_probabilities(outputs[is_finite])

    def warn_of(self, dataloader_idx: int, outputs: Tensor, unseen: Unseen | None) -> None:
        """Warn of what makes the values of a loader doubtful."""
        is_finite = self._are_finite(outputs)
        num_non_finite = int((~is_finite).sum())
        if num_non_finite > 0:
            message = f"on dataloader {dataloader_idx}: {num_non_finite} samples gave nan or inf, and were left out."
            self.warn("nan", message, kind=str(dataloader_idx))
        may_be_scaled = self._task.is_regression and self.are_predictions
        if dataloader_idx == 0 and unseen is not None and may_be_scaled:
            rows = is_finite[unseen.indices]
            self._warn_of_targets(self._task.output_matrix(outputs[unseen.indices][rows]), unseen.q[rows])

    def _warn_of_targets(self, outputs: Tensor, q: Tensor) -> None:
        """Warn if a regression is worse than its mean in several validations, and does not improve."""
        if outputs.shape != q.shape:  # not the numbers themselves, but quantiles, or a distribution
            return
        score, by_mean = float(self._task.distances(outputs, q).mean()), float(q.var(0, correction=0).mean())
        is_bad = score > max(by_mean, _FALLING * self._last_score)
        self._last_score = score
        self._num_bad = self._num_bad + 1 if is_bad else 0
        if self._num_bad == _SOME_VALIDATIONS:
            self.is_worse_than_constant = True
            message = (
                f"finds the network worse than a constant prediction in {self._num_bad} validations. If your step "
                "scales targets or takes logarithms, do the same in `targets=`."
            )
            self.warn("targets", message)


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
