"""Move a batch that came from no Trainer to where a model is, as a Trainer would."""

from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import move_data_to_device
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.running.batches import clone_tensors, device_of
from lightning_sensitivity.running.encoder import cast
from lightning_sensitivity.running.isolation import isolated

_TRUE = {torch.float16, torch.bfloat16, torch.float64}  # to which a Trainer converts a model and its batches


def move_batch(model: nn.Module, batch: object) -> Any:
    """Copy a batch that came from no Trainer to the device of a model, by the hooks of a LightningModule.

    Numbers get the precision of the model, as a Trainer gives them with ``precision="bf16-true"``.
    """
    module, batch, device = original_module(model), clone_tensors(batch), device_of(model)
    if any(weight.dtype in _TRUE for weight in model.parameters()):
        batch = apply_to_collection(batch, Tensor, partial(cast, model))
    if not isinstance(module, LightningModule):
        return move_data_to_device(batch, device)

    def transfer(batch: object) -> object:
        batch = module.on_before_batch_transfer(batch, 0)
        batch = module.transfer_batch_to_device(batch, device, 0)
        return module.on_after_batch_transfer(batch, 0)

    with isolated(model) as run:
        return run(transfer, batch)
