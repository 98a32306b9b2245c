"""What a RiskMonitor must remember in a fit, also when the fit is resumed from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.arguments import see
from lightning_sensitivity.callbacks.closing import Measured
from lightning_sensitivity.functional.reference import Calibration
from lightning_sensitivity.model.twins import copy_weights


@dataclass
class FitState:
    """Hold what is fixed at the start of a fit, and what its validations have shown.

    Attributes:
        module: The module, during a run.
        initial: The parameters before training, on the CPU; None if they are not known yet.
        num_training: n, the number of labelled training samples; None before the first validation.
        num_weights: w, the number of weights that are trained; None before the first validation.
        calibrations: Calibration of the reference, by loader.
        history: What each validation has shown on the first loader.
    """

    module: nn.Module | None = None
    initial: dict[str, Tensor] | None = None
    num_training: int | None = None
    num_weights: int | None = None
    calibrations: dict[int, Calibration] = field(default_factory=dict)
    history: list[Measured] = field(default_factory=list)

    def parameters(self) -> dict[str, Tensor]:
        """Return the current parameters by name; none outside of a run."""
        return {} if self.module is None else dict(self.module.named_parameters())

    def weights_before_training(self) -> dict[str, Tensor]:
        """Return the parameters before training; before the first step, those in the module."""
        return copy_weights(self.parameters()) if self.initial is None else self.initial

    def find_initial(self, given: Mapping[str, Tensor] | None, is_new: bool) -> dict[str, Tensor]:
        """Find the parameters from before training, at the first step of a fit.

        Args:
            given: Those that the user gives.
            is_new: Whether nothing was trained before this fit.

        Raises:
            MisconfigurationException: If they are unknown, or the given ones are not those of the module.
        """
        if given is None and self.initial is None and not is_new:
            raise MisconfigurationException(
                "the weights from before training are unknown, since the checkpoint has none: pass "
                f"`initial_weights=`.{see('initial-weights')}"
            )
        weights = None if given is None else copy_weights(given)
        if weights is not None and self.parameters().keys().isdisjoint(weights):
            raise MisconfigurationException(
                "`initial_weights` should name parameters of the module, as a `['state_dict']` does, but names none."
                f"{see('initial-weights')}"
            )
        return self.weights_before_training() if weights is None else weights

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint, with those initial parameters that training has changed."""
        initial, current = self.initial, self.parameters()
        if initial is not None:
            initial = {name: weight for name, weight in initial.items() if not _is_equal(weight, current.get(name))}
        return {
            "initial_weights": initial,
            "num_training": self.num_training,
            "num_weights": self.num_weights,
            "calibrations": {index: tuple(calibration) for index, calibration in self.calibrations.items()},
            "history": [tuple(measured) for measured in self.history],
        }

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], module: nn.Module | None) -> FitState:
        """Read what :meth:`to_dict` has written.

        Args:
            state: What was written.
            module: The module of the resumed run, with the weights of the checkpoint.

        Raises:
            MisconfigurationException: If something else is there.
        """
        try:
            weights, n, w = state["initial_weights"], state["num_training"], state["num_weights"]
            found = cls(
                module=module,
                num_training=None if n is None else int(n),
                num_weights=None if w is None else int(w),
                calibrations={int(i): Calibration(*map(float, each)) for i, each in state["calibrations"].items()},
                history=[Measured(int(epoch), float(value), float(z)) for epoch, value, z in state["history"]],
            )
            if weights is not None:  # those that training has not changed are not saved
                found.initial = copy_weights(found.parameters()) | copy_weights(weights)
            return found
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise MisconfigurationException(
                "`RiskMonitor` cannot read its state in the checkpoint, which another version may have saved: "
                f"{type(error).__name__}: {error}. Remove it from `checkpoint['callbacks']`, and pass "
                f"`initial_weights=`.{see('initial-weights')}"
            ) from error


def _is_equal(initial: Tensor, current: Tensor | None) -> bool:
    return current is not None and torch.equal(initial, current.detach().cpu())
