"""Run a model so that no trace is left: in eval mode, without gradients, with all state restored."""

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import _collect_rng_states, _set_rng_states
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

Run = Callable[..., Any]  # runs a function that runs the model, and leaves no trace

_MAX_ITEMS = 1000  # of a list or dict of a module that is copied for every pass


@contextmanager
def isolated(model: nn.Module) -> Iterator[Run]:
    """Yield ``run(function, *args)``, which calls a function that runs the model, and leaves no trace.

    Inside, the model is in eval mode (modules that PyTorch does not see keep theirs), without gradients, and its
    ``self.log`` does nothing. Every run finds the same buffers, attributes and random states, and leaves clones of them
    behind: the originals come back. Compiled code runs eagerly, so that nothing is compiled for us. Not restored are
    parameters that ``forward`` writes (see :func:`written_parameters`), what is nested deeper than the items of a list
    or dict, those of more than 1,000 items, generators of the model's own, and what hooks of the user change.

    Args:
        model: The module.

    Raises:
        MisconfigurationException: If it has lazy weights or scripted parts.
    """
    modules, parameters = all_modules(model), list(model.parameters())
    if any(map(is_lazy, parameters)):
        raise MisconfigurationException("Expected a model with weights, but some are lazy: run it on a batch first.")
    if any(isinstance(module, torch.jit.ScriptModule) for module in modules):
        raise MisconfigurationException("Expected a model whose state can be restored, but a part of it is scripted.")
    rng_states = _collect_rng_states(include_cuda=any(parameter.is_cuda for parameter in parameters))
    states: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (items, items.copy()) for module in modules for items in (vars(module), module._buffers)
    ]
    modes: list[dict[str, Any]] = [vars(module) for module in model.modules()]  # for `eval()`, which modules override
    mutable = [
        (items, name, value)
        for items, originals in states
        for name, value in originals.items()
        if isinstance(value, Tensor | list | dict | set) and name not in _MODULE_ATTRIBUTES
    ]

    def restore() -> None:
        for items, originals in states:
            for name in items.keys() - originals.keys():
                del items[name]
            items.update(originals)
        _set_rng_states(rng_states)

    def run(function: Callable[..., Any], *args: Any) -> Any:
        clones: dict[int, Any] = {}
        try:
            for items, name, value in mutable:
                items[name] = _cloned(value, clones)
            for attributes in modes:
                attributes["training"] = False
            if hasattr(model, "log_dict"):  # of a LightningModule
                model.__dict__.update(log=_do_nothing, log_dict=_do_nothing)
            return function(*args)
        finally:
            complete(restore)

    with torch.no_grad(), _eager():
        yield run


def is_isolated(model: nn.Module) -> bool:
    """Tell whether the model runs inside of :func:`isolated`."""
    return model.__dict__.get("log") is _do_nothing


def written_parameters(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, list[str]]:
    """Run a model, and name the parameters that its ``forward`` writes, unless in place to their ``data``.

    Args:
        model: The module.
        run: Runs it.
    """
    before = {name: (p._version, p.data_ptr()) for name, p in model.named_parameters() if not p.is_inference()}
    result, after = run(), dict(model.named_parameters())
    return result, [name for name, seen in before.items() if seen != (after[name]._version, after[name].data_ptr())]


def complete(restore: Callable[[], object]) -> None:
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
            if name not in _MODULE_ATTRIBUTES and isinstance(value, list | tuple | dict) and len(value) <= _MAX_ITEMS:
                for item in value.values() if isinstance(value, dict) else value:
                    if isinstance(item, nn.Module):
                        modules.update(dict.fromkeys(item.modules()))
    return list(modules)


def _cloned(value: Any, clones: dict[int, Any]) -> Any:
    """Clone a tensor, or a list, dict or set with the tensors in it; give back what is not one of these."""
    if isinstance(value, nn.Parameter) or (not isinstance(value, Tensor) and len(value) > _MAX_ITEMS):
        return value
    if isinstance(value, Tensor):
        if id(value) not in clones:  # one that two modules share stays one, and is copied once
            clones[id(value)] = value.clone()
        return clones[id(value)]
    new: Any = copy.copy(value)
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in list(items):
        if isinstance(item, Tensor):
            new[key] = _cloned(item, clones)
    return new


_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, the mode


def _eager() -> Any:
    """Run compiled code eagerly, so that nothing is compiled for our shapes."""
    is_compiling = "torch._dynamo" in sys.modules  # else nothing was compiled, and importing it takes seconds
    has_stance = is_compiling and hasattr(torch.compiler, "set_stance")  # torch 2.6
    return torch.compiler.set_stance("force_eager") if has_stance else nullcontext()


def _do_nothing(*args: object, **kwargs: object) -> None:
    pass
