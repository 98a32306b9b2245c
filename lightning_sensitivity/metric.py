"""Output sensitivity and the refined score as torchmetrics, which need neither a Trainer nor a model.

Their states are in double precision, even if the model that holds them is cast to 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.prints import rank_zero_warn

from lightning_sensitivity.compat import AxType, PlotType
from lightning_sensitivity.functional import sensitivity
from lightning_sensitivity.functional.refined_score import TEMPERATURES, Refined, ScoreSums, check_scored, score_sums
from lightning_sensitivity.functional.tasks import find_task
from lightning_sensitivity.functional.tensors import wide_dtype

__all__ = ["OutputSensitivity", "RefinedScore"]


class DoublePrecisionMetric(Metric):
    """A metric with states in double precision."""

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


class OutputSensitivity(DoublePrecisionMetric):
    r"""Compute output sensitivity: the variance of the class-averaged output change under input noise.

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
        TypeError: In ``update``, if an output is not a floating tensor, or ``noisy`` are labels.

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

    def __init__(self, per_output: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(per_output, bool):
            raise ValueError(f"Expected argument `per_output` to be a bool, but got {per_output!r}.")
        self.per_output = per_output
        self._all_rows = torch.empty(0)  # over all processes, as of the last `compute`
        self.rows: list[Tensor] | Tensor = []  # one tensor while it is synchronized
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self._has_looked = False  # `forward` resets the number of updates
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process without samples must also take part when rows are gathered, with the same dtype.
        empty = torch.zeros(0, sensitivity.NUM_COLUMNS, dtype=wide_dtype(self.device), device=self.device)
        self.rows = [empty]

    def update(self, clean: Tensor, noisy: Tensor | Sequence[Tensor]) -> None:
        """Add the outputs for clean and perturbed inputs of one batch."""
        assert isinstance(self.rows, list)
        if isinstance(noisy, Tensor) and noisy.numel() > 0:  # a `MetricCollection` passes labels by position
            is_first, self._has_looked = not self._has_looked, True  # looking at numbers waits for the device
            if not noisy.is_floating_point() or (is_first and bool((noisy == noisy.square()).all() and noisy.any())):
                raise TypeError(
                    f"Expected `noisy` to be a floating tensor of outputs (logits), but got labels, {noisy.dtype}. "
                    "Update a `MetricCollection` by keywords: `collection.update(preds=..., target=..., clean=..., "
                    "noisy=...)`."
                )
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


class RefinedScore(DoublePrecisionMetric):
    r"""Compute the Brier score after the best temperature: what to choose an epoch by, with labels.

    .. math::
        \min_T \; \frac{1}{n} \sum_i \big\| \operatorname{softmax}(f(x_i) / T) - y_i \big\|^2

    It follows accuracy, and does not rise only because a network becomes too sure of itself. See
    :func:`~lightning_sensitivity.functional.refined_score` for the source. The state is one row of sums for
    each of nine temperatures, so the value depends on neither the batch size nor the number of processes.

    ``forward`` and ``update`` accept:

    - ``logits`` (:class:`~torch.Tensor`): outputs before softmax or sigmoid, ``(N, K)``; ``(N,)`` or
      ``(N, 1)`` for ``"binary"``.
    - ``targets`` (:class:`~torch.Tensor`): class indices ``(N,)``; or probabilities ``(N, K)``, such as soft
      labels or the predictions of another model. Those of -100 are ignored.

    ``forward`` and ``compute`` return a scalar tensor; lower is better. Samples with nan or inf are left out,
    with a warning; probabilities give one, too.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"regression"``, whose score is the mean squared error.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If the task is unknown; in ``update``, if targets do not fit the task, or logits are
            dense.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import RefinedScore
        >>> metric = RefinedScore("multiclass")
        >>> metric.update(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 1]))
        >>> metric.update(torch.tensor([[4.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0]))
        >>> metric.compute()
        tensor(0.3757, dtype=torch.float64)
        >>> metric.temperature
        4.0
    """

    higher_is_better: bool = False

    packed_sums: Tensor

    def __init__(self, task: str = "multiclass", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task = find_task(task)
        self._temperature = 1.0  # as of the last `compute`
        zeros = torch.zeros(len(TEMPERATURES), len(ScoreSums._fields), dtype=wide_dtype(self.device))
        self.add_state("packed_sums", default=zeros, dist_reduce_fx="sum")

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Add a batch."""
        check_scored(logits, targets, self.task)
        if self.task.look_like_probabilities(logits):
            rank_zero_warn("`logits` look like probabilities: take what comes before softmax or sigmoid.", stacklevel=5)
        # not in place: the state may belong to inference mode
        self.packed_sums = self.packed_sums + score_sums(logits, targets, self.task)

    def compute(self) -> Tensor:
        """Compute the score of all samples so far, over all processes; nan without any."""
        sums = ScoreSums(*self.packed_sums.T)
        num_non_finite = int(sums.num_non_finite[0])
        if num_non_finite > 0:
            rank_zero_warn(f"{num_non_finite} samples gave nan or inf, and were left out.", stacklevel=5)
        score, self._temperature = Refined.lowest(sums.scores)
        return self.packed_sums.new_tensor(score)

    @property
    def temperature(self) -> float:
        """The best temperature over all processes. Logits divided by it are calibrated.

        Like ``compute``, reading it is a collective operation unless a value is cached.
        """
        self.compute()  # this is cached, and sets the temperature
        return self._temperature
