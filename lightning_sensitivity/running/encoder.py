"""An encoder: a network of the user that makes features of the inputs of a model."""

from collections.abc import Mapping
from functools import partial

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_sensitivity.messages import Refused, describe, refuse_on_error
from lightning_sensitivity.running.batches import cast
from lightning_sensitivity.running.call import ModelCall, parameters_of
from lightning_sensitivity.running.isolation import isolated

# Training samples that are encoded, in all processes. On a CPU, an encoder takes 8 to 100 ms a sample, and
# features that know much need few: those of 1,000 images predict 79 to 84 % of CIFAR-10, patches of 10,000 62 %.
MAX_ENCODED = 3000
_PART = 64  # samples that are encoded at a time, for lack of memory
_NAMES = ("sentence_embedding", "pooler_output", "logits")  # of features in what transformers return


def check_encoder(encoder: nn.Module, model: nn.Module) -> None:
    """Refuse weights that are trained with the model, since features of earlier samples would not hold."""
    trained = {weight for weight in model.parameters() if weight.requires_grad}
    if not trained.isdisjoint(encoder.parameters()):
        raise Refused("`features` is trained with the network: pass a copy, `copy.deepcopy(body)`.", "features")
    shared = {*model.modules()}.intersection(encoder.modules())
    if any(module.training and next(module.buffers(recurse=False), None) is not None for module in shared):
        raise Refused(
            "`features` has buffers, such as those of batch norm, that change as the network is trained: pass a copy, "
            "`copy.deepcopy(body)`, or call `body.eval()` in `on_train_epoch_start`.",
            "features",
        )


def encode(encoder: nn.Module, call: ModelCall, size: int, indices: Tensor | None, device: torch.device) -> Tensor:
    """Return the features of some samples, ``(R, D)``, in single precision, on the CPU.

    Args:
        encoder: The network, which a pass leaves as it was, but for its device.
        call: A call of the model.
        size: N, the number of its samples.
        indices: Which of them to encode; None for all.
        device: The device of the model.

    Raises:
        MisconfigurationException: If the network fails, or does not return features of each sample.
    """
    encoder.to(device)
    indices = torch.arange(size) if indices is None else indices
    with refuse_on_error(f"`features` failed on {call}", "features"), isolated(encoder) as run:
        if call.size == 0:  # of a list, each item may be a sample
            return run(_encode, encoder, call.to(device), size)[indices]
        parts = torch.split(indices, _PART)
        return torch.cat([run(_encode, encoder, call.take(part).to(device), len(part)) for part in parts])


def _encode(encoder: nn.Module, call: ModelCall, size: int) -> Tensor:
    """Run the network on those inputs that it names, or on the only one, and find the features."""
    inputs = apply_to_collection(call.inputs(), Tensor, partial(cast, encoder))
    names = parameters_of(encoder)
    if not call.by_name or (len(inputs) == 1 and names.keys().isdisjoint(inputs)):
        result = encoder(*inputs.values())
    else:
        result = encoder(**{name: value for name, value in inputs.items() if name in names})
    features = _find_features(result, inputs.get("attention_mask"))
    if not isinstance(features, Tensor) or features.shape[:1] != (size,):
        raise Refused(f"it should return a tensor ({size}, D), got {describe(result)}.")
    return features.float()[:, None].flatten(1).cpu()


def _find_features(result: object, mask: object) -> object:
    """Find features in what transformers return, or in the only entry of a mapping; None if there are none.

    Hidden states of tokens, ``(N, L, D)``, are averaged over those that a mask leaves.
    """
    if not isinstance(result, Mapping):
        return result
    hidden = result.get("last_hidden_state")
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return hidden.mean(1)
    names = _NAMES if len(result) > 1 else tuple(result)
    return next((result[name] for name in names if name in result), None)
