"""Run a model without leaving a trace: in eval mode, without gradients, with its state put back."""

import collections
import copy
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, islice
from typing import NamedTuple, Protocol, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import DataLoader, Dataset

from lightning_sensitivity.compat import clear_autocast_cache, collect_rng_states, set_rng_states

T = TypeVar("T")

_LARGE = 2**16  # bytes of an array that is not looked at, or of a tensor whose clone serves several passes
_LONG = 10_000  # items of a container that is not copied
_MAX_OBJECTS = 2000  # in a fingerprint
_MAX_ITEMS = 100  # of a container, in a fingerprint
_OWN = frozenset(vars(nn.Module()))  # what each module has: parameters, buffers, hooks, the mode
_COPIED = (list, dict, set, collections.deque, collections.OrderedDict, collections.defaultdict, collections.Counter)
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_SKIPPED = (nn.Module, Dataset, DataLoader, types.ModuleType)
_SKIPPED_PACKAGES = ("lightning", "pytorch_lightning", "lightning_fabric", "logging")  # they change anyway


# Clones of large tensors, by their model and the id of the original: memory that is filled anew for each validation.
_LARGE_CLONES: WeakKeyDictionary[nn.Module, dict[int, Tensor]] = WeakKeyDictionary()


class RunIsolated(Protocol):
    """Call a function that runs the model, and leave no trace of it."""

    def __call__(self, function: Callable[..., T], *args: object) -> T:
        """Return what the function returns."""


class Seen(NamedTuple):
    """What a fingerprint knows of an object.

    Attributes:
        value: The object, to compare by identity; None for plain values.
        state: The value, version, length or hash.
    """

    value: object
    state: object

    def differs(self, other: "Seen") -> bool:
        """Return whether an object was replaced or changed; nan does not differ from itself."""
        return self.value is not other.value or (self.state is not other.state and self.state != other.state)


@contextmanager
def isolated(model: nn.Module) -> Iterator[RunIsolated]:
    """Yield ``run(function, *args)``, which calls a function that runs the model, and leaves no trace.

    Inside, the model is in eval mode, without gradients, and its ``self.log`` does nothing. Every run starts
    from the same buffers, attributes and random states: tensors are cloned, and lists, dicts, sets and deques
    of up to 10,000 items are copied one level deep. After it, the originals are put back; hooks, gradients
    and ``requires_grad``, too. Compiled code runs eagerly, so our passes compile nothing.

    Neither copied nor put back are what lies deeper, see :func:`fingerprint`; parameters, see
    :func:`parameter_versions`; and what closures and globals hold.

    Args:
        model: The module.

    Raises:
        MisconfigurationException: If it has lazy weights or scripted parts.
    """
    modules = list(all_modules(model).values())
    _check_modules(modules)
    state = _State(model, modules)

    def run(function: Callable[..., T], *args: object) -> T:
        try:
            state.put_copies()
            return function(*args)
        finally:
            state.restore()

    with torch.no_grad(), _eager():
        yield run


def forget_clones(model: nn.Module) -> None:
    """Free the clones of large tensors that passes of a model have left for the next ones."""
    _LARGE_CLONES.pop(model, None)


def all_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by name, also those in lists, tuples and dicts, which PyTorch does not see."""
    modules = dict(model.named_modules())
    visible = set(modules.values())
    attributes = [pair for name, module in modules.items() for pair in _contents(name, module)]
    lists = [pair for pair in attributes if isinstance(pair[1], list | tuple | dict)]
    for path, item in chain.from_iterable(_contents(name, value) for name, value in lists):
        if isinstance(item, nn.Module) and item not in visible:
            modules.update(item.named_modules(prefix=path))
    return modules


def parameter_versions(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Return, for each parameter by name, its version, and its data, so that its memory is not used again."""
    named = [
        (f"{name}.{key}" if name else key, parameter)
        for name, module in all_modules(model).items()
        for key, parameter in module._parameters.items()
    ]
    return {name: (p._version, p.data) for name, p in named if p is not None and not p.is_inference()}


def written_parameters(before: Mapping[str, tuple[int, Tensor]], after: Mapping[str, tuple[int, Tensor]]) -> list[str]:
    """Name the parameters that were written to, or got other data, between two calls of :func:`parameter_versions`."""
    written = []
    for name, (version, data) in before.items():
        version_after, data_after = after.get(name, (-1, data))
        if version != version_after or data.data_ptr() != data_after.data_ptr():
            written.append(name)
    return written


def fingerprint(model: nn.Module) -> dict[str, Seen]:
    """Look at what a model holds, to tell what a pass changes of what :func:`isolated` does not put back.

    This is what lies deeper than the items of its own lists and dicts: what these items hold, and attributes
    of other objects. At most 2,000 objects are looked at, up to 100 of each container, and nothing is copied.
    Changes within large arrays go unnoticed, and so do those by ``tensor.data``.

    Args:
        model: The module.

    Returns:
        What is known of each object, by a name such as ``"tracker.count"``.
    """
    found: dict[str, Seen] = {}
    modules = all_modules(model).items()
    waiting = collections.deque(pair for name, module in modules for pair in _contents(name, module))
    ids = set[int]()
    while waiting and len(found) < _MAX_OBJECTS:  # what lies less deep comes first
        name, value = waiting.popleft()
        if isinstance(value, _PLAIN):
            found[name] = Seen(None, value)
        elif id(value) not in ids and _is_looked_at(value):
            ids.add(id(value))
            found[name] = Seen(value, _state_of(value))
            waiting.extend(_contents(name, value))
    return found


def changed_names(before: Mapping[str, Seen], after: Mapping[str, Seen]) -> list[str]:
    """Name what changed between two calls of :func:`fingerprint`."""
    return [name for name, seen in before.items() if name in after and seen.differs(after[name])]


class _State:
    """Hold what modules contain, put copies in its place before a run, and the originals back after it."""

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        parameters = [parameter for module in modules for parameter in module.parameters(recurse=False)]
        self.parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
        self.rng_states = collect_rng_states(include_cuda=any(parameter.is_cuda for parameter in parameters))
        self.originals = [(items, dict(items)) for module in modules for items in _dicts_of(module)]
        self.attributes = [vars(module) for module in model.modules()]  # since modules override `eval()`
        self.logs = [vars(module) for module in modules if hasattr(module, "log_dict")]  # of LightningModules
        self.places = list(chain.from_iterable(map(_places_of, modules)))
        self.large_clones = _LARGE_CLONES.setdefault(model, {})
        self.versions: dict[int, int] = {}  # of these clones, when they were last filled

    def put_copies(self) -> None:
        clear_autocast_cache()  # of 16-bit copies of weights, which may have changed since
        copies: dict[int, object] = {}  # what several places share stays shared
        with torch.inference_mode(False):  # tensors of inference mode have no version
            for items, name, value in self.places:
                if id(value) not in copies:
                    copies[id(value)] = self._clone(value) if isinstance(value, Tensor) else copy.copy(value)
                items[name] = copies[id(value)]
        for parameter, _, grad in self.parameters:
            if grad is not None:  # which a `backward()` inside would add to
                parameter.grad = None
        for attributes in self.attributes:
            attributes["training"] = False
        for attributes in self.logs:
            attributes.update(log=_do_nothing, log_dict=_do_nothing)

    def _clone(self, tensor: Tensor) -> Tensor:
        """Clone a tensor; fill the clone of a large one only if the last run has written to it."""
        if tensor.layout != torch.strided or tensor.nbytes <= _LARGE:  # batch norm counts no versions
            return tensor.detach().clone()
        key = id(tensor)
        clone = self.large_clones.get(key)
        if clone is None or (clone.shape, clone.dtype, clone.device) != (tensor.shape, tensor.dtype, tensor.device):
            clone = self.large_clones[key] = torch.empty_like(tensor)
        if self.versions.get(key) != clone._version:
            clone.copy_(tensor.detach())
            self.versions[key] = clone._version
        return clone

    def restore(self) -> None:
        for items, originals in self.originals:
            if list(items) != list(originals):  # new names, or another order of parameters and buffers
                items.clear()
            items.update(originals)
        for parameter, requires_grad, grad in self.parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
        set_rng_states(self.rng_states)
        clear_autocast_cache()  # in torch 2.6, training would go on with our copies, which have no gradients


def _check_modules(modules: list[nn.Module]) -> None:
    for module in modules:
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise MisconfigurationException("Expected a model with weights, but some are lazy: run it once.")
        if isinstance(module, torch.jit.ScriptModule):
            raise MisconfigurationException(
                "Expected a model whose state can be restored, but a part of it is scripted (torch.jit): "
                "use the Python module it was made from."
            )


def _dicts_of(module: nn.Module) -> list[dict[str, object]]:
    """List the dicts that a ``forward`` could change: attributes, buffers, parameters, modules, hooks."""
    attributes = vars(module)
    return [attributes, *(attributes[name] for name in _OWN if isinstance(attributes.get(name), dict))]


def _places_of(module: nn.Module) -> list[tuple[dict[str, object], str, object]]:
    """List attributes and buffers that are copied for a run: the dict that holds each, its name and value."""
    own = [(vars(module), name, value) for name, value in vars(module).items() if name not in _OWN]
    buffers = [(module._buffers, name, value) for name, value in module._buffers.items()]
    return [place for place in (*own, *buffers) if _is_copied(place[2])]


def _is_copied(value: object) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    return type(value) in _COPIED and len(value) <= _LONG  # type: ignore[arg-type]


def _contents(name: str, value: object) -> list[tuple[str, object]]:
    """List the first items of a container, or the attributes of an object, by name."""
    if isinstance(value, list | tuple | collections.deque):
        return [(f"{name}[{index}]", item) for index, item in enumerate(islice(value, _MAX_ITEMS))]
    if isinstance(value, dict):
        items = enumerate(islice(value.items(), _MAX_ITEMS))
        return [(f"{name}[{_label(key, index)}]", item) for index, (key, item) in items]
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return []
    own = _OWN if isinstance(value, nn.Module) else ()
    return [(f"{name}.{key}".lstrip("."), item) for key, item in attributes.items() if key not in own]


def _label(key: object, index: int) -> str:
    """Return how a message names an item of a dict: by its key, unless that may be long or slow to print."""
    return repr(key) if isinstance(key, _PLAIN) else f"item {index}"


def _is_looked_at(value: object) -> bool:
    """Return whether an object is part of a fingerprint: data sets and objects of Lightning are not."""
    packages = {base.__module__.partition(".")[0] for base in type(value).__mro__}
    return not isinstance(value, _SKIPPED) and packages.isdisjoint(_SKIPPED_PACKAGES)


def _state_of(value: object) -> object:
    """Return what changes when an object is written to, as far as it is cheap to know."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else value._version
    if isinstance(value, np.ndarray):
        return hash(value.tobytes()) if value.nbytes <= _LARGE else None
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, list | tuple | dict | set | frozenset | collections.deque):
        return len(value)
    return len(getattr(value, "__dict__", ()))


def _eager() -> AbstractContextManager[object]:
    """Run compiled code eagerly, so that our passes compile nothing."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    return torch.compiler.set_stance("force_eager") if is_compiling else nullcontext()


def _do_nothing(*args: object, **kwargs: object) -> None:
    pass
