"""What a reference sees of the inputs of a model, by itself or by an encoder, and whether labels are among them."""

import math
import re
from collections.abc import Mapping
from functools import partial

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_sensitivity.functional.tensors import in_floats
from lightning_sensitivity.messages import Refused, describe, refuse_on_error
from lightning_sensitivity.reference.kinds import KINDS, Seen, kind_of
from lightning_sensitivity.running.batches import cast, entry, has_samples, is_constant, places, take, tensors_in
from lightning_sensitivity.running.call import ModelCall, parameters_of
from lightning_sensitivity.running.isolation import isolated

_MAX_DIMENSIONS = 4  # those of images
_MASK = "attention_mask"  # in transformers, where tokens are, and not padding
_NO_INPUTS = re.compile("mask|position_ids|token_type_ids")
_MANY = 1000  # from which on integers are names, and no categories

# Training samples that are encoded, in all processes. On a CPU, an encoder takes 8 to 100 ms a sample, and
# features that know much need few: those of 1,000 images predict 79 to 84 % of CIFAR-10, patches of 10,000 62 %.
MAX_ENCODED = 3000
_PART = 64  # samples that are encoded at a time, for lack of memory
_NAMES = ("sentence_embedding", "pooler_output", "logits")  # of features in what transformers return

_OF_NODES, _OF_EDGES = ("x", "V"), ("edge_attr", "E")
_MAX_CATEGORIES = 128  # of integers, such as the numbers of atoms

_FEWEST = 8  # labels that do not equal an input by chance
_CHANCE = math.log(1e4)  # one in so many columns has the values of labels in their order by chance
_ROUNDING = 1e-7  # of a correlation, in single precision


def see_inputs(named: Mapping[str, object], size: int, indices: Tensor | None = None) -> tuple[Seen, list[str]]:
    """Sort the inputs of a model by what they are to a reference.

    A matrix of integers holds token ids if there are no numbers beside it, or if it has a mask; else it holds
    categories.

    Args:
        named: The inputs by the names of the arguments.
        size: N, the number of samples.
        indices: Which of them to look at; None for all.

    Returns:
        What a reference sees, on the CPU, and the names of the arguments of which something can't be read.
    """
    tensors, unread = _readable(named, size)
    chosen = [(name, take(x, indices)) for name, x in tensors]
    masks = {x.shape: x for name, x in chosen if name == _MASK}
    numbers = {x.shape for _, x in chosen if x.is_floating_point()}
    # A mask is an input only if it may say which numbers are missing.
    inputs = [(n, x) for n, x in chosen if n != _MASK and (x.shape in numbers or not _NO_INPUTS.search(n))]
    has_numbers = not all(_are_integers(x) for _, x in inputs)
    found: dict[str, list[Tensor]] = {}
    for name, x in inputs:
        kind, values = _read(x, masks.get(x.shape), has_numbers)
        if kind == "columns" and not x.is_floating_point():  # large ones are names, of which nothing is seen
            unread += [name] * bool((values >= _MANY).any())
            values = values.clamp(max=_MANY)
        found.setdefault(kind, []).append(values.cpu())
    return {kind: KINDS[kind].beside(parts) for kind, parts in found.items()}, [*dict.fromkeys(unread)]


def _readable(named: Mapping[str, object], size: int) -> tuple[list[tuple[str, Tensor]], list[str]]:
    """List the tensors that can be read, by the names of the arguments, and those arguments that hold more."""
    found, unread = [], []
    whole = sum_graphs(named, size)  # one graph may be all inputs together
    for name, value in (named if whole is None else {"graphs": whole}).items():
        sums = sum_graphs(value, size)
        tensors = tensors_in(value if sums is None else sums)
        parts = [x for x in tensors if x.ndim > 0 and not is_constant(x)]
        readable = [x for x in parts if has_samples(x, size) and x.ndim <= _MAX_DIMENSIONS]
        found += [(name, x) for x in readable]
        if len(readable) < len(parts) or not (tensors or is_constant(value)):
            unread.append(name)
    return found, unread


def _read(x: Tensor, mask: Tensor | None, has_numbers: bool) -> tuple[str, Tensor]:
    """Return the kind of an input, and what is seen of it."""
    if x.ndim > 2 or x.is_floating_point():
        kind = kind_of(x)
        return kind, in_floats(x.detach()) if kind == "columns" else KINDS[kind].shrunk(x).detach().float()
    if _are_integers(x) and (mask is not None or not has_numbers):
        return "tokens", x.long() if mask is None else x.long().where(mask > 0, -1)  # 8 bits have no -1
    return "columns", x[:, None].flatten(1).cpu().long().float()


def _are_integers(x: Tensor) -> bool:
    """Return whether a tensor is a matrix of integers."""
    return x.ndim == 2 and not x.is_floating_point() and x.dtype != torch.bool


# Graphs, such as those of PyTorch Geometric and chemprop


def sum_graphs(graphs: object, size: int) -> Tensor | None:
    """Count the nodes and edges of each graph, and sum their features; integers are categories.

    Args:
        graphs: An object, or the arguments of ``forward``, with the graph of each node as ``batch`` and the
            nodes of each edge as ``edge_index``, beside features as ``x`` or ``V``, and ``edge_attr`` or ``E``.
        size: N, the number of graphs.

    Returns:
        The sums, ``(N, D)``; None if there are no graphs.
    """
    of_node, ends = entry(graphs, "batch"), entry(graphs, "edge_index")
    if not isinstance(of_node, Tensor) or not isinstance(ends, Tensor) or ends.shape[:1] != (2,) or of_node.ndim != 1:
        return None
    sums = []
    for graph, names in ((of_node, _OF_NODES), (of_node[ends[0]], _OF_EDGES)):
        columns = [torch.ones(len(graph), 1)]
        for x in (entry(graphs, name) for name in names):
            if isinstance(x, Tensor) and len(x) == len(graph):
                x = x.detach().cpu()
                if not x.is_floating_point():
                    x = one_hot(x.long().clamp(0, _MAX_CATEGORIES - 1), _MAX_CATEGORIES)
                columns.append(x[:, None].flatten(1).float())
        features = torch.cat(columns, 1)
        sums.append(torch.zeros(size, features.shape[1]).index_add_(0, graph.cpu().long(), features))
    return torch.cat(sums, 1)


# An encoder: a network of the user that makes features of the inputs


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


# The labels among the inputs, from which a reference would know them


def find_answer(inputs: Mapping[str, object], labels: Tensor, counts: Tensor) -> str | None:
    """Find the first input that has a column of the labels of a batch, up to scale and shift.

    Labels of two values are not looked for, since a good flag may equal them in a batch.

    Args:
        inputs: The inputs by the names of the arguments.
        labels: The labels of N samples.
        counts: Which samples have one, ``(N,)``.

    Returns:
        The code that selects it; None if there is none.
    """
    y = labels[counts].double()[:, None].flatten(1)
    if len(y) < _FEWEST:
        return None
    orders = torch.zeros(y.shape[1])  # in which labels may come, their logarithms
    for index, column in enumerate(y.T):
        counts_of_values = torch.unique(column, return_counts=True)[1].double()
        if len(counts_of_values) != 2:
            orders[index] = math.lgamma(len(column) + 1) - float(torch.lgamma(counts_of_values + 1).sum())
    for name, value in inputs.items():
        for place, _, x in places(value, name):
            if not has_samples(x, len(counts)):
                continue
            columns = x.detach().cpu()[counts].double()[:, None].flatten(1)
            is_held = ((_standard(columns).T @ _standard(y)).abs() > 1 - _ROUNDING).any(0)
            if bool((is_held & (orders > _CHANCE + math.log(max(1, columns.shape[1])))).any()):
                return place
    return None


def _standard(columns: Tensor) -> Tensor:
    """Shift and scale columns to a mean of 0 and a norm of 1; constant ones, and those with nan, to 0."""
    centred = columns - columns.mean(0)
    return (centred / centred.square().sum(0).sqrt().clamp(min=1e-30)).nan_to_num(0.0)
