"""Pure functions on tensors: no model, no state, no Lightning."""

from lightning_sensitivity.functional.expected import draw_labels, expected_metric, expected_score
from lightning_sensitivity.functional.label_noise import label_noise
from lightning_sensitivity.functional.reference import Reference, fit_reference
from lightning_sensitivity.functional.refined_score import refined_score
from lightning_sensitivity.functional.sensitivity import loss_estimate, output_sensitivity
from lightning_sensitivity.functional.unexplained import unexplained_share

__all__ = [
    "Reference",
    "draw_labels",
    "expected_metric",
    "expected_score",
    "fit_reference",
    "label_noise",
    "loss_estimate",
    "output_sensitivity",
    "refined_score",
    "unexplained_share",
]
