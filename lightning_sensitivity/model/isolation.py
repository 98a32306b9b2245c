"""Run a model without leaving a trace: in eval mode, without gradients, with its state put back."""

import copy
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain, islice, starmap
from typing import Protocol, TypeVar
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity.compat import collect_rng_states, set_rng_states

T = TypeVar("T")

_LARGE = 2**16  # bytes of a tensor whose clone serves several passes
_LONG = 10_000  # items of a container that is not copied
_MAX_ITEMS = 100  # of a container that are looked at
_OWN = frozenset(vars(nn.Module()))  # what each module has: parameters, buffers, hooks, the mode
_COPIED = {list, dict, set, deque, OrderedDict, defaultdict, Counter}
PLAIN = (bool, int, float, complex, str, bytes, type(None))

# Clones of large tensors, by model and id of the original: memory that is filled anew for each validation.
_LARGE_CLONES: WeakKeyDictionary[nn.Module, dict[int, Tensor]] = WeakKeyDictionary()


class RunIsolated(Protocol):
    """Call a function that runs the model, and leave no trace of it."""

    def __call__(self, function: Callable[..., T], *args: object) -> T:
        """Return what the function returns."""


@contextmanager
def isolated(model: nn.Module) -> Iterator[RunIsolated]:
    """Yield ``run(function, *args)``, which calls a function that runs the model, and leaves no trace.

    Inside, the model is in eval mode, without gradients, and its ``self.log`` does nothing. Every run starts
    from the same buffers, attributes and random states: tensors are cloned, and lists, dicts, sets and deques
    of up to 10,000 items are copied one level deep. After it, the originals are put back; hooks, gradients
    and ``requires_grad``, too. Compiled code runs eagerly, so our passes compile nothing.

    Neither copied nor put back are what lies deeper, parameters (see :class:`~.traces.Traces` for both), and
    what closures and globals hold.

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
    """Return the modules of a model by name, also those in containers, which torch does not see."""
    found: set[nn.Module] = set()
    modules = dict(model.named_modules(found))
    attributes = chain.from_iterable(starmap(contents_of, modules.items()))
    containers = [(name, value) for name, value in attributes if isinstance(value, list | tuple | dict)]
    for name, item in chain.from_iterable(starmap(contents_of, containers)):
        if isinstance(item, nn.Module):
            modules.update(item.named_modules(found, name))
    return modules


class _State:
    """Hold what modules contain, put copies in its place before a run, and the originals back after it."""

    def __init__(self, model: nn.Module, modules: list[nn.Module]) -> None:
        parameters = list(chain.from_iterable(module.parameters(recurse=False) for module in modules))
        self.parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in parameters]
        self.rng_states = collect_rng_states(include_cuda=any(parameter.is_cuda for parameter in parameters))
        self.originals = [(items, dict(items)) for items in chain.from_iterable(map(_dicts_of, modules))]
        self.places = list(chain.from_iterable(map(_places_of, modules)))
        # Set the mode by hand, since modules override `eval()`.
        self.places += [(vars(module), "training", False) for module in model.modules()]
        self.large_clones = _LARGE_CLONES.setdefault(model, {})
        self.versions: dict[int, int] = {}  # of these clones, when they were last filled

    def put_copies(self) -> None:
        torch.clear_autocast_cache()  # of 16-bit copies of weights, which may have changed since
        copies: dict[int, object] = {}  # what several places share stays shared
        with torch.inference_mode(False):  # tensors of inference mode have no version
            for items, name, value in self.places:
                if id(value) not in copies:
                    copies[id(value)] = self._clone(value) if isinstance(value, Tensor) else copy.copy(value)
                items[name] = copies[id(value)]
        for parameter, _, _ in self.parameters:
            parameter.grad = None  # which a `backward()` inside would add to

    def _clone(self, tensor: Tensor) -> Tensor:
        """Clone a tensor; fill the clone of a large one only if the last run has written to it."""
        if tensor.layout != torch.strided or tensor.nbytes <= _LARGE:  # batch norm counts no versions
            return tensor.detach().clone()
        key, like = id(tensor), (tensor.shape, tensor.dtype, tensor.device)
        clone = self.large_clones.get(key)
        if clone is not None and self.versions.get(key) == clone._version:
            return clone
        # Outputs of a run that has written to a clone may be views of it.
        if clone is None or key in self.versions or (clone.shape, clone.dtype, clone.device) != like:
            clone = self.large_clones[key] = torch.empty_like(tensor)
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
            parameter.grad = grad
        set_rng_states(self.rng_states)
        torch.clear_autocast_cache()  # else torch 2.6 goes on with our copies, which have no gradients


def _check_modules(modules: list[nn.Module]) -> None:
    for module in modules:
        if any(map(is_lazy, module.parameters(recurse=False))):
            raise MisconfigurationException("Expected a model with weights, but some are lazy: run it once.")
        if isinstance(module, torch.jit.ScriptModule):
            raise MisconfigurationException("Expected no scripted parts of a model: use Python modules.")


def _dicts_of(module: nn.Module) -> list[dict[str, object]]:
    """List the dicts that a ``forward`` could change: attributes, buffers, parameters, modules, hooks."""
    attributes = vars(module)
    return [attributes, *(attributes[name] for name in _OWN if isinstance(attributes.get(name), dict))]


def _places_of(module: nn.Module) -> list[tuple[dict[str, object], str, object]]:
    """List what a run gets a copy of: the dict that holds each attribute or buffer, its name and value."""
    attributes = vars(module)
    own = [(attributes, name, value) for name, value in _attributes_of(module).items() if _is_copied(value)]
    buffers = [(module._buffers, name, value) for name, value in module._buffers.items() if _is_copied(value)]
    names = ("log", "log_dict") if callable(getattr(module, "log_dict", None)) else ()  # of a LightningModule
    return [*own, *buffers, *((attributes, name, lambda *args, **kwargs: None) for name in names)]


def _is_copied(value: object) -> bool:
    if isinstance(value, Tensor):
        return not isinstance(value, nn.Parameter)
    return type(value) in _COPIED and len(value) <= _LONG  # type: ignore[arg-type]


def _attributes_of(value: object) -> dict[str, object]:
    """Return the attributes of an object; of a module, those that not every module has."""
    attributes = getattr(value, "__dict__", None)
    if not isinstance(attributes, dict):
        return {}
    own = _OWN if isinstance(value, nn.Module) else ()
    return {key: item for key, item in attributes.items() if key not in own}


def contents_of(name: str, value: object) -> list[tuple[str, object]]:
    """List the first items of a container, or the attributes of an object, by name."""
    if not isinstance(value, list | tuple | dict | deque):
        return [(f"{name}.{key}".lstrip("."), item) for key, item in _attributes_of(value).items()]
    items = islice(value.items() if isinstance(value, dict) else enumerate(value), _MAX_ITEMS)
    return [(f"{name}[{_label(key, index)}]", item) for index, (key, item) in enumerate(items)]


def _label(key: object, index: int) -> str:
    """Return how a message names an item: by its key, unless that may be long or slow to print."""
    return repr(key) if isinstance(key, PLAIN) else f"item {index}"


def _eager() -> AbstractContextManager[object]:
    """Run compiled code eagerly, so that our passes compile nothing."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    return torch.compiler.set_stance("force_eager") if is_compiling else nullcontext()
