"""The callback that logs the risk estimate, which decides when to stop."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int, check_selectors
from lightning_sensitivity.callbacks import trainer as checks
from lightning_sensitivity.callbacks.base import Monitor
from lightning_sensitivity.callbacks.batches import CleanOutputs
from lightning_sensitivity.callbacks.estimate import LABEL_NAMES, RiskSession
from lightning_sensitivity.callbacks.failures import describe_error
from lightning_sensitivity.callbacks.fit import FitState, Phase
from lightning_sensitivity.callbacks.samples import TrainingSamples, check_loaders
from lightning_sensitivity.callbacks.trainer import Chart
from lightning_sensitivity.callbacks.watch import loss_mismatch
from lightning_sensitivity.functional.risk import RiskTerms
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import are_probabilities
from lightning_sensitivity.model import select_targets
from lightning_sensitivity.model.forward import clone_tensors, tensors_in
from lightning_sensitivity.model.twins import InitialWeights


class RiskMonitor(Monitor):
    r"""Log an estimate of the Brier score on unseen samples in every validation epoch; stop when it is lowest.

    The estimate needs only training labels, which may be noisy; validation labels help. See
    :func:`~lightning_sensitivity.functional.risk_estimate` for the formula. Regressions and dense outputs have none.

    **Logged values**, only in ``Trainer.fit``, after ``prefix``: ``risk_estimate`` and its terms ``risk_claim``,
    ``risk_overconfidence``, ``risk_memorization``, ``risk_variance``; nan if the first validation has no value. The
    end of a fit logs where the estimate was lowest.

    A validation costs two passes over the measured samples (three with batch norm) and one over the kept ones.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"``, or ``"auto"``, to infer it.
        targets: A function ``batch -> labels`` without randomness; by default
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Combine the estimate, which counts as much as 40 labels, with the score on validation
            labels; also log ``risk_label_score``, ``risk_num_labels``.
        initial_weights: State dict from before training, if a fit starts from weights trained on the same data.
        num_training_samples: Training samples to keep, in whole batches.
        num_samples: Samples per loader and epoch, in whole, evenly spaced batches; None for all.
        seed: Seed of the simulated twins.
        prefix: Prefix of the logged names; with ``"val/"`` TensorBoard groups them with ``val/loss``.
        inputs: A function ``batch -> arguments``; by default see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K)`` or ``(N,)``; by default
            :func:`~lightning_sensitivity.model.select_outputs`.
        every_n_epochs: Measure in epochs 0, n, 2n, ...
        prog_bar: Show the estimate on the progress bar.

    Raises:
        MisconfigurationException: If an argument is invalid; before the first step, if Trainer or model are not
            supported, names are already logged, or no estimate is possible, but one is monitored, or ``task``,
            ``targets`` or ``initial_weights`` is given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> callbacks = [RiskMonitor(), EarlyStopping("val_risk_estimate", patience=10)]
        >>> trainer = Trainer(callbacks=callbacks, logger=False)
    """

    names = tuple(f"risk_{name}" for name in RiskTerms._fields)
    charts: ClassVar = (
        Chart(0, "risk estimate and loss", (r"risk_estimate(/dataloader_idx_\d+)?$", r".*loss")),
        *(
            Chart(2 + place, name.replace("_", " "), (rf"{name}(/dataloader_idx_\d+)?$",))
            for place, name in enumerate(names[1:])
        ),
    )
    misleading_mode = "max"
    misleading_mode_advice = 'but lower is better. Use `mode="min"`.'

    def __init__(
        self,
        task: str = "auto",
        *,
        targets: Selector | None = None,
        validation_labels: bool = False,
        initial_weights: Mapping[str, Tensor] | None = None,
        num_training_samples: int = 500,
        num_samples: int | None = 1200,
        seed: int = 0,
        prefix: str = "val_",
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        every_n_epochs: int = 1,
        prog_bar: bool = False,
    ) -> None:
        tasks = ("auto", *TASKS)
        check_argument("task", task, task in tasks, f"one of {', '.join(map(repr, tasks))} (a regression has none)")
        check_selectors(targets=targets)
        check_bool("validation_labels", validation_labels)
        is_mapping = isinstance(initial_weights, Mapping | None)
        check_argument("initial_weights", initial_weights, is_mapping, "a state dict, as in a checkpoint, or None")
        check_int("num_training_samples", num_training_samples, 1)
        super().__init__(num_samples, seed, prefix, inputs, outputs, every_n_epochs, prog_bar)
        self.task = task
        self.targets = targets
        self.validation_labels = validation_labels
        self.initial_weights = initial_weights
        self.num_training_samples = num_training_samples
        self.num_training = 0  # number of different training samples, as last counted
        self.fit_state = FitState()
        self.initial = InitialWeights(initial_weights)
        if validation_labels:
            self.names = (*type(self).names, *LABEL_NAMES)

    # Before and after a fit

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse probabilities."""
        if are_probabilities(outputs):
            raise MisconfigurationException("`RiskMonitor` needs logits, got probabilities: set `outputs=`.")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the initial weights, except those that have not changed."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        with self.run_facts.failures.warn_on_failure("could not save the weights from before training"):
            weights = self.initial.changed(checkpoint["state_dict"])
            saved = {"initial_weights": weights, "num_training_samples": self.num_training}
            checkpoint.setdefault(self.checkpoint_key, {}).update(saved)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the initial weights and the number of training samples, also from a monitor with another prefix."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self.initial.forget()  # these may belong to another run
        keys = [key for key in checkpoint if str(key).startswith(f"{type(self).__qualname__}(prefix=")]
        key = self.checkpoint_key if self.checkpoint_key in keys else next(iter(keys), None)
        if key is None or checkpoint[key].get("initial_weights") is None:
            return
        if key != self.checkpoint_key:
            rank_zero_info(f"`{self.checkpoint_key}` takes the initial weights that `{key}` saved in the checkpoint.")
        self.initial.restore(checkpoint[key]["initial_weights"], checkpoint["state_dict"])
        self.num_training = checkpoint[key]["num_training_samples"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch, and forget the last fit."""
        super().setup(trainer, pl_module, stage)
        phase = Phase.STARTING if stage == "fit" else Phase.OUTSIDE
        self.fit_state = FitState(phase)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record whether there must be an estimate."""
        is_given = self.task != "auto" or self.targets is not None or self.initial_weights is not None
        is_monitored = bool(checks.consumers(trainer, self.prefixed_names()))
        self.fit_state = FitState(Phase.STARTING, must_estimate=is_given or is_monitored)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Find the initial weights before the first step; keep the first batches, and count the samples of all."""
        fit = self.fit_state
        if fit.phase is Phase.STARTING:
            self._start_fit(trainer, pl_module, batch)
        elif fit.samples is not None:
            with self.run_facts.failures.warn_on_failure("skipped a training batch"):
                if batch_idx == 0:
                    fit.samples.start_epoch(trainer)
                self._count_and_keep(trainer, pl_module, batch)
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if fit.phase is Phase.REFUSED:
            self.drop_watch()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the first step with what is measured."""
        watch = self.run_facts.watch
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        samples = self.fit_state.samples
        step_outputs = None if watch is None else watch.step_outputs
        if step_outputs is not None and isinstance(loss, Tensor) and samples is not None:
            with self.run_facts.failures.warn_on_failure("could not compare the loss of a step"):
                targets = samples.batches[0].targets
                problem = loss_mismatch(step_outputs, targets, loss, trainer.accumulate_grad_batches)
                if problem is not None:
                    self.run_facts.failures.warn("loss", f"may not estimate what your step trains. {problem}")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log in which epoch the estimate was lowest."""
        history = [entry for entry in self.fit_state.history if math.isfinite(entry[1])]
        if not history:
            return
        name = self.prefix + self.names[0]
        epoch, value = min(history, key=lambda entry: entry[1])
        line = f"`{name}` was lowest at epoch {epoch} ({value:.3f})"
        line += ", the last one: it was still falling" if epoch == history[-1][0] and len(history) > 1 else ""
        for callback in trainer.checkpoint_callbacks:
            path = getattr(callback, "best_model_path", "")
            if getattr(callback, "monitor", None) == name and path:
                line += f". The checkpoint is {path}"
        rank_zero_info(f"{line}.")

    def free(self) -> None:
        """Free the kept training samples, too."""
        super().free()
        self.fit_state = FitState()

    # A validation

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure: only in a fit that can have an estimate, or that has not had a batch yet."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        can_estimate = self.fit_state.phase in (Phase.STARTING, Phase.ESTIMATING)
        return is_fit and can_estimate and super().should_measure(trainer)

    def make_session(self, trainer: Trainer, clean: CleanOutputs) -> RiskSession:
        """Make the session that measures a validation."""
        return RiskSession(self, trainer, clean)

    # Training samples

    def _start_fit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Find the weights from before training, and keep the first training batch, which determines the task."""
        fit = self.fit_state
        problem = self._prepare_estimate(trainer, pl_module, batch)
        can_estimate = problem is None
        if trainer.strategy.reduce_boolean_decision(can_estimate):  # all processes must log the same names
            fit.phase = Phase.ESTIMATING
            task = None if fit.samples is None or fit.samples.task is None else fit.samples.task.name
            rank_zero_info(f"`RiskMonitor` ({self.prefix}*): task {task!r}; initial weights: {self.initial.source}.")
            return
        fit.phase = Phase.REFUSED
        fit.samples = None
        problem = problem or ValueError("another process cannot; see its warning")
        reason = str(problem) if isinstance(problem, ValueError) else describe_error(problem)
        message = f"cannot estimate the risk: {reason.rstrip('.')}."
        if fit.must_estimate and self.run_facts.failures.is_strict:
            raise MisconfigurationException(f"`RiskMonitor` {message}") from problem
        self.run_facts.failures.warn("no estimate", message, in_any_process=True)

    def _prepare_estimate(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> Exception | None:
        """Prepare what the estimate needs, and return the problem, if there is one."""
        try:
            self.initial.begin(pl_module, trainer.global_step)
            check_loaders(trainer)
            num_wanted = math.ceil(self.num_training_samples / trainer.world_size)
            num_before = self.num_training // trainer.world_size if trainer.global_step > 0 else 0
            self.fit_state.samples = TrainingSamples(self.task, num_wanted, num_before)
            self.fit_state.targets_write = self._do_targets_write(pl_module, batch)
            self._count_and_keep(trainer, pl_module, batch)
        except Exception as error:
            return error
        return None

    def _do_targets_write(self, pl_module: LightningModule, batch: Any) -> bool:
        """Return whether the user's ``targets`` writes to its batch, and so always needs a copy."""
        if self.targets is None:
            return False
        copied = clone_tensors(batch)
        tensors = tensors_in(copied)
        versions = [tensor._version for tensor in tensors]
        select_targets(pl_module, copied, self.targets)
        after = tensors_in(copied)
        return [id(t) for t in after] != [id(t) for t in tensors] or [t._version for t in tensors] != versions

    def select_targets(self, pl_module: LightningModule, batch: Any) -> Tensor:
        """Select the labels of a batch, without letting the user's ``targets`` change the batch."""
        if self.fit_state.targets_write:
            batch = clone_tensors(batch)
        return select_targets(pl_module, batch, self.targets)

    def _count_and_keep(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Count the samples of a training batch, and keep them if more are wanted."""
        samples = self.fit_state.samples
        assert samples is not None
        if samples.num_missing <= 0:
            samples.count(self.select_targets(pl_module, batch))
            return
        session = self.make_session(trainer, CleanOutputs(self.inputs, self.outputs))
        call = session.prepare(batch)
        with session.isolated() as run:
            targets = run(self.select_targets, pl_module, batch)
            outputs = run(call)
        samples.keep(outputs, clone_tensors(batch), targets)  # the step may write to its batch
        samples.count(targets)
