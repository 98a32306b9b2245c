"""What a RiskMonitor has for one run, from the first training batch on."""

import math

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from lightning_sensitivity.callbacks.checks import BLIND
from lightning_sensitivity.callbacks.expectation import Expectation
from lightning_sensitivity.callbacks.monitor import Values
from lightning_sensitivity.callbacks.reporter import Reporter
from lightning_sensitivity.callbacks.run_reference import RunReference
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import in_32_bits
from lightning_sensitivity.model.isolation import RunIsolated, isolated
from lightning_sensitivity.model.kept import KeptSamples


class RiskRun:
    """Measure the kept samples of a run, and compute what to expect of them.

    Args:
        task: The task.
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
        task: Task,
        outputs: Tensor,
        label_shape: tuple[int, ...],
        reference: RunReference,
        expectation: Expectation,
        reporter: Reporter,
    ) -> None:
        self.label_shape = label_shape
        self.reference = reference
        self.expectation = expectation
        self._task = task
        self._no_outputs = in_32_bits(outputs[:0]).cpu()
        self._reporter = reporter
        self._of_reference: dict[int, Values] = {}  # what is expected of the reference itself, by loader

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> tuple[Tensor, Tensor]:
        """Run the model on the kept samples of a loader.

        Returns:
            Its outputs ``(N, ...)``, and labels ``(N, C)``, nan where a sample has none, on the CPU.
        """
        num_columns = self._task.num_columns(self.label_shape)
        outputs, labels = [self._no_outputs], [torch.zeros(0, num_columns, dtype=torch.float32)]  # no other default
        for batch in samples.batches:
            outputs.append(in_32_bits(run(batch.call.to(module.device))).cpu())
            if batch.labels is None:
                labels.append(torch.full((batch.size, num_columns), math.nan, dtype=torch.float32))
            else:
                labels.append(self._task.label_matrix(batch.labels, num_columns).float())
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
