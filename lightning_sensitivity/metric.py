"""Output sensitivity as a torchmetrics metric, which needs neither a Trainer nor a model.

Its state is in double precision, even if the model that holds it is cast to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_sensitivity.compat import AxType, PlotType
from lightning_sensitivity.functional import sensitivity
from lightning_sensitivity.functional.tensors import wide_dtype

__all__ = ["OutputSensitivity"]


class OutputSensitivity(Metric):
    r"""Output sensitivity: the variance of the class-averaged output change under input noise.

    .. math::
        S = \operatorname{Var}\Big(\frac{1}{K} \sum_{k=1}^{K} \big[f_k(x + \varepsilon) - f_k(x)\big]\Big)

    The variance is the population variance (ddof 0) over all samples and noise draws (Forouzesh, Salehi and
    Thiran, arXiv:2007.15378). The state is one row of five numbers per sample, so the value depends on
    neither the batch size nor the number of processes. Samples with nan or inf are left out, with a warning.

    ``forward`` and ``update`` accept:

    - ``clean`` (:class:`~torch.Tensor`): outputs f(x), before the softmax (logits), floating,
      ``(N, K, ...)``. Dimensions after K (pixels, tokens) count as further changes of a sample; ``(N,)``
      means K = 1.
    - ``noisy`` (:class:`~torch.Tensor` or a list of them): outputs f(x + ε) of the same shape; for
      several noise draws of the same samples, a list with one tensor per draw.

    ``forward`` and ``compute`` return a scalar tensor, in squared units of the outputs. Neither higher nor
    lower is better: compare epochs and seeds of one network. It is lowest before training.

    Args:
        per_output: Compute the mean squared change of the single outputs instead, without averaging over
            classes first. This also makes sense for probabilities and two-class heads.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``per_output`` is not a bool; in ``update``, if shapes do not fit; in ``compute``, if K
            differs between updates.
        TypeError: In ``update``, if an output is not a floating tensor.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import OutputSensitivity
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(20, 10)
        >>> metric = OutputSensitivity()
        >>> for _ in range(5):
        ...     x = torch.rand(100, 20)
        ...     metric.update(model(x), model(x + 0.1 * torch.randn_like(x)))
        >>> metric.compute()
        tensor(0.0003, dtype=torch.float64)
        >>> metric.stderr
        tensor(2.1333e-05, dtype=torch.float64)
    """

    is_differentiable: bool = False
    full_state_update: bool = False
    plot_lower_bound: float = 0.0
    __jit_unused_properties__: ClassVar[list[str]] = [*Metric.__jit_unused_properties__, "estimate", "stderr"]

    def __init__(self, per_output: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(per_output, bool):
            raise ValueError(f"Expected argument `per_output` to be a bool, but got {per_output!r}.")
        self.per_output = per_output
        self._all_rows = torch.empty(0)  # over all processes, as of the last `compute`
        self.rows: list[Tensor] | Tensor = []  # one tensor while it is synchronized
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process without samples must also take part when rows are gathered, with the same dtype.
        empty = torch.zeros(0, sensitivity.NUM_COLUMNS, dtype=wide_dtype(self.device), device=self.device)
        self.rows = [empty]

    def update(self, clean: Tensor, noisy: Tensor | Sequence[Tensor]) -> None:
        """Add the outputs for clean and perturbed inputs of one batch; in a ``MetricCollection``, by keywords."""
        assert isinstance(self.rows, list)
        self.rows.append(sensitivity.sensitivity_sums(clean, noisy))

    def compute(self) -> Tensor:
        """Compute the sensitivity of all samples so far, over all processes."""
        self._all_rows = dim_zero_cat(self.rows)
        estimate = sensitivity.sensitivity_from_sums(self._all_rows, self.per_output)
        for message in sensitivity.diagnostics(estimate, self.per_output).values():
            rank_zero_warn(message, stacklevel=5)  # at the line that calls `compute`
        return estimate.value

    @property
    def estimate(self) -> sensitivity.SensitivityEstimate:
        """Value, standard errors, share of the class mean and numbers of samples, over all processes.

        Like ``compute``, reading it is a collective operation unless a value is cached. The same holds for
        :attr:`stderr`.
        """
        self.compute()  # this is cached, and sets the rows
        return sensitivity.sensitivity_from_sums(self._all_rows, self.per_output)

    @property
    def stderr(self) -> Tensor:
        """Standard error of the value, over samples and noise; nan below two samples."""
        return self.estimate.stderr

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
            >>> from lightning_sensitivity import OutputSensitivity
            >>> metric = OutputSensitivity()
            >>> values = [metric(torch.randn(8, 3), torch.randn(8, 3)) for _ in range(10)]
            >>> figure, axes = metric.plot(values)
        """
        return self._plot(val, ax)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any) -> Metric:
        """Move the state with the metric, without its casts."""
        super()._apply(fn, exclude_state=tuple(self._defaults))
        for name, default in self._defaults.items():
            self._defaults[name] = apply_to_collection(default, Tensor, self._move)
            setattr(self, name, apply_to_collection(getattr(self, name), Tensor, self._move))
        return self

    def _move(self, state: Tensor) -> Tensor:
        return state.to(self.device, wide_dtype(self.device))
