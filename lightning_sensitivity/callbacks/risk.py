"""The callback that logs an estimate of the risk: what to stop by."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sensitivity.callbacks.base import Monitor
from lightning_sensitivity.callbacks.checks import is_sharded
from lightning_sensitivity.callbacks.logged import waiting_for
from lightning_sensitivity.callbacks.samples import InitialWeights, TrainingSamples
from lightning_sensitivity.functional.pieces import Together, wide_dtype
from lightning_sensitivity.functional.risk import NUM_HOLDOUT_SUMS, NUM_TRAINING_SUMS, holdout_sums, risk_terms
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.models import Inputs, Options, Probe, Selector
from lightning_sensitivity.models.options import check_argument, check_int
from lightning_sensitivity.perturbations import noise_generator
from lightning_sensitivity.twins import batch_statistics, normalizes_by_batch, twin

_NAMES = ("risk_estimate", "risk_claim", "risk_overconfidence", "risk_variance")  # as the fields of RiskEstimate
_STRENGTH = 0.5  # of simulated twins; at full strength they break networks with max-pooling
_NEW = "`initial_weights` hold none of this name and shape. If that is not so, the variance is too high."
_MIN_TWINS = 8  # with less than these, the variance would hang on the noise of a few


class RiskMonitor(Monitor):
    r"""Log an estimate of the risk on unseen samples on every validation epoch, to stop by; it needs no labels there.

    The risk is the Brier score, or the mean squared error in a regression. The estimate takes the labels of training
    and unlabelled validation samples; :func:`~lightning_sensitivity.functional.risk_estimate` has the formula. Where
    training labels are wrong, the risk is that of labels as wrong. ``examples/early_stopping/README.md`` says what its
    minimum is worth, in labels, and where it fails.

    **Logged values** in ``Trainer.fit``, with ``prefix`` before them:

    - ``risk_estimate``: the one to monitor: ``EarlyStopping(monitor="val_risk_estimate", patience=10)``
    - ``risk_claim``: what the score would be if the model's probabilities were right
    - ``risk_overconfidence``: how far its score on training samples contradicts what it claims there
    - ``risk_variance``: how far predictions would differ, had the model been trained on other samples; simulated by
      twins, whose learned weights are perturbed

    It costs two forward passes on the measured batches (more where these are few), and one over the kept training
    samples; two copies of the weights on the device during validation, and the weights from before training on the CPU
    and in checkpoints. Training is not changed, and after its first step what fails gives one warning.

    Args:
        task: What the labels are: ``"multiclass"``, ``"binary"``, ``"multilabel"`` or ``"regression"``. ``"auto"``
            infers it where labels and outputs leave no doubt.
        targets: Where the labels are in a training batch: a key, an index, or a function ``batch -> tensor``. For the
            default see :func:`~lightning_sensitivity.models.select_targets`. Integer labels of -100 don't count.
        num_training_samples: How many training samples are kept, over all processes: the first batches, whole.
        num_samples: How many validation samples are measured per loader and epoch, over all processes, in whole
            batches. All, if None.
        seed: Seed of the twins. A batch gets the same twins in every epoch.
        prefix: Put before the names.
        inputs: How to call the model; see :class:`~lightning_sensitivity.SensitivityMonitor`. Nothing is perturbed.
        outputs: Which outputs are the logits; see there.
        initial_weights: The state dict from before training, where a fit does not begin with it (staged training).

    Raises:
        MisconfigurationException: As :class:`~lightning_sensitivity.SensitivityMonitor`; also if labels, task or
            weights from before training can't be told, and the estimate is monitored or ``task`` or ``targets`` given.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.callbacks import EarlyStopping
        >>> from lightning_sensitivity import RiskMonitor
        >>> stopping = EarlyStopping(monitor="val_risk_estimate", patience=10)
        >>> trainer = Trainer(callbacks=[RiskMonitor(), stopping], logger=False)

    """

    def __init__(
        self,
        task: str = "auto",
        targets: Selector = None,
        num_training_samples: int = 500,
        num_samples: int | None = 1200,
        seed: int = 0,
        prefix: str = "val_",
        inputs: Inputs = None,
        outputs: Selector = None,
        initial_weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        check_argument("task", task, task in ("auto", *TASKS), f"one of {', '.join(map(repr, ('auto', *TASKS)))}")
        check_int("num_training_samples", num_training_samples, minimum=1)
        valid = initial_weights is None or isinstance(initial_weights, Mapping)
        expected = "a state dict, such as `torch.load(path)['state_dict']`, or None"
        check_argument("initial_weights", initial_weights, valid, expected)
        self.task, self.num_training_samples = task, num_training_samples
        self._initial = InitialWeights(initial_weights)
        self._samples: TrainingSamples | None = None
        self._is_required = self._is_agreed = False
        options = Options(num_samples=num_samples, seed=seed, inputs=inputs, outputs=outputs, targets=targets)
        super().__init__(options, prefix)

    @property
    def state_key(self) -> str:
        """One for each prefix, so that a Trainer can have several."""
        return f"{type(self).__qualname__}(prefix={self.prefix!r})"  # Lightning asks for it at every hook

    @property
    def names(self) -> list[str]:
        """What is logged, behind the prefix."""
        return list(_NAMES)

    def charts(self) -> dict[str, str]:
        """Titles of charts for TensorBoard's Custom Scalars, with a regular expression for the tags in each."""
        tags = f"^{re.escape(self.prefix)}({'|'.join(_NAMES)})(/dataloader_idx_\\d+)?$"
        return {"risk estimate and its terms": tags}

    def should_measure(self, trainer: Trainer) -> bool:
        """Whether a fit runs that has what the estimate needs, or the sanity check before it."""
        return trainer.sanity_checking or (trainer.state.fn == TrainerFn.FITTING and self._samples is not None)

    def state_dict(self) -> dict[str, Any]:
        """The weights from before training, so that the estimate can go on where training resumes."""
        return {"initial_weights": self._initial.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them back."""
        self._initial.restore(state_dict["initial_weights"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the weights, and begin to keep samples."""
        waiting = waiting_for(trainer, {self.prefix + name for name in _NAMES})
        self._is_required = bool(waiting) or self.task != "auto" or self.options.targets is not None
        self._samples, self._is_agreed = None, False
        problem: str | None = "needs all weights in every process, got a strategy that shards them."
        if not is_sharded(trainer):
            problem = self._initial.find(pl_module, trainer.global_step > 0)
        if problem is not None:
            self._give_up(problem)
        else:
            rank_zero_info(f"`RiskMonitor` ({self.prefix}*): weights from before training are {self._initial.source}.")
            num_samples = math.ceil(self.num_training_samples / trainer.world_size)
            self._samples = TrainingSamples(self.task, num_samples, self.options)
        self._num_epochs = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the first batches; the second epoch would bring the same samples again."""
        self._num_epochs += batch_idx == 0
        if self._samples is not None and self._samples.num_missing > 0 and self._num_epochs < 2:
            self._keep(trainer, pl_module, batch)
        self.failures.is_strict = False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say so if nothing was measured."""
        if self._samples is not None:
            super().on_train_end(trainer, pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the samples. The weights stay, for a second fit of the same module."""
        super().teardown(trainer, pl_module, stage)
        if self._initial.is_restored:  # from the checkpoint of a validation
            self._initial.bind(pl_module)
        self._samples = None

    def forget(self) -> None:
        """Begin a validation with nothing."""
        self._sums: dict[int, Tensor] = {}  # of holdout samples, by loader
        self._together: dict[int, Together] = {}
        self._training_sums: Tensor | None = None
        self._weights: dict[str, Tensor] = {}  # from before training, on the device
        self._of_twin: dict[str, Tensor] = {}
        self._by_batch = False  # whether there is batch norm

    end_validation = forget

    def measure(self, trainer: Trainer, probe: Probe, batch_idx: int, dataloader_idx: int) -> None:
        """Run the model and its twins on a batch."""
        pl_module, samples = trainer.lightning_module, self._samples
        probe.classes_last |= samples is not None and samples.classes_last
        outputs: Tensor = probe.outputs()
        if samples is None or samples.task is None or self._initial.weights is None:
            return  # no fit, or the sanity check
        if self._training_sums is None:  # in a batch hook: only there averaged weights are in place
            self._weights = {name: each.to(pl_module.device) for name, each in self._initial.weights.items()}
            if new := self._initial.lacks(pl_module):
                self.failures.warn("new", f"counts {', '.join(new[:3])} as learned as a whole: {_NEW}")
            self._by_batch = normalizes_by_batch(pl_module)
            own = partial(self.probe, trainer, pl_module)
            self._training_sums = samples.sums(pl_module, own, self.failures.guarded)
        samples.check_head(outputs)
        by_batch = partial(batch_statistics, pl_module) if self._by_batch else nullcontext
        own_outputs = (probe.outputs(within=by_batch),) if self._by_batch else ()
        num_batches = self.num_wanted(trainer, dataloader_idx) * trainer.world_size
        num_twins = max(1, math.ceil(_MIN_TWINS / max(1, num_batches)))
        together = self._together.setdefault(dataloader_idx, Together(partial(self._add, dataloader_idx, num_twins)))
        for index in range(num_twins):
            key = (self.options.seed, trainer.global_rank, dataloader_idx, batch_idx, -1 - index)
            generator = noise_generator(*key, device=pl_module.device)
            with twin(pl_module, self._weights, generator, _STRENGTH, self._of_twin):
                probe.outputs(
                    within=by_batch, then=lambda twin_outputs: together.add(outputs, twin_outputs, *own_outputs)
                )

    def _add(self, dataloader_idx: int, num_twins: int, *outputs: Tensor) -> None:
        assert self._samples is not None
        sums = holdout_sums(*outputs, task=str(self._samples.task)) / num_twins
        self._sums[dataloader_idx] = self._sums.get(dataloader_idx, 0) + sums

    def compute(self, trainer: Trainer, dataloader_idx: int) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The values of a loader, and what to warn of."""
        if self._samples is None or self._samples.task is None:
            return {}, {}
        if dataloader_idx in self._together:
            with self.failures.guarded(f"could not measure some batches of dataloader {dataloader_idx}"):
                self._together[dataloader_idx].flush()
        sizes, device = (NUM_HOLDOUT_SUMS, NUM_TRAINING_SUMS), trainer.lightning_module.device
        sums = torch.zeros(sum(sizes), dtype=wide_dtype(device), device=device)
        if dataloader_idx in self._sums and self._training_sums is not None:
            sums = torch.cat([self._sums[dataloader_idx], self._training_sums])
        holdout, training = trainer.strategy.reduce(sums, reduce_op="sum").split(sizes)
        terms = risk_terms(holdout, training, _STRENGTH)
        troubles = {}
        if self._samples.may_be_probabilities:
            troubles["probabilities"] = "All outputs lie in [0, 1]. Of probabilities the estimate is wrong: use logits."
        if holdout[-1] + training[-1] > 0:
            # Of several twins each adds its part of a sample.
            counts = [math.ceil(float(each[-1]) - 1e-6) for each in (holdout, training)]
            troubles["non-finite"] = (
                f"{counts[0]} validation and {counts[1]} training samples gave nan or inf in the model or a twin, and"
                " were left out."
            )
        if not all(bool(term.isfinite()) for term in terms):
            reason = "No label of the kept training samples counts, or no batch could be measured."
            return {}, troubles or {"no value": reason}
        return dict(zip(_NAMES, terms, strict=True)), troubles

    def _keep(self, trainer: Trainer, pl_module: LightningModule, batch: Any) -> None:
        assert self._samples is not None
        problem: Exception | None = None
        try:
            with self.measuring(trainer, pl_module):
                self._samples.keep(pl_module, batch, partial(self.probe, trainer, pl_module))
        except Exception as error:
            problem = error
        if self._is_agreed:  # a later batch
            if problem is not None:
                self.failures.warn("batch", f"leaves a training batch out: {problem}")
            return
        self._is_agreed, task = True, self._samples.task
        if trainer.world_size > 1:  # all processes must log the same names
            code = torch.tensor(-1 if problem else TASKS.index(str(task)), device=pl_module.device)
            if len({int(each) for each in gather_all_tensors(code)}) > 1 and problem is None:
                problem = ValueError("Expected the same task in every process, got others in some.")
        if problem is not None:
            self._give_up(
                f"can't score the model on a training batch: {str(problem).rstrip('.')}. Say how the model is called"
                " with `inputs=`, which of its outputs are the logits with `outputs=`, where the labels are with"
                " `targets=` (keys, indices or functions), and what they are with `task=` ('multiclass', 'binary',"
                " 'multilabel' or 'regression').",
                problem,
            )
        elif self.task == "auto":
            rank_zero_info(f"`RiskMonitor` ({self.prefix}*) takes the labels of training as `task={task!r}`.")

    def _give_up(self, problem: str, cause: Exception | None = None) -> None:
        self._samples = None
        if self._is_required and self.failures.is_strict:
            raise MisconfigurationException(f"`RiskMonitor` {problem}") from cause
        self.failures.warn("no estimate", f"{problem} There will be no estimate.")
