"""The task of predicting numbers."""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_sensitivity.functional.tasks.base import TaskBase, check_sizes, without_single_output
from lightning_sensitivity.functional.tasks.metrics import AnyMetric


class Regression(TaskBase):
    """Outputs are measurements: no temperature, and the mean over columns of squared differences."""

    name = "regression"
    is_regression = True
    link = "identity"
    has_class_shares = False
    estimator_method = "predict"

    def predictions(self, outputs: Tensor) -> Tensor:
        """Return outputs as a matrix."""
        return self.output_matrix(outputs)

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and targets do not fit, or are infinite; nan is unknown."""
        check_sizes(outputs, targets, "target")
        if bool(targets.isinf().any()):
            raise ValueError("Expected finite targets, or nan where they are unknown, but got inf. Set it to nan")

    def doubt(self, labels: Tensor) -> str:
        """Say that integers are rather classes."""
        if labels.is_floating_point():
            return ""
        advice = "leave `task='regression'` out if they are classes, make them floating if not"
        return f"the targets of a regression are integers, {labels.dtype}: {advice}."

    def check_learnable(self, labels: Tensor) -> None:
        """Raise ValueError if all targets are equal, or a column has none."""
        y = self.label_matrix(labels)
        if bool((is_unknown := ~self.known(labels).any(0)).any()):
            raise ValueError(f"No target of column {int(is_unknown.nonzero()[0, 0])} is known: leave it out.")
        lowest, highest = y.nan_to_num(math.inf).amin(0), y.nan_to_num(-math.inf).amax(0)
        if len(y) > 1 and torch.equal(lowest, highest):
            raise ValueError(f"All targets in `y` are {lowest.squeeze().tolist()}: there is nothing to learn.")

    def known(self, targets: Tensor) -> Tensor:
        """Return which targets are known, ``(N, D)``."""
        return ~targets.isnan()[:, None].flatten(1)

    def label_matrix(self, labels: Tensor, num_columns: int = -1) -> Tensor:
        """Turn targets ``(N,)`` or ``(N, D)`` into a matrix ``(N, D)``, nan where they are unknown."""
        return self.output_matrix(labels)

    def losses(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Compute squared errors, the mean over drawn targets ``(R, N, C)``, ``(N, C)``; nan of what is unknown."""
        return self.losses_of_draws(outputs, y, draws).mean(0)

    def losses_of_draws(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Compute the same for each of several targets, ``(R, N, C)``."""
        return (self.output_matrix(outputs) - draws.where(~y.isnan(), torch.nan)).square().double()

    def hard_labels(self, p: Tensor) -> Tensor:
        """Return predictions or labels ``(N, C)``, which are numbers that may be drawn."""
        return p

    def draw(self, p: Tensor, errors: Tensor | None) -> Tensor:
        """Add errors ``(20, C)`` to predictions ``(N, C)``; without any there is one draw."""
        return p[None] if errors is None else p + errors[:, None].to(p)

    def answers(self, p: Tensor, classes: Any) -> Any:
        """Return what a user wants to know of predictions ``(N, C)``: numbers, an array ``(N,)`` or ``(N, D)``."""
        return without_single_output(p).numpy()

    def default_metrics(self, num_columns: int) -> dict[str, AnyMetric]:
        """Return nothing: the loss says it all."""
        return {}

    def metric_inputs(self, metric: Metric, p: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and targets as torchmetrics takes them, ``(N,)`` or ``(N, D)``, of whole samples."""
        is_whole = ~drawn.isnan().flatten(1).any(1)
        preds = without_single_output(p[is_whole])
        return preds, drawn[is_whole].reshape(preds.shape).to(preds).contiguous()

    def can_measure(self, draws: Tensor) -> bool:
        """Return whether metrics say something: of numbers they do."""
        return True

    def questions(self, p: Tensor) -> list[Tensor]:
        """Return no question: there are no classes."""
        return []
