"""What the callback logs: the statistics of one loader in one epoch, and one Metric per logged name to read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_sensitivity.arguments import AnyPerturbation
from lightning_sensitivity.dtypes import rounding_variance
from lightning_sensitivity.extremes import NEG_MAX_CHANGE, num_outputs_seen
from lightning_sensitivity.functional import loss_estimate
from lightning_sensitivity.metric import OutputSensitivity
from lightning_sensitivity.risk import NUM_ROWS, RiskEstimate, has_training, risk_terms

SENSITIVITY, STDERR, LOG10, LOSS_ESTIMATE = (
    "sensitivity",
    "sensitivity_stderr",
    "sensitivity_log10",
    "loss_estimate",
)
RISK = {field: f"risk_{'estimate' if field == 'risk' else field}" for field in RiskEstimate._fields}
SITE_NAMES = (SENSITIVITY, STDERR, LOG10, LOSS_ESTIMATE)  # of each place where noise is added
NAMES = (*SITE_NAMES, *RISK.values())

# Elements that are summed up at once, so that a sum takes little memory, and what is summed is in the cache.
_PIECE = 2**16

# One standard error of S at about 1,000 samples.
_MOST_ROUNDING = 0.05


def gather_widest(state: Tensor, group: Any = None) -> list[Tensor]:
    """Gather a state over processes, of which those without a batch do not know its width, the number of outputs.

    Args:
        state: The state of this process.
        group: The process group, or None for all processes.

    Returns:
        The state of each process; empty ones are widened with zeros, which leaves them empty.
    """
    states: list[Tensor] = gather_all_tensors(state, group)
    width = max(state.shape[-1] for state in states)
    return [pad(state, (0, width - state.shape[-1])) for state in states]


class LoaderStatistics(OutputSensitivity):
    """Output sensitivity, and the input power that the loss estimate needs, over one loader in one epoch.

    Args:
        name: What an error message calls the loader.
        task: That of the risk estimate, or None for no estimate.
        names: What is logged, among :data:`NAMES`.
        suffix: Put behind the names of sensitivity and what belongs to it.
        is_rounded: Whether rounding of inputs and outputs adds to the sensitivity.
        kwargs: As for :class:`~lightning_sensitivity.OutputSensitivity`.
    """

    power: Tensor
    risk: Tensor

    def __init__(
        self,
        name: str,
        task: str | None,
        names: Sequence[str] = NAMES,
        suffix: str = "",
        is_rounded: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(dist_sync_fn=gather_widest, **kwargs)
        self.name = name
        self.task = task
        self.names = names
        self.suffix = suffix
        self.is_rounded = is_rounded
        self.has_log_probabilities = False
        self._has_risk = False
        self.warnings: dict[str, str] = {}  # of the last `compute`, about the sensitivity, by what is wrong
        self.add_state("power", default=torch.zeros(3, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("risk", default=torch.zeros(NUM_ROWS, 1, dtype=torch.float64), dist_reduce_fx="sum")

    @property
    def update_called(self) -> bool:
        """True, since a process that got no batch must still take part in the others' reduction, without a warning."""
        return True

    @property
    def has_own_batches(self) -> bool:
        """Whether this process has seen a batch."""
        return self.update_count > 0

    def add_inputs(self, x: Tensor, perturbation: AnyPerturbation) -> None:
        """Add the power of clean inputs, in units of the perturbation's second moment: the C of Equation 9."""
        second_moment = getattr(perturbation, "second_moment", lambda x: None)(x)
        if second_moment is not None:
            is_number = not isinstance(second_moment, Tensor)
            scaled = x.detach() if is_number else x.detach() / second_moment.sqrt()
            # In pieces of the batch, since a sum in a wider type takes a copy in it.
            pieces = scaled.split(max(1, _PIECE * len(scaled) // max(1, scaled.numel()))) if scaled.ndim else [scaled]
            norms = [torch.linalg.vector_norm(piece, dtype=self.power.dtype) for piece in pieces]
            power = torch.stack(norms).square().sum()
            power = power / second_moment if is_number else power
            # Both x and x' are rounded on the way into the model.
            rounding = 2 * rounding_variance(x) * power
            self.power = self.power + torch.stack([power, rounding, torch.full_like(power, scaled.numel())])

    def add_risk(self, sums: Tensor) -> None:
        """Add what the risk estimate needs of a holdout batch, or of the training samples.

        Args:
            sums: What :func:`~lightning_sensitivity.risk.holdout_sums` or ``training_sums`` gives.

        Raises:
            ValueError: If numbers of outputs differ.
        """
        if self._has_risk and self.risk.shape != sums.shape:
            raise ValueError(
                "Expected as many outputs on training samples as on the holdout, but got"
                f" {self.risk.shape[1]} and {sums.shape[1]}."
            )
        self._has_risk = True
        self.risk = self.risk.to(sums) + sums

    def compute(self) -> dict[str, Tensor]:  # type: ignore[override]
        """Every number that has a meaning; the others are left out.

        Raises:
            ValueError: If outputs were nan or inf (``nan_strategy="error"``) or probabilities, or K changed.
        """
        self.warnings = {}
        try:
            super().compute()
        except ValueError as error:
            raise ValueError(f"`SensitivityMonitor`, {self.name}: {error}") from None
        assert self._estimate is not None
        sensitivity, stderr, _, num_changes, _ = self._estimate
        if num_changes < 2 or not bool(sensitivity.isfinite()):
            return {}
        values = {SENSITIVITY: sensitivity, STDERR: stderr, LOG10: sensitivity.log10()}
        num_outputs = num_outputs_seen(self.extremes)
        power, rounding, num_inputs = self.power.tolist()  # the first two in units of the noise's variance
        if not self.per_output and num_outputs > 1 and num_inputs > 0:
            values[LOSS_ESTIMATE] = loss_estimate(sensitivity, power / num_inputs, 1.0, num_outputs)
        if rounding > _MOST_ROUNDING * num_inputs:
            share = rounding / num_inputs
            size = f"about {share:.0%} of the noise's variance" if share < 1 else "more than the noise itself"
            self._warn(
                "input rounding",
                f"What is perturbed is rounded, by {size}: the model gets other noise than was asked for. Use a larger"
                " σ, or a wider type of inputs and `precision`.",
            )
        if self.extremes[NEG_MAX_CHANGE] == 0 and not self.warnings:  # rounding may have swallowed the change
            self.warnings["no change"] = (
                "no output changed under the perturbation: what is perturbed reaches none of the outputs (see `inputs=`"
                " and `at=`), or the weights behind it are 0."
            )
        if self.has_log_probabilities:
            self.warnings["log-probabilities"] = (
                "the outputs are log-probabilities, whose class average also changes by what the softmax has"
                " subtracted: this is not the sensitivity of the logits. Return or choose (`outputs=`) the logits, or"
                " use `per_output=True`."
            )
        if self.task is not None:
            terms = risk_terms(self.risk, self.task)
            self._check_risk(terms)
            values |= {RISK[term]: value for term, value in terms._asdict().items()}
        return {name: value for name, value in values.items() if bool(value.isfinite())}

    def _check_risk(self, terms: RiskEstimate) -> None:
        name = f"`SensitivityMonitor`, {self.name}"
        if not bool(has_training(self.risk)):
            rank_zero_warn(f"{name}: no label of the training samples counts, so there is no risk estimate.")
        elif not bool(terms.training.isfinite()):
            self._report_non_finite(f"{name}: outputs for training samples had nan or inf.")
        elif not bool(terms.variance.isfinite()):
            rank_zero_warn(
                f"{name}: with perturbed weights the model failed, or gave nan or inf, so there is no risk estimate in"
                " this epoch. Has it parameters that must keep their sign?"
            )

    @property
    def num_changes(self) -> Tensor:
        """Number of output changes, over all processes."""
        return self._computed_estimate().num_changes

    def readings(self) -> dict[str, Reading]:
        """One Metric per logged name."""
        return {self.full_name(name): Reading(partial(self._read, name)) for name in self.names}

    def named_values(self) -> dict[str, Tensor]:
        """Every number that has a meaning, by the name that it is logged under."""
        return {self.full_name(name): value for name, value in self.compute().items()}

    def full_name(self, name: str) -> str:
        """What a number is logged under, behind the prefix."""
        return name if name in RISK.values() else name + self.suffix

    def _read(self, name: str) -> Tensor | None:
        return self.compute().get(name)

    def _report_rounding(self, warning: str) -> None:
        self._warn("rounding", warning)

    def _warn(self, kind: str, warning: str) -> None:
        if self.is_rounded:
            self.warnings[kind] = warning


class Reading(Metric):
    """A stateless Metric that gives one number of a :class:`LoaderStatistics`.

    Lightning logs a Metric as one number, under the name of its loader, and asks for the number when the loader is
    done. All readings of a loader share one reduction over the processes. One that gives None is not logged: a nan
    in its place would stop an ``EarlyStopping``.

    Args:
        read: Gives the number, or None.
    """

    full_state_update = False

    def __init__(self, read: Callable[[], Tensor | None]) -> None:
        super().__init__(sync_on_compute=False)
        self._read = read

    @property
    def update_called(self) -> bool:
        """True, since the state that is read lives elsewhere."""
        return True

    def update(self) -> None:
        """Do nothing."""

    def compute(self) -> Tensor | None:
        """Read the number."""
        return self._read()
