"""Output sensitivity and the refined score as torchmetrics, which need neither a Trainer nor a model."""

from lightning_sensitivity.metric.output_sensitivity import OutputSensitivity
from lightning_sensitivity.metric.refined_score import RefinedScore

__all__ = ["OutputSensitivity", "RefinedScore"]
