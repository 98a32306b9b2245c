"""What a RiskMonitor has for one run, from the first training batch on."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.callbacks.checks import BLIND, check_class_shares, check_targets, try_loss, try_metrics
from lightning_sensitivity.callbacks.expectation import Expectation
from lightning_sensitivity.callbacks.monitor import Values
from lightning_sensitivity.callbacks.predicted import Predicted
from lightning_sensitivity.callbacks.reporter import Reporter
from lightning_sensitivity.callbacks.run_reference import RunReference
from lightning_sensitivity.functional.expected import Loss
from lightning_sensitivity.functional.tensors import in_32_bits, without_ones
from lightning_sensitivity.model.isolation import RunIsolated, isolated
from lightning_sensitivity.model.kept import KeptSamples
from lightning_sensitivity.model.reader import BatchReader, check_count


@dataclass(frozen=True)
class Options:
    """What a user has chosen.

    Attributes:
        reader: Reads batches; it knows the task.
        loss: The loss; None for that of the task.
        metrics: The metrics by name; None for those of the task.
        estimator: What is fitted as the reference; None for its own learners.
        class_shares: The shares of classes among unseen samples.
        uses_labels: Whether validation labels count.
    """

    reader: BatchReader
    loss: Loss | None
    metrics: dict[str, Metric] | None
    estimator: Any
    class_shares: Any
    uses_labels: bool


class RiskRun:
    """Measure the kept samples of a run, and compute what to expect of them.

    Args:
        options: What the user has chosen.
        outputs: Outputs of any samples, ``(N, ...)``, whose shape and type those of all processes have.
        label_shape: The shape of a label.
        reference: Stands in for labels.
        expectation: Computes values.
        reporter: Says what is doubtful.

    Attributes:
        label_shape: The shape of a label.
        reference: Stands in for labels.
        expectation: Computes values.
    """

    def __init__(
        self,
        options: Options,
        outputs: Tensor,
        label_shape: tuple[int, ...],
        reference: RunReference,
        expectation: Expectation,
        reporter: Reporter,
    ) -> None:
        self.label_shape = label_shape
        self.reference = reference
        self.expectation = expectation
        self._reader = options.reader
        self._task = options.reader.task
        self._uses_labels = options.uses_labels
        self._no_outputs = in_32_bits(outputs[:0]).cpu()
        self._reporter = reporter
        self._of_reference: dict[int, Values] = {}  # what is expected of the reference itself, by loader

    def learn(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep training samples."""
        self.reference.add(trainer, module, batch, batch_idx)
        warn_of_odd_labels(self._reader, self._reporter)

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> tuple[Tensor, Tensor]:
        """Run the model on the kept samples of a loader.

        Returns:
            Its outputs ``(N, ...)``, and labels ``(N, C)``, nan where a sample has none, on the CPU.
        """
        num_columns = self._task.num_columns(self.label_shape)
        outputs, labels = [self._no_outputs], [torch.zeros(0, num_columns, dtype=torch.float64)]  # no other default
        for batch in samples.batches:
            outputs.append(in_32_bits(run(batch.call.to(module.device))).cpu())
            if batch.labels is None:
                labels.append(torch.full((batch.size, num_columns), math.nan, dtype=torch.float64))
            else:
                labels.append(self._task.label_matrix(batch.labels, num_columns).double())
        return torch.cat(outputs), torch.cat(labels)

    def prepare(self, trainer: Trainer, kept: list[KeptSamples]) -> None:
        """See that there is a reference; every process comes here."""
        had_none = self.reference.fitted is None
        self.reference.prepare(trainer, kept)
        if had_none and self.reference.fitted is not None:
            self.expectation.warn_of_thresholds(self.reference.fitted.shares_)
            self.expectation.warn_of_unused(list(self.reference.fitted.shares_), self.reference.fitted.num_samples_)

    def compute(self, trainer: Trainer, dataloader_idx: int, outputs: Tensor, labels: Tensor) -> Values:
        """Compute what to expect on a loader of the network, and of the reference itself.

        Args:
            trainer: The Trainer.
            dataloader_idx: The index of the loader.
            outputs: Outputs ``(N, ...)`` of its samples.
            labels: Labels ``(N, C)``, nan where a sample has none.
        """
        if self._uses_labels and bool(labels.isnan().all()):
            message = (
                f"found no label in the batches of dataloader {dataloader_idx}, so labels are not used. If they have "
                "some, set `targets=`."
            )
            self._reporter.warn("labels", message, kind="none")
        unseen = self.reference.unseen.get(dataloader_idx)
        self.expectation.warn_of(dataloader_idx, outputs, unseen)
        with isolated(trainer.lightning_module) as run:  # losses and metrics may be parts of it, or draw numbers
            values: Values = run(self.expectation.values, outputs, labels, unseen)
            if unseen is not None and dataloader_idx not in self._of_reference:  # once: the samples stay the same
                self._of_reference[dataloader_idx] = {}
                with self._reporter.report_failure("can't tell what to expect of the reference", "It is left out."):
                    own = run(self.expectation.values_of_reference, outputs, labels, unseen)
                    self._of_reference[dataloader_idx] = own
        if not values:
            self._warn_if_blind(trainer)
            return {}
        return values | self._of_reference.get(dataloader_idx, {})

    def _warn_if_blind(self, trainer: Trainer) -> None:
        verdict = self.reference.verdict
        if verdict is None or verdict.is_trusted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        sees = "has seen labels of only one class" if verdict.majority == 1 else "sees too little of the inputs"
        self._reporter.warn("blind", f"logs nothing: the reference {sees}{BLIND}")


def warn_of_odd_labels(reader: BatchReader, reporter: Reporter) -> None:
    """Say which labels are no class, and how to map them."""
    for mapping in reader.odd:
        message = f"leaves out samples whose label is no class. If it means that there is none, set {mapping}."
        reporter.warn("task", message, kind=mapping)


def begin(
    options: Options,
    trainer: Trainer,
    module: LightningModule,
    batch: object,
    check_model: Callable[[RunIsolated, Any], Tensor],
    reporter: Reporter,
    saved: Predicted | None,
) -> RiskRun:
    """Check that the model can be measured on the first training batch, and that labels, loss and metrics fit.

    Args:
        options: What the user has chosen.
        trainer: The Trainer.
        module: The model.
        batch: The batch.
        check_model: Checks the model, and returns its outputs.
        reporter: Says what is doubtful.
        saved: What an earlier part of this fit has predicted.
    """
    reader, task = options.reader, options.reader.task
    reader.check_encoder(module)
    call = reader.call(module, batch)
    with isolated(module) as run, trainer.precision_plugin.val_step_context():
        outputs = check_model(run, call)
    has_any_outputs = task.has_any_outputs(options.loss)
    shape = tuple(without_ones(outputs).shape[1:])
    labels = reader.labels(module, batch, None if has_any_outputs else shape)
    is_local = has_any_outputs and outputs.shape[1:].numel() != labels.shape[1:].numel()
    shape = tuple(labels.shape[1:]) if has_any_outputs else shape
    check_count(labels, len(outputs))
    check_targets(labels, task)
    reader.check_seen(module, batch, call, labels)
    reader.groups(module, batch, len(outputs))
    num_columns = task.num_columns(shape)
    check_class_shares(options.class_shares, task, num_columns)
    metrics = task.default_metrics(num_columns) if options.metrics is None else options.metrics
    _try_values(options, metrics, module, outputs, labels, num_columns)
    like = in_32_bits(labels[:0]).to(outputs.device)
    fitted_by = options.estimator, options.class_shares, reporter
    reference = RunReference(task, reader, *fitted_by, shape, is_local, saved)
    expectation = Expectation(task, options.loss, metrics, like, reporter)
    return RiskRun(options, outputs, shape, reference, expectation, reporter)


def _try_values(
    options: Options,
    metrics: Mapping[str, Metric],
    module: LightningModule,
    outputs: Tensor,
    labels: Tensor,
    num_columns: int,
) -> None:
    """Try the metrics, and the loss, on the samples that have labels."""
    task = options.reader.task
    counts = task.has_label(labels)
    if not bool(counts.any()):
        return
    y = task.label_matrix(labels, num_columns)
    try_metrics(metrics, task.output_matrix(outputs.cpu())[counts], y[counts], task)
    if options.loss is not None:
        like = in_32_bits(labels).to(outputs.device)
        with isolated(module) as run:
            run(try_loss, options.loss, in_32_bits(outputs)[counts], task.filled(like[counts]))
