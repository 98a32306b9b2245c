"""What both metrics share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity import compat
from lightning_sensitivity.functional.tensors import wide_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


class WideMetric(Metric):
    """Keep the states of a metric in double precision, even if the model that holds it is cast to 16 bits."""

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another instance into this one; see :meth:`torchmetrics.Metric.merge_state`."""
        super().merge_state(incoming_state)
        compat.forget_computed(self)  # otherwise, the value from before the merge would stay
        compat.mark_updated(self)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        """Move the states with the metric, without its casts."""
        states = self.metric_state
        for name, state in states.items():
            setattr(self, name, [] if isinstance(state, list) else torch.zeros(0))
        super()._apply(*args, **kwargs)
        for name, state in states.items():
            setattr(self, name, apply_to_collection(state, Tensor, Tensor.to, self.device, wide_dtype(self.device)))
        return self
