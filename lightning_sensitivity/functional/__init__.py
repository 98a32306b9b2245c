"""Pure functions on tensors: no model, no state, no Lightning."""

from lightning_sensitivity.functional.risk import RiskTerms, risk_estimate, variance_factor
from lightning_sensitivity.functional.sensitivity import loss_estimate, output_sensitivity

__all__ = ["RiskTerms", "loss_estimate", "output_sensitivity", "risk_estimate", "variance_factor"]
