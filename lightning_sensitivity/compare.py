"""Rank models without validation labels: by the accuracy that a reference expects of each."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from operator import length_hint
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_sensitivity.expected.expectation import Expectation, Known
from lightning_sensitivity.expected.fitted import FittedReference, finite_samples
from lightning_sensitivity.expected.record import Unseen
from lightning_sensitivity.functional.expected import Loss, check_pairs
from lightning_sensitivity.functional.tensors import in_32_bits, without_ones
from lightning_sensitivity.messages import Refused, Selector, check_argument, check_task, link_to, refuse_on_error
from lightning_sensitivity.reading.reader import BatchReader, Shape, check_count, check_logits
from lightning_sensitivity.reference.observations import Observations
from lightning_sensitivity.running.batches import move_batch
from lightning_sensitivity.running.call import Function, Sigmoids
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
        difference_stderr: The standard error of that, on the same labels, with all that a ``RiskMonitor`` counts: the
            samples, the labels that calibrated the reference, and how sure that is of a model; nan if unknown.
        may_be_best: Whether it can't be told from the first model: the 95 % interval of ``difference`` holds 0.
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
    accuracy to expect is that on 20 labels a sample, drawn from these. See ``examples/studies`` for
    what it is worth.

    Args:
        models: A dict of names and modules, two or more. Each runs on its own device, and is left as it was.
        dataloader: Batches that no model was trained on, with or without labels, all kept in memory: about a
            thousand samples are enough. They pass through the hooks of a module, not through those of a
            ``LightningDataModule``, which may change batches on their way to the device.
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
            be noisy: it is the mean of both, with a weight of m for m labels, and of 1,000 for the reference, or fewer,
            the same for all models, if labels contradict it.
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
    task_rules = check_task(task, loss, reference)
    reader = BatchReader(
        inputs=inputs, outputs=outputs, targets=targets, features=features, groups=groups, call=call, task=task_rules
    )
    outputs_of = _run_all(models, batches, reader, task_rules.has_any_outputs(loss))
    first, some = next(iter(models.values())), next(iter(outputs_of.values()))
    shape = None if task_rules.has_any_outputs(loss) else tuple(without_ones(some).shape[1:])
    with refuse_on_error("`training` gives no reference (`features=` says what it sees)", "comparing-models"):
        new = reader.join(reader.keep(first, move_batch(first, each), index) for index, each in enumerate(batches))
        rows = finite_samples(new, "samples of `dataloader`", warn)
        new = new.take(rows)
        like, known = _read_training(first, reader, training, shape)
        num_columns = known.labels.shape[1]
        unseen = _ask_reference(reader, known, reference, new)
    y = torch.full((len(some), num_columns), math.nan, dtype=torch.float64)
    if validation_labels:
        y = _read_labels(first, reader, batches, shape, num_columns)
        check_count(y, len(some))
    # Accuracy comes first; in a regression there is none.
    metrics = {} if loss is not None else task_rules.default_metrics(num_columns)
    expectation = Expectation(task_rules, loss, metrics, some, like, warn)
    read = {name: each[rows] for name, each in outputs_of.items()}
    for name, each in read.items():
        if not bool(task_rules.predictions(each).isfinite().all()):  # a logit of -inf masks a class
            raise Refused(f"Model {name!r} can't be compared: outputs should be finite, but some are nan or inf.")
    with refuse_on_error("`loss` fails", "comparing-models"), isolated_with(first, loss) as run:
        if loss is not None:
            run(check_pairs, loss, some, task_rules.as_labels(task_rules.hard_labels(known.labels), like))
        ranked = run(expectation.rank, read, Known(y[rows], new.groups, unseen))
    return _scores(ranked)


def _scores(ranked: Sequence[tuple[str, float, float, float]]) -> Comparison:
    """Return the scores of models by what :meth:`Expectation.rank` says, or say why there are none."""
    if not ranked:
        raise Refused(
            "the reference sees too little of the inputs, and no label of `dataloader` is known: set `features=`, or "
            "`validation_labels=True`.",
            "comparing-models",
        )
    scores = Comparison()
    for rank, (name, value, difference, stderr) in enumerate(ranked, start=1):
        if not math.isfinite(value):
            raise Refused(f"Model {name!r} can't be compared: `loss` gives {value}.", "comparing-models")
        may_be_best = not difference > _QUANTILE * stderr
        scores.append(ModelScores(rank, name, value, difference, stderr, may_be_best))
    return scores


def _run_all(
    models: Mapping[str, nn.Module], batches: Sequence[object], reader: BatchReader, has_any_outputs: bool
) -> dict[str, Tensor]:
    """Compute the outputs of all models for all batches, on the CPU; all are of a kind, and so are inputs."""
    outputs_of: dict[str, Tensor] = {}
    inputs: dict[str, object] = {}  # the names of the inputs of each model, or their number
    for name, model in models.items():
        parts = []
        with refuse_on_error(f"Model {name!r} can't be compared", "comparing-models"):
            with isolated(model) as run:
                for batch in batches:
                    call = reader.call(model, move_batch(model, batch))
                    with Sigmoids() as sigmoids:
                        raw = run(call)
                    if not has_any_outputs:
                        check_logits(without_ones(raw), sigmoids.gave(raw), reader.task)
                    parts.append(in_32_bits(raw).cpu())
            inputs[name] = (*call.inputs(),) if call.layout.by_name else len(call.inputs())
            outputs_of[name] = outputs = torch.cat(parts)
            is_flat = without_ones(outputs).ndim <= 2 or has_any_outputs
            check_argument("outputs", tuple(outputs.shape), is_flat, "one row for each sample, (N,) or (N, K)")
    shapes = {name: tuple(each.shape) for name, each in outputs_of.items()}
    check_argument("models", shapes, len({*shapes.values()}) == 1, "models with outputs of the same shape")
    if not reader.has_features and len({*inputs.values()}) > 1:
        raise Refused(f"models get different inputs, {inputs}: set `features=`, which says what the reference sees.")
    return outputs_of


def _read_training(
    model: nn.Module, reader: BatchReader, training: Iterable[object], shape: Shape | None
) -> tuple[Tensor, Observations]:
    """Return no labels, in the form that they have, and training samples, with labels as a matrix."""
    kept = reader.make_kept(1 if shape is None else reader.task.num_columns(shape))
    like = torch.zeros(0)
    for index, batch in enumerate(training):
        moved = move_batch(model, batch)
        if index == 0:
            call = reader.call(model, moved)
            labels = reader.labels(moved, call, shape)
            reader.check_samples(moved, call, labels)
            like = labels[:0]
            kept.num_expected = len(labels) * length_hint(training)  # which may be sorted
        reader.keep_observations(kept, model, moved, shape)
    samples = kept.joined()
    return like, samples.take(finite_samples(samples, "training samples", warn))


def _read_labels(
    model: nn.Module, reader: BatchReader, batches: Iterable[object], shape: Shape | None, num_columns: int
) -> Tensor:
    """Return the labels of batches as a matrix."""
    with refuse_on_error("`validation_labels` can't be read", "comparing-models"):
        moved = (move_batch(model, batch) for batch in batches)
        labels = torch.cat([reader.labels(each, reader.call(model, each), shape) for each in moved])
        return reader.task.label_matrix(labels, num_columns).double()


def _ask_reference(reader: BatchReader, training: Observations, estimator: object, new: Observations) -> Unseen | None:
    """Fit a reference, or another estimator, and let it predict new samples; None if it may not choose."""
    fitted = FittedReference(reader, training, estimator, warn)
    if fitted.verdict.inputs_tell_nothing and reader.sees_all:
        warn("nothing-to-know", "expects the mean label of any model, since the inputs tell nothing of the labels.")
    unseen = fitted.expect(training, new, "`dataloader`", has_shares=False)
    return unseen if fitted.verdict.is_trusted else None


def warn(entry: str, message: str, kind: str = "") -> None:
    """Warn, as for :class:`~lightning_sensitivity.expected.expectation.Expectation`."""
    warnings.warn(f"`compare_models` {message}{link_to(entry)}", stacklevel=3)
