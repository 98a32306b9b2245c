"""Run a model without leaving a trace: in eval mode, without gradients, with all state restored."""

import collections
import copy
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

from lightning_sensitivity.compat import collect_rng_states, set_rng_states

T = TypeVar("T")

_MAX_ITEMS = 1000  # of a container that is copied for every pass
_LARGE = 2**20  # bytes of a tensor whose copy serves the next pass, too; statistics of batch norm have fewer
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, the mode
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
_IMMUTABLE = (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodType, types.ModuleType)
_LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric")


class RunIsolated(Protocol):
    """Call a function that runs the model, and leave no trace of it."""

    def __call__(self, function: Callable[..., T], *args: Any) -> T:
        """Return what the function returns."""


@contextmanager
def isolated(model: nn.Module) -> Iterator[RunIsolated]:
    """Yield ``run(function, *args)``, which calls a function that runs the model, and leaves no trace.

    Inside, the model is in eval mode, without gradients, and its ``self.log`` does nothing. Every run starts from the
    same buffers, attributes and random states: it works on deep copies, and then puts the originals back. Compiled
    code runs eagerly, so our passes compile nothing. Not restored are attributes that :func:`shared_state` names,
    parameters that ``forward`` writes (see :func:`written_parameters`), and what the user's hooks or closures store.

    Args:
        model: The module.

    Raises:
        MisconfigurationException: If it has lazy weights or scripted parts.
    """
    modules = all_modules(model)
    _check_modules(modules)
    rng_states = collect_rng_states(include_cuda=any(parameter.is_cuda for parameter in model.parameters()))
    snapshots = [_Snapshot(items, items.copy()) for module in modules for items in _state_dicts(module)]
    state = _mutable_state(model, modules)
    modes = [vars(module) for module in model.modules()]  # for `eval()`, which modules override

    def restore() -> None:
        for snapshot in snapshots:
            snapshot.restore()
        set_rng_states(rng_states)

    def run(function: Callable[..., T], *args: Any) -> T:
        try:
            state.put_copies()
            for attributes in modes:
                attributes["training"] = False
            if hasattr(model, "log_dict"):  # a LightningModule
                model.__dict__.update(log=_do_nothing, log_dict=_do_nothing)
            return function(*args)
        finally:
            restore_despite_interrupt(restore)

    with torch.no_grad(), _eager():
        yield run


def shared_state(model: nn.Module) -> list[str]:
    """Name the attributes that :func:`isolated` cannot copy, so that our passes use the originals.

    These are objects such as generators, locks and handles, and containers of more than 1,000 items.

    Args:
        model: The module.
    """
    state = _mutable_state(model, all_modules(model))
    state.make_copies()
    return sorted(set(state.shared))


def is_isolated(model: nn.Module) -> bool:
    """Return whether the model is running inside :func:`isolated`."""
    return model.__dict__.get("log") is _do_nothing


def written_parameters(model: nn.Module, run: Callable[[], T]) -> tuple[T, list[str]]:
    """Run a model, and name the parameters that its ``forward`` writes to; writes in place to ``data`` go unnoticed.

    Args:
        model: The module.
        run: Runs the model.
    """
    before = {name: _version_of(p) for name, p in _all_parameters(model).items() if not p.is_inference()}
    result = run()
    after = _all_parameters(model)
    written = [name for name, version in before.items() if version != _version_of(after[name])]
    return result, written


def _version_of(parameter: nn.Parameter) -> tuple[int, int]:
    """Return what changes when a parameter is written to, or gets other data."""
    return parameter._version, parameter.data_ptr()


def _all_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return all parameters by name, including those of modules in lists, tuples and dicts, such as a teacher."""
    parameters = dict(model.named_parameters())
    visible = set(model.modules())
    for index, module in enumerate(all_modules(model)):
        if module not in visible:
            prefix = f"{type(module).__name__}[{index}]"
            parameters.update(module.named_parameters(prefix, recurse=False))
    return parameters


def restore_despite_interrupt(restore: Callable[[], object]) -> None:
    """Call a function that restores something, and call it again if Ctrl-C interrupts it."""
    try:
        restore()
    except KeyboardInterrupt:
        restore()
        raise


def all_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules of a model, including those in lists, tuples and dicts, which PyTorch does not see."""
    modules = dict.fromkeys(model.modules())
    for module in list(modules):
        for name, value in vars(module).items():
            if name not in _MODULE_ATTRIBUTES:
                for hidden in _modules_in(value):
                    modules.update(dict.fromkeys(hidden.modules()))
    return list(modules)


def _modules_in(value: object) -> list[nn.Module]:
    """List the modules in a list, tuple or dict, unless it is long."""
    if not isinstance(value, list | tuple | dict) or len(value) > _MAX_ITEMS:
        return []
    items = value.values() if isinstance(value, dict) else value
    return [item for item in items if isinstance(item, nn.Module)]


@dataclass
class _Snapshot:
    """Hold one dict of a module, and what it contained."""

    items: dict[str, Any]
    originals: dict[str, Any]

    def restore(self) -> None:
        if list(self.items) != list(self.originals):  # new names, or another order of parameters and buffers
            self.items.clear()
        self.items.update(self.originals)


@dataclass
class _MutableState:
    """Hold the values that a ``forward`` could change in place, and where each of them is stored.

    Attributes:
        places: For each value: the dict that holds it, its name, and the value.
        kept: Parameters, modules and the Trainer, which are not copied.
        shared: Names of values that could not be copied.
        unchanged: Copies of large tensors that no pass has written to, with their versions, by id of the original.
    """

    places: list[tuple[dict[str, Any], str, Any]]
    kept: list[object]
    shared: list[str] = field(default_factory=list)
    unchanged: dict[int, tuple[Tensor, int]] = field(default_factory=dict)

    def put_copies(self) -> None:
        """Replace each value by a deep copy; objects that several values share stay shared."""
        for (items, name, _), new in zip(self.places, self.make_copies(), strict=True):
            items[name] = new

    def make_copies(self) -> list[Any]:
        if not self.places:
            return []
        memo = {id(each): each for each in self.kept}
        with _CopyTensors(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # objects of itertools warn when they are copied
            return [self._copy(name, value, memo) for _, name, value in self.places]

    def _copy(self, name: str, value: Any, memo: dict[int, Any]) -> Any:
        if isinstance(value, _CONTAINERS) and not _is_small(value):
            self.shared.append(name)
            return value
        if _is_large(value):
            return memo.setdefault(id(value), self._copy_large(value))
        num_copied = len(memo)
        try:
            return copy.deepcopy(value, memo)
        except Exception:  # locks, handles, generators: each raises its own
            for half_copied in list(memo)[num_copied:]:  # another attribute may refer to the same object
                del memo[half_copied]
            self.shared.append(name)
            return value

    def _copy_large(self, tensor: Tensor) -> Tensor:
        """Copy a tensor, or return the copy from the last pass if that pass has not changed it."""
        copied, version = self.unchanged.get(id(tensor), (None, 0))
        if copied is None or copied._version != version:
            copied = tensor.detach().clone()
            if not copied.is_inference():  # inference tensors have no version
                self.unchanged[id(tensor)] = (copied, copied._version)
        return copied


class _CopyTensors(TorchFunctionMode):
    """Let ``copy.deepcopy`` clone any tensor, even those with a gradient graph, which PyTorch refuses to copy."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__deepcopy__:
            tensor, memo = args
            if id(tensor) not in memo:
                memo[id(tensor)] = tensor.detach().clone()
            return memo[id(tensor)]
        return function(*args, **(kwargs or {}))


def _check_modules(modules: list[nn.Module]) -> None:
    for module in modules:
        if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise MisconfigurationException(
                "Expected a model with weights, but some are lazy: run it on a batch first."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise MisconfigurationException(
                "Expected a model whose state can be restored, but a part of it is scripted (torch.jit), "
                "which cannot be measured: use the Python module it was made from."
            )


def _state_dicts(module: nn.Module) -> list[dict[str, Any]]:
    """List the dicts of a module that a ``forward`` could change."""
    return [vars(module), module._buffers, module._modules, module._parameters]


def _mutable_state(model: nn.Module, modules: list[nn.Module]) -> _MutableState:
    places = []
    for module in modules:
        for name, value in vars(module).items():
            if name not in _MODULE_ATTRIBUTES and not _is_immutable(value):
                places.append((vars(module), name, value))
        for name, value in module._buffers.items():
            if value is not None:
                places.append((module._buffers, name, value))
    kept = [*modules, *model.parameters()] if places else []
    kept.append(vars(model).get("_trainer"))
    return _MutableState(places, kept)


def _is_large(value: object) -> bool:
    """Return whether a value is a plain tensor that takes long to copy."""
    return type(value) is Tensor and value.layout == torch.strided and value.nbytes > _LARGE


def _is_immutable(value: object) -> bool:
    """Return whether a pass cannot change a value, or must not copy it, such as data sets and Lightning objects."""
    if isinstance(value, (*_IMMUTABLE, *_FUNCTIONS, nn.Module, nn.Parameter, Dataset, DataLoader)):
        return True
    return type(value).__module__.partition(".")[0] in _LIGHTNING


def _is_small(container: Any) -> bool:
    """Return whether a container and the containers in it have few items in total."""
    waiting, seen, count = [container], set(), 0
    while waiting and count <= _MAX_ITEMS:
        each = waiting.pop()
        if id(each) in seen:  # also of a container that holds itself
            continue
        seen.add(id(each))
        count += len(each)
        if count <= _MAX_ITEMS:
            items = each.values() if isinstance(each, dict) else each
            waiting.extend(item for item in items if isinstance(item, _CONTAINERS))
    return count <= _MAX_ITEMS


def _eager() -> AbstractContextManager[object]:
    """Run compiled code eagerly, so that our passes compile nothing."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    has_stance = is_compiling and hasattr(torch.compiler, "set_stance")  # torch 2.6
    return torch.compiler.set_stance("force_eager") if has_stance else nullcontext()


def _do_nothing(*args: object, **kwargs: object) -> None:
    pass
