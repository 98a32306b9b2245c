"""The rules that find what a batch is to a model, and refuse one that leaves doubt. Nothing else guesses."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.messages import Refused, describe
from lightning_sensitivity.reference.kinds import kind_of
from lightning_sensitivity.running.batches import (
    Attribute,
    Place,
    at,
    code_of,
    entry,
    first_of,
    has_samples,
    held_by,
    is_dense,
    is_floating,
    tensors_in,
)

# Names of labels in batches of torch, transformers, chemprop and Lightning's examples.
TARGET_NAMES = ("label", "labels", "target", "targets", "y", "Y", "class")
_LIKE_TARGETS = re.compile("label|target", re.IGNORECASE)

BATCH = "the batch"  # the name of what a function in place of `forward` gets
_ANY, _KEYWORDS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

_MAX_DIMENSIONS = 4  # those of images
MASK = "attention_mask"  # in transformers, where tokens are, and not padding
_NO_INPUTS = re.compile("mask|position_ids|token_type_ids")
GRAPHS, INTEGERS = "graphs", "integers"  # that become columns
_FEATURES = ("sentence_embedding", "pooler_output", "logits")  # in what transformers return


# What the rules find


class Input(NamedTuple):
    """A tensor of the arguments, or graphs, of which a reference sees samples.

    Attributes:
        place: Where it is in the arguments; it begins with the name of one.
        kind: The name of its kind, ``"integers"`` or ``"graphs"``.
        mask: Where its mask is.
    """

    place: Place
    kind: str
    mask: Place | None = None


# What a reference sees, and names of arguments that it can't read.
Sight: TypeAlias = tuple[list[Input], list[str]]


class Arguments(NamedTuple):
    """The arguments of a model.

    Attributes:
        by_name: Whether the model gets them by name, and not by position.
        values: The arguments by their names in ``forward``; those of ``*args`` by numbers.
    """

    by_name: bool
    values: dict[str, Any]


class Layout(NamedTuple):
    """What a batch is to a model.

    Attributes:
        by_name: Whether the model gets its arguments by name, and not by position.
        inputs: Which of them are no labels, and which entries of each are left out.
        left_out: The names of others, and of entries beside inputs, if these are not those that labels have.
        size: The number of samples, if all tensors of the arguments have a row for each; else 0.
        is_chosen: Whether a function of the user has chosen the arguments.
    """

    by_name: bool
    inputs: Mapping[str, Sequence[str]]
    left_out: list[str]
    size: int
    is_chosen: bool


def without(value: Any, names: Sequence[str]) -> Any:
    """Return a mapping without some entries; without names, any value as it is."""
    return {name: item for name, item in value.items() if name not in names} if names else value


# What a `forward` takes


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the ``forward`` of a module, compiled or not, by name."""
    return inspect.signature(original_module(model).forward).parameters


def required_names(model: nn.Module) -> list[str]:
    """List the names of the positional arguments that ``forward`` requires."""
    return [name for name, p in parameters_of(model).items() if p.default is p.empty and p.kind in _POSITIONAL]


def _kinds(model: nn.Module) -> list[object]:
    return [p.kind for p in parameters_of(model).values()]


def _takes_only_keywords(model: nn.Module) -> bool:
    return {*_kinds(model)} <= {_KEYWORDS}


def name_positions(model: nn.Module, values: Sequence[Any]) -> dict[str, Any]:
    """Name arguments that are given by position; those of ``*args`` by numbers."""
    return dict(zip([*parameters_of(model), *map(str, range(len(values)))], values, strict=False))


# Arguments


def find_arguments(model: nn.Module, batch: Any) -> Arguments:
    """Find the arguments of a model in a whole batch; see ModelCall.

    Raises:
        MisconfigurationException: If it is not clear how to call the model.
    """
    parameters, required = parameters_of(model), {*required_names(model)}
    values: dict[str, Any] = {}
    fields = getattr(type(batch), "_fields", ())  # of a named tuple
    if required and required <= {*fields}:
        values = {name: getattr(batch, name) for name in fields if name in parameters}
    elif isinstance(batch, Mapping):
        takes_all = _takes_only_keywords(model)
        values = {name: value for name, value in batch.items() if name in parameters or takes_all}
    if values:
        return Arguments(True, values)
    positions = [batch]
    if isinstance(batch, Mapping):
        positions = [_only_argument(model, batch)]
    elif is_sequence(batch):
        positions = [at(batch, place) for place in _split(model, batch)[0]]
    return Arguments(False, name_positions(model, positions))


def chosen_arguments(model: nn.Module, chosen: Any) -> Arguments:
    """Name the arguments that a function of the user has chosen: one, a tuple, or a dict of those named."""
    if isinstance(chosen, Mapping) and (parameters_of(model).keys() & chosen.keys() or _takes_only_keywords(model)):
        return Arguments(True, {**chosen})
    return Arguments(False, name_positions(model, chosen if type(chosen) is tuple else [chosen]))


def arguments_for_function(batch: object, chosen: Any) -> Arguments:
    """Name what a reference sees beside the batch, which a function takes in place of ``forward``."""
    is_mapping = isinstance(chosen, Mapping)
    parts = held_by(chosen) if is_mapping or type(chosen) is tuple else [(0, chosen)]
    return Arguments(is_mapping, {BATCH: batch, **{str(step): value for step, value in parts}})


def find_layout(model: nn.Module, arguments: Arguments, is_chosen: bool) -> Layout:
    """Find what is seen of the arguments: the inputs, which are not named like labels."""
    by_name, values = arguments
    if BATCH in values:
        inputs: dict[str, Sequence[str]] = {name: () for name in values if name != BATCH}
    else:
        asked = {*parameters_of(model)} - {*TARGET_NAMES} if by_name else {*values}
        names = [name for name in values if name in asked or not is_like_targets(name)]
        inputs = {name: labels_in(values[name]) for name in names}
    named = {name: without(values[name], labels) for name, labels in inputs.items()}
    return Layout(
        by_name=by_name,
        inputs=inputs,
        left_out=[] if BATCH in values else sorted(_names(values) - _names(named) - {*TARGET_NAMES}),
        size=_num_samples(values),
        is_chosen=is_chosen,
    )


def is_like_targets(name: object) -> bool:
    """Return whether an entry that no ``forward`` asks for is named like labels."""
    return name in TARGET_NAMES or _LIKE_TARGETS.search(str(name)) is not None


def labels_in(value: Any) -> list[str]:
    """List the entries of a mapping that are named like labels."""
    return [*filter(is_like_targets, value)] if isinstance(value, Mapping) else []


def _names(named: Mapping[str, object]) -> set[str]:
    """Collect the names of values, and of entries of those that are mappings."""
    return {*named, *(name for value in named.values() if isinstance(value, Mapping) for name in value)}


def _only_argument(model: nn.Module, batch: Mapping[str, object]) -> object:
    """Find the only tensor of a mapping, or all of it, whichever the only argument of ``forward`` takes."""
    required, beside = required_names(model), _beside_labels(batch)
    has_one = len(required) == 1
    takes_one = has_one or (not required and _ANY in _kinds(model))
    if takes_one and len(beside) == 1 and isinstance(batch[beside[0]], Tensor):
        return batch[beside[0]]
    if has_one and len(beside) > 1:
        return batch
    raise Refused(f"`inputs` should return the arguments of `forward`, which names none of {describe(batch)}.")


def _beside_labels(batch: Mapping[str, object]) -> list[str]:
    """List the entries that are not called as labels are, and not empty."""
    return [name for name, value in batch.items() if name not in TARGET_NAMES and not _is_empty(value)]


def _is_empty(value: object) -> bool:
    """Return whether a value holds nothing: None, a collection without items, or tensors without numbers."""
    if tensors := tensors_in(value):
        return not any(x.is_nested or 0 not in x.shape[1:] for _, x in tensors)
    return value is None or (isinstance(value, list | tuple | Mapping) and not value)


def _is_constant(value: object) -> bool:
    """Return whether a value is the same for all samples, such as a flag, or nothing."""
    return isinstance(value, bool | int | float | str) or _is_empty(value)


def is_sequence(batch: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a batch has elements by position."""
    return isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence)


def _split(model: nn.Module, batch: Sequence[Any]) -> tuple[list[Place], list[Place]]:
    """Find as many elements as ``forward`` requires, or those of a in (a, y), and what follows."""
    count, steps = max(1, len(required_names(model))), [(step,) for step, _ in held_by(batch)]
    may_be_pair = len(batch) == 2 and count >= 2 and is_sequence(batch[0]) and len(batch[0]) == count
    if may_be_pair and isinstance(batch[1], Tensor):
        return [(*steps[0], step) for step, _ in held_by(batch[0])], steps[1:]
    return steps[:count], steps[count:]


# Labels


def find_labels(model: nn.Module, batch: object) -> Place | None:
    """Find the labels by name or position; None if it is not clear where they are."""
    names = set(TARGET_NAMES).difference(required_names(model) if isinstance(batch, tuple) else ())
    step = (lambda name: name) if isinstance(batch, Mapping) else Attribute
    candidates = [(step(name),) for name in names if isinstance(entry(batch, name), Tensor)]
    if candidates or not is_sequence(batch):
        return candidates[0] if len(candidates) == 1 else None
    rest = _split(model, batch)[1]  # what follows the inputs
    tensors = [place for place in rest if isinstance(at(batch, place), Tensor)]
    return rest[0] if tensors and tensors == rest[:1] else None


# What a reference sees


def _num_samples(arguments: Mapping[str, object]) -> int:
    """Count the samples, if all tensors are dense and have a row for each; 0 with lists and graphs."""
    sizes = {len(x) for _, x in tensors_in(arguments) if x.ndim > 0} if _has_samples(arguments) else set()
    return sizes.pop() if len(sizes) == 1 else 0


def _has_samples(value: object) -> bool:
    """Return whether a value is made of dense tensors and constants; a list may be of samples."""
    if isinstance(value, Mapping | tuple) and not isinstance(value, PackedSequence):
        return all(_has_samples(each) for _, each in held_by(value))
    return is_dense(value) or _is_constant(value)


def find_sight(named: Mapping[str, object], size: int) -> Sight:
    """Sort the inputs of a model by what they are to a reference.

    A matrix of integers holds token ids if there are no numbers beside it, or if it has a mask; else it holds
    categories.

    Args:
        named: The inputs by the names of the arguments.
        size: N, the number of samples.

    Returns:
        What a reference sees, and the names of the arguments of which something can't be read.
    """
    if _are_graphs(named):  # one graph may be all inputs together
        return [Input((), GRAPHS)], []
    readable, unread = _find_readable(named, size)
    masks = {x.shape: place for place, x in readable if MASK in place}
    numbers = {x.shape for _, x in readable if x.is_floating_point()}
    # A mask is an input only if it may say which numbers are missing.
    candidates = [(place, x) for place, x in readable if x.shape in numbers or not _NO_INPUTS.search(code_of(place))]
    inputs = [(place, x) for place, x in candidates if MASK not in place]
    has_numbers = not all(_are_integers(x) for _, x in inputs)
    seen = []
    for place, x in inputs:
        are_words = _are_integers(x) and (x.shape in masks or not has_numbers)
        kind = kind_of(x) if are_words or x.ndim > 2 or x.is_floating_point() else INTEGERS
        kind = GRAPHS if _are_graphs(named[place[0]]) else kind
        seen.append(Input(place, kind, masks.get(x.shape) if are_words else None))
    return seen, unread


def _find_readable(named: Mapping[str, object], size: int) -> tuple[list[tuple[Place, Tensor]], list[str]]:
    """List the tensors that can be read, and the arguments that hold more."""
    readable, unread = [], []
    for name, value in named.items():
        if _are_graphs(value):
            readable.append(((name,), torch.zeros(size, 0)))  # in place of their sums
            continue
        tensors = tensors_in(value, (name,))
        parts = [(place, x) for place, x in tensors if x.ndim > 0 and not _is_constant(x)]
        can_read = [(place, x) for place, x in parts if has_samples(x, size) and x.ndim <= _MAX_DIMENSIONS]
        readable += can_read
        if len(can_read) < len(parts) or not (tensors or _is_constant(value)):
            unread.append(name)
    return readable, unread


def _are_integers(x: Tensor) -> bool:
    """Return whether a tensor is a matrix of integers."""
    return x.ndim == 2 and not x.is_floating_point() and x.dtype != torch.bool


def _are_graphs(value: object) -> bool:
    """Return whether a value holds graphs: that of each node, and the nodes of each edge."""
    of_node, ends = entry(value, "batch"), entry(value, "edge_index")
    are_tensors = isinstance(of_node, Tensor) and isinstance(ends, Tensor)
    return are_tensors and ends.shape[:1] == (2,) and of_node.ndim == 1


# Features of an encoder


def find_features(result: object, mask: object) -> object:
    """Find features in what transformers return, or in the only entry of a mapping; None if there are none.

    Hidden states of tokens, ``(N, L, D)``, are averaged over those that a mask leaves.
    """
    if not isinstance(result, Mapping):
        return result
    hidden = result.get("last_hidden_state")
    if isinstance(hidden, Tensor) and hidden.ndim == 3:
        if isinstance(mask, Tensor) and mask.shape == hidden.shape[:2]:
            return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return hidden.mean(1)
    names = _FEATURES if len(result) > 1 else tuple(result)
    return next((result[name] for name in names if name in result), None)


# Outputs


def find_outputs(result: Any) -> object:
    """Find the logits by name, else the first item; refuse (features, logits), which may be either."""
    if isinstance(result, Tensor):
        return result
    if isinstance(result, Mapping) or hasattr(result, "logits"):
        return entry(result, "logits")
    if len({x.shape[1] for _, x in tensors_in(result) if x.ndim == 2 and is_floating(x)}) > 1:
        raise Refused(
            f"`outputs` should say which of several outputs are the logits, of {describe(result)}, which `forward` "
            "returned."
        )
    return first_of(result)


def check_class_dimension(outputs: Tensor, arguments: object) -> None:
    """Refuse dense outputs whose first dimensions, and not their last ones, are those of an input."""
    first, last = outputs.shape[1:-1], outputs.shape[2:]
    if min(first.numel(), last.numel()) <= 1:  # of matrices, too
        return
    shapes = [x.shape[1:] for _, x in tensors_in(arguments) if not x.is_nested]
    are_first = first in [shape[: len(first)] for shape in shapes]
    if are_first and last not in [shape[-len(last) :] for shape in shapes]:
        raise Refused(
            f"`outputs` should move the classes to dimension 1, got {[*outputs.shape]}; if they are there, "
            "`outputs=lambda y: y`."
        )


# Noise, which is added to the first argument by position, or to the only one by name that has floating tensors


def find_perturbed(layout: Layout, arguments: Mapping[str, object], described: str) -> str:
    """Find the argument to which noise is added: the only dense floating tensor, or what a function has chosen.

    Raises:
        MisconfigurationException: If that is not clear.
    """
    floating = []
    for name in layout.inputs if layout.by_name else [*arguments][:1]:
        value = arguments[name]
        beside = {key: value[key] for key in _beside_labels(value)} if isinstance(value, Mapping) else value
        tensors = [place for place, x in tensors_in(beside) if is_floating(x) and not _is_empty(x)]
        floating += [(name, code_of(place, name)) for place in tensors]
    if len({name for name, _ in floating}) == 1 and (layout.is_chosen or len(floating) == 1):
        return floating[0][0]
    listed = ", ".join(f"`{code}`" for _, code in floating) or "none"
    raise Refused(
        f"Expected one dense floating input to perturb, got {listed} among the arguments of `forward` ({described}). "
        "Perturb the output of a submodule by `at=`, or select an input by `inputs=`.",
        entry="noise",
    )
