"""A batch of graphs is seen as sums over its nodes and edges, however it is given."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reading.test_inputs import see

NODES, EDGES = torch.arange(10.0).reshape(5, 2), torch.tensor([[1.0], [2.0], [4.0]])
GRAPH, ENDS = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([[0, 1, 3], [1, 0, 4]])
SUMS = torch.tensor([[2.0, 2, 4, 2, 3], [0.0] * 5, [3.0, 18, 21, 1, 4]])  # of three graphs, of which one is empty
OF_NODES = {"x": NODES, "edge_index": ENDS, "batch": GRAPH}
SEEN: dict[str, tuple[dict[str, Any], Tensor]] = {
    "of PyTorch Geometric": ({"data": SimpleNamespace(**OF_NODES, edge_attr=EDGES, y=GRAPH)}, SUMS),
    "of chemprop, beside descriptors": (
        {"bmg": SimpleNamespace(V=NODES, E=EDGES, edge_index=ENDS, batch=GRAPH), "X_d": torch.ones(3, 1)},
        torch.cat([SUMS, torch.ones(3, 1)], 1),
    ),
    "as arguments, without features of edges": (OF_NODES, SUMS[:, :4]),
}


@pytest.mark.parametrize("what", SEEN)
def test_nodes_and_edges_are_counted_and_their_features_summed(what: str) -> None:
    named, expected = SEEN[what]
    seen, unread = see(named)
    assert torch.equal(seen["columns"], expected) and unread == []
    rows = torch.tensor([2, 0])
    assert torch.equal(see(named, rows)[0]["columns"], expected[rows])


def test_integers_are_categories() -> None:
    graphs = SimpleNamespace(x=torch.tensor([[0], [3], [3], [3], [200]]), edge_index=ENDS, batch=GRAPH)
    seen = see({"data": graphs})[0]["columns"]
    assert seen.shape == (3, 130) and seen[0, [1, 4]].tolist() == [1, 1] and seen[2, [4, 128]].tolist() == [2, 1]
