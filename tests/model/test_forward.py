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
from torch.nn.utils.rnn import PackedSequence

from lightning_sensitivity.model import Forward, select_outputs, select_targets

X, DEPTH, IDS, MASK = torch.zeros(3, 2), torch.full((3, 2), 10.0), torch.full((3,), 20), torch.ones(3, 2).bool()
Pair = namedtuple("Pair", ["x", "y"])


def module(forward: Any) -> nn.Module:
    return type("Model", (nn.Module,), {"forward": forward})()


ONE, TWO = module(lambda self, x: x), module(lambda self, x, mask, scale=1.0: x)
THREE, DENOISER = module(lambda self, image, mask, depth: image), module(lambda self, y, t: y)
OPTIONAL, KEYWORDS = module(lambda self, x=None, mask=None: x), module(lambda self, **inputs: inputs)
ANYTHING = module(lambda self, *args, **kwargs: args)

CALLS = [  # model, batch, inputs, and means of what the model gets: as above, and 0.5 more where it is perturbed
    # a mapping, by the names of `forward`
    (TWO, {"x": X, "mask": MASK, "label": IDS}, None, (), {"x": 0.5, "mask": 1.0}),
    (TWO, UserDict(x=X, mask=DEPTH, label=IDS), "mask", (), {"x": 0.0, "mask": 10.5}),
    (TWO, {"x": X, "mask": DEPTH}, ["x", "mask"], (), {"x": 0.5, "mask": 10.5}),
    (TWO, {"image": X, "mask": MASK}, "image", (0.5,), {"mask": 1.0}),
    (ONE, {"image": X, "target": DEPTH}, "image", (0.5,), {}),
    (DENOISER, {"y": X, "t": IDS}, "y", (), {"y": 0.5, "t": 20.0}),
    (OPTIONAL, {"x": X, "mask": MASK, "label": IDS}, None, (), {"x": 0.5, "mask": 1.0}),
    (KEYWORDS, {"image": X, "mask": MASK}, None, (), {"image": 0.5, "mask": 1.0}),
    (ANYTHING, {"x": X, "d": DEPTH, "label": IDS}, ["x", "d"], (0.5, 10.5), {}),
    # a sequence, by position
    *((ONE, batch, None, (0.5,), {}) for batch in ((X, IDS), [X, IDS], [X], Pair(X, IDS))),
    *((ONE, Pair(IDS, X), place, (0.5,), {}) for place in (1, -1, "y")),
    (TWO, (X, MASK, IDS), None, (0.5, 1.0), {}),
    (OPTIONAL, (X, MASK, IDS), None, (0.5,), {}),
    (THREE, (X, MASK, DEPTH, IDS), [0, 2], (0.5, 1.0, 10.5), {}),
    (ONE, ({"a": X, "b": [DEPTH], "id": IDS}, IDS), None, ({"a": 0.5, "b": [10.5], "id": 20.0},), {}),
    (ONE, [Pair(X, (DEPTH, "name"))], None, (Pair(0.5, (10.5, "name")),), {}),
    # a function; else the batch itself
    (TWO, SimpleNamespace(x=X, mask=MASK), lambda batch: (batch.x, batch.mask), (0.5, 1.0), {}),
    (ONE, Pair(Pair(X, DEPTH), IDS), lambda batch: batch.x, (Pair(0.5, 10.5),), {}),
    (ONE, X, None, (0.5,), {}),
]
AS_THEY_ARE = [  # where nothing is to be perturbed
    *((ONE, batch, None, (20.0,), {}) for batch in (IDS, (IDS, X))),
    (TWO, {"x": IDS, "mask": MASK, "label": X}, None, (), {"x": 20.0, "mask": 1.0}),
]


@pytest.mark.parametrize("perturbs, row", [*((True, row) for row in CALLS), *((False, row) for row in AS_THEY_ARE)])
def test_how_the_model_is_called_and_what_is_perturbed(perturbs: bool, row: Any) -> None:
    model, batch, inputs, *expected = row
    received = list[Any]()

    def call(*args: Any, **kwargs: Any) -> Tensor:
        received.append(apply_to_collection([args, kwargs], Tensor, lambda tensor: tensor.double().mean().item()))
        apply_to_collection([args, kwargs], Tensor, Tensor.zero_)  # it may write into what it gets
        return X

    forward = Forward(model, batch, inputs, None, perturbs, call)
    for _ in range(2):
        forward(lambda tensor: tensor + 0.5)
    assert received == [expected] * 2


def test_the_names_of_a_compiled_model_are_those_of_its_forward() -> None:
    forward = Forward(torch.compile(TWO, backend="eager"), {"x": X, "mask": MASK, "label": IDS})
    assert forward.kwargs.keys() == {"x", "mask"} and forward.perturbed == ["x"]


def test_nothing_writes_into_the_batch_nor_into_what_it_holds() -> None:
    batch = {"x": X.clone(), "more": SimpleNamespace(x=X.clone()), "array": X.numpy().copy()}

    def write(x: Tensor, more: Any, array: Any) -> Tensor:
        for values in (x, more.x, array):
            values += 1
        return x + more.x + torch.from_numpy(array)

    for inputs in (None, lambda batch: (write(**batch), batch["more"], batch["array"])):
        model = module(lambda self, x, more, array: write(x, more, array))
        forward = Forward(model, batch, inputs, lambda y, batch: y + batch["x"].mul_(0))
        assert torch.equal(forward(), forward())
    assert not any(values.any() for values in (batch["x"], batch["more"].x, batch["array"]))


def test_types_and_memory_formats_stay() -> None:
    seen = list[Any]()
    for value in (torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last), PackedSequence(X, torch.tensor([3]))):
        Forward(ONE, (value, IDS), call=lambda x: seen.append(x) or X)(lambda tensor: tensor + 1)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert isinstance(seen[1], PackedSequence) and torch.equal(seen[1].data, X + 1)


TOKENS, IMAGES = torch.ones(2, 7).long(), torch.zeros(2, 3, 8, 8)


@pytest.mark.parametrize(("batch", "shape", "is_clear"), [
    *((TOKENS, shape, is_clear) for shape, is_clear in (((2, 5, 7), True), ((2, 7, 5), False), ((2, 7, 7), False))),
    *((IMAGES, shape, is_clear) for shape, is_clear in (((2, 4, 8, 8), True), ((2, 3), True), ((2, 8, 8, 4), False))),
])  # fmt: skip
def test_outputs_whose_dimension_1_could_be_a_position_are_refused_until_the_user_says_where_classes_are(
    batch: Tensor, shape: tuple[int, ...], is_clear: bool
) -> None:
    model, y = module(lambda self, x: torch.zeros(shape)), torch.zeros(shape)
    forward, told = (Forward(model, batch, None, f, perturbs_inputs=False) for f in (None, lambda y: y.movedim(-1, 1)))
    if is_clear:
        assert forward().shape == shape
    else:
        with pytest.raises(MisconfigurationException, match=r"`outputs`.*`outputs=lambda y: y.movedim\(-1, 1"):
            forward()
    assert told().shape == y.movedim(-1, 1).shape


@pytest.mark.parametrize(("result", "outputs"), [
    *((result, None) for result in (X, (X, "attention"), [X], Pair(X, 0), {"loss": IDS, "logits": X})),
    *((result, None) for result in (UserDict(logits=X), SimpleNamespace(logits=X))),
    *((result, "scores") for result in ({"scores": X}, SimpleNamespace(scores=X))),
    *((Pair(IDS, X), outputs) for outputs in ("y", 1, itemgetter(1), lambda result, scale=1: result[scale])),
    (IDS, lambda result, batch: batch),
])  # fmt: skip
def test_outputs(result: Any, outputs: Any) -> None:
    assert select_outputs(result, outputs, X) is X


@pytest.mark.parametrize(("batch", "targets"), [
    *((batch, None) for batch in ((X, X, IDS), {"x": X, "labels": IDS}, SimpleNamespace(y=IDS), UserDict(target=IDS))),
    *((Pair(IDS, X), targets) for targets in ("x", 0, lambda batch: batch.x)),
])  # fmt: skip
def test_labels(batch: Any, targets: Any) -> None:
    assert torch.equal(select_targets(TWO, batch, targets), IDS)


@pytest.mark.parametrize(("select", "match"), [
    (lambda: Forward(ONE, None), "floating.*got NoneType"),
    (lambda: Forward(ONE, IDS), r"floating.*got a tensor of torch.int64 and shape \(3,\).*`inputs=.*`at="),
    (lambda: Forward(ONE, X.to_sparse()), "dense floating"),
    (lambda: Forward(ONE, SimpleNamespace(x=X)), "floating.*got SimpleNamespace"),
    (lambda: Forward(TWO, {"x": X, "mask": IDS}, ["x", "mask"]), "floating.*torch.int64"),
    (lambda: Forward(KEYWORDS, {"a": X, "b": X}), "one floating.*'a', 'b'.*`inputs="),
    (lambda: Forward(TWO, {"x": IDS, "y": X}), "one floating.*dict of 'x'"),
    *((lambda m=m: Forward(m, {"image": X}), "`inputs` should say .*dict of 'image'") for m in (ONE, ANYTHING)),
    (lambda: Forward(ONE, {"a": X}, "b"), "`inputs='b'` should .*got dict of 'a': a tensor"),
    (lambda: Forward(ONE, (X, IDS), 2), "`inputs=2` should .*got tuple of 2: a tensor of"),
    (lambda: Forward(ONE, X, 0), "`inputs=0` should"),
    (lambda: Forward(TWO, (X,)), "`inputs` should .* the 2 arguments that `forward` requires, got None .*tuple of 1"),
    (lambda: Forward(TWO, (MASK, MASK, X), 2), r"the 2 arguments that `forward` requires, got \[2\]"),
    (lambda: select_outputs({"scores": X}), r"`outputs.*got dict of 'scores': a tensor"),
    (lambda: select_outputs(IDS), "got a tensor of torch.int64"),
    (lambda: select_outputs((X.sum(), X)), r"and shape \(\) in tuple of 2"),  # a loss that comes first
    (lambda: select_outputs({"a": X}, lambda result: None), "got NoneType in dict of 'a'"),
    (lambda: select_outputs(X, 0), "`outputs=0` should .*got a tensor"),  # not of the first sample
    *((lambda n=n: select_targets(TWO, (X,) * n), f"`targets=.*got tuple of {n}") for n in (2, 4)),
    *((lambda x=x: select_targets(ONE, x), "`targets=.*got ") for x in (X, {"y": X, "label": X}, (X, [1, 2]))),
    (lambda: select_targets(ONE, (X, X), 2), "`targets=2` should"),
])  # fmt: skip
def test_what_leaves_doubt_is_refused(select: Callable[[], Any], match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        select()
