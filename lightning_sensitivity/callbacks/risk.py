"""The callback that logs what to expect of unseen samples, and so what to stop by."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

import lightning_sensitivity.callbacks.checks as checks
from lightning_sensitivity import compat
from lightning_sensitivity.callbacks.monitor import Monitor
from lightning_sensitivity.callbacks.run import agree, is_fitting
from lightning_sensitivity.callbacks.run_reference import RunReference, Stage
from lightning_sensitivity.compat import PlotType
from lightning_sensitivity.expected.expectation import Expectation, Known
from lightning_sensitivity.expected.record import EXPECTED, KEYS, History, Predictions, Values, plot_history
from lightning_sensitivity.expected.summary import Curve, summarize, why_blind
from lightning_sensitivity.functional.expected import Loss
from lightning_sensitivity.functional.tasks import AnyMetric
from lightning_sensitivity.functional.tensors import in_32_bits, without_ones
from lightning_sensitivity.messages import Refused, Selector, check_bool, check_task
from lightning_sensitivity.reading.kept import KeptBatch, KeptSamples
from lightning_sensitivity.reading.reader import BatchReader, check_count, check_logits
from lightning_sensitivity.running.call import Function
from lightning_sensitivity.running.isolation import RunIsolated, isolated, isolated_with

_NUM_LABELLED = 2000  # validation samples that are kept if they have labels, over all processes


class RiskMonitor(Monitor):
    r"""A callback that logs what to expect of unseen samples in every validation, without their labels.

    From the first whole epoch on, a model of the training labels, the *reference*, stands in for validation labels.
    Logged are ``expected_loss``, ``expected_accuracy`` and ``expected_auroc``, or ``expected_<name>`` of ``metrics``.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``.
        loss: A function of outputs and labels, which returns the mean over samples, or a number for each.
        metrics: Torchmetrics by name.
        targets: ``batch -> labels``; -100 is unknown, in a regression nan, of several labels both.
        validation_labels: Use validation labels beside the reference.
        features: What the reference sees of the inputs: a pretrained ``nn.Module``, or ``batch -> (N, D)``.
        reference: An estimator of scikit-learn in place of its own learners.
        groups: ``batch -> (N,)``, such as the patient, if unseen samples are of others.
        class_shares: The class shares of unseen samples, if training has others.
        num_samples: Validation samples per loader; with labels at least 2,000; None for all.
        prefix: Prefix of the logged names.
        inputs: ``batch -> arguments``; see :class:`~lightning_sensitivity.running.ModelCall`.
        outputs: ``result -> logits``, ``(N, K)`` or ``(N,)``.
        call: ``(module, batch) -> result`` in place of ``forward``.

    Attributes:
        history: A dict for each validation and loader.
        summary: What the last line says, as a dict.

    Raises:
        MisconfigurationException: Before the first step, if something is invalid or does not fit.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> callbacks = [RiskMonitor(), EarlyStopping("val/expected_loss", patience=10)]
    """

    def __init__(
        self,
        task: str = "multiclass",
        *,
        loss: Loss | None = None,
        metrics: Mapping[str, Metric] | MetricCollection | None = None,
        targets: Selector | None = None,
        validation_labels: bool = False,
        features: Selector | nn.Module | None = None,
        reference: Any = None,
        groups: Selector | None = None,
        class_shares: Sequence[float] | None = None,
        num_samples: int | None = 600,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        call: Function | None = None,
    ) -> None:
        task_rules = check_task(task, loss, reference)
        check_bool("validation_labels", validation_labels)
        checks.check_class_shares(class_shares, task_rules)
        selectors: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "targets": targets, "call": call}
        reader = BatchReader(**selectors, features=features, groups=groups, task=task_rules)
        super().__init__(reader, num_samples, prefix)
        if validation_labels and self.num_samples is not None:
            self.num_samples = max(self.num_samples, _NUM_LABELLED)
        self.task = task_rules
        self.loss = loss
        self.validation_labels = validation_labels
        self.history: History = []
        self.summary: dict[str, Any] = {}
        self._own_metrics = None if metrics is None else checks.check_metrics(metrics)
        self._estimator = reference
        self._class_shares = class_shares
        # Of the last fit, from its first training batch on:
        self._reference: RunReference | None = None
        self._expectation: Expectation | None = None
        self._has_data_hooks = False  # of a data module, which the batches of `predict` do not go through

    @property
    def reference(self) -> Any:
        """The fitted :class:`~lightning_sensitivity.Reference`, in the first process; None before."""
        return None if self._reference is None or self._reference.fitted is None else self._reference.fitted.model

    def predict(self, model: nn.Module, dataloader: Iterable[object]) -> Predictions:
        """Predict samples by the network, and by the reference, for their mean, which is often better.

        Args:
            model: The network, such as that of the chosen checkpoint; it is left as it was.
            dataloader: Batches as those of the validation, with or without labels; hooks of a ``LightningDataModule``
                do not change them.

        Returns:
            ``network``, ``reference`` and ``mean``, probabilities ``(N, C)`` of all classes, two for
            ``"binary"``; or the numbers of a regression. Those of the reference are for ``class_shares``, if these are
            set; they are nan where an input is. There is no ``mean`` in a regression with a ``loss``, by which the
            network may give quantiles or logarithms of rates.

        Raises:
            ValueError: If there is no reference or no batch, or it can't read the batches.

        Example:
            >>> from lightning_sensitivity import RiskMonitor
            >>> risk = RiskMonitor()
            >>> # after trainer.fit(model, train_loader, val_loader): risk.predict(model, new_loader).mean
        """
        fitted = None if self._reference is None else self._reference.fitted
        if fitted is None or self._expectation is None:
            raise ValueError("Expected a fit that has made a reference, in the first process, but there is none.")
        if self._has_data_hooks:
            message = (
                "predicts without the hooks of your `LightningDataModule`, such as `on_after_batch_transfer`: give "
                "batches as `forward` gets them."
            )
            self.run.warn("arguments", message)
        return fitted.predict_both(model, dataloader, self._expectation.are_predictions)

    def plot(self) -> PlotType:
        """Plot the logged values by epoch, with 90 % intervals.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.
            ValueError: If there is no value.
        """
        return plot_history(self.history, self.names, self.prefix)

    # Before and after a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked by now, and forget the last fit, unless this one continues it."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        has_begun = trainer.global_step > 0 or trainer.current_epoch > 0  # raw optimizers count no steps
        self._has_data_hooks = compat.has_transfer_hooks(trainer.datamodule)  # type: ignore[attr-defined]
        self._reference = None
        self._expectation = None
        self._restore(self.history if has_begun else [])
        self.summary = {}

    def _restore(self, history: History) -> None:
        """Go on with the history of an earlier part of this fit."""
        self.history, names = history, {*self.names}
        for row in history:
            for name in names & {name for name, value in row.items() if value is not None}:
                self.run.missing.remember((name, row["dataloader_idx"]), row[name])
        lacking = [row for row in history if not row.keys() >= names]
        self.run.missing.num_incomplete = len({(row["epoch"], row["step"]) for row in lacking})

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    # Not `state_dict`, of which Lightning refuses two with one key before we can name the argument.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the history, with which a resumed fit goes on."""
        checkpoint["callbacks"][self.state_key] = {"history": [dict(row) for row in self.history]}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the history in a fit, but for what another version has saved."""
        if trainer.state.fn == TrainerFn.FITTING:
            saved = checkpoint["callbacks"].get(self.state_key, {})
            self._restore([dict(row) for row in saved.get("history", ()) if row.keys() >= KEYS])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which epoch to choose, and what is known of the labels."""
        self._summarize(trainer)
        super().on_train_end(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as at the end of a fit, also after Ctrl-C, if there was a validation."""
        if trainer.state.fn == TrainerFn.FITTING and self.history:
            self._summarize(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _summarize(self, trainer: Trainer) -> None:
        """Summarize the fit, once."""
        was_read = self._reference is not None or len(self.history) > 0  # the latter alone in a fit that has ended
        if self.summary or not was_read or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        was_tried = self._reference is not None and self._reference.was_tried
        if not was_tried and not any(self.names[0] in row for row in self.history):
            message = "logged nothing: the run ended before a validation that follows a whole training epoch."
            self.run.warn("samples", message)
            return
        with self.run.report_failure("could not say which epoch to choose", "Look at the curve."):
            verdict = None if self._reference is None else self._reference.verdict
            doubts = [] if self._expectation is None else self._expectation.doubts
            told = self._curves(trainer), self.history, verdict, doubts
            self.summary, line = summarize([name for _, name in checks.callbacks_that_monitor(trainer)], *told)
            say = rank_zero_warn if self.summary["epoch"] is None else rank_zero_info
            say(line)

    def _curves(self, trainer: Trainer) -> dict[str, Curve]:
        """Return what each logged name stands for."""
        return {
            self.logged_name(trainer, name, index): Curve(name, index, is_highest)
            for name, is_highest in self.directions.items()
            for index in range(self.num_loaders(trainer))
        }

    # Training samples

    def start(self, trainer: Trainer, module: LightningModule, batch: object) -> None:
        """Check the first batch of a run."""
        with self.run.report_failure("can't read the first training batch", "Nothing is expected."):
            self.reader.check_encoder(module)
            call = self.reader.call(module, batch)
            with isolated(module) as run_isolated, trainer.precision_plugin.val_step_context():
                outputs = self.check_model(run_isolated, call)
            any_outputs = self.task.has_any_outputs(self.loss)
            shape = tuple(without_ones(outputs).shape[1:])
            labels = self.reader.labels(batch, call, None if any_outputs else shape)
            shape = tuple(labels.shape[1:]) if any_outputs else shape
            check_count(labels, len(outputs))
            self.reader.check_samples(batch, call, labels, need_reference=not self.validation_labels)
            self.reader.groups(module, batch, len(outputs))
            num_columns = self.task.num_columns(shape)
            checks.check_class_shares(self._class_shares, self.task, num_columns)
            metrics = self._metrics_of(num_columns)
            checks.try_values(module, metrics, self.loss, outputs, labels, self.task)
            self._expectation = Expectation(self.task, self.loss, metrics, outputs, labels, self.run.warn)
            self._reference = RunReference(self.reader, self.run, self._estimator, self._class_shares, shape)
        checks.check_monitored(trainer, self.prefix, self.directions)

    def learn(self, trainer: Trainer, module: LightningModule, batch: object, begins_epoch: bool) -> None:
        """Keep training samples."""
        what = "could not keep a training batch", "It is left out."
        with self.run.report_failure(*what), trainer.precision_plugin.val_step_context():
            if self._reference is not None:
                self._reference.add(trainer, module, batch, begins_epoch)

    # A validation

    @property
    def metrics(self) -> dict[str, AnyMetric]:
        """The metrics by name: yours, or the default, which are those of two classes until a batch tells how many."""
        if self._expectation is not None:
            return self._expectation.metrics
        return self._metrics_of(2)

    def _metrics_of(self, num_columns: int) -> dict[str, AnyMetric]:
        """Return the metrics of so many classes."""
        return {**(self.task.default_metrics(num_columns) if self._own_metrics is None else self._own_metrics)}

    @property
    def directions(self) -> dict[str, bool]:
        """Whether the highest value is the best, by name without the prefix."""
        of_metrics = {EXPECTED + name: bool(metric.higher_is_better) for name, metric in self.metrics.items()}
        return of_metrics | {f"{EXPECTED}loss": False}

    def check_outputs(self, outputs: Tensor, are_of_sigmoid: bool) -> None:
        """Refuse outputs for which there is nothing to expect: if they are dense, or probabilities."""
        if self.task.has_any_outputs(self.loss):
            return
        outputs = without_ones(outputs)
        if outputs.ndim > 2:
            shape = tuple(outputs.shape)
            raise Refused(f"outputs are dense, {shape}, but (N, K) is needed.", "outputs")
        check_logits(outputs, are_of_sigmoid, self.task)

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether every process has its training samples; a sanity check needs none."""
        if not is_fitting(trainer):
            return bool(trainer.sanity_checking)
        reference = self._reference
        if not agree(trainer, reference is not None) or reference is None:
            return False
        return reference.can_be_made(trainer) or reference.stage is Stage.OVER

    def keep_labels(self, module: LightningModule, batch: object, kept: KeptBatch) -> None:
        """Keep the labels of a validation batch, if they are wanted."""
        if self.validation_labels:
            shape = None if self._reference is None else self._reference.output_shape
            kept.labels = self.reader.kept_labels(batch, kept, shape)

    def measure(self, module: LightningModule, run_isolated: RunIsolated, samples: KeptSamples) -> tuple[Tensor, ...]:
        """Run the model on the kept samples of a loader.

        Returns:
            Its outputs ``(N, ...)``; labels ``(N, C)``, nan where a sample has none; and the number of the group of
            each sample, ``(N,)``, or ``(0,)`` without groups, on the CPU.
        """
        outputs = [in_32_bits(run_isolated(batch.call.to(module.device))).cpu() for batch in samples.batches]
        if self._reference is None or self._expectation is None:  # a sanity check, which logs nothing
            return tuple(outputs)
        num_columns = self._reference.num_columns
        labels = [torch.zeros(0, num_columns, dtype=torch.float64)]  # no other default
        for batch in samples.batches:
            unknown = torch.full((batch.size, num_columns), math.nan)
            y = unknown if batch.labels is None else self.task.label_matrix(batch.labels, num_columns)
            labels.append(y.double())
        groups = [batch.groups for batch in samples.batches if batch.groups is not None]
        no_groups = torch.zeros(0, dtype=torch.int64)
        return torch.cat([self._expectation.no_outputs, *outputs]), torch.cat(labels), torch.cat([no_groups, *groups])

    def prepare(self, trainer: Trainer) -> None:
        """Make the reference in the first validation that can have values; every process comes here."""
        assert self._reference is not None
        self._reference.prepare(trainer, self.run.samples)

    def compute_values(self, trainer: Trainer, dataloader_idx: int, *rows: Tensor) -> Values:
        """Compute what to expect on a loader, over all processes."""
        assert self._expectation is not None and self._reference is not None
        outputs, labels, numbers = rows
        if self.validation_labels and bool(labels.isnan().all()):
            message = (
                f"found no label in the batches of dataloader {dataloader_idx}, so labels are not used. If they have "
                "some, set `targets=`."
            )
            self.run.warn("labels", message, kind="none")
        unseen = self._reference.unseen.get(dataloader_idx)
        known = Known(labels, numbers if self.reader.has_groups else None, unseen)
        # Losses and metrics of the user may be parts of the module, or draw numbers.
        with isolated_with(trainer.lightning_module, self.loss) as run_isolated:
            values: Values = run_isolated(self._expectation.values, dataloader_idx, outputs, known, self.history)
        verdict = self._reference.verdict
        if not values and verdict is not None and not verdict.is_trusted:
            self.run.warn("blind", f"logs nothing: {why_blind(verdict.majority, verdict.skill)}")
        return values

    def remember(self, trainer: Trainer, dataloader_idx: int, values: Values) -> None:
        """Add a row to the history, with the left-out score of the reference, by which it is known."""
        row: Values = {"epoch": trainer.current_epoch, "step": trainer.global_step, "dataloader_idx": dataloader_idx}
        self.history.append({**row, "reference_score": None, "num_labels": 0, **values})
