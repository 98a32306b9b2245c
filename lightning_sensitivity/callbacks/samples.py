"""What a fit gives the risk estimate: training samples to score the model on, and the weights from before training."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity.functional.pieces import Together, wide_dtype
from lightning_sensitivity.functional.risk import NUM_TRAINING_SUMS, training_sums
from lightning_sensitivity.functional.sensitivity import num_outputs
from lightning_sensitivity.functional.tasks import check_logits, check_task, classes_last, infer_task
from lightning_sensitivity.models import Options, Probe, select_targets
from lightning_sensitivity.twins import initial_weights

ProbeOf = Callable[[Any], Probe]  # what runs the model on a batch

_SEVERAL = 5  # validations after which outputs in [0, 1] are no chance any more


class TrainingSamples:
    """The first training batches of a fit, in the memory of the CPU.

    They stay the same in every epoch, so that a curve over epochs moves only when the model does, and they are scored
    in eval mode. The outputs that training itself computes are no substitute: they are those of other weights, under
    dropout and with the statistics of the batch.

    Args:
        task: ``"auto"`` or one of :data:`~lightning_sensitivity.functional.tasks.TASKS`.
        num_samples: How many are wanted in this process. Batches are kept whole.
        options: How the model is run, and where labels are.

    Attributes:
        task: The task, once it is known.
        num_missing: How many samples are still to be kept; 0 or less if there are enough.
        classes_last: Whether outputs are ``(N, ..., K)``.
    """

    def __init__(self, task: str, num_samples: int, options: Options) -> None:
        self.task = None if task == "auto" else task
        self.num_missing, self._options = num_samples, options
        self._batches: list[tuple[Any, Tensor]] = []  # and their labels
        self.classes_last = False
        self._num_outputs: int | None = None  # as of the last pass
        self._num_within: Tensor | int = 0  # validations in a row in which all outputs could be probabilities

    @property
    def may_be_probabilities(self) -> bool:
        """Whether outputs for one or several labels have all been in [0, 1] for a while; waits for the device."""
        return bool(self._num_within >= _SEVERAL)

    def keep(self, model: nn.Module, batch: Any, probe: ProbeOf) -> None:
        """Keep a batch. The first one tells the task.

        Args:
            model: The module.
            batch: A training batch on its device.
            probe: Gives what runs the model on a batch.

        Raises:
            ValueError: If labels and outputs fit no task, or not the one that was told.
        """
        own = copy.deepcopy(batch)  # some batches move themselves, and the user's functions may write into them
        outputs: Tensor = probe(own).outputs()
        targets = select_targets(model, own, self._options.targets)
        if not self._batches:
            self.classes_last = classes_last(outputs, targets)
            is_square = outputs.ndim > 2 and outputs.shape[:-1] == outputs.shape[:1] + outputs.shape[2:]
            if is_square and targets.shape == outputs.shape[:-1] and self._options.outputs is None:
                raise ValueError(
                    f"Expected to see which dimension of the outputs {tuple(outputs.shape)} holds the classes. Say it:"
                    " `outputs=lambda y: y` if it is dimension 1, `outputs=lambda y: y.movedim(-1, 1)` if the last."
                )
        outputs = outputs.movedim(-1, 1) if self.classes_last else outputs
        task = self.task or infer_task(outputs, targets)
        check_task(outputs, targets, task)
        check_logits(outputs, task)
        self.task = task
        self._batches.append(
            (move_data_to_device(copy.deepcopy(batch), torch.device("cpu")), targets.to("cpu", copy=True))
        )
        self.num_missing -= len(outputs)

    def check_head(self, outputs: Tensor) -> None:
        """Require as many outputs as the kept samples have.

        Args:
            outputs: Those of a validation batch.

        Raises:
            ValueError: If they come from another head of the model.
        """
        if self._num_outputs not in (None, num_outputs(outputs)):
            raise ValueError(
                f"Expected {self._num_outputs} outputs, as training samples have, got {num_outputs(outputs)} outputs"
                " of validation samples"
            )

    def sums(
        self,
        model: LightningModule,
        probe: ProbeOf,
        guarded: Callable[[str], AbstractContextManager[None]],
    ) -> Tensor:
        """Score the model in eval mode.

        Args:
            model: The module.
            probe: Gives what runs the model on a batch.
            guarded: Inside of what it gives, an exception is a warning.

        Returns:
            What :func:`~lightning_sensitivity.functional.risk.training_sums` gives, over all samples of this process
            that the model takes.
        """
        task = str(self.task)
        total = torch.zeros(NUM_TRAINING_SUMS, dtype=wide_dtype(model.device), device=model.device)
        is_within: Tensor | bool = task in ("binary", "multilabel") and bool(self._batches)

        def score(outputs: Tensor, targets: Tensor) -> None:
            nonlocal total, is_within
            total = total + training_sums(outputs, targets, task)
            self._num_outputs = num_outputs(outputs)
            if is_within is not False:
                is_within = is_within & ((outputs >= 0) & (outputs <= 1)).all()

        together = Together(score)
        what = "leaves out kept training samples, which the model does not take"
        for batch, targets in self._batches:
            with guarded(what):
                # Some objects move themselves, or could be written to; of tensors the probe makes copies.
                own = batch if _is_plain(batch) else copy.deepcopy(batch)
                runs = probe(move_data_to_device(own, model.device))
                runs.classes_last = self.classes_last
                runs.outputs(then=lambda outputs: together.add(outputs, targets))  # noqa: B023
        with guarded(what):
            together.flush()
        self._num_within = (self._num_within + 1) * is_within
        return total


class InitialWeights:
    """The weights from before training, on the CPU, and whose they are.

    Args:
        told: A state dict, where the user says which they are.

    Attributes:
        weights: By name; None where they are not known.
        source: Where they come from.
        is_restored: Whether they are from a checkpoint, and no module is bound to them yet.
    """

    def __init__(self, told: Mapping[str, Tensor] | None) -> None:
        self._told = told
        self.weights: dict[str, Tensor] | None = None
        self.source = ""
        self._module: weakref.ref[nn.Module] | None = None
        self.is_restored = False

    def __getstate__(self) -> dict[str, Any]:
        """Leave out whose they are: what is pickled gets another module."""
        return {**vars(self), "_module": None}

    def restore(self, weights: dict[str, Tensor] | None) -> None:
        """Take them from a checkpoint, for the module that is trained, or validated, next."""
        self.weights, self.is_restored = weights, weights is not None

    def bind(self, model: nn.Module) -> bool:
        """Let them be those of a module; returns whether they were before."""
        is_known = self.is_restored or (self._module is not None and self._module() is model)
        self._module, self.is_restored = weakref.ref(model), False
        return is_known

    def find(self, model: nn.Module, is_trained: bool) -> str | None:
        """Find them at the start of a fit; returns what is wrong, or None.

        Args:
            model: The module.
            is_trained: Whether this fit has done a step already.

        Raises:
            MisconfigurationException: If what was told are no weights of the module.
        """
        is_known = self.bind(model)
        if any(map(is_lazy, model.parameters())):
            return "needs weights before training, got lazy ones: let the sanity check run, or run the model once."
        if self._told is not None:
            self.weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in self._told.items()}
            self.source = "those of `initial_weights`"
            if not self.weights.keys() & dict(model.named_parameters()).keys():
                raise MisconfigurationException(
                    "`initial_weights` should name the parameters of the module, got none of their names."
                )
        elif is_known and self.weights is not None:
            self.source = "those of the fit that goes on"
        elif is_trained:
            self.weights = None
            return (
                "needs the weights from before training, which the checkpoint does not have, since no `RiskMonitor`"
                " of this prefix was in its Trainer. Tell them with `initial_weights=`."
            )
        else:
            self.weights = initial_weights(model)
            self.source = (
                "those at the start of this fit; if an earlier fit has trained them, pass the ones from before it as"
                " `initial_weights=`"
            )
        return None

    def lacks(self, model: nn.Module) -> list[str]:
        """Names of the parameters that were not there before training, or had another shape."""
        known = {name: each.shape for name, each in (self.weights or {}).items()}
        return [name for name, each in model.named_parameters() if known.get(name) != each.shape]


def _is_plain(value: Any) -> bool:
    """Whether a batch is tensors and what can't change, in collections."""
    if isinstance(value, dict | list | tuple):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return isinstance(value, Tensor | str | int | float | None)
