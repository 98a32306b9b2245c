"""Label-free tracking of generalization in PyTorch Lightning, by the sensitivity of a network's outputs to noise."""

from typing import TYPE_CHECKING, Any

from lightning_sensitivity.metric import OutputSensitivity

if TYPE_CHECKING:
    from lightning_sensitivity.callback import SensitivityMonitor

__version__ = "0.1.0.dev0"

__all__ = ["OutputSensitivity", "SensitivityMonitor", "__version__"]


def __getattr__(name: str) -> Any:
    # The callback is loaded on first use, so that the metric alone never imports lightning.
    if name == "SensitivityMonitor":
        from lightning_sensitivity.callback import SensitivityMonitor

        return SensitivityMonitor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
