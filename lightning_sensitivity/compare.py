"""Rank models without labels: by how often a jury of all of them, and of a reference, disagrees with each."""

import gc
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device, rank_zero_warn
from torch import Tensor, nn

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, explained
from lightning_sensitivity.compat import original_module
from lightning_sensitivity.functional.consensus import as_good_as_first, jury_classes
from lightning_sensitivity.functional.sensitivity import diagnostics, sensitivity_from_rows, sensitivity_rows
from lightning_sensitivity.functional.tasks import TASKS, Task
from lightning_sensitivity.functional.tensors import may_be_probabilities, num_outputs
from lightning_sensitivity.model.batches import clone_tensors
from lightning_sensitivity.model.call import device_of
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.perturbation import Noise, NoiseFunction, check_noise, noisy_outputs, submodule
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.reference import fit_to_samples, keep_training_samples

ModelSource = nn.Module | Callable[[], nn.Module]
LABEL_WEIGHT = 100  # the number of validation labels that count as much as the jury


class ModelScores(NamedTuple):
    """Hold the scores of one model.

    Attributes:
        rank: Its place; 1 is the best.
        name: The name that the user gave it.
        disagreement: The share of samples for which the jury predicts another class. It ranks models, and is no
            error rate. With validation labels, it is combined with the error on these.
        may_be_best: Whether the samples are too few to tell it from the first model: the 95 % interval of their
            difference, by a paired bootstrap over samples, holds 0.
        sensitivity: S, in squared units of the outputs; nan with ``noise=None``.
        sensitivity_stderr: Its standard error, over samples and noise.
    """

    rank: int
    name: str
    disagreement: float
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
    task: Task
    reader: BatchReader
    noise: NoiseFunction | None
    at: str | None

    def measure_all(
        self, models: Mapping[str, ModelSource], training: Iterable[object] | None, validation_labels: bool
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Measure one model after another.

        Returns:
            What each loses on each sample, ``(M, N)``; and their rows of sensitivity.
        """
        p: dict[str, Tensor] = {}
        rows: dict[str, Tensor] = {}
        reference, labels = None, None
        no_reference = "`training` gives no reference (set `features=`, or leave it out)"
        for name, source in models.items():
            with explained(f"Model {name!r} can't be compared", entry="comparing-models"):
                model = source if isinstance(source, nn.Module) else source()
                check_argument("models", model, isinstance(model, nn.Module), "modules, or functions that return one")
                p[name], rows[name] = self.measure(model)
            if len(p) == 1 and training is not None:
                with explained(no_reference, entry="comparing-models"):
                    reference = self.fit_reference(model, training, p[name].shape[1])
            if len(p) == 1 and validation_labels:
                labels = self.read_labels(model, p[name].shape[1])
            del model
            gc.collect()  # modules contain reference cycles, and the next model needs their memory
        sizes = {name: each.shape[1] for name, each in p.items()}
        check_argument("models", sizes, len({*sizes.values()}) == 1, "models with the same number of outputs")
        return self.losses(torch.stack(list(p.values())), reference, labels), rows

    def losses(self, p: Tensor, reference: tuple[Tensor, float] | None, labels: tuple[Tensor, Tensor] | None) -> Tensor:
        """Let the jury vote, and return what each model loses on each sample, ``(M, N)``.

        Args:
            p: The probabilities of each model, ``(M, N, K)``.
            reference: What :meth:`fit_reference` returns.
            labels: What :meth:`read_labels` returns.
        """
        decisions = self.task.decisions(p)
        expected = "different models (in a loop, `lambda: load(path)` loads the last path: take `partial(load, path)`)"
        check_argument("models", "equal outputs of all", not bool((decisions == decisions[0]).all()), expected)
        seat = () if reference is None else (self.task.decisions(reference[0]), reference[1])
        classes = decisions.argmax(-1)
        losses = (classes != jury_classes(decisions, *seat)).double().mean(-1)
        return losses if labels is None else self.combine_with_labels(losses, classes, *labels)

    def combine_with_labels(self, losses: Tensor, classes: Tensor, y: Tensor, counts: Tensor) -> Tensor:
        """Combine what models lose on each sample, ``(M, N)``, with errors on labels; see :meth:`read_labels`."""
        errors = (classes != self.task.decisions(y).argmax(-1)).double().mean(-1) * counts
        # The mean of the first summand over all samples is the number of errors on labels.
        return (len(counts) * errors + LABEL_WEIGHT * losses) / (counts.sum() + LABEL_WEIGHT)

    def measure(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """Compute the probabilities of a model, ``(N, K)``, and its rows of sensitivity, none without noise."""
        parts = [self._measure_batch(model, index, batch) for index, batch in enumerate(self.batches)]
        outputs, rows = map(torch.cat, zip(*parts, strict=True))
        _check_outputs(outputs, self.task)
        return self.task.probabilities(outputs).flatten(1), rows

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

    def fit_reference(self, model: nn.Module, training: Iterable[object], num_classes: int) -> tuple[Tensor, float]:
        """Fit a reference to training batches, which are read as for a model.

        Returns:
            Its probabilities, ``(N, K)``, and the share of the training samples that it knows.
        """
        moved = (_move_batch(model, batch) for batch in training)
        kept, num_training = keep_training_samples(self.reader, model, moved, (num_classes,))
        check_argument("training", f"{num_training} labels", num_training > 0, "batches with labels")
        unseen = [self.reader.keep(model, _move_batch(model, batch), i) for i, batch in enumerate(self.batches)]
        reference = fit_to_samples(kept, unseen, num_classes, self.task)
        return reference.predictions, reference.num_samples / num_training

    def read_labels(self, model: nn.Module, num_classes: int) -> tuple[Tensor, Tensor]:
        """Read validation labels: their probabilities, ``(N, K)``, and 1 for those that count, ``(N,)``."""
        moved = (_move_batch(model, batch) for batch in self.batches)
        labels = torch.cat([self.reader.labels(model, batch, (num_classes,)) for batch in moved])
        y, counts = self.task.target_probabilities(torch.zeros(len(labels), num_classes), labels)
        check_argument("validation_labels", True, bool(counts.any()), "False, since all labels are -100")
        return y, counts


def compare_models(
    models: Mapping[str, ModelSource],
    dataloader: Iterable[object],
    *,
    training: Iterable[object] | None = None,
    targets: Selector | None = None,
    features: Selector | None = None,
    validation_labels: bool = False,
    noise: Noise | None = 0.1,
    at: str | None = None,
    task: str = "multiclass",
    inputs: Selector | None = None,
    outputs: Selector | None = None,
) -> Comparison:
    r"""Rank models that learned the same task, without labels, on the same samples.

    The models vote on the class of each sample. With ``training``, a reference has a seat in this jury: a small
    model of the training labels, which may be noisy, as that of :class:`~lightning_sensitivity.RiskMonitor`. A
    model is the better, the less often the jury disagrees with it; see
    :func:`~lightning_sensitivity.functional.consensus.jury_classes`, and ``examples/studies/comparing`` for what
    it is worth. Output sensitivity, as defined by Forouzesh, Salehi and Thiran (ICPR 2020, arXiv:2007.15378),
    is listed, but does not rank.

    Args:
        models: A dict of names and models, two or more, and three or more without ``training``. Each model is a
            module, which is left as it was, or a function that returns one, such as
            ``partial(Classifier.load_from_checkpoint, path)``, which is called once; then only one model is in
            memory at a time. Each runs on its own device.
        dataloader: Batches, with or without labels, all kept in memory: about a thousand samples are enough.
        training: The batches that the models were trained on, with labels. All are read once; up to 1,000
            samples are kept.
        targets: A function ``batch -> labels``; by default :func:`~lightning_sensitivity.model.select_targets`.
        features: A function ``batch -> (N, D)`` for the reference, such as a pretrained encoder.
        validation_labels: Combine the rank with the error on the labels of ``dataloader``, which may be noisy:
            with m labels, it is the mean of the error, with weight m, and of the disagreement, with weight 100.
        noise: σ of Gaussian noise in the units of the models' inputs, one number or one per channel, or a
            function ``(x, generator) -> x'``, the same for all models; None for no sensitivity.
        at: Name of a submodule that all models have; its output is perturbed instead of the input.
        task: The kind of classification: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        inputs: A function ``batch -> arguments``; by default see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``; by default :func:`~lightning_sensitivity.model.select_outputs`.

    Returns:
        A list of :class:`~lightning_sensitivity.ModelScores`, the best one first.

    Raises:
        MisconfigurationException: If an argument is invalid, or a model fails, which is named.

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
    _check_models(models, training)
    check_argument("training", training, isinstance(training, Iterable | None), "an iterable of batches, or None")
    check_argument("dataloader", dataloader, isinstance(dataloader, Iterable), "an iterable of batches")
    check_argument("task", task, task in TASKS, f"one of {', '.join(map(repr, TASKS))}")
    check_argument("at", at, isinstance(at, str | None), "a submodule's name or None")
    check_bool("validation_labels", validation_labels)
    reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=TASKS[task])
    batches = list(dataloader)
    check_argument("dataloader", batches, len(batches) > 0, "an iterable of batches")
    measurer = _Measurer(batches, TASKS[task], reader, None if noise is None else check_noise(noise), at)
    return _rank(*measurer.measure_all(models, training, validation_labels))


def _rank(losses: Tensor, rows: Mapping[str, Tensor]) -> Comparison:
    """Sort models by their mean loss."""
    names, order = list(rows), losses.mean(1).argsort(stable=True)
    may_be_best = as_good_as_first(losses[order])
    found = Comparison()
    for place, index in enumerate(order.tolist()):
        estimate = sensitivity_from_rows(rows[names[index]])
        for message, _ in diagnostics(estimate).values():
            rank_zero_warn(f"Model {names[index]!r}: {message}")
        scores = float(losses[index].mean()), bool(may_be_best[place]), float(estimate.value), float(estimate.stderr)
        found.append(ModelScores(place + 1, names[index], *scores))
    return found


def _check_models(models: Mapping[str, ModelSource], training: Iterable[object] | None) -> None:
    """Refuse what is no dict of models, or too few of them."""
    valid = isinstance(models, Mapping) and all(isinstance(name, str) and callable(models[name]) for name in models)
    example = "such as `partial(Classifier.load_from_checkpoint, path)`"
    got = {name: type(models[name]) for name in models} if isinstance(models, Mapping) else type(models)
    check_argument("models", got, valid, f"a dict of names and models, or functions that return one, {example}")
    fewest = 3 if training is None else 2
    expected = f"{fewest} models or more" + ", or 2 with `training=`" * (training is None)
    check_argument("models", list(models), len(models) >= fewest, expected)


def _check_outputs(outputs: Tensor, task: Task) -> None:
    """Refuse outputs that do not say which classes a sample has."""
    fits = (num_outputs(outputs) == 1) == task.has_one_output and math.prod(outputs.shape[2:]) == 1
    expected = "one logit" if task.has_one_output else "a logit of each class"
    check_argument("outputs", tuple(outputs.shape), fits, f"{expected} for each sample (`task={task.name!r}`)")
    check_argument("outputs", "numbers from 0 to 1", not may_be_probabilities(outputs), "logits")
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
