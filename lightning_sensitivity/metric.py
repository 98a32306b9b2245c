"""Output sensitivity as a torchmetrics Metric; it needs neither a Trainer nor a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat, rank_zero_warn
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE

from lightning_sensitivity.functional import sensitivity as F
from lightning_sensitivity.functional.pieces import wide_dtype


class OutputSensitivity(Metric):
    r"""Output sensitivity: the variance of the class-averaged output change under input noise.

    .. math::
        S = \operatorname{Var}\Big(\frac{1}{K} \sum_{k=1}^{K} \big[f_k(x + \varepsilon) - f_k(x)\big]\Big)

    The variance is that of the population (ddof 0) over all samples and noise draws (Forouzesh, Salehi and Thiran,
    ICPR 2020, `arXiv:2007.15378`_). It needs no labels. The state is one row of five numbers a sample, so that the
    value depends on neither the batch size nor the number of processes.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``clean`` (:class:`~torch.Tensor`): outputs f(x), before the softmax (logits), as a float tensor of shape
      ``(N, K, ...)``. Dimensions after K (pixels, tokens) count as further changes of a sample; ``(N,)`` is K = 1.
    - ``noisy`` (:class:`~torch.Tensor` or an iterable of them): outputs f(x + ε) of the same shape; for several noise
      draws of the same samples, an iterable with one tensor a draw. A generator is consumed one draw at a time.

    As output of ``forward`` and ``compute`` the metric returns the following output:

    - ``sensitivity`` (:class:`~torch.Tensor`): scalar tensor in squared units of the outputs

    Samples with nan or inf are left out, and ``compute`` says how many. It also warns where no output changed, and
    where the class average holds next to nothing of the change (as that of probabilities). Outputs that are -inf in
    clean and noisy outputs alike, as masked logits are, have not changed and don't count.

    Args:
        per_output: Compute the mean squared change of the single outputs instead, which does not average over classes
            first and so also means something for probabilities.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``per_output`` is no bool; in ``update``, if shapes do not fit; in ``compute``, if K
            was not always the same.
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
        >>> metric.per_sample.topk(3).indices  # the most sensitive samples, in the order of the updates
        tensor([106, 300, 383])

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

    rows: list[Tensor]
    _all_rows: Tensor  # over all processes, as of the last `compute`
    _estimate: F.SensitivityEstimate  # from those

    def __init__(self, per_output: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(per_output, bool):
            raise ValueError(f"Expected argument `per_output` to be a bool, but got {per_output!r}.")
        self.per_output = per_output
        self.has_masked: bool | None = None  # told by the first batch, so that later ones need not wait for the device
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process without samples has rows to gather, too, of the type that the others have.
        self.rows.append(torch.zeros(0, F.NUM_COLUMNS, dtype=wide_dtype(self.device), device=self.device))

    def update(self, clean: Tensor, noisy: Tensor | Iterable[Tensor]) -> None:
        """Add the outputs of one batch of samples, for clean and for perturbed inputs."""
        if self.has_masked is None and isinstance(clean, Tensor) and clean.numel():
            self.has_masked = F.has_masked(clean)
        self.rows.append(F.sensitivity_rows(clean, noisy, bool(self.has_masked)))

    def compute(self) -> Tensor:
        """The sensitivity of all samples so far, over all processes."""
        self._all_rows = dim_zero_cat(self.rows)
        self._estimate = F.sensitivity_from_rows(self._all_rows)
        for kind, doubt in F.doubts(self._estimate, self.per_output).items():
            self._report(kind, doubt)
        if self.has_masked:
            self._report("masked", "Outputs that are -inf in both passes have not changed, and don't count.")
        return self._estimate.mean_square if self.per_output else self._estimate.sensitivity

    @property
    def estimate(self) -> F.SensitivityEstimate:
        """All that the rows say, over all processes: error bars, the share of the class mean, how many samples."""
        self.compute()  # cached, and leaves the estimate behind
        return self._estimate

    @property
    def stderr(self) -> Tensor:
        """Standard error of the value, over samples and noise; nan below two samples."""
        return self.estimate.mean_square_stderr if self.per_output else self.estimate.stderr

    @property
    def num_samples(self) -> Tensor:
        """Number of samples behind the value, over all processes."""
        return self.estimate.num_samples

    @property
    def per_sample(self) -> Tensor:
        """What each sample adds: its mean squared change, ``(N,)``, of which the mean is the value.

        In the order of the updates, process by process; nan for samples with nan or inf. (The mean is exactly the
        value where all samples have as many positions.)
        """
        self.compute()
        rows = self._all_rows
        sums = rows[:, 3].where(rows.isfinite().all(1), math.nan) if self.per_output else F.squared_deviations(rows)
        return sums / rows[:, 0]

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another instance into this one; see :meth:`torchmetrics.Metric.merge_state`."""
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics would keep giving the value from before the merge

    def _apply(self, *args: Any, **kwargs: Any) -> OutputSensitivity:
        """Move the rows with the metric, but don't round them where the model around it becomes a 16-bit one."""
        rows, self.rows = self.rows, []
        super()._apply(*args, **kwargs)
        self.rows = [each.to(self.device, wide_dtype(self.device)) for each in rows]
        return self

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

    def _report(self, kind: str, doubt: str) -> None:
        rank_zero_warn(doubt)
