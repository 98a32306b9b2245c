"""What a RiskMonitor knows of a fit, also when the fit is resumed from a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.arguments import link_to
from lightning_sensitivity.functional.reference import Calibration, Reference
from lightning_sensitivity.functional.risk import RiskTerms
from lightning_sensitivity.model.call import device_of
from lightning_sensitivity.model.isolation import count_writes
from lightning_sensitivity.model.samples import KeptSamples
from lightning_sensitivity.model.twins import copy_weights


class ValidationResult(NamedTuple):
    """Hold what a validation has shown.

    Attributes:
        epoch: The epoch.
        risk_criterion: The criterion.
        risk_estimate: The estimate, combined with any validation labels.
        by_twins: The estimate without the reference and without labels.
        by_reference: The reference's; nan without one, or if it has no weight.
    """

    epoch: int
    risk_criterion: float
    risk_estimate: float
    by_twins: float
    by_reference: float

    @classmethod
    def from_values(cls, epoch: int, values: Mapping[str, Tensor]) -> ValidationResult:
        """Take what is needed from the values of a :class:`~lightning_sensitivity.RiskEstimate`."""
        by_twins = sum(float(values[f"risk_{term}"]) for term in RiskTerms._fields[1:])
        has_weight = values.get("risk_reference_weight", 0) > 0
        by_reference = float(values["risk_reference"]) if has_weight else math.nan
        return cls(epoch, float(values["risk_criterion"]), float(values["risk_estimate"]), by_twins, by_reference)


class FitRecord:
    """Hold what is fixed at the start of a fit, what is kept, and what its validations have shown.

    Attributes:
        initial: The parameters before training, on the CPU; empty before the first step.
        num_training: n, the number of labelled training samples; None before the first validation.
        num_weights: w, the number of weights that are trained; None before the first validation.
        calibrations: Calibration of the reference, by loader.
        history: What each validation has shown, by loader.
        has_started: Whether this run has had a training batch; this and what follows is not saved.
        output_shape: The shape of the outputs for a sample; None before the first training batch.
        training: Training samples with labels.
        references: References, by loader; None if there can be none.
        num_reference_samples: How many training samples were kept when they were fitted.
    """

    def __init__(self) -> None:
        self.initial: dict[str, Tensor] = {}
        self.num_training: int | None = None
        self.num_weights: int | None = None
        self.calibrations: dict[int, Calibration] = {}
        self.history: dict[int, list[ValidationResult]] = {}
        self.has_started = False
        self.output_shape: tuple[int, ...] | None = None
        self.training = KeptSamples(0, num_wanted=0)  # wants none yet
        self.references: dict[int, Reference | None] = {}
        self.num_reference_samples = 0
        self._frozen: dict[str, tuple[Tensor, int]] = {}  # as before training, and how often they were written to

    def start(self, module: nn.Module, given: Mapping[str, Tensor] | None, is_new: bool) -> None:
        """Keep the parameters from before training, at the first step of a fit.

        Args:
            module: The module.
            given: Those that the user gives.
            is_new: Whether nothing was trained before this fit.

        Raises:
            MisconfigurationException: If they are unknown, or the given ones are not those of the module.
        """
        parameters = dict(module.named_parameters())
        if given is not None and parameters.keys().isdisjoint(given):
            raise MisconfigurationException(
                "`initial_weights` should name parameters of the module, as a `['state_dict']` does, but names none."
                f"{link_to('initial-weights')}"
            )
        if given is None and not self.initial and not is_new:
            raise MisconfigurationException(
                "the weights from before training are unknown, since the checkpoint has none: pass "
                f"`initial_weights=`.{link_to('initial-weights')}"
            )
        # Those that were not trained are not saved.
        self.initial = copy_weights(parameters) | self.initial if given is None else copy_weights(given)
        equal = {name: weight for name, weight in parameters.items() if _is_equal(self.initial.get(name), weight)}
        self._frozen = {name: (weight, count_writes(weight)) for name, weight in equal.items()}

    @property
    def untrained(self) -> set[str]:
        """Names of the parameters that are frozen and as they were before training: layers may be unfrozen."""
        frozen = {name: each for name, each in self._frozen.items() if not each[0].requires_grad}
        return {name for name, (weight, writes) in frozen.items() if count_writes(weight) == writes}

    def starts_at(self, batch_idx: int) -> bool:
        """Return whether to keep samples from a batch on: the first one, and again that of the next epoch, if late."""
        if not self.has_started or batch_idx > 0:
            return not self.has_started
        return self.training.size > 0 and self.training.batches[0].index > 0  # resumed within an epoch

    @property
    def num_outputs(self) -> int:
        """The number of outputs for a sample; 1 before they are known."""
        return math.prod(self.output_shape or ())

    def initial_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the initial parameters that training may have changed, on the device of the module."""
        initial = self.initial
        if not self.has_started:  # frozen weights are not saved
            initial = copy_weights(dict(module.named_parameters())) | initial
        untrained, device = self.untrained, device_of(module)
        return {name: weight.to(device) for name, weight in initial.items() if name not in untrained}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint, without weights that were not trained."""
        untrained = self.untrained
        return {
            "initial_weights": {name: weight for name, weight in self.initial.items() if name not in untrained},
            "num_training": self.num_training,
            "num_weights": self.num_weights,
            "calibrations": {index: tuple(calibration) for index, calibration in self.calibrations.items()},
            "history": {index: list(map(tuple, results)) for index, results in self.history.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> FitRecord:
        """Read what :meth:`to_dict` has written.

        Raises:
            MisconfigurationException: If something else is there.
        """
        record = cls()
        try:
            record.initial = dict(state["initial_weights"])
            record.num_training, record.num_weights = state["num_training"], state["num_weights"]
            record.calibrations = {index: Calibration(*values) for index, values in state["calibrations"].items()}
            for index, results in state["history"].items():
                record.history[index] = [ValidationResult(*values) for values in results]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                "`RiskMonitor` cannot read its state in the checkpoint, which another version may have saved: "
                f"{type(error).__name__}: {error}. Remove it from `checkpoint['callbacks']`, and pass "
                f"`initial_weights=`.{link_to('initial-weights')}"
            ) from error
        return record


def _is_equal(initial: Tensor | None, weight: Tensor) -> bool:
    return initial is not None and torch.equal(initial, weight.detach().cpu())
