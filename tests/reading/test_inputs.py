"""What a reference sees of the inputs of a model: every column, texts, images and graphs, and what is missing."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_sensitivity.reference.kinds import Seen, join_seen
from lightning_sensitivity.running.call import select_seen
from lightning_sensitivity.running.rules import find_sight

G = torch.Generator().manual_seed(0)
X, Z = torch.rand(3, 12, generator=G), torch.rand(3, 5, generator=G)
IMAGES, IDS = torch.rand(3, 2, 8, 8, generator=G), torch.arange(12).reshape(3, 4)
SOUND = IMAGES[:, :, 0]
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
FLAGS, CITY = X > 0.5, torch.tensor([2, 0, 999])
NODES, EDGES = torch.arange(10.0).reshape(5, 2), torch.tensor([[1.0], [2.0], [4.0]])
GRAPH, ENDS = torch.tensor([0, 0, 2, 2, 2]), torch.tensor([[0, 1, 3], [1, 0, 4]])
SUMS = torch.tensor([[2.0, 2, 4, 2, 3], [0.0] * 5, [3.0, 18, 21, 1, 4]])  # of three graphs, of which one is empty
OF_NODES = {"x": NODES, "edge_index": ENDS, "batch": GRAPH}


def beside(*columns: Tensor) -> Seen:
    return {"columns": torch.cat([x[:, None].float().flatten(1) for x in columns], 1)}


SEEN: dict[str, tuple[dict[str, Any], Seen]] = {  # inputs by name, and what a reference sees
    "columns in 64 and 16 bits": ({"x": X.double() + 1e-9, "z": Z.half()},
        {"columns": torch.cat([X.double() + 1e-9, Z.half()], 1)}),
    "an image and columns": ({"x": IMAGES, "z": Z}, {"images": IMAGES, "columns": Z}),
    "two images, of two sizes": ({"x": IMAGES, "z": IMAGES.repeat_interleave(2, 2).repeat_interleave(2, 3)},
        {"images": IMAGES.repeat(1, 2, 1, 1)}),
    "categories beside columns": ({"x": X, "z": IDS.byte()}, beside(X, IDS)),
    "columns of integers in a dict": ({"x": X, "city": CITY, "day": IDS[:, 1]}, beside(X, CITY, IDS[:, 1])),
    "flags": ({"x": X, "flags": FLAGS, "flag": FLAGS[:, 0]}, beside(X, FLAGS, FLAGS[:, 0])),
    "columns, and which of them are missing": ({"x": X, "mask": FLAGS}, beside(X, FLAGS)),
    "a signal, and not a mask of its steps": ({"x": SOUND, "mask": FLAGS[:, :8]}, {"signals": SOUND}),
    "a sound, and not its mask": ({"x": X, "attention_mask": FLAGS}, {"columns": X}),
    "a floating mask": ({"x": X, "mask": Z}, beside(X, Z)),
    "token ids with padding": ({"ids": IDS, "attention_mask": MASK}, {"tokens": IDS.where(MASK > 0, -1)}),
    "a dict of token ids with padding": ({"batch": {"ids": IDS, "attention_mask": MASK, "token_type_ids": IDS}},
        {"tokens": IDS.where(MASK > 0, -1)}),
    "token ids in 8 bits": ({"ids": IDS.byte(), "attention_mask": MASK}, {"tokens": IDS.where(MASK > 0, -1)}),
    "token ids beside what is none": ({"token_type_ids": IDS * 0, "position_ids": IDS, "ids": IDS}, {"tokens": IDS}),
    "two texts, whose words do not mix": ({"title": IDS, "body": IDS, "attention_mask": MASK},
        {"tokens": torch.cat([IDS.where(MASK > 0, -1), (IDS + 10**6).where(MASK > 0, -1)], 1)}),
    "a text of few words beside a column, by its mask": ({"x": CITY, "ids": IDS, "attention_mask": MASK},
        {"columns": CITY[:, None].float(), "tokens": IDS.where(MASK > 0, -1)}),
    "embeddings, without their mask": ({"x": SOUND, "attention_mask": MASK}, {"signals": SOUND}),
    "inputs in a part": ({"x": {"deep": [X, (Z, "name")]}, "scale": X.sum(), "deep": True}, beside(X, Z)),
    "graphs of PyTorch Geometric": ({"data": SimpleNamespace(**OF_NODES, edge_attr=EDGES, y=GRAPH)}, beside(SUMS)),
    "graphs of chemprop, beside descriptors": (
        {"bmg": SimpleNamespace(V=NODES, E=EDGES, edge_index=ENDS, batch=GRAPH), "X_d": torch.ones(3, 1)},
        beside(SUMS, torch.ones(3))),
    "graphs as arguments, without features of edges": (OF_NODES, beside(SUMS[:, :4])),
}  # fmt: skip


def see(named: dict[str, Any], rows: Tensor | None = None) -> tuple[Seen, list[str]]:
    return select_seen(named, 3, find_sight(named, 3), rows)


@pytest.mark.parametrize("what", SEEN)
def test_a_reference_sees(what: str) -> None:
    named, expected = SEEN[what]
    rows = torch.tensor([2, 0])
    for indices, wanted in ((None, expected), (rows, {kind: x[rows] for kind, x in expected.items()})):
        seen, unread = see(named, indices)
        torch.testing.assert_close(seen, wanted, rtol=0, atol=0)
        assert unread == []


def test_integers_of_graphs_are_categories() -> None:
    graphs = SimpleNamespace(x=torch.tensor([[0], [3], [3], [3], [200]]), edge_index=ENDS, batch=GRAPH)
    seen = see({"data": graphs})[0]["columns"]
    assert seen.shape == (3, 130) and seen[0, [1, 4]].tolist() == [1, 1] and seen[2, [4, 128]].tolist() == [2, 1]


UNSEEN: dict[str, tuple[dict[str, Any], list[str]]] = {  # inputs beside columns, and which of them are named
    "a column that names things": ({"zip": 100 * CITY}, ["zip"]),
    "two columns of integers that do": ({"ids": 1000 * IDS[:, :2]}, ["ids"]),
    "other rows": ({"edges": X[:2]}, ["edges"]),
    "a list, a graph, complex and sparse numbers, a volume": ({"list": ["a"], "graph": SimpleNamespace(x=X),
        "wave": X.to(torch.complex64), "sparse": X.to_sparse(), "volume": IMAGES[:, None]},
        ["list", "graph", "wave", "sparse", "volume"]),
    "a part of one": ({"parts": [X, torch.nested.nested_tensor([X[0], X[1, :2]], layout=torch.jagged)]}, ["parts"]),
}  # fmt: skip


@pytest.mark.parametrize("what", UNSEEN)
def test_what_can_not_be_read_is_named_once(what: str) -> None:
    more, unseen = UNSEEN[what]
    seen, unread = see({"x": X} | more)
    assert torch.equal(seen["columns"][:, :12], X) and unread == unseen


def test_nothing_is_seen_of_what_can_not_be_read() -> None:
    named = {"x": "name", "z": X[:2], "wave": X.to(torch.complex64)}
    assert see(named) == ({}, ["z", "wave"])  # a name is the same for all samples


def test_integers_of_1000_and_more_beside_numbers_are_clamped_and_named() -> None:
    large = IDS.clone()
    large[1, 2] = 5000
    for z, unseen in ((large, ["z"]), (IDS, [])):
        seen, unread = see({"x": X, "z": z})
        assert torch.equal(seen["columns"][:, 12:], z.clamp(max=1000).float()) and unread == unseen


def test_large_images_and_long_signals_are_averaged() -> None:
    seen, _ = see({"x": IMAGES.repeat(1, 1, 8, 8), "z": torch.rand(3, 1, 1024)})
    assert seen["images"].shape == (3, 2, 32, 32) and seen["signals"].shape == (3, 1, 512)


SMALL, SIGNAL = torch.rand(3, 2, 4, 3, generator=G), torch.rand(2, 3, 9, generator=G)
JOINED: dict[str, tuple[list[Tensor], Tensor]] = {
    "columns": ([X[:1], X[1:]], X),
    "tokens": ([IDS, IDS[:2, :3]], torch.cat([IDS, pad(IDS[:2, :3], (0, 1), value=-1)])),
    "signals": ([SIGNAL[:, :, :4], SIGNAL], torch.cat([pad(SIGNAL[:, :, :4], (0, 5)), SIGNAL])),
    "images": ([SMALL, IMAGES[:, :, :, :6]], torch.cat([SMALL.repeat_interleave(2, 2).repeat_interleave(2, 3),
        IMAGES[:, :, :, :6]])),
}  # fmt: skip


@pytest.mark.parametrize("kind", JOINED)
def test_batches_of_several_sizes_are_joined(kind: str) -> None:
    parts, expected = JOINED[kind]
    torch.testing.assert_close(join_seen([{kind: part} for part in parts]), {kind: expected})
    other, z = ("columns", Z) if kind != "columns" else ("signals", Z[:, None])
    joined = join_seen([{other: z[: len(part)], kind: part} for part in parts])
    assert torch.equal(joined[other], torch.cat([z[: len(part)] for part in parts])) and [*joined] == [other, kind]


@pytest.mark.parametrize(("parts", "match"), [
    ([{"columns": X}, {"columns": Z}], "different sizes"),
    ([{"images": IMAGES}, {"images": IMAGES[:, :1]}], "different sizes"),
    ([{"columns": X}, {"tokens": IDS}], "different kinds"),
    ([{"columns": X}, {"columns": X, "tokens": IDS}], "different kinds"),
    ([{"columns": X}, {}], "neither dense numbers nor token ids, with a row for each sample"),
])  # fmt: skip
def test_batches_that_can_not_be_joined_are_refused(parts: list[Seen], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        join_seen(parts)
