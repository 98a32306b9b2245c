"""The task of several questions, each of which is answered by yes or no, or not at all."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, softplus
from torchmetrics import Metric

from lightning_sensitivity.functional.tasks.base import IGNORED, TaskBase, check_probabilities, quantiles


class Multilabel(TaskBase):
    """Each of L labels is yes or no, or unknown: a sigmoid, and the mean over known labels of (p - y)^2."""

    name = "multilabel"
    link = "sigmoid"
    has_class_shares = False
    is_by_column = True
    most_of_auroc = 200  # of 1,000, and 2,000 validation labels, it would take seconds in each validation

    def predictions(self, outputs: Tensor) -> Tensor:
        """Turn outputs of a network into probabilities of yes, ``(N, L)``."""
        return self.output_matrix(outputs).sigmoid()

    def check(self, outputs: Tensor, targets: Tensor) -> None:
        """Raise ValueError if outputs and labels do not fit the task."""
        check_probabilities(outputs, targets.nan_to_num(float(IGNORED)))

    def label_matrix(self, labels: Tensor, num_columns: int = -1) -> Tensor:
        """Turn labels into a matrix ``(N, L)``, nan where they are unknown; a matrix stays."""
        y = labels if labels.is_floating_point() else labels.float()
        return y[:, None].flatten(1).where(self.known(labels), torch.nan)

    def losses(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Compute the binary cross-entropy of each label, ``(N, L)``, exact in its probability; nan if unknown."""
        z = self.output_matrix(outputs)
        return binary_cross_entropy_with_logits(z, y.to(z), reduction="none")

    def losses_of_draws(self, outputs: Tensor, y: Tensor, draws: Tensor) -> Tensor:
        """Compute the same for each of several labels, ``(R, N, L)``."""
        z = self.output_matrix(outputs)
        return (softplus(z) - draws.to(z) * z).where(~y.isnan(), torch.nan)

    # Labels as they are drawn

    def hard_labels(self, p: Tensor) -> Tensor:
        """Return yes and no as 1 and 0, ``(N, L)``, and nan where a label is unknown."""
        return (p > 0.5).to(p).where(~p.isnan(), torch.nan)

    def draw(self, p: Tensor, errors: Tensor | None) -> Tensor:
        """Draw each label by its probability, ``(20, N, L)``; those of a sample are independent."""
        p, generator = p.double().cpu(), torch.Generator().manual_seed(0)
        samples, at = torch.arange(len(p)), quantiles(len(p))
        drawn = []
        for label, column in enumerate(p.T, start=1):
            # Each label takes the same quantiles in an order of its own, which begins elsewhere in each sample.
            order = torch.randperm(len(at), generator=generator)
            places = order[(torch.arange(len(at))[:, None] + label * samples) % len(at)]
            drawn.append(at.gather(0, places) < column)
        return torch.stack(drawn, 2).to(torch.int8)  # of which there may be many

    def answers(self, p: Tensor, classes: Any) -> Any:
        """Return what a user wants to know of predictions ``(N, L)``: 1 for yes and 0 for no, an array."""
        return (p > 0.5).long().numpy()

    # Metrics

    def metric_inputs(self, metric: Metric, p: Tensor, drawn: Tensor) -> tuple[Tensor, Tensor]:
        """Return predictions and labels as a metric takes them, which ignores labels that are unknown."""
        if getattr(metric, "ignore_index", 0) is None:
            metric.ignore_index = IGNORED
        return p, drawn.nan_to_num(getattr(metric, "ignore_index", IGNORED)).long()

    def can_measure(self, draws: Tensor) -> bool:
        """Return whether some label ``(R, N, L)`` is both yes and no, so that metrics say something."""
        return bool(((draws == 1).flatten(0, 1).any(0) & (draws == 0).flatten(0, 1).any(0)).any())

    def questions(self, p: Tensor) -> list[Tensor]:
        """Return the probabilities of no and yes of each label, ``(N, 2)``."""
        return [torch.stack([1 - column, column], 1) for column in p.T]

    def of_questions(self, of_each: Sequence[Tensor]) -> Tensor:
        """Return the matrix of such probabilities, ``(N, L)``."""
        return torch.stack([each[:, 1] for each in of_each], 1)
