from collections import UserDict, namedtuple
from collections.abc import Callable
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

from lightning_sensitivity.model import ModelCall, select_outputs, select_targets

X, DEPTH, IDS, MASK = torch.zeros(3, 2), torch.full((3, 2), 10.0), torch.full((3,), 20), torch.ones(3, 2).bool()
Pair = namedtuple("Pair", ["x", "y"])


def module(forward: Any) -> nn.Module:
    return type("Model", (nn.Module,), {"forward": forward})()


ONE, TWO = module(lambda self, x: x), module(lambda self, x, mask, scale=1.0: x)
DENOISER, COMPILED = module(lambda self, y, t: y), torch.compile(TWO, backend="eager")
OPTIONAL, KEYWORDS = module(lambda self, x=None, mask=None: x), module(lambda self, **inputs: inputs)
ANYTHING = module(lambda self, *args, **kwargs: args)


@pytest.mark.parametrize(("model", "batch", "inputs", "args", "kwargs"), [
    # a mapping, by the names of `forward`; means of what the model gets: as above, and 0.5 more where it is perturbed
    *((model, {"x": X, "mask": MASK, "label": IDS}, None, (), {"x": 0.5, "mask": 1.0}) for model in (TWO, COMPILED)),
    (OPTIONAL, UserDict(x=X, mask=MASK, label=IDS), None, (), {"x": 0.5, "mask": 1.0}),
    (KEYWORDS, {"image": X, "mask": MASK}, None, (), {"image": 0.5, "mask": 1.0}),
    # a sequence, by position; else the batch itself; token ids stay as they are
    *((ONE, batch, None, (0.5,), {}) for batch in ((X, IDS), [X, IDS], [X], Pair(X, IDS), X)),
    *((ONE, batch, None, (20.0,), {}) for batch in (IDS, (IDS, X))),
    (TWO, (X, MASK, IDS), None, (0.5, 1.0), {}), (OPTIONAL, (X, MASK, IDS), None, (0.5,), {}),
    (ONE, ({"a": X, "b": [DEPTH], "id": IDS}, IDS), None, ({"a": 0.5, "b": [10.5], "id": 20.0},), {}),
    # a function
    (TWO, SimpleNamespace(x=X, mask=MASK), lambda batch: (batch.x, batch.mask), (0.5, 1.0), {}),
    (DENOISER, {"y": X, "t": IDS}, lambda batch: (batch["y"], batch["t"]), (0.5, 20.0), {}),
    (ANYTHING, {"x": X, "d": DEPTH}, lambda batch: ([batch["x"], batch["d"]],), ([0.5, 10.5],), {}),
    (ONE, Pair(Pair(X, (DEPTH, "name")), IDS), lambda batch: batch.x, (Pair(0.5, (10.5, "name")),), {}),
])  # fmt: skip
def test_how_the_model_is_called(model: nn.Module, batch: Any, inputs: Any, args: Any, kwargs: Any) -> None:
    received = list[Any]()

    def call(*args: Any, **kwargs: Any) -> Tensor:
        received.append(apply_to_collection([args, kwargs], Tensor, lambda tensor: tensor.double().mean().item()))
        apply_to_collection([args, kwargs], Tensor, Tensor.zero_)  # it may write into what it gets
        return X

    forward = ModelCall(model, batch, inputs, None, args != (20.0,))
    forward._model = call
    for _ in range(2):
        forward(lambda tensor: tensor + 0.5)
    assert received == [[args, kwargs]] * 2


def test_nothing_writes_into_the_batch_nor_into_what_it_holds() -> None:
    def write(x: Tensor, more: Any, array: Any) -> Tensor:
        for values in (x, more.x, array):
            values += 1
        return x + more.x + torch.from_numpy(array)

    batch = {"x": X.clone(), "more": SimpleNamespace(x=X.clone()), "array": X.numpy().copy()}
    for inputs in (None, lambda batch: (write(**batch), batch["more"], batch["array"])):
        forward = ModelCall(module(lambda self, x, more, array: write(x, more, array)), batch, inputs)
        assert torch.equal(forward(), forward())
    assert not any(values.any() for values in (batch["x"], batch["more"].x, batch["array"]))


@pytest.mark.parametrize(("select", "expected"), [
    *((lambda y=y: select_outputs(y), X) for y in (X, (X, "attention"), [X], Pair(X, 0), SimpleNamespace(logits=X))),
    *((lambda y=y: select_outputs(y), X) for y in ({"loss": IDS, "logits": X}, UserDict(logits=X))),
    *((lambda f=f: select_outputs(Pair(IDS, X), f), X) for f in (itemgetter(1), lambda y, scale=1: y[scale])),
    *((lambda b=b: select_targets(TWO, b), IDS) for b in ((X, X, IDS), {"labels": IDS, "x": X}, UserDict(y=IDS))),
    (lambda: select_targets(TWO, Pair(IDS, X), lambda batch: batch.x), IDS),
    (lambda: select_targets(TWO, SimpleNamespace(target=IDS)), IDS),
])  # fmt: skip
def test_which_outputs_and_labels_are_taken(select: Callable[[], Tensor], expected: Tensor) -> None:
    assert torch.equal(select(), expected)


@pytest.mark.parametrize(("select", "match"), [  # more of them, with what the monitors do, are in test_silent.py
    (lambda: ModelCall(ONE, IDS), r"floating.*a tensor of torch.int64 and shape \(3,\).*`inputs=.*`at="),
    *((lambda x=x: ModelCall(ONE, x), "dense floating.*got tuple") for x in (X.to_sparse(), None)),
    (lambda: ModelCall(DENOISER, {"y": X, "t": IDS}), "one dense floating.*`inputs="),
    (lambda: ModelCall(ANYTHING, {"image": X}), "`inputs` should say .*dict of 'image'"),
    (lambda: ModelCall(TWO, (X,)), "`inputs` .* 2 .*got None"), (lambda: select_outputs(IDS), "int64"),
    (lambda: select_outputs((X.sum(), X)), r"shape \(\)"),  # a loss comes first
    *((lambda n=n: select_targets(TWO, (X,) * n), f"`targets.*got tuple of {n}") for n in (2, 4)),
    (lambda: select_targets(ONE, (X, [1, 2])), "`targets.*got "),
])  # fmt: skip
def test_what_leaves_doubt_is_refused(select: Callable[[], Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        select()
