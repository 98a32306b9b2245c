"""Rank models without validation labels: by how often a reference disagrees with each."""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor, nn

from lightning_sensitivity.arguments import Refused, Selector, check_argument, check_bool, explained
from lightning_sensitivity.compat import original_module
from lightning_sensitivity.functional.criterion import LABELS_OF_REFERENCE
from lightning_sensitivity.functional.reference import MAX_SAMPLES, fit_reference
from lightning_sensitivity.functional.sensitivity import diagnostics, sensitivity_from_rows, sensitivity_rows
from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS, Task
from lightning_sensitivity.functional.tensors import may_be_probabilities, num_outputs
from lightning_sensitivity.model.batches import clone_tensors
from lightning_sensitivity.model.call import device_of
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.perturbation import Noise, NoiseFunction, check_noise, noisy_outputs, submodule
from lightning_sensitivity.model.reader import BatchReader, join_kept, join_labelled
from lightning_sensitivity.model.samples import KeptBatch, KeptSamples

ModelSource = nn.Module | Callable[[], nn.Module]
_QUANTILE = 1.96  # of the normal distribution, for 95 %


class ModelScores(NamedTuple):
    """Hold the scores of one model.

    Attributes:
        rank: Its place; 1 is the best.
        name: The name that the user gave it.
        disagreement: The share of samples whose class is not the reference's; in a regression, the mean squared
            difference. It ranks models, and is no error rate. With validation labels, it is combined with the
            error on these.
        difference: By how much it is above that of the first model.
        difference_stderr: The standard error of that, paired by sample.
        may_be_best: Whether the samples are too few to tell it from the first model: the 95 % interval of
            ``difference`` holds 0.
        sensitivity: S, in squared units of the outputs; nan with ``noise=None``.
        sensitivity_stderr: Its standard error, over samples and noise.
    """

    rank: int
    name: str
    disagreement: float
    difference: float
    difference_stderr: float
    may_be_best: bool
    sensitivity: float
    sensitivity_stderr: float


class Comparison(list[ModelScores]):
    """List the scores of models. ``print`` shows a table; ``pandas.DataFrame`` takes the list as it is."""

    def __repr__(self) -> str:
        """Lay out the table."""
        rows = ([f"{x:.3g}" if isinstance(x, float) else str(x) for x in model] for model in self)
        lines = [ModelScores._fields, *rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


@dataclass(frozen=True)
class _Measurer:
    """Read the same batches for one model after another; see :func:`compare_models`."""

    batches: Sequence[object]
    training: Iterable[object]
    task: Task
    reader: BatchReader
    noise: NoiseFunction | None
    at: str | None
    validation_labels: bool

    def measure_all(self, models: Mapping[str, ModelSource]) -> tuple[Tensor, dict[str, Tensor]]:
        """Measure one model after another.

        Returns:
            What each loses on each sample, ``(M, N)``; and their rows of sensitivity.
        """
        p: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        q, labels = torch.zeros(0), None
        for name, source in models.items():
            with explained(f"Model {name!r} can't be compared", entry="comparing-models"):
                model = source if isinstance(source, nn.Module) else source()
                check_argument("models", model, isinstance(model, nn.Module), "modules, or functions that return one")
                p[name], rows[name] = self.measure(model)
            if len(p) == 1:
                with explained("`training` gives no reference", entry="comparing-models"):
                    q = self.predict_by_reference(model, p[name].shape[1])
                labels = self.read_labels(model, p[name].shape[1]) if self.validation_labels else None
            del model
            gc.collect()  # modules contain reference cycles, and the next model needs their memory
        sizes = {name: each.shape[1] for name, each in p.items()}
        check_argument("models", sizes, len({*sizes.values()}) == 1, "models with the same number of outputs")
        return self.losses(torch.stack(list(p.values())), q, labels), rows

    def losses(self, p: Tensor, q: Tensor, labels: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return what each model loses on each sample, ``(M, N)``.

        Args:
            p: The predictions of each model, ``(M, N, K)``.
            q: The predictions of the reference, ``(N, K)``; nan if it can't be trusted.
            labels: What :meth:`read_labels` returns.
        """
        expected = "different models (in a loop, `lambda: load(path)` loads the last path: take `partial(load, path)`)"
        check_argument("models", "equal outputs of all", not bool((p == p[0]).all()), expected)
        losses = self._losses_of(p, q)
        if labels is None:
            return losses
        y, counts = labels
        errors = self._losses_of(p, y) * counts
        weight = 0 if bool(q.isnan().any()) else LABELS_OF_REFERENCE
        # The mean of the first summand over all samples is the number of errors on labels.
        return (len(counts) * errors + (weight * losses if weight else 0)) / (counts.sum() + weight)

    def _losses_of(self, p: Tensor, y: Tensor) -> Tensor:
        if self.task.has_classes:
            return (self.task.classes(p) != self.task.classes(y)).double()
        return torch.stack([self.task.distances(each, y) for each in p])

    def measure(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Compute the predictions of a model, ``(N, K)``, and its rows of sensitivity, none without noise."""
        parts = [self._measure_batch(model, index, batch) for index, batch in enumerate(self.batches)]
        outputs, rows = map(torch.cat, zip(*parts, strict=True))
        _check_outputs(outputs, self.task)
        return self.task.predictions(outputs).double(), rows

    def _measure_batch(self, model: nn.Module, index: int, batch: object) -> tuple[Tensor, Tensor]:
        """Return the outputs for a batch, and the rows of sensitivity."""
        call = self.reader.call(model, _move_batch(model, batch))
        with isolated(model) as run:
            outputs: Tensor = run(call)
            rows = torch.zeros(0, 5, dtype=torch.float64)
            if self.noise is not None:
                at = None if self.at is None else submodule(model, self.at)
                noisy = noisy_outputs(run, call, self.noise, (0, 0, 0, index), 1, at)  # always the same noise
                rows = sensitivity_rows(outputs, noisy).cpu()
        return outputs.cpu(), rows

    def predict_by_reference(self, model: nn.Module, num_outputs: int) -> Tensor:
        """Fit a reference to training batches, which are read as for a model, and predict: ``(N, K)``.

        Returns:
            Its predictions; nan if it can't be trusted, and there are validation labels.
        """
        known, unseen = KeptSamples(MAX_SAMPLES), KeptSamples(math.inf, max_bytes=math.inf)
        for index, batch in enumerate(self.training):
            if known.wants(index):
                known.add(self._keep(model, batch, index, num_outputs))
        for index, batch in enumerate(self.batches):
            unseen.add(self._keep(model, batch, index))
        has_labels = any(bool(self.task.has_label(labels).any()) for labels in known.labels)
        check_argument("training", "none", has_labels, "batches with labels")
        with explained("set `features=` to a function `batch -> (N, D)`, since its inputs fail"):
            inputs, labels = join_labelled(known, self.task, num_outputs)
            reference = fit_reference(inputs, labels, join_kept(unseen), self.task.name)
        if reference.is_trusted:
            return reference.predictions
        if not self.validation_labels:
            skill = f"it is {reference.skill:.0%} better than chance"
            raise Refused(f"it sees too little of the inputs ({skill}): set `features=`, or `validation_labels=True`.")
        return torch.full_like(reference.predictions, torch.nan)

    def _keep(self, model: nn.Module, batch: object, index: int, num_outputs: int | None = None) -> KeptBatch:
        """Keep what a reference sees of a batch, and its labels, if there is a number of outputs that they fit."""
        batch = _move_batch(model, batch)
        call = self.reader.call(model, batch)
        labels = None if num_outputs is None else self.reader.labels(model, batch, self._shape(num_outputs))
        size = self.reader.size(model, call) if labels is None else len(labels)
        return KeptBatch(index, size, labels=labels, seen=self.reader.seen(model, batch, call, size))

    def _shape(self, num_outputs: int) -> tuple[int, ...]:
        return () if self.task.has_one_output else (num_outputs,)

    def read_labels(self, model: nn.Module, num_outputs: int) -> tuple[Tensor, Tensor]:
        """Read validation labels: as a matrix, ``(N, K)``, and 1 for those that count, ``(N,)``."""
        with explained("`validation_labels` can't be read", entry="comparing-models"):
            moved = (_move_batch(model, batch) for batch in self.batches)
            labels = torch.cat([self.reader.labels(model, batch, self._shape(num_outputs)) for batch in moved])
        counts = self.task.has_label(labels)
        check_argument("validation_labels", True, bool(counts.any()), "False, since all labels are -100")
        return self.task.as_matrix(labels, num_outputs).double(), counts.double()


def compare_models(
    models: Mapping[str, ModelSource],
    dataloader: Iterable[object],
    *,
    training: Iterable[object],
    targets: Selector | None = None,
    features: Selector | None = None,
    validation_labels: bool = False,
    noise: Noise | None = 0.1,
    at: str | None = None,
    task: str = "multiclass",
    inputs: Selector | None = None,
    outputs: Selector | None = None,
) -> Comparison:
    r"""Rank models that learned the same task, without validation labels, on the same samples.

    A reference, a small model of the training labels, which may be noisy, stands in for validation labels, as for
    :class:`~lightning_sensitivity.RiskMonitor`. A model is the better, the less often its class is not the
    reference's; see ``examples/studies/comparing`` for what it is worth. Output sensitivity, as defined by
    Forouzesh, Salehi and Thiran (ICPR 2020, arXiv:2007.15378), is listed, but does not rank.

    Args:
        models: A dict of names and models, two or more. Each model is a module, which is left as it was, or a
            function that returns one, such as ``partial(Classifier.load_from_checkpoint, path)``, which is called
            once; then only one model is in memory at a time. Each runs on its own device.
        dataloader: Batches that no model was trained on, with or without labels, all kept in memory: about a
            thousand samples are enough.
        training: The batches that the models were trained on, with labels. All are read once; what the reference
            sees of up to 3,000 samples is kept.
        targets: A function ``batch -> labels``; by default :func:`~lightning_sensitivity.model.select_targets`.
        features: A function ``batch -> (N, D)``, what the reference sees, such as a pretrained encoder.
        validation_labels: Combine the rank with the error on the labels of ``dataloader``, which may be noisy:
            with m labels, it is the mean of the error, with weight m, and of the disagreement, with weight 200.
        noise: σ of Gaussian noise in the units of the models' inputs, one number or one per channel, or a
            function ``(x, generator) -> x'``, the same for all models; None for no sensitivity.
        at: Name of a submodule that all models have; its output is perturbed instead of the input.
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
    check_argument("dataloader", dataloader, isinstance(dataloader, Iterable), "an iterable of batches")
    check_argument("task", task, task in TASKS, f"one of {TASK_NAMES}")
    check_argument("at", at, isinstance(at, str | None), "a submodule's name or None")
    check_bool("validation_labels", validation_labels)
    reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=TASKS[task])
    batches = list(dataloader)
    check_argument("dataloader", batches, len(batches) > 0, "an iterable of batches")
    noise = None if noise is None else check_noise(noise)
    return _rank(*_Measurer(batches, training, TASKS[task], reader, noise, at, validation_labels).measure_all(models))


def _rank(losses: Tensor, rows: Mapping[str, Tensor]) -> Comparison:
    """Sort models by their mean loss."""
    names, order = list(rows), losses.mean(1).argsort(stable=True)
    found = Comparison()
    for place, index in enumerate(order.tolist()):
        estimate = sensitivity_from_rows(rows[names[index]])
        for message, _ in diagnostics(estimate).values():
            rank_zero_warn(f"Model {names[index]!r}: {message}")
        differences = losses[index] - losses[order[0]]
        stderr = float(differences.std() / math.sqrt(len(differences))) if len(differences) > 1 else math.nan
        found.append(
            ModelScores(
                rank=place + 1,
                name=names[index],
                disagreement=float(losses[index].mean()),
                difference=float(differences.mean()),
                difference_stderr=stderr,
                may_be_best=not float(differences.mean()) > _QUANTILE * stderr,
                sensitivity=float(estimate.value),
                sensitivity_stderr=float(estimate.stderr),
            )
        )
    return found


def _check_models(models: Mapping[str, ModelSource]) -> None:
    """Refuse what is no dict of models, or too few of them."""
    valid = isinstance(models, Mapping) and all(isinstance(name, str) and callable(models[name]) for name in models)
    example = "such as `partial(Classifier.load_from_checkpoint, path)`"
    got = {name: type(models[name]) for name in models} if isinstance(models, Mapping) else type(models)
    check_argument("models", got, valid, f"a dict of names and models, or functions that return one, {example}")
    check_argument("models", list(models), len(models) >= 2, "2 models or more")


def _check_outputs(outputs: Tensor, task: Task) -> None:
    """Refuse outputs that do not fit the task, or are no logits."""
    is_single = num_outputs(outputs) == 1
    fits = math.prod(outputs.shape[2:]) == 1 and (not task.has_classes or is_single == task.has_one_output)
    expected = "one logit" if task.has_one_output else "a logit of each class"
    check_argument("outputs", tuple(outputs.shape), fits, f"{expected} for each sample (`task={task.name!r}`)")
    is_logit = not task.has_classes or not may_be_probabilities(outputs)
    check_argument("outputs", "numbers from 0 to 1", is_logit, "logits")
    check_argument("outputs", "nan or inf", bool(outputs.isfinite().all()), "finite")


def _move_batch(model: nn.Module, batch: object) -> Any:
    """Copy a batch, and move it to the device of a model; the hooks of a LightningModule may also transform it."""
    device, module, batch = device_of(model), original_module(model), clone_tensors(batch)
    if not isinstance(module, LightningModule):
        return move_data_to_device(batch, device)
    with isolated(model):  # a hook may draw random numbers
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module.on_after_batch_transfer(batch, 0)
