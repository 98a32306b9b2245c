"""Run a model without leaving a trace: in eval mode, without gradients, with its state put back."""

import copy
import inspect
import math
import random
from abc import ABC
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FunctionType, ModuleType
from typing import Any, Protocol, TypeVar
from weakref import ProxyTypes

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity import compat
from lightning_sensitivity.functional.tensors import wide_dtype
from lightning_sensitivity.messages import Refused, describe_error

T = TypeVar("T")


_LARGE = 2**16  # elements of a tensor that is cloned again only where it has changed; an array of more is not copied
_OWN = frozenset(vars(LightningModule()))  # what each module has: parameters, buffers, hooks, the mode
_DICTS = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]
_WITH_NORM = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_OF_THREADS = {"lightning", "pytorch_lightning", "logging", "multiprocessing", "queue", "threading"}  # not to copy


class RunIsolated(Protocol):
    """A way to call a function that runs the model, without a trace of it."""

    def __call__(self, function: Callable[..., T], *args: object) -> T:
        """Return what the function returns."""


@contextmanager
def isolated(model: nn.Module, *others: nn.Module) -> Iterator[RunIsolated]:
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
    or advanced; of the ``data`` of parameters, the end of all runs tells by their norms.

    Args:
        model: The module.
        others: More modules that the function may run.

    Raises:
        MisconfigurationException: If one has lazy weights or scripted parts, or has written to its parameters.
    """
    roots = (*others, model)
    for each in roots:
        if any(map(is_lazy, [*each.parameters(), *each.buffers()])):
            raise Refused("Expected a model with weights, but some are lazy: run it once.", "unsupported")
        if _has_scripts(each):
            raise Refused("Expected no scripted parts of a model: use Python modules.", "unsupported")
    state = _State(roots)

    def run(function: Callable[..., T], *args: object) -> T:
        with torch.random.fork_rng(state.devices, device_type="cuda"):
            try:
                state.put_copies()
                result = function(*args)
            except ValueError as error:
                if "read-only" in str(error):
                    raise _not_restored("writes to a large array") from error
                raise
            finally:
                state.restore()
        state.check_writes()
        return result

    try:
        with same_streams(state.devices), torch.no_grad(), compat.eager():
            yield run
    finally:
        state.restore()  # a run whose own `restore` was interrupted
    state.check_norms()


def call_plainly(function: Callable[..., T], *args: object) -> T:
    """Call a function that runs nothing of a user, in place of what :func:`isolated` yields."""
    return function(*args)


def _has_scripts(model: nn.Module) -> bool:
    """Return whether a part of a model is scripted, whose attributes can't be put back."""
    return any(isinstance(module, torch.jit.ScriptModule) for module in model.modules())


@contextmanager
def same_streams(devices: Iterable[int] = ()) -> Iterator[None]:
    """Put the random streams of torch on the CPU and on GPUs, NumPy and Python back, also after Ctrl-C."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices, device_type="cuda"):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def isolated_with(model: nn.Module, function: object) -> AbstractContextManager[RunIsolated]:
    """Do as :func:`isolated`, and put back the modules of a function of the user, too.

    Args:
        model: The module.
        function: A function, such as a loss: a module, a method of one, or with some in its closure or globals.
    """
    values = [function, getattr(function, "__self__", None)]
    if inspect.isfunction(function):
        outside = inspect.getclosurevars(function)
        values += [*outside.nonlocals.values(), *outside.globals.values()]
    modules = {each for each in values if isinstance(each, nn.Module) and not _has_scripts(each)}
    return isolated(model, *(modules - {model}))


# How a run gets a copy of a value


class _Steps(ABC):  # noqa: B024
    """An iterator of Python's own, such as a generator or an `itertools.count`, whose position can't be read."""

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Look at the class alone."""
        is_own = other.__module__ in ("builtins", "itertools") and other not in ProxyTypes
        return is_own and issubclass(other, Iterator)


class _NoIterator(Iterator[Any]):
    """A stand-in for an iterator, which nobody can put back."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __next__(self) -> Any:
        """Refuse to go on."""
        raise _not_restored(f"advances the iterator `{self._name}`")


def _array(value: Any) -> object:
    """Copy an array; a large one is not copied, but may be read."""
    if value.size <= _LARGE:
        return copy.copy(value)
    view = value.view()
    view.flags.writeable = False
    return view


# The first kind that fits counts, also of a subclass, such as a `Counter`; but iterators with attributes are objects.
_COPIES: list[tuple[Any, Callable[[str, Any], object]]] = [
    (torch.Generator, lambda name, value: value.clone_state()),
    (random.SystemRandom, lambda name, value: value),  # without a state
    ((random.Random, np.random.Generator, np.random.RandomState), lambda name, value: copy.deepcopy(value)),
    (np.ndarray, lambda name, value: _array(value)),
    (_Steps, lambda name, value: _NoIterator(name)),
    ((list, dict, set, deque), lambda name, value: copy.copy(value)),
]


def _log_nothing(*args: object, **kwargs: object) -> None:
    """Log nothing, in the place of ``self.log``."""


_SILENT = {"log": _log_nothing, "log_dict": _log_nothing}


class _State:
    """The contents of modules: copies take their place before a run, and they are put back after it."""

    def __init__(self, roots: tuple[nn.Module, ...]) -> None:
        # The dicts that a `forward` could change: attributes, buffers, parameters, modules and hooks of each module,
        # and the attributes of objects that it holds.
        self.originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
        # Attributes and buffers: the dict that has one, its name there, the original, and what makes a copy.
        self.copied: list[tuple[dict[str, Any], str, object, Callable[[str, Any], object]]] = []
        self.clones: dict[int, tuple[Tensor, int | None]] = {}  # of tensors, and the writes to each so far
        self.watched: list[tuple[str, Tensor, int | None]] = []  # tensors that are not copied, and the writes to each
        weights = {parameter: name for root in roots for name, parameter in root.named_parameters()}
        self.registered = set(map(id, weights))
        self._watch((name, parameter) for parameter, name in weights.items())
        for module in {module: None for root in roots for module in root.modules()}:
            attributes = vars(module)
            own = {name: value for name, value in attributes.items() if name not in _OWN}
            held = [vars(value) for value in own.values() if _is_object(value)]
            self._add(attributes, own)
            self._add(module._buffers, module._buffers)
            for each in held:
                self._add(each, each)
            dicts = [attributes, *(attributes[name] for name in _DICTS if name in attributes), *held]
            self.originals += [(each, dict(each)) for each in dicts]
        # Modes are set one by one, since modules may override `eval()`; a LightningModule is silent.
        modes = {module: mode for root in roots for module, mode in _modes_of(root).items()}
        self.fixed: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module, mode in modes.items():
            is_lightning = callable(getattr(type(module), "log_dict", None))
            self.fixed.append((vars(module), {"training": mode, **(_SILENT if is_lightning else {})}))
        # A pass may neither change a gradient nor whether a parameter is trained.
        self.trained = [(each, each.requires_grad, each.grad) for each in weights]
        self._watch((f"the gradient of {name}", each.grad) for each, name in weights.items() if each.grad is not None)
        self.devices = sorted({each.get_device() for each in weights if each.is_cuda})
        dense = [x for x in weights if x.layout == torch.strided and not x.is_nested]
        self.dense = {x: weights[x] for x in dense if x.dtype in _WITH_NORM}
        self.norms = self._norms()

    def _watch(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Note tensors that a run has to leave alone."""
        self.watched += [(name, x, _count_writes(x)) for name, x in tensors]

    def _add(self, holder: dict[str, Any], contents: Mapping[str, object]) -> None:
        """Note what a module or an object has that a run gets copies of, and tensors that it has to leave alone."""
        for name, value in contents.items():
            if isinstance(value, Tensor):
                if not isinstance(value, nn.Parameter):
                    self.copied.append((holder, name, value, self._clone))
                continue
            ways = [make_copy for kind, make_copy in _COPIES if isinstance(value, kind)]
            self.copied += [(holder, name, value, make_copy) for make_copy in ways[:1]]
            if isinstance(value, list | dict | tuple | deque):
                items = value.values() if isinstance(value, dict) else value
                tensors = [x for x in items if isinstance(x, Tensor) and id(x) not in self.registered]
                self._watch((f"a tensor in `{name}`", x) for x in tensors)

    def put_copies(self) -> None:
        """Put copies in the place of what a run may change."""
        torch.clear_autocast_cache()  # of 16-bit copies of weights, which may have changed since
        copies: dict[int, object] = {}  # what several places share stays shared
        for holder, name, value, make_copy in self.copied:
            if id(value) not in copies:
                try:
                    copies[id(value)] = make_copy(name, value)
                except Exception as error:
                    reason = f"`{name}` of the model can't be copied for our passes: {describe_error(error)}"
                    raise Refused(reason, entry="state") from error
            holder[name] = copies[id(value)]
        for attributes, values in self.fixed:
            attributes.update(values)

    def _clone(self, name: str, x: Tensor) -> Tensor:
        """Clone a tensor; a large one only if the last run has written to its clone."""
        clone, writes = self.clones.get(id(x), (x, None))
        if x.numel() <= _LARGE or writes is None or _count_writes(clone) != writes:
            with torch.inference_mode(False):  # in which no writes are counted
                clone = x.detach().clone()
            self.clones[id(x)] = clone, _count_writes(clone)
        return clone

    def restore(self) -> None:
        """Put the originals back."""
        for items, originals in filter(any, self.originals):  # most are empty, such as those of hooks
            if list(items) != list(originals):  # new names, or another order of parameters and buffers
                items.clear()
            items.update(originals)
        for parameter, requires_grad, grad in self.trained:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
        torch.clear_autocast_cache()  # else torch 2.6 goes on with our copies, which have no gradients

    def check_writes(self) -> None:
        """Raise MisconfigurationException if a run has written to a parameter, or to what else is not copied."""
        _refuse_writes([name for name, x, num_writes in self.watched if _count_writes(x) != num_writes])

    def _norms(self) -> list[float]:
        """Return the norms of parameters, since torch counts no writes to their ``data``."""
        if not self.dense:
            return []
        norms = torch._foreach_norm([x.detach() for x in self.dense])
        device = norms[0].device  # for which this waits once, and not once for each parameter
        return torch.stack([norm.to(device, wide_dtype(device)) for norm in norms]).tolist()

    def check_norms(self) -> None:
        """Raise MisconfigurationException if some run has changed the norm of a parameter."""
        pairs = zip(self.dense.values(), self.norms, self._norms(), strict=True)
        _refuse_writes([name for name, before, after in pairs if before != after and not math.isnan(before)])


def _refuse_writes(names: list[str]) -> None:
    if names:
        raise _not_restored(f"writes to {', '.join(names[:3])}")


def _not_restored(what: str) -> Refused:
    return Refused(
        f"`forward` {what} in eval mode, which is not restored: do so only `if self.training`, or in a hook, such as "
        "`on_train_batch_end`.",
        entry="state",
    )


def _is_object(value: Any) -> bool:
    """Return whether a value is an object of a class of its own, whose attributes a run may change."""
    if isinstance(value, (Tensor, *(kind for kind, _ in _COPIES), nn.Module, type, FunctionType, ModuleType)):
        return False
    package = type(value).__module__.split(".")[0]
    return isinstance(getattr(value, "__dict__", None), dict) and package not in _OF_THREADS


def _modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Return the modes in which modules validate: eval mode, unless a LightningModule says otherwise by its hook."""
    of_run = compat.original_module(model)
    hook = getattr(type(of_run), "on_validation_model_eval", None)
    if hook is None or hook.__module__.startswith(("lightning.pytorch", "pytorch_lightning")):
        return dict.fromkeys(model.modules(), False)
    before = {module: module.training for module in model.modules()}
    try:
        hook(of_run)
        return {module: module.training for module in before}
    finally:
        for module, mode in before.items():
            module.training = mode


def _count_writes(tensor: Tensor) -> int | None:
    """Count the writes to a tensor, but not those to its ``data``; None in inference mode, where torch counts none."""
    return None if tensor.is_inference() else tensor._version
