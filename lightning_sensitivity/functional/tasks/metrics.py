"""Metrics that torchmetrics does not have as they are needed."""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.classification import BinaryAccuracy, MulticlassAUROC
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
    yes: list[Tensor]
    no: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        for name in ("preds", "yes", "no"):
            self.add_state(name, default=[], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add a batch, with -100 for what is unknown; other labels of the last predictions count beside the first."""
        yes, no = (target == 1).float(), (target == 0).float()
        if self.preds and self.preds[-1] is preds:
            self.yes[-1], self.no[-1] = self.yes[-1] + yes, self.no[-1] + no
        else:
            self.preds, self.yes, self.no = [*self.preds, preds], [*self.yes, yes], [*self.no, no]

    def compute(self) -> Tensor:
        """Compute it: of each label, the mean rank of yes among no, for which predictions are ranked once."""
        p, order = dim_zero_cat(self.preds).sort(0)
        yes, no = (dim_zero_cat(each).gather(0, order).double() for each in (self.yes, self.no))
        up_to, differs = no.cumsum(0), p[1:] != p[:-1]
        edge = torch.ones_like(p[:1], dtype=torch.bool)
        below = (up_to - no).where(torch.cat([edge, differs]), 0).cummax(0).values  # of equal predictions
        not_above = up_to.where(torch.cat([differs, edge]), torch.inf).flip(0).cummin(0).values.flip(0)
        areas = (yes * (below + not_above) / 2).sum(0) / (yes.sum(0) * no.sum(0))  # nan without yes or no
        return areas.nanmean().float()
