"""What a reference sees of the inputs of a model, side by side, and whether labels are among them."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity.functional.tensors import in_floats
from lightning_sensitivity.reference.kinds import KINDS, Seen, kind_of
from lightning_sensitivity.running.batches import entry, has_samples, is_constant, is_empty, places, take, tensors_in

_MAX_DIMENSIONS = 4  # those of images
_MASK = "attention_mask"  # in transformers, where tokens are, and not padding
_NO_INPUTS = re.compile("mask|position_ids|token_type_ids")
_MANY = 1000  # from which on integers are names, and no categories

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
        parts = [x for x in tensors if x.ndim > 0 and not is_empty(x)]
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
