"""The callback that logs what to expect of unseen samples, and so what to stop by."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_sensitivity.callbacks.checks import (
    BLIND,
    EXPECTED,
    check_class_shares,
    check_inputs,
    check_metrics,
    check_monitored,
    check_outputs,
    check_targets,
    try_loss,
    try_metrics,
)
from lightning_sensitivity.callbacks.expectation import Expectation
from lightning_sensitivity.callbacks.monitor import Monitor, Values
from lightning_sensitivity.callbacks.processes import agree
from lightning_sensitivity.callbacks.run_reference import RunReference
from lightning_sensitivity.callbacks.summary import Curve, Summary, closing_line, plot_history, summarize
from lightning_sensitivity.compat import PlotType
from lightning_sensitivity.functional.expected import Loss
from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS
from lightning_sensitivity.functional.tensors import in_32_bits
from lightning_sensitivity.messages import Selector, check_argument, check_bool, check_estimator, describe_error
from lightning_sensitivity.model.isolation import RunIsolated, isolated
from lightning_sensitivity.model.kept import KeptSamples
from lightning_sensitivity.model.reader import BatchReader, check_count, move_batch
from lightning_sensitivity.reference.kinds import join_seen

_NUM_LABELLED = 2000  # validation samples that are kept if they have labels, over all processes
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


class RiskMonitor(Monitor):
    r"""A callback that logs what to expect of unseen samples in every validation, without their labels.

    A small model of the training labels, the *reference* (:class:`~lightning_sensitivity.Reference`), stands
    in for validation labels. It is checked and calibrated on labels that it has not seen, and never sees the
    network. Labels are drawn once from its predictions for validation samples, and metrics of the network
    against these labels are logged, only in ``Trainer.fit``, after ``prefix``:

    - ``expected_loss``: the cross-entropy, the squared error in a regression, or your ``loss``.
    - ``expected_accuracy`` and ``expected_auroc``, none in a regression; or ``expected_<name>`` for each of
      ``metrics``.

    Training samples are kept in the first whole epoch, of which the reference is made: 50,000 rows of a
    table, 10,000 images, signals or texts, 3,000 samples that an encoder sees, 512 MiB over all processes. If
    it sees too little of the inputs, nothing is logged, and callbacks that monitor these values take the last
    epoch.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``.
        loss: Your loss: a function of outputs and labels, in the form of ``targets``, on the device of the
            model. It returns their mean, or a number for each sample. In a regression outputs may then have
            any shape with samples first, such as quantiles ``(N, Q)``.
        metrics: Torchmetrics by name, or a ``MetricCollection``, each with ``higher_is_better``. They get
            probabilities ``(N, K)``, or ``(N,)`` for ``"binary"``, and classes; in a regression outputs and
            targets.
        targets: A function ``batch -> labels``; by default
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Use validation labels, which may be noisy, beside the reference, which counts as
            1,000 of them.
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
        prog_bar: Show the first metric, or the loss without any, on the progress bar.

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
        class_shares: Sequence[float] | Literal["estimate"] | None = None,
        num_samples: int | None = 600,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        prog_bar: bool = False,
    ) -> None:
        check_argument("task", task, task in TASKS, f"one of {TASK_NAMES}")
        check_argument("loss", loss, loss is None or callable(loss), "a function of outputs and labels, or None")
        check_bool("validation_labels", validation_labels)
        rules = TASKS[task]
        check_estimator("reference", reference, rules)
        check_class_shares(class_shares, rules)
        reader = BatchReader(inputs=inputs, outputs=outputs, targets=targets, features=features, task=rules)
        super().__init__(reader, num_samples, prefix, prog_bar)
        if validation_labels and self.num_samples is not None:
            self.num_samples = max(self.num_samples, _NUM_LABELLED)
        self.task = rules
        self.loss = loss
        self.metrics = rules.default_metrics(2) if metrics is None else check_metrics(metrics)
        self.validation_labels = validation_labels
        self.history: list[dict[str, Any]] = []
        self.summary: Summary = {}
        self._has_default = metrics is None
        self._estimator = reference
        self._class_shares = class_shares
        self._forget()

    def _forget(self) -> None:
        """Forget the last run."""
        self._is_started = False  # whether the first training batch was read
        self._shape: tuple[int, ...] | None = None  # of a prediction; None until then, and if that failed
        self._outputs = torch.zeros(0)  # of no sample, in the shape and type that those of all processes have
        self._of_reference: dict[int, Values] = {}  # what is expected of the reference itself, by loader
        self._reference: RunReference | None = None
        self._expectation: Expectation | None = None

    @property
    def reference(self) -> Any:
        """The fitted :class:`~lightning_sensitivity.Reference`, in the first process; None before."""
        return None if self._reference is None else self._reference.fitted

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
        if self._reference is None or self._reference.fitted is None:
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
            self.metrics = self.task.default_metrics(2)
        if trainer.global_step == 0 and trainer.current_epoch == 0:  # raw optimizers count no steps
            self.history = []
        self.summary = {}
        self.reader.reset()
        self._forget()

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
        if self.summary or self._reference is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        has_values = any(self.names[0] in row for row in self.history)
        if not has_values and not self._reference.is_made:
            message = "logged nothing: the run ended before a validation that follows a whole training epoch."
            self.reporter.warn("samples", message)
            return
        with self.reporter.report_failure("could not say which epoch to choose", "Look at the curve."):
            self.summary = summarize(trainer, self._curves(trainer), self.history, self._reference.verdict)
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
            check_monitored(trainer, self.prefix, self.directions)
        if self._reference is not None:
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
        labels = self.reader.labels(module, batch, None if self._has_any_outputs else shape)
        shape = tuple(labels.shape[1:]) if self._has_any_outputs else shape
        check_count(labels, len(outputs))
        check_targets(labels, self.task)
        if not self.reader.has_features:
            check_inputs(call.inputs(), labels)
        num_columns = self.task.num_columns(shape)
        check_class_shares(self._class_shares, self.task, num_columns)
        if self._has_default:
            self.metrics = self.task.default_metrics(num_columns)
        like = in_32_bits(labels).to(outputs.device)
        counts = self.task.has_label(labels)
        if bool(counts.any()):
            y = self.task.label_matrix(labels, num_columns)
            try_metrics(self.metrics, self.task.output_matrix(outputs.cpu())[counts], y[counts], self.task)
            if self.loss is not None:
                with isolated(module) as run:
                    run(try_loss, self.loss, in_32_bits(outputs)[counts], like[counts])
        self._outputs, self._shape = in_32_bits(outputs[:0]).cpu(), shape
        options = self._estimator, self._class_shares, self.reporter
        self._reference = RunReference(self.task, self.reader, *options, shape)
        self._expectation = Expectation(self.task, self.loss, self.metrics, like[:0], self.reporter)

    # A validation

    @property
    def directions(self) -> dict[str, bool]:
        """Whether the highest value is the best, by name without the prefix."""
        of_metrics = {EXPECTED + name: bool(metric.higher_is_better) for name, metric in self.metrics.items()}
        return of_metrics | {f"{EXPECTED}loss": False}

    @property
    def _has_any_outputs(self) -> bool:
        """Whether outputs may be anything that the loss takes, such as quantiles."""
        return self.task.has_any_outputs(self.loss)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs of which nothing can be expected."""
        if not self._has_any_outputs:
            check_outputs(outputs, self.task)

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether every process has its training samples; a sanity check needs none."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return bool(trainer.sanity_checking)
        return agree(trainer, self._reference is not None and self._reference.is_ready(trainer))

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch, with its labels if they are wanted."""
        kept = self.reader.keep(module, batch, batch_idx, samples.num_wanted, samples.max_bytes)
        if self.validation_labels and self.reader.may_have_labels(module, batch):
            try:
                kept.labels = self.reader.kept_labels(module, batch, kept, self._shape)
            except MisconfigurationException as error:
                self.reporter.warn("labels", f"treats some validation batches as unlabelled: {describe_error(error)}")
        samples.add(kept)

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> tuple[Tensor, ...]:
        """Run the model on the kept samples of a loader.

        Returns:
            Its outputs ``(N, ...)``, and labels ``(N, C)``, nan where a sample has none, on the CPU.
        """
        if self._shape is None:  # a sanity check, which logs nothing
            return tuple(run(batch.call.to(module.device)) for batch in samples.batches)
        num_columns = self.task.num_columns(self._shape)
        outputs, labels = [self._outputs], [torch.zeros(0, num_columns, dtype=torch.float32)]  # no other default
        for batch in samples.batches:
            outputs.append(in_32_bits(run(batch.call.to(module.device))).cpu())
            if batch.labels is None:
                labels.append(torch.full((batch.size, num_columns), math.nan, dtype=torch.float32))
            else:
                labels.append(self.task.label_matrix(batch.labels, num_columns).float())
        return torch.cat(outputs), torch.cat(labels)

    def prepare(self, trainer: Trainer) -> None:
        """Make the reference in the first validation that can have values; every process comes here."""
        assert self._reference is not None and self._expectation is not None
        if not self._reference.is_made:
            self._reference.make(trainer, self.samples)
            if self.reference is not None:
                self._expectation.warn_of_thresholds(self.reference.shares_)

    def compute_values(self, trainer: Trainer, dataloader_idx: int, *rows: Tensor) -> Values:
        """Compute what to expect on a loader, over all processes."""
        assert self._reference is not None and self._expectation is not None
        outputs, labels = rows
        if self.validation_labels and bool(labels.isnan().any(1).all()):
            message = (
                f"found no label in the batches of dataloader {dataloader_idx}, so labels are not used. If they have "
                "some, set `targets=`."
            )
            self.reporter.warn("labels", message, kind="none")
        unseen = self._reference.unseen.get(dataloader_idx)
        self._expectation.warn_of(dataloader_idx, outputs, unseen)
        with isolated(trainer.lightning_module) as run:  # losses and metrics may be parts of it, or draw numbers
            values: Values = run(self._expectation.values, outputs, labels, unseen)
            if dataloader_idx not in self._of_reference:  # the samples are those of every validation
                self._of_reference[dataloader_idx] = {}
                with self.reporter.report_failure("can't tell what to expect of the reference", "It is left out."):
                    own = run(self._expectation.values_of_reference, outputs, labels, unseen)
                    found = {f"reference_{name}": own[name] for name in self.names if name in own}
                    self._of_reference[dataloader_idx] = found
        if not values:
            self._warn_if_blind(trainer)
            return {}
        return values | self._of_reference[dataloader_idx]

    def remember(self, trainer: Trainer, dataloader_idx: int, values: Values) -> None:
        """Add a row to the history, with the left-out score of the reference, by which it is known."""
        row: Values = {"epoch": trainer.current_epoch, "step": trainer.global_step, "dataloader_idx": dataloader_idx}
        self.history.append({**row, "reference": None, "num_labels": 0, **values})

    def _warn_if_blind(self, trainer: Trainer) -> None:
        verdict = None if self._reference is None else self._reference.verdict
        if verdict is None or verdict.is_trusted or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        sees = "has seen labels of only one class" if verdict.majority == 1 else "sees too little of the inputs"
        self.reporter.warn("blind", f"logs nothing: the reference {sees}{BLIND}")

    def _free(self) -> None:
        super()._free()
        if self._reference is not None:
            self._reference.free()
