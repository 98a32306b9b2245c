"""The callback that logs an estimate of the risk: what to stop by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_sensitivity.arguments import Selector, check_argument, check_bool, check_int, check_selectors
from lightning_sensitivity.callbacks import trainer as checks
from lightning_sensitivity.callbacks.base import Monitor
from lightning_sensitivity.callbacks.failures import describe_error
from lightning_sensitivity.callbacks.passes import NUM_TWINS_FOR_TRAINING, TwinPasses
from lightning_sensitivity.callbacks.samples import TrainingSamples, check_loaders
from lightning_sensitivity.callbacks.session import Batch, Group, Queue, Session
from lightning_sensitivity.callbacks.trainer import Chart
from lightning_sensitivity.callbacks.watch import loss_mismatch
from lightning_sensitivity.functional.risk import (
    LABEL_WEIGHT,
    TWIN_STRENGTH,
    RiskTerms,
    forgetting_sums,
    holdout_sums,
    label_sums,
)
from lightning_sensitivity.functional.tasks import IGNORED, TASKS
from lightning_sensitivity.functional.tensors import are_probabilities, num_outputs
from lightning_sensitivity.metric import RiskEstimate
from lightning_sensitivity.model import select_targets
from lightning_sensitivity.model.forward import clone_tensors, tensors_in
from lightning_sensitivity.model.isolation import RunIsolated
from lightning_sensitivity.model.twins import InitialWeights, has_batch_norm, unknown_parameters

_LABEL_NAMES = ("risk_label_score", "risk_num_labels")
_KEPT = -1  # in the place of the index of a loader: the kept training samples


class Phase(Enum):
    """Where a fit is, for a :class:`RiskMonitor`."""

    OUTSIDE = auto()  # no fit is running
    STARTING = (
        auto()
    )  # before its first training batch: the sanity check, or a resumed fit that begins with a validation
    ESTIMATING = auto()  # training samples are kept
    REFUSED = auto()  # there can be no estimate


@dataclass
class FitState:
    """What a :class:`RiskMonitor` keeps for the time of one fit.

    Attributes:
        phase: Where the fit is.
        samples: The kept training samples, while the phase is ``ESTIMATING``.
        must_estimate: Whether it is an error if there can be no estimate.
        targets_write: Whether the user's ``targets`` writes to the batch that it gets.
        history: The epochs with an estimate, and the estimate.
    """

    phase: Phase = Phase.OUTSIDE
    samples: TrainingSamples | None = None
    must_estimate: bool = False
    targets_write: bool = False
    history: list[tuple[int, float]] = field(default_factory=list)


@dataclass
class RiskSession(Session):
    """What a :class:`RiskMonitor` keeps for the time of one validation.

    Attributes:
        labelled: Batches that are not chosen, but have labels; they wait to be scored.
        twins: Passes of twins.
        training: Sums over the kept training samples, once they are scored.
        forgetting: The same, of what twins forget.
    """

    labelled: Queue | None = None
    twins: TwinPasses | None = None
    training: Tensor | None = None
    forgetting: Tensor | None = None


class RiskMonitor(Monitor):
    r"""Log an estimate of the Brier score on unseen samples on every validation epoch, to stop by.

    It needs only training labels, which may be noisy; see :func:`~lightning_sensitivity.functional.risk_estimate` for
    the formula, ``examples/studies/early_stopping`` for how well it works. Labels of validation samples, if there are
    some, make it better. Regressions and dense outputs have no estimate.

    **Logged values**, only in ``Trainer.fit``, with ``prefix`` before them: ``risk_estimate`` and its terms
    ``risk_claim`` (the score if probabilities were right), ``risk_overconfidence`` (how much worse it is on training
    labels), ``risk_memorization`` (how much more certain the model is of training samples), ``risk_forgetting`` (how
    much of its fit to training labels a simulated twin loses) and ``risk_variance`` (how far other training samples
    would have changed it). If the first validation has no value, nan is logged: an ``EarlyStopping`` stops, unless it
    has ``check_finite=False``. When the fit ends, a line in the log says where the estimate was lowest.

    It costs two forward passes over the measured samples (three with batch norm) and two over the kept training samples
    per validation. It keeps the initial weights on the CPU and, during validation, a copy of them and one twin on the
    device.

    Args:
        task: ``"multiclass"``, ``"binary"``, ``"multilabel"``, or ``"auto"``, to infer it from labels and outputs.
        targets: A function ``batch -> labels``, without randomness; by default see
            :func:`~lightning_sensitivity.model.select_targets`. Labels of -100 are ignored.
        validation_labels: Also score the labels that validation samples have, few or all, found by ``targets``. Then
            ``risk_estimate`` combines their score with the estimate, which counts as much as 60 labels, and
            ``risk_label_score`` and ``risk_num_labels`` are logged, too. It costs a pass over the labelled batches.
        initial_weights: State dict from before training. Pass it if a fit starts from trained weights.
        num_training_samples: How many training samples are kept, over all processes, in whole batches.
        num_samples: Samples to measure per loader and epoch, over all processes; None for all. Batches are measured
            whole, evenly spaced and the same in every epoch.
        seed: Seed of the simulated twins.
        prefix: Prefix of the logged names; with ``"val/"`` TensorBoard groups them with ``val/loss``.
        inputs: A function ``batch -> arguments`` of the model; by default see
            :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``, ``(N, K)`` or ``(N,)``, of what the model returns; by default see
            :func:`~lightning_sensitivity.model.select_outputs`.
        every_n_epochs: Measure only every n-th epoch of a fit: 0, n, 2n, ...
        prog_bar: Show the estimate on the progress bar.

    Raises:
        MisconfigurationException: If an argument is not one of the above; before the first training step, if the
            Trainer or the model can't be measured, outputs are probabilities, or somebody else logs the same names;
            also if there can be no estimate, and it is monitored, or ``task``, ``targets`` or ``initial_weights`` is
            given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> stopping = EarlyStopping(monitor="val_risk_estimate", patience=10)
        >>> trainer = Trainer(callbacks=[RiskMonitor(), stopping], logger=False)
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
    misleading_mode_advice = 'of which low values are good. Use `mode="min"`.'

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
        self.num_training = 0  # different training samples, as of the last count
        self.fit_state = FitState()
        self._initial = InitialWeights(initial_weights)
        if validation_labels:
            self.names = (*type(self).names, *_LABEL_NAMES)

    # Before and after a fit

    def check_outputs(self, outputs: Tensor) -> None:
        """Refuse probabilities."""
        if are_probabilities(outputs):
            raise MisconfigurationException("`RiskMonitor` needs logits, got probabilities: set `outputs=`.")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the initial weights, except those that have not changed."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        with self.run_facts.failures.warn_on_failure("could not save the weights from before training"):
            weights = self._initial.changed(checkpoint["state_dict"])
            saved = {"initial_weights": weights, "num_training_samples": self.num_training}
            checkpoint.setdefault(self.checkpoint_key, {}).update(saved)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the initial weights and the number of training samples, also from a monitor with another prefix."""
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._initial.forget()  # else those of another run
        keys = [key for key in checkpoint if str(key).startswith(f"{type(self).__qualname__}(prefix=")]
        key = self.checkpoint_key if self.checkpoint_key in keys else next(iter(keys), None)
        if key is None or checkpoint[key].get("initial_weights") is None:
            return
        if key != self.checkpoint_key:
            rank_zero_info(f"`{self.checkpoint_key}` takes the initial weights that `{key}` saved in the checkpoint.")
        self._initial.restore(checkpoint[key]["initial_weights"], checkpoint["state_dict"])
        self.num_training = checkpoint[key]["num_training_samples"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check what can be checked before the first batch, and forget the last fit."""
        super().setup(trainer, pl_module, stage)
        phase = Phase.STARTING if stage == "fit" else Phase.OUTSIDE
        self.fit_state = FitState(phase)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note whether there has to be an estimate."""
        is_given = self.task != "auto" or self.targets is not None or self.initial_weights is not None
        is_monitored = bool(checks.consumers(trainer, self.prefixed_names()))
        self.fit_state = FitState(Phase.STARTING, must_estimate=is_given or is_monitored)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Find the initial weights before the first step, keep the first batches, and count all of them."""
        fit = self.fit_state
        if fit.phase is Phase.STARTING:
            self._start_fit(trainer, pl_module, batch)
        elif fit.samples is not None:
            with self.run_facts.failures.warn_on_failure("skipped a training batch"):
                if batch_idx == 0:
                    fit.samples.start_epoch(trainer)
                self._count_and_keep(trainer, pl_module, batch)
        if fit.samples is not None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Compare the first step with what is measured."""
        watch = self.run_facts.watch
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        samples = self.fit_state.samples
        if watch is not None and watch.step_outputs is not None and isinstance(loss, Tensor) and samples is not None:
            with self.run_facts.failures.warn_on_failure("could not compare the loss of a step"):
                targets = samples.batches[0].targets
                problem = loss_mismatch(watch.step_outputs, targets, loss, trainer.accumulate_grad_batches)
                if problem is not None:
                    self.run_facts.failures.warn("loss", f"may not estimate what your step trains. {problem}")
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where the estimate was lowest."""
        history = self.fit_state.history
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

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the kept training samples, too."""
        super().teardown(trainer, pl_module, stage)
        self.fit_state = FitState()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do as in ``teardown``, which Lightning does not call then."""
        super().on_exception(trainer, pl_module, exception)
        self.fit_state = FitState()

    # A validation

    def should_measure(self, trainer: Trainer) -> bool:
        """Decide whether to measure: a fit that has what the estimate needs, or a validation before its first batch."""
        is_fit = trainer.state.fn == TrainerFn.FITTING
        return is_fit and self.fit_state.phase in (Phase.STARTING, Phase.ESTIMATING) and super().should_measure(trainer)

    def make_session(self, trainer: Trainer) -> RiskSession:
        """Make the state of a validation."""
        session = RiskSession(**vars(super().make_session(trainer)))
        if self.validation_labels:
            session.labelled = Queue(partial(self._score_labelled, trainer), self.run_facts.can_join is not False)
            session.others.append(session.labelled)
        return session

    def make_metric(self) -> RiskEstimate:
        """Make the metric of a loader for a validation."""
        task = None if self.fit_state.samples is None else self.fit_state.samples.task
        return RiskEstimate("multiclass" if task is None else task.name, strength=TWIN_STRENGTH)

    def collect(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        session: Session,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Put a batch into the queue if it is chosen, or into that of labelled ones if it has labels."""
        assert isinstance(session, RiskSession)
        is_chosen = session.selections[dataloader_idx].includes(batch_idx)
        super().collect(trainer, pl_module, session, batch, batch_idx, dataloader_idx)
        if is_chosen or session.labelled is None or not self._is_estimating(trainer):
            return
        prepared = self.make_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if prepared.targets is not None:
            session.labelled.add(prepared, is_last=False)
        if batch_idx + 1 == session.selections[dataloader_idx].num_batches:
            session.labelled.flush()

    def make_batch(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> Batch:
        """Prepare a batch, with its labels if they are scored."""
        prepared = super().make_batch(trainer, pl_module, batch, batch_idx, dataloader_idx)
        if self.validation_labels and self._is_estimating(trainer):
            prepared.targets = self._validation_targets(pl_module, batch)
        return prepared

    def measure(self, trainer: Trainer, run: RunIsolated, group: Group) -> None:
        """Run the model and its twins on a group of batches."""
        if not self._is_estimating(trainer):
            self.clean_outputs(run, group)
            return
        session, samples = self.session, self.fit_state.samples
        assert isinstance(session, RiskSession)
        assert samples is not None and samples.task is not None
        if session.twins is None:  # before the outputs of the group are in memory
            self._score_training_samples(trainer, session)
        outputs = self.clean_outputs(run, group)
        if samples.num_outputs != num_outputs(outputs):
            raise ValueError(
                f"Expected {samples.num_outputs} outputs, as training samples have, got {num_outputs(outputs)} outputs of "
                "validation samples"
            )
        assert session.twins is not None
        selection = session.selections[group.dataloader_idx]
        num_total = selection.num_selected * group.batches[0].size * trainer.world_size
        key = self.seed, trainer.global_rank, group.dataloader_idx, group.batches[0].batch_idx
        sums = torch.zeros(())
        for twin in session.twins.of(run, group.call, outputs, key, num_total):
            part = holdout_sums(outputs[twin.samples], twin.outputs, samples.task, twin.reference)
            sums = sums.to(part.device) + twin.weight * part
        labels = self._label_sums(outputs, group)
        metric = self.metric(trainer, group.dataloader_idx)
        metric.add_sums("holdout", sums)
        if labels is not None:
            metric.add_sums("labels", labels)

    def compute_values(self, trainer: Trainer, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Compute the values of a loader, and what to warn of."""
        session, samples = self.session, self.fit_state.samples
        if not self._is_estimating(trainer) or samples is None:
            return {}, {}
        assert isinstance(session, RiskSession)
        metric = self.metric(trainer, dataloader_idx)
        if session.training is not None and session.forgetting is not None:  # else this process had no batch
            metric.add_sums("training_samples", session.training)
            metric.add_sums("forgetting", session.forgetting)
        self.num_training = samples.num_training(trainer)
        metric.set_size(max(1, self.num_training), checks.num_trained_weights(trainer.lightning_module))
        values, messages = metric.compute(), metric.messages
        if self.validation_labels:
            self._add_label_values(values, messages)
        is_finite = all(bool(value.isfinite()) for value in values.values())
        if "no variance" in messages or (not is_finite and "non-finite" not in messages):
            return {}, messages
        if dataloader_idx == 0:
            self.fit_state.history.append((trainer.current_epoch, float(values["risk_estimate"])))
        return values, messages

    # Training samples

    def _is_estimating(self, trainer: Trainer) -> bool:
        return self.fit_state.phase is Phase.ESTIMATING and not trainer.sanity_checking

    def _start_fit(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Find the weights from before training, and keep the first training batch, which determines the task."""
        fit = self.fit_state
        problem = self._prepare_estimate(trainer, pl_module, batch)
        can_estimate = problem is None
        if trainer.strategy.reduce_boolean_decision(can_estimate):  # all processes must log the same names
            fit.phase = Phase.ESTIMATING
            task = None if fit.samples is None or fit.samples.task is None else fit.samples.task.name
            rank_zero_info(f"`RiskMonitor` ({self.prefix}*): task {task!r}; initial weights: {self._initial.source}.")
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
        """Prepare what the estimate needs, and return what is wrong, if something is."""
        try:
            self._initial.begin(pl_module, trainer.global_step)
            check_loaders(trainer)
            num_wanted = math.ceil(self.num_training_samples / trainer.world_size)
            num_before = self.num_training // trainer.world_size if trainer.global_step > 0 else 0
            self.fit_state.samples = TrainingSamples(self.task, num_wanted, num_before)
            self.fit_state.targets_write = self._do_targets_write(batch)
            self._count_and_keep(trainer, pl_module, batch)
        except Exception as error:
            return error
        return None

    def _do_targets_write(self, batch: Any) -> bool:
        """Return whether the user's ``targets`` writes to its batch, so that it always needs a copy."""
        if self.targets is None:
            return False
        copied = clone_tensors(batch)
        tensors = tensors_in(copied)
        versions = [tensor._version for tensor in tensors]
        self.targets(copied)
        after = tensors_in(copied)
        return [id(t) for t in after] != [id(t) for t in tensors] or [t._version for t in tensors] != versions

    def _select_targets(self, pl_module: LightningModule, batch: Any) -> Tensor:
        if self.fit_state.targets_write:
            batch = clone_tensors(batch)
        return select_targets(pl_module, batch, self.targets)

    def _count_and_keep(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        """Count the samples of a training batch, and keep them if more are wanted."""
        samples = self.fit_state.samples
        assert samples is not None
        if samples.num_missing > 0:
            call = self.prepare(trainer, pl_module, batch)
            with self.isolated(trainer, pl_module) as run:
                targets: Tensor = run(self._select_targets, pl_module, batch)
                outputs = run(call)
            samples.keep(outputs, clone_tensors(batch), targets)  # the step may write to its batch
        else:
            targets = self._select_targets(pl_module, batch)
        samples.count(targets)

    def _score_training_samples(self, trainer: Trainer, session: RiskSession) -> None:
        """Score the kept samples with the weights of this validation.

        It runs in a batch hook, since averaged weights are in place only there.
        """
        pl_module, samples = trainer.lightning_module, self.fit_state.samples
        initial = self._initial.weights
        assert samples is not None and samples.task is not None and initial is not None
        new = unknown_parameters(pl_module, initial)
        if new:
            self.run_facts.failures.warn(
                "new", f"has no initial weights for {', '.join(new[:3])}: they count as learned entirely."
            )
        if self.task == "auto":
            samples.check_classes()
        device_weights = {name: weight.to(pl_module.device) for name, weight in initial.items()}
        session.twins = TwinPasses(pl_module, device_weights, has_batch_norm(pl_module), self.run_facts)
        queue = Queue(partial(self._score_training_batches, trainer, session), self.run_facts.can_join is not False)
        largest = max((facts.elements_per_sample for facts in self.run_facts.loaders.values()), default=1.0)
        for index, kept in enumerate(samples.batches):
            with self.run_facts.failures.warn_on_failure(
                "left out kept training samples, which the model does not take"
            ):
                call = self.prepare(trainer, pl_module, move_data_to_device(kept.batch, pl_module.device))
                size = len(kept.targets)
                queue.add(Batch(call, index, _KEPT, size, size * largest, kept.targets), is_last=False)
        queue.flush()

    def _score_training_batches(self, trainer: Trainer, session: RiskSession, batches: list[Batch]) -> None:
        """Score kept batches together, or one by one where that fails."""
        for group in [batches] if self.run_facts.can_join else [[batch] for batch in batches]:
            with self.run_facts.failures.warn_on_failure(
                "left out kept training samples, which the model does not take"
            ):
                with self.isolated(trainer, trainer.lightning_module) as run:
                    self._score_training_group(run, session, Group(group))

    def _score_training_group(self, run: RunIsolated, session: RiskSession, group: Group) -> None:
        samples = self.fit_state.samples
        assert samples is not None and samples.task is not None and session.twins is not None
        outputs = run(group.call)
        samples.num_outputs = num_outputs(outputs)
        targets = torch.cat([batch.targets for batch in group.batches if batch.targets is not None]).to(outputs.device)
        training = label_sums(outputs, targets, samples.task)
        forgetting = torch.zeros(())
        num_kept = sum(len(kept.targets) for kept in samples.batches)
        key = self.seed, 0, _KEPT, group.batches[0].batch_idx
        for twin in session.twins.of(run, group.call, outputs, key, num_kept, NUM_TWINS_FOR_TRAINING):
            part = forgetting_sums(twin.reference, twin.outputs, targets[twin.samples], samples.task)
            forgetting = forgetting.to(part.device) + twin.weight * part
        session.training = training if session.training is None else session.training + training
        session.forgetting = forgetting if session.forgetting is None else session.forgetting + forgetting

    # Validation labels

    def _validation_targets(self, pl_module: LightningModule, batch: Any) -> Tensor | None:
        """Select the labels of a validation batch; None if it has none."""
        try:
            targets = self._select_targets(pl_module, batch)
        except MisconfigurationException:
            return None
        has_label = targets.is_floating_point() or bool((targets.long() != IGNORED).any())
        return targets.clone() if has_label else None

    def _label_sums(self, outputs: Tensor, group: Group) -> Tensor | None:
        samples = self.fit_state.samples
        assert samples is not None and samples.task is not None
        targets = [batch.targets for batch in group.batches if batch.targets is not None]
        if not targets:
            return None
        joint = torch.cat(targets).to(outputs.device)
        samples.task.check(outputs, joint)
        return label_sums(outputs, joint, samples.task)

    def _score_labelled(self, trainer: Trainer, batches: list[Batch]) -> None:
        """Score the labels of batches that are not chosen."""
        for group in [batches] if self.run_facts.can_join else [[batch] for batch in batches]:
            with self.run_facts.failures.warn_on_failure("could not score the labels of a validation batch"):
                joint = Group(group)
                with self.isolated(trainer, trainer.lightning_module) as run:
                    sums = self._label_sums(run(joint.call), joint)
                if sums is not None:
                    self.metric(trainer, joint.dataloader_idx).add_sums("labels", sums)

    def _add_label_values(self, values: dict[str, Tensor], messages: dict[str, str]) -> None:
        estimate = values["risk_estimate"]
        for name in _LABEL_NAMES:
            values.setdefault(name, torch.zeros_like(estimate))
        num_labels = int(values["risk_num_labels"])
        if num_labels == 0:
            messages["no labels"] = (
                "No validation batch has labels, so `risk_estimate` is that without them. Set `targets=` if there are some."
            )
        elif not self.fit_state.history:
            rank_zero_info(
                f"`RiskMonitor` ({self.prefix}*): {num_labels} validation labels count; the estimate counts as "
                f"{LABEL_WEIGHT}."
            )
