"""Label-free tracking of generalization in PyTorch Lightning, by the sensitivity of a network's outputs to noise."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lightning_sensitivity.metric import OutputSensitivity

if TYPE_CHECKING:
    from lightning_sensitivity.callback import SensitivityMonitor
    from lightning_sensitivity.comparison import compare_models
    from lightning_sensitivity.logged_runs import compare_runs

__version__ = "0.1.0.dev0"

__all__ = ["OutputSensitivity", "SensitivityMonitor", "__version__", "compare_models", "compare_runs"]

# Loaded on first use, so that the metric alone never imports lightning.
_HOMES = {"SensitivityMonitor": "callback", "compare_models": "comparison", "compare_runs": "logged_runs"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
