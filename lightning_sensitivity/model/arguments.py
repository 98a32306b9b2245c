"""What a ``forward`` gets of a batch: its arguments by name or by position."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.messages import Refused, Selector, describe
from lightning_sensitivity.model.batches import clone_tensors
from lightning_sensitivity.model.entries import beside_labels, has_one_number, inputs_hint

Arguments = dict[str, object]

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_DEFAULTS = ("torch.nn.modules.module", "lightning.pytorch", "pytorch_lightning")  # where `forward` is nobody's
# Parameters of ``forward`` by module: to read them for each batch takes longer than a small network.
_PARAMETERS: WeakKeyDictionary[nn.Module, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


def find_arguments(model: nn.Module, batch: Any, inputs: Selector | None) -> tuple[bool, Arguments]:
    """Return whether a model gets its arguments by name, and these; see :class:`ModelCall`."""
    if inputs is not None:
        return _chosen_arguments(model, inputs(clone_tensors(batch)))  # which may write to the batch
    if _has_all(model, batch):
        fields: Arguments = batch._asdict()
        return True, {name: value for name, value in fields.items() if name in parameters_of(model)}
    if not isinstance(batch, Mapping):
        return False, by_position(model, _first_elements(model, batch) if is_sequence(batch) else (batch,))
    if takes_only_keywords(model):
        return True, dict(batch)
    named = {name: value for name, value in batch.items() if name in parameters_of(model)}
    return (True, named) if named else (False, by_position(model, (_only_argument(model, batch),)))


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
    kinds = (inspect.Parameter.VAR_POSITIONAL, *_POSITIONAL)
    is_own = not type(original_module(model)).forward.__module__.startswith(_DEFAULTS)
    return is_own and sum(p.kind in kinds for p in parameters_of(model).values()) > len(required_names(model))


def takes_only_keywords(model: nn.Module) -> bool:
    """Return whether ``forward`` takes only ``**kwargs``."""
    return all(p.kind is p.VAR_KEYWORD for p in parameters_of(model).values())


def is_sequence(batch: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a batch has elements by position."""
    return isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence)


def is_pair(model: nn.Module, batch: Sequence[Any]) -> bool:
    """Return whether a batch is ((a, b, ...), y), with as many inputs as ``forward`` requires arguments."""
    count = len(required_names(model))
    if len(batch) != 2 or count < 2 or not is_sequence(batch[0]) or len(batch[0]) != count:
        return False
    return isinstance(batch[1], Tensor) and (count > 2 or has_one_number(batch[1]))


def _has_all(model: nn.Module, batch: object) -> bool:
    """Return whether a named tuple has all that ``forward`` requires."""
    names = required_names(model)
    return bool(names) and set(names) <= {*getattr(batch, "_fields", ())}


def _first_elements(model: nn.Module, batch: Sequence[Any]) -> Sequence[object]:
    return batch[0] if is_pair(model, batch) else batch[: max(1, len(required_names(model)))]


def _chosen_arguments(model: nn.Module, chosen: object) -> tuple[bool, Arguments]:
    """Return the arguments that a function of the user has chosen: one, a tuple, or a dict of those named."""
    if not isinstance(chosen, Mapping):
        return False, by_position(model, chosen if type(chosen) is tuple else (chosen,))
    parameters = parameters_of(model)
    unknown = [name for name in chosen if name not in parameters]
    has_keywords = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if len(unknown) == len(chosen) and not takes_only_keywords(model):
        return False, by_position(model, (chosen,))
    if unknown and not has_keywords:
        names = ", ".join(map(repr, unknown))
        raise Refused(f"`inputs` should return arguments of `forward`, which has none that is called {names}.")
    return True, dict(chosen)


def _only_argument(model: nn.Module, batch: Mapping[str, object]) -> object:
    """Return what a ``forward`` of one argument that names no entry takes: the only tensor, or all."""
    parameters, required, found = parameters_of(model), required_names(model), [*beside_labels(batch).values()]
    takes_any = not required and any(p.kind is p.VAR_POSITIONAL for p in parameters.values())
    annotation = str(parameters[required[0]].annotation) if required else ""
    is_mapping = re.search("dict|mapping", annotation, re.IGNORECASE) is not None
    has_one = len(required) == 1
    if (has_one or takes_any) and len(found) == 1 and isinstance(found[0], Tensor) and not is_mapping:
        return found[0]
    if has_one and (is_mapping or (len(found) > 1 and "Tensor" not in annotation)):
        return batch
    raise Refused(
        f"`inputs` should return the arguments of `forward`, which names none of {describe(batch)}. Select them: "
        f"{inputs_hint(batch)}."
    )
