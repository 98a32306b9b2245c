"""What a reference sees of the inputs of a model by an encoder, and whether labels are among them."""

from collections import Counter
from collections.abc import Mapping
from functools import partial

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn

import lightning_sensitivity.running.rules as rules
from lightning_sensitivity.messages import Refused, describe, refuse_on_error
from lightning_sensitivity.running.batches import cast, code_of, device_of, has_samples, tensors_in
from lightning_sensitivity.running.call import ModelCall
from lightning_sensitivity.running.isolation import isolated

# Training samples that are encoded, in all processes. On a CPU, an encoder takes 8 to 100 ms per sample, and
# features that know much need few: those of 1,000 images predict 79 to 84 % of CIFAR-10, patches of 10,000 62 %.
MAX_ENCODED = 3000
_PART = 64  # samples that are encoded at a time, for lack of memory

_COMPARED = 32  # samples of which labels and inputs are compared
_FEWEST = 8  # that have another label than most, so that none equals an input by chance


# An encoder: a network of the user that makes features of the inputs


def encode(encoder: nn.Module, call: ModelCall, size: int, indices: Tensor | None) -> Tensor:
    """Return the features of some samples, ``(R, D)``, in single precision, on the CPU.

    Args:
        encoder: The network, which a pass leaves as it was, but for its device: that of the model.
        call: A call of the model.
        size: N, the number of its samples.
        indices: Which of them to encode; None for all.

    Raises:
        MisconfigurationException: If the network fails, or does not return features of each sample.
    """
    device = device_of(call.model)
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
    names = rules.parameters_of(encoder)
    if not call.layout.by_name or (len(inputs) == 1 and names.keys().isdisjoint(inputs)):
        result = encoder(*inputs.values())
    else:
        result = encoder(**{name: value for name, value in inputs.items() if name in names})
    mask = next((x for place, x in tensors_in(inputs) if rules.MASK in place), None)
    features = rules.find_features(result, mask)
    if not isinstance(features, Tensor) or features.shape[:1] != (size,):
        raise Refused(f"it should return a tensor ({size}, D), got {describe(result)}.")
    return features.float()[:, None].flatten(1).cpu()


# The labels among the inputs, from which a reference would know them


def find_leaked_label(inputs: Mapping[str, object], labels: Tensor, counts: Tensor) -> str | None:
    """Find the first input that has a column of the labels of a batch.

    Labels of two values are not looked for, since a good flag may equal them in a batch.

    Args:
        inputs: The inputs by the names of the arguments.
        labels: The labels of N samples.
        counts: Which samples have one, ``(N,)``.

    Returns:
        The code that selects it; None if there is none.
    """
    rows = counts.nonzero()[:_COMPARED, 0]
    answers = set()
    for column in _columns(labels, rows):
        num_most = max(Counter(column).values(), default=0)
        if len({*column}) > 2 and len(rows) - num_most >= _FEWEST:
            answers.add(column)
    for place, x in tensors_in(inputs):
        if answers and has_samples(x, len(counts)) and not answers.isdisjoint(_columns(x.detach().cpu(), rows)):
            return code_of(place[1:], place[0])
    return None


def _columns(x: Tensor, rows: Tensor) -> list[tuple[float, ...]]:
    """List the columns of some rows of a tensor, in single precision."""
    return [(*column,) for column in x[rows].float()[:, None].flatten(1).T.tolist()]
