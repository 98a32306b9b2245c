"""Output sensitivity and the risk estimate as torchmetrics; they need neither a Trainer nor a model."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.plot import _AX_TYPE, _PLOT_OUT_TYPE
from torchmetrics.utilities.prints import rank_zero_only

from lightning_sensitivity.functional import risk as R
from lightning_sensitivity.functional import sensitivity as S
from lightning_sensitivity.functional.tasks import warn, wide_dtype


class OutputSensitivity(Metric):
    r"""Compute output sensitivity: the variance of the class-averaged output change under input noise.

    .. math::
        S = \operatorname{Var}\Big(\frac{1}{K} \sum_{k=1}^{K} \big[f_k(x + \varepsilon) - f_k(x)\big]\Big)

    The variance is that of the population (ddof 0) over all samples and noise draws (Forouzesh, Salehi and Thiran,
    ICPR 2020, arXiv:2007.15378). It needs no labels. The state is one row of five numbers per sample, so that the value
    depends on neither the batch size nor the number of processes. Samples with nan or inf are left out, with a warning.

    As input to ``forward`` and ``update`` the metric accepts the following input:

    - ``clean`` (:class:`~torch.Tensor`): outputs f(x), before the softmax (logits), as a float tensor of shape
      ``(N, K, ...)``. Dimensions after K (pixels, tokens) are further changes of a sample; ``(N,)`` is K = 1.
    - ``noisy`` (:class:`~torch.Tensor` or an iterable of them): outputs f(x + ε) of the same shape; for several noise
      draws of the same samples, an iterable with one tensor per draw.

    As output of ``forward`` and ``compute`` the metric returns a scalar tensor, in squared units of the outputs.

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
        >>> metric.per_sample.shape
        torch.Size([500])
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    plot_lower_bound: float = 0.0

    _warn = staticmethod(rank_zero_only(warn))
    rows: list[Tensor]
    _all_rows: Tensor  # over all processes, as of the last `compute`
    _estimate: S.SensitivityEstimate  # from those

    def __init__(self, per_output: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(per_output, bool):
            raise ValueError(f"Expected argument `per_output` to be a bool, but got {per_output!r}.")
        self.per_output = per_output
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process without samples has rows to gather, too, of the type that the others have.
        self.rows.append(torch.zeros(0, S.NUM_COLUMNS, dtype=wide_dtype(self.device), device=self.device))

    def update(self, clean: Tensor, noisy: Tensor | Iterable[Tensor]) -> None:
        """Add the outputs of one batch of samples, for clean and for perturbed inputs."""
        self.rows.append(S.sensitivity_rows(clean, noisy))

    def compute(self) -> Tensor:
        """Compute the sensitivity of all samples so far, over all processes."""
        self._all_rows = dim_zero_cat(self.rows)
        self._estimate = S.sensitivity_from_rows(self._all_rows)
        for message in S.diagnostics(self._estimate, self.per_output).values():
            self._warn(message)
        return self._estimate.mean_square if self.per_output else self._estimate.sensitivity

    @property
    def estimate(self) -> S.SensitivityEstimate:
        """The estimate over all processes: value, standard errors, share of the class mean, numbers of samples."""
        self.compute()  # cached, and leaves the estimate behind
        return self._estimate

    @property
    def stderr(self) -> Tensor:
        """Standard error of the value, over samples and noise; nan below two samples."""
        return self.estimate.mean_square_stderr if self.per_output else self.estimate.stderr

    @property
    def per_sample(self) -> Tensor:
        """Mean squared change of each sample, ``(N,)``, in the order of the updates; nan for samples with nan or inf.

        Where all samples have as many positions, its mean is the value. A large one is no sign of a wrong prediction.
        """
        self.compute()
        rows = self._all_rows
        sums = rows[:, 3].where(rows.isfinite().all(1), math.nan) if self.per_output else S.squared_deviations(rows)
        return sums / rows[:, 0]

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another instance into this one; see :meth:`torchmetrics.Metric.merge_state`."""
        super().merge_state(incoming_state)
        self._computed = None  # torchmetrics would keep giving the value from before the merge
        self._update_count = max(1, self._update_count)  # or `compute` would warn that there are no samples

    def _apply(self, *args: Any, **kwargs: Any) -> "OutputSensitivity":
        """Move the rows with the metric, but keep their precision if the model is cast to 16 bits."""
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


class RiskEstimate(Metric):
    """Sum up what the risk estimate needs: claims and variance on unseen samples, scores on training samples.

    The formula is that of :func:`~lightning_sensitivity.functional.risk_estimate`; its states are sums, which every
    process adds to.

    Args:
        task: One of :data:`~lightning_sensitivity.functional.tasks.TASKS`.
        strength: λ of the simulated twins; None for real ones.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Attributes:
        factor: Factor of the variance, from :func:`~lightning_sensitivity.functional.variance_factor`.
        totals: Sums over all processes, as of the last ``compute``.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.metric import RiskEstimate
        >>> metric = RiskEstimate("multiclass")
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> metric.update_training(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
        >>> metric.compute().estimate
        tensor(0.3832, dtype=torch.float64)
    """

    full_state_update: bool = False
    update_called = True  # a process without a batch takes part in the others' sums, without a warning

    holdout_sums: Tensor
    training_sums: Tensor

    def __init__(self, task: str, strength: float | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.task, self.strength, self.factor = task, strength, 1.0
        for name, size in (("holdout_sums", R.NUM_HOLDOUT_SUMS), ("training_sums", R.NUM_TRAINING_SUMS)):
            self.add_state(name, default=torch.zeros(size, dtype=wide_dtype(self.device)), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, twin_outputs: Tensor, reference: Tensor | None = None, weight: float = 1) -> None:
        """Add a batch of unseen samples; see :func:`~lightning_sensitivity.functional.risk.holdout_sums`.

        Args:
            outputs: Outputs of the model, ``(N, K, ...)`` or ``(N,)``.
            twin_outputs: Outputs of a twin.
            reference: Outputs to compare with the twin's, if others.
            weight: Weight of each sample, such as 1/2 if each comes with two twins.
        """
        self.holdout_sums = self.holdout_sums + weight * R.holdout_sums(outputs, twin_outputs, self.task, reference)

    def update_training(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of training samples, outputs ``(N, K, ...)`` or ``(N,)`` and their labels."""
        self.training_sums = self.training_sums + R.training_sums(outputs, targets, self.task)
        self._computed = None

    def compute(self) -> R.RiskTerms:
        """Compute the estimate and its terms over all processes; nan without samples."""
        self.totals = self.holdout_sums, self.training_sums
        return R.risk_terms(*self.totals, self.strength, self.factor)


class LazyValue(Metric):
    """Hold one value of one loader, which Lightning reads when the loader is done.

    A value that is logged as a number at the epoch's end shows the last loader's in every column of
    ``Trainer.validate``. Where there is no value, the last one stays; nan is logged, if there never was one.

    Args:
        values: Function that returns the values of the loader by name.
        name: Name of the value.
    """

    update_called = True  # the state that is read lives elsewhere

    def __init__(self, values: Callable[[], Mapping[str, Tensor]], name: str) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self._values, self._name, self._has_value = values, name, False

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> Tensor | None:
        """Read the value."""
        value = self._values().get(self._name)
        if value is None:
            return None if self._has_value else torch.tensor(math.nan)
        self._has_value = True
        return value
