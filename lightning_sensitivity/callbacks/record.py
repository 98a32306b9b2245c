"""What a RiskMonitor has to remember of a fit: all of a record is saved, and nothing of what is kept beside it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_sensitivity.arguments import Refused
from lightning_sensitivity.functional.reference import Calibration, Reference
from lightning_sensitivity.model.call import device_of
from lightning_sensitivity.model.samples import KeptSamples
from lightning_sensitivity.model.twins import copy_weights

CRITERION, ESTIMATE = "risk_criterion", "risk_estimate"  # of the logged values


class ValidationResult(NamedTuple):
    """Hold what a validation has shown, over all processes.

    Attributes:
        epoch: The epoch.
        risk_criterion: The criterion.
        risk_estimate: The estimate, combined with any validation labels.
        by_reference: The reference's; nan without one, or if it has no weight.
        label_noise: The share of training labels that look wrong; nan if it is unknown.
        gap_weight: How much the estimate counts in the criterion; 0 if no noise was found in the training labels.
        temperature: By which logits are to be divided, to be calibrated.
    """

    epoch: int
    risk_criterion: float
    risk_estimate: float
    by_reference: float
    label_noise: float
    gap_weight: float
    temperature: float

    @classmethod
    def of(cls, epoch: int, values: Mapping[str, Tensor], gap_weight: float) -> ValidationResult:
        """Take what is needed from what a :class:`~lightning_sensitivity.RiskEstimate` has computed."""
        has_weight = bool(values.get("risk_reference_weight", 0.0) > 0)
        return cls(
            epoch=epoch,
            risk_criterion=float(values[CRITERION]),
            risk_estimate=float(values[ESTIMATE]),
            by_reference=float(values["risk_reference"]) if has_weight else math.nan,
            label_noise=float(values.get("risk_label_noise", math.nan)),
            gap_weight=gap_weight,
            temperature=float(values["risk_temperature"]),
        )


@dataclass
class RiskRecord:
    """Hold what is fixed at the start of a fit, and what its validations have shown.

    Attributes:
        initial: The parameters from before training, on the CPU; empty before the first step.
        num_training: n, the number of labelled training samples; None before the first validation.
        num_weights: w, the number of weights that are trained; None before the first validation.
        calibrations: Calibration of the reference, by loader.
        gap_weights: How much the estimate counts in the criterion, by loader, once all training samples were kept.
        history: What each validation has shown, by loader.
    """

    initial: dict[str, Tensor] = field(default_factory=dict)
    num_training: int | None = None
    num_weights: int | None = None
    calibrations: dict[int, Calibration] = field(default_factory=dict)
    gap_weights: dict[int, float] = field(default_factory=dict)
    history: dict[int, list[ValidationResult]] = field(default_factory=dict)

    def start(self, module: nn.Module, given: Mapping[str, Tensor] | None, is_new: bool) -> None:
        """Take the parameters from before training, at the first step of a run.

        Args:
            module: The module.
            given: Those that the user gives.
            is_new: Whether nothing was trained before this run.

        Raises:
            MisconfigurationException: If they are unknown, or the given ones are not those of the module.
        """
        parameters = dict(module.named_parameters())
        if given is not None and parameters.keys().isdisjoint(given):
            message = "`initial_weights` should name parameters of the module, as a `['state_dict']` does"
            raise Refused(f"{message}, but names none.", entry="initial-weights")
        if given is None and not self.initial and not is_new:
            message = "the weights from before training are unknown, since the checkpoint has none"
            raise Refused(f"{message}: pass `initial_weights=`.", entry="initial-weights")
        self.initial = copy_weights(parameters) | self.initial if given is None else copy_weights(given)

    def initial_weights(self, module: nn.Module) -> dict[str, Tensor]:
        """Return the initial parameters on the device of a module, but those that are frozen and unchanged."""
        parameters, device = dict(module.named_parameters()), device_of(module)
        frozen = {name: weight for name, weight in parameters.items() if not weight.requires_grad}
        unchanged = {name for name, weight in frozen.items() if _is_equal(self.initial.get(name), weight)}
        initial = self.initial or copy_weights(parameters)  # nothing was trained yet
        return {name: weight.to(device) for name, weight in initial.items() if name not in unchanged}

    def has_moved(self, module: nn.Module) -> bool:
        """Return whether trained weights are more than 1 % away from where they began."""
        pairs = [(weight, self.initial.get(name)) for name, weight in module.named_parameters() if weight.requires_grad]
        known = [(x.detach().cpu().double(), w.double()) for x, w in pairs if w is not None and w.shape == x.shape]
        moved = sum(float((x - before).square().sum()) for x, before in known)
        return moved > 0.01**2 * sum(float(before.square().sum()) for _, before in known)

    def to_dict(self, module: nn.Module) -> dict[str, Any]:
        """Return plain values for a checkpoint, without the initial weights that its module still has."""
        parameters = dict(module.named_parameters())
        changed = {name: x for name, x in self.initial.items() if not _is_equal(x, parameters.get(name))}
        return {
            "initial_weights": changed,
            "num_training": self.num_training,
            "num_weights": self.num_weights,
            "calibrations": {index: tuple(calibration) for index, calibration in self.calibrations.items()},
            "gap_weights": dict(self.gap_weights),
            "history": {index: list(map(tuple, results)) for index, results in self.history.items()},
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], module: nn.Module) -> RiskRecord:
        """Read what :meth:`to_dict` has written, with the module of the same checkpoint.

        Raises:
            MisconfigurationException: If something else is there.
        """
        try:
            return cls(
                initial=copy_weights(dict(module.named_parameters())) | dict(state["initial_weights"]),
                num_training=state["num_training"],
                num_weights=state["num_weights"],
                calibrations={index: Calibration(*values) for index, values in state["calibrations"].items()},
                gap_weights=dict(state["gap_weights"]),
                history={index: [ValidationResult(*r) for r in results] for index, results in state["history"].items()},
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise Refused(
                "`RiskMonitor` cannot read its state in the checkpoint, which another version may have saved: "
                f"{type(error).__name__}: {error}. Remove it from `checkpoint['callbacks']`, and pass "
                "`initial_weights=`.",
                entry="initial-weights",
            ) from error


def _is_equal(initial: Tensor | None, weight: Tensor | None) -> bool:
    """Compare values, since a write through `data` leaves no other trace."""
    if initial is None or weight is None or initial.shape != weight.shape:
        return False
    return torch.equal(initial.to(weight), weight.detach())


@dataclass
class KeptTraining:
    """Hold what a run keeps of its training samples, and what was made of them.

    Attributes:
        has_started: Whether the run has had a training batch.
        output_shape: The shape of the outputs for a sample; None before the first training batch.
        samples: Training samples with labels; it wants none at first.
        references: References, by loader; None if there can be none.
        num_known: How many training samples were kept when they were fitted.
    """

    has_started: bool = False
    output_shape: tuple[int, ...] | None = None
    samples: KeptSamples = field(default_factory=lambda: KeptSamples(0, num_wanted=0))
    references: dict[int, Reference | None] = field(default_factory=dict)
    num_known: int = 0

    def starts_at(self, batch_idx: int) -> bool:
        """Return whether to keep samples from a batch on: the first one, and again that of the next epoch, if late."""
        if not self.has_started or batch_idx > 0:
            return not self.has_started
        return self.samples.size > 0 and self.samples.batches[0].index > 0  # resumed within an epoch
