"""Tell what passes of a model change of what isolation does not put back."""

import types
from collections import deque
from collections.abc import Mapping
from itertools import chain, starmap
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_sensitivity.model.isolation import PLAIN, all_modules, contents_of

_LARGE = 2**16  # bytes of an array that is not looked at
_MAX_OBJECTS = 2000  # that are looked at
_SKIPPED = (nn.Module, Dataset, DataLoader, types.ModuleType)
_SKIPPED_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric", "logging")  # they change anyway


class Traces:
    """Find what passes of a model leave behind: in its parameters, and in what lies deep in its state.

    Args:
        model: The module, before the passes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        parameters = _parameters_of(model)
        self._versions = _versions_of(parameters)
        self._data = [parameter.data for parameter in parameters.values()]  # held: its memory is not used again
        self._seen: dict[str, Seen] = {}

    def look_deeper(self) -> None:
        """Look at what lies deeper than the items of lists and dicts, for :meth:`find` to compare.

        At most 2,000 objects are looked at, up to 100 of each container, and nothing is copied. Changes within
        large arrays go unnoticed, and so do those by ``tensor.data``.
        """
        self._seen = _look_at(self._model)

    def find(self) -> list[str]:
        """Name the parameters and objects that were written to or replaced since."""
        versions = _versions_of(_parameters_of(self._model))
        now = _look_at(self._model) if self._seen else {}
        written = [name for name, version in self._versions.items() if versions.get(name) != version]
        return written + [name for name, seen in self._seen.items() if seen.differs(now.get(name, seen))]


class Seen(NamedTuple):
    """Hold what is known of an object.

    Attributes:
        value: The object, to compare by identity; None for plain values.
        state: The value, version, length or hash.
    """

    value: object
    state: object

    def differs(self, other: "Seen") -> bool:
        """Return whether an object was replaced or changed; nan does not differ from itself."""
        return self.value is not other.value or (self.state is not other.state and self.state != other.state)


def _versions_of(parameters: Mapping[str, Tensor]) -> dict[str, tuple[int, int]]:
    """Return the version of each parameter, and where its data is."""
    return {name: (_version_of(parameter), parameter.data_ptr()) for name, parameter in parameters.items()}


def _parameters_of(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, also those of modules that torch does not see."""
    return {
        f"{path}.{name}".lstrip("."): parameter
        for path, module in all_modules(model).items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _look_at(model: nn.Module) -> dict[str, Seen]:
    """Return what is known of each object, by a name such as ``"tracker.count"``."""
    found: dict[str, Seen] = {}
    waiting = deque(chain.from_iterable(starmap(contents_of, all_modules(model).items())))
    ids = set[int]()
    while waiting and len(found) < _MAX_OBJECTS:  # what lies less deep comes first
        name, value = waiting.popleft()
        if isinstance(value, PLAIN):
            found[name] = Seen(None, value)
        elif id(value) not in ids and _is_looked_at(value):
            ids.add(id(value))
            found[name] = Seen(value, _state_of(value))
            waiting.extend(contents_of(name, value))
    return found


def _is_looked_at(value: object) -> bool:
    """Return whether an object is looked at: data sets and objects of Lightning are not."""
    packages = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return not isinstance(value, _SKIPPED) and packages.isdisjoint(_SKIPPED_PACKAGES)


def _state_of(value: object) -> object:
    """Return what changes when an object is written to, as far as it is cheap to know."""
    if isinstance(value, Tensor):
        return _version_of(value)
    if isinstance(value, np.ndarray):
        return hash(value.tobytes()) if value.nbytes <= _LARGE else None
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, list | tuple | dict | set | frozenset | deque):
        return len(value)
    return len(getattr(value, "__dict__", ()))


def _version_of(tensor: Tensor) -> int:
    """Count how often a tensor was written to; -1 for those of inference mode, which don't count."""
    return -1 if tensor.is_inference() else tensor._version
