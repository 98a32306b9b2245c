"""The callback that logs what to expect of unseen samples, and so what to stop by."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_estimator, describe_error
from lightning_sensitivity.callbacks.both import Predictions, predict_both
from lightning_sensitivity.callbacks.checks import (
    EXPECTED,
    check_class_shares,
    check_metrics,
    check_monitored,
    check_outputs,
    check_targets,
    try_metrics,
)
from lightning_sensitivity.callbacks.closing import Curve, Summary, closing_line, plot_history, summarize
from lightning_sensitivity.callbacks.monitor import Monitor, Values
from lightning_sensitivity.callbacks.run_reference import RunReference, Unseen
from lightning_sensitivity.compat import PlotType
from lightning_sensitivity.functional.expected import (
    all_values,
    default_metrics,
    join_values,
    uncertainty,
)
from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS
from lightning_sensitivity.functional.tensors import may_be_probabilities
from lightning_sensitivity.model.isolation import RunIsolated, isolated
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import KeptSamples

_NUM_LABELLED = 2000  # validation samples that are kept if they have labels, over all processes
_SOME_VALIDATIONS = 3  # after which a network is better than a constant prediction
_FALLING = 0.9  # of the last score: below, a network is still learning
_KEYS = {"epoch", "step", "dataloader_idx", "reference", "num_labels"}  # of each row of the history


class RiskMonitor(Monitor):
    r"""A callback that logs what to expect of unseen samples in every validation, without their labels.

    A small model of the training labels, the *reference* (:class:`~lightning_sensitivity.Reference`), stands in for
    validation labels. It is checked and calibrated on labels that it has not seen, and never sees the network. Labels
    are drawn once from its predictions for validation samples, and metrics of the network against these labels are
    logged, only in ``Trainer.fit``, after ``prefix``:

    - ``expected_score``, lowest is best: the refined score to expect
      (:func:`~lightning_sensitivity.functional.expected_score`); in a regression the mean squared error. Stop by it.
    - ``expected_accuracy`` and ``expected_auroc``, in a regression ``expected_mse``; or ``expected_<name>`` for each
      of ``metrics``.

    Training samples are kept in the first whole epoch, of which the reference is made: 50,000 rows of a table, 10,000
    images, signals or texts, 3,000 samples that an encoder sees, 512 MiB over all processes. If it sees too little of
    the inputs, nothing is logged, and callbacks that monitor these values take the last epoch.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``.
        metrics: Torchmetrics by name, or a ``MetricCollection``, each with ``higher_is_better``. They get probabilities
            ``(N, K)``, or ``(N,)`` for ``"binary"``, and classes; in a regression outputs and targets.
        targets: A function ``batch -> labels``; by default
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Use validation labels, which may be noisy, beside the reference, which counts as 200
            of them, and as 1,000 for ``metrics`` and in a regression.
        features: What the reference sees, by default the inputs: an ``nn.Module``, such as a pretrained encoder, that
            gets the inputs of the network, or a function ``batch -> (N, D)``. It must know as much as the network.
        reference: A classifier of scikit-learn with ``predict_proba``, or a regressor, to be the reference.
        class_shares: The shares of the classes among unseen samples, if a sampler or undersampling shows the training
            others: numbers that sum to 1, or ``"estimate"`` (expectation maximization; Saerens et al., 2002).
        num_samples: Validation samples per loader, over all processes; with validation labels at least 2,000; None for
            all.
        prefix: Prefix of the logged names.
        inputs: A function ``batch -> arguments``; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K)`` or ``(N,)``.
        prog_bar: Show the score on the progress bar.

    Attributes:
        history: A dict for each validation and loader, which ``pandas.DataFrame`` takes.
        summary: What the line at the end of a fit says, as a dict that ``json`` takes; empty before.

    Raises:
        MisconfigurationException: If an argument is invalid; before the first step, if the Trainer or the
            model is not supported, labels do not fit the task, or a callback monitors a name that is not logged.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> callbacks = [RiskMonitor(), EarlyStopping("val/expected_score", patience=10)]
    """

    only_in_fit = True

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
        self.task = TASKS[task]
        check_estimator("reference", reference, self.task)
        check_class_shares(class_shares, self.task)
        reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=self.task)
        super().__init__(reader, num_samples, prefix, prog_bar)
        if validation_labels and num_samples is not None:
            self.num_samples = max(num_samples, _NUM_LABELLED)
        self.metrics = default_metrics(self.task, 2) if metrics is None else check_metrics(metrics)
        self.validation_labels = validation_labels
        self.history: list[dict[str, Any]] = []
        self.summary: Summary = {}
        self._has_default = metrics is None
        self._estimator = reference
        self._class_shares = class_shares
        self._reference = self._new_reference()
        self._is_started = False  # whether the first training batch was read
        self._output_shape: tuple[int, ...] | None = None  # of a sample; None before, or if that failed
        self._num_bad = 0  # validations in which a regression was worse than a constant prediction
        self._last_score = 0.0  # of it

    def _new_reference(self) -> RunReference:
        return RunReference(self.task, self.reader, self._estimator, self._class_shares, self.reporter)

    @property
    def directions(self) -> dict[str, bool]:
        """Whether the highest value is the best, by name without the prefix."""
        of_metrics = {EXPECTED + name: bool(metric.higher_is_better) for name, metric in self.metrics.items()}
        return {f"{EXPECTED}score": False} | of_metrics

    @property
    def reference(self) -> Any:
        """The fitted :class:`~lightning_sensitivity.Reference`, in the first process; None before it is made."""
        return self._reference.fitted

    def predict(self, model: nn.Module, dataloader: Iterable[object]) -> Predictions:
        """Predict samples by the network, and by the reference, for their mean, which is often better than either.

        Args:
            model: The network, such as that of the chosen checkpoint; it is left as it was.
            dataloader: Batches as those of the validation, with or without labels.

        Returns:
            ``network``, ``reference`` and ``mean``, probabilities ``(N, C)`` of all classes, two for ``"binary"``; or
            the numbers of a regression.

        Raises:
            ValueError: If there is no reference, or it can't read the batches.

        Example:
            >>> from lightning_sensitivity import RiskMonitor
            >>> risk = RiskMonitor()
            >>> # after trainer.fit(model, train_loader, val_loader): risk.predict(model, new_loader).mean
        """
        if self.reference is None:
            raise ValueError("Expected a fit that has made a reference, in the first process, but there is none.")
        return predict_both(model, self.reference, dataloader, self.reader, self.task)

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
        check_monitored(trainer, self._prefixed_directions())
        if trainer.global_step == 0 and trainer.current_epoch == 0:  # raw optimizers count no steps
            self.history = []
        self.summary = {}
        self.reader.reset()
        self._is_started, self._output_shape = False, None
        self._num_bad, self._last_score = 0, 0.0
        self._reference = self._new_reference()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check schedulers, too, which are known by now."""
        check_monitored(trainer, self._prefixed_directions())

    def _prefixed_directions(self) -> dict[str, bool]:
        return {self.prefix + name: is_highest for name, is_highest in self.directions.items()}

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
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            return
        try:
            self.history = [dict(row) for row in state["history"]]
            is_ours = all(row.keys() >= _KEYS for row in self.history)
        except (TypeError, KeyError, ValueError):
            is_ours = False
        if not is_ours:
            self.history = []
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

    def _free(self) -> None:
        super()._free()
        self._reference.free()

    def _summarize(self, trainer: Trainer) -> None:
        """Summarize the fit, once."""
        if self.summary or self._output_shape is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if not self._has_values and not self._reference.is_made:
            message = "logged nothing: the run ended before a validation that follows a whole training epoch."
            self.reporter.warn("samples", message)
            return
        with self.reporter.report_failure("could not say which epoch to choose", "Look at the curve."):
            self.summary = summarize(trainer, self._curves(trainer), self.history, self._reference.verdict)
            say = rank_zero_warn if self.summary["chosen_by"] == "nothing" else rank_zero_info
            say(closing_line(trainer, self.summary))

    @property
    def _has_values(self) -> bool:
        return any(name in row for row in self.history for name in self.names)

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
        if self._output_shape is not None and not self._reference.is_made:
            with (
                self.reporter.report_failure("could not keep a training batch", "It is left out."),
                trainer.precision_plugin.val_step_context(),
            ):
                self._reference.add(trainer, pl_module, batch, batch_idx, self._output_shape)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _start(self, trainer: Trainer, module: LightningModule, batch: object) -> None:
        """Check that the model can be measured on a batch, and that its labels and the metrics fit."""
        call = self.reader.call(module, batch)
        with isolated(module) as run, trainer.precision_plugin.val_step_context():
            outputs = self.check_model(run, call)
        shape = tuple(outputs.shape[1:])
        labels = self.reader.labels(module, batch, shape)
        check_targets(labels, len(outputs), self.task)
        num_columns = self.task.num_columns(shape)
        check_class_shares(self._class_shares, self.task, num_columns)
        if self._has_default:
            self.metrics = default_metrics(self.task, num_columns)
            check_monitored(trainer, self._prefixed_directions())
        counts = self.task.has_label(labels)
        if bool(counts.any()):
            y = self.task.as_matrix(labels, num_columns)
            try_metrics(self.metrics, self.task.as_outputs(outputs.cpu())[counts], y[counts], self.task)
        self._output_shape = shape

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs of which nothing can be expected."""
        check_outputs(outputs, self.task)

    # A validation

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether every process has its training samples."""
        return self._reference.is_ready(trainer)

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch, with its labels if they are wanted."""
        kept = self.reader.keep(module, batch, batch_idx, with_seen=True, max_samples=samples.num_wanted)
        if self.validation_labels and self.reader.may_have_labels(module, batch):
            try:
                kept.labels = self.reader.kept_labels(module, batch, kept, self._output_shape)
            except MisconfigurationException as error:
                self.reporter.warn("labels", f"treats some validation batches as unlabelled: {describe_error(error)}")
        samples.add(kept)

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> tuple[Tensor, ...]:
        """Run the model on the kept samples of a loader.

        Returns:
            Its outputs ``(N, C)``, and labels ``(N, C)``, nan where a sample has none, on the CPU.
        """
        if self._output_shape is None:  # a sanity check, which logs nothing
            return tuple(run(batch.call.to(module.device)) for batch in samples.batches)
        num_columns = self.task.num_columns(self._output_shape)
        outputs, labels = [torch.zeros(0, num_columns)], [torch.zeros(0, num_columns)]
        for batch in samples.batches:
            outputs.append(self.task.as_outputs(run(batch.call.to(module.device)).float().cpu()))
            y = torch.full((batch.size, num_columns), math.nan)
            if batch.labels is not None:
                counts = self.task.has_label(batch.labels)
                y[counts] = self.task.as_matrix(batch.labels, num_columns).float()[counts]
            labels.append(y)
        return torch.cat(outputs), torch.cat(labels)

    def prepare(self, trainer: Trainer) -> None:
        """Make the reference in the first validation that can have values; every process comes here."""
        self._reference.make(trainer, self.samples)

    def compute_values(self, trainer: Trainer, dataloader_idx: int, *rows: Tensor) -> Values:
        """Compute what to expect on a loader, over all processes."""
        outputs, labels = rows
        has_label, is_finite = ~labels.isnan().any(1), outputs.isfinite().all(1)
        self._warn_of_samples(dataloader_idx, is_finite, has_label)
        if self.task.has_classes and may_be_probabilities(outputs[is_finite]):
            self.warn_of_probabilities()
        if len(outputs) > 0 and not bool(is_finite.any()):
            return dict.fromkeys(self.names, math.nan)
        counts = has_label & is_finite
        y, num_labels = labels[counts], int(counts.sum())
        unseen = self._reference.unseen.get(dataloader_idx)
        if unseen is None and num_labels == 0:
            self._warn_if_blind(trainer)
            return {}
        drawn = self.task.classes(y) if self.task.has_classes else y
        found = all_values(outputs[counts], y, drawn[None], self.metrics, self.task)
        if unseen is not None:
            found = join_values(self._expect(dataloader_idx, outputs, unseen), found, num_labels, self.task)
        named = {EXPECTED + name: found[name] for name in ("score", *self.metrics) if not math.isnan(found[name])}
        return named | {"temperature": found["temperature"], "num_labels": num_labels}

    def _expect(self, dataloader_idx: int, outputs: Tensor, unseen: Unseen) -> dict[str, float]:
        """Compute what to expect by labels that were drawn once from the predictions of the reference."""
        assert self._reference.verdict is not None
        outputs = outputs[unseen.rows]
        is_finite = outputs.isfinite().all(1)
        outputs, q, draws = outputs[is_finite], unseen.q[is_finite], unseen.draws[:, is_finite]
        expected = all_values(outputs, q, draws, self.metrics, self.task)
        if dataloader_idx == 0 and not self.task.has_classes:
            self._warn_of_targets(expected["score"], by_mean=float(q.var(0, correction=0).mean()))
        expected["score"] += uncertainty(q, self.task, self._reference.verdict.score)
        return expected

    def remember(self, trainer: Trainer, dataloader_idx: int, values: Values) -> None:
        """Add a row to the history, with the left-out score of the reference that judged, by which it is known."""
        verdict = self._reference.verdict
        has_reference = bool(values) and verdict is not None and dataloader_idx in self._reference.unseen
        row: Values = {"epoch": trainer.current_epoch, "step": trainer.global_step, "dataloader_idx": dataloader_idx}
        row |= {"reference": verdict.score if verdict is not None and has_reference else None, "num_labels": 0}
        self.history.append(row | values)

    # Warnings

    def _warn_of_targets(self, score: float, by_mean: float) -> None:
        """Warn if a regression is worse than its mean prediction in several validations, and does not improve."""
        is_bad = score > max(by_mean, _FALLING * self._last_score)
        self._last_score = score
        self._num_bad = self._num_bad + 1 if is_bad else 0
        if self._num_bad == _SOME_VALIDATIONS:
            self.reporter.warn(
                "targets",
                f"finds the network worse than a constant prediction in {self._num_bad} validations. If your step "
                "scales targets or takes logarithms, do the same in `targets=`.",
            )

    def _warn_of_samples(self, dataloader_idx: int, is_finite: Tensor, has_label: Tensor) -> None:
        where = f"dataloader {dataloader_idx}"
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
        self.reporter.warn(
            "blind",
            f"logs nothing: the reference {sees}, so nothing says when to stop. Callbacks that monitor it take the "
            "last epoch. Set `features=`, or label some validation samples (`validation_labels=True`).",
        )
