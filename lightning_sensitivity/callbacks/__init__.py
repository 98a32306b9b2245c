"""Callbacks for Lightning's Trainer: what to watch, and what to stop by."""

from lightning_sensitivity.callbacks.risk import RiskMonitor
from lightning_sensitivity.callbacks.sensitivity import SensitivityMonitor

__all__ = ["RiskMonitor", "SensitivityMonitor"]
