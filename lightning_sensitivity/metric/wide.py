"""What both metrics share."""

from collections.abc import Callable
from typing import Any

from lightning_utilities import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.functional.tensors import wide_dtype


class WideMetric(Metric):
    """Keep the states of a metric in double precision, even if the model that holds it is cast to 16 bits."""

    is_differentiable: bool = False
    full_state_update: bool = False
    plot_lower_bound: float = 0.0

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Metric:
        """Move the states with the metric, without its casts."""
        super()._apply(fn, exclude_state=tuple(self._defaults))
        for name, default in self._defaults.items():
            self._defaults[name] = apply_to_collection(default, Tensor, self._move)
            setattr(self, name, apply_to_collection(getattr(self, name), Tensor, self._move))
        return self

    def _move(self, state: Tensor) -> Tensor:
        return state.to(self.device, wide_dtype(self.device))
