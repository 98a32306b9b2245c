"""The callback that logs what to expect of unseen samples, and so what to stop by."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_estimator
from lightning_sensitivity.callbacks.checks import (
    check_class_shares,
    check_inputs,
    check_metrics,
    check_monitored,
    check_targets,
    try_metrics,
)
from lightning_sensitivity.callbacks.closing import Curve, Summary, closing_line, plot_history, summarize
from lightning_sensitivity.callbacks.expectation import ExpectationMonitor
from lightning_sensitivity.compat import PlotType
from lightning_sensitivity.functional.expected import default_metrics
from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.reader import BatchReader, check_count, move_batch
from lightning_sensitivity.reference.kinds import join_seen

_KEYS = {"epoch", "step", "dataloader_idx", "reference", "num_labels"}  # of each row of the history


class Predictions(NamedTuple):
    """What two models predict for the same samples: probabilities ``(N, C)``, or the numbers of a regression.

    Attributes:
        network: Those of the network.
        reference: Those of the reference.
    """

    network: Tensor
    reference: Tensor

    @property
    def mean(self) -> Tensor:
        """The mean of both, which is often better than either."""
        return (self.network + self.reference) / 2


class RiskMonitor(ExpectationMonitor):
    r"""A callback that logs what to expect of unseen samples in every validation, without their labels.

    A small model of the training labels, the *reference* (:class:`~lightning_sensitivity.Reference`), stands
    in for validation labels. It is checked and calibrated on labels that it has not seen, and never sees the
    network. Labels are drawn once from its predictions for validation samples, and metrics of the network
    against these labels are logged, only in ``Trainer.fit``, after ``prefix``:

    - ``expected_score``, lowest is best: the refined score to expect
      (:func:`~lightning_sensitivity.functional.expected_score`); in a regression the mean squared error. Stop
      by it.
    - ``expected_accuracy`` and ``expected_auroc``, in a regression ``expected_mse``; or ``expected_<name>``
      for each of ``metrics``.

    Training samples are kept in the first whole epoch, of which the reference is made: 50,000 rows of a
    table, 10,000 images, signals or texts, 3,000 samples that an encoder sees, 512 MiB over all processes. If
    it sees too little of the inputs, nothing is logged, and callbacks that monitor these values take the last
    epoch.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``.
        metrics: Torchmetrics by name, or a ``MetricCollection``, each with ``higher_is_better``. They get
            probabilities ``(N, K)``, or ``(N,)`` for ``"binary"``, and classes; in a regression outputs and
            targets.
        targets: A function ``batch -> labels``; by default
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Use validation labels, which may be noisy, beside the reference, which counts as
            200 of them, and as 1,000 for ``metrics`` and in a regression.
        features: What the reference sees, by default the inputs: an ``nn.Module``, such as a pretrained
            encoder, that gets the inputs of the network, or a function ``batch -> (N, D)``. It must know as
            much as the network.
        reference: A classifier of scikit-learn with ``predict_proba``, or a regressor, to be the reference.
        class_shares: The shares of the classes among unseen samples, if a sampler or undersampling shows the
            training others: numbers that sum to 1, or ``"estimate"`` (expectation maximization; Saerens et
            al., 2002).
        num_samples: Validation samples per loader, over all processes; with validation labels at least 2,000;
            None for all.
        prefix: Prefix of the logged names.
        inputs: A function ``batch -> arguments``; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K)`` or ``(N,)``.
        prog_bar: Show the score on the progress bar.

    Attributes:
        history: A dict for each validation and loader, which ``pandas.DataFrame`` takes.
        summary: What the line at the end of a fit says, as a dict that ``json`` takes; empty before.

    Raises:
        MisconfigurationException: If an argument is invalid; before the first step, if the Trainer or the
            model is not supported, labels do not fit the task, or a callback monitors a name that is not
            logged.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> callbacks = [RiskMonitor(), EarlyStopping("val/expected_score", patience=10)]
    """

    def __init__(
        self,
        task: str = "multiclass",
        *,
        metrics: Mapping[str, Metric] | MetricCollection | None = None,
        targets: Selector | None = None,
        validation_labels: bool = False,
        features: Selector | nn.Module | None = None,
        reference: Any = None,
        class_shares: Sequence[float] | Literal["estimate"] | None = None,
        num_samples: int | None = 600,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        prog_bar: bool = False,
    ) -> None:
        check_argument("task", task, task in TASKS, f"one of {TASK_NAMES}")
        check_bool("validation_labels", validation_labels)
        rules = TASKS[task]
        check_estimator("reference", reference, rules)
        check_class_shares(class_shares, rules)
        reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=rules)
        found = default_metrics(rules, 2) if metrics is None else check_metrics(metrics)
        judged_by = {"estimator": reference, "class_shares": class_shares, "validation_labels": validation_labels}
        super().__init__(reader, rules, found, num_samples=num_samples, prefix=prefix, prog_bar=prog_bar, **judged_by)
        self.summary: Summary = {}
        self._has_default = metrics is None
        self._is_started = False  # whether the first training batch was read

    @property
    def reference(self) -> Any:
        """The fitted :class:`~lightning_sensitivity.Reference`, in the first process; None before."""
        return self._reference.fitted

    def predict(self, model: nn.Module, dataloader: Iterable[object]) -> Predictions:
        """Predict samples by the network, and by the reference, for their mean, which is often better.

        Args:
            model: The network, such as that of the chosen checkpoint; it is left as it was.
            dataloader: Batches as those of the validation, with or without labels.

        Returns:
            ``network``, ``reference`` and ``mean``, probabilities ``(N, C)`` of all classes, two for
            ``"binary"``; or the numbers of a regression. Those of the reference are for ``class_shares``, if
            these are set.

        Raises:
            ValueError: If there is no reference, or it can't read the batches.

        Example:
            >>> from lightning_sensitivity import RiskMonitor
            >>> risk = RiskMonitor()
            >>> # after trainer.fit(model, train_loader, val_loader): risk.predict(model, new_loader).mean
        """
        if self.reference is None:
            raise ValueError("Expected a fit that has made a reference, in the first process, but there is none.")
        outputs, seen = [], []
        for batch in dataloader:
            moved = move_batch(model, batch)
            call = self.reader.call(model, moved)
            with isolated(model) as run:
                outputs.append(self.task.predictions(run(call).cpu()))
            seen.append(self.reader.see(model, moved, call, len(outputs[-1])))
        return Predictions(torch.cat(outputs), self._reference.predict(join_seen(seen)).to(outputs[0].dtype))

    def plot(self) -> PlotType:
        """Plot the logged values by epoch.

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
        if self._has_default:
            self.metrics = default_metrics(self.task, 2)
        if trainer.global_step == 0 and trainer.current_epoch == 0:  # raw optimizers count no steps
            self.history = []
        self.summary = {}
        self.reader.reset()
        self._is_started = False
        self._num_bad, self._last_score = 0, 0.0
        self._reference = self._new_reference()

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    # Not `state_dict`, of which Lightning refuses two with one key before we can name the argument.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the history, which a resumed fit continues; its reference is made again."""
        checkpoint["callbacks"][self.state_key] = {"history": self.history}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore what was saved, if anything."""
        state = checkpoint["callbacks"].get(self.state_key, {"history": self.history})
        rows = state.get("history") if isinstance(state, Mapping) else None
        if isinstance(rows, list) and all(isinstance(row, Mapping) and row.keys() >= _KEYS for row in rows):
            self.history = [dict(row) for row in rows]
        else:
            self.reporter.warn("checkpoint", "leaves its state in the checkpoint alone: another version has saved it.")

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
        if self.summary or self._reference.output_shape is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        has_values = any(self.names[0] in row for row in self.history)
        if not has_values and not self._reference.is_made:
            message = "logged nothing: the run ended before a validation that follows a whole training epoch."
            self.reporter.warn("samples", message)
            return
        with self.reporter.report_failure("could not say which epoch to choose", "Look at the curve."):
            has_shares, verdict = self._class_shares is not None, self._reference.verdict
            self.summary = summarize(trainer, self._curves(trainer), self.history, verdict, has_shares)
            say = rank_zero_warn if self.summary["chosen_by"] == "nothing" else rank_zero_info
            say(closing_line(self.summary))

    def _curves(self, trainer: Trainer) -> dict[str, Curve]:
        """Return the value, the loader and the direction of each logged name."""
        return {
            self.logged_name(trainer, name, index): (name, index, is_highest)
            for name, is_highest in self.directions.items()
            for index in range(self.num_loaders(trainer))
        }

    # Training samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Check the first batch of a run, and keep samples of its first whole epoch."""
        if not self._is_started:
            self._is_started = True
            with self.reporter.report_failure("can't read the first training batch", "Nothing is expected."):
                self._start(trainer, pl_module, batch)
            check_monitored(trainer, {self.prefix + name: each for name, each in self.directions.items()})
        if self._reference.is_keeping:
            with (
                self.reporter.report_failure("could not keep a training batch", "It is left out."),
                trainer.precision_plugin.val_step_context(),
            ):
                self._reference.add(trainer, pl_module, batch, batch_idx)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _start(self, trainer: Trainer, module: LightningModule, batch: object) -> None:
        """Check that the model can be measured on a batch, and that its labels and the metrics fit."""
        self.reader.check_encoder(module)
        call = self.reader.call(module, batch)
        with isolated(module) as run, trainer.precision_plugin.val_step_context():
            outputs = self.check_model(run, call)
        shape = tuple(outputs.shape[1:])
        labels = self.reader.labels(module, batch, shape)
        check_count(labels, len(outputs))
        check_targets(labels, self.task)
        if not self.reader.has_features:
            check_inputs(call.inputs(), labels)
        num_columns = self.task.num_columns(shape)
        check_class_shares(self._class_shares, self.task, num_columns)
        if self._has_default:
            self.metrics = default_metrics(self.task, num_columns)
        counts = self.task.has_label(labels)
        if bool(counts.any()):
            y = self.task.as_matrix(labels, num_columns)
            try_metrics(self.metrics, self.task.as_outputs(outputs.cpu())[counts], y[counts], self.task)
        self._reference.output_shape = shape
