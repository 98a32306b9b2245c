"""Which tensor of a batch is perturbed, how the model is called on it, and which of its outputs are compared."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from functools import partial
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

Selector = Callable[[Any], Any] | int | str | None

# What mappings call their labels; torch, transformers and Lightning's own examples use no other names.
_TARGET_NAMES = ("label", "labels", "target", "targets", "y")


def prepare_call(model: nn.Module, batch: Any, inputs: Selector) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """Find the tensor to perturb, and make a function that runs the model with another tensor in its place.

    ==========================  ==================================  ==============================================
    batch                       what is perturbed                   how the model is called
    ==========================  ==================================  ==============================================
    tensor ``x``                ``x``                               ``model(x)``
    tuple or list               the first element, or ``inputs``    ``model(x)``; if ``forward`` requires p > 1
                                                                    arguments, with the first p elements
    mapping                     the only floating tensor that is    with the entries that ``forward`` names, as
                                not called like labels, or          keywords (all, if it takes ``**kwargs`` alone);
                                ``inputs``                          ``x`` comes first if it names others
    anything, callable          the first argument that the         with the arguments that the callable returns:
    ``inputs``                  callable returns                    one, or a tuple of them
    ==========================  ==================================  ==============================================

    A perturbed element may itself be a tuple, list or mapping; the same rules then find the tensor in it. Everything
    else is passed on as it is, in copies, since a model may write into its arguments.

    Args:
        model: The module to run.
        batch: What the loader gave, on the model's device.
        inputs: A key, an index, a callable ``batch -> arguments of the model``, or None for the rules above.

    Returns:
        The tensor to perturb, and a function from its replacement to the model's output.

    Raises:
        MisconfigurationException: If no floating tensor, or more than one, can be meant.
    """
    if callable(inputs):
        arguments = inputs(batch)
        arguments = arguments if _is_plain_tuple(arguments) else (arguments,)
        if not arguments:
            raise MisconfigurationException("`inputs` should return the model's arguments, got an empty tuple.")
        x, replace = _floating_tensor(arguments[0], None)
        return x, lambda new: model(*copied((replace(new), *arguments[1:])))

    if isinstance(batch, Mapping):
        key = _only_floating_key(batch) if inputs is None else inputs
        x, replace = _floating_tensor(batch, key)
        names = _keyword_names(model, batch)
        positional = () if key in names else (key,)

        def run(new: Tensor) -> Any:
            perturbed = replace(new)
            keywords = {name: copied(perturbed[name]) for name in names}
            return model(*(copied(perturbed[key]) for key in positional), **keywords)

        return x, run

    x, replace = _floating_tensor(batch, inputs)
    num_required = _num_required_arguments(model)
    if isinstance(batch, Sequence) and 1 < num_required <= len(batch):
        return x, lambda new: model(*copied(tuple(replace(new)[:num_required])))
    return x, lambda new: model(*copied((new,)))


def select_outputs(result: Any, outputs: Selector) -> Tensor:
    """The tensor to compare in what the model returned.

    Args:
        result: A tensor; a tuple or list, of which the first element is taken; or a mapping or object with
            ``logits``.
        outputs: A key or attribute, an index, a callable ``result -> tensor``, or None for the rules above.

    Returns:
        The selected tensor.

    Raises:
        MisconfigurationException: If no tensor was found.
    """
    try:
        if callable(outputs):
            selected = outputs(result)
        elif outputs is not None:
            if isinstance(outputs, str) and not isinstance(result, Mapping):
                selected = getattr(result, outputs)
            else:
                selected = result[outputs]
        elif isinstance(result, Mapping) and "logits" in result:
            selected = result["logits"]
        elif not isinstance(result, Tensor) and hasattr(result, "logits"):
            selected = result.logits
        elif isinstance(result, Sequence) and result and not isinstance(result, str):
            selected = result[0]
        else:
            selected = result
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        if callable(outputs):
            raise
        raise MisconfigurationException(
            f"`outputs={outputs!r}` should name a part of what the model returns, got {_describe(result)}."
        ) from error
    if not isinstance(selected, Tensor):
        raise MisconfigurationException(
            "The model's output should be a tensor, a tuple that starts with one, or a mapping or object with `logits`,"
            f" got {_describe(result)}. Choose the tensor with `outputs=` (a key, an index or a callable)."
        )
    return selected


def select_targets(model: nn.Module, batch: Any, targets: Selector) -> Tensor:
    """The labels in a training batch.

    Args:
        model: The module, of which ``forward`` says which elements of a batch are inputs.
        batch: What the training loader gave.
        targets: A key, an index, a callable ``batch -> tensor``, or None: the last of the elements of a tuple or list
            if all others are inputs of ``forward``; the only entry of a mapping that is called ``label``, ``labels``,
            ``target``, ``targets`` or ``y``.

    Returns:
        The labels.

    Raises:
        MisconfigurationException: If they can't be told, or are no tensor.
    """
    if callable(targets):
        selected = targets(batch)
    elif targets is not None:
        selected = _part(batch, targets, "targets")
    elif isinstance(batch, Mapping):
        keys = [key for key in batch if key in _TARGET_NAMES]
        if len(keys) != 1:
            names = ", ".join(map(repr, _TARGET_NAMES))
            raise MisconfigurationException(
                f"Expected one entry of the batch to be called {names}, got {_describe(batch)}."
            )
        selected = batch[keys[0]]
    elif isinstance(batch, Sequence) and len(batch) == max(1, _num_required_arguments(model)) + 1:
        selected = batch[-1]
    else:
        raise MisconfigurationException(
            "Expected a batch of the model's inputs and one more element, the labels, or a mapping, got"
            f" {_describe(batch)}."
        )
    if not isinstance(selected, Tensor):
        raise MisconfigurationException(f"Expected the labels to be a tensor, got {_describe(selected)}.")
    return selected


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` has wrapped, whose signature and hooks are not those of the wrapper.

    Args:
        model: A module, compiled or not.
    """
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def _floating_tensor(value: Any, key: str | int | None) -> tuple[Tensor, Callable[[Tensor], Any]]:
    """The tensor meant by ``key`` (or by the rules) in a nested value, and a function that replaces it there."""
    if key is None:
        if isinstance(value, Tensor):
            if not value.is_floating_point():
                raise MisconfigurationException(
                    f"The input to perturb should be a floating tensor, got {value.dtype} of shape"
                    f" {tuple(value.shape)}. Choose another part of the batch with `inputs=` (a key, an index or a"
                    " callable), or convert it in the data set."
                )
            return value, lambda new: new
        if isinstance(value, Mapping):
            key = _only_floating_key(value)
        elif isinstance(value, Sequence) and not isinstance(value, str) and value:
            key = 0
        else:
            raise MisconfigurationException(
                f"The batch should hold a floating tensor to perturb, got {_describe(value)}. Choose one with"
                " `inputs=` (a key, an index or a callable)."
            )
    part = _part(value, key, "inputs")
    if isinstance(value, Tensor):
        raise MisconfigurationException(
            f"`inputs={key!r}` should name a part of the batch, got a batch that is one tensor; leave `inputs` out."
        )
    tensor, replace_part = _floating_tensor(part, None)
    return tensor, partial(_replaced, value, key, replace_part)


def _part(value: Any, key: str | int, argument: str) -> Any:
    """The part of a batch that an argument names."""
    try:
        return value[key]
    except (IndexError, KeyError, TypeError) as error:
        raise MisconfigurationException(
            f"`{argument}={key!r}` should name a part of the batch, got {_describe(value)}."
        ) from error


def _replaced(value: Any, key: Any, replace_part: Callable[[Tensor], Any], new: Tensor) -> Any:
    """A shallow copy of a mapping or sequence in which one part is exchanged."""
    if isinstance(value, MutableMapping):
        mapping = copy.copy(value)
        mapping[key] = replace_part(new)
        return mapping
    if isinstance(value, Mapping):
        return {**value, key: replace_part(new)}
    items = list(value)
    items[key] = replace_part(new)
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*items)
    return tuple(items) if isinstance(value, tuple) else items


def _only_floating_key(batch: Mapping[Any, Any]) -> Any:
    keys = [key for key, value in batch.items() if isinstance(value, Tensor) and value.is_floating_point()]
    if len(keys) > 1:  # labels of a regression are floating, too
        keys = [key for key in keys if key not in _TARGET_NAMES] or keys
    if len(keys) != 1:
        found = f"several: {', '.join(map(repr, keys))}" if keys else f"none in {_describe(batch)}"
        raise MisconfigurationException(
            f"The batch should hold exactly one floating tensor to perturb, got {found}. Choose one with `inputs=`"
            " (a key, an index or a callable)."
        )
    return keys[0]


def _num_required_arguments(model: nn.Module) -> int:
    parameters = _forward_parameters(model)
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _forward_parameters(model: nn.Module) -> list[inspect.Parameter]:
    """The parameters of ``forward``, also of a compiled module; none of a scripted one, which does not tell them."""
    try:
        return list(inspect.signature(uncompiled(model).forward).parameters.values())
    except ValueError:
        return []


def _keyword_names(model: nn.Module, batch: Mapping[Any, Any]) -> list[str]:
    """The keys of a batch that ``forward`` takes by name; all of them if it takes ``**kwargs`` alone."""
    parameters = _forward_parameters(model)
    if {p.kind for p in parameters} == {inspect.Parameter.VAR_KEYWORD}:
        return [key for key in batch if isinstance(key, str)]
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return [key for key in batch if key in names]


def copied(value: Any) -> Any:
    """The same value with tensors of its own, as far as plain containers go; anything else is passed on itself."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, MutableMapping):
        new = copy.copy(value)
        for key, item in value.items():
            new[key] = copied(item)
        return new
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*map(copied, value))
    if type(value) in (list, tuple):
        return type(value)(map(copied, value))
    return value


def _is_plain_tuple(value: Any) -> bool:
    return isinstance(value, tuple) and not hasattr(value, "_fields")


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor ({value.dtype}, shape {tuple(value.shape)})"
    if isinstance(value, Mapping):
        return f"{type(value).__name__} with the keys {', '.join(map(repr, value))}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"{type(value).__name__} of {', '.join(type(item).__name__ for item in value) or 'nothing'}"
    return type(value).__name__
