"""Pure functions on tensors: no model, no state, no Lightning."""

from lightning_sensitivity.functional.expected import draw_labels, expected_loss, expected_metric
from lightning_sensitivity.functional.sensitivity import loss_estimate, output_sensitivity

__all__ = ["draw_labels", "expected_loss", "expected_metric", "loss_estimate", "output_sensitivity"]
