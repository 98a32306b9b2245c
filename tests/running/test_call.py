from collections import namedtuple
from collections.abc import Callable
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightning_sensitivity.functional.tensors import evenly_spaced
from lightning_sensitivity.running import ModelCall, select_outputs, select_targets
from lightning_sensitivity.running.batches import tensors_in
from tests.helpers import module

X, IDS = torch.zeros(3, 2), torch.full((3,), 20)
Pair, Weighted = namedtuple("Pair", ["x", "y"]), namedtuple("Weighted", ["y", "weight", "x"])
Masked = namedtuple("Masked", ["x", "mask", "y"])
Output = namedtuple("Output", ["features", "logits"])


class Unlabelled(SimpleNamespace):
    @property
    def y(self) -> Tensor:
        raise RuntimeError("has no y yet")


call = ModelCall
ONE, TWO = module(lambda self, x: x), module(lambda self, x, mask: x)
THREE_LAST, IMAGES = module(lambda self, x: x.sum(-1, keepdim=True).expand(-1, -1, -1, 3)), torch.zeros(2, 5, 4, 1)
DENOISER, ANYTHING = module(lambda self, y, t: y), module(lambda self, *args, **kwargs: args[0])
OPTIONAL, OF_DICT = module(lambda self, x, mask=None: x), module(lambda self, batch: batch["a"] + batch["b"])


def test_nothing_writes_into_the_tensors_of_a_batch() -> None:
    def write(x: Tensor, more: Any) -> Tensor:
        x += 1
        for values in (more["x"], more["pair"].x, more["list"][0]):
            values += 1
        return x + more["x"]

    batch = {"x": X.clone(), "more": {"x": X.clone(), "pair": Pair(X.clone(), "name"), "list": [X.clone()]}}
    for inputs in (None, lambda batch: (write(**batch), batch["more"])):
        forward = ModelCall(module(lambda self, x, more: write(x, more)), batch, inputs)
        assert torch.equal(forward(), forward())
    assert select_targets(ONE, batch, lambda batch: write(**batch)).any()
    assert len(tensors_in(batch)) == 4 and not any(values.any() for _, values in tensors_in(batch))


class Graph:
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def clone(self) -> "Graph":
        return Graph(self.x.clone())


def test_objects_are_cloned_if_they_can_be_and_else_shared() -> None:
    batch = {"x": X, "graphs": [Graph(X)], "lock": Lock()}
    forward = ModelCall(module(lambda self, x, graphs, lock: graphs[0].x.add_(lock is batch["lock"])), batch)
    assert torch.equal(forward.copy_to_cpu()(), X + 1) and not X.any()


def test_a_call_that_is_kept_has_tensors_of_its_own_on_the_device() -> None:
    x = X.clone().requires_grad_()
    kept = call(TWO, {"x": x, "mask": [IDS]}).copy_to_cpu()
    moved = kept.to(torch.device("meta")).arguments
    assert moved["x"].device.type == moved["mask"][0].device.type == "meta"
    with torch.no_grad():
        x.add_(1)
    assert torch.equal(kept(), X) and not kept().requires_grad


SIZES: dict[str, tuple[Any, int]] = {
    "rows that all arguments have": (({"x": X, "pair": (IDS, X), "scale": X.sum(), "name": "a"}, IDS), 3),
    "arguments of different rows, such as words and offsets": (({"words": torch.zeros(38), "offsets": X}, IDS), 0),
    "a list, which may have an item for each sample": (([X, X], IDS), 0),
    "sequences that are packed": ((pack_sequence([X, X[:2]]), IDS[:2]), 0),
    "one sequence that is packed": (pack_sequence([X]), 0),
}


@pytest.mark.parametrize("what", SIZES)
def test_samples_are_counted_where_rows_leave_no_doubt(what: str) -> None:
    batch, size = SIZES[what]
    assert call(ONE, batch).size == size


def test_of_a_large_batch_evenly_spaced_rows_are_taken_where_rows_are_samples() -> None:
    rows, x = torch.tensor([0, 2, 5, 7]), torch.arange(10.0)
    whole = call(TWO, {"x": x, "mask": (Pair(x, x.sum()), "name", None)})
    kept = whole.take(rows)
    assert torch.equal(evenly_spaced(torch.arange(whole.size), 3.2), rows)
    assert kept.size == 4 and torch.equal(kept.arguments["x"], x[rows])
    assert torch.equal(kept.arguments["mask"][0].x, x[rows]) and kept.arguments["mask"][0].y == x.sum()
    assert evenly_spaced(torch.arange(call(ONE, x).size), 10) is None
    for other in ({"names": ["a"] * 10}, SimpleNamespace(x=x), x.to_sparse(), [x]):
        assert call(TWO, {"x": x, "mask": other}).size == 0


def test_a_single_sample_keeps_its_dimension() -> None:
    for forward, shape in ((lambda self, x: x.squeeze(), (1, 4)), (lambda self, x: x.sum(1), (1,))):
        assert call(module(forward), torch.rand(1, 4))().shape == shape


class AttrDict(dict[str, Any]):
    __getattr__ = dict.__getitem__


TAKEN: dict[str, tuple[Callable[[], Tensor], Tensor]] = {  # all of X is 0, and stays so
    "a tensor": (lambda: select_outputs(X), X),
    "the first of a tuple": (lambda: select_outputs((X, "attention")), X),
    "the first of images and codes": (lambda: select_outputs((X[:, :, None], X)), X[:, :, None]),
    "what `outputs` says of features and logits": (lambda: select_outputs((X[:, :1], X), lambda out: out[1]), X),
    "classes that `outputs` leaves": (lambda: call(THREE_LAST, IMAGES, None, lambda y: y)(), torch.zeros(2, 5, 4, 3)),
    "classes that come first": (lambda: call(ONE, IMAGES)(), IMAGES),
    "logits of an object": (lambda: select_outputs(SimpleNamespace(logits=X)), X),
    "logits of a named tuple, beside features": (lambda: select_outputs(Output(X[:, :1], X)), X),
    "arguments of compiled code": (lambda: call(torch.compile(TWO, backend="eager"), {"x": X, "mask": IDS})(), X),
    "as many elements as arguments": (lambda: call(TWO, (X, IDS, X)).arguments["mask"], IDS),
    "the first fields of a named tuple of other names": (lambda: call(DENOISER, Pair(X, IDS))(), X),
    "an item of a dict of attributes": (lambda: call(ONE, AttrDict(x=X, y=X[:, 0]))(), X),
    "items of a dict that are its attributes": (
        lambda: call(module(lambda self, batch: batch.x.add_(1)), AttrDict(x=X), lambda batch: (batch,))(),
        X + 1,
    ),
    "what `inputs` returns": (lambda: call(ONE, {"image": X}, lambda batch: batch["image"])(), X),
    "labels of a named tuple that has inputs called so": (lambda: select_targets(DENOISER, Weighted(X, X, IDS)), IDS),
    "labels of an object": (lambda: select_targets(ONE, SimpleNamespace(target=IDS)), IDS),
    "labels of an object with a property that fails": (lambda: select_targets(ONE, Unlabelled(target=IDS)), IDS),
    "labels that are called Y": (lambda: select_targets(ONE, {"x": X, "Y": IDS}), IDS),
    "labels that are called class": (lambda: select_targets(ONE, {"x": X, "class": IDS}), IDS),
    "the only tensor for a forward of any arguments": (lambda: call(ANYTHING, {"image": X, "label": IDS})(), X),
    "the only tensor of a batch without labels": (lambda: call(ONE, {"image": X})(), X),
    "beside what is empty": (lambda: call(ONE, {"a": X, "b": torch.zeros(3, 4, 0), "c": [], "y": IDS})(), X),
    "the whole dict, of whose entries none is named": (lambda: call(OF_DICT, {"a": X, "b": X, "label": IDS})(), X),
    "a dict of arguments from `inputs`": (lambda: call(TWO, X, lambda x: {"mask": IDS, "x": x})(), X),
    "an option that is a field": (lambda: call(OPTIONAL, Masked(X, IDS, IDS)).arguments["mask"], IDS),
    "a dict as an argument from `inputs`": (lambda: call(OF_DICT, X, lambda x: {"a": x, "b": x})(), X),
}


@pytest.mark.parametrize("what", TAKEN)
def test_which_inputs_outputs_and_labels_are_taken(what: str) -> None:
    select, expected = TAKEN[what]
    assert torch.equal(select(), expected)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "noise on sparse inputs": (lambda: call(ONE, X.to_sparse())(torch.clone), "dense floating.*got none"),
    "noise where only labels float": (lambda: call(DENOISER, {"y": X, "t": IDS})(torch.clone), "got none.*`inputs="),
    "noise on one of two": (lambda: call(TWO, {"x": X, "mask": X})(torch.clone), "got `x`, `mask` among"),
    "outputs in entries of a tuple": (
        lambda: select_outputs(({"z": X}, {"px": X[:, :1]})),
        "which of several outputs are the logits, of ",
    ),
    "what `outputs` fails on": (lambda: select_outputs((X, X), lambda y: y[..., 1]), "`outputs` failed on tuple of 2"),
    "integer outputs": (lambda: select_outputs(IDS), "int64"),
    "a loss that comes first": (lambda: select_outputs((X.sum(), X)), r"shape \(\)"),
    "a mapping of other names": (lambda: call(TWO, {"image": X}), "names none of dict of 'image'"),
    "an entry that may be a label": (lambda: call(ANYTHING, {"past_target": X, "weight": X}), "names none"),
    "several tensors for any arguments": (lambda: call(ANYTHING, {"a": X, "b": X}), "names none"),
    "a dict in a dict": (lambda: call(ONE, {"all": {"a": X}, "label": IDS}), "names none"),
    "labels in a pair": (lambda: select_targets(ONE, (X, (IDS, None))), "return the labels from"),
    "labels that `targets` fails on": (lambda: select_targets(ONE, X, lambda batch: batch["y"]), "`targets` failed on"),
    "labels that are no tensor": (lambda: select_targets(ONE, X, lambda batch: [1, 0]), "return the labels from a ten"),
    "labels of two names": (lambda: select_targets(ONE, {"x": X, "label": IDS, "y": IDS}), "`targets` should return"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_leaves_doubt_is_refused(what: str) -> None:
    select, match = REFUSED[what]
    with pytest.raises(MisconfigurationException, match=match):
        select()
