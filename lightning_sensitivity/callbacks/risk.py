"""The callback that logs what to expect of unseen samples, and so what to stop by."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_sensitivity.callbacks.checks import (
    EXPECTED,
    check_class_shares,
    check_metrics,
    check_monitored,
    check_outputs,
)
from lightning_sensitivity.callbacks.history import History, of_state, plot_history, state_of
from lightning_sensitivity.callbacks.monitor import Monitor, Values
from lightning_sensitivity.callbacks.predicted import Predicted
from lightning_sensitivity.callbacks.predictions import Predictions, predict_both
from lightning_sensitivity.callbacks.processes import agree
from lightning_sensitivity.callbacks.risk_run import Options, RiskRun, begin, warn_of_odd_labels
from lightning_sensitivity.callbacks.run import is_fitting
from lightning_sensitivity.callbacks.summary import Curve, summarize
from lightning_sensitivity.compat import PlotType
from lightning_sensitivity.functional.expected import Loss
from lightning_sensitivity.functional.tasks import TASK_NAMES, TASKS
from lightning_sensitivity.messages import Selector, check_argument, check_bool, check_estimator, describe_error
from lightning_sensitivity.model.call import Function
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.kept import KeptSamples
from lightning_sensitivity.model.reader import BatchReader

_NUM_LABELLED = 2000  # validation samples that are kept if they have labels, over all processes


class RiskMonitor(Monitor):
    r"""A callback that logs what to expect of unseen samples in every validation, without their labels.

    A small model of the training labels, the *reference* (:class:`~lightning_sensitivity.Reference`), stands in for
    validation labels. It is calibrated on labels that it has not seen, and never sees the network. In every validation
    of a fit, these are logged after ``prefix``, for labels that are drawn once from its predictions:

    - ``expected_loss``: the cross-entropy, the squared error in a regression, or your ``loss``.
    - ``expected_accuracy`` and ``expected_auroc``, none in a regression; or ``expected_<name>`` for each of
      ``metrics``. Of several labels, those that the reference can't tell are left out.

    The reference is made once, of the first whole epoch: 50,000 rows of a table, 10,000 images, signals or texts,
    3,000 samples that an encoder sees, 512 MiB over all processes. If it sees too little of the inputs, nothing is
    logged, and callbacks that monitor it take the last epoch.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``.
        loss: A function of outputs and labels that returns their mean, or one number for each; in a regression
            outputs may be anything, such as quantiles ``(N, Q)``.
        metrics: Torchmetrics by name, which get probabilities ``(N, K)``, or ``(N,)`` for ``"binary"``, and
            classes; in a regression outputs and targets.
        targets: A function ``batch -> labels``, by default
            :func:`~lightning_sensitivity.model.select_targets`; -100, or nan for several labels and in a
            regression, is unknown.
        validation_labels: Use validation labels, too; the reference counts as 1,000 of them.
        features: What the reference sees, by default the inputs: a pretrained ``nn.Module`` that gets these, or a
            function ``batch -> (N, D)``. It must know as much as the network.
        reference: An estimator of scikit-learn to be the reference, with ``predict_proba`` unless in a regression.
        groups: A function ``batch -> (N,)`` of numbers or strings, such as the patient, if unseen samples are of
            other ones.
        class_shares: The shares of classes among unseen samples, if training samples have others, or
            ``"estimate"`` (Saerens et al., 2002).
        num_samples: Validation samples per loader, over all processes; with validation labels at least 2,000;
            None for all.
        prefix: Prefix of the logged names.
        inputs: A function ``batch -> arguments``; see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K)`` or ``(N,)``.
        call: A function ``(module, batch) -> result`` in place of ``forward``, beside ``inputs`` or ``features``.
        prog_bar: Show the first value on the progress bar.

    Attributes:
        history: A dict for each validation and loader, which ``pandas.DataFrame`` takes.
        summary: What the line at the end of a fit says, as a dict that ``json`` takes; empty before.

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
        class_shares: Sequence[float] | Literal["estimate"] | None = None,
        num_samples: int | None = 600,
        prefix: str = "val/",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        call: Function | None = None,
        prog_bar: bool = False,
    ) -> None:
        check_argument("task", task, task in TASKS, f"one of {TASK_NAMES}")
        check_argument("loss", loss, loss is None or callable(loss), "a function of outputs and labels, or None")
        check_bool("validation_labels", validation_labels)
        rules = TASKS[task]
        check_estimator("reference", reference, rules)
        check_class_shares(class_shares, rules)
        selectors: dict[str, Any] = {"inputs": inputs, "outputs": outputs, "targets": targets, "call": call}
        reader = BatchReader(**selectors, features=features, groups=groups, task=rules)
        super().__init__(reader, num_samples, prefix, prog_bar)
        if validation_labels and self.num_samples is not None:
            self.num_samples = max(self.num_samples, _NUM_LABELLED)
        self.task = rules
        self.loss = loss
        own_metrics = None if metrics is None else check_metrics(metrics)
        self.metrics = rules.default_metrics(2) if own_metrics is None else own_metrics
        self.validation_labels = validation_labels
        self.history: History = []
        self.summary: dict[str, Any] = {}
        self._options = Options(reader, loss, own_metrics, reference, class_shares, validation_labels)
        self._saved: Predicted | None = None  # what an earlier part of this fit has predicted
        self._risk_run: RiskRun | None = None  # of the last fit, from its first training batch on
        self._model_id = 0  # of the model of the last fit

    @property
    def reference(self) -> Any:
        """The fitted :class:`~lightning_sensitivity.Reference`, in the first process; None before."""
        return None if self._risk_run is None else self._risk_run.reference.fitted

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
            ValueError: If there is no reference or no batch, or it can't read the batches.

        Example:
            >>> from lightning_sensitivity import RiskMonitor
            >>> risk = RiskMonitor()
            >>> # after trainer.fit(model, train_loader, val_loader): risk.predict(model, new_loader).mean
        """
        if self._risk_run is None or self.reference is None:
            raise ValueError("Expected a fit that has made a reference, in the first process, but there is none.")
        return predict_both(self.reader, model, self._risk_run.reference, dataloader)

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
        if self._options.metrics is None:  # of the classes of the last fit
            self.metrics = self.task.default_metrics(2)
        has_begun = trainer.global_step > 0 or trainer.current_epoch > 0  # raw optimizers count no steps
        goes_on = has_begun and self._model_id == id(pl_module)  # of which a Trainer holds the last one
        if goes_on:
            self._restore(self.history, self._predicted())
        else:
            self._restore([], None)
        self._model_id = id(pl_module)
        self._risk_run = None
        self.summary = {}
        self.reader.reset()

    def _predicted(self) -> Predicted | None:
        """Return what the reference of this fit has predicted, also in an earlier part of it."""
        return self._saved if self._risk_run is None else self._risk_run.reference.known

    def _restore(self, history: History, predicted: Predicted | None) -> None:
        """Go on with what is known of an earlier part of this fit."""
        self.history, self._saved = history, predicted
        for row in history:
            known = {name: value for name, value in row.items() if name in self.names and value is not None}
            self.run.missing.remember(row["dataloader_idx"], known)

    @property
    def state_key(self) -> str:
        """Key of the state in a checkpoint; monitors of one Trainer differ in their prefix."""
        return self._generate_state_key(prefix=self.prefix)

    # Not `state_dict`, of which Lightning refuses two with one key before we can name the argument.

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the history, and what the reference predicts of the kept samples, with which a resumed fit goes on."""
        checkpoint["callbacks"][self.state_key] = state_of(self.history, self._predicted())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore what was saved, if anything, in a fit."""
        if trainer.state.fn != TrainerFn.FITTING or self.state_key not in checkpoint["callbacks"]:
            return
        try:
            self._restore(*of_state(checkpoint["callbacks"][self.state_key]))
        except Exception:  # whatever is there
            message = "leaves its state in the checkpoint alone: another version has saved it. So this fit begins anew."
            self.run.reporter.warn("checkpoint", message)

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
        if self.summary or self._risk_run is None or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._has_no_validation(self._risk_run):
            message = "logged nothing: the run ended before a validation that follows a whole training epoch."
            self.run.reporter.warn("samples", message)
            return
        with self.run.report_failure("could not say which epoch to choose", "Look at the curve."):
            verdict, doubts = self._risk_run.reference.verdict, self._risk_run.expectation.doubts
            summary = summarize(trainer, self._curves(trainer), self.history, verdict, doubts)
            self.summary = summary.as_dict()
            say = rank_zero_warn if summary.epoch is None else rank_zero_info
            say(summary.line())

    def _has_no_validation(self, run: RiskRun) -> bool:
        """Return whether no validation could have a value."""
        return not run.reference.was_tried and not any(self.names[0] in row for row in self.history)

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
        self.run.reporter.look_at(batch)
        with self.run.report_failure("can't read the first training batch", "Nothing is expected."):
            self._risk_run = begin(
                self._options, trainer, module, batch, self.check_model, self.run.reporter, self._saved
            )
            self.metrics = self._risk_run.expectation.metrics
        check_monitored(trainer, self.prefix, self.directions)

    def learn(self, trainer: Trainer, module: LightningModule, batch: object, batch_idx: int) -> None:
        """Keep training samples."""
        if self._risk_run is None:
            return
        with (
            self.run.report_failure("could not keep a training batch", "It is left out."),
            trainer.precision_plugin.val_step_context(),
        ):
            self._risk_run.learn(trainer, module, batch, batch_idx)

    # A validation

    @property
    def directions(self) -> dict[str, bool]:
        """Whether the highest value is the best, by name without the prefix."""
        of_metrics = {EXPECTED + name: bool(metric.higher_is_better) for name, metric in self.metrics.items()}
        return of_metrics | {f"{EXPECTED}loss": False}

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse outputs of which nothing can be expected."""
        if not self.task.has_any_outputs(self.loss):
            check_outputs(outputs, self.task)

    def is_ready(self, trainer: Trainer) -> bool:
        """Return whether every process has its training samples; a sanity check needs none."""
        if not is_fitting(trainer):
            return bool(trainer.sanity_checking)
        can_read = agree(trainer, self._risk_run is not None)
        return can_read and self._risk_run is not None and self._risk_run.reference.is_ready(trainer)

    def keep(self, module: LightningModule, batch: object, batch_idx: int, samples: KeptSamples) -> None:
        """Keep a validation batch, with its labels if they are wanted."""
        kept = self.reader.keep(module, batch, batch_idx, samples.num_wanted, samples.max_bytes)
        if self.validation_labels and self.reader.may_have_labels(module, batch):
            try:
                shape = None if self._risk_run is None else self._risk_run.label_shape
                kept.labels = self.reader.kept_labels(module, batch, kept, shape)
            except MisconfigurationException as error:
                message = f"treats some validation batches as unlabelled: {describe_error(error)}"
                self.run.reporter.warn("labels", message)
            warn_of_odd_labels(self.reader, self.run.reporter)
        samples.add(kept)

    def measure(self, module: LightningModule, run: RunIsolated, samples: KeptSamples) -> tuple[Tensor, ...]:
        """Run the model on the kept samples of a loader; see :meth:`RiskRun.measure`."""
        if self._risk_run is None:  # a sanity check, which logs nothing
            return tuple(run(batch.call.to(module.device)) for batch in samples.batches)
        return self._risk_run.measure(module, run, samples)

    def prepare(self, trainer: Trainer) -> None:
        """Make the reference in the first validation that can have values; every process comes here."""
        assert self._risk_run is not None
        self._risk_run.prepare(trainer, self.run.samples)

    def compute_values(self, trainer: Trainer, dataloader_idx: int, *rows: Tensor) -> Values:
        """Compute what to expect on a loader, over all processes."""
        assert self._risk_run is not None
        return self._risk_run.compute(trainer, dataloader_idx, *rows)

    def remember(self, trainer: Trainer, dataloader_idx: int, values: Values) -> None:
        """Add a row to the history, with the left-out score of the reference, by which it is known."""
        row: Values = {"epoch": trainer.current_epoch, "step": trainer.global_step, "dataloader_idx": dataloader_idx}
        self.history.append({**row, "reference": None, "num_labels": 0, **values})

    def free(self) -> None:
        """Free the samples, those of training included."""
        super().free()
        if self._risk_run is not None:
            self._risk_run.reference.free()
