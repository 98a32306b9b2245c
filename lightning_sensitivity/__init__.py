"""Track how well PyTorch Lightning models generalize, without labels, by the sensitivity of their outputs to noise."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_sensitivity.metric import OutputSensitivity

if TYPE_CHECKING:
    from lightning_sensitivity.callbacks import RiskMonitor, SensitivityMonitor
    from lightning_sensitivity.compare import compare_models

__version__ = "0.1.0"

__all__ = ["OutputSensitivity", "RiskMonitor", "SensitivityMonitor", "__version__", "compare_models"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # on first use, so that the metric alone never imports lightning
        home = "callbacks" if name.endswith("Monitor") else "compare"
        return globals().setdefault(name, getattr(import_module(f"{__name__}.{home}"), name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
