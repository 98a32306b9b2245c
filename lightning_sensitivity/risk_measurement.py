"""What the risk estimate needs to know of a model in a fit: training samples and the weights from before training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.nn.parameter import is_lazy
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sensitivity.batches import Inputs
from lightning_sensitivity.outputs import Selector
from lightning_sensitivity.risk import holdout_sums
from lightning_sensitivity.strategies import is_sharded
from lightning_sensitivity.tasks import TASKS
from lightning_sensitivity.training_samples import TrainingSamples
from lightning_sensitivity.twin import initial_weights, learned_weights, twin

# In the study of README, minima among the first five epochs cost three times as much as later ones.
_EARLY, _LONG = 5, 10

# The variance term is a mean over twins. With less than these it would hang on the noise of a few.
_MIN_TWINS = 8


def num_twins(num_batches: float, world_size: int) -> int:
    """How many twins a batch needs, so that a loader has enough of them, each on one batch.

    Args:
        num_batches: Of the loader in this process; inf where it does not say.
        world_size: Number of processes.
    """
    return max(1, math.ceil(_MIN_TWINS / max(1, num_batches * world_size)))


class RiskMeasurement:
    """Measures both halves of the estimate, in a fit; everywhere else it has no :attr:`task` and measures nothing.

    All methods that run the model want it in eval mode.

    Args:
        task: As for :class:`~lightning_sensitivity.SensitivityMonitor`.
        num_training_samples: The same.
        inputs: The same.
        outputs: The same.
        targets: The same.
        perturbs_inputs: As for :class:`~lightning_sensitivity.training_samples.TrainingSamples`.
        must_be_saved: The same.

    Attributes:
        initial_weights: The parameters before training, None before the first fit.
    """

    def __init__(
        self,
        task: str | None,
        num_training_samples: int,
        inputs: Inputs,
        outputs: Selector,
        targets: Selector,
        perturbs_inputs: bool,
        must_be_saved: bool,
    ) -> None:
        self.initial_weights: dict[str, Tensor] | None = None
        self._model_id: int | None = None  # whose they are
        self._is_restored = False
        self._told_task = task
        self._num_training_samples = num_training_samples
        self._selectors = (inputs, outputs, targets, perturbs_inputs, must_be_saved)
        self._training_samples: TrainingSamples | None = None
        self._restored_samples: dict[str, Any] | None = None
        self._num_epochs = 0  # of this fit, not counting the rest of one that was interrupted
        self._estimates: dict[int, list[float]] = {}  # by loader, one for each validation
        self._begins_untrained = True
        self._is_required = False
        self._is_agreed = False  # on the task, by all processes
        # For the validation that is running.
        self._training_sums: Tensor | None = None
        self._learned: dict[str, Tensor] | None = None

    @property
    def task(self) -> str | None:
        """The task, as soon as there are training samples."""
        return self._training_samples.task if self._training_samples else None

    def restore(self, initial_weights: dict[str, Tensor] | None) -> None:
        """Take the weights from before training from a checkpoint.

        Args:
            initial_weights: What it has, or None.
        """
        self.initial_weights = initial_weights
        self._is_restored = True

    def samples_state(self) -> dict[str, Any]:
        """The training samples, and in which epoch of training they were kept."""
        samples = {} if self._training_samples is None else self._training_samples.state_dict()
        return {"num_epochs": self._num_epochs, "samples": samples}

    def restore_samples(self, state: dict[str, Any]) -> None:
        """Take them back, at the start of the fit.

        Args:
            state: What :meth:`samples_state` gave.
        """
        self._restored_samples = state if state["samples"] else None

    def start_fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule, is_required: bool) -> None:
        """Remember the weights, and begin to keep samples.

        Args:
            trainer: The Trainer, after a checkpoint was restored.
            pl_module: The module of the run.
            is_required: Whether something waits for the estimate. Otherwise labels that can't be told are no error.

        Raises:
            MisconfigurationException: If training resumes, and the weights from before it are not known.
        """
        if self._told_task is None:
            return
        problem = None
        goes_on = trainer.global_step > 0 and self._model_id == id(pl_module)  # a second fit of the same Trainer
        if is_sharded(trainer):
            problem = (
                "`SensitivityMonitor` should have the whole model in every process, got a strategy that shards it: its"
                " risk estimate needs all weights. `task=None` does without it."
            )
        elif self._is_restored and self.initial_weights is None:
            problem = (
                "`SensitivityMonitor` should have been in the Trainer whose training is resumed, and with a `task`:"
                " its risk estimate needs the weights from before training. `task=None` does without it."
            )
        elif any(map(is_lazy, pl_module.parameters())):
            problem = (
                "`SensitivityMonitor` should find weights before training, got lazy ones that no batch has initialized:"
                " let the sanity check run, or run the model on a batch. `task=None` does without a risk estimate."
            )
        if problem is not None:
            self.initial_weights = None
            if is_required:
                raise MisconfigurationException(problem)
            rank_zero_warn(f"There will be no risk estimate. {problem}")
            return
        if not self._is_restored and not goes_on:
            self.initial_weights = initial_weights(pl_module)
        self._begins_untrained = not self._is_restored and not goes_on
        self._model_id = id(pl_module)
        self._is_required = is_required
        self._is_agreed = self._restored_samples is not None
        self._num_epochs = 0
        self._estimates = {}
        num_samples = math.ceil(self._num_training_samples / trainer.world_size)
        self._training_samples = TrainingSamples(self._told_task, num_samples, *self._selectors)
        if self._restored_samples is not None:
            self._training_samples.load_state_dict(self._restored_samples["samples"])
            self._num_epochs, self._restored_samples = self._restored_samples["num_epochs"], None

    def end_fit(self) -> None:
        """Free the samples. The weights stay, for a second fit of the same Trainer."""
        self._training_samples = self._restored_samples = None
        self._is_restored = False

    def wants_batch(self, batch_idx: int) -> bool:
        """Whether a training batch is to be kept. Ask once for each.

        Args:
            batch_idx: Its index in the epoch.
        """
        self._num_epochs += batch_idx == 0
        # The second epoch would bring the same samples again.
        return self._training_samples is not None and not self._training_samples.is_complete and self._num_epochs < 2

    def keep(self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any) -> None:
        """Keep a training batch; see :meth:`~lightning_sensitivity.training_samples.TrainingSamples.keep`.

        Args:
            trainer: The Trainer.
            pl_module: The module, in eval mode.
            batch: The batch.

        Raises:
            MisconfigurationException: If labels or task can't be told in one of the processes, and something waits for
                the estimate; in all of them at once.
        """
        assert self._training_samples is not None
        problem: Exception | None = None
        try:
            self._training_samples.keep(pl_module, batch)
        except MisconfigurationException as error:
            problem = error
        if not self._is_agreed:
            self._is_agreed = True
            problem = self._agreed(trainer, pl_module.device, problem)
        if problem is not None:
            if self._is_required:
                raise problem
            rank_zero_warn(f"There will be no risk estimate. {problem}")
            self._training_samples = None

    def _agreed(self, trainer: pl.Trainer, device: torch.device, problem: Exception | None) -> Exception | None:
        """The problem of this process, or that the others have one: all must log the same names."""
        if trainer.world_size == 1:
            return problem
        task = -1 if problem is not None or self.task is None else TASKS.index(self.task)
        tasks = sorted({int(code) for code in gather_all_tensors(torch.tensor(task, device=device))})
        if problem is None and (len(tasks) > 1 or task < 0):
            problem = MisconfigurationException(
                "`SensitivityMonitor` should find the same task in the first training batch of every process, got"
                f" {', '.join('none' if code < 0 else repr(TASKS[code]) for code in tasks)}. Say what it is"
                " with `task=`, and look at the labels; `task=None` does without a risk estimate."
            )
        return problem

    def add_estimate(self, dataloader_idx: int, estimate: Tensor | None) -> None:
        """Remember what a validation found.

        Args:
            dataloader_idx: Index of the validation loader.
            estimate: The risk estimate, or None where it has no meaning.
        """
        values = self._estimates.setdefault(dataloader_idx, [])
        values.append(math.inf if estimate is None else float(estimate))

    def early_minima(self) -> dict[int, int]:
        """Loaders whose estimate was lowest in one of the first validations of a longer training, and in which one.

        A variance term that is too large for a model makes the estimate rise from the start.
        """
        if not self._begins_untrained:
            return {}
        lowest = {idx: values.index(min(values)) for idx, values in self._estimates.items() if len(values) >= _LONG}
        return {idx: at for idx, at in lowest.items() if at < _EARLY and self._estimates[idx][at] < math.inf}

    def end_validation(self) -> None:
        """Free what belongs to the model as it is."""
        self._training_sums = self._learned = None

    def training_sums(self, pl_module: pl.LightningModule) -> Tensor:
        """The half that labels give, measured once a validation, whatever the number of loaders.

        Call it in a batch hook: only there are averaged weights in place.

        Args:
            pl_module: The module.

        Returns:
            What :func:`~lightning_sensitivity.risk.training_sums` gives, over the samples of this process.
        """
        assert self._training_samples is not None
        if self._training_sums is None:
            self._training_sums = self._training_samples.sums(pl_module)
        return self._training_sums

    def holdout_sums(
        self,
        pl_module: pl.LightningModule,
        outputs: Tensor,
        run: Callable[[], Tensor],
        generators: Iterable[torch.Generator],
    ) -> Tensor:
        """The half that needs no labels, of one batch.

        Args:
            pl_module: The module.
            outputs: Its outputs.
            run: Gives the outputs of the weights that the module has at the time.
            generators: Sources of noise on the module's device, one for each twin.

        Returns:
            What :func:`~lightning_sensitivity.risk.holdout_sums` gives, over all twins. A twin that fails has a
            variance of nan.
        """
        assert self.task is not None
        assert self.initial_weights is not None
        if self._learned is None:
            self._learned = learned_weights(pl_module, self.initial_weights)
        total = torch.zeros((), device=outputs.device)
        for generator in generators:
            with twin(pl_module, self._learned, generator):
                try:
                    twin_outputs = run()
                except torch.cuda.OutOfMemoryError:
                    raise
                except Exception:  # what a weight may be is up to the model: a scale has to stay positive, say
                    twin_outputs = torch.full_like(outputs, math.nan)
            sums = holdout_sums(outputs, twin_outputs, self.task)
            total = total.to(sums) + sums
        return total
