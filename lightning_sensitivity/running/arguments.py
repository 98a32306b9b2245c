"""What a ``forward`` gets of a batch, by name or by position; and where the labels are: what it does not take."""

import inspect
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.messages import Refused, Selector, describe, refuse_on_error
from lightning_sensitivity.running.batches import clone_tensors, entry
from lightning_sensitivity.running.entries import TARGET_NAMES, beside_labels, has_one_number, inputs_hint, targets_hint

Arguments = dict[str, object]

_ANY, _KEYWORDS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_DEFAULTS = ("torch.nn.modules.module", "lightning.pytorch", "pytorch_lightning")  # where `forward` is nobody's
# Parameters of ``forward`` by module: to read them for each batch takes longer than a small network.
_PARAMETERS: WeakKeyDictionary[nn.Module, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def find_arguments(model: nn.Module, batch: Any, inputs: Selector | None) -> tuple[bool, Arguments]:
    """Return whether a model gets its arguments by name, and these; see :class:`ModelCall`."""
    if inputs is not None:
        return _chosen_arguments(model, inputs(clone_tensors(batch)))  # which may write to the batch
    names = required_names(model)
    has_all = len(names) > 0 and set(names) <= {*getattr(batch, "_fields", ())}  # a named tuple
    entries = batch._asdict() if has_all else batch
    if not isinstance(entries, Mapping):
        return False, by_position(model, split_elements(model, batch)[0] if is_sequence(batch) else (batch,))
    if takes_only_keywords(model):
        return True, dict(entries)
    named = {name: value for name, value in entries.items() if name in parameters_of(model)}
    return (True, named) if named else (False, by_position(model, (_only_argument(model, entries),)))


def by_position(model: nn.Module, values: Sequence[object]) -> Arguments:
    """Name arguments that are given by position; those of ``*args`` by numbers."""
    return dict(zip([*parameters_of(model), *map(str, range(len(values)))], values, strict=False))


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the ``forward`` of a module, compiled or not, by name."""
    module = original_module(model)
    if module not in _PARAMETERS:
        _PARAMETERS[module] = inspect.signature(module.forward).parameters
    return _PARAMETERS[module]


def required_names(model: nn.Module) -> list[str]:
    """List the names of the positional arguments that ``forward`` requires."""
    return [name for name, p in parameters_of(model).items() if p.default is p.empty and p.kind in _POSITIONAL]


def has_options(model: nn.Module) -> bool:
    """Return whether a ``forward`` of one's own takes more arguments by position than it requires."""
    is_own = not type(original_module(model)).forward.__module__.startswith(_DEFAULTS)
    return is_own and sum(kind in (_ANY, *_POSITIONAL) for kind in _kinds(model)) > len(required_names(model))


def takes_only_keywords(model: nn.Module) -> bool:
    """Return whether ``forward`` takes only ``**kwargs``."""
    return {*_kinds(model)} <= {_KEYWORDS}


def is_sequence(batch: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a batch has elements by position."""
    return isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence)


def as_tuple(chosen: object) -> tuple[object, ...]:
    """Return what a function of the user returns as several values, of which a tuple has more than one."""
    return chosen if type(chosen) is tuple else (chosen,)


def split_elements(model: nn.Module, batch: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the inputs, as many elements as ``forward`` requires, or those of a in (a, y), and what follows."""
    count = max(1, len(required_names(model)))
    may_be_pair = len(batch) == 2 and count >= 2 and is_sequence(batch[0]) and len(batch[0]) == count
    if may_be_pair and isinstance(batch[1], Tensor) and (count > 2 or has_one_number(batch[1])):
        return batch[0], batch[1:]
    return batch[:count], batch[count:]


def _kinds(model: nn.Module) -> list[object]:
    return [p.kind for p in parameters_of(model).values()]


def _chosen_arguments(model: nn.Module, chosen: object) -> tuple[bool, Arguments]:
    """Return the arguments that a function of the user has chosen: one, a tuple, or a dict of those named."""
    if not isinstance(chosen, Mapping):
        return False, by_position(model, as_tuple(chosen))
    unknown = [name for name in chosen if name not in parameters_of(model)]
    if len(unknown) == len(chosen) and not takes_only_keywords(model):
        return False, by_position(model, (chosen,))
    if unknown and _KEYWORDS not in _kinds(model):
        names = ", ".join(map(repr, unknown))
        raise Refused(f"`inputs` should return arguments of `forward`, which has none that is called {names}.")
    return True, dict(chosen)


def _only_argument(model: nn.Module, batch: Mapping[str, object]) -> object:
    """Return what a ``forward`` of one argument that names no entry takes: the only tensor, or all.

    Its annotation says which, if there is one.
    """
    required, found = required_names(model), [*beside_labels(batch).values()]
    takes_tensor = not required and _ANY in _kinds(model)
    takes_all = False
    if len(required) == 1:
        annotation = str(parameters_of(model)[required[0]].annotation)
        is_mapping = re.search("dict|mapping", annotation, re.IGNORECASE) is not None
        takes_tensor = not is_mapping
        takes_all = is_mapping or ("Tensor" not in annotation and len(found) > 1)
    if takes_tensor and len(found) == 1 and isinstance(found[0], Tensor):
        return found[0]
    if takes_all:
        return batch
    raise Refused(
        f"`inputs` should return the arguments of `forward`, which names none of {describe(batch)}. Select them: "
        f"{inputs_hint(batch)}."
    )


# Labels


def select_targets(model: nn.Module, batch: Any, targets: Selector | None = None) -> Tensor:
    """Select the labels in a batch.

    Args:
        model: The module, whose ``forward`` says how many elements of a batch are inputs.
        batch: What the loader gave. A function ``targets`` gets a copy of its tensors.
        targets: A function ``batch -> tensor``. By default, the labels are the only entry, field or attribute
            that is called ``label``, ``labels``, ``target``, ``targets``, ``y``, ``Y`` or ``class``; otherwise
            the element of a tuple or list that follows the inputs of ``forward``, if no other one may be it.

    Raises:
        MisconfigurationException: If it is not clear where the labels are, or they are not a tensor.
    """
    if targets is None:
        selected = _find_targets(model, batch)
    else:
        with refuse_on_error(f"`targets` failed on {describe(batch)}"):
            selected = targets(clone_tensors(batch))
    if not isinstance(selected, Tensor):
        rest = split_elements(model, batch)[1] if is_sequence(batch) else ()
        hint = "" if targets else targets_hint(batch, rest or batch)
        raise Refused(f"`targets` should return the labels{hint} from {describe(batch)}.")
    return selected


def has_targets(model: nn.Module, batch: object) -> bool:
    """Return whether it is clear where the labels in a batch are."""
    return isinstance(_find_targets(model, batch), Tensor)


def _find_targets(model: nn.Module, batch: object) -> object:
    """Find the labels by name or position; None if it is not clear where they are."""
    names = set(TARGET_NAMES).difference(required_names(model) if isinstance(batch, tuple) else ())
    found = [value for value in map(partial(entry, batch), names) if isinstance(value, Tensor)]
    if found or not is_sequence(batch):
        return found[0] if len(found) == 1 else None
    rest = split_elements(model, batch)[1]  # what follows the inputs
    has_choice = len(rest) > 1 and (any(isinstance(x, Tensor) for x in rest[1:]) or has_options(model))
    return rest[0] if rest and not has_choice else None
