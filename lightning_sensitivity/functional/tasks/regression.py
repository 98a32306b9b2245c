"""The task of predicting numbers."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.functional.tasks.base import TaskBase
from lightning_sensitivity.functional.tasks.checks import check_sizes, without_single_output


class Regression(TaskBase):
    """Outputs are measurements: no temperature, and the mean over columns of squared differences."""

    name = "regression"
    has_class_shares = False
    draws_errors = True
    may_be_scaled = True
    is_highest_best = False
    estimator_type = "regressor"
    estimator_method = "predict"
    needs_calibration = False

    def has_any_outputs(self, loss: object) -> bool:
        """Return whether there is a loss of a user, which may take quantiles or a distribution."""
        return loss is not None

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return outputs as a matrix."""
        return self.output_matrix(outputs)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and targets do not fit, or are no finite numbers."""
        check_sizes(outputs, targets, "target")
        if not bool(targets.isfinite().all()):
            raise ValueError("Expected finite targets, but got nan or inf. Leave such samples out")

    def doubt(self, labels: Tensor) -> str:
        """Say that integers are rather classes."""
        if labels.is_floating_point():
            return ""
        advice = "leave `task='regression'` out if they are classes, make them floating if not"
        return f"the targets of a regression are integers, {labels.dtype}: {advice}."

    def check_learnable(self, labels: Tensor) -> None:
        """Raise ValueError if all targets are equal."""
        if len(labels) > 1 and bool((labels == labels[0]).all()):
            raise ValueError(f"All targets in `y` are {labels[0].tolist()}: there is nothing to learn.")

    def known(self, targets: Tensor) -> Tensor:
        """Return which samples have a target: all."""
        return torch.ones(len(targets), 1, dtype=torch.bool, device=targets.device)

    def label_matrix(self, labels: Tensor, num_columns: int = -1) -> Tensor:
        """Turn targets ``(N,)`` or ``(N, D)`` into a matrix ``(N, D)``."""
        return self.output_matrix(labels)

    def distances(self, p: Tensor, other: Tensor) -> Tensor:
        """Score predictions by their squared differences from targets, or from other predictions."""
        return (p - other).square().mean(-1)

    def losses(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Compute the squared error of each sample, the mean over drawn targets ``(R, N, C)``, ``(N, 1)``."""
        return self.distances(self.output_matrix(outputs), draws).double().mean(0)[:, None]

    def worth(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Return the squared error of each sample, ``(N,)``."""
        return self.losses(outputs, y, draws)[:, 0]

    def outputs_of(self, p: Tensor, shape: Sequence[int]) -> Tensor | None:
        """Return predictions as outputs; None if outputs are something else, such as quantiles."""
        return p.reshape(len(p), *shape) if math.prod(shape) == p.shape[1] else None

    def hard_labels(self, p: Tensor) -> Tensor:
        """Return predictions or labels ``(N, C)``, which are numbers that may be drawn."""
        return p

    def draw(self, p: Tensor, errors: Tensor | None) -> Tensor:
        """Add errors ``(20, C)`` or ``(20, N, C)`` to predictions ``(N, C)``; without any there is one draw."""
        if errors is None:
            return p[None]
        return p + (errors[:, None] if errors.ndim == 2 else errors).to(p)

    def answers(self, p: Tensor, classes: Any) -> Any:
        """Return what a user wants to know of predictions ``(N, C)``: numbers, an array ``(N,)`` or ``(N, D)``."""
        return without_single_output(p).numpy()

    def default_metrics(self, num_columns: int) -> dict[str, Metric]:
        """Return nothing: the loss says it all."""
        return {}

    def metric_preds(self, p: Tensor) -> Tensor:
        """Return predictions as torchmetrics takes them: ``(N,)`` or ``(N, D)``."""
        return without_single_output(p)

    def metric_target(self, drawn: Tensor, preds: Tensor) -> Tensor:
        """Return targets that were drawn as torchmetrics takes them beside predictions."""
        return drawn.reshape(preds.shape).to(preds).contiguous()

    def can_measure(self, draws: Tensor) -> bool:
        """Return whether metrics say something: of numbers they do."""
        return True

    def classifications(self, p: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return no question that has a class as its answer."""
        return []

    def sharpened(self, p: Tensor, power: float) -> Tensor:
        """Return predictions as they are."""
        return p

    def certainties(self, p: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return nothing: numbers do not say how sure they are."""
        return p[:0, 0], p[:0, 0]

    def are_probabilities(self, outputs: Tensor) -> bool:
        """Return False: measurements may lie anywhere."""
        return False

    look_like_probabilities = may_be_probabilities = are_probabilities

    def tempered(self, outputs: Tensor, temperatures: Tensor) -> Tensor:
        """Return outputs for each temperature as they are, ``(T, N, C)``."""
        return outputs.expand(len(temperatures), *outputs.shape)
