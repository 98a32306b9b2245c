"""The callback that logs what to expect of unseen samples, and so what to stop by."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_sensitivity.arguments import (
    Selector,
    check_argument,
    check_bool,
    check_estimator,
    describe_error,
    refuse_on_error,
)
from lightning_sensitivity.callbacks.checks import (
    EXPECTED,
    check_loaders,
    check_monitored,
    check_outputs,
    check_targets,
)
from lightning_sensitivity.callbacks.closing import closing_line, log_summary, summarize
from lightning_sensitivity.callbacks.monitor import WORST, Monitor
from lightning_sensitivity.callbacks.record import RiskRecord, Verdict
from lightning_sensitivity.callbacks.reference import FIRST_VALUE, RunReference, gather
from lightning_sensitivity.compat import PlotType
from lightning_sensitivity.functional.expected import (
    all_values,
    default_metrics,
    draw_labels,
    is_unrelated,
    join_values,
    metric_value,
    uncertainty,
)
from lightning_sensitivity.functional.reference import Reference
from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS
from lightning_sensitivity.functional.tensors import may_be_probabilities
from lightning_sensitivity.model.isolation import RunIsolated, isolated
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import KeptSamples

SCORE = f"{EXPECTED}score"
NUM_LABELLED = 2000  # validation samples that are kept if they have labels, over all processes
_BETTER = 1e6  # than any value; it grows by 1 in each validation
_SOME_VALIDATIONS = 3  # after which a network is better than a constant prediction
_FALLING = 0.9  # of the last score: below, a network is still learning


class RiskMonitor(Monitor):
    r"""A callback that logs what to expect of unseen samples in every validation, without their labels.

    A small model of the training labels, the *reference*
    (:func:`~lightning_sensitivity.functional.fit_reference`), stands in for validation labels. It is checked by
    leaving each label out, and never sees the network. Labels are drawn once from its predictions for validation
    samples, and metrics of the network against these labels are logged, only in ``Trainer.fit``, after ``prefix``:

    - ``expected_score``, lowest is best: the refined score to expect
      (:func:`~lightning_sensitivity.functional.expected_score`); in a regression the mean squared error. Stop by it.
    - ``expected_accuracy`` and ``expected_auroc``, in a regression ``expected_mse``; or ``expected_<name>`` for each
      of ``metrics``. On tables their level is right; on images it is too low, and only the curve says something.

    The first value comes after 600 training samples; at the end of the first epoch the reference is fitted again, to
    all that fit (50,000 rows of a table, 10,000 other samples, 512 MiB). If it sees too little of the inputs, nothing
    is logged, and callbacks that monitor these values take the last epoch.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``.
        metrics: Torchmetrics by name, or a ``MetricCollection``, each with ``higher_is_better``. They get probabilities
            ``(N, K)``, or ``(N,)`` for ``"binary"``, and classes; in a regression outputs and targets.
        targets: A function ``batch -> labels``; by default
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Use validation labels, which may be noisy, beside the reference, which counts as 200
            of them, and as 1,000 for ``metrics`` and in a regression.
        features: A function ``batch -> (N, D)``, what the reference sees; by default the inputs.
        reference: A classifier of scikit-learn with ``predict_proba``, or a regressor, to be the reference.
        num_samples: Validation samples per loader, over all processes; with validation labels at least 2,000; None for
            all.
        prefix: Prefix of the logged names.
        inputs: A function ``batch -> arguments``; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K)`` or ``(N,)``.
        prog_bar: Show the score on the progress bar.

    Attributes:
        summary: What the line at the end of a fit says, as a dict; empty before.

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
        features: Selector | None = None,
        reference: Any = None,
        num_samples: int | None = 600,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        prog_bar: bool = False,
    ) -> None:
        check_argument("task", task, task in TASKS, f"one of {TASK_NAMES}")
        check_bool("validation_labels", validation_labels)
        check_estimator("reference", reference, TASKS[task])
        reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=TASKS[task])
        super().__init__(reader, num_samples, prefix, prog_bar)
        if validation_labels and num_samples is not None:
            self.num_samples = max(num_samples, NUM_LABELLED)
        self.task = TASKS[task]
        self.metrics = default_metrics(self.task, 2) if metrics is None else checked_metrics(metrics)
        self.validation_labels = validation_labels
        self.summary: dict[str, Any] = {}
        self.record = RiskRecord()  # all of it is saved
        self._has_default = metrics is None
        self._estimator = reference
        self._is_started = False  # whether the first training batch was read
        self._output_shape: tuple[int, ...] | None = None  # of a sample; None before, or if that failed
        self._draws: dict[tuple[int, int], Tensor] = {}  # labels, by loader and reference
        self._num_bad = 0  # validations in which the network was worse than a constant prediction
        self._last_score = 0.0  # that was expected
        self._reference = self._new_reference()

    def _new_reference(self) -> RunReference:
        return RunReference(self.task, self.reader, self._estimator, self.record, self.reporter)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all values."""
        return (SCORE, *(EXPECTED + name for name in self.metrics))

    @property
    def reference(self) -> Reference | None:
        """The fitted reference, in the first process; None before, and in a resumed fit that continues with its own."""
        return self._reference.fitted

    @property
    def history(self) -> list[dict[str, Any]]:
        """What validations have shown, a dict for each, and each loader, which ``pandas.DataFrame`` takes."""
        return self.record.history

    def plot(self) -> PlotType:
        """Plot the logged values by epoch.

        Returns:
            Figure and axes.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.
            ValueError: If there is no value.
        """
        from matplotlib import pyplot

        if not self.history:
            raise ValueError("Expected a fit with values before `plot`, but there is none.")
        figure, axes = pyplot.subplots(1, len(self.names), figsize=(4 * len(self.names), 3), squeeze=False)
        for ax, name in zip(axes[0], self.names, strict=True):
            for index in sorted({row["dataloader_idx"] for row in self.history}):
                rows = [row for row in self.history if row["dataloader_idx"] == index]
                values = [row.get(name, math.nan) for row in rows]  # a resumed fit may have new metrics
                ax.plot([row["epoch"] for row in rows], values, label=f"dataloader {index}")
            ax.set(title=self.prefix + name, xlabel="epoch")
        return figure, axes[0]

    # Before and after a fit

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked by now, and forget the last fit, unless this one continues it."""
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if self._has_default:
            self.metrics = default_metrics(self.task, 2)
        check_monitored(trainer, self.prefix, self._directions())
        if trainer.global_step == 0 and trainer.current_epoch == 0:  # raw optimizers count no steps
            self.record = RiskRecord()
        self.summary = {}
        self._is_started, self._output_shape = False, None
        self._num_bad, self._last_score = 0, 0.0
        self._draws = {}
        self._reference = self._new_reference()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check schedulers, too, and names of several loaders, which are known by now."""
        check_monitored(trainer, self.prefix, self._directions())
        if trainer.val_dataloaders is None:  # the first epochs are not validated
            return
        loaders = range(self.num_loaders(trainer))
        names = [self.logged_name(trainer, name, index) for name in self.names for index in loaders]
        check_loaders(trainer, names)

    def _directions(self) -> dict[str, bool]:
        """Return whether the highest value is the best, by logged name."""
        best = [False, *(bool(metric.higher_is_better) for metric in self.metrics.values())]
        return {self.prefix + name: each for name, each in zip(self.names, best, strict=True)}

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    # Not `state_dict`, of which Lightning refuses two with one key before we can name the argument.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save what a resumed fit continues."""
        if self.history and self.history[-1]["step"] == trainer.global_step:
            self.record.saved_steps.append(trainer.global_step)
        checkpoint["callbacks"][self.state_key] = self.record.to_dict()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore what was saved, if anything."""
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None:
            return
        try:
            self.record = RiskRecord.from_dict(state)
        except Exception as error:
            message = (
                f"leaves its state in the checkpoint alone, which another version has saved: {describe_error(error)}"
            )
            self.reporter.warn("checkpoint", message)
        self._reference = self._new_reference()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say which epoch to choose, and what is known of the labels."""
        self._end(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as at the end of a fit, also after Ctrl-C, if there is a value."""
        if trainer.state.fn == TrainerFn.FITTING and self.history:
            self._end(trainer)
        super().on_exception(trainer, pl_module, exception)

    def _free(self) -> None:
        super()._free()
        self._reference.free()

    def _end(self, trainer: Trainer) -> None:
        """Summarize the fit, once."""
        if self.summary or self._output_shape is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        has_labels = any(row["num_labels"] > 0 for row in self.history)
        if self.record.num_validations == 0 or (self.record.verdict is None and not has_labels):
            enough = f"{FIRST_VALUE} training samples that have labels, or a full epoch of them"
            self.reporter.warn("samples", f"logged nothing: the run ended before a validation with {enough}.")
            return
        with self.reporter.report_failure("could not say which epoch to choose", "Look at the curve."):
            curves = {
                self.logged_name(trainer, name, index): (name, index, self._directions()[self.prefix + name])
                for name in self.names
                for index in range(self.num_loaders(trainer))
            }
            self.summary = summarize(trainer, curves, self.record)
            line = closing_line(trainer, self.summary)
            say = rank_zero_warn if self.summary["chosen_by"] == "nothing" else rank_zero_info
            say(line)
        with self.reporter.report_failure("could not write the summary to a logger", "It is in `summary`."):
            log_summary(trainer, self.prefix, self.summary)

    # Training samples

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Check the first batch of a run, and keep samples of its first epoch."""
        if not self._is_started:
            self._is_started = True
            with self.reporter.report_failure("can't read the first training batch", "Nothing is expected."):
                self._start(trainer, pl_module, batch)
        if self._output_shape is not None:
            with (
                self.reporter.report_failure("could not keep a training batch", "It is left out."),
                trainer.precision_plugin.val_step_context(),
            ):
                self._reference.add(trainer, pl_module, batch, batch_idx, self._num_outputs)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def _start(self, trainer: Trainer, module: LightningModule, batch: object) -> None:
        """Check that the model can be measured on a batch, and that its labels and the metrics fit."""
        call = self.reader.call(module, batch)
        with isolated(module) as run, trainer.precision_plugin.val_step_context():
            outputs = self.check_model(run, call)
        output_shape = tuple(outputs.shape[1:])
        labels = self.reader.labels(module, batch, output_shape)
        check_targets(labels, len(outputs), self.task)
        if self._has_default:
            self.metrics = default_metrics(self.task, math.prod(output_shape))
            check_monitored(trainer, self.prefix, self._directions())
        counts = self.task.has_label(labels)
        if bool(counts.any()):
            y = self.task.as_matrix(labels, math.prod(output_shape))
            self._try_metrics(outputs.float().cpu()[counts], y[counts])
        self._output_shape = output_shape

    def _try_metrics(self, outputs: Tensor, labels: Tensor) -> None:
        """Refuse a metric that fails on a training batch, or does not return one number."""
        for name, metric in self.metrics.items():
            with refuse_on_error(f"`metrics[{name!r}]` fails on outputs {tuple(outputs.shape)}", entry="metrics"):
                y = self.task.classes(labels) if self.task.has_classes else labels
                twice = torch.stack([y, y])  # a few need two samples
                value = metric_value(metric, self.task.predictions(outputs), twice, self.task)
                check_argument(
                    f"metrics[{name!r}]", value, isinstance(value, Tensor) and value.numel() == 1, "one number"
                )

    @property
    def _num_outputs(self) -> int:
        return math.prod(self._output_shape or ())

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs of which nothing can be expected."""
        check_outputs(outputs, self.task)

    # A validation

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether every process has its training samples."""
        return self._reference.is_ready(trainer)

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch, with its labels if they are wanted."""
        kept = self.reader.keep(module, batch, batch_idx, with_features=True, max_samples=samples.num_wanted)
        if self.validation_labels and self.reader.may_have_labels(module, batch):
            try:
                labels = self.reader.labels(module, batch, self._output_shape)
                kept.labels = labels if kept.rows is None else labels[kept.rows]
            except MisconfigurationException as error:
                self.reporter.warn("labels", f"treats some validation batches as unlabelled: {describe_error(error)}")
        samples.add(kept)

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> Tensor:
        """Run the model on the kept samples of a loader, and return its outputs, ``(N, K)``, on the CPU."""
        found = []
        for batch in samples.batches:
            outputs = run(batch.call.to(module.device))
            found.append(outputs.float().cpu().reshape(len(outputs), -1))
        return torch.cat(found) if found else torch.zeros(0, self._num_outputs)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find or make the reference, and log the values; every process comes here."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            super().on_validation_epoch_end(trainer, pl_module)
            return
        if self._is_measuring:
            with self.reporter.report_failure("could not make a reference", "Nothing is expected."):
                self._reference.update(trainer, self.samples, self._num_outputs)
        num_values = len(self.history)
        super().on_validation_epoch_end(trainer, pl_module)
        self.record.num_validations += 1
        self.record.ends_in_gap = len(self.history) == num_values
        self.record.num_gaps += self.record.ends_in_gap

    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> dict[str, Tensor | float]:
        """Compute what to expect on a loader, over all processes, and remember it."""
        outputs = gather(trainer, self.measured[dataloader_idx])
        labels = self._gather_labels(trainer, self.samples[dataloader_idx])
        has_label, is_finite = ~labels.isnan().any(1), outputs.isfinite().all(1)
        self._warn_of_samples(dataloader_idx, is_finite, has_label)
        if self.task.has_classes and may_be_probabilities(outputs[is_finite]):
            self.warn_of_probabilities()
        if not trainer.fast_dev_run and not bool(has_label.any()):  # type: ignore[attr-defined]
            self._warn_if_blind()
        if not bool(is_finite.any()):
            return dict.fromkeys(self.names, math.nan) if len(outputs) else {}
        counts = has_label & is_finite
        num_labels = int(counts.sum())
        found = self._reference.predictions(dataloader_idx) if self._verdict.is_trusted else None
        if found is None and num_labels == 0:
            return {}
        y = labels[counts]
        drawn = self.task.classes(y) if self.task.has_classes else y
        values = all_values(outputs[counts], y, drawn[None], self.metrics, self.task)
        if found is not None:
            order, q = found
            expected = self._expect(dataloader_idx, outputs[order], q, is_finite[order] & q.isfinite().all(1))
            values = join_values(expected, values, num_labels, self.task)
        return self._remember(trainer, dataloader_idx, values, num_labels)

    def _remember(
        self, trainer: Trainer, dataloader_idx: int, values: dict[str, float], num_labels: int
    ) -> dict[str, Tensor | float]:
        """Add a row to the history, and return its values by their names, without those that are nan."""
        row = {"epoch": trainer.current_epoch, "step": trainer.global_step, "dataloader_idx": dataloader_idx}
        named = {EXPECTED + name: values[name] for name in ("score", *self.metrics)}
        about = {"temperature": values["temperature"], "num_labels": num_labels}
        self.history.append(row | named | about | {"reference": self.record.num_references})
        return {name: value for name, value in named.items() if not math.isnan(value)}

    @property
    def _verdict(self) -> Verdict:
        return self.record.verdict or Verdict()

    def _gather_labels(self, trainer: Trainer, samples: KeptSamples) -> Tensor:
        """Gather the labels of kept samples as a matrix ``(N, K)``, nan where a sample has none."""
        parts = [torch.zeros(0, self._num_outputs)]
        for batch in samples.batches:
            y = torch.full((batch.size, self._num_outputs), math.nan)
            if batch.labels is not None:
                counts = self.task.has_label(batch.labels)
                y[counts] = self.task.as_matrix(batch.labels, self._num_outputs).float()[counts]
            parts.append(y)
        return gather(trainer, torch.cat(parts))

    def _expect(self, dataloader_idx: int, outputs: Tensor, q: Tensor, is_finite: Tensor) -> dict[str, float]:
        """Compute what to expect by labels that are drawn once from the predictions of the reference."""
        key = dataloader_idx, self.record.num_references
        if key not in self._draws:
            self._draws[key] = draw_labels(q, self.task.name, self._verdict.residuals)
        outputs, q, draws = outputs[is_finite], q[is_finite], self._draws[key][:, is_finite]
        expected = all_values(outputs, q, draws, self.metrics, self.task)
        is_bad = is_unrelated(outputs, q, self.task, expected["score"])
        expected["score"] += uncertainty(q, self.task, self._verdict.score)
        if dataloader_idx == 0:
            self._check_network(expected["score"], is_bad)
        return expected

    def _check_network(self, score: float, is_bad: bool) -> None:
        """Warn if the network is worse than a constant prediction after some validations, and does not improve."""
        is_falling = score < _FALLING * self._last_score
        self._last_score = score
        self._num_bad = self._num_bad + 1 if is_bad and not is_falling else 0
        if self._num_bad >= _SOME_VALIDATIONS:
            self.reporter.warn(
                "targets",
                f"finds the network worse than a constant prediction in {self._num_bad} validations. If your step "
                "changes targets (scales them, takes logarithms, maps classes), do the same in `targets=`; if it makes "
                "logits of what `forward` returns, do so in `outputs=`.",
            )

    def _warn_of_samples(self, dataloader_idx: int, is_finite: Tensor, has_label: Tensor) -> None:
        where = f"dataloader {dataloader_idx}"
        num_non_finite = int((~is_finite).sum())
        if num_non_finite > 0:
            message = f"on {where}: {num_non_finite} samples gave nan or inf, and were left out."
            self.reporter.warn("nan", message, num_non_finite, kind=str(dataloader_idx))
        if self.validation_labels and not bool(has_label.any()):
            message = (
                f"found no label in the batches of {where}, so labels are not used. If they have some, set `targets=`."
            )
            self.reporter.warn("labels", message, kind="none")

    def _warn_if_blind(self) -> None:
        if self._reference.is_final and not self._verdict.is_trusted and self._verdict.learner:
            is_one_class = self._verdict.majority == 1
            sees = "has seen labels of one class alone" if is_one_class else "sees too little of the inputs"
            message = (
                f"logs nothing: the reference {sees}, so nothing says when to stop. Callbacks that monitor "
                "it take the last epoch. Set `features=`, or label some validation samples (`validation_labels=True`)."
            )
            self.reporter.warn("blind", message)

    def worst_values(self, dataloader_idx: int) -> dict[str, float]:
        """Return the worst value of each name; if the reference may not choose, one that is better than all so far."""
        rows = [row for row in self.history if row["dataloader_idx"] == dataloader_idx]
        has_labels = any(row["num_labels"] > 0 for row in rows)
        says_something = self._verdict.is_trusted and self._reference.predictions(dataloader_idx) is not None
        is_blind = self._reference.is_final and not says_something and not has_labels
        size = _BETTER + self.record.num_validations if is_blind else -WORST
        return {name: size if self._directions()[self.prefix + name] else -size for name in self.names}


def checked_metrics(metrics: Mapping[str, Metric] | MetricCollection) -> dict[str, Metric]:
    """Return names and metrics, or raise MisconfigurationException."""
    expected = "a dict of names and torchmetrics metrics, or a `MetricCollection`"
    check_argument("metrics", metrics, isinstance(metrics, Mapping | MetricCollection), expected)
    found = dict(metrics.items())
    for name, metric in found.items():
        check_argument("metrics", metric, isinstance(name, str) and isinstance(metric, Metric), expected)
        has_direction = isinstance(metric.higher_is_better, bool)
        check_argument(f"metrics[{name!r}].higher_is_better", metric.higher_is_better, has_direction, "True or False")
        check_argument("metrics", name, name != "score", "named otherwise, since `expected_score` is ours")
    return found
