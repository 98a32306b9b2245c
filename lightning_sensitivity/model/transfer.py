"""How a batch that did not come from a Trainer gets to a model."""

from typing import Any

from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device
from torch import nn

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.model.batches import clone_tensors, device_of
from lightning_sensitivity.model.isolation import isolated


def move_batch(model: nn.Module, batch: object) -> Any:
    """Copy a batch, and move it to the device of a model; the hooks of a LightningModule may also transform it."""
    module, batch, device = original_module(model), clone_tensors(batch), device_of(model)
    if not isinstance(module, LightningModule):
        return move_data_to_device(batch, device)

    def transfer(batch: object) -> object:
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module.on_after_batch_transfer(batch, 0)

    with isolated(model) as run:
        return run(transfer, batch)
