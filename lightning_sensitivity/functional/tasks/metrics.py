"""Metrics that torchmetrics does not have as they are needed."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAUROC
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.utilities import dim_zero_cat


class MeanAUROC(MulticlassAUROC):
    """The mean of the AUROC of each class (``average="none"``) that occurs; others would count as 0."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """Compute it."""
        return super().compute()[torch.unique(dim_zero_cat(self.target))].mean()


class OfKnownLabels:
    """What marks a metric that leaves out labels of which none is known, where torchmetrics counts 0 for them."""


class KnownAccuracy(OfKnownLabels, BinaryAccuracy):
    """The share of known labels ``(N, L)`` that are right."""


class KnownAUROC(OfKnownLabels, Metric):
    """The mean of the AUROC of each of several labels ``(N, L)`` that is known to be yes and no; nan without one."""

    higher_is_better = True
    full_state_update = False
    preds: list[Tensor]
    target: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("preds", default=[], dist_reduce_fx="cat")
        self.add_state("target", default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch, with -100 for what is unknown."""
        self.preds.append(preds)
        self.target.append(target)

    def compute(self) -> Tensor:
        """Compute it."""
        areas = []
        for p, y in zip(dim_zero_cat(self.preds).T, dim_zero_cat(self.target).T, strict=True):
            known = y >= 0
            if len(torch.unique(y[known])) > 1:
                areas.append(binary_auroc(p[known], y[known]))
        return torch.stack(areas).mean() if areas else torch.tensor(torch.nan)
