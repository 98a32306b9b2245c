"""Output sensitivity as a torchmetrics Metric; needs neither a Trainer nor a model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_sensitivity.extremes import (
    check_num_outputs,
    check_outputs,
    check_rounding,
    empty_extremes,
    find_non_finite,
)
from lightning_sensitivity.moments import (
    SensitivityEstimate,
    batch_moments,
    empty_moments,
    merge_moments,
    sensitivity_estimate,
)

__all__ = ["OutputSensitivity"]


class OutputSensitivity(Metric):
    r"""Output sensitivity: the variance of the class-averaged output change under input noise.

    .. math::
        S = \operatorname{Var}\Big(\frac{1}{K} \sum_{k=1}^{K} \big[f_k(x + \varepsilon) - f_k(x)\big]\Big)

    The variance is that of the population (ddof 0) over all samples and noise draws (Forouzesh, Salehi and Thiran,
    ICPR 2020, `arXiv:2007.15378`_). It needs no labels. Moments are kept in float64 and merged, so that the value
    depends on neither the batch size, nor the order, nor the number of processes.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``clean`` (:class:`~torch.Tensor`): outputs f(x), before the softmax (logits, not log-probabilities), as a float
      tensor of shape ``(N, K, ...)``. Dimensions after K (pixels, tokens) count as further samples; ``(N,)`` is K = 1.
    - ``noisy`` (:class:`~torch.Tensor` or an iterable of them): outputs f(x + ε) of the same shape; for several noise
      draws of the same samples, an iterable with one tensor a draw. A generator is consumed one draw at a time; what
      passes on its input more than once, such as a :class:`torchmetrics.MetricCollection`, needs a list.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``sensitivity`` (:class:`~torch.Tensor`): scalar tensor in squared units of the outputs

    Its error bar is :attr:`stderr`, the number of samples behind it :attr:`num_samples`. That all outputs are finite
    and are not probabilities is checked in ``compute``, so that ``update`` never waits for the device. So is their
    rounding, which in 16 bits can be above the changes: ``compute`` warns where it may move the value by more than the
    error bar says. It goes by the coarsest type of the outputs and of autocast, if ``update`` runs inside it.

    Args:
        per_output: Compute the mean over k of Var(f_k(x + ε) − f_k(x)) instead, which does not average over outputs
            first and so is meaningful for probabilities, too.
        num_outputs: K, for ``per_output`` only.
        nan_strategy: What ``compute`` does about nan or inf in the outputs: ``"error"`` raises, ``"warn"`` warns and
            returns nan.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If an argument is not one of the above; in ``update``, if shapes do not fit; in ``compute``, if
            outputs were nan or inf (``nan_strategy="error"``), if K changed between batches, or if the outputs are
            probabilities and ``per_output`` is False.
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
        >>> metric.num_samples
        tensor(500)

    Example (several noise draws of the same samples):
        >>> metric = OutputSensitivity()
        >>> metric.update(model(x), (model(x + 0.1 * torch.randn_like(x)) for _ in range(4)))
        >>> metric.compute()
        tensor(0.0003, dtype=torch.float64)

    .. _arXiv:2007.15378: https://arxiv.org/abs/2007.15378

    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    plot_lower_bound: float = 0.0

    moments: Tensor
    extremes: Tensor

    def __init__(
        self, per_output: bool = False, num_outputs: int | None = None, nan_strategy: str = "error", **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if not isinstance(per_output, bool):
            raise ValueError(f"Expected argument `per_output` to be a bool, but got {per_output!r}.")
        if per_output and not (isinstance(num_outputs, int) and num_outputs >= 1):
            raise ValueError(
                "Expected argument `num_outputs` to be an int larger than 0 with `per_output`, but got"
                f" {num_outputs!r}."
            )
        if not per_output and num_outputs is not None:
            raise ValueError(f"Expected argument `num_outputs` only with `per_output`, but got {num_outputs!r}.")
        if nan_strategy not in ("error", "warn"):
            raise ValueError(f"Expected argument `nan_strategy` to be 'error' or 'warn', but got {nan_strategy!r}.")
        self.per_output = per_output
        self.num_outputs = num_outputs
        self.nan_strategy = nan_strategy
        self._estimate: SensitivityEstimate | None = None
        self.add_state("moments", default=empty_moments(num_outputs or 1), dist_reduce_fx=merge_moments)
        self.add_state("extremes", default=empty_extremes(), dist_reduce_fx="min")

    def update(self, clean: Tensor, noisy: Tensor | Iterable[Tensor]) -> None:
        """Add the outputs of one batch of samples, for clean and for perturbed inputs."""
        if self.per_output and isinstance(clean, Tensor) and clean.shape[1:2] != (self.num_outputs,):
            raise ValueError(
                f"Expected `clean` to have {self.num_outputs} outputs in dimension 1 (`num_outputs`), but got the"
                f" shape {tuple(clean.shape)}."
            )
        moments, extremes = batch_moments(clean, noisy, self.per_output, self.update_count - 1)
        # Out of place: a state that inference mode once wrote into could not be updated outside of it.
        self.moments = merge_moments(torch.stack([self.moments.to(moments), moments]))
        self.extremes = torch.minimum(self.extremes.to(extremes), extremes)

    def compute(self) -> Tensor:
        """The sensitivity of all samples so far, over all processes."""
        self._estimate = sensitivity_estimate(self.moments)
        self._check(self._estimate)
        return self._estimate.sensitivity

    @property
    def stderr(self) -> Tensor:
        """Standard error of the sensitivity, over samples and noise; ``nan`` below two samples. Computes if needed."""
        return self._computed_estimate().stderr

    @property
    def num_samples(self) -> Tensor:
        """Number of samples behind the sensitivity, over all processes. Computes if needed."""
        return self._computed_estimate().num_samples

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another instance into this one; see :meth:`torchmetrics.Metric.merge_state`."""
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics would keep giving the value from before the merge

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: _AX_TYPE | None = None) -> _PLOT_OUT_TYPE:
        """Plot a single or multiple values from the metric.

        Args:
            val: Either a single result from calling ``metric.forward`` or ``metric.compute`` or a list of these
                results. If no value is provided, will automatically call ``metric.compute`` and plot that result.
            ax: A matplotlib axis object. If provided will add the plot to that axis.

        Returns:
            Figure and axes object.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.

        Example:
            >>> import torch
            >>> from lightning_sensitivity import OutputSensitivity
            >>> metric = OutputSensitivity()
            >>> values = [metric(torch.rand(8, 3), torch.rand(8, 3)) for _ in range(10)]
            >>> figure, axes = metric.plot(values)
        """
        return self._plot(val, ax)

    def _check(self, estimate: SensitivityEstimate) -> None:
        extremes = self.extremes.cpu()  # once, for all checks
        check_num_outputs(extremes)
        if (problem := find_non_finite(extremes)) is not None:
            self._report_non_finite(problem)
        elif not self.per_output and (warning := check_outputs(extremes)) is not None:
            rank_zero_warn(warning)
        elif (warning := check_rounding(estimate, extremes)) is not None:
            self._report_rounding(warning)

    def _report_non_finite(self, problem: str) -> None:
        if self.nan_strategy == "error":
            raise ValueError(f"{problem} With `nan_strategy='warn'` it is a warning, and there is no value.")
        rank_zero_warn(problem)

    def _report_rounding(self, warning: str) -> None:
        rank_zero_warn(warning)

    def _computed_estimate(self) -> SensitivityEstimate:
        self.compute()  # cached, and leaves the estimate behind
        assert self._estimate is not None
        return self._estimate
