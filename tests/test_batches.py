from collections import UserDict, namedtuple
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.batches import prepare_call, replace_floating, select_targets

X, MASK, LABELS = torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.tensor([0, 1, 2])
NEW = X + 1


def same(value: Any, tensor: Tensor) -> bool:
    """An equal tensor, in memory of its own: a model may write into its arguments."""
    return isinstance(value, Tensor) and value is not tensor and torch.equal(value, tensor)


class One(nn.Module):
    def forward(self, x: Any) -> Any:
        return x


class Two(nn.Module):
    def forward(self, x: Tensor, mask: Tensor, scale: float = 1.0) -> tuple[Any, ...]:
        return x, mask, scale


class Anything(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return args, kwargs


Batch = namedtuple("Batch", ["x", "y"])


@dataclass(frozen=True)
class Sample:
    x: Any
    y: Any


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        (X, None),
        ((X, LABELS), None),
        ([X, LABELS], None),
        ([X], None),
        (Batch(X, LABELS), None),
        (({"image": X, "id": LABELS}, LABELS), None),
        ({"image": X, "label": LABELS}, None),
        ({"image": X, "target": X + 5}, "image"),
        (UserDict(image=X, label=LABELS), None),
        ((LABELS, X), 1),
        ((LABELS, X), -1),
        ({"views": [X, X]}, lambda batch: batch["views"][0]),
        ((LABELS, X), lambda batch: (batch[1],)),
        (Batch(LABELS, X), "y"),
        (Sample(X, LABELS), None),
        (Sample(LABELS, X), "y"),
        (([Sample(X, LABELS)], LABELS), None),
        (nn.utils.rnn.PackedSequence(X, torch.tensor([3])), None),
    ],
)
def test_the_tensor_alone_goes_to_a_model_of_one_argument(batch: Any, inputs: Any) -> None:
    (tensor,), run, _ = prepare_call(One(), batch, inputs)
    assert tensor is X
    assert same(run([NEW.clone()]), NEW)


def test_a_mapping_goes_to_the_arguments_that_forward_names() -> None:
    batch = {"x": X, "mask": MASK, "label": LABELS}
    (tensor,), run, _ = prepare_call(Two(), batch, None)
    assert tensor is X
    new, mask, scale = run([NEW.clone()])
    assert same(new, NEW)
    assert same(mask, MASK)
    assert scale == 1.0
    assert batch["x"] is X  # the batch is not written to


def test_a_tuple_goes_to_the_required_arguments() -> None:
    _, run, _ = prepare_call(Two(), (X, MASK, LABELS), None)
    new, mask, scale = run([NEW.clone()])
    assert same(new, NEW)
    assert same(mask, MASK)
    assert scale == 1.0


def test_a_callable_gives_the_arguments() -> None:
    batch = {"image": X, "mask": MASK}
    _, run, _ = prepare_call(Two(), batch, lambda b: (b["image"], b["mask"]))
    assert same(run([NEW.clone()])[0], NEW)
    assert same(run([NEW.clone()])[1], MASK)
    (tensor,), run, _ = prepare_call(One(), batch, lambda b: (b,))  # the whole batch is one argument
    assert tensor is X
    assert same(run([NEW.clone()])["image"], NEW)
    assert same(run([NEW.clone()])["mask"], MASK)


def test_a_nested_input_keeps_what_is_around_it() -> None:
    _, run, _ = prepare_call(One(), ({"image": X, "id": LABELS}, LABELS), lambda b: (b[0],))
    assert same(run([NEW.clone()])["id"], LABELS)
    named = Batch(X, LABELS)
    _, run, _ = prepare_call(One(), [named], lambda b: (b[0],))
    assert isinstance(run([NEW.clone()]), Batch)
    assert same(run([NEW.clone()]).x, NEW)
    _, run, _ = prepare_call(One(), None, lambda b: ([X, MASK],))
    assert same(run([NEW.clone()])[1], MASK)


def test_an_input_that_forward_does_not_name_comes_first() -> None:
    class Optional(nn.Module):
        def forward(self, x: Any = None, mask: Any = None) -> tuple[Any, ...]:
            return x, mask

    _, run, _ = prepare_call(Optional(), {"image": X, "mask": MASK, "label": LABELS}, None)
    new, mask = run([NEW.clone()])
    assert same(new, NEW)
    assert same(mask, MASK)


def test_a_forward_of_keywords_alone_gets_the_whole_mapping() -> None:
    class Keywords(nn.Module):
        def forward(self, **inputs: Any) -> dict[str, Any]:
            return inputs

    _, run, _ = prepare_call(Keywords(), {"image": X, "mask": MASK}, None)
    assert same(run([NEW.clone()])["image"], NEW)
    assert same(run([NEW.clone()])["mask"], MASK)


def test_only_what_can_be_a_keyword_is_one() -> None:
    class Positional(nn.Module):
        def forward(self, x: Any, /, *args: Any) -> Any:
            return x, args

    _, run, _ = prepare_call(Positional(), {"x": X, "args": LABELS}, None)
    new, args = run([NEW.clone()])
    assert same(new, NEW)
    assert not args


def test_a_mapping_keeps_its_type_and_what_is_no_container_is_copied_as_a_whole() -> None:
    class Encoding(UserDict):  # as of a tokenizer
        def __getattr__(self, name: str) -> Any:
            try:
                return self.__dict__["data"][name]
            except KeyError:
                raise AttributeError(name) from None

    custom = SimpleNamespace(graph=X)
    batch = Encoding(x=X, custom=custom, span=range(3))
    _, run, _ = prepare_call(One(), batch, lambda b: (b,))
    passed = run([NEW.clone()])
    assert isinstance(passed, Encoding)
    assert same(passed.x, NEW)
    assert passed.custom is not custom and passed.custom.graph is not X  # the model may write into it
    assert passed.span == range(3)
    assert batch.x is X


def test_a_dataclass_goes_to_the_arguments_that_forward_names_or_as_a_whole() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Any, ...]:
            return x, y

    batch = Sample(X, LABELS)
    new, y = prepare_call(Named(), batch, None).run([NEW.clone()])
    assert same(new, NEW)
    assert same(y, LABELS)
    passed = prepare_call(One(), batch, lambda b: (b,)).run([NEW.clone()])
    assert isinstance(passed, Sample)
    assert same(passed.x, NEW)
    assert same(passed.y, LABELS)
    assert batch.x is X


@pytest.mark.parametrize(
    ("batch", "inputs"),
    [
        ({"x": X, "mask": X + 2, "label": LABELS}, ["x", "mask"]),
        (Sample(X, X + 2), ["x", "y"]),
        (Batch(X, X + 2), ["x", "y"]),
        ((X, X + 2), [0, 1]),
        ((X, X + 2, LABELS), [0, -2]),
        (({"a": X}, [X + 2]), [0, 1]),
    ],
)
def test_several_inputs_are_perturbed_together(batch: Any, inputs: Any) -> None:
    tensors, run, _ = prepare_call(Anything(), batch, inputs)
    assert [tensor.mean().item() for tensor in tensors] == [0, 2]
    args, keywords = run([NEW.clone(), NEW + 2])
    assert not keywords
    assert same(args[0], NEW)
    assert same(args[1], NEW + 2)


def test_several_inputs_keep_what_is_not_chosen() -> None:
    class Three(nn.Module):
        def forward(self, image: Tensor, mask: Tensor, depth: Tensor) -> tuple[Any, ...]:
            return image, mask, depth

    batch = {"image": X, "mask": MASK, "depth": X + 2}
    _, run, _ = prepare_call(Three(), batch, ["depth", "image"])
    for got, expected in zip(run([NEW + 2, NEW.clone()]), (NEW, MASK, NEW + 2), strict=True):
        assert same(got, expected)
    _, run, _ = prepare_call(Three(), (X, MASK, X + 2, LABELS), [0, 2])
    for got, expected in zip(run([NEW.clone(), NEW + 2]), (NEW, MASK, NEW + 2), strict=True):
        assert same(got, expected)


@pytest.mark.parametrize(
    ("model", "batch", "inputs"),
    [
        (One(), LABELS, None),
        (One(), (LABELS, X), None),
        (One(), {"ids": LABELS, "label": X}, None),
        (One(), (X, LABELS), 1),
        (One(), {"ids": LABELS, "mask": MASK}, "ids"),
        (One(), X, lambda batch: LABELS),
    ],
)
def test_a_model_whose_inputs_are_left_alone_needs_no_floating_tensor(model: Any, batch: Any, inputs: Any) -> None:
    tensors, run, _ = prepare_call(model, batch, inputs, perturbs_inputs=False)
    assert tensors == []
    assert same(run([]), LABELS)


def test_names_and_places_are_those_of_forward_where_inputs_are_left_alone() -> None:
    for batch in ({"x": LABELS, "mask": MASK, "label": X}, (LABELS, MASK, X)):
        ids, mask, scale = prepare_call(Two(), batch, None, perturbs_inputs=False).run([])
        assert same(ids, LABELS)
        assert same(mask, MASK)
        assert scale == 1.0


def test_channels_last_stays_so() -> None:
    x = torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)
    (tensor,), run, _ = prepare_call(One(), (x, LABELS), None)
    assert run([tensor]).is_contiguous(memory_format=torch.channels_last)


def test_a_forward_of_anything_gets_the_tensor() -> None:
    for batch in ({"image": X}, (X, LABELS)):
        _, run, _ = prepare_call(Anything(), batch, None)
        (new,), keywords = run([NEW.clone()])
        assert same(new, NEW)
        assert not keywords


@pytest.mark.parametrize(
    ("batch", "inputs", "match"),
    [
        (LABELS, None, r"floating tensor, got torch.int64 of shape \(3,\).*inputs="),
        ((LABELS, X), None, r"floating tensor, got torch.int64.*inputs="),
        ((LABELS, X), 0, r"floating tensor, got torch.int64"),
        ({"label": LABELS}, None, "exactly one floating tensor.*none in dict with the keys 'label'.*inputs="),
        ({"a": X, "b": X}, None, "exactly one floating tensor.*several: 'a', 'b'.*inputs="),
        ({"a": X}, "image", "`inputs='image'` should name a part of the batch, got dict with the keys 'a'"),
        ((X, LABELS), 2, "`inputs=2` should name a part of the batch, got tuple of Tensor, Tensor"),
        ((X, LABELS), "x", "`inputs='x'` should name a part"),
        (X, 0, "`inputs=0` should name a part of the batch, got a batch that is one tensor"),
        ("text", None, "should hold a floating tensor to perturb, got str.*inputs="),
        ([], None, "should hold a floating tensor to perturb, got list of nothing"),
        ([3], None, "should hold a floating tensor to perturb, got int"),
        ((X,), lambda b: (), "empty tuple"),
        ((X,), lambda b: "no", "should hold a floating tensor to perturb, got str"),
        (X.to(torch.complex64), None, "floating tensor, got torch.complex64"),
        (X.to_sparse(), None, r"floating tensor, got torch.float32, not dense \(torch.sparse_coo\), of"),
        (Sample(LABELS, MASK), None, "none in .* with the keys 'x', 'y'"),
        (Sample(X, MASK), "z", "`inputs='z'` should name a part of the batch, got Sample with the keys 'x', 'y'"),
        ({"a": X}, ["a", "b"], "`inputs='b'` should name a part"),
    ],
)
def test_what_can_not_be_told_is_refused(batch: Any, inputs: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        prepare_call(One(), batch, inputs)


def test_an_element_that_forward_does_not_get_is_refused() -> None:
    with pytest.raises(MisconfigurationException, match="that `forward` gets, the first 2, got 2"):
        prepare_call(Two(), (MASK, MASK, X), 2)


def test_labels_of_a_dataclass() -> None:
    assert select_targets(One(), Sample(X, LABELS), None) is LABELS
    assert select_targets(One(), Batch(X, LABELS), "y") is LABELS


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_the_tensor_in_what_a_submodule_returns() -> None:
    def double(x: Tensor) -> Tensor:
        return 2 * x

    assert torch.equal(replace_floating(X + 1, double), 2 * (X + 1))
    output, (hidden, cell) = replace_floating((X + 1, (X, X)), double)  # an LSTM's
    assert torch.equal(output, 2 * (X + 1))
    assert hidden is cell is X
    assert torch.equal(replace_floating({"last_hidden_state": X + 1}, double)["last_hidden_state"], 2 * (X + 1))
    outputs = replace_floating({"ids": LABELS, "hidden": X + 1, "pooled": X}, double)
    assert torch.equal(outputs["hidden"], 2 * (X + 1))
    assert outputs["pooled"] is X
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)])
    with pytest.raises(MisconfigurationException, match="What the submodule .* got torch.float32, not dense .nested."):
        replace_floating(nested, double)
    with pytest.raises(MisconfigurationException, match="What the submodule .* returns should be a floating"):
        replace_floating(LABELS, double)
