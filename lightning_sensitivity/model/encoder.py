"""An encoder: a network of the user that makes features of the inputs of a model."""

from collections.abc import Iterable, Mapping

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

from lightning_sensitivity.arguments import Refused, describe, refuse_on_error
from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.call import ModelCall, parameters_of
from lightning_sensitivity.model.isolation import isolated

# Training samples that are encoded, in all processes. On a CPU, an encoder takes 8 to 100 ms a sample, and features that
# know much need few samples: those of 1,000 images predict 79 to 84 % of CIFAR-10, patches of 10,000 62 %.
MAX_ENCODED = 3000
_PART = 64  # samples that are encoded at a time, for lack of memory
_MASK = "attention_mask"  # of tokens


class Encoder:
    """A network that gets the inputs of a model, and returns features; it is no part of the model.

    A pass leaves it as it was, but for its device.

    Args:
        module: The network.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def encode(self, call: ModelCall, size: int, rows: Tensor | None, device: torch.device) -> Tensor:
        """Return the features of some samples, ``(R, D)``, in single precision, on the CPU.

        Args:
            call: A call of the model.
            size: N, the number of its samples.
            rows: Which of them to encode; None for all.
            device: The device of the model.

        Raises:
            MisconfigurationException: If the network fails, or does not return features of each sample.
        """
        self._module.to(device)
        rows = torch.arange(size) if rows is None else rows
        with refuse_on_error(f"`features` failed on {call}", "features"), isolated(self._module) as run:
            if not call.has_rows:  # of a list, each item may be a sample
                return run(self._encode, call.to(device), size)[rows]
            parts = rows.split(_PART)
            return torch.cat([run(self._encode, call.of_rows(part).to(device), len(part)) for part in parts])

    def _encode(self, call: ModelCall, size: int) -> Tensor:
        """Run the network on the inputs of a call, and find the features in what it returns."""
        inputs = call.inputs()
        known = {p.name for p in parameters_of(self._module)}.intersection(inputs)
        if call.args or (len(inputs) == 1 and not known):
            result = self._module(*self._cast(inputs.values()))
        else:
            result = self._module(**dict(zip(known, self._cast(inputs[name] for name in known), strict=True)))
        found = _find_features(result, inputs.get(_MASK))
        if not isinstance(found, Tensor) or found.ndim == 0 or len(found) != size:
            raise Refused(f"it should return a tensor ({size}, D), got {describe(result)}.")
        return found.float()[:, None].flatten(1).cpu()

    def _cast(self, values: Iterable[object]) -> list[object]:
        """Return values with the precision of the network, which is not that of the model if the Trainer is in 16 bits."""
        dtypes = [weight.dtype for weight in self._module.parameters() if weight.is_floating_point()]

        def cast(x: Tensor) -> Tensor:
            return x.to(dtypes[0]) if dtypes and x.is_floating_point() else x

        return [apply_to_collection(value, Tensor, cast) for value in values]


def _find_features(result: object, mask: object) -> object:
    """Find features by the names that transformers give them; None if it is not clear where they are.

    Hidden states of tokens, ``(N, L, D)``, are averaged over those that a mask leaves.
    """
    if isinstance(result, Tensor):
        return result
    read = result.get if isinstance(result, Mapping) else lambda name: getattr(result, name, None)
    hidden = read("last_hidden_state")
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        weights = (
            mask if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2] else torch.ones_like(hidden[..., 0])
        )
        weights = weights[..., None].float()
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    named = [read(name) for name in ("pooler_output", "logits") if read(name) is not None]
    tensors = named or tensors_in(result)
    return tensors[0] if named or len(tensors) == 1 else None
