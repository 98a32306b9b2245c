"""How the model is called on a batch, which tensors of it are perturbed, and where the labels are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.nested import Path, copied, describe, entries, is_named_tuple, is_sequence, part, replaced
from lightning_sensitivity.outputs import Selector, num_required

Inputs = Callable[[Any], Any] | Sequence[int | str] | int | str | None

# What mappings call their labels; torch, transformers and Lightning's own examples use no other names.
_TARGET_NAMES = ("label", "labels", "target", "targets", "y")


class Call(NamedTuple):
    """A call of the model on a batch.

    Attributes:
        tensors: The tensors to perturb, in the batch.
        run: Runs the model with other tensors in their place, which it may write into, and gives what it returns.
        arguments: What the model is called with on the batch as it is, positional and by keyword.
    """

    tensors: list[Tensor]
    run: Callable[[Sequence[Tensor]], Any]
    arguments: tuple[tuple[Any, ...], dict[str, Any]]


def prepare_call(
    model: nn.Module,
    batch: Any,
    inputs: Inputs,
    perturbs_inputs: bool = True,
    forward: Callable[..., Any] | None = None,
) -> Call:
    """Find the tensors to perturb, and make a function that runs the model with others in their place.

    ==========================  ==================================  ==============================================
    batch                       what is perturbed                   how the model is called
    ==========================  ==================================  ==============================================
    tensor ``x``                ``x``                               ``model(x)``
    tuple or list               the first element, or ``inputs``    ``model(x)``; if ``forward`` requires p > 1
                                                                    arguments, with the first p elements
    mapping or dataclass        the only floating tensor that is    with the entries that ``forward`` names, as
                                not called like labels, or          keywords (all, if it takes ``**kwargs`` alone);
                                ``inputs``                          ``x`` comes first if it names others
    anything, callable          the first argument that the         with the arguments that the callable returns:
    ``inputs``                  callable returns                    one, or a tuple of them
    ==========================  ==================================  ==============================================

    A perturbed element may itself be a tuple, list, mapping or dataclass; the same rules then find the tensor in it.
    Everything else is passed on as it is, in copies, since a model may write into its arguments.

    Args:
        model: The module to run.
        batch: What the loader gave, on the model's device.
        inputs: A key or an index, a list of them, a callable ``batch -> arguments of the model``, or None for the
            rules above.
        perturbs_inputs: False where none is, and it matters only how the model is called: no floating tensor is needed.
        forward: What runs the model with its arguments; by default the module itself.

    Returns:
        The tensors to perturb, a function from their replacements to the model's output, and the model's arguments.

    Raises:
        MisconfigurationException: If no dense floating tensor, or more than one, can be meant.
    """
    forward = forward or model
    keys: list[Any]
    arguments: _Arguments
    if callable(inputs):
        values = inputs(batch)
        values = values if isinstance(values, tuple) and not is_named_tuple(values) else (values,)
        if not values:
            raise MisconfigurationException("`inputs` should return the model's arguments, got an empty tuple.")
        keys, arguments = [0], _unpacked
    else:
        values = batch
        keys = [] if inputs is None else list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        for key in keys:
            _check_part(batch, key, "inputs")
        kind = _by_name if entries(batch) is not None else _by_place
        keys, arguments = kind(model, batch, keys, perturbs_inputs)
    if perturbs_inputs:
        paths = [(key, *_floating_path(part(values, (key,)))) for key in keys] or [_floating_path(values)]
    else:
        paths = [(key,) for key in keys] or [()]
    perturbed_paths = paths if perturbs_inputs else []

    def run(new: Sequence[Tensor]) -> Any:
        perturbed = values
        for path, tensor in zip(perturbed_paths, new, strict=True):
            perturbed = replaced(perturbed, path, tensor)
        args, keywords = copied(arguments(perturbed, paths), but=new)
        return forward(*args, **keywords)

    return Call([part(values, path) for path in perturbed_paths], run, arguments(values, paths))


def select_targets(model: nn.Module, batch: Any, targets: Selector) -> Tensor:
    """The labels in a training batch.

    Args:
        model: The module, of which ``forward`` says which elements of a batch are inputs.
        batch: What the training loader gave.
        targets: A key, an index, a callable ``batch -> tensor``, or None: the last of the elements of a tuple or list
            if all others are inputs of ``forward``; the only entry of a mapping or dataclass that is called ``label``,
            ``labels``, ``target``, ``targets`` or ``y``.

    Returns:
        The labels.

    Raises:
        MisconfigurationException: If they can't be told, or are no tensor.
    """
    if callable(targets):
        selected = targets(batch)
    elif targets is not None:
        selected = _check_part(batch, targets, "targets")
    elif (named := entries(batch)) is not None:
        keys = [key for key in named if key in _TARGET_NAMES]
        if len(keys) != 1:
            names = ", ".join(map(repr, _TARGET_NAMES))
            raise MisconfigurationException(
                f"Expected one entry of the batch to be called {names}, got {describe(batch)}."
            )
        selected = named[keys[0]]
    elif is_sequence(batch) and len(batch) == max(1, _num_required_arguments(model)) + 1:
        selected = batch[-1]
    else:
        raise MisconfigurationException(
            "Expected a batch of the model's inputs and one more element, the labels, or a mapping, got"
            f" {describe(batch)}."
        )
    if not isinstance(selected, Tensor):
        raise MisconfigurationException(f"Expected the labels to be a tensor, got {describe(selected)}.")
    return selected


def replace_floating(result: Any, perturb: Callable[[Tensor], Tensor]) -> Any:
    """What a module returned, with its tensor perturbed: itself, or by the rules of :func:`prepare_call` a part of it.

    Args:
        result: What it returned.
        perturb: Gives the tensor in its place.
    """
    path: Path = ()
    if (named := entries(result)) is not None:  # the first one, as of a tuple: the last hidden state, say
        path = tuple(key for key, value in named.items() if isinstance(value, Tensor) and value.is_floating_point())[:1]
    path = (*path, *_floating_path(part(result, path), "What the submodule (`at=`) returns"))
    return replaced(result, path, perturb(part(result, path)))


def uncompiled(model: nn.Module) -> nn.Module:
    """What ``torch.compile`` has wrapped, whose signature and hooks are not those of the wrapper.

    Args:
        model: A module, compiled or not.
    """
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


# From what a batch became, and the paths to its parts that are perturbed, to the arguments of the model.
_Arguments = Callable[[Any, list[Path]], tuple[tuple[Any, ...], dict[str, Any]]]


def _unpacked(values: Any, paths: list[Path]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return values, {}


def _at_paths(values: Any, paths: list[Path]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return tuple(part(values, path) for path in paths), {}


def _by_name(model: nn.Module, batch: Any, keys: list[Any], perturbs_inputs: bool) -> tuple[list[Any], _Arguments]:
    """Of a mapping or dataclass: by the names of ``forward``, after what is perturbed and has no name there."""
    named = entries(batch)
    assert named is not None
    names = _keyword_names(model, named)
    keys = keys or _default_keys(named, names, perturbs_inputs)
    unnamed = [key for key in keys if key not in names]
    taken = [parameter.name for parameter in _forward_parameters(model)][: len(unnamed)]
    names = [name for name in names if name not in taken]

    def arguments(values: Any, paths: list[Path]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return tuple(part(values, (key,)) for key in unnamed), {name: part(values, (name,)) for name in names}

    return keys, arguments


def _by_place(model: nn.Module, batch: Any, keys: list[Any], perturbs_inputs: bool) -> tuple[list[Any], _Arguments]:
    """Of anything else: what is perturbed, or as many elements as ``forward`` requires, if these are several."""
    if not is_sequence(batch) or not batch:
        return [], _at_paths
    keys = [batch._fields.index(key) if isinstance(key, str) else key % len(batch) for key in keys or [0]]
    num_required = _num_required_arguments(model)
    if not 1 < num_required <= len(batch):
        return keys, _at_paths
    if max(keys) >= num_required:
        raise MisconfigurationException(
            f"`inputs` should be among the elements of the batch that `forward` gets, the first {num_required}, got"
            f" {max(keys)}. Say what it gets with a callable, `inputs=lambda batch: (...)`."
        )
    return keys, lambda values, paths: (tuple(values[:num_required]), {})


def _floating_path(value: Any, what: str = "The input to perturb") -> Path:
    """The way to the tensor that is meant in a nested value."""
    if isinstance(value, Tensor):
        is_dense = value.layout == torch.strided and not value.is_nested
        if not value.is_floating_point() or not is_dense:
            layout = "nested" if value.is_nested else value.layout
            kind = f"{value.dtype}{'' if is_dense else f', not dense ({layout}),'}"
            if value.is_nested:  # which has no shape
                raise MisconfigurationException(f"{what} should be a floating tensor, got {kind[:-1]}.")
            raise MisconfigurationException(
                f"{what} should be a floating tensor, got {kind} of shape {tuple(value.shape)}. Choose another part of"
                " the batch with `inputs=` (a key, an index or a callable), convert it in the data set, or perturb the"
                " output of a submodule (embeddings, say) with `at=`."
            )
        return ()
    if (named := entries(value)) is not None:
        (key,) = _default_keys(named, [], True)
    elif is_sequence(value) and value:
        key = 0
    else:
        raise MisconfigurationException(
            f"The batch should hold a floating tensor to perturb, got {describe(value)}. Choose one with"
            " `inputs=` (a key, an index or a callable)."
        )
    return (key, *_floating_path(part(value, (key,)), what))


def _check_part(batch: Any, key: str | int, argument: str) -> Any:
    """The part of a batch that an argument names."""
    if isinstance(batch, Tensor):
        raise MisconfigurationException(
            f"`{argument}={key!r}` should name a part of the batch, got a batch that is one tensor; leave `{argument}`"
            " out."
        )
    try:
        return part(batch, (key,))
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise MisconfigurationException(
            f"`{argument}={key!r}` should name a part of the batch, got {describe(batch)}."
        ) from error


def _default_keys(named: Mapping[Any, Any], passed: list[str], perturbs_inputs: bool) -> list[Any]:
    """The only entry that can be meant: to be perturbed, or else to be passed to a ``forward`` that names none."""
    tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
    if not perturbs_inputs:
        keys = [key for key in tensors if key not in _TARGET_NAMES]
        return [] if passed or len(keys) != 1 else keys
    keys = [key for key, value in tensors.items() if value.is_floating_point()]
    if len(keys) > 1:  # labels of a regression are floating, too
        keys = [key for key in keys if key not in _TARGET_NAMES] or keys
    if len(keys) != 1:
        found = f"several: {', '.join(map(repr, keys))}" if keys else f"none in {describe(named)}"
        raise MisconfigurationException(
            f"The batch should hold exactly one floating tensor to perturb, got {found}. Choose one with `inputs=`"
            " (a key, an index or a callable), or several with a list of keys. Where inputs can take no noise, perturb"
            " the output of a submodule with `at=`."
        )
    return keys


def _num_required_arguments(model: nn.Module) -> int:
    return num_required(_forward_parameters(model))


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
