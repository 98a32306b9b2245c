"""Output sensitivity and the risk estimate as torchmetrics, which need neither a Trainer nor a model."""

from lightning_sensitivity.metric.risk import RiskEstimate
from lightning_sensitivity.metric.sensitivity import OutputSensitivity

__all__ = ["OutputSensitivity", "RiskEstimate"]
