"""Output sensitivity and the risk estimate as torchmetrics; they need neither a Trainer nor a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat
from torchmetrics.utilities.prints import rank_zero_only

from lightning_sensitivity import compat
from lightning_sensitivity.functional import risk, sensitivity
from lightning_sensitivity.functional.reporting import warn
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import wide_dtype

if TYPE_CHECKING:
    from lightning_sensitivity.compat import AxType, PlotType

_NUM_SUMS = {
    "holdout": len(risk.HoldoutSums._fields),
    "training": len(risk.LabelSums._fields),
    "forgetting": len(risk.ForgettingSums._fields),
    "labels": len(risk.LabelSums._fields),
}


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

    As output of ``forward`` and ``compute`` the metric returns a scalar tensor, in squared units of the outputs. It has
    no better direction: it compares epochs and seeds of one network, and is lowest before training.

    Args:
        per_output: Compute the mean squared change of the single outputs instead, without averaging over classes first,
            so it also makes sense for probabilities and two-class heads.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``per_output`` is not a bool; in ``update``, if shapes do not fit; in ``compute``, if K
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
    higher_is_better: bool | None = None
    full_state_update: bool = False
    plot_lower_bound: float = 0.0

    _warn = staticmethod(rank_zero_only(warn))
    rows: list[Tensor] | Tensor  # one tensor while it is synchronized

    def __init__(self, per_output: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not isinstance(per_output, bool):
            raise ValueError(f"Expected argument `per_output` to be a bool, but got {per_output!r}.")
        self.per_output = per_output
        self._all_rows: Tensor | None = None  # over all processes, as of the last `compute`
        self._estimate: sensitivity.SensitivityEstimate | None = None  # from those
        self.add_state("rows", default=[], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all samples."""
        super().reset()
        # A process without samples takes part in gathering rows, too, with the same type.
        empty = torch.zeros(0, sensitivity.NUM_COLUMNS, dtype=wide_dtype(self.device), device=self.device)
        self.rows = [empty]

    def update(self, clean: Tensor, noisy: Tensor | Iterable[Tensor]) -> None:
        """Add the outputs of one batch of samples, for clean and for perturbed inputs."""
        self.add_rows(sensitivity.sensitivity_rows(clean, noisy))

    def add_rows(self, rows: Tensor) -> None:
        """Add samples by their rows, from :func:`~lightning_sensitivity.functional.sensitivity.sensitivity_rows`."""
        assert isinstance(self.rows, list)
        self.rows.append(rows)

    def compute(self) -> Tensor:
        """Compute the sensitivity of all samples so far, over all processes."""
        self._all_rows = dim_zero_cat(self.rows)
        self._estimate = sensitivity.sensitivity_from_rows(self._all_rows)
        for message in sensitivity.diagnostics(self._estimate, self.per_output).values():
            self._warn(message)
        return self._estimate.mean_square if self.per_output else self._estimate.sensitivity

    @property
    def estimate(self) -> sensitivity.SensitivityEstimate:
        """Value, standard errors, share of the class mean and numbers of samples, over all processes.

        Like ``compute``, it is a collective operation unless a value is cached; so are :attr:`stderr` and
        :attr:`per_sample`.
        """
        self.compute()  # cached, and leaves the estimate behind
        assert self._estimate is not None
        return self._estimate

    @property
    def stderr(self) -> Tensor:
        """Standard error of the value, over samples and noise; nan below two samples."""
        return self.estimate.mean_square_stderr if self.per_output else self.estimate.stderr

    @property
    def per_sample(self) -> Tensor:
        """Mean squared change of each sample, ``(N,)``, in the order of the updates; nan for samples with nan or inf.

        If all samples have the same number of positions, its mean is the value. A large one does not mean a wrong
        prediction.
        """
        self.compute()
        rows = self._all_rows
        assert rows is not None
        if self.per_output:
            sums = rows[:, 3].where(rows.isfinite().all(1), math.nan)
        else:
            sums = sensitivity.squared_deviations(rows)
        return sums / rows[:, 0]

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another instance into this one; see :meth:`torchmetrics.Metric.merge_state`."""
        super().merge_state(incoming_state)
        compat.forget_computed(self)  # else the value from before the merge would stay
        compat.mark_updated(self)

    def _apply(self, *args: Any, **kwargs: Any) -> OutputSensitivity:
        """Move the rows with the metric, but keep their precision if the model is cast to 16 bits."""
        rows = self.rows
        self.rows = []
        super()._apply(*args, **kwargs)
        self.rows = _to_wide(rows, self.device)
        return self

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: AxType | None = None) -> PlotType:
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
    r"""Estimate the Brier score on unseen samples from training labels and unlabelled samples.

    The formula is that of :func:`~lightning_sensitivity.functional.risk_estimate`. The states are sums in double
    precision, to which every process adds.

    As input to ``update`` the metric accepts ``outputs`` and ``twin_outputs``, logits ``(N, K, ...)`` or ``(N,)`` for
    unseen samples, from the model and from a twin. Training samples come by :meth:`update_training`, labelled
    validation samples, if there are some, by :meth:`update_labels`.

    As output of ``compute`` the metric returns a dict of scalar tensors: ``risk_estimate`` and its terms
    ``risk_claim``, ``risk_overconfidence``, ``risk_memorization``, ``risk_forgetting``, ``risk_variance``; with
    labelled validation samples also ``risk_label_score`` and ``risk_num_labels``. Without training or unseen samples
    they are nan.

    Args:
        task: ``"multiclass"``, ``"binary"`` or ``"multilabel"``.
        strength: λ of the simulated twins; None for real ones.
        num_training: n, the number of training samples; with ``num_weights`` it scales the variance of simulated
            twins, see :func:`~lightning_sensitivity.functional.variance_factor`.
        num_weights: w, the number of weights that are trained.
        kwargs: Additional keyword arguments of :class:`torchmetrics.Metric`.

    Attributes:
        messages: What makes the last computed value doubtful, one sentence for each problem.

    Raises:
        ValueError: If an argument is not one of the above; if labels do not fit the task.

    Example:
        >>> import torch
        >>> from lightning_sensitivity import RiskEstimate
        >>> metric = RiskEstimate("multiclass")
        >>> metric.update(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]]))
        >>> metric.update_training(torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1]))
        >>> metric.compute()["risk_estimate"]
        tensor(0.3832, dtype=torch.float64)
    """

    is_differentiable: bool = False
    higher_is_better: bool = False
    full_state_update: bool = False
    plot_lower_bound: float = 0.0

    holdout_sums: Tensor
    training_sums: Tensor  # `training` is the mode of a module
    forgetting_sums: Tensor
    labels_sums: Tensor

    def __init__(
        self,
        task: str = "multiclass",
        *,
        strength: float | None = None,
        num_training: int | None = None,
        num_weights: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if task not in TASKS:
            raise ValueError(f"Expected `task` to be one of {', '.join(map(repr, TASKS))}, but got {task!r}.")
        if strength is not None and not strength > 0:
            raise ValueError(f"Expected `strength` to be above 0, or None for real twins, but got {strength}.")
        self.task = TASKS[task]
        self.strength = strength
        self.messages: dict[str, str] = {}  # what makes the last computed value doubtful
        self.set_size(num_training, num_weights)
        for kind, size in _NUM_SUMS.items():
            default = torch.zeros(size, dtype=wide_dtype(self.device))
            self.add_state(f"{kind}_sums", default=default, dist_reduce_fx="sum")

    def set_size(self, num_training: int | None, num_weights: int | None) -> None:
        """Set the numbers of training samples and weights, which may be known only later.

        Args:
            num_training: n; None for no scaling.
            num_weights: w; None for no scaling.
        """
        self._factor = 1.0
        if num_training is not None and num_weights is not None:
            self._factor = risk.variance_factor(num_training, num_weights)
        compat.forget_computed(self)

    def update(self, outputs: Tensor, twin_outputs: Tensor) -> None:
        """Add a batch of unseen samples."""
        _check_same_shape(outputs, twin_outputs)
        self.add_sums("holdout", risk.holdout_sums(outputs, twin_outputs, self.task))

    def update_training(self, outputs: Tensor, targets: Tensor, twin_outputs: Tensor | None = None) -> None:
        """Add a batch of training samples, in eval mode.

        Args:
            outputs: Outputs of the model, ``(N, K, ...)`` or ``(N,)``.
            targets: Their labels; those of -100 are ignored.
            twin_outputs: Outputs of a simulated twin; None for no forgetting.
        """
        if twin_outputs is not None:
            _check_same_shape(outputs, twin_outputs)
        self.task.check(outputs, targets)
        self.add_sums("training", risk.label_sums(outputs, targets, self.task))
        if twin_outputs is not None:
            self.add_sums("forgetting", risk.forgetting_sums(outputs, twin_outputs, targets, self.task))

    def update_labels(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch of validation samples with labels, as in :meth:`update_training`."""
        self.task.check(outputs, targets)
        self.add_sums("labels", risk.label_sums(outputs, targets, self.task))

    def add_sums(self, kind: str, sums: Tensor) -> None:
        """Add sums from :mod:`lightning_sensitivity.functional.risk` to one of the states."""
        state = f"{kind}_sums"
        setattr(self, state, getattr(self, state) + sums)  # not in place: it may belong to inference mode
        compat.forget_computed(self)
        compat.mark_updated(self)

    def compute(self) -> dict[str, Tensor]:
        """Compute the estimate and its terms over all processes; nan without samples."""
        holdout, training = risk.HoldoutSums(*self.holdout_sums), risk.LabelSums(*self.training_sums)
        forgetting, labels = risk.ForgettingSums(*self.forgetting_sums), risk.LabelSums(*self.labels_sums)
        terms = risk.risk_terms(holdout, training, forgetting, self.strength, self._factor)
        self.messages = risk.diagnostics(holdout, training, terms.estimate, self.task)
        values = {f"risk_{name}": term for name, term in terms._asdict().items()}
        if labels.num_scored > 0:
            values["risk_estimate"] = risk.combine_with_labels(terms.estimate, labels)
            values["risk_label_score"] = labels.score / labels.num_scored
            values["risk_num_labels"] = labels.num_scored
        return values

    def merge_state(self, incoming_state: dict[str, Any] | Metric) -> None:
        """Merge the state of another instance into this one; see :meth:`torchmetrics.Metric.merge_state`."""
        super().merge_state(incoming_state)
        compat.forget_computed(self)
        compat.mark_updated(self)

    def _apply(self, *args: Any, **kwargs: Any) -> RiskEstimate:
        """Move the sums with the metric, but keep their precision if the model is cast to 16 bits."""
        states = {f"{kind}_sums": getattr(self, f"{kind}_sums") for kind in _NUM_SUMS}
        for name in states:
            setattr(self, name, torch.zeros(0))
        super()._apply(*args, **kwargs)
        for name, value in states.items():
            setattr(self, name, value.to(self.device, wide_dtype(self.device)))
        return self

    def plot(
        self, val: Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None = None, ax: AxType | None = None
    ) -> PlotType:
        """Plot the estimate, for one result or for a list of them, such as one per epoch.

        Args:
            val: A result of ``metric.compute`` or a list of them. If no value is provided, will automatically call
                ``metric.compute`` and plot that result.
            ax: A matplotlib axis object. If provided will add the plot to that axis.

        Returns:
            Figure and axes object.

        Raises:
            ModuleNotFoundError: If ``matplotlib`` is not installed.

        Example:
            >>> import torch
            >>> from lightning_sensitivity import RiskEstimate
            >>> metric = RiskEstimate("multiclass")
            >>> metric.update(torch.randn(8, 3), torch.randn(8, 3))
            >>> metric.update_training(torch.randn(8, 3), torch.randint(3, (8,)))
            >>> figure, axes = metric.plot()
        """
        results = self.compute() if val is None else val
        if isinstance(results, Mapping):
            return self._plot(results["risk_estimate"], ax)
        return self._plot([result["risk_estimate"] for result in results], ax)


class LazyValue(Metric):
    """Hold one value of one loader, which Lightning reads when all processes are done with the loader.

    Lightning gives ``Trainer.validate`` the column of a loader when it moves on to the next one. A number would have to
    be reduced and logged in a batch hook before that. A process with fewer batches reaches that hook at another time or
    never, so its collectives would be paired with the wrong ones. A Metric is read at the same time in all processes.

    If there is no value, the last one is kept; nan is logged if there never was one.

    Args:
        read: Function that returns the value, or None.
    """

    def __init__(self, read: Callable[[], Tensor | None]) -> None:
        super().__init__(sync_on_compute=False, compute_with_cache=False)
        self._read = read
        self._has_value = False
        self.reset()

    def reset(self) -> None:
        """Prepare for the next epoch."""
        super().reset()
        compat.mark_updated(self)  # the state that is read lives elsewhere

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> Tensor | None:
        """Read the value."""
        value = self._read()
        if value is None and not self._has_value:
            return torch.tensor(math.nan)
        self._has_value = True
        return value


def _check_same_shape(outputs: Tensor, twin_outputs: Tensor) -> None:
    if twin_outputs.shape != outputs.shape:
        got = tuple(twin_outputs.shape)
        raise ValueError(f"Expected `twin_outputs` to have the shape {tuple(outputs.shape)}, but got {got}.")


def _to_wide(rows: list[Tensor] | Tensor, device: torch.device) -> list[Tensor] | Tensor:
    dtype = wide_dtype(device)
    if isinstance(rows, Tensor):
        return rows.to(device, dtype)
    return [each.to(device, dtype) for each in rows]
