"""What to expect of a network: by labels that were drawn from a reference, by labels of its samples, or by both."""

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median_high
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from lightning_sensitivity.expected.doubts import CONSTANT, REASONS, SOME_VALIDATIONS, Warn
from lightning_sensitivity.expected.record import EXPECTED, Row, Unseen, Values
from lightning_sensitivity.functional.expected import (
    Estimate,
    Loss,
    combine,
    complete_labels,
    equivalent_labels_of,
    estimate,
    is_area,
    label_draws,
    losses,
    metric_value,
)
from lightning_sensitivity.functional.tasks import Accuracy, AnyMetric, ClosedForm, Measured, Task, measure_mean
from lightning_sensitivity.functional.tensors import in_32_bits
from lightning_sensitivity.reference.observations import count_groups

_ROUNDING = 1e-6  # of a number of labels
_FALLING = 0.9  # of the last score: below, a network is still learning
_LOSS = f"{EXPECTED}loss"
Estimates: TypeAlias = dict[str, Estimate]


class Known(NamedTuple):
    """What is known of the samples of a loader.

    Attributes:
        labels: Their labels, ``(N, C)``, nan where a sample has none.
        groups: The number of the group of each, ``(N,)``, whose labels count as one; None without groups.
        unseen: What the reference predicts for them; None if there is none.
    """

    labels: Tensor
    groups: Tensor | None
    unseen: Unseen | None


class Labelled(NamedTuple):
    """Outputs of samples, and their labels: those that a reference predicts, or those that somebody gave them.

    Attributes:
        outputs: Outputs ``(N, ...)``, finite.
        y: Labels as a matrix, or predictions, ``(N, C)``; nan is unknown, and left out by default.
        draws: The same as one or more labels for each sample, ``(R, N)``, or ``(R, N, C)``.
        groups: The number of the group of each sample, ``(N,)``; None without groups.
        size: How many labels there are; those of one group count as one.
    """

    outputs: Tensor
    y: Tensor
    draws: Tensor
    groups: Tensor | None
    size: int

    @property
    def tells_nothing(self) -> bool:
        """Whether a reference predicts the same for all samples."""
        return len(self.draws) > 1 and bool((self.y == self.y[:1])[:, ~self.y.isnan().all(0)].all())


class Expectation:
    """The values of the validations of a run.

    Args:
        task: The task.
        loss: The loss of the user; None for that of the task.
        metrics: The metrics by name.
        outputs: Outputs of any samples, whose shape and type those of all processes have.
        labels: Labels of any samples, in the form that the loss takes.
        warn: Warns, by an entry of the page on troubleshooting, a message, and what tells it from others of the entry.

    Attributes:
        metrics: The metrics by name.
        are_predictions: Whether outputs are what a reference predicts; with a loss of the user in a regression they may
            be quantiles, or logarithms of rates.
        no_outputs: Outputs of no sample.
        doubts: What makes all values doubtful, as a summary has it.
    """

    def __init__(
        self,
        task: Task,
        loss: Loss | None,
        metrics: Mapping[str, AnyMetric],
        outputs: Tensor,
        labels: Tensor,
        warn: Warn,
    ) -> None:
        self._task = task
        self._loss = loss
        self.metrics = dict(metrics)
        self._names = [EXPECTED + name for name in (*metrics, "loss")]
        self.no_outputs = in_32_bits(outputs[:0]).cpu()
        self._like = in_32_bits(labels[:0]).to(outputs.device)
        self._warn = warn
        self.doubts: list[str] = []
        self._num_bad = 0  # validations in a row in which a regression was worse than a constant prediction
        self._last_score = 0.0  # of it
        self.are_predictions = not task.has_any_outputs(loss)

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
            self._warn("nan", message, kind=str(dataloader_idx))
        if len(outputs) > 0 and not bool(is_finite.any()):
            return dict.fromkeys(self._names, math.nan)
        if len(outputs) > 0 and dataloader_idx == 0:  # once in a validation
            self._note(outputs, is_finite, known.unseen)
        score = None if known.unseen is None else known.unseen.score
        rows = [row for row in history if row["dataloader_idx"] == dataloader_idx]
        if any(row["reference_score"] not in (None, score) for row in rows):
            message = (
                "goes on with another reference than an earlier part of this fit had: the last line compares no values "
                "of both, but other callbacks do."
            )
            self._warn("checkpoint", message)
        values = self._combined(outputs, is_finite, known, [row for row in rows if row["reference_score"] == score])
        if not values:
            return {}
        num_labels = self._count(known.labels[self._task.has_label(known.labels) & is_finite])
        return values | {"num_labels": num_labels, "reference_score": score}

    def rank(self, models: Mapping[str, Tensor], known: Known) -> list[tuple[str, float, float, float]]:
        """Rank models by the first value, on the same samples and labels.

        Args:
            models: Outputs of each, ``(N, ...)``, of which all samples have finite predictions, by name.
            known: What is known of the samples.

        Returns:
            The name of each, the best first; its value, by how much that is worse than the first one's, and the
            standard error of this, nan if unknown. It is empty if neither the reference nor a label says anything.

        Raises:
            ValueError: If a loss is no number for each sample.
        """
        name, is_finite = self._names[0], torch.ones(len(known.labels), dtype=torch.bool)
        sign = -1 if name != _LOSS else 1
        # By the reference and by labels, both of which have the same samples for all models.
        labelled: list[Labelled | None] = []
        measured: dict[str, list[Measured | None]] = {}
        for model, outputs in models.items():
            labelled = self._labelled(outputs, is_finite, known)
            measured[model] = [each and self._measure(each, [name]).get(name) for each in labelled]

        def joined(both: Sequence[Measured | None], weight: float | None) -> Values:
            pairs = zip(both, labelled, strict=True)
            expected, of_labels = (
                {name: estimate(value, some.size, some.groups)} if value and some else {} for value, some in pairs
            )
            return _joined(expected, of_labels, known.unseen, (), weight)

        # The reference counts the same beside labels for all models, or its weight would choose one.
        alone = [joined(both, None) for both in measured.values()]
        key = f"{name}_equivalent_labels"
        weights = [each[key] for each in alone if key in each]
        weight = median_high(weights) if weights else None
        values = {model: joined(both, weight)[name] for model, both in measured.items() if any(both)}

        order = sorted(values, key=lambda model: sign * values[model])
        rows = []
        for model in order:
            pairs = zip(measured[model], measured[order[0]], strict=True)
            difference = joined([m and best and m.minus(best) for m, best in pairs], weight)
            stderr = 0.0 if model == order[0] else difference.get(f"{name}_stderr", math.nan)
            rows.append((model, values[model], sign * difference[name] + 0.0, stderr))
        return rows

    def _are_finite(self, outputs: Tensor) -> Tensor:
        """Return which samples have finite predictions, ``(N,)``; a logit of -inf masks a class."""
        return self._task.predictions(outputs).isfinite().all(1)

    def _note(self, outputs: Tensor, is_finite: Tensor, unseen: Unseen | None) -> None:
        """Note how far a regression is from the reference; warn if a constant stays nearer, and it does not improve."""
        if unseen is None or not self._task.is_regression or not self.are_predictions:
            return
        rows = is_finite[unseen.indices]
        numbers, q = self._task.output_matrix(outputs[unseen.indices][rows]), unseen.q[rows]
        score, by_mean = float(self._task.distances(numbers, q).mean()), float(q.var(0, correction=0).mean())
        is_bad = score > max(by_mean, _FALLING * self._last_score)
        self._last_score = score
        self._num_bad = self._num_bad + 1 if is_bad else 0
        if self._num_bad == SOME_VALIDATIONS:
            self.doubts = [CONSTANT]
            self._warn("targets", f"finds that {REASONS[CONSTANT]}")

    def _labelled(self, outputs: Tensor, is_finite: Tensor, known: Known) -> list[Labelled | None]:
        """Return the samples that a reference has labelled, and those that somebody has; None without any."""
        labels, groups, unseen = known
        by_reference = None
        if unseen is not None:
            rows = is_finite[unseen.indices]
            indices = unseen.indices[rows]
            of_indices = None if groups is None else groups[indices]
            of_reference = outputs[indices], unseen.q[rows], unseen.draws[:, rows], of_indices
            by_reference = Labelled(*of_reference, count_groups(of_indices, len(indices)))

        # Labels that the reference can't predict are left out.
        rows = self._task.has_label(labels) & is_finite
        y, draws = labels[rows], label_draws(labels, self._task)
        if unseen is not None:
            y = y.where(~unseen.q.isnan().all(0), math.nan)
            draws = complete_labels(draws, unseen.draws, unseen.indices)
        of_rows = None if groups is None else groups[rows]
        size = count_groups(of_rows, self._count(labels[rows]))
        by_labels = Labelled(outputs[rows], y, draws[:, rows], of_rows, size)
        return [each if each is not None and each.draws.numel() > 0 else None for each in (by_reference, by_labels)]

    def _count(self, labels: Tensor) -> int:
        """Count labels ``(N, C)``, those of all columns as one."""
        return math.ceil(float(self._task.known(labels).double().mean(1).sum()) - _ROUNDING)

    def _combined(self, outputs: Tensor, is_finite: Tensor, known: Known, earlier: Sequence[Row]) -> Values:
        """Compute each value by a reference and by labels, and combine both, by names that begin with its own."""
        labelled = self._labelled(outputs, is_finite, known)
        expected, of_labels = map(self._estimates, labelled)
        values = _joined(expected, of_labels, known.unseen, earlier)
        if not math.isfinite(loss := values.get(_LOSS, 0.0)):
            what = "finds labels of classes that the outputs mask" if self._loss is None else f"gets {loss} from `loss`"
            self._warn("loss", f"{what}, and logs no `{_LOSS}` then.")
            values = {name: value for name, value in values.items() if not name.startswith(_LOSS)}
        return values

    def _estimates(self, labelled: Labelled | None) -> Estimates:
        """Compute each value, and how sure it is where that is known in closed form."""
        if labelled is None:
            return {}
        measured = self._measure(labelled, self._names)
        return {name: estimate(each, labelled.size, labelled.groups) for name, each in measured.items()}

    def _measure(self, labelled: Labelled, names: Iterable[str]) -> dict[str, Measured]:
        """Compute the loss of the task or of the user, which may be nan, and metrics where these say something."""
        y, draws, can_measure = labelled.y, labelled.draws, self._task.can_measure(labelled.draws)
        p = self._task.predictions(labelled.outputs)
        known_draws = draws.where(~y.isnan(), math.nan) if self._task.is_by_column else draws
        measured: dict[str, Measured] = {}
        for name in names:
            if name == _LOSS:
                measured[name] = self._measure_loss(labelled)
                continue
            metric = self.metrics[name.removeprefix(EXPECTED)]
            if can_measure or isinstance(metric, Accuracy):  # which labels of one class tell, too
                if isinstance(metric, ClosedForm):
                    each = metric.measure(p, known_draws)
                else:
                    each = Measured(float(metric_value(metric, p, draws, self._task)))
                measured[name] = each._replace(value=0.5) if is_area(metric) and labelled.tells_nothing else each
        return {name: each for name, each in measured.items() if math.isfinite(each.value) or name == _LOSS}

    def _measure_loss(self, labelled: Labelled) -> Measured:
        """Compute the loss, which is exact in the probabilities of labels if it is that of the task."""
        outputs, y, draws, *_ = labelled
        if self._loss is None:
            value = self._task.losses(outputs, y, draws).double().nanmean()
            influences = measure_mean(self._task.losses_of_draws(outputs, y, draws).double()).influences
            return Measured(float(value), influences)
        # It needs samples of which all labels are known.
        whole = ~draws.isnan().transpose(0, 1).flatten(1).any(1)
        of_draws = losses(self._loss, outputs[whole], draws[:, whole], self._task, self._like)
        value = of_draws.mean()  # nan if some are
        if of_draws.ndim == 1 or of_draws.shape[1] != int(whole.sum()):
            return Measured(float(value))
        of_whole = measure_mean(of_draws.reshape(*of_draws.shape[:2], -1)).influences
        assert of_whole is not None
        influences = of_draws.new_zeros(len(draws), len(whole)).index_add(1, whole.nonzero()[:, 0], of_whole)
        return Measured(float(value), influences)


def _joined(
    expected: Estimates,
    of_labels: Estimates,
    unseen: Unseen | None,
    earlier: Sequence[Row],
    weight: float | None = None,
) -> Values:
    """Join what a reference and labels say of each value, by names that begin with its own."""
    values: Values = {}
    for name in expected | of_labels:
        both = name in expected and name in of_labels
        counted = [row[f"{name}_equivalent_labels"] for row in earlier if f"{name}_equivalent_labels" in row]
        numbers = 1, 1  # of no reference
        if unseen is not None:
            numbers = unseen.num_calibrating, equivalent_labels_of(unseen.sees, name.removeprefix(EXPECTED))
        combined = combine(expected.get(name), of_labels.get(name), *numbers, counted, weight)
        values[name] = combined.value
        if not math.isnan(combined.stderr):
            values[f"{name}_stderr"] = combined.stderr
        if both:
            values[f"{name}_equivalent_labels"] = combined.equivalent_labels
    return values
