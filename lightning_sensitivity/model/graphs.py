"""What a reference sees of a batch of graphs, such as those of PyTorch Geometric and chemprop."""

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity.model.batches import entry

_OF_NODES, _OF_EDGES = ("x", "V"), ("edge_attr", "E")
_MAX_CATEGORIES = 128  # of integers, such as the numbers of atoms


def graph_sums(graphs: object, size: int) -> Tensor | None:
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
    parts = [(of_node, _OF_NODES), (of_node[ends[0]], _OF_EDGES)]
    sums = [_summed(places, _features(graphs, names, len(places)), size) for places, names in parts]
    return torch.cat(sums, 1)


def _features(graphs: object, names: tuple[str, ...], count: int) -> Tensor:
    """Return the features of nodes or edges beside a column of ones, ``(M, D)``."""
    found = [x for x in (entry(graphs, name) for name in names) if isinstance(x, Tensor) and len(x) == count]
    columns = [torch.ones(count, 1)]
    for x in found:
        x = x.detach().cpu()[:, None].flatten(1)
        is_category = not x.is_floating_point()
        columns.append(
            one_hot(x.long().clamp(0, _MAX_CATEGORIES - 1), _MAX_CATEGORIES).flatten(1) if is_category else x
        )
    return torch.cat([x.float() for x in columns], 1)


def _summed(places: Tensor, features: Tensor, size: int) -> Tensor:
    return torch.zeros(size, features.shape[1]).index_add_(0, places.cpu().long(), features)
