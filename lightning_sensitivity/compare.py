"""Rank models without validation labels: by the accuracy that a reference expects of each."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import length_hint
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_sensitivity.expected.fitted import FittedReference, finite_samples
from lightning_sensitivity.functional.expected import WEIGHT, Loss, complete_labels, label_draws, losses
from lightning_sensitivity.functional.tensors import without_ones
from lightning_sensitivity.messages import Refused, Selector, check_argument, check_task, link_to, refuse_on_error
from lightning_sensitivity.reading.reader import BatchReader, check_count
from lightning_sensitivity.reference.observations import Observations, count_groups, stderr_of_mean
from lightning_sensitivity.running.batches import move_batch
from lightning_sensitivity.running.call import Function
from lightning_sensitivity.running.isolation import isolated, isolated_with

_QUANTILE = 1.96  # of the normal distribution, for 95 %


class ModelScores(NamedTuple):
    """The scores of one model.

    Attributes:
        rank: Its place; 1 is the best.
        name: The name that the user gave it.
        expected: The accuracy to expect, a share: the higher, the better. In a regression, or with a loss of
            yours, the loss to expect: the lower, the better. With validation labels, it is combined with the value on
            these.
        difference: By how much it is worse than that of the first model.
        difference_stderr: The standard error of that, paired by sample.
        may_be_best: Whether the samples are too few to tell it from the first model: the 95 % interval of
            ``difference`` holds 0.
    """

    rank: int
    name: str
    expected: float
    difference: float
    difference_stderr: float
    may_be_best: bool


class Comparison(list[ModelScores]):
    """The scores of models, the best first. ``print`` shows a table; ``pandas.DataFrame`` takes the list."""

    def __repr__(self) -> str:
        """Lay out the table."""
        rows = ([f"{x:.3g}" if isinstance(x, float) else str(x) for x in model] for model in self)
        lines = [ModelScores._fields, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def compare_models(
    models: Mapping[str, nn.Module],
    dataloader: Iterable[object],
    *,
    training: Iterable[object],
    loss: Loss | None = None,
    targets: Selector | None = None,
    features: Selector | nn.Module | None = None,
    reference: object = None,
    groups: Selector | None = None,
    validation_labels: bool = False,
    task: str = "multiclass",
    inputs: Selector | None = None,
    outputs: Selector | None = None,
    call: Function | None = None,
) -> Comparison:
    r"""Rank models that learned the same task, without validation labels, on the same samples.

    A reference, the best small model of the training labels, which may be noisy, stands in for validation
    labels, as for :class:`~lightning_sensitivity.RiskMonitor`. It predicts probabilities of the classes; the
    accuracy to expect is the mean probability of the class that a model chooses. See ``examples/studies`` for
    what it is worth.

    Args:
        models: A dict of names and modules, two or more. Each runs on its own device, and is left as it was.
        dataloader: Batches that no model was trained on, with or without labels, all kept in memory: about a
            thousand samples are enough.
        training: The batches that the models were trained on, with labels. All are read once, and evenly
            spaced samples are kept: up to 50,000 rows of a table, or 10,000 images, signals or texts, within
            512 MiB.
        loss: Your loss, to rank by: a function of outputs and labels, in the form of ``targets``, on the CPU,
            that returns a number for each sample (``reduction="none"``). In a regression outputs may then have
            any shape with samples first.
        targets: A function ``batch -> labels``; by default
            :func:`~lightning_sensitivity.running.select_targets`.
        features: What the reference sees, by default the inputs: an encoder, a module that gets the inputs of
            the models and runs on up to 3,000 training samples, or a function ``batch -> (N, D)``.
        reference: An estimator of scikit-learn that takes the place of the reference's own learners: a
            classifier with ``predict_proba``, or a regressor.
        groups: A function ``batch -> groups`` of what samples share, such as the patient, if unseen samples are of
            other ones: numbers or strings, one a sample. The reference then leaves out whole groups, and standard
            errors count groups.
        validation_labels: Combine what is expected with the value on the labels of ``dataloader``, which may
            be noisy: it is the mean of both, with a weight of m for m labels, and of 1,000 for the reference.
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``.
        inputs: A function ``batch -> arguments``; by default see
            :class:`~lightning_sensitivity.running.ModelCall`.
        outputs: A function ``result -> logits``; by default
            :func:`~lightning_sensitivity.running.select_outputs`.
        call: A function ``(model, batch) -> result`` in place of ``forward``; then ``inputs`` or ``features``
            has to say what the reference sees.

    Returns:
        A list of :class:`~lightning_sensitivity.ModelScores`, the best one first.

    Raises:
        MisconfigurationException: If an argument is invalid, or a model fails, which is named; if the
            reference sees too little of the inputs, and there are no validation labels.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import compare_models
        >>> _ = torch.manual_seed(0)
        >>> x, teacher = torch.randn(300, 5), torch.nn.Linear(5, 3)
        >>> train_loader = [(x[:200], teacher(x[:200]).argmax(1))]
        >>> models = {"good": teacher, "random": torch.nn.Linear(5, 3)}
        >>> [model.name for model in compare_models(models, [x[200:]], training=train_loader)]
        ['good', 'random']
    """
    are_models = isinstance(models, Mapping) and all(isinstance(model, nn.Module) for model in models.values())
    check_argument("models", models, are_models and len(models) > 1, "a dict of names and modules, two or more")
    batches = list(dataloader) if isinstance(dataloader, Iterable) else []
    check_argument("dataloader", dataloader, len(batches) > 0, "an iterable of batches")
    rules = check_task(task, loss, reference)
    reader = BatchReader(
        inputs=inputs, outputs=outputs, targets=targets, features=features, groups=groups, call=call, task=rules
    )
    outputs_of = _run_all(models, batches, reader, rules.has_any_outputs(loss))
    first, some = next(iter(models.values())), next(iter(outputs_of.values()))
    judge = _Judge(first, reader, loss, some)
    new = reader.join(first, (reader.keep(first, move_batch(first, each), index) for index, each in enumerate(batches)))
    with refuse_on_error("`training` gives no reference (`features=` says what it sees)", "comparing-models"):
        rows = finite_samples(new, "samples of `dataloader`", warn)
        new = new.take(rows)
        judge.fit(training, reference, new, is_alone=not validation_labels)
    if validation_labels:
        with refuse_on_error("`validation_labels` can't be read", "comparing-models"):
            judge.add_labels(batches, rows, new.groups)
    values = {name: judge.value(name, each[rows]) for name, each in outputs_of.items()}
    return _rank(values, judge.is_highest_best, new.groups)


def _run_all(
    models: Mapping[str, nn.Module], batches: Sequence[object], reader: BatchReader, has_any_outputs: bool
) -> dict[str, Tensor]:
    """Compute the outputs of all models for all batches, on the CPU; all are of a kind, and so are inputs."""
    found: dict[str, Tensor] = {}
    inputs: dict[str, object] = {}  # the names of the inputs of each model, or their number
    for name, model in models.items():
        parts = []
        with refuse_on_error(f"Model {name!r} can't be compared", "comparing-models"):
            with isolated(model) as run:
                for batch in batches:
                    call = reader.call(model, move_batch(model, batch))
                    parts.append(run(call).cpu())
            inputs[name] = (*call.inputs(),) if call.layout.by_name else len(call.inputs())
            found[name] = outputs = torch.cat(parts)
            is_flat = without_ones(outputs).ndim <= 2 or has_any_outputs
            check_argument("outputs", tuple(outputs.shape), is_flat, "one row for each sample, (N,) or (N, K)")
            if reader.task.look_like_probabilities(outputs):
                raise Refused(
                    "outputs should be logits, but all are from 0 to 1: set `outputs=lambda p: p.log()`, or for a "
                    "single one `outputs=lambda p: p.logit(1e-6)`."
                )
    shapes = {name: tuple(each.shape) for name, each in found.items()}
    check_argument("models", shapes, len({*shapes.values()}) == 1, "models with outputs of the same shape")
    if not reader.has_features and len({*inputs.values()}) > 1:
        raise Refused(f"models get different inputs, {inputs}: set `features=`, which says what the reference sees.")
    return found


class _Judge:
    """A reference, and validation labels beside it, by which the outputs of models are judged.

    Args:
        model: The first model, whose batches are read.
        reader: Reads them.
        loss: The loss of the user; None for the chance to be right, or the squared error.
        outputs: Outputs of the model, ``(N, ...)``.

    Attributes:
        is_highest_best: Whether the best model is that of the highest :meth:`value`.
    """

    def __init__(self, model: nn.Module, reader: BatchReader, loss: Loss | None, outputs: Tensor) -> None:
        self.is_highest_best = reader.task.is_highest_best and loss is None
        self._model = model
        self._reader = reader
        self._loss = loss
        self._num_samples, self._num_outputs = len(outputs), outputs.shape[1:].numel()
        has_any_outputs = reader.task.has_any_outputs(loss)
        self._shape = None if has_any_outputs else tuple(without_ones(outputs).shape[1:])
        self._like = torch.zeros(0)  # no labels, in the form that they have
        # What each sample counts, ``(N,)``, and its labels: as a matrix ``(N, C)``, and as drawn, ``(R, N, ...)``
        self._answers: list[tuple[Tensor, Tensor, Tensor]] = []

    def fit(self, training: Iterable[object], estimator: object, new: Observations, is_alone: bool) -> None:
        """Fit a reference to training samples, and let it answer for new ones.

        Args:
            training: Training batches.
            estimator: What is fitted; None for the reference's own learners.
            new: The new samples; what makes them doubtful is said.
            is_alone: Whether there are no other labels.
        """
        reader, task = self._reader, self._reader.task
        num_columns = 1 if self._shape is None else task.num_columns(self._shape)
        kept = reader.make_kept(num_columns, num_batches=length_hint(training))
        for index, batch in enumerate(training):
            moved = move_batch(self._model, batch)
            if index == 0:
                labels = reader.labels(self._model, moved, self._shape)
                reader.check_samples(self._model, moved, reader.call(self._model, moved), labels)
                self._like = labels[:0]
            reader.keep_observations(kept, self._model, moved, self._shape)
        known = kept.joined()
        known = known.take(finite_samples(known, "training samples", warn))
        fitted = FittedReference(reader, known, estimator, warn)
        if fitted.verdict.inputs_tell_nothing and reader.sees_all:
            text = "expects the mean label of any model, since the inputs tell nothing of the labels."
            warn("nothing-to-know", text)
        if is_alone and not fitted.verdict.is_trusted:
            skill = f"it is only {max(0.0, fitted.verdict.skill):.0%} better than chance on labels that were left out"
            raise Refused(f"{skill}. Set `features=`, or `validation_labels=True`.")
        is_other = self._shape is None and self._num_outputs != num_columns  # such as quantiles
        unseen = fitted.expect(known, new, torch.arange(len(new)), "`dataloader`", is_other, False)
        weights = torch.full((len(new),), fitted.verdict.is_trusted * WEIGHT / len(new), dtype=torch.float64)
        self._answers.append((weights, unseen.q, unseen.draws))

    def add_labels(self, batches: Iterable[object], rows: Tensor, groups: Tensor | None) -> None:
        """Let labels of new samples answer, too, of which those of one group count as one; what they lack is drawn."""
        task, (_, q, draws) = self._reader.task, self._answers[0]
        parts = [self._reader.labels(self._model, move_batch(self._model, batch), self._shape) for batch in batches]
        labels = torch.cat(parts)
        check_count(labels, self._num_samples)
        labels = labels[rows]
        y = task.label_matrix(labels, q.shape[1])
        drawn = complete_labels(label_draws(y, task), draws)
        y = y.where(~q.isnan().all(0), torch.nan)
        known, has_label = task.known(y).double().mean(1), task.has_label(y)
        num_labels = int(has_label.sum())
        number = count_groups(None if groups is None else groups[has_label], num_labels)
        self._answers.append((known * (number / max(1, num_labels)), y, drawn))
        if not any(bool(weights.any()) for weights, _, _ in self._answers):
            raise Refused("no sample of `dataloader` has one, and the reference sees too little: set `features=`.")

    def value(self, name: str, outputs: Tensor) -> Tensor:
        """Return the loss of each sample, or the chance to be right, by all answers, of a named model, ``(N,)``."""
        if not bool(outputs.isfinite().all()):
            raise Refused(f"Model {name!r} can't be compared: outputs should be finite, but some are nan or inf.")
        task, size = self._reader.task, len(outputs)
        total = torch.stack([weights for weights, _, _ in self._answers]).sum(0).mean()
        found = torch.zeros(size, dtype=torch.float64)
        for weights, y, draws in self._answers:
            if self._loss is None:
                values = task.scores(outputs, y, draws)
            else:
                with refuse_on_error("`loss` fails", "comparing-models"), isolated_with(self._model, self._loss) as run:
                    drawn = run(losses, self._loss, outputs, draws, task, self._like)
                expected = f"a number for each of {size} samples, as with `reduction='none'`"
                check_argument("loss", tuple(drawn.shape[1:]), drawn.shape[1:2] == (size,), expected)
                values = drawn.mean(0).reshape(size, -1).mean(1)
            found = found + weights * values.nan_to_num()
        return found / total


def warn(entry: str, message: str, kind: str = "") -> None:
    """Warn, as for :class:`~lightning_sensitivity.expected.doubts.Doubts`."""
    warnings.warn(f"`compare_models` {message}{link_to(entry)}", stacklevel=6)


def _rank(values: Mapping[str, Tensor], highest_first: bool, groups: Tensor | None = None) -> Comparison:
    """Sort models by their mean value over samples; standard errors count groups, if there are any."""
    sign = -1 if highest_first else 1
    order = sorted(values, key=lambda name: sign * float(values[name].mean()))
    found = Comparison()
    for rank, name in enumerate(order, start=1):
        worse_by = sign * (values[name] - values[order[0]])
        difference = float(worse_by.mean())
        stderr = stderr_of_mean(worse_by, groups)
        may_be_best = not difference > _QUANTILE * stderr
        found.append(ModelScores(rank, name, float(values[name].mean()), difference, stderr, may_be_best))
    return found
