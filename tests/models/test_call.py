from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_sensitivity.models import prepare_call
from lightning_sensitivity.models.call import forward_parameters

X, DEPTH, IDS, MASK = torch.zeros(3, 2), torch.full((3, 2), 10.0), torch.full((3,), 20), torch.ones(3, 2).bool()
Pair = namedtuple("Pair", ["x", "y"])


@dataclass
class Sample:
    x: Any
    y: Any


class Graph:
    """As torch_geometric's: it holds tensors, and applies a function to them in place."""

    def __init__(self, **tensors: Any) -> None:
        self.__dict__.update(tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and vars(self) == vars(other)

    def clone(self) -> Any:
        return Graph(**{name: tensor.clone() for name, tensor in vars(self).items()})

    def apply(self, function: Any) -> Any:
        self.__dict__.update({name: function(tensor) for name, tensor in vars(self).items()})
        return self


class One(nn.Module):
    def forward(self, x: Any) -> Any: ...


class Two(nn.Module):
    def forward(self, x: Any, mask: Any, scale: float = 1.0) -> Any: ...


class Denoiser(nn.Module):
    def forward(self, y: Any, t: Any) -> Any: ...


class Three(nn.Module):
    def forward(self, image: Any, mask: Any, depth: Any) -> Any: ...


class Optional(nn.Module):
    def forward(self, x: Any = None, mask: Any = None) -> Any: ...


class Keywords(nn.Module):
    def forward(self, **inputs: Any) -> Any: ...


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class Positional(nn.Module):
    def forward(self, x: Any, /, *args: Any) -> Any: ...


def mapped(nest: Any, function: Any) -> Any:
    def at_leaf(leaf: Any) -> Any:
        return leaf.clone().apply(function) if isinstance(leaf, Graph) else function(leaf)

    return apply_to_collection(nest, (Tensor, Graph), at_leaf)


def values(nest: Any) -> Any:
    """A number for each tensor: 0, 10 and 20 as above, with 0.5 more where they were perturbed."""
    return mapped(nest, lambda tensor: tensor.double().mean().item())


def zeroed(leaf: Any) -> Any:
    return leaf.apply(Tensor.zero_) if isinstance(leaf, Graph) else leaf.zero_()


def check(call: Any, batch: Any, args: Any, keywords: Any) -> None:
    """What the model gets, in copies that it may write into."""
    before = values(batch)
    perturbed, plain = call.made(lambda tensor: tensor + 0.5), call.made()
    assert values(perturbed) == (args, keywords)
    assert [type(new) for new in perturbed[0]] == [type(call.arguments[place]) for place in range(len(args))]
    apply_to_collection((perturbed, plain), (Tensor, Graph), zeroed)
    assert values(batch) == before


X_, DEPTH_, IDS_, MASK_ = 0.5, 10.5, 20.0, 1.0  # floating ones perturbed


@pytest.mark.parametrize(("model", "batch", "inputs", "args"), [
    # a tensor, a sequence, a mapping whose only floating tensor is the input
    *((One, batch, None, (X_,)) for batch in (X, (X, IDS), [X, IDS], [X], Pair(X, IDS))),
    *((One, kind(image=X, label=IDS), None, (X_,)) for kind in (dict, UserDict)),
    (Anything, {"image": X}, None, (X_,)),
    (Positional, {"x": X, "args": IDS}, None, (X_,)),
    (Two, (X, MASK, IDS), None, (X_, MASK_)),
    # chosen by key, by place, by name, by a function
    (One, {"image": X, "target": DEPTH}, "image", (X_,)),
    *((One, (IDS, X), place, (X_,)) for place in (1, -1)),
    *((One, kind(IDS, X), "y", (X_,)) for kind in (Pair, Sample)),
    (One, SimpleNamespace(image=X), lambda batch: batch.image, (X_,)),
    (Two, {"image": X, "mask": MASK}, lambda batch: (batch["image"], batch["mask"]), (X_, MASK_)),
    # several
    (Anything, {"x": X, "d": DEPTH, "label": IDS}, ["x", "d"], (X_, DEPTH_)),
    *((Anything, kind(X, DEPTH), ["x", "y"], (X_, DEPTH_)) for kind in (Pair, Sample)),
    (Anything, (X, DEPTH, IDS), [0, -2], (X_, DEPTH_)),
    (Three, (X, MASK, DEPTH, IDS), [0, 2], (X_, MASK_, DEPTH_)),
    # tensors within the one argument: all of them, or the chosen ones
    (One, [[X, DEPTH], IDS], None, ([X_, DEPTH_],)),
    (One, ({"a": X, "b": DEPTH, "id": IDS}, IDS), None, ({"a": X_, "b": DEPTH_, "id": IDS_},)),
    (One, ({"a": X, "b": DEPTH, "id": IDS}, IDS), "b", ({"a": 0.0, "b": DEPTH_, "id": IDS_},)),
    (Two, ({"a": X, "b": DEPTH}, MASK, IDS), ["a"], ({"a": X_, "b": 10.0}, MASK_)),
    (One, {"a": X, "b": DEPTH, "y": DEPTH}, None, ({"a": X_, "b": DEPTH_, "y": 10.0},)),
    (One, {"data": {"image": X}, "label": IDS}, None, ({"data": {"image": X_}, "label": IDS_},)),
    (One, ([Sample(X, IDS)], IDS), None, ([Sample(X_, IDS_)],)),
    (One, [Pair(X, (DEPTH, "name"))], None, (Pair(X_, (DEPTH_, "name")),)),
    (One, Pair(Pair(X, DEPTH), IDS), lambda batch: batch.x, (Pair(X_, DEPTH_),)),
    # objects that apply a function to their tensors
    (One, Graph(x=X, pos=DEPTH, edge_index=IDS), None, (Graph(x=X_, pos=DEPTH_, edge_index=IDS_),)),
    (One, Graph(x=X, pos=DEPTH, edge_index=IDS), "pos", (Graph(x=0.0, pos=DEPTH_, edge_index=IDS_),)),
    (One, Graph(x=X, pos=DEPTH, y=IDS), ["pos", "x"], (Graph(x=X_, pos=DEPTH_, y=IDS_),)),
    (One, (Graph(x=X, y=IDS), IDS), "x", (Graph(x=X_, y=IDS_),)),
])  # fmt: skip
def test_what_is_passed_by_position_and_perturbed(model: type[nn.Module], batch: Any, inputs: Any, args: Any) -> None:
    check(prepare_call(model(), batch, inputs), batch, args, {})


BY_NAME = [
    (One, Sample(X, IDS), None, (), {"x": X_}),
    (Two, {"x": X, "mask": MASK, "label": IDS}, None, (), {"x": X_, "mask": MASK_}),
    (Two, {"x": X, "mask": DEPTH, "label": IDS}, "mask", (), {"x": 0.0, "mask": DEPTH_}),
    (Denoiser, {"y": X, "t": IDS}, None, (), {"y": X_, "t": IDS_}),
    (Optional, {"image": X, "mask": MASK, "label": IDS}, None, (X_,), {"mask": MASK_}),
    (Keywords, {"image": X, "mask": MASK}, None, (), {"image": X_, "mask": MASK_}),
    (Two, SimpleNamespace(x=X), lambda batch: (batch.x, MASK), (X_, MASK_), {}),
]
LEFT_ALONE = [  # where no floating tensor is needed
    *((One, batch, None, (IDS_,), {}) for batch in (IDS, (IDS, X), {"ids": IDS, "label": X})),
    (One, {"ids": IDS, "mask": MASK}, "ids", (IDS_,), {}),
    (Two, {"x": IDS, "mask": MASK, "label": X}, None, (), {"x": IDS_, "mask": MASK_}),
    (Two, (IDS, MASK, X), None, (IDS_, MASK_), {}),
    (One, Graph(ids=IDS), None, (Graph(ids=IDS_),), {}),
]


@pytest.mark.parametrize("perturbs, row", [*((True, row) for row in BY_NAME), *((False, row) for row in LEFT_ALONE)])
def test_what_is_passed_by_name_and_left_alone(perturbs: bool, row: Any) -> None:
    model, batch, inputs, args, keywords = row
    call = prepare_call(model(), batch, inputs, perturbs_inputs=perturbs)
    assert bool(call.tensors()) == perturbs
    check(call, batch, args, keywords)


def test_a_packed_sequence_stays_one_and_memory_formats_stay() -> None:
    packed = PackedSequence(X, torch.tensor([3]))
    (new,), _ = prepare_call(One(), (packed, IDS)).made(lambda tensor: tensor + 1)
    assert isinstance(new, PackedSequence) and torch.equal(new.data, X + 1)
    images = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    call = prepare_call(One(), (images, IDS))
    assert call.tensors()[0] is images
    assert call.made()[0][0].is_contiguous(memory_format=torch.channels_last)


def test_a_wrapped_forward_takes_what_it_is_given() -> None:
    class Wrapped(nn.Module):
        def forward(*args: Any, **kwargs: Any) -> Any: ...

    assert [each.name for each in forward_parameters(Wrapped())] == ["args", "kwargs"]


def test_the_names_of_a_compiled_model_are_those_of_its_forward() -> None:
    batch = {"x": X, "mask": MASK, "label": IDS}
    check(prepare_call(torch.compile(Two(), backend="eager"), batch), batch, (), {"x": X_, "mask": MASK_})


@pytest.mark.parametrize(("model", "batch", "inputs", "match"), [
    (One, None, None, "Expected a batch, got None"),
    (One, IDS, None, r"dense floating tensor.*got a tensor of torch.int64 and shape \(3,\).*`inputs=`.*`at=`"),
    (Three, {"image": X, "mask": MASK, "depth": DEPTH}, None, "exactly one.*several: 'image', 'depth'.*`inputs=`"),
    (Two, {"x": IDS, "mask": MASK, "y": X}, None, "exactly one floating tensor.*none in dict of 'x'"),
    (One, {"a": X}, "image", "`inputs='image'` should name a part of the batch, got dict of 'a': a tensor"),
    (One, (X, IDS), 2, "`inputs=2` should name a part of the batch, got tuple of 2: a tensor of"),
    (One, ({"a": X}, IDS), "z", "`inputs='z'` should name a part of the batch, got dict of 'a'"),
    (One, ({"a": X}, IDS), ["a", 1], "either elements or keys of the first one"),
    (One, ({"a": X, "id": IDS}, IDS), ["a", "id"], "dense floating tensor.*for 'id'"),
    (One, Sample(X, MASK), "z", "`inputs='z'` should name a part of the batch, got Sample of 'x'"),
    (One, (X,), lambda batch: (), "empty tuple"),
    (One, X.to(torch.complex64), None, "torch.complex64"),
    (One, X.to_sparse(), None, "dense floating tensor"),
    (Two, (MASK, MASK, X), 2, "among the first 2 elements of the batch, which `forward` gets, got 2"),
])  # fmt: skip
def test_what_can_not_be_told_is_refused(model: type[nn.Module], batch: Any, inputs: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        prepare_call(model(), batch, inputs)
