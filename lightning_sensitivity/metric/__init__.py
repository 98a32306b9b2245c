"""Output sensitivity and the refined score as torchmetrics, which need neither a Trainer nor a model."""

from lightning_sensitivity.metric.refined_score import RefinedScore
from lightning_sensitivity.metric.sensitivity import OutputSensitivity

__all__ = ["OutputSensitivity", "RefinedScore"]
