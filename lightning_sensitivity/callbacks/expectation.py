"""What a validation of a RiskMonitor does: run the network on kept samples, and say what to expect."""

import math
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryFBetaScore

from lightning_sensitivity.arguments import describe_error
from lightning_sensitivity.callbacks.checks import BLIND, EXPECTED, check_outputs
from lightning_sensitivity.callbacks.monitor import Monitor, Values
from lightning_sensitivity.callbacks.run_reference import RunReference, Unseen
from lightning_sensitivity.functional.expected import all_values, join_values, uncertainty
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.functional.tensors import may_be_probabilities
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import KeptSamples

_NUM_LABELLED = 2000  # validation samples that are kept if they have labels, over all processes
_SOME_VALIDATIONS = 3  # after which a network is better than a constant prediction
_FALLING = 0.9  # of the last score: below, a network is still learning


class ExpectationMonitor(Monitor):
    """The base of RiskMonitor, which measures the network in each validation, and remembers the values."""

    def __init__(
        self,
        reader: BatchReader,
        task: Task,
        metrics: dict[str, Metric],
        validation_labels: bool,
        estimator: Any,
        class_shares: Any,
        **options: Any,
    ) -> None:
        super().__init__(reader, **options)
        if validation_labels and self.num_samples is not None:
            self.num_samples = max(self.num_samples, _NUM_LABELLED)
        self.task = task
        self.metrics = metrics
        self.validation_labels = validation_labels
        self.history: list[dict[str, Any]] = []
        self._estimator = estimator
        self._class_shares = class_shares
        self._reference = self._new_reference()
        self._num_bad = 0  # validations in which a regression was worse than a constant prediction
        self._last_score = 0.0  # of it

    def _new_reference(self) -> RunReference:
        return RunReference(self.task, self.reader, self._estimator, self._class_shares, self.reporter)

    @property
    def directions(self) -> dict[str, bool]:
        """Whether the highest value is the best, by name without the prefix."""
        of_metrics = {EXPECTED + name: bool(metric.higher_is_better) for name, metric in self.metrics.items()}
        return {f"{EXPECTED}score": False} | of_metrics

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs of which nothing can be expected."""
        check_outputs(outputs, self.task)

    def _free(self) -> None:
        super()._free()
        self._reference.free()

    # A validation

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether every process has its training samples; a sanity check needs none."""
        return trainer.sanity_checking or (trainer.state.fn == TrainerFn.FITTING and self._reference.is_ready(trainer))

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch, with its labels if they are wanted."""
        kept = self.reader.keep(module, batch, batch_idx, samples.num_wanted, samples.max_bytes)
        if self.validation_labels and self.reader.may_have_labels(module, batch):
            try:
                kept.labels = self.reader.kept_labels(module, batch, kept, self._reference.output_shape)
            except MisconfigurationException as error:
                self.reporter.warn("labels", f"treats some validation batches as unlabelled: {describe_error(error)}")
        samples.add(kept)

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> tuple[Tensor, ...]:
        """Run the model on the kept samples of a loader.

        Returns:
            Its outputs ``(N, C)``, and labels ``(N, C)``, nan where a sample has none, on the CPU.
        """
        if self._reference.output_shape is None:  # a sanity check, which logs nothing
            return tuple(run(batch.call.to(module.device)) for batch in samples.batches)
        num_columns = self.task.num_columns(self._reference.output_shape)
        empty = torch.zeros(0, num_columns, dtype=torch.float32)  # a Trainer's precision changes the default
        outputs, labels = [empty], [empty]
        for batch in samples.batches:
            outputs.append(self.task.as_outputs(run(batch.call.to(module.device)).float().cpu()))
            y = torch.full((batch.size, num_columns), math.nan, dtype=torch.float32)
            if batch.labels is not None:
                counts = self.task.has_label(batch.labels)
                y[counts] = self.task.as_matrix(batch.labels, num_columns).float()[counts]
            labels.append(y)
        return torch.cat(outputs), torch.cat(labels)

    def prepare(self, trainer: Trainer) -> None:
        """Make the reference in the first validation that can have values; every process comes here."""
        if not self._reference.is_made:
            self._reference.make(trainer, self.samples)
            self._warn_of_thresholds()

    def compute_values(self, trainer: Trainer, dataloader_idx: int, *rows: Tensor) -> Values:
        """Compute what to expect on a loader, over all processes."""
        outputs, labels = rows
        has_label, is_finite = ~labels.isnan().any(1), self._is_finite(outputs)
        self._warn_of_samples(dataloader_idx, outputs, has_label)
        if len(outputs) > 0 and not bool(is_finite.any()):
            return dict.fromkeys(self.names, math.nan)
        counts = has_label & is_finite
        num_labels = int(counts.sum())
        unseen = self._reference.unseen.get(dataloader_idx)
        if unseen is None and num_labels == 0:
            self._warn_if_blind(trainer)
            return {}
        found = self._by_labels(outputs[counts], labels[counts])
        if unseen is not None:
            found = join_values(self._expect(dataloader_idx, outputs, unseen), found, num_labels, self.task)
        named = {EXPECTED + name: found[name] for name in ("score", *self.metrics) if not math.isnan(found[name])}
        reference = None if unseen is None else unseen.score
        return named | {"temperature": found["temperature"], "num_labels": num_labels, "reference": reference}

    def _is_finite(self, outputs: Tensor) -> Tensor:
        """Return which samples have finite predictions, ``(N,)``; a logit of -inf masks a class."""
        return self.task.predictions(outputs).isfinite().all(1)

    def _by_labels(self, outputs: Tensor, y: Tensor) -> dict[str, float]:
        """Compute the values by labels, of which there may be none."""
        drawn = self.task.classes(y) if self.task.has_classes else y
        return all_values(outputs, y, drawn[None], self.metrics, self.task)

    def _expect(self, dataloader_idx: int, outputs: Tensor, unseen: Unseen) -> dict[str, float]:
        """Compute what to expect by labels that were drawn once from the predictions of the reference."""
        outputs = outputs[unseen.rows]
        is_finite = self._is_finite(outputs)
        outputs, q, draws = outputs[is_finite], unseen.q[is_finite], unseen.draws[:, is_finite]
        expected = all_values(outputs, q, draws, self.metrics, self.task)
        if dataloader_idx == 0 and not self.task.has_classes:
            self._warn_of_targets(expected["score"], by_mean=float(q.var(0, correction=0).mean()))
        expected["score"] += uncertainty(q, self.task, unseen.score)
        return expected

    def remember(self, trainer: Trainer, dataloader_idx: int, values: Values) -> None:
        """Add a row to the history, with the left-out score of the reference, by which it is known."""
        row: Values = {"epoch": trainer.current_epoch, "step": trainer.global_step, "dataloader_idx": dataloader_idx}
        self.history.append({**row, "reference": None, "num_labels": 0, **values})

    # Warnings

    def _warn_of_thresholds(self) -> None:
        """Warn of an F score whose threshold hardly any sample reaches, since positives are few."""
        shares = [] if self._reference.fitted is None else self._reference.fitted.shares_
        for name, metric in self.metrics.items():
            if isinstance(metric, BinaryFBetaScore) and len(shares) == 2 and metric.threshold > 2 * shares[1]:
                message = (
                    f"expects `{name}` at a threshold of {metric.threshold:g}, though only {shares[1]:.0%} of the "
                    f"labels are positive, so that few samples reach it. Set `threshold={shares[1]:.2f}`."
                )
                self.reporter.warn("metrics", message)

    def _warn_of_targets(self, score: float, by_mean: float) -> None:
        """Warn if a regression is worse than its mean in several validations, and does not improve."""
        is_bad = score > max(by_mean, _FALLING * self._last_score)
        self._last_score = score
        self._num_bad = self._num_bad + 1 if is_bad else 0
        if self._num_bad == _SOME_VALIDATIONS:
            message = (
                f"finds the network worse than a constant prediction in {self._num_bad} validations. If your step "
                "scales targets or takes logarithms, do the same in `targets=`."
            )
            self.reporter.warn("targets", message)

    def _warn_of_samples(self, dataloader_idx: int, outputs: Tensor, has_label: Tensor) -> None:
        where, is_finite = f"dataloader {dataloader_idx}", self._is_finite(outputs)
        if self.task.has_classes and may_be_probabilities(outputs[is_finite]):
            self.warn_of_probabilities()
        num_non_finite = int((~is_finite).sum())
        if num_non_finite > 0:
            message = f"on {where}: {num_non_finite} samples gave nan or inf, and were left out."
            self.reporter.warn("nan", message, kind=str(dataloader_idx))
        if self.validation_labels and not bool(has_label.any()):
            message = (
                f"found no label in the batches of {where}, so labels are not used. If they have some, set `targets=`."
            )
            self.reporter.warn("labels", message, kind="none")

    def _warn_if_blind(self, trainer: Trainer) -> None:
        verdict = self._reference.verdict
        if verdict is None or verdict.is_trusted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        sees = "has seen labels of only one class" if verdict.majority == 1 else "sees too little of the inputs"
        self.reporter.warn("blind", f"logs nothing: the reference {sees}{BLIND}")
