"""The callback that logs an estimate of the risk: what to stop by."""

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sensitivity.callbacks.base import Monitor
from lightning_sensitivity.callbacks.samples import TrainingSamples, check_loaders
from lightning_sensitivity.callbacks.utilities import watchers
from lightning_sensitivity.functional.risk import RiskTerms, diagnostics, variance_factor
from lightning_sensitivity.functional.tasks import TASKS, are_probabilities, check_classes, num_outputs
from lightning_sensitivity.metric import RiskEstimate
from lightning_sensitivity.model import ModelCall, noise_generator, select_targets, twins
from lightning_sensitivity.model.forward import Function, check_argument, check_functions, check_int, clone_tensors
from lightning_sensitivity.model.isolation import Run

_STRENGTH = 0.5  # of simulated twins; at full strength they break networks with max-pooling
_MIN_TWINS = 8  # with less than these, the variance would hang on the noise of a few


class RiskMonitor(Monitor):
    r"""Log an estimate of the Brier score on unseen samples on every validation epoch, to stop by.

    It needs only training labels, which may be wrong; see :func:`~lightning_sensitivity.functional.risk_estimate` for
    the formula, ``examples/studies/early_stopping`` for how well it works. Regressions and dense outputs have no estimate.

    **Logged values**, in ``Trainer.fit`` alone, with ``prefix`` before them: ``risk_estimate`` and its terms
    ``risk_claim`` (the score if probabilities were right), ``risk_overconfidence`` (how much worse it is on training
    labels), ``risk_memorization`` (how much more certain the model is of training samples) and ``risk_variance`` (how
    far other training samples would have changed it). If the first validation has no value, nan is logged: an
    ``EarlyStopping`` stops, unless it has ``check_finite=False``.

    A measured batch costs two forward passes (three with batch norm; more if fewer than 8 are measured), a validation
    one pass over the kept training samples. There are three copies of the weights.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"``, or ``"auto"``, to infer it from labels and outputs.
        targets: The labels of a training batch, a function ``batch -> tensor`` without randomness; by default see
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 don't count.
        num_training_samples: How many training samples are kept, over all processes, in whole batches.
        num_samples: As in :class:`~lightning_sensitivity.SensitivityMonitor`.
        seed: Seed of the twins.
        prefix: As in ``SensitivityMonitor``.
        inputs: As in ``SensitivityMonitor``; nothing is perturbed.
        outputs: As in ``SensitivityMonitor``.
        initial_weights: State dict from before training. Pass it if a fit starts from trained weights.
        every_n_epochs: As in ``SensitivityMonitor``.
        prog_bar: Show the estimate on the progress bar.

    Raises:
        MisconfigurationException: As in ``SensitivityMonitor``; also if there can be no estimate, and it is monitored,
            or ``task``, ``targets`` or ``initial_weights`` is given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> stopping = EarlyStopping(monitor="val_risk_estimate", patience=10)
        >>> trainer = Trainer(callbacks=[RiskMonitor(), stopping], logger=False)
    """

    names = tuple(f"risk_{name}" for name in RiskTerms._fields)
    wrong_mode, advice = "max", 'of which low values are good. Use `mode="min"`.'
    charts: ClassVar = {"risk estimate and its terms": r"risk_[a-z]+(/dataloader_idx_\d+)?$"}

    def __init__(
        self,
        task: str = "auto",
        targets: Function = None,
        num_training_samples: int = 500,
        num_samples: int | None = 1200,
        seed: int = 0,
        prefix: str = "val_",
        inputs: Function = None,
        outputs: Function = None,
        initial_weights: Mapping[str, Tensor] | None = None,
        every_n_epochs: int = 1,
        prog_bar: bool = False,
    ) -> None:
        tasks = ("auto", *TASKS)
        check_argument("task", task, task in tasks, f"one of {', '.join(map(repr, tasks))} (a regression has none)")
        check_functions(targets=targets)
        check_int("num_training_samples", num_training_samples, 1)
        valid = isinstance(initial_weights, Mapping | None)
        check_argument("initial_weights", initial_weights, valid, "a state dict, as in a checkpoint, or None")
        check_argument("prog_bar", prog_bar, isinstance(prog_bar, bool), "a bool")
        self.task, self.targets, self.num_training_samples = task, targets, num_training_samples
        self.initial_weights, self.prog_bar = initial_weights, prog_bar
        self._key = f"RiskMonitor(prefix={prefix!r})"  # of the weights in a checkpoint
        self._initial = twins.InitialWeights(initial_weights)
        self._samples: Any = None  # TrainingSamples, in a fit that has what the estimate needs
        self._num_training = 0  # samples, as of the last count
        self._is_first_batch = False  # of a fit, or a validation before it
        super().__init__(num_samples, seed, prefix, inputs, outputs, every_n_epochs)

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse probabilities."""
        if are_probabilities(outputs):
            raise MisconfigurationException("`RiskMonitor` needs logits, got probabilities: set `outputs=`.")

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure: a fit that has what the estimate needs, or a validation before its first batch."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        may_measure = trainer.sanity_checking or self._is_first_batch or self._samples is not None
        return is_fit and may_measure and super().should_measure(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the initial weights, except those that have not changed."""
        with self.failures.warn_on_failure("could not save the weights from before training"):
            weights = self._initial.changed(checkpoint["state_dict"])
            checkpoint[self._key] = {"initial_weights": weights, "num_training_samples": self._num_training}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the initial weights and the number of training samples."""
        saved, self._initial.weights = checkpoint.get(self._key, {}), None  # else those of another run
        if saved.get("initial_weights") is not None:
            self._initial.restore(saved["initial_weights"], checkpoint["state_dict"])
            self._num_training = saved["num_training_samples"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the training samples of the last fit."""
        self._samples, self._is_first_batch = None, True
        is_given = self.task != "auto" or self.targets is not None or self.initial_weights is not None
        self._must_estimate = is_given or bool(watchers(trainer, {self.prefix + name for name in self.names}))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Find the initial weights before the first step, keep the first batches, and count all of them."""
        if self._is_first_batch:
            self._is_first_batch = False
            self._start_fit(trainer, pl_module, batch)
        elif self._samples is not None:
            with self.failures.warn_on_failure("leaves a training batch out"):
                if batch_idx == 0:
                    self._samples.start_epoch(trainer)
                self._take(trainer, pl_module, batch)
        if self._samples is not None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def make_metric(self) -> RiskEstimate:
        """Make the metric of a loader for a validation."""
        metric = RiskEstimate(self._samples.task, _STRENGTH)
        if self._training_sums is not None:  # else this process had no batch
            metric.training_sums = self._training_sums
        return metric

    def end_validation(self) -> None:
        """Free what only a validation needs."""
        self.metrics = {}
        self._training_sums: Tensor | None = None  # of the kept samples
        self._device_weights: dict[str, Tensor] = {}  # from before training

    def measure(self, trainer: Trainer, run: Run, call: ModelCall, batch_idx: int, dataloader_idx: int) -> int:
        """Run the model and its twins on a batch."""
        pl_module = trainer.lightning_module
        outputs: Tensor = run(call)
        if self._samples is None or trainer.sanity_checking:
            return len(outputs)
        if self._training_sums is None:  # here, since averaged weights are in place in batch hooks alone
            self._training_sums = self._score_training_samples(trainer, run)
        if self._samples.num_outputs != num_outputs(outputs):
            got = f"got {num_outputs(outputs)} outputs of validation samples"
            raise ValueError(f"Expected {self._samples.num_outputs} outputs, as training samples have, {got}")
        metric = self.metric(trainer, dataloader_idx)
        reference = run(twins.call_by_batch, pl_module, call) if self._has_batch_norm else None
        num_batches = self.choice.num_selected(dataloader_idx) * trainer.world_size
        num_twins = max(1, math.ceil(_MIN_TWINS / max(1, num_batches)))
        for index in range(num_twins):
            key = self.seed, trainer.global_rank, dataloader_idx, batch_idx, -1 - index
            generator = noise_generator(*key, device=pl_module.device)
            with twins.twin(pl_module, self._device_weights, generator, _STRENGTH):
                twin_outputs = run(twins.call_by_batch, pl_module, call)
            metric.update(outputs, twin_outputs, reference, 1 / num_twins)
            del twin_outputs  # before the next ones come
        return len(outputs)

    def compute(self, trainer: Trainer, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Compute the values of a loader, and what to warn of."""
        if self._samples is None or trainer.sanity_checking:
            return {}, {}
        metric = self.metric(trainer, dataloader_idx)
        self._num_training = self._samples.num_in_epoch(trainer)
        num_weights = sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)
        metric.factor = variance_factor(max(1, self._num_training), num_weights)
        terms = metric.compute()
        messages = diagnostics(*metric.totals)
        has_value = "no variance" not in messages and all(bool(term.isfinite()) for term in terms)
        return dict(zip(self.names, terms, strict=True)) if has_value else {}, messages

    def _start_fit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Find the weights from before training, and keep the first training batch, which determines the task."""
        problem: Exception | None = None
        try:
            self._initial.begin(pl_module, trainer.global_step)
            check_loaders(trainer)
            num_wanted = math.ceil(self.num_training_samples / trainer.world_size)
            num_in_epoch = self._num_training // trainer.world_size if trainer.global_step > 0 else 0
            self._samples = TrainingSamples(self.task, num_wanted, num_in_epoch)
            self._take(trainer, pl_module, batch)
            summary = f"task {self._samples.task!r}; initial weights: {self._initial.source}"
        except Exception as error:
            problem = error
        if trainer.strategy.reduce_boolean_decision(problem is None):  # all processes must log the same names
            rank_zero_info(f"`RiskMonitor` ({self.prefix}*): {summary}.")
            return
        problem = problem or ValueError("another process can give none; see its warning")
        self._samples, message = None, f"can give no estimate: {str(problem).rstrip('.')}."
        if self._must_estimate and self.failures.is_strict:
            raise MisconfigurationException(f"`RiskMonitor` {message}") from problem
        self.failures.warn("no estimate", message, in_any_process=True)

    def _take(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Count the samples of a training batch, and keep them if more are wanted."""
        if self._samples.num_wanted <= 0:
            self._samples.count(select_targets(pl_module, batch, self.targets))
            return
        with self.isolated(trainer, pl_module) as run:
            targets: Tensor = run(select_targets, pl_module, batch, self.targets)
            outputs: Tensor = run(self.prepare(run, pl_module, batch))
        self._samples.keep(outputs, clone_tensors(batch), targets)  # the step may write to its batch
        self._samples.count(targets)

    def _score_training_samples(self, trainer: Trainer, run: Run) -> Tensor:
        """Score the kept samples with the weights of this validation."""
        assert self._initial.weights is not None
        pl_module = trainer.lightning_module
        self._device_weights = {name: weight.to(pl_module.device) for name, weight in self._initial.weights.items()}
        self._has_batch_norm = twins.has_batch_norm(pl_module)
        if new := twins.unknown_parameters(pl_module, self._initial.weights):
            self.failures.warn("new", f"has no initial weights for {', '.join(new[:3])}: all of it counts as learned.")
        if self.task == "auto" and self._samples.task == "multiclass":
            targets = torch.cat([targets.flatten() for _, targets in self._samples.batches])
            check_classes(self._samples.num_outputs or 1, targets)
        with pl_module.device:
            metric = RiskEstimate(self._samples.task)
        for batch, targets in self._samples.batches:
            with self.failures.warn_on_failure("leaves out kept training samples, which the model does not take"):
                call = self.prepare(run, pl_module, move_data_to_device(batch, pl_module.device))
                outputs: Tensor = run(call)
                metric.update_training(outputs, targets)
                self._samples.num_outputs = num_outputs(outputs)
                del outputs  # before the next ones come
        return metric.training_sums
