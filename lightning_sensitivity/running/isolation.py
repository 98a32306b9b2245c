"""Run a model without leaving a trace: in eval mode, without gradients, with its state put back."""

import copy
import inspect
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity import compat
from lightning_sensitivity.messages import Refused

T = TypeVar("T")

_LARGE = 2**16  # elements of a tensor that is cloned again only where it has changed
_OWN = frozenset(vars(nn.Module()))  # what each module has: parameters, buffers, hooks, the mode
_COPIED = (list, dict, set, deque)  # and what is one of these, such as a `Counter`
_STREAMS = (random.Random, np.random.Generator, np.random.RandomState)  # of random numbers


class RunIsolated(Protocol):
    """Call a function that runs the model, and leave no trace of it."""

    def __call__(self, function: Callable[..., T], *args: object) -> T:
        """Return what the function returns."""


@contextmanager
def isolated(model: nn.Module) -> Iterator[RunIsolated]:
    """Yield ``run(function, *args)``, which calls a function that runs the model, and leaves no trace.

    Inside, the model is in eval mode, or in the modes that its own hook ``on_validation_model_eval`` sets,
    without gradients, and its ``self.log`` does nothing. Every run starts from the same buffers, attributes
    and random state of torch: tensors and generators are cloned, and lists, dicts, sets and deques are copied
    one level deep. A large tensor is cloned once for all runs, and again only after a run that has written to
    the clone. After a run, the originals are put back; hooks, too. The random streams of Python and NumPy are
    put back at the end. Compiled code runs eagerly, so that our passes compile nothing.

    What lies deeper, and what closures and globals hold, is neither copied nor put back. Nor are parameters,
    but ``run`` raises MisconfigurationException if one was written to.

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
        state.check_parameters()
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


class _State:
    """The contents of modules: copies take their place before a run, and they are put back after it."""

    def __init__(self, model: nn.Module) -> None:
        self.writes = [(name, parameter, _count_writes(parameter)) for name, parameter in model.named_parameters()]
        # A pass has no business with gradients, nor with what is trained, as `freeze()` or `zero_grad()` have.
        self.grads = [(each, each.requires_grad, each.grad, _count_grad(each)) for _, each, _ in self.writes]
        self.devices = sorted({parameter.get_device() for parameter in model.parameters() if parameter.is_cuda})
        # The dicts that a `forward` could change: attributes, buffers, parameters, modules and hooks of each module.
        self.originals: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.places: list[tuple[dict[str, Any], str, object]] = []  # what a run replaces: dict, name and value
        self.clones: dict[int, tuple[Tensor, int | None]] = {}  # of tensors, and the writes to each so far
        self.held: list[tuple[str, Tensor, int | None]] = []  # tensors in collections, and the writes to each
        for module in model.modules():
            attributes = vars(module)
            dicts = [attributes, *(attributes[name] for name in _OWN if isinstance(attributes.get(name), dict))]
            self.originals += [(items, dict(items)) for items in dicts]
            own = [(name, value) for name, value in attributes.items() if name not in _OWN]
            self.places += [(attributes, name, value) for name, value in own]
            self.held += [(*each, _count_writes(each[1])) for item in own for each in _held_tensors(*item)]
            self.places += [(module._buffers, name, value) for name, value in module._buffers.items()]
        self.places = [place for place in self.places if _is_copied(place[2])]
        for module, mode in _modes_of(model).items():  # modules may override `eval()`
            self.places.append((vars(module), "training", mode))
            if callable(getattr(type(module), "log_dict", None)):  # a LightningModule is silent
                self.places += [(vars(module), name, lambda *args, **kwargs: None) for name in ("log", "log_dict")]

    def put_copies(self) -> None:
        """Put copies in the place of what a run may change."""
        torch.clear_autocast_cache()  # of 16-bit copies of weights, which may have changed since
        copies: dict[int, object] = {}  # what several places share stays shared
        for items, name, value in self.places:
            if id(value) not in copies:
                copies[id(value)] = self._copy(value)
            items[name] = copies[id(value)]

    def _copy(self, value: object) -> object:
        """Copy a value; a large tensor only if the last run has written to its clone."""
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if isinstance(value, _STREAMS):
            return copy.deepcopy(value)
        if not isinstance(value, Tensor):
            return copy.copy(value)
        clone, writes = self.clones.get(id(value), (value, None))
        if value.numel() <= _LARGE or writes is None or _count_writes(clone) != writes:
            clone = value.detach().clone()
            self.clones[id(value)] = clone, _count_writes(clone)
        return clone

    def restore(self) -> None:
        """Put the originals back."""
        for items, originals in filter(any, self.originals):  # most are empty, such as those of hooks
            if list(items) != list(originals):  # new names, or another order of parameters and buffers
                items.clear()
            items.update(originals)
        for parameter, requires_grad, grad, _ in self.grads:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            if parameter.grad is not grad:
                parameter.grad = grad
        torch.clear_autocast_cache()  # else torch 2.6 goes on with our copies, which have no gradients

    def check_parameters(self) -> None:
        """Raise MisconfigurationException if a run has written to a parameter."""
        names = [name for name, parameter, writes in self.writes if _count_writes(parameter) != writes]
        names += [f"a tensor in `{name}`" for name, held, writes in self.held if _count_writes(held) != writes]
        names += [
            f"the gradient of {name}"
            for (name, *_), (parameter, _, _, writes) in zip(self.writes, self.grads, strict=True)
            if _count_grad(parameter) != writes
        ]
        if names:
            raise Refused(
                f"`forward` writes to {', '.join(names[:3])} in eval mode, which is not restored: do so only "
                f"`if self.training`, or in a hook, such as `on_train_batch_end`.",
                entry="state",
            )


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


def _count_writes(tensor: Tensor) -> int | None:
    """Count the writes to a tensor, but not those to its ``data``; None in inference mode, where torch counts none."""
    return None if tensor.is_inference() else tensor._version


def _count_grad(parameter: Tensor) -> int | None:
    """Count the writes to the gradient of a parameter; None without one."""
    return None if parameter.grad is None else _count_writes(parameter.grad)


def _is_copied(value: object) -> bool:
    if isinstance(value, Tensor | torch.Generator):
        return not isinstance(value, nn.Parameter)
    return isinstance(value, (*_COPIED, *_STREAMS)) or (isinstance(value, np.ndarray) and value.size <= _LARGE)


def _held_tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """List the tensors in a collection, which are not copied."""
    if isinstance(value, Mapping | list | tuple | deque):
        items = value.values() if isinstance(value, Mapping) else value
        yield from ((name, each) for each in items if isinstance(each, Tensor) and not isinstance(each, nn.Parameter))
