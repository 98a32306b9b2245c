"""What a batch is to a model is found once for all of one structure: nobody may tell that from finding it anew."""

import random
from collections import Counter, OrderedDict, UserDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.running import ModelCall, batches, rules
from lightning_sensitivity.running.batches import at, resolved
from tests.helpers import module

NUM_TEMPLATES = 450
SIZES = (4, 5, 1, 2, 3, 7)  # of batches that are made alike
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
RULES: dict[Any, Callable[[Any], Any]] = {  # what each is asked about, of a batch
    rules.layout_of_batch: lambda batch: batch,
    rules.layout_of_chosen: lambda batch: (batch, (batch,)),
    rules.layout_for_function: lambda batch: (batch, batch),
    rules.find_labels: lambda batch: batch,
}


class Maker:
    """Makes a batch of a number of samples; with one seed, those of other numbers are alike."""

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


def attempt(find: Callable[..., Any], *args: Any) -> Any:
    try:
        return find(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def test_what_is_remembered_of_a_structure_is_what_the_rules_find_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that looks at something which `structure_of` does not record shows here."""
    monkeypatch.setattr(batches, "_MAX_STRUCTURES", 10**6)
    models, counts = [*map(module, FORWARDS.values())], Counter[str]()
    for seed in range(NUM_TEMPLATES):
        model = models[seed % len(models)]
        for size in SIZES:
            batch = Maker(seed, size).batch()
            for rule, asked in RULES.items():
                num_known = len(batches.REMEMBERED.get(model, {}))
                anew, remembered = attempt(rule, model, asked(batch)), attempt(resolved, rule, model, asked(batch))
                assert anew == remembered, (rule.__name__, model.forward, batch)
                counts["found"] += not isinstance(anew, str)
                counts["remembered"] += not isinstance(anew, str) and len(batches.REMEMBERED[model]) == num_known
    assert counts["found"] > 5000 and counts["remembered"] > counts["found"] / 3


def test_a_layout_selects_what_the_model_and_the_reference_get() -> None:
    """By a plain walk over the batch: each argument, the labels and the samples are where the layout says."""
    num_read = 0
    for seed in range(NUM_TEMPLATES):
        model, batch = module(random.Random(seed).choice([*FORWARDS.values()])), Maker(seed, 4).batch()
        call = attempt(ModelCall, model, batch)
        if isinstance(call, str):
            continue
        num_read += 1
        layout = call.layout
        assert all(call.arguments[name] is at(batch, place) for name, place in layout.places.items())
        assert layout.labels is None or isinstance(at(batch, layout.labels), Tensor)
        assert call.size == 0 or {len(x) for _, x in batches.tensors_in(call.arguments) if x.ndim > 0} == {call.size}
        rows = torch.tensor([(call.size or 4) - 1, 0])
        whole, some = (attempt(BatchReader().see, batch, call, call.size or 4, each) for each in (None, rows))
        if not isinstance(whole, str):
            assert all(torch.equal(some[kind], x[rows]) for kind, x in whole.items())
    assert num_read > NUM_TEMPLATES / 2


X, IDS, LABELS = torch.rand(4, 3), torch.ones(4, 3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
ENDS = torch.zeros(3, 5, dtype=torch.int64)
TOLD_APART: dict[str, tuple[str, Any, Any]] = {  # a `forward`, and two batches that differ in one thing
    "one number for each sample, or two": ("two", ((X, X), X[:, :1]), ((X, X), X[:, :2])),
    "an empty entry": ("a batch", {"x": X, "z": X}, {"x": X, "z": X[:, :0]}),
    "rows for all samples": ("two", (X, X), (X, X[:3])),
    "a mask of the same shape": ("tokens", {"input_ids": IDS, "attention_mask": IDS},
        {"input_ids": IDS, "attention_mask": IDS[:, :2]}),
    "the two ends of edges": ("a graph", {"x": X[:2, :1], "edge_index": ENDS[:2], "batch": LABELS[:2]},
        {"x": X[:3, :1], "edge_index": ENDS, "batch": LABELS[:3]}),
    "the labels of an object": ("a batch", SimpleNamespace(x=X, y=LABELS), SimpleNamespace(x=X)),
    "a type of numbers": ("one", (X, LABELS), (IDS, LABELS)),
    "a name": ("one", {"x": X, "label": LABELS}, {"x": X, "other": LABELS}),
}  # fmt: skip


@pytest.mark.parametrize("what", TOLD_APART)
def test_batches_are_told_apart_by(what: str) -> None:
    forward, *both = TOLD_APART[what]
    model = module(FORWARDS[forward])
    first, second = (resolved(rules.layout_of_batch, model, batch) for batch in both)
    assert first != second and [first, second] == [rules.layout_of_batch(model, batch) for batch in both]


@pytest.mark.parametrize("num_structures", [10, 500])
def test_of_a_stream_of_ever_new_structures_a_hundred_are_remembered(
    num_structures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, found = module(FORWARDS["one"]), list[object]()
    layout_of_batch = rules.layout_of_batch
    monkeypatch.setattr(rules, "layout_of_batch", lambda *each: [found.append(each), layout_of_batch(*each)][1])
    num_remembered = min(num_structures, 100)
    for number in [*range(num_structures), *range(num_remembered)]:  # those that came first are not looked at again
        ModelCall(model, (torch.rand(3, 2), [torch.rand(3)] * number))
    assert len(batches.REMEMBERED[model]) == num_remembered and len(found) == num_structures
