"""What a batch of any structure is to a model, on hundreds that are made at random."""

import random
from collections import OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.running import ModelCall
from lightning_sensitivity.running.batches import at, held_by, tensors_in
from lightning_sensitivity.running.rules import find_labels
from tests.helpers import module

NUM_TEMPLATES = 450
NAMES = ("x", "mask", "label", "y", "input_ids", "attention_mask", "a", "image", "target_size", "names", "batch", "t")
Pair, Triple = namedtuple("Pair", "x y"), namedtuple("Triple", "x mask y")
FORWARDS: dict[str, Callable[..., Any]] = {
    "one": lambda self, x: x,
    "two": lambda self, x, mask: x,
    "an option": lambda self, x, mask=None: x,
    "any": lambda self, *args: args,
    "keywords": lambda self, **kwargs: kwargs,
    "a batch": lambda self, batch: batch,
    "tokens": lambda self, input_ids, attention_mask=None: input_ids,
    "a label": lambda self, label, x: x,
    "a graph": lambda self, x, edge_index, batch: x,
}


class Maker:
    """Makes a batch of a number of samples."""

    def __init__(self, seed: int, size: int) -> None:
        self.random, self.size = random.Random(seed), size

    def tensor(self) -> Tensor:
        size, width = self.size, self.random.choice([2, 2, 3, 5, self.size])
        return self.random.choice([
            lambda: torch.rand(size, width),
            lambda: torch.zeros(size, dtype=torch.int64),
            lambda: torch.ones(size, width, dtype=torch.int64),
            lambda: torch.rand(size, 2, 8),
            lambda: torch.rand(size, 3, 4, 4),
            lambda: torch.ones(size, width, dtype=torch.bool),
            lambda: torch.rand(self.random.choice([size, 1, size + 1]), 2),
            lambda: torch.rand(()),
            lambda: torch.zeros(size, 0),
            lambda: torch.rand(size, 2).to_sparse(),
        ])()  # fmt: skip

    def graph(self) -> Any:
        of_node, ends = torch.arange(self.size).repeat_interleave(2), torch.zeros(2, 3, dtype=torch.int64)
        labels = {"y": torch.zeros(self.size)} if self.random.random() < 0.7 else {}
        return SimpleNamespace(x=torch.rand(2 * self.size, 2), edge_index=ends, batch=of_node, **labels)

    def value(self, depth: int) -> Any:
        kinds = [self.tensor] * 7 + [self.graph, lambda: ["a"] * self.random.choice([self.size, 0])]
        kinds += [lambda: self.random.choice(["a", 3, None, True]), lambda: self.batch(depth - 1)]
        return self.tensor() if depth == 0 else self.random.choice(kinds)()

    def batch(self, depth: int = 2) -> Any:
        kind = self.random.choice([dict, UserDict, OrderedDict, tuple, list, tuple, Pair, Triple, None])
        if kind is None:
            return self.random.choice([self.graph, self.tensor])()
        if kind in (Pair, Triple):
            return kind(*[self.value(depth) for _ in kind._fields])
        if kind in (tuple, list):
            return kind(self.value(depth) for _ in range(self.random.randrange(1, 5)))
        return kind({name: self.value(depth) for name in self.random.sample(NAMES, self.random.randrange(1, 5))})


def parts_of(value: Any) -> list[Any]:
    return [value, *(part for _, item in held_by(value) for part in parts_of(item))]


def attempt(find: Callable[..., Any], *args: Any) -> Any:
    try:
        return find(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_a_layout_selects_what_the_model_and_the_reference_get() -> None:
    """By a plain walk over the batch: arguments and labels are parts of it, and samples are where a call says."""
    num_read = 0
    for seed in range(NUM_TEMPLATES):
        model, batch = module(random.Random(seed).choice([*FORWARDS.values()])), Maker(seed, 4).batch()
        call = attempt(ModelCall, model, batch)
        if isinstance(call, str):
            continue
        num_read += 1
        labels, parts = find_labels(model, batch), {id(each) for each in parts_of(batch)}
        assert all(id(value) in parts for value in call.arguments.values())
        assert labels is None or isinstance(at(batch, labels), Tensor)
        assert call.size == 0 or {len(x) for _, x in tensors_in(call.arguments) if x.ndim > 0} == {call.size}
        rows = torch.tensor([(call.size or 4) - 1, 0])
        whole, some = (attempt(BatchReader().see, batch, call, call.size or 4, each) for each in (None, rows))
        if not isinstance(whole, str):
            assert all(torch.equal(some[kind], x[rows]) for kind, x in whole.items())
    assert num_read > NUM_TEMPLATES / 2
