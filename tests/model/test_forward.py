from collections import UserDict, namedtuple
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.model import ModelCall, select_outputs, select_targets

X, IDS = torch.zeros(3, 2), torch.full((3,), 20)
Pair = namedtuple("Pair", ["x", "y"])


def module(forward: Any) -> nn.Module:
    return type("Model", (nn.Module,), {"forward": forward})()


ONE, TWO = module(lambda self, x: x), module(lambda self, x, mask: x)
DENOISER, ANYTHING = module(lambda self, y, t: y), module(lambda self, *args, **kwargs: args)


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
    (lambda: ModelCall(torch.compile(TWO, backend="eager"), {"x": X, "mask": IDS, "z": X}).kwargs["x"], X),
    *((lambda y=y: select_outputs(y), X) for y in ({"loss": IDS, "logits": X}, UserDict(logits=X))),
    *((lambda b=b: select_targets(TWO, b), IDS) for b in ((X, X, IDS), {"labels": IDS, "x": X}, UserDict(y=IDS))),
])  # fmt: skip
def test_which_inputs_outputs_and_labels_are_taken(select: Callable[[], Tensor], expected: Tensor) -> None:
    assert torch.equal(select(), expected)


@pytest.mark.parametrize(("select", "match"), [  # more of them, with what the monitors do, are in test_silent.py
    *((lambda x=x: ModelCall(ONE, x)(torch.clone), "dense floating.*got none") for x in (X.to_sparse(), None, IDS)),
    (lambda: ModelCall(DENOISER, {"y": X, "t": IDS})(torch.clone), "one dense floating.*got none.*`inputs="),
    (lambda: ModelCall(TWO, {"x": X, "mask": X})(torch.clone), "got several: 'x', 'mask'"),
    (lambda: ModelCall(ANYTHING, {"image": X}), "`inputs` should return .*dict of 'image'"),
    (lambda: ModelCall(TWO, (X,)), "`inputs` should return the 2 arguments"), (lambda: select_outputs(IDS), "int64"),
    (lambda: select_outputs((X.sum(), X)), r"shape \(\)"),  # a loss comes first
    *((lambda n=n: select_targets(TWO, (X,) * n), f"`targets.*from tuple of {n}") for n in (2, 4)),
    (lambda: select_targets(ONE, (X, [1, 2])), "`targets.*from "),
])  # fmt: skip
def test_what_leaves_doubt_is_refused(select: Callable[[], Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        select()
