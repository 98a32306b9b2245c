"""Metrics whose states are in double precision, and their plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_utilities import apply_to_collection
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.compat import AxType, PlotType
from lightning_sensitivity.functional.tensors import wide_dtype


class DoublePrecisionMetric(Metric):
    """A metric with states in double precision, even if the model that holds it is cast to 16 bits."""

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

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: AxType | None = None) -> PlotType:
        """Plot one or several values of the metric.

        Args:
            val: A result of ``metric.forward`` or ``metric.compute``, or a list of results; by default the
                result of ``metric.compute``.
            ax: The matplotlib axes to plot on; by default new ones.

        Returns:
            Figure and axes object.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.

        Example:
            >>> import torch
            >>> from lightning_sensitivity import RefinedScore
            >>> metric = RefinedScore("binary")
            >>> values = [metric(torch.randn(8), torch.randint(2, (8,)).float()) for _ in range(10)]
            >>> figure, axes = metric.plot(values)
        """
        return self._plot(val, ax)
