"""The Lightning callback: which batches, which inputs, which outputs, which noise, and what is logged."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_sensitivity.arguments import (
    DEFAULT_NOISE_STD,
    check_argument,
    check_at,
    check_inputs,
    check_int,
    check_method,
    check_selector,
    chosen_perturbation,
)
from lightning_sensitivity.batch_measurement import BatchMeasurement
from lightning_sensitivity.checks import check_loop, check_model, check_names, check_processes
from lightning_sensitivity.dashboard import custom_scalars_layout
from lightning_sensitivity.isolation import no_trace
from lightning_sensitivity.loaders import loader_name, num_batches, without_loader
from lightning_sensitivity.perturbations import Perturbation
from lightning_sensitivity.readings import RISK, SENSITIVITY, LoaderStatistics
from lightning_sensitivity.risk_measurement import RiskMeasurement
from lightning_sensitivity.sensitivity_measurement import SensitivityMeasurement
from lightning_sensitivity.tasks import TASKS

__all__ = ["SensitivityMonitor"]

_CHECKPOINT_KEY = "lightning_sensitivity.initial_weights"
_SAMPLES_KEY = "lightning_sensitivity.training_samples."  # and the prefix of the monitor


class SensitivityMonitor(Callback):
    r"""Log the output sensitivity of the model on every validation epoch, and an estimate of its risk, without labels.

    Sensitivity is the variance of the class-averaged change of the outputs under Gaussian input noise (Forouzesh,
    Salehi and Thiran, ICPR 2020, `arXiv:2007.15378`_); see :class:`~lightning_sensitivity.OutputSensitivity`. The risk
    is the Brier score (in a regression the mean squared error) on unseen samples; see
    :func:`~lightning_sensitivity.functional.risk_estimate`. The estimate needs the labels of training, and none of
    validation.

    **Logged values**, each under ``prefix``, and with several loaders under Lightning's ``/dataloader_idx_N``:

    - ``risk_estimate``: the estimated risk, the one to monitor:
      ``EarlyStopping(monitor="val_risk_estimate", patience=10)``; in ``Trainer.fit`` alone
    - ``risk_training``, ``risk_uncertainty``, ``risk_variance``: its terms, of which it is the sum
    - ``sensitivity``: S, in squared units of the outputs
    - ``sensitivity_stderr``: one standard error of S, over samples and noise. The noise is the same in every epoch,
      so that two epochs of one run are compared more sharply than their error bars say.
    - ``sensitivity_log10``: log10 of S, which spans decades during training
    - ``loss_estimate``: the paper's Equation 9, for models of two or more outputs;
      :func:`~lightning_sensitivity.functional.loss_estimate` says how far it can be believed

    S is smallest before training and grows with the gap between holdout and training loss, so
    ``EarlyStopping(monitor="val_sensitivity", mode="min")`` stops at once. Where training labels are wrong, the risk is
    that of labels as wrong. A value that has no meaning in an epoch (see
    ``nan_strategy``; log10 of 0) is not logged; an ``EarlyStopping`` that may meet that needs ``strict=False``.

    It costs ``num_draws`` forward passes per validation batch that is measured (``num_samples``), where
    ``validation_step`` calls ``self(x)`` on the batch's own tensor, in ``fit``: its outputs are used, but for the first
    batch of a loader. Elsewhere it is one more; a debug message says which, and why. For the risk one more (or at least
    eight in all, where fewer batches are measured), and those of ``num_training_samples`` per validation. The weights
    from before training are kept in the memory of the CPU and in checkpoints; two copies of the weights are on the
    device while validation runs.

    It changes nothing about training: weights, buffers, optimizers, random streams, module modes and logged losses are
    those of a run without it. The exception is Python state without tensors that ``forward`` itself changes: a counter,
    a generator of its own.

    Args:
        noise_std: σ of the noise in the units that the model receives, one number or one per channel (dimension 1 of
            the input). After ``Normalize(mean, std)``, σ in pixel units is ``[σ / s for s in std]``.
        perturbation: What takes the place of Gaussian noise: one of :mod:`~lightning_sensitivity.perturbations` or
            :mod:`~lightning_sensitivity.image_perturbations`, or any callable ``(x, generator) -> x'`` that gives a
            tensor like ``x`` and draws from the generator alone. The loss estimate needs its ``second_moment(x)``,
            and is left out where it has none.
        at: Name of a submodule, such as ``"model.embeddings"``, whose output is perturbed in place of the model's
            input, each time that it runs; σ is in the units of that output. For inputs that can take no noise (token
            ids). A list of names gives a profile, one pass a name and draw, under ``sensitivity/<name>`` and so on.
        method: ``"noise"``, or ``"gradient"`` for the limit of small noise, Σ σ² E[(∂ mean_k f_k / ∂x)²] over the
            elements of x, by one backward pass (the Jacobian norm of Novak et al., ICLR 2018, along one direction): no
            noise, so that the error bar is that of the samples alone, at about three forward passes. For independent
            noise, one output vector a sample that depends on no other sample, and models that are differentiable all
            the way: what runs under ``no_grad`` or rounds is not seen.
        num_draws: Noise draws per sample.
        num_samples: How many samples times draws are measured per loader and epoch, over all processes, in whole
            batches, evenly spaced over the loader and always the same. 1,200 give a standard error of about 5 %, and a
            cost that does not grow with the loader. All, if None, and of a loader that has no length.
        seed: Seed of the noise. A batch gets the same noise in every epoch, and different batches, loaders, draws and
            processes get different noise.
        prefix: Put before the names in ``Trainer.fit`` and ``Trainer.validate``. ``"val/"`` puts the charts into
            TensorBoard's group of ``val/loss``. Two monitors need two.
        test_prefix: The same for ``Trainer.test``.
        inputs: What to perturb: a key or an index of the batch, or a callable ``batch -> arguments of the model`` (one,
            or a tuple of them) of which the first is perturbed. A list of keys or indices perturbs several. By default
            a tensor batch itself, the first element of a tuple or list, the only floating tensor of a mapping or
            dataclass. The rest is passed on unchanged, as far as the model's ``forward`` takes it; see
            :func:`~lightning_sensitivity.batches.prepare_call`.
        outputs: Which of the model's outputs to compare, logits (not log-probabilities) of shape ``(N, K, ...)``: a
            key or attribute, an index, or a callable ``result -> tensor`` or ``(result, batch) -> tensor``, which can
            leave out padding by a mask in the batch. By default a tensor itself, the first element of a tuple or list,
            ``logits`` of a mapping or object.
        targets: Where the labels are in a training batch: a key, an index, or a callable ``batch -> tensor``. By
            default the last element of a tuple or list of which ``forward`` takes the others, or what a mapping calls
            ``label``, ``labels``, ``target``, ``targets`` or ``y``.
        task: What the labels are: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``. ``"auto"``
            infers it where labels and outputs leave no doubt (:func:`~lightning_sensitivity.tasks.infer_task`).
            Otherwise there is a warning and no risk estimate, or an error, if something monitors it. None leaves it
            out.
        num_training_samples: How many training samples are kept, over all processes, to score the model on: the first
            batches of the fit, whole.
        save_training_samples: Put these samples into checkpoints, so that a resumed curve of the risk estimate is bit
            for bit the one of an uninterrupted run (of one process). Otherwise a fit that resumes keeps new ones, and
            the curve steps by their sampling error. It makes checkpoints larger, and they then hold training data.
        per_output: Log the mean over outputs of the variance of each output's change instead of the variance of their
            average. Meaningful for probabilities, too; gives no loss estimate.
        nan_strategy: What to do at the end of a loader whose outputs were nan or inf: ``"error"`` raises, ``"warn"``
            warns and logs nothing for it.
        before_training: Also log the untrained network at step 0. Lightning's sanity check then runs over the whole
            validation set. Not done where training resumes.

    Raises:
        MisconfigurationException: If an argument is not one of the above; in ``setup``, if the model has no
            ``forward``, if no validation loop will run, if two monitors log under one prefix, or if the strategy or
            the validation step is of a kind that is not supported; at the first validation batch, if the tensor to
            perturb or the output can't be told, or the model can't be run on it; before the first training step, if
            labels or task can't be told or do not fit (a warning with ``task="auto"``, where nothing monitors the
            estimate), or training resumes without the weights from before it; at the end of the sanity check or
            of the first validation, if somebody else logs one of the names, too.
        TypeError: At the first validation batch, if outputs are not floating.
        ValueError: At the first validation batch, if outputs are a scalar, if shapes of clean and noisy outputs differ
            or σ per channel does not fit, or with ``method="gradient"`` if outputs have positions or no gradient
            reaches what is perturbed; at the end of a validation loader, if outputs were nan or inf
            (``nan_strategy="error"``) or probabilities, or their number changed.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning_sensitivity import SensitivityMonitor
        >>> trainer = Trainer(callbacks=[SensitivityMonitor(noise_std=0.1)], logger=False)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378

    """

    def __init__(
        self,
        noise_std: float | Sequence[float] = DEFAULT_NOISE_STD,
        perturbation: Perturbation | Callable[[Tensor, torch.Generator], Tensor] | None = None,
        at: Sequence[str] | str | None = None,
        method: str = "noise",
        num_draws: int = 1,
        num_samples: int | None = 1200,
        seed: int = 0,
        prefix: str = "val_",
        test_prefix: str = "test_",
        inputs: Callable[[Any], Any] | Sequence[int | str] | int | str | None = None,
        outputs: Callable[..., Any] | int | str | None = None,
        targets: Callable[[Any], Any] | int | str | None = None,
        task: str | None = "auto",
        num_training_samples: int = 500,
        save_training_samples: bool = False,
        per_output: bool = False,
        nan_strategy: str = "error",
        before_training: bool = False,
    ) -> None:
        self.perturbation = chosen_perturbation(noise_std, perturbation)
        check_at(at)
        check_method(method, self.perturbation, num_draws, per_output)
        check_int("num_draws", num_draws, minimum=1)
        if num_samples is not None:
            check_int("num_samples", num_samples, minimum=1)
        check_int("seed", seed)
        check_argument("prefix", prefix, isinstance(prefix, str), "a str")
        check_argument("test_prefix", test_prefix, isinstance(test_prefix, str), "a str")
        check_inputs(inputs)
        for name, value in (("outputs", outputs), ("targets", targets)):
            check_selector(name, value)
        tasks = ("auto", *TASKS, None)
        check_argument("task", task, task in tasks, f"one of {', '.join(map(repr, tasks))}")
        check_int("num_training_samples", num_training_samples, minimum=1)
        valid = isinstance(save_training_samples, bool)
        check_argument("save_training_samples", save_training_samples, valid, "a bool")
        check_argument("per_output", per_output, isinstance(per_output, bool), "a bool")
        check_argument("nan_strategy", nan_strategy, nan_strategy in ("error", "warn"), "'error' or 'warn'")
        check_argument("before_training", before_training, isinstance(before_training, bool), "a bool")
        self.prefix = prefix
        self.test_prefix = test_prefix
        self.targets = targets
        self.task = task
        self.save_training_samples = save_training_samples
        self.before_training = before_training
        self._sensitivity = SensitivityMeasurement(
            self.perturbation, at, method, num_draws, num_samples, inputs, outputs, per_output, nan_strategy
        )
        self._risk = RiskMeasurement(
            task, num_training_samples, inputs, outputs, targets, at is None, save_training_samples
        )
        self._has_measured = False
        self._warned_of: set[tuple[str, str]] = set()  # names of logged values, and what was wrong
        self._num_sanity_val_steps: float | None = None  # what `before_training` has replaced
        self._batches = BatchMeasurement(self._sensitivity, self._risk, seed)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Check what can be checked before the first epoch."""
        self._risk.end_fit()  # one that failed has left its samples
        self._batches.begin_run()
        if stage not in ("fit", "validate", "test"):
            return
        check_model(pl_module)
        check_loop(trainer, pl_module, stage)
        check_processes(trainer, pl_module)
        attribute = "test_prefix" if stage == "test" else "prefix"
        prefixes = [getattr(monitor, attribute) for monitor in monitors(trainer)]
        if len(set(prefixes)) < len(prefixes):
            raise MisconfigurationException(
                f"Each `SensitivityMonitor` should have a `{attribute}` of its own, got {prefixes}."
            )
        untrained = trainer.global_step == 0 and trainer.ckpt_path is None
        is_cut = trainer.num_sanity_val_steps < math.inf and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if stage == "fit" and self.before_training and untrained and is_cut:
            self._num_sanity_val_steps, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, math.inf

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check the names of submodules, and lay out TensorBoard's Custom Scalars: related curves share a chart."""
        self._sensitivity.check(pl_module)
        all_monitors = monitors(trainer)
        if self is all_monitors[0]:  # a second layout would take the place of the first
            layout = custom_scalars_layout({monitor.prefix: monitor.task is not None for monitor in all_monitors})
            for logger in trainer.loggers:
                # By name, because the logger of `pytorch_lightning` is another class.
                if any(base.__name__ == "TensorBoardLogger" for base in type(logger).__mro__):
                    logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch whether validation ever runs, and remember what the risk estimate needs."""
        self._has_measured, self._warned_of = False, set()
        # Who says where the labels are, or what, or monitors the estimate, must get it.
        monitored = [getattr(callback, "monitor", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
        monitored += [config.monitor for config in trainer.lr_scheduler_configs]
        names = {self.prefix + name for name in RISK.values()}
        is_monitored = any(without_loader(str(monitor)) in names for monitor in monitored)
        is_required = self.task != "auto" or self.targets is not None or is_monitored
        self._risk.start_fit(trainer, pl_module, is_required)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Keep the first batches."""
        if self._risk.wants_batch(batch_idx):
            with no_trace(pl_module), trainer.precision_plugin.val_step_context():
                self._risk.keep(trainer, pl_module, batch)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so if it never did, and if the risk estimate's minimum is of the kind that is the least reliable."""
        if not self._has_measured:
            rank_zero_warn(
                "`SensitivityMonitor` has logged nothing in this fit: validation never gave it a batch. Check the"
                " validation loader, `check_val_every_n_epoch` and `val_check_interval`."
            )

        for dataloader_idx, validation in self._risk.early_minima().items():
            name = loader_name(f"{self.prefix}{RISK['risk']}", dataloader_idx, len(num_batches(trainer)))
            rank_zero_warn(
                f"`{name}` was lowest at validation {validation}, counted from 0. So early a minimum is the least"
                " reliable: look at its terms, of which the variance may be too large for this model."
            )

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start with empty statistics."""
        self._begin_epoch(trainer, pl_module)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Measure a batch before ``validation_step`` may change it, or watch for the outputs that the step computes."""
        self._batches.begin(trainer, pl_module, batch, batch_idx, dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Measure a batch whose outputs the step has computed."""
        self._end_batch(trainer, pl_module, batch_idx, dataloader_idx)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have every process take part in every reduction, and report what was wrong, after a sanity check too."""
        self._finish(trainer, pl_module, self.prefix)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Free the device's memory, and require that the logged names are ours alone, after a sanity check too."""
        self._risk.end_validation()
        may_have_risk = trainer.sanity_checking and self.task is not None  # later it is among the values
        self._check_names(trainer, self.prefix, RISK.values() if may_have_risk else ())

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the untrained network, if wanted, and forget the batches of the sanity check."""
        self._restore_sanity_check(trainer)
        if self.before_training and trainer.global_step == 0:
            computed = self._sensitivity.values()
            num_loaders = len(num_batches(trainer))
            metrics = {
                loader_name(self.prefix + name, idx, num_loaders): float(value)
                for idx, values in computed.items()
                for name, value in values.items()
            }
            for logger in trainer.loggers:
                logger.log_metrics(metrics, step=trainer.global_step)
        self._forget_batches()

    on_test_start = on_validation_start
    on_test_batch_start = on_validation_batch_start
    on_test_batch_end = on_validation_batch_end

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have every process take part in every reduction, and report what was wrong."""
        self._finish(trainer, pl_module, self.test_prefix)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Require that the logged names are ours alone."""
        self._check_names(trainer, self.test_prefix)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Drop the statistics and the samples."""
        self._restore_sanity_check(trainer)
        self._forget_batches()
        if not self.save_training_samples:  # a checkpoint may be saved now
            self._risk.end_fit()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave no hook on the module."""
        self._restore_sanity_check(trainer)
        self._forget_batches()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the weights from before training, so that the risk estimate can go on where training resumes."""
        if self._risk.initial_weights is not None:
            checkpoint[_CHECKPOINT_KEY] = self._risk.initial_weights  # one entry for all monitors, which agree on it
        if self.save_training_samples:
            checkpoint[_SAMPLES_KEY + self.prefix] = self._risk.samples_state()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take them back."""
        # One of step 0 was made before training, by Lightning's finders, say: its weights are the ones to remember.
        if _CHECKPOINT_KEY in checkpoint or checkpoint["global_step"] > 0:
            self._risk.restore(checkpoint.get(_CHECKPOINT_KEY))
        if self.save_training_samples and _SAMPLES_KEY + self.prefix in checkpoint:
            self._risk.restore_samples(checkpoint[_SAMPLES_KEY + self.prefix])

    def _check_names(self, trainer: pl.Trainer, prefix: str, more: Iterable[str] = ()) -> None:
        names = {name for values in self._sensitivity.values().values() for name in values}.union(more)
        argument = "test_prefix" if trainer.testing else "prefix"
        check_names(trainer, {prefix + name for name in names}, argument)

    def _restore_sanity_check(self, trainer: pl.Trainer) -> None:
        if self._num_sanity_val_steps is not None:
            trainer.num_sanity_val_steps = self._num_sanity_val_steps
            self._num_sanity_val_steps = None

    def _forget_batches(self) -> None:
        self._batches.stop_watching()
        self._sensitivity.forget()
        self._risk.end_validation()

    def _statistics(self, pl_module: pl.LightningModule, dataloader_idx: int) -> list[LoaderStatistics]:
        return self._sensitivity.statistics(dataloader_idx, pl_module.device, self._risk.task)

    def _begin_epoch(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._sensitivity.check(pl_module)
        self._forget_batches()

    def _end_batch(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch_idx: int, dataloader_idx: int
    ) -> None:
        self._batches.end(trainer, pl_module, batch_idx, dataloader_idx)
        if batch_idx == 0 and not trainer.sanity_checking:
            self._log(pl_module, self.test_prefix if trainer.testing else self.prefix, dataloader_idx)

    def _log(self, pl_module: pl.LightningModule, prefix: str, dataloader_idx: int) -> None:
        # A Metric is logged once; Lightning reads it when the loader is done. In one hook, whichever way a batch was
        # measured: the order of what is logged is that of its reductions, which has to be the same in all processes.
        for statistics in self._statistics(pl_module, dataloader_idx):
            for name, reading in statistics.readings().items():
                # `metric_attribute` is checked only for Metrics that belong to the module; this one must not.
                pl_module.log(prefix + name, reading, on_step=False, on_epoch=True, metric_attribute=name)

    def _finish(self, trainer: pl.Trainer, pl_module: pl.LightningModule, prefix: str) -> None:
        self._batches.stop_watching()  # the module's own hook comes next, and may want it without ours
        num_loaders = len(num_batches(trainer))
        num_changes = []
        for dataloader_idx in range(num_loaders):
            all_statistics = self._statistics(pl_module, dataloader_idx)
            for statistics in all_statistics:
                statistics.compute()
                num_changes.append(int(statistics.num_changes))
            if trainer.sanity_checking:
                continue
            for statistics in all_statistics:
                self._warn(statistics, prefix, dataloader_idx, num_loaders)
                if not statistics.has_own_batches:
                    # The other processes log these names; a monitor in this one must find them, too.
                    for name, reading in statistics.readings().items():
                        full_name = loader_name(prefix + name, dataloader_idx, num_loaders)
                        pl_module.log(full_name, reading, metric_attribute=name, add_dataloader_idx=False)
            if self._risk.task is not None:
                self._risk.add_estimate(dataloader_idx, all_statistics[0].compute().get(RISK["risk"]))
        if trainer.sanity_checking:
            return
        self._has_measured = self._has_measured or any(num_changes)
        if not any(num_changes):
            rank_zero_warn("`SensitivityMonitor` got no batch in this epoch: nothing is logged.")
        if 1 in num_changes:
            rank_zero_warn(
                "Output sensitivity is a variance, and a validation loader gave a single output change: nothing is"
                " logged for it. Use more validation samples or `num_draws`."
            )

    def _warn(self, statistics: LoaderStatistics, prefix: str, dataloader_idx: int, num_loaders: int) -> None:
        name = loader_name(prefix + statistics.full_name(SENSITIVITY), dataloader_idx, num_loaders)
        for kind, warning in statistics.warnings.items():
            if (name, kind) not in self._warned_of:  # else it would come with every epoch
                self._warned_of.add((name, kind))
                rank_zero_warn(f"`SensitivityMonitor`, `{name}`: {warning}")


def monitors(trainer: pl.Trainer) -> list[SensitivityMonitor]:
    """The monitors among the callbacks of a Trainer.

    Args:
        trainer: The Trainer.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SensitivityMonitor)]
