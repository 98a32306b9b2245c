"""Pure functions on tensors: no model, no state, no Lightning."""

from lightning_sensitivity.functional.features import bags_of_words, principal_components
from lightning_sensitivity.functional.label_noise import label_noise
from lightning_sensitivity.functional.reference import Calibration, Reference, fit_reference, reference_weight
from lightning_sensitivity.functional.refinement import RefinedScore, refined_score
from lightning_sensitivity.functional.risk import RiskTerms, variance_factor
from lightning_sensitivity.functional.sensitivity import loss_estimate, output_sensitivity
from lightning_sensitivity.functional.share_of_wrong_labels import estimate_noise

__all__ = [
    "Calibration",
    "Reference",
    "RefinedScore",
    "RiskTerms",
    "bags_of_words",
    "estimate_noise",
    "fit_reference",
    "label_noise",
    "loss_estimate",
    "output_sensitivity",
    "principal_components",
    "reference_weight",
    "refined_score",
    "variance_factor",
]
