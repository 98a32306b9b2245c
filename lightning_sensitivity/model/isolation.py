"""Run a model so that no trace is left: in eval mode, without gradients, with all state put back."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

T = TypeVar("T")

_MAX_ITEMS = 1000  # of a list or dict of a module that is copied for every pass
_LOGGING = ("log", "log_dict")  # of a LightningModule


@contextmanager
def isolated(model: nn.Module) -> Iterator[Callable[..., Any]]:
    """Give a function ``run(function, *args)`` that calls a function which runs the model, and leaves no trace.

    Inside, the model is in eval mode (modules that PyTorch does not see keep theirs), without gradients, and its
    ``self.log`` does nothing. Every run finds the same buffers, attributes and random states, and leaves clones of them
    behind: the originals come back. Compiled code runs eagerly, so that nothing is compiled for us. Not put back are
    parameters that ``forward`` writes (see :func:`written_parameters`), what is nested deeper than the items of a list
    or dict, those of more than 1,000 items, generators of the model's own, and what hooks of the user change.

    Args:
        model: The module.

    Raises:
        MisconfigurationException: If it has lazy weights.
    """
    if any(map(is_lazy, model.parameters())):
        raise MisconfigurationException("Expected a model with weights, but some are lazy: run it on a batch first.")
    training = [module for module in model.modules() if module.training]
    rng_states = _collect_rng_states(include_cuda=any(parameter.is_cuda for parameter in model.parameters()))
    states: list[_State] = []

    def run(function: Callable[..., T], *args: Any) -> T:
        clones: dict[int, Any] = {}
        try:
            for state in states:
                state.put_clones(clones)
            if hasattr(model, "log_dict"):
                model.__dict__.update(dict.fromkeys(_LOGGING, _do_nothing))
            return function(*args)
        finally:
            complete(lambda: _restore(states, rng_states))

    try:
        for module in training:  # not by `eval()`, which modules override
            module.training = False
        states += map(_State, all_modules(model))  # in eval mode, which every run leaves
        with torch.no_grad(), _eager():
            yield run
    finally:
        complete(lambda: _set_training(training, rng_states))


def is_ours(model: nn.Module) -> bool:
    """Tell whether the model runs inside of :func:`isolated`."""
    return model.__dict__.get("log") is _do_nothing


def written_parameters(model: nn.Module, run: Callable[[], T]) -> tuple[T, list[str]]:
    """Run a model, and name the parameters that its ``forward`` writes, by their version and their norm.

    Args:
        model: The module.
        run: Runs it.
    """

    def fingerprints() -> dict[str, tuple[int, float]]:
        # The norm, for writes to `parameter.data`, which no version counts.
        return {
            name: (
                0 if parameter.is_inference() else parameter._version,
                float(torch.linalg.vector_norm(parameter.detach())),
            )
            for name, parameter in model.named_parameters()
            if parameter.is_floating_point() and parameter.element_size() > 1
        }

    before = fingerprints()
    result = run()
    return result, [name for name, value in fingerprints().items() if before.get(name, value) != value]


def complete(restore: Callable[[], object]) -> None:
    """Call a function that puts something back; where Ctrl-C cuts it short, call it again."""
    try:
        restore()
    except KeyboardInterrupt:
        restore()
        raise


def all_modules(model: nn.Module) -> list[nn.Module]:
    """List the modules of a model, with those that it keeps in lists, tuples and dicts, which PyTorch does not see."""
    modules = {id(module): module for module in model.modules()}
    for module in list(modules.values()):
        for name, value in vars(module).items():
            if name not in _OF_ANY_MODULE and isinstance(value, list | tuple | dict) and len(value) <= _MAX_ITEMS:
                for item in value.values() if isinstance(value, dict) else value:
                    if isinstance(item, nn.Module):
                        modules.update((id(each), each) for each in item.modules())
    return list(modules.values())


class _State:
    """The buffers and attributes of a module."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._attributes, self._buffers = module, vars(module).copy(), module._buffers.copy()

    def put_clones(self, clones: dict[int, Any]) -> None:
        """Put clones in the place of tensors, and of lists and dicts with what they hold."""
        for name, value in self._attributes.items():
            if isinstance(value, Tensor | list | dict | set) and name not in _OF_ANY_MODULE:
                self._module.__dict__[name] = self._cloned(value, clones)
        for name, value in self._buffers.items():
            self._module._buffers[name] = self._cloned(value, clones)

    def restore(self) -> None:
        for items, originals in ((self._module.__dict__, self._attributes), (self._module._buffers, self._buffers)):
            for name in items.keys() - originals.keys():
                del items[name]
            items.update(originals)

    def _cloned(self, value: Any, clones: dict[int, Any]) -> Any:
        if isinstance(value, Tensor):
            if isinstance(value, nn.Parameter):
                return value
            if id(value) not in clones:  # one that two modules share stays one
                clones[id(value)] = value.clone()
            return clones[id(value)]
        if not isinstance(value, list | dict | set) or len(value) > _MAX_ITEMS:
            return value
        new: Any = copy.copy(value)
        if not isinstance(value, set):
            for key, item in list(value.items() if isinstance(value, dict) else enumerate(value)):
                if isinstance(item, Tensor):
                    new[key] = self._cloned(item, clones)
        return new


_OF_ANY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, the mode


def _set_training(modules: list[nn.Module], rng_states: dict[str, Any]) -> None:
    for module in modules:
        module.training = True
    _set_rng_states(rng_states)


def _restore(states: list[_State], rng_states: dict[str, Any]) -> None:
    for state in states:
        state.restore()
    _set_rng_states(rng_states)


def _eager() -> AbstractContextManager[Any]:
    """Run compiled code eagerly: our shapes shall not be compiled for, nor make those of training dynamic."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    if is_compiling and hasattr(torch.compiler, "set_stance"):  # torch 2.6
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance
    return nullcontext()


def _do_nothing(*args: object, **kwargs: object) -> None:
    pass
