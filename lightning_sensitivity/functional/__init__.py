"""Pure functions on tensors: no model, no state, no Lightning."""

from lightning_sensitivity.functional.risk import RiskEstimate, risk_estimate
from lightning_sensitivity.functional.sensitivity import loss_estimate, output_sensitivity

__all__ = ["RiskEstimate", "loss_estimate", "output_sensitivity", "risk_estimate"]
