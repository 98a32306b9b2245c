"""Run a model without leaving a trace: in eval mode, without gradients, with its state put back."""

import copy
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity import compat
from lightning_sensitivity.messages import Refused

T = TypeVar("T")

_LARGE = 2**16  # elements of a tensor that is cloned again only where it has changed
_OWN = frozenset(vars(LightningModule()))  # what each module has: parameters, buffers, hooks, the mode
_DICTS = [name for name, value in vars(nn.Module()).items() if isinstance(value, dict)]
_COLLECTIONS = (list, dict, set, np.ndarray)
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class RunIsolated(Protocol):
    """A way to call a function that runs the model, without a trace of it."""

    def __call__(self, function: Callable[..., T], *args: object) -> T:
        """Return what the function returns."""


@contextmanager
def isolated(model: nn.Module, *others: nn.Module) -> Iterator[RunIsolated]:
    """Yield ``run(function, *args)``, which calls a function that runs the model, and leaves no trace.

    Inside, the model is in eval mode, or in the modes that its own hook ``on_validation_model_eval`` sets,
    without gradients, and its ``self.log`` does nothing. Every run starts from the same buffers, attributes
    and random state of torch: tensors, arrays and generators are cloned, and lists, dicts and sets are copied.
    A large tensor is cloned once for all runs, and again only after a run that has written to the clone. After
    a run, the originals are put back; hooks, too. The random streams of Python and NumPy are put back at the
    end. Compiled code runs eagerly, so that our passes compile nothing.

    What lies deeper, and what objects, closures and globals hold, is neither copied nor put back. Nor are
    parameters, but ``run`` raises MisconfigurationException if one was written to.

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
    num_writes = state.count_writes()

    def run(function: Callable[..., T], *args: object) -> T:
        with torch.random.fork_rng(state.devices, device_type="cuda"):
            try:
                state.put_copies()
                result = function(*args)
            finally:
                state.restore()
        if state.count_writes() != num_writes:
            raise Refused(
                "`forward` writes to parameters in eval mode, which is not restored: do so only `if self.training`.",
                entry="state",
            )
        return result

    with same_streams(state.devices), torch.no_grad(), compat.eager():
        yield run


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


def _log_nothing(*args: object, **kwargs: object) -> None:
    """Log nothing, in the place of ``self.log``."""


class _State:
    """The contents of modules: copies take their place before a run, and they are put back after it."""

    def __init__(self, roots: tuple[nn.Module, ...]) -> None:
        self.weights = {weight for root in roots for weight in root.parameters()}
        self.devices = sorted({weight.get_device() for weight in self.weights if weight.is_cuda})
        # The dicts that a `forward` could change: attributes, buffers, parameters, modules and hooks of each module.
        self.originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.copied: list[tuple[dict[str, Any], str, Any]] = []  # which dict has what to copy, and by which name
        self.clones: dict[int, Tensor] = {}  # of large tensors, by their ids
        for module in {module: None for root in roots for module in root.modules()}:
            attributes = vars(module)
            dicts = [attributes, *(attributes[name] for name in _DICTS if name in attributes)]
            self.originals += [(each, dict(each)) for each in dicts]
            own = [(attributes, name, value) for name, value in attributes.items() if name not in _OWN]
            buffers = [(module._buffers, name, value) for name, value in module._buffers.items()]
            kinds = (Tensor, *_COLLECTIONS, *_GENERATORS)
            self.copied += [each for each in own + buffers if isinstance(each[2], kinds)]
        # Modes are set one by one, since modules may override `eval()`; a LightningModule is silent.
        self.fixed: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for module, mode in {module: mode for root in roots for module, mode in _modes_of(root).items()}.items():
            is_lightning = callable(getattr(type(module), "log_dict", None))
            silent = {"log": _log_nothing, "log_dict": _log_nothing} if is_lightning else {}
            self.fixed.append((vars(module), {"training": mode, **silent}))

    def count_writes(self) -> int:
        """Count the writes to parameters, but not those to their ``data``."""
        return sum(weight._version for weight in self.weights if not weight.is_inference())

    def put_copies(self) -> None:
        """Put copies in the place of what a run may change."""
        torch.clear_autocast_cache()  # of 16-bit copies of weights, which may have changed since
        copies: dict[int, object] = {}  # what several places share stays shared
        for holder, name, value in self.copied:
            if id(value) not in copies:
                copies[id(value)] = self._copy(value)
            holder[name] = copies[id(value)]
        for attributes, values in self.fixed:
            attributes.update(values)

    def _copy(self, value: Any) -> object:
        if isinstance(value, Tensor):
            return self._clone(value)
        if isinstance(value, torch.Generator):
            return value.clone_state()
        return copy.copy(value) if isinstance(value, _COLLECTIONS) else copy.deepcopy(value)

    def _clone(self, x: Tensor) -> Tensor:
        """Clone a tensor; a large one only if the last run has written to its clone."""
        clone = self.clones.pop(id(x), None)
        if clone is None or clone._version > 0:
            with torch.inference_mode(False):  # in which no writes are counted
                clone = x.detach().clone()
        if x.numel() > _LARGE:
            self.clones[id(x)] = clone
        return clone

    def restore(self) -> None:
        """Put the originals back."""
        for items, originals in filter(any, self.originals):  # most are empty, such as those of hooks
            if list(items) != list(originals):  # new names, or another order of parameters and buffers
                items.clear()
            items.update(originals)
        torch.clear_autocast_cache()  # else torch 2.6 goes on with our copies, which have no gradients


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
