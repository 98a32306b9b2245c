"""The reference of a run: fitted once, to the training samples of all processes, and continued by a resumed fit."""

import math
from collections.abc import Mapping, Sequence

import torch
from lightning.pytorch import Trainer
from torch import Tensor

from lightning_sensitivity.arguments import describe_error
from lightning_sensitivity.callbacks.record import RiskRecord, Verdict
from lightning_sensitivity.callbacks.reporter import Reporter
from lightning_sensitivity.callbacks.training import TrainingSamples, gather
from lightning_sensitivity.functional.reference import fit_reference
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model.reader import join_kept, join_labelled, join_seen
from lightning_sensitivity.model.samples import KeptSamples

_MIN_SAMPLES = 50  # on both sides, to compare how they were prepared
_MAX_DISTANCE = 0.6  # augmentation, and half of the classes missing, stay below
_MIN_VARIANCE, _MAX_VARIANCE = 0.4, 2.5


class RunReference:
    """Stand in for the labels of the kept samples of a run.

    Args:
        task: The task.
        record: Remembers what a resumed fit continues.
        reporter: Says why there is none.

    Attributes:
        predictions: What it predicts for the kept samples of this process, ``(N, K)``, by loader.
        is_made: Whether it was tried to make one.
    """

    def __init__(self, task: Task, record: RiskRecord, reporter: Reporter) -> None:
        self.predictions: dict[int, Tensor] = {}
        self.is_made = False
        self._task = task
        self._record = record
        self._reporter = reporter
        self._known: tuple[Tensor, Tensor] | None = None  # what it learns from
        self._verdict = Verdict()  # of this process
        self._shared: set[int] = set()  # loaders whose predictions are in the record

    @property
    def shares(self) -> tuple[float, ...]:
        """The mean label of its training samples; nothing without a reference."""
        return (self._record.verdict or self._verdict).shares

    def gather(self, trainer: Trainer, training: TrainingSamples) -> None:
        """Gather the training samples of all processes; each of them must call it."""
        known = None
        try:
            known = join_labelled(training.known, self._task, training.num_outputs)
        except (RuntimeError, ValueError) as error:
            self._warn(error)
        if not trainer.strategy.reduce_boolean_decision(known is not None) or known is None:
            return
        try:
            self._known = gather(trainer, known[0], padding=-1), gather(trainer, known[1])
        except RuntimeError as error:  # the processes have inputs of different sizes, and each raises it
            self._warn(error)

    def make(self, kept: Sequence[KeptSamples], device: torch.device) -> None:
        """Fit the reference, and predict the kept samples; or find their predictions in a checkpoint."""
        self.is_made = True
        try:
            seen = {samples.dataloader_idx: join_kept(samples) for samples in kept if samples.size > 0}
            if not self._find_saved(seen) and self._known is not None:
                self._fit(*self._known, seen, device)
        except (RuntimeError, ValueError) as error:
            self._warn(error)
        finally:
            self._known = None

    def _find_saved(self, seen: Mapping[int, Tensor]) -> bool:
        """Take the predictions of the run that is continued, if the kept samples are the same."""
        found = {index: self._record.loader(index).find(_fingerprints(x)) for index, x in seen.items()}
        self.predictions = {index: q for index, q in found.items() if q is not None}
        return self._record.verdict is not None and len(self.predictions) == len(seen)

    def _fit(self, inputs: Tensor, labels: Tensor, seen: Mapping[int, Tensor], device: torch.device) -> None:
        unseen = join_seen([*seen.values()]) if seen else inputs[:0]
        reference = fit_reference(inputs.to(device), labels, unseen, self._task.name)
        sizes = [len(x) for x in seen.values()]
        self.predictions = (
            dict(zip(seen, torch.split(reference.predictions.float(), sizes), strict=True)) if seen else {}
        )
        self._verdict = Verdict.of(reference, self._task)
        self._warn_of_few_classes(labels)
        self._warn_of_preparation(inputs, unseen)

    def decide(self, trainer: Trainer) -> Verdict:
        """Return what is decided for all processes, once in a run; each of them must call it."""
        if self._record.verdict is None:
            self._record.verdict = trainer.strategy.broadcast(self._verdict)
        return self._record.verdict

    def share(self, trainer: Trainer, samples: KeptSamples, num_outputs: int) -> None:
        """Remember the predictions of all processes for a loader, once in a run; each of them must call it."""
        index = samples.dataloader_idx
        if index in self._shared or self._record.verdict is None or not self._record.verdict.has_reference:
            return
        self._shared.add(index)
        fingerprints, q = torch.zeros(0, dtype=torch.float64), torch.zeros(0, num_outputs)
        if index in self.predictions:
            fingerprints, q = _fingerprints(join_kept(samples)), self.predictions[index]
        self._record.loader(index).remember(gather(trainer, fingerprints), gather(trainer, q))

    def _warn(self, error: Exception) -> None:
        advice = "Set `features=` to a function `batch -> (N, D)`. Until then, the training score chooses."
        self._reporter.warn("features", f"has no reference: {describe_error(error)} {advice}")

    def _warn_of_few_classes(self, labels: Tensor) -> None:
        """Warn if there are more outputs than classes among the labels, as if outputs were features."""
        num_classes, num_outputs = int(labels.any(0).sum()), labels.shape[1]
        expected = num_outputs * (1 - math.exp(-len(labels) / num_outputs))  # if all are equally frequent
        if self._task.has_classes and num_outputs > 1 and num_classes < expected / 2:
            self._reporter.warn(
                "few-classes",
                f"finds only {num_classes} classes among the labels, but {num_outputs} outputs. If they are features, "
                "and the step makes logits of them, let `forward` return these.",
            )

    def _warn_of_preparation(self, inputs: Tensor, unseen: Tensor) -> None:
        """Warn if validation samples were prepared in another way than training samples, such as not normalized."""
        if min(len(inputs), len(unseen)) < _MIN_SAMPLES or not inputs.is_floating_point():
            return
        x, new_x = inputs.double().flatten(1), unseen.double().flatten(1)
        variances, new_variances = x.var(0), new_x.var(0)
        varies = variances > 0
        if not bool(varies.any()):
            return
        distance = float((x.mean(0) - new_x.mean(0)).square().sum() / variances.sum())
        median = (new_variances[varies] / variances[varies]).median()  # a column with heavy tails changes the sum
        ratios = torch.stack([new_variances.sum() / variances.sum(), median])
        ratio = float(ratios[ratios.log().abs().argmin()])
        if distance > _MAX_DISTANCE or not _MIN_VARIANCE <= ratio <= _MAX_VARIANCE:
            self._reporter.warn(
                "preparation",
                "sees validation samples that seem to be prepared in another way than training samples: their variance "
                f"is {ratio:.2g} times as large, and the squared distance of the means is {distance:.2g} of the "
                "variance. Normalize both in the same way.",
            )


def _fingerprints(seen: Tensor) -> Tensor:
    """Return a number for each sample, which other samples hardly have; padding of token ids adds nothing."""
    rows = seen.flatten(1)
    places = torch.arange(1, rows.shape[1] + 1, dtype=torch.float64)
    weights = (places * math.sqrt(2)).frac()
    shift = 0 if seen.is_floating_point() else 1  # of the padding, -1
    return torch.stack([((row + shift) * weights).sum() for row in rows.double()]) if len(rows) else weights[:0]
