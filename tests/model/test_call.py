from collections import UserDict, namedtuple
from collections.abc import Callable
from threading import Lock
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.model import ModelCall, select_outputs, select_targets
from lightning_sensitivity.model.batches import tensors_in

X, IDS = torch.zeros(3, 2), torch.full((3,), 20)
Pair = namedtuple("Pair", ["x", "y"])


def module(forward: Any) -> nn.Module:
    return type("Model", (nn.Module,), {"forward": forward})()


call = ModelCall
ONE, TWO = module(lambda self, x: x), module(lambda self, x, mask: x)
DENOISER, ANYTHING = module(lambda self, y, t: y), module(lambda self, *args, **kwargs: args)


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
    assert len(tensors_in(batch)) == 4 and not any(values.any() for values in tensors_in(batch))


def test_integers_beside_a_perturbed_tensor_are_copies_too() -> None:
    ids = IDS.clone()
    call(module(lambda self, pair: pair[0] + pair[1].add_(1)[:, None]), ([X, ids], IDS))(torch.clone)
    assert torch.equal(ids, IDS)


def test_objects_that_cannot_be_copied_are_shared() -> None:
    batch = {"x": X, "meta": [Lock(), SimpleNamespace(x=X)]}
    forward = ModelCall(module(lambda self, x, meta: x if meta[0] is batch["meta"][0] else None), batch)
    assert torch.equal(forward.copy_to_cpu()(), X) and forward.copy_to_cpu().kwargs["meta"][1] is batch["meta"][1]
    assert torch.equal(call(ONE, batch, lambda batch: batch["x"])(), X)


def test_a_call_that_is_kept_has_tensors_of_its_own_on_the_device() -> None:
    x = X.clone().requires_grad_()
    kept = call(TWO, {"x": x, "mask": [IDS]}).copy_to_cpu()
    moved = kept.to(torch.device("meta")).kwargs
    assert moved["x"].device.type == moved["mask"][0].device.type == "meta"
    with torch.no_grad():
        x.add_(1)
    assert torch.equal(kept(), X) and not kept().requires_grad and kept.num_bytes == 6 * 4 + 3 * 8


SIZES: dict[str, tuple[Any, int]] = {
    "rows of the first tensor in a dict": (({"x": X}, IDS), 3),
    "a list with a sequence for each label": (([torch.zeros(400, 2)] * 3, IDS), 3),
    "a list of inputs that have a row for each label": (([X, torch.zeros(1, 3)], IDS), 3),
    "a list of two inputs beside a pair": ({"x": [X, X], "pair": X[:2], "y": IDS}, 3),
    "a list of sequences of different lengths": ({"x": [X, X[:2], X[:1], X]}, 4),
    "a list of sequences of the same length, without labels": ({"x": [X, X]}, 3),
    "unknown": ((5, "name"), 0),
}


@pytest.mark.parametrize("what", SIZES)
def test_samples_are_counted(what: str) -> None:
    batch, size = SIZES[what]
    assert call(ONE, batch).size == size


TAKEN: dict[str, tuple[Callable[[], Tensor], Tensor]] = {
    "a tensor": (lambda: select_outputs(X), X),
    "the first of a tuple": (lambda: select_outputs((X, "attention")), X),
    "the first of a named tuple": (lambda: select_outputs(Pair(X, 0)), X),
    "logits of an object": (lambda: select_outputs(SimpleNamespace(logits=X)), X),
    "logits of a mapping": (lambda: select_outputs(UserDict(loss=IDS, logits=X)), X),
    "arguments by name": (lambda: call(TWO, {"x": X, "mask": IDS, "z": X}).kwargs["x"], X),
    "arguments of compiled code": (lambda: call(torch.compile(TWO, backend="eager"), {"x": X, "mask": IDS})(), X),
    "as many elements as arguments": (lambda: call(TWO, (X, IDS, X)).args[1], IDS),
    "what `inputs` returns": (lambda: call(ONE, {"image": X}, lambda batch: batch["image"])(), X),
    "the last element as labels": (lambda: select_targets(TWO, (X, X, IDS)), IDS),
    "labels of a mapping": (lambda: select_targets(TWO, UserDict(x=X, labels=IDS)), IDS),
    "labels of an object": (lambda: select_targets(ONE, SimpleNamespace(target=IDS)), IDS),
}


@pytest.mark.parametrize("what", TAKEN)
def test_which_inputs_outputs_and_labels_are_taken(what: str) -> None:
    select, expected = TAKEN[what]
    assert torch.equal(select(), expected)


# More of them, with what the monitors do, are in test_silent.py.
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "noise on sparse inputs": (lambda: call(ONE, X.to_sparse())(torch.clone), "dense floating.*got none"),
    "noise where only labels float": (lambda: call(DENOISER, {"y": X, "t": IDS})(torch.clone), "got none.*`inputs="),
    "noise on one of two": (lambda: call(TWO, {"x": X, "mask": X})(torch.clone), "got several: 'x', 'mask'"),
    "integer outputs": (lambda: select_outputs(IDS), "int64"),
    "a loss that comes first": (lambda: select_outputs((X.sum(), X)), r"shape \(\)"),
    "several elements for labels": (lambda: select_targets(TWO, (X,) * 4), "`targets.*from tuple of 4"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_leaves_doubt_is_refused(what: str) -> None:
    select, match = REFUSED[what]
    with pytest.raises(MisconfigurationException, match=match):
        select()
