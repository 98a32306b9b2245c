"""Graphs, such as those of PyTorch Geometric and chemprop, as columns."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity.running.batches import entry

_OF_NODES, _OF_EDGES = ("x", "V"), ("edge_attr", "E")
_MAX_CATEGORIES = 128  # of integers, such as the numbers of atoms


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
