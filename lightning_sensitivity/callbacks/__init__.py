"""Callbacks that measure a model in every validation, and log the values."""

from lightning_sensitivity.callbacks.risk import RiskMonitor
from lightning_sensitivity.callbacks.sensitivity import SensitivityMonitor

__all__ = ["RiskMonitor", "SensitivityMonitor"]
