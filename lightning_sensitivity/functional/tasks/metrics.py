"""Metrics that torchmetrics does not have as they are needed."""

import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAUROC
from torchmetrics.utilities import dim_zero_cat


class MeanAUROC(MulticlassAUROC):
    """The mean of the AUROC of each class (``average="none"``) that occurs; others would count as 0."""

    def compute(self) -> Tensor:  # type: ignore[override]
        """Compute it."""
        return super().compute()[torch.unique(dim_zero_cat(self.target))].mean()
