"""Callbacks for Lightning's Trainer: a value that decides when to stop, and one to watch."""

from lightning_sensitivity.callbacks.risk import RiskMonitor
from lightning_sensitivity.callbacks.sensitivity import SensitivityMonitor

__all__ = ["RiskMonitor", "SensitivityMonitor"]
