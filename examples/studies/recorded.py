"""A monitor's estimate that keeps the outputs it gets, for studies that try rules on them afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_sensitivity import RiskEstimate
from lightning_sensitivity.callbacks import risk


class RecordedEstimate(RiskEstimate):
    """Keeps the outputs that it gets, and what it was told."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.kept: dict[str, list[Tensor]] = {}
        self.told: dict[str, Any] = {name: kwargs[name] for name in ("num_training", "num_weights", "reference")}

    def keep(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.kept.setdefault(name, []).append(value.detach().clone())

    def update(self, outputs: Tensor, twin_outputs: Any, **others: Any) -> None:
        twins = [twin_outputs] if isinstance(twin_outputs, Tensor) else list(twin_outputs)
        baseline = others.get("baseline_outputs")
        self.keep(unseen=outputs, twins=torch.stack(twins, 1), baseline=outputs if baseline is None else baseline)
        super().update(outputs, twin_outputs, **others)

    def update_training(self, outputs: Tensor, targets: Tensor) -> None:
        self.keep(training=outputs, training_labels=targets)
        super().update_training(outputs, targets)


def record_estimates() -> None:
    """Let every `RiskMonitor` that is made from now on measure by a `RecordedEstimate`."""
    risk.RiskEstimate = RecordedEstimate  # type: ignore[misc, assignment]
