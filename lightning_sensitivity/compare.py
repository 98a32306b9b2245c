"""Rank models without validation labels: by the accuracy that a reference expects of each."""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor, nn

from lightning_sensitivity.arguments import (
    Refused,
    Selector,
    check_argument,
    check_bool,
    check_estimator,
    refuse_on_error,
)
from lightning_sensitivity.compat import original_module
from lightning_sensitivity.functional.expected import METRIC_WORTH
from lightning_sensitivity.functional.features import kind_of
from lightning_sensitivity.functional.reference import Reference, fit_reference, max_samples
from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS, Task, of_all_classes
from lightning_sensitivity.functional.tensors import look_like_probabilities
from lightning_sensitivity.model.batches import clone_tensors
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.reader import BatchReader, join_features
from lightning_sensitivity.model.samples import KeptRows

ModelSource = nn.Module | Callable[[], nn.Module]
_QUANTILE = 1.96  # of the normal distribution, for 95 %


class ModelScores(NamedTuple):
    """The scores of one model.

    Attributes:
        rank: Its place; 1 is the best.
        name: The name that the user gave it.
        expected: The accuracy to expect, a share: the higher, the better. In a regression, the mean squared error
            to expect: the lower, the better. With validation labels, it is combined with the value on these.
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
    """The scores of models, the best first. ``print`` shows a table; ``pandas.DataFrame`` takes the list as it is."""

    def __repr__(self) -> str:
        """Lay out the table."""
        rows = ([f"{x:.3g}" if isinstance(x, float) else str(x) for x in model] for model in self)
        lines = [ModelScores._fields, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


class _Evidence(NamedTuple):
    """What predictions are judged by: labels, or what a reference predicts in their place.

    Attributes:
        targets: Probabilities of the classes, or numbers in a regression, ``(N, K)``.
        weights: How many labels each sample counts as, ``(N,)``.
        error: The mean squared error of these targets, which counts in a regression; 0 of labels.
    """

    targets: Tensor
    weights: Tensor
    error: float = 0.0

    def values(self, p: Tensor, task: Task) -> Tensor:
        """Return what predictions ``(N, K)`` are worth on each sample: the chance to be right, or a squared error."""
        if not task.has_classes:
            return task.distances(p, self.targets) + self.error
        return of_all_classes(self.targets, task).gather(1, task.classes(p)[:, None])[:, 0]


@dataclass(frozen=True)
class _Comparer:
    """What reads the same batches for one model after another; see :func:`compare_models`."""

    batches: Sequence[object]
    training: Iterable[object]
    task: Task
    reader: BatchReader
    estimator: object
    validation_labels: bool

    def compare(self, models: Mapping[str, ModelSource]) -> Tensor:
        """Return what each model is worth on each sample, ``(M, N)``."""
        outputs: dict[str, Tensor] = {}
        evidence: list[_Evidence] = []
        for name, source in models.items():
            with refuse_on_error(f"Model {name!r} can't be compared", entry="comparing-models"):
                model = source if isinstance(source, nn.Module) else source()
                check_argument("models", model, isinstance(model, nn.Module), "modules, or functions that return one")
                outputs[name] = self.run(model)
            evidence = evidence or self.find_evidence(model, outputs[name].shape[1:])
            del model
            gc.collect()  # modules contain reference cycles, and the next model needs their memory
        shapes = {name: tuple(each.shape) for name, each in outputs.items()}
        check_argument("models", shapes, len({*shapes.values()}) == 1, "models with outputs of the same shape")
        first, *others = outputs.values()
        if all(torch.equal(first, each) for each in others):
            advice = "in a loop, `lambda: load(path)` loads the last path: take `partial(load, path)`"
            raise Refused(f"`models` should be different models, but all have equal outputs ({advice}).")
        p = [self.task.predictions(each).double() for each in outputs.values()]
        parts = [each.weights * torch.stack([each.values(x, self.task) for x in p]) for each in evidence]
        return torch.stack(parts).sum(0) * len(first) / sum(each.weights.sum() for each in evidence)

    def run(self, model: nn.Module) -> Tensor:
        """Compute the outputs of a model for all batches, on the CPU."""
        with isolated(model) as run:
            parts = [run(self.reader.call(model, _move_batch(model, batch))).cpu() for batch in self.batches]
        outputs = torch.cat(parts)
        check_argument("outputs", tuple(outputs.shape), outputs.ndim <= 2, "one row for each sample, (N,) or (N, K)")
        if self.task.has_classes and look_like_probabilities(outputs):
            raise Refused("outputs should be logits, but all are from 0 to 1: take what comes before softmax.")
        if not bool(outputs.isfinite().all()):
            raise Refused("outputs should be finite, but some are nan or inf.")
        return outputs

    def find_evidence(self, model: nn.Module, shape: torch.Size) -> list[_Evidence]:
        """Find what to judge by: the reference, unless it can't be trusted, and validation labels, if wanted.

        Args:
            model: A model; batches are read as for it.
            shape: The shape of its outputs for a sample.
        """
        found = []
        with refuse_on_error("`training` gives no reference (`features=` says what it sees)", entry="comparing-models"):
            reference = self.fit_reference(model, shape)
            if reference.is_trusted:
                seen = [self.features(model, _move_batch(model, batch)) for batch in self.batches]
                q = reference.predictions(join_features(seen))
                weights = torch.full((len(q),), METRIC_WORTH / len(q), dtype=torch.float64)
                found.append(_Evidence(q, weights, reference.score))
            elif not self.validation_labels:
                skill = f"it is only {max(0.0, reference.skill):.0%} better than chance on labels that were left out"
                raise Refused(f"{skill}. Set `features=`, or `validation_labels=True`.")
        if self.validation_labels:
            with refuse_on_error("`validation_labels` can't be read", entry="comparing-models"):
                labels = [self.labels(model, _move_batch(model, batch), shape) for batch in self.batches]
                y, has_label = map(torch.cat, zip(*labels, strict=True))
                if not bool(has_label.any()):
                    raise Refused("all are -100. Set it to False.")
                found.append(_Evidence(y.double(), has_label.double()))
        return found

    def fit_reference(self, model: nn.Module, shape: torch.Size) -> Reference:
        """Fit a reference to training batches, which are read as for a model with outputs of a shape."""
        kept: KeptRows | None = None
        for batch in self.training:
            moved = _move_batch(model, batch)
            labels, has_label = self.labels(model, moved, shape)
            features = self.features(model, moved)
            kept = kept or KeptRows(max_samples(kind_of(features), math.prod(shape)))
            kept.add(features[has_label], labels[has_label])
        if kept is None or kept.size == 0:
            raise Refused("no batch has a label.")
        x, y = kept.parts()
        return fit_reference(join_features(x), torch.cat(y), self.task.name, estimator=self.estimator)

    def features(self, model: nn.Module, batch: object) -> Tensor:
        """Return what a reference sees of a batch on the model's device."""
        call = self.reader.call(model, batch)
        features = self.reader.features(model, batch, call, self.reader.size(model, call))
        if features is None:
            raise Refused("inputs are neither numbers nor token ids, with a row for each sample.")
        return features

    def labels(self, model: nn.Module, batch: object, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the labels of a batch as a matrix, ``(N, K)``, and which samples have one, ``(N,)``."""
        labels = self.reader.labels(model, batch, shape)
        return self.task.as_matrix(labels, shape.numel()), self.task.has_label(labels)


def compare_models(
    models: Mapping[str, ModelSource],
    dataloader: Iterable[object],
    *,
    training: Iterable[object],
    targets: Selector | None = None,
    features: Selector | None = None,
    reference: object = None,
    validation_labels: bool = False,
    task: str = "multiclass",
    inputs: Selector | None = None,
    outputs: Selector | None = None,
) -> Comparison:
    r"""Rank models that learned the same task, without validation labels, on the same samples.

    A reference, the best small model of the training labels, which may be noisy, stands in for validation labels,
    as for :class:`~lightning_sensitivity.RiskMonitor`. It predicts probabilities of the classes; the accuracy to
    expect is the mean probability of the class that a model chooses. See ``examples/studies`` for what it is worth.

    Args:
        models: A dict of names and models, two or more. Each model is a module, which is left as it was, or a
            function that returns one, such as ``partial(Classifier.load_from_checkpoint, path)``, which is called
            once; then only one model is in memory at a time. Each runs on its own device.
        dataloader: Batches that no model was trained on, with or without labels, all kept in memory: about a
            thousand samples are enough.
        training: The batches that the models were trained on, with labels. All are read once; what the reference
            sees of up to 50,000 rows of a table, or 10,000 images, signals or texts, is kept.
        targets: A function ``batch -> labels``; by default :func:`~lightning_sensitivity.model.select_targets`.
        features: A function ``batch -> (N, D)``, what the reference sees, such as a pretrained encoder.
        reference: An estimator of scikit-learn that takes the place of the reference's own learners: a classifier
            with ``predict_proba``, or a regressor.
        validation_labels: Combine what is expected with the value on the labels of ``dataloader``, which may be
            noisy: it is the mean of both, with a weight of m for m labels, and of 1,000 for the reference.
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``.
        inputs: A function ``batch -> arguments``; by default see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``; by default :func:`~lightning_sensitivity.model.select_outputs`.

    Returns:
        A list of :class:`~lightning_sensitivity.ModelScores`, the best one first.

    Raises:
        MisconfigurationException: If an argument is invalid, or a model fails, which is named; if the reference
            sees too little of the inputs, and there are no validation labels.

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
    _check_models(models)
    check_argument("training", training, isinstance(training, Iterable), "an iterable of batches")
    batches = list(dataloader) if isinstance(dataloader, Iterable) else []
    check_argument("dataloader", dataloader, len(batches) > 0, "an iterable of batches")
    check_argument("task", task, task in TASKS, f"one of {TASK_NAMES}")
    check_bool("validation_labels", validation_labels)
    kind = TASKS[task]
    check_estimator("reference", reference, kind)
    reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=kind)
    values = _Comparer(batches, training, kind, reader, reference, validation_labels).compare(models)
    return _rank(dict(zip(models, values, strict=True)), highest_first=kind.has_classes)


def _rank(values: Mapping[str, Tensor], highest_first: bool) -> Comparison:
    """Sort models by their mean value over samples."""
    sign = -1 if highest_first else 1
    order = sorted(values, key=lambda name: sign * float(values[name].mean()))
    found = Comparison()
    for rank, name in enumerate(order, start=1):
        worse_by = sign * (values[name] - values[order[0]])
        difference = float(worse_by.mean())
        stderr = float(worse_by.std() / math.sqrt(len(worse_by))) if len(worse_by) > 1 else math.nan
        may_be_best = not difference > _QUANTILE * stderr
        found.append(ModelScores(rank, name, float(values[name].mean()), difference, stderr, may_be_best))
    return found


def _check_models(models: Mapping[str, ModelSource]) -> None:
    """Refuse what is no dict of models, or too few of them."""
    valid = isinstance(models, Mapping) and all(isinstance(name, str) and callable(models[name]) for name in models)
    example = "such as `partial(Classifier.load_from_checkpoint, path)`"
    got = {name: type(models[name]) for name in models} if isinstance(models, Mapping) else type(models)
    check_argument("models", got, valid, f"a dict of names and models, or functions that return one, {example}")
    check_argument("models", list(models), len(models) >= 2, "2 models or more")


def _move_batch(model: nn.Module, batch: object) -> Any:
    """Copy a batch, and move it to the device of a model; the hooks of a LightningModule may also transform it."""
    module, batch = original_module(model), clone_tensors(batch)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    if not isinstance(module, LightningModule):
        return move_data_to_device(batch, device)

    def transfer(batch: object) -> object:
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module.on_after_batch_transfer(batch, 0)

    with isolated(model) as run:
        return run(transfer, batch)
