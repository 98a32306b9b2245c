"""Watch the first training step: does it call the model on our inputs, and train the logits that we measure?"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from lightning_sensitivity.arguments import Selector
from lightning_sensitivity.callbacks.groups import make_call
from lightning_sensitivity.compat import collect_rng_states, is_compiled
from lightning_sensitivity.model import ModelCall, select_outputs
from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.call import TARGET_NAMES, parameters_of

_LOSSES = (
    functional.binary_cross_entropy_with_logits,
    functional.cross_entropy,
    functional.log_softmax,
    functional.multi_margin_loss,
    functional.multilabel_soft_margin_loss,
    functional.nll_loss,
    torch.log_softmax,
    Tensor.log_softmax,
)


class StepWatch:
    """Record the first call of the module in a training step, and the logits that its losses get.

    Args:
        module: The module.
        call: Our call on the batch of the step.
        outputs: How outputs are selected; see :func:`~lightning_sensitivity.model.select_outputs`.

    Attributes:
        was_called: Whether the step has called the module.
    """

    def __init__(self, module: LightningModule, call: ModelCall, outputs: Selector | None) -> None:
        self.was_called = False
        self._module = module
        self._select = outputs
        self._ours = _arguments(module, call.args, call.kwargs)
        self._theirs: dict[str, list[Tensor]] | None = None  # also if they cannot be compared
        self._random_states = _random_states(module)
        self._draws = False  # whether random numbers were drawn before the first call
        self._is_redirected: list[bool] = []  # for the calls of the module that are running
        self._outputs: Tensor | None = None
        self._loss_inputs: list[Tensor] = []
        self._stack = ExitStack()
        before, after = _Hook(self._before_call), _Hook(self._after_call)
        self._stack.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
        self._stack.enter_context(module.register_forward_hook(after))
        self._stack.enter_context(_LossInputs(self._loss_inputs, self._is_in_step))

    def stop(self) -> None:
        """Stop watching."""
        self._stack.close()

    def find_problem(self) -> str | None:
        """Say how the step differs from what is measured; None if nothing shows that it does."""
        if not self.was_called and not _names_forward(self._module):
            return "the step does not call `forward`, which is measured"
        if self._theirs is None:
            return None
        return self._problem_of_arguments(self._theirs) or self._problem_of_logits()

    def _problem_of_arguments(self, theirs: dict[str, list[Tensor]]) -> str | None:
        start = "the step calls the model with other"
        for name in sorted(theirs.keys() - self._ours.keys() - set(TARGET_NAMES)):
            return f"{start} arguments: also with `{name}`"
        for name, ours in self._ours.items():
            found = theirs.get(name, [])
            if [x.shape for x in found] != [x.shape for x in ours]:
                return f"{start} arguments: `{name}` is missing or has another shape"
            if not self._draws and not all(map(_are_close, ours, found)):
                return f"{start} values of `{name}`, though it draws no random numbers"
        return None

    def _problem_of_logits(self) -> str | None:
        logits, found = self._outputs, self._loss_inputs
        if logits is None or not found or any(_are_same_logits(logits, each) for each in found):
            return None
        return "the step computes its loss from other logits than those that `forward` returns"

    def _is_in_step(self) -> bool:
        """Return whether the code that runs is that of the step, not that of `forward`."""
        return not _is_not_the_step() and all(self._is_redirected)

    def _before_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _is_not_the_step():
            return
        # Under DDP, Lightning runs the step itself as `forward`.
        is_redirected = "_ForwardRedirection" in getattr(vars(module).get("forward"), "__qualname__", "")
        self._is_redirected.append(is_redirected)
        if not is_redirected and not self.was_called:
            self.was_called = True
            self._draws = _random_states(module) != self._random_states
            self._theirs = _arguments(module, args, kwargs)  # before `forward` can write to them

    def _after_call(self, module: nn.Module, args: object, result: object) -> None:
        if not _is_not_the_step() and not self._is_redirected.pop() and self._outputs is None:
            self._outputs = select_outputs(result, self._select).detach()


class _Hook:
    """Call a function, or nothing in a copy: a step may pickle or copy the module."""

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: object) -> None:
        with suppress(Exception):  # a step must not fail because of a hint; it may return something else in training
            self._function(*args)

    def __reduce__(self) -> tuple[type[_Hook], tuple[Callable[..., None]]]:
        return _Hook, (_do_nothing,)


class _LossInputs(TorchFunctionMode):
    """Record the logits that losses in the step get."""

    def __init__(self, found: list[Tensor], is_in_step: Callable[[], bool]) -> None:
        super().__init__()
        self._found = found
        self._is_in_step = is_in_step

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        logits = args[0] if args else kwargs.get("input")
        if function in _LOSSES and isinstance(logits, Tensor) and self._is_in_step():
            self._found.append(logits.detach())
        return function(*args, **kwargs)


class FirstStep:
    """Watch training steps until one has shown whether it computes what is measured.

    Attributes:
        is_waiting: Whether the next step is watched.
    """

    def __init__(self) -> None:
        self.is_waiting = False
        self._watch: StepWatch | None = None

    def start(
        self, pl_module: LightningModule, batch: object, inputs: Selector | None, outputs: Selector | None
    ) -> None:
        """Start watching a step, if our call can be made on its batch; see the arguments of :class:`ModelCall`."""
        self.cancel()  # the last step may have been skipped
        if not self.is_waiting or not can_watch(pl_module):
            return
        try:
            self._watch = StepWatch(pl_module, make_call(pl_module, batch, inputs, outputs), outputs)
        except Exception:  # training batches may be of another kind than validation batches
            self.is_waiting = False

    def stop(self, pl_module: LightningModule, step_output: object) -> str | None:
        """Stop watching, and say how the step differs from what is measured."""
        watch = self._watch
        self.cancel()
        if watch is None:
            return None
        if not watch.was_called and not step_output and pl_module.automatic_optimization:
            return None  # a step that returns None is skipped: watch the next one
        self.is_waiting = False
        try:
            return watch.find_problem()
        except Exception:  # a run must not end because of a hint
            return None

    def cancel(self) -> None:
        """Stop watching, at any time."""
        if self._watch is not None:
            self._watch.stop()
        self._watch = None


def _arguments(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, list[Tensor]]:
    """Copy the tensors in arguments that differ from their defaults, by the names in the signature of ``forward``."""
    signature = inspect.Signature(parameters_of(module))
    arguments = signature.bind_partial(*args, **kwargs).arguments
    return {
        name: [x.detach().clone() for x in tensors_in(value)]
        for name, value in arguments.items()
        if not _is_default(value, signature.parameters[name].default)
    }


def _is_default(value: object, default: object) -> bool:
    return value is default or (isinstance(value, bool | int | float | str) and value == default)


def _names_forward(pl_module: LightningModule) -> bool:
    """Return whether the step may call `self.forward(x)`, which no hook sees."""
    code = getattr(type(pl_module).training_step, "__code__", None)
    return code is not None and "forward" in code.co_names


def _do_nothing(*args: object) -> None:
    pass


def can_watch(pl_module: nn.Module) -> bool:
    """Return whether the step can be watched: not if a part is compiled, since it would be compiled again."""
    return not any(is_compiled(module) for module in pl_module.modules())


def _is_not_the_step() -> bool:
    """Return whether a call is one of another monitor, without gradients, or of a trace, which must not see ours."""
    return not torch.is_grad_enabled() or bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def _random_states(module: nn.Module) -> object:
    has_cuda = any(parameter.is_cuda for parameter in module.parameters())
    return _as_plain(collect_rng_states(include_cuda=has_cuda).values())


def _as_plain(value: Any) -> object:
    """Turn arrays and tensors in random states into lists, which can be compared."""
    if hasattr(value, "tolist"):
        return value.tolist()
    is_container = isinstance(value, Iterable) and not isinstance(value, str)
    return [_as_plain(item) for item in value] if is_container else value


def _are_close(x: Tensor, y: Tensor) -> bool:
    if x.is_nested or not bool(x.isfinite().all()):
        return True
    return torch.allclose(x.double(), y.double(), rtol=1e-2, atol=1e-2 * float(x.double().abs().mean()))


def _are_same_logits(outputs: Tensor, logits: Tensor) -> bool:
    """Compare values in any order of the dimensions, since steps reshape their outputs."""
    if outputs.numel() != logits.numel():
        return False
    return _are_close(outputs.double().flatten().sort().values, logits.double().flatten().sort().values)
