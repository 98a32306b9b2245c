"""How a model is called on a batch: with which arguments, and which tensors in them are perturbed."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn

Inputs = Callable[[Any], Any] | Sequence[int | str] | int | str | None
Selector = Callable[..., Any] | int | str | None
Perturb = Callable[[Tensor], Tensor]
Place = int | str  # of an argument: its position, or its keyword

# What mappings call their labels; torch, transformers and Lightning's own examples use no other names.
TARGET_NAMES = ("label", "labels", "target", "targets", "y")
_CHOOSE = (
    "Choose with `inputs=` (a key, an index, a list of them, or a function from the batch to the model's arguments)."
    " Where inputs can take no noise (token ids), perturb the output of a submodule with `at=`."
)


class Call(NamedTuple):
    """A call of a model, which can be made again and again.

    Attributes:
        arguments: What the model gets, by position or keyword.
        chosen: The arguments that are perturbed: all floating tensors in them (None), or those of some entries.
    """

    arguments: dict[Place, Any]
    chosen: dict[Place, tuple[Any, ...] | None]

    def made(self, perturb: Perturb | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, positional and by keyword, perturbed or not, in copies: a model may write into them."""
        chosen = {} if perturb is None else self.chosen
        made = {
            place: _perturbed(value, chosen[place], perturb) if place in chosen and perturb else copied(value)
            for place, value in self.arguments.items()
        }
        by_keyword = {place: value for place, value in made.items() if isinstance(place, str)}
        return tuple(value for place, value in made.items() if isinstance(place, int)), by_keyword

    def tensors(self) -> list[Tensor]:
        """The tensors that are perturbed, as they are."""
        found: list[Tensor] = []

        def note(tensor: Tensor) -> Tensor:
            found.append(tensor)
            return tensor

        for place, keys in self.chosen.items():
            _perturbed(self.arguments[place], keys, note)
        return found


def prepare_call(model: nn.Module, batch: Any, inputs: Inputs = None, perturbs_inputs: bool = True) -> Call:
    """Find out how a model is called on a batch, and what is perturbed.

    ==========================  ==================================  ================================================
    batch                       how the model is called             what is perturbed
    ==========================  ==================================  ================================================
    tensor or object ``x``      ``model(x)``                        all floating tensors in it, or the attributes
                                                                    that ``inputs`` names
    tuple or list               ``model(x)`` with the first         the first element, or ``inputs``: indices, names
                                element; with the first p, if       of a named tuple, or keys of the first element
                                ``forward`` requires p > 1
    mapping or dataclass        with the entries that ``forward``   the only floating tensor that is not called like
                                names (all, if it takes             labels, or ``inputs``
                                ``**kwargs`` alone)
    mapping, ``forward(x)``     with the only floating tensor; if   the same
                                there are several, with the whole
    anything, a function        with what the function returns:     all floating tensors in the first argument
    ``inputs``                  one argument, or a tuple of them
    ==========================  ==================================  ================================================

    Args:
        model: The module.
        batch: What the loader gave, on the model's device.
        inputs: A key or an index, a list of them, a function ``batch -> arguments``, or None for the rules above.
        perturbs_inputs: False where only outputs of submodules are perturbed: no floating tensor is needed.

    Raises:
        MisconfigurationException: If it can't be told how to call the model, or what to perturb.
    """
    if batch is None:
        raise MisconfigurationException("Expected a batch, got None.")
    keys = [] if inputs is None or callable(inputs) else list(inputs) if isinstance(inputs, list | tuple) else [inputs]
    if callable(inputs):
        values = inputs(batch)
        values = values if isinstance(values, tuple) and not hasattr(values, "_fields") else (values,)
        if not values:
            raise MisconfigurationException("`inputs` should return the model's arguments, got an empty tuple.")
        call = Call(dict(enumerate(values)), {0: None})
    elif (named := entries(batch)) is not None:
        call = _by_name(model, batch, named, keys, perturbs_inputs)
    elif is_sequence(batch) and len(batch):
        call = _by_place(model, batch, keys)
    else:
        for key in keys:
            part(batch, key, "inputs")
        call = Call({0: batch}, {0: tuple(keys) or None})
    if perturbs_inputs:
        _check_floating(call)
    return call if perturbs_inputs else call._replace(chosen={})


def _by_name(model: nn.Module, batch: Any, named: Mapping[Any, Any], keys: list[Any], perturbs_inputs: bool) -> Call:
    """Of a mapping or dataclass: by the names of ``forward``, after what is perturbed and has no name there."""
    for key in keys:
        part(batch, key, "inputs")
    parameters = forward_parameters(model)
    by_keyword = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if {p.kind for p in parameters} == {inspect.Parameter.VAR_KEYWORD}:
        by_keyword = [key for key in named if isinstance(key, str)]
    names = [key for key in named if key in by_keyword]
    if not keys:
        keys = [key for key, value in named.items() if isinstance(value, Tensor)]
        keys = [key for key in keys if named[key].is_floating_point() or not perturbs_inputs]
        keys = [key for key in keys if key not in TARGET_NAMES] or [key for key in keys if key in names]
        if len(keys) != 1 and not names:
            return Call({0: batch}, {0: tuple(keys) or None})
        if names and (len(keys) > 1 or not perturbs_inputs):
            keys = [key for key in keys if key in names]
        if len(keys) != 1 and perturbs_inputs:
            found = f"several: {', '.join(map(repr, keys))}" if keys else f"none in {describe(batch)}"
            raise MisconfigurationException(
                f"The batch should hold exactly one floating tensor to perturb, got {found}. {_CHOOSE}"
            )
    unnamed = [key for key in keys if key not in names]
    taken = [p.name for p in parameters][: len(unnamed)]
    arguments: dict[Place, Any] = {place: named[key] for place, key in enumerate(unnamed)}
    arguments |= {name: named[name] for name in names if name not in taken}
    return Call(arguments, {unnamed.index(key) if key in unnamed else key: None for key in keys})


def _by_place(model: nn.Module, batch: Any, keys: list[Any]) -> Call:
    """Of a sequence: what is perturbed, or as many elements as ``forward`` requires, if these are several."""
    fields = getattr(batch, "_fields", ())
    inner = tuple(key for key in keys if isinstance(key, str) and key not in fields)
    for key in keys:
        part(batch[0] if key in inner else batch, key, "inputs")
    if 0 < len(inner) < len(keys):
        raise MisconfigurationException(f"`inputs` should name either elements or keys of the first one, got {keys}.")
    places = [fields.index(key) if isinstance(key, str) else key % len(batch) for key in keys if key not in inner]
    required = num_required(forward_parameters(model))
    if not 1 < required <= len(batch):
        if inner or not places:
            return Call({0: batch[0]}, {0: inner or None})
        return Call({to: batch[place] for to, place in enumerate(places)}, dict.fromkeys(range(len(places))))
    if max(places, default=0) >= required:
        raise MisconfigurationException(
            f"`inputs` should be among the first {required} elements of the batch, which `forward` gets, got"
            f" {max(places)}. Say what it gets with a function, `inputs=lambda batch: (...)`."
        )
    chosen: dict[Place, tuple[Any, ...] | None] = {0: inner} if inner else dict.fromkeys(places or [0])
    return Call(dict(enumerate(batch[:required])), chosen)


def part(value: Any, key: Any, argument: str) -> Any:
    """The entry, element or attribute of a batch that an argument of ours names; an error if there is none."""
    try:
        if isinstance(value, Mapping) or not isinstance(key, str):
            if isinstance(value, Tensor):
                raise TypeError
            return value[key]
        return getattr(value, key)
    except (AttributeError, IndexError, KeyError, TypeError):
        raise MisconfigurationException(
            f"`{argument}={key!r}` should name a part of the batch, got {describe(value)}."
        ) from None


def entries(value: Any) -> Mapping[Any, Any] | None:
    """What has a name in a mapping or a dataclass; None for anything else."""
    if isinstance(value, Mapping):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def copied(value: Any) -> Any:
    """A value with copies of the tensors in its collections, and of objects that can be cloned."""
    return _mapped(value, lambda tensor: tensor.clone())


def describe(value: Any) -> str:
    """What a value is, for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}" + ("" if value.is_nested else f" and shape {tuple(value.shape)}")
    if (named := entries(value)) is not None:
        return f"{type(value).__name__} of {', '.join(f'{key!r}: {describe(each)}' for key, each in named.items())}"
    if is_sequence(value):
        inner = ", ".join(map(describe, value[:5])) + (", ..." if len(value) > 5 else "")
        return f"{type(value).__name__} of {len(value)}: {inner}" if len(value) else f"an empty {type(value).__name__}"
    return f"{type(value).__name__}"


def forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward``, also of a compiled module; none of a scripted one, which does not tell them."""
    forward = uncompiled(model).forward
    try:  # the signature of a method's function is kept; what else may stand in its place could hold the model
        found = _signature(forward.__func__) if inspect.ismethod(forward) else inspect.signature(forward)
    except ValueError:
        return []
    parameters = list(found.parameters.values())
    has_self = inspect.ismethod(forward) and parameters[0].kind != inspect.Parameter.VAR_POSITIONAL
    return parameters[1:] if has_self else parameters


_signature = lru_cache(maxsize=64)(inspect.signature)


def num_required(parameters: Iterable[inspect.Parameter]) -> int:
    """How many positional arguments a call must give."""
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` has wrapped, whose signature and hooks are not those of the wrapper."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def is_perturbable(tensor: Tensor) -> bool:
    """Whether noise can be added: to dense floating tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested


@runtime_checkable
class _Appliable(Protocol):
    """Objects that hold tensors and can apply a function to them: those of torch_geometric and tensordict."""

    def apply(self, function: Callable[[Tensor], Tensor]) -> Any: ...

    def clone(self) -> Any: ...


def _mapped(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A value of the same structure, with the function applied to each of its tensors."""

    def at_leaf(leaf: Any) -> Any:
        return function(leaf) if isinstance(leaf, Tensor) else leaf.clone().apply(function)

    return apply_to_collection(value, (Tensor, _Appliable), at_leaf)


def _perturbed(value: Any, keys: tuple[Any, ...] | None, perturb: Perturb) -> Any:
    """A copy of an argument, with all of its floating tensors perturbed, or those of some entries."""

    def at_tensor(tensor: Tensor) -> Tensor:
        return perturb(tensor) if is_perturbable(tensor) else tensor.clone()

    if keys is None:
        return _mapped(value, at_tensor)
    value = copied(value)
    for key in keys:
        value = with_entry(value, key, lambda inner: _mapped(inner, at_tensor))
    return value


def with_entry(value: Any, key: Any, change: Callable[[Any], Any]) -> Any:
    """A shallow copy of a value, with one of its entries, elements or attributes changed."""
    if hasattr(value, "_fields"):
        name = key if isinstance(key, str) else value._fields[key]
        return value._replace(**{name: change(getattr(value, name))})
    if isinstance(value, tuple):
        return type(value)(change(each) if index == key else each for index, each in enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type | Mapping):
        return dataclasses.replace(value, **{key: change(getattr(value, key))})
    new = copy.copy(value)
    if isinstance(value, Mapping) or not isinstance(key, str):
        new[key] = change(value[key])
    else:
        setattr(new, key, change(getattr(value, key)))
    return new


def _check_floating(call: Call) -> None:
    """Require a floating tensor in each of the arguments and entries to perturb."""
    for place, keys in call.chosen.items():
        for each in [None] if keys is None else [(key,) for key in keys]:
            if not any(map(is_perturbable, call._replace(chosen={place: each}).tensors())):
                raise MisconfigurationException(
                    "The input to perturb should be a dense floating tensor, or hold one, got"
                    f" {describe(call.arguments[place])}{f' for {each[0]!r}' if each else ''}. {_CHOOSE}"
                )


def is_sequence(value: object) -> bool:
    """Whether a value is a sequence of elements, which text is not."""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)
