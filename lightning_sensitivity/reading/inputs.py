"""What a reference sees of the inputs of a model, by itself or by an encoder, and whether labels are among them."""

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_sensitivity.functional.tensors import in_floats
from lightning_sensitivity.messages import Refused, describe, refuse_on_error
from lightning_sensitivity.reference.kinds import KINDS, Seen
from lightning_sensitivity.running.batches import at, cast, code_of, entry, has_samples, places, take
from lightning_sensitivity.running.call import ModelCall
from lightning_sensitivity.running.isolation import isolated
from lightning_sensitivity.running.layout import Sight
from lightning_sensitivity.running.rules import GRAPHS, INTEGERS, find_sight, parameters_of

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


def see_inputs(
    arguments: Mapping[str, object], size: int, indices: Tensor | None = None, found: Sight | None = None
) -> tuple[Seen, list[str]]:
    """Read what a reference sees of samples.

    Args:
        arguments: The arguments of the model, by their names.
        size: N, the number of samples.
        indices: Which of them to look at; None for all.
        found: What a reference sees of them, if that is known; else they have to be inputs, and no labels.

    Returns:
        What a reference sees, on the CPU, and the names of the arguments of which something can't be read.
    """
    inputs, unread = find_sight(arguments, size) if found is None else found
    unread = [*unread]
    seen: dict[str, list[Tensor]] = {}
    for each in inputs:
        value, kind = at(arguments, each.place), each.kind
        if kind == GRAPHS:
            value, kind = sum_graphs(value, size), "columns"
        x = take(value, indices).detach()
        if kind == "tokens":
            mask = None if each.mask is None else take(at(arguments, each.mask), indices)
            x = x.long() if mask is None else x.long().where(mask > 0, -1)  # 8 bits have no -1
        elif kind == INTEGERS:
            kind, x = "columns", x[:, None].flatten(1).cpu().long().float()
            unread += [each.name] * bool((x >= _MANY).any())  # names, of which nothing is seen
            x = x.clamp(max=_MANY)
        else:
            x = in_floats(x) if kind == "columns" else KINDS[kind].shrunk(x).float()
        seen.setdefault(kind, []).append(x.cpu())
    alone = {kind: parts[0] for kind, parts in seen.items() if len(parts) == 1 and parts[0].ndim > 1}
    joined = {kind: alone[kind] if kind in alone else KINDS[kind].beside(parts) for kind, parts in seen.items()}
    return joined, [*dict.fromkeys(unread)]


# Graphs, such as those of PyTorch Geometric and chemprop


def sum_graphs(graphs: object, size: int) -> Tensor:
    """Count the nodes and edges of each graph, and sum their features; integers are categories.

    Args:
        graphs: An object, or the arguments of ``forward``, with the graph of each node as ``batch`` and the
            nodes of each edge as ``edge_index``, beside features as ``x`` or ``V``, and ``edge_attr`` or ``E``.
        size: N, the number of graphs.

    Returns:
        The sums, ``(N, D)``.
    """
    of_node: Any = entry(graphs, "batch")
    ends: Any = entry(graphs, "edge_index")
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
    if not call.layout.by_name or (len(inputs) == 1 and names.keys().isdisjoint(inputs)):
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
        for place, x in places(value):
            if not has_samples(x, len(counts)):
                continue
            columns = x.detach().cpu()[counts].double()[:, None].flatten(1)
            is_held = ((_standard(columns).T @ _standard(y)).abs() > 1 - _ROUNDING).any(0)
            if bool((is_held & (orders > _CHANCE + math.log(max(1, columns.shape[1])))).any()):
                return code_of(place, name)
    return None


def _standard(columns: Tensor) -> Tensor:
    """Shift and scale columns to a mean of 0 and a norm of 1; constant ones, and those with nan, to 0."""
    centred = columns - columns.mean(0)
    return (centred / centred.square().sum(0).sqrt().clamp(min=1e-30)).nan_to_num(0.0)
