"""What both metrics share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_utilities import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.functional.tensors import wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


class WideMetric(Metric):
    """Keep the states of a metric in double precision, even if the model that holds it is cast to 16 bits."""

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Self:
        """Move the states with the metric, without its casts."""
        super()._apply(fn, exclude_state=tuple(self._defaults))
        device, dtype = self.device, wide_dtype(self.device)
        for name, default in self._defaults.items():
            self._defaults[name] = apply_to_collection(default, Tensor, Tensor.to, device, dtype)
            setattr(self, name, apply_to_collection(getattr(self, name), Tensor, Tensor.to, device, dtype))
        return self
