"""Extra passes that leave no trace: in eval mode, without gradients, all on the same dice."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from operator import is_not
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

T = TypeVar("T")

_SMALL = 2**14  # elements of a tensor that is copied before every batch, since it costs nothing
_OF_ANY_MODULE = frozenset(vars(nn.Module()))  # parameters, buffers, hooks, the mode


class Passes:
    """Runs a model again and again, and leaves it, and all random streams, as they were.

    Every pass finds the buffers and attributes that the module has, and the same state of every random stream, so that
    two passes of a stochastic model differ by their inputs alone. Large buffers are copied only where the first pass,
    around which all are, was seen to write them. What a pass can't put back is deeper Python state that ``forward``
    itself changes: what is nested in a container, a generator of its own.

    Args:
        model: The module.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._written: set[int] | None = None  # ids of tensors; None before the first pass
        self._uses_numpy = True  # until the first pass has shown that it does not: numpy's states are slow to set
        self._devices: set[torch.device] = set()
        self._states: list[_State] = []
        self._dice: _Dice | None = None

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """A batch, inside of which :meth:`run` may be called."""
        modules = list(self._model.modules())
        training = [module for module in modules if module.training]
        if self._written is None:  # a strategy keeps the module where it is
            self._devices = {tensor.device for tensor in (*self._model.parameters(), *self._model.buffers())}
        self._dice = _Dice(self._devices)
        try:
            for module in training:  # not by `eval()`, which modules override
                module.training = False
            with torch.no_grad(), _silenced(self._model):
                # A lazy module becomes another one in its first pass, and stays that.
                lasting = (each for each in modules if not getattr(type(each), "cls_to_become", None))
                self._states = [_State(module, self._written) for module in lasting]
                yield
        finally:
            for module in training:
                module.training = True
            self._dice.put_back()
            self._states, self._dice = [], None

    def run(self, function: Callable[[], T]) -> T:
        """Call a function that runs the model, on the dice of the batch, and put back what it has written.

        Args:
            function: The function.
        """
        assert self._dice is not None
        self._dice.put_back(self._uses_numpy)
        written: set[int] = set()
        try:
            result = function()
        finally:
            for state in self._states:
                written |= state.give_back()
            if self._written is not None:
                self._written |= written
        if self._written is None:  # the first pass that has come to its end
            self._written, self._uses_numpy = written, self._dice.has_rolled_numpy()
        return result


class _State:
    """What a module has in buffers and in attributes of its own."""

    def __init__(self, module: nn.Module, written: set[int] | None) -> None:
        self._module, self._is_first = module, written is None
        self._before = vars(module).copy()
        own = [self._before[name] for name in self._before.keys() - _OF_ANY_MODULE]
        containers = [each for each in (*own, module._buffers) if isinstance(each, list | dict)]
        self._containers = [(each, each.copy()) for each in containers]
        tensors = [each for each in (*own, *module._buffers.values()) if isinstance(each, Tensor) and _has_values(each)]
        self._tensors = [
            (
                each,
                each.clone() if written is None or each.numel() <= _SMALL or id(each) in written else None,
                _version(each),
            )
            for each in tensors
        ]

    def give_back(self) -> set[int]:
        """Put back what a pass has changed; returns the ids of tensors that it has written."""
        written = set()
        for tensor, value, version in self._tensors:
            if value is None:
                if version != _version(tensor):
                    written.add(id(tensor))
                    rank_zero_warn(
                        f"A pass of ours has written into a large buffer of {type(self._module).__name__}, which"
                        " earlier passes had not. It could not be put back; from now on it is."
                    )
            elif version != _version(tensor) or (self._may_look(tensor) and _differs(tensor, value)):
                written.add(id(tensor))
                with torch.no_grad():
                    if tensor.shape != value.shape:
                        tensor.resize_(value.shape)
                    tensor.copy_(value)
        for container, items in self._containers:
            if len(container) != len(items) or (items and any(map(is_not, _flat(container), _flat(items)))):
                container.clear()
                container.update(items) if isinstance(container, dict) else container.extend(items)
        now = vars(self._module)
        for name in [name for name in now if name not in self._before]:
            del now[name]
        now.update(self._before)
        return written

    def _may_look(self, tensor: Tensor) -> bool:
        """Whether to compare values: writes to `tensor.data` don't count. On other devices a comparison waits."""
        return self._is_first or tensor.device.type == "cpu"


class _Dice:
    """The state of every random stream: python's, numpy's, torch's on the CPU and on the model's devices."""

    def __init__(self, devices: set[torch.device]) -> None:
        self._numpy = sys.modules.get("numpy")  # not imported: nobody has drawn from it
        self._numpy_state: Any = self._numpy.random.get_state() if self._numpy else None
        self._python_state = random.getstate()
        self._cpu_state = torch.get_rng_state()
        self._states = [
            (device, getattr(torch, device.type).get_rng_state(*_index(device)))
            for device in devices
            if device.type not in ("cpu", "meta")
        ]

    def has_rolled_numpy(self) -> bool:
        if self._numpy is None:
            return False
        (_, keys, *rest), (_, own_keys, *own_rest) = self._numpy.random.get_state(), self._numpy_state
        return rest != own_rest or bool((keys != own_keys).any())

    def put_back(self, with_numpy: bool = True) -> None:
        random.setstate(self._python_state)
        if self._numpy and with_numpy:
            self._numpy.random.set_state(self._numpy_state)
        torch.set_rng_state(self._cpu_state)
        for device, state in self._states:
            getattr(torch, device.type).set_rng_state(state, *_index(device))


def _index(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one MPS


@contextmanager
def _silenced(model: nn.Module) -> Iterator[None]:
    """Let a ``forward`` that calls ``self.log`` log nothing: its own value, from the step, would be replaced."""
    names = ("log", "log_dict") if hasattr(model, "log_dict") else ()  # of either package of Lightning
    own = {name: model.__dict__[name] for name in names if name in model.__dict__}
    model.__dict__.update(dict.fromkeys(names, _do_nothing))
    try:
        yield
    finally:
        for name in names:
            del model.__dict__[name]
        model.__dict__.update(own)


def is_ours(model: nn.Module) -> bool:
    """Whether the model runs in a pass of ours, of whichever callback."""
    return model.__dict__.get("log") is _do_nothing


def _do_nothing(*args: object, **kwargs: object) -> None:
    pass


def _flat(container: Any) -> list[Any]:
    return [*container.keys(), *container.values()] if isinstance(container, dict) else container


def _differs(tensor: Tensor, value: Tensor) -> bool:
    return tensor.layout == torch.strided and not torch.equal(tensor, value)


def _has_values(tensor: Tensor) -> bool:
    """Whether a pass could write to them: lazy ones have none yet, and of a sharded model other processes may."""
    if is_lazy(tensor) or tensor.is_meta or (tensor.is_inference() and not torch.is_inference_mode_enabled()):
        return False
    return tensor.layout != torch.strided or tensor.numel() == 0 or tensor.untyped_storage().nbytes() > 0


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
