"""Run a model without leaving a trace: in eval mode, without gradients, with its state put back."""

import copy
import inspect
import random
from abc import ABC
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from types import FunctionType, ModuleType
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity import compat
from lightning_sensitivity.messages import Refused

T = TypeVar("T")


class _Steps(ABC):  # noqa: B024
    """An iterator without attributes, such as a generator or an `itertools.count`, of which nobody sees where it is."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Look at the class alone."""
        return issubclass(other, Iterator) and other.__dictoffset__ == 0


_LARGE = 2**16  # elements of a tensor that is cloned again only where it has changed
_OWN = frozenset(vars(LightningModule()))  # what each module has: parameters, buffers, hooks, the mode
_DICTS = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]
_CONSTANTS = {bool, int, float, str, type(None), torch.device, torch.dtype}
_COLLECTIONS = (list, dict, tuple, deque)
_STREAMS = (random.Random, np.random.Generator, np.random.RandomState)  # of random numbers
# A subclass, too, such as a `Counter`, but for iterators with attributes, which are objects.
_COPIED = (Tensor, torch.Generator, np.ndarray, list, dict, set, deque, *_STREAMS, _Steps)
_OF_THREADS = ("lightning", "pytorch_lightning", "logging", "multiprocessing", "queue", "threading")  # or of others


class RunIsolated(Protocol):
    """Call a function that runs the model, and leave no trace of it."""

    def __call__(self, function: Callable[..., T], *args: object) -> T:
        """Return what the function returns."""


@contextmanager
def isolated(model: nn.Module) -> Iterator[RunIsolated]:
    """Yield ``run(function, *args)``, which calls a function that runs the model, and leaves no trace.

    Inside, the model is in eval mode, or in the modes that its own hook ``on_validation_model_eval`` sets,
    without gradients, and its ``self.log`` does nothing. Every run starts from the same buffers, attributes
    and random state of torch: tensors, arrays and generators are cloned, and lists, dicts, sets and deques are
    copied one level deep, also those that are attributes of an object that a module holds. A large tensor is
    cloned once for all runs, and again only after a run that has written to the clone. After a run, the
    originals are put back; hooks, too. The random streams of Python and NumPy are put back at the end. Compiled
    code runs eagerly, so that our passes compile nothing.

    What lies deeper, and what closures and globals hold, is neither copied nor put back. Nor are parameters,
    tensors in collections, and iterators, but ``run`` raises MisconfigurationException if one was written to,
    or advanced.

    Args:
        model: The module.

    Raises:
        MisconfigurationException: If it has lazy weights or scripted parts.
    """
    if any(map(is_lazy, [*model.parameters(), *model.buffers()])):
        raise Refused("Expected a model with weights, but some are lazy: run it once.", "unsupported")
    if _has_scripts(model):
        raise Refused("Expected no scripted parts of a model: use Python modules.", "unsupported")
    state = _State(model)

    def run(function: Callable[..., T], *args: object) -> T:
        with torch.random.fork_rng(state.devices, device_type="cuda"):
            try:
                state.put_copies()
                result = function(*args)
            finally:
                state.restore()
        state.check_writes()
        return result

    try:
        with (
            same_streams(),
            torch.random.fork_rng(state.devices, device_type="cuda"),
            torch.no_grad(),
            compat.eager(),
        ):
            yield run
    finally:
        state.restore()  # a run whose own `restore` was interrupted


def _has_scripts(model: nn.Module) -> bool:
    """Return whether a part of a model is scripted, whose attributes can't be put back."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


@contextmanager
def same_streams() -> Iterator[None]:
    """Put the random streams of torch on the CPU, NumPy and Python back, also after Ctrl-C."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def isolated_with(model: nn.Module, function: object) -> Iterator[RunIsolated]:
    """Yield what :func:`isolated` does, and put back the modules of a function of the user, too.

    Args:
        model: The module.
        function: A function, such as a loss: a module, a method of one, or with some in its closure or globals.
    """
    known = [function, getattr(function, "__self__", None)]
    if inspect.isfunction(function):
        outside = inspect.getclosurevars(function)
        known += [*outside.nonlocals.values(), *outside.globals.values()]
    modules = {each for each in known if isinstance(each, nn.Module) and not _has_scripts(each)} - {model}
    with ExitStack() as stack:
        runs = [stack.enter_context(isolated(module)) for module in (model, *modules)]
        yield lambda call, *args: reduce(lambda inner, run: partial(run, inner), runs, call)(*args)


class _Place(NamedTuple):
    """An attribute or a buffer of which a run gets a copy.

    Attributes:
        holder: The dict that has it, of a module or an object.
        name: Its name there.
        value: The original.
    """

    holder: dict[str, Any]
    name: str
    value: object


class _Weight(NamedTuple):
    """A parameter as it was; that it is trained, and its gradient, are no business of a pass."""

    name: str
    parameter: nn.Parameter
    num_writes: int | None
    requires_grad: bool
    grad: Tensor | None
    num_writes_of_grad: int | None


class _State:
    """The contents of modules: copies take their place before a run, and they are put back after it."""

    def __init__(self, model: nn.Module) -> None:
        self.weights = [
            _Weight(name, each, _count_writes(each), each.requires_grad, each.grad, _count_writes(each.grad))
            for name, each in model.named_parameters()
        ]
        self.devices = sorted({each.parameter.get_device() for each in self.weights if each.parameter.is_cuda})
        # The dicts that a `forward` could change: attributes, buffers, parameters, modules and hooks of each module,
        # and the attributes of objects that it holds.
        self.originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.places: list[_Place] = []
        self.watched: list[tuple[str, Tensor, int | None]] = []  # tensors in collections, and the writes to each
        self.clones: dict[int, tuple[Tensor, int | None]] = {}  # of tensors, and the writes to each so far
        for module in model.modules():
            attributes = vars(module)
            dicts = [attributes, *(attributes[name] for name in _DICTS if name in attributes)]
            own = {name: value for name, value in attributes.items() if name not in _OWN}
            self._add(attributes, own)
            self._add(module._buffers, module._buffers)
            for held in filter(_is_object, own.values()):
                self._add(vars(held), vars(held))
                dicts.append(vars(held))
            self.originals += [(each, dict(each)) for each in dicts]
        for module, mode in _modes_of(model).items():  # modules may override `eval()`
            self.places.append(_Place(vars(module), "training", mode))
            if callable(getattr(type(module), "log_dict", None)):  # a LightningModule is silent
                self.places += [_Place(vars(module), name, _log_nothing) for name in ("log", "log_dict")]

    def _add(self, holder: dict[str, Any], contents: Mapping[str, object]) -> None:
        """Note what a module or an object has that a run gets copies of, and tensors that it has to leave alone."""
        for name, value in contents.items():
            if type(value) not in _CONSTANTS:
                if isinstance(value, _COPIED) and not isinstance(value, nn.Parameter):
                    self.places.append(_Place(holder, name, value))
                if isinstance(value, _COLLECTIONS):
                    items = value.values() if isinstance(value, dict) else value
                    tensors = [x for x in items if isinstance(x, Tensor) and not isinstance(x, nn.Parameter)]
                    self.watched += [(name, x, _count_writes(x)) for x in tensors]

    def put_copies(self) -> None:
        """Put copies in the place of what a run may change."""
        torch.clear_autocast_cache()  # of 16-bit copies of weights, which may have changed since
        copies: dict[int, object] = {}  # what several places share stays shared
        for holder, name, value in self.places:
            if type(value) in _CONSTANTS:
                holder[name] = value
                continue
            if id(value) not in copies:
                copies[id(value)] = self._copy(name, value)
            holder[name] = copies[id(value)]

    def _copy(self, name: str, value: object) -> object:
        """Copy a value; a large tensor only if the last run has written to its clone."""
        if isinstance(value, Tensor):
            clone, writes = self.clones.get(id(value), (value, None))
            if value.numel() <= _LARGE or writes is None or _count_writes(clone) != writes:
                clone = value.detach().clone()
                self.clones[id(value)] = clone, _count_writes(clone)
            return clone
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, _STREAMS):
            return copy.deepcopy(value)
        if isinstance(value, np.ndarray) and value.size > _LARGE:  # which is not copied, but may be read
            view = value.view()
            view.flags.writeable = False
            return view
        return _NoIterator(name) if isinstance(value, Iterator) else copy.copy(value)

    def restore(self) -> None:
        """Put the originals back."""
        for items, originals in filter(any, self.originals):  # most are empty, such as those of hooks
            if list(items) != list(originals):  # new names, or another order of parameters and buffers
                items.clear()
            items.update(originals)
        for weight in self.weights:
            if weight.parameter.requires_grad != weight.requires_grad:
                weight.parameter.requires_grad_(weight.requires_grad)
            if weight.parameter.grad is not weight.grad:
                weight.parameter.grad = weight.grad
        torch.clear_autocast_cache()  # else torch 2.6 goes on with our copies, which have no gradients

    def check_writes(self) -> None:
        """Raise MisconfigurationException if a run has written to a parameter, or to what else is not copied."""
        names = [each.name for each in self.weights if _count_writes(each.parameter) != each.num_writes]
        names += [f"a tensor in `{name}`" for name, x, writes in self.watched if _count_writes(x) != writes]
        changed = [each for each in self.weights if _count_writes(each.grad) != each.num_writes_of_grad]
        names += [f"the gradient of {each.name}" for each in changed]
        if names:
            raise _not_restored(f"writes to {', '.join(names[:3])}")


class _NoIterator(Iterator[Any]):
    """Stands in for an iterator, which nobody can put back."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __next__(self) -> Any:
        """Refuse to go on."""
        raise _not_restored(f"advances the iterator `{self._name}`")


def _not_restored(what: str) -> Refused:
    return Refused(
        f"`forward` {what} in eval mode, which is not restored: do so only `if self.training`, or in a hook, such as "
        "`on_train_batch_end`.",
        entry="state",
    )


def _log_nothing(*args: object, **kwargs: object) -> None:
    """Log nothing, in the place of ``self.log``."""


def _is_object(value: Any) -> bool:
    """Return whether a value is an object of a class of its own, whose attributes a run may change."""
    if type(value) in _CONSTANTS or isinstance(value, (*_COPIED, nn.Module, type, FunctionType, ModuleType)):
        return False
    return isinstance(getattr(value, "__dict__", None), dict) and not type(value).__module__.startswith(_OF_THREADS)


def _modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Return the modes in which modules validate: eval mode, unless a LightningModule says otherwise by its hook."""
    of_run = compat.original_module(model)
    own = getattr(type(of_run), "on_validation_model_eval", None)
    if own is None or own.__module__.startswith(("lightning.pytorch", "pytorch_lightning")):
        return dict.fromkeys(model.modules(), False)
    before = {module: module.training for module in model.modules()}
    try:
        own(of_run)
        return {module: module.training for module in before}
    finally:
        for module, mode in before.items():
            module.training = mode


def _count_writes(tensor: Tensor | None) -> int | None:
    """Count the writes to a tensor, but not those to its ``data``; None in inference mode, where torch counts none."""
    return None if tensor is None or tensor.is_inference() else tensor._version
