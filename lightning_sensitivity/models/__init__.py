"""How any model is called on any batch, once: its arguments, its outputs, and passes that leave no trace."""

from lightning_sensitivity.models.call import Inputs, Selector, prepare_call
from lightning_sensitivity.models.options import Options
from lightning_sensitivity.models.outputs import Probe, select_outputs, select_targets
from lightning_sensitivity.models.passes import Passes

__all__ = ["Inputs", "Options", "Passes", "Probe", "Selector", "prepare_call", "select_outputs", "select_targets"]
