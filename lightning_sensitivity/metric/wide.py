"""What both metrics share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.functional.tensors import wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


class WideMetric(Metric):
    """Keep the states of a metric in double precision, even if the model that holds it is cast to 16 bits."""

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move the states with the metric, without its casts."""
        states = self.metric_state
        for name, state in states.items():
            setattr(self, name, [] if isinstance(state, list) else torch.zeros(0))
        super()._apply(*args, **kwargs)
        for name, state in states.items():
            setattr(self, name, apply_to_collection(state, Tensor, Tensor.to, self.device, wide_dtype(self.device)))
        return self
