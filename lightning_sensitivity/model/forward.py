"""How any model is called on any batch: its arguments, its outputs, and the labels of the batch."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

Function = Callable[..., Any] | None  # that selects something; None for the rules here
Perturb = Callable[[Tensor], Tensor]

# Names of labels in batches of torch, transformers and Lightning's examples.
TARGET_NAMES = ("label", "labels", "target", "targets", "y")
_CHOOSE = "Select it: `inputs=lambda batch: batch['image']`, or `at=` a submodule where inputs can take no noise."


class ModelCall:
    """Call a model on one batch any number of times, with clean or perturbed inputs.

    =======================  =========================================  ===============================================
    batch                    how the model is called                    what is perturbed
    =======================  =========================================  ===============================================
    a function ``inputs``    with what the function returns: one        all floating tensors in the first argument
                             argument, or a tuple of them
    a mapping                with the entries that ``forward`` names    the only floating tensor that is not called
                             (all, if it takes ``**kwargs`` alone)      like labels
    a tuple or list          with as many elements as ``forward``       all floating tensors in the first element
                             requires arguments, at least one
    anything else            with the batch                             the batch, if it is a tensor
    =======================  =========================================  ===============================================

    Args:
        model: The module, whose ``forward`` names the arguments.
        batch: What the loader gave, on the model's device.
        inputs: A function ``batch -> arguments``, or None for the rules above.
        outputs: Which outputs to take; see :func:`select_outputs`.
        noisy_input: Whether an input gets noise, so that it has to be floating.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.

    Raises:
        MisconfigurationException: If it is not clear how to call the model, or what to perturb.
    """

    def __init__(
        self, model: nn.Module, batch: Any, inputs: Function = None, outputs: Function = None, noisy_input: bool = True
    ) -> None:
        self._model, self._outputs = model, outputs
        self.args: tuple[Any, ...] = (batch,)
        self.kwargs: dict[str, Any] = {}
        if inputs:
            arguments = inputs(clone_tensors(batch))  # which may write into it
            self.args = arguments if type(arguments) is tuple else (arguments,)
        elif isinstance(batch, Mapping):
            self.args, self.kwargs = (), _named_arguments(model, batch)
        elif isinstance(batch, list | tuple) and len(batch):
            count = max(1, num_required(model))
            if len(batch) < count:
                expected = f"return the {count} arguments that `forward` requires"
                raise MisconfigurationException(f"`inputs` should {expected}, from {describe(batch)}. {_CHOOSE}")
            self.args = tuple(batch[:count])
        self._perturbed: int | str | None = self._first_floating(batch) if noisy_input else None

    def __call__(self, perturb: Perturb | None = None) -> Tensor:
        """Call the model with copies of the arguments, perturbed or not, and select its outputs.

        Args:
            perturb: Function that returns the perturbed tensor; None for the batch as it is.

        Raises:
            MisconfigurationException: If there are no outputs, or their dimension 1 could be a position.
        """
        args = tuple(self._copy(index, value, perturb) for index, value in enumerate(self.args))
        kwargs = {name: self._copy(name, value, perturb) for name, value in self.kwargs.items()}
        outputs = select_outputs(self._model(*args, **kwargs), self._outputs)
        if self._outputs is None and math.prod(outputs.shape[2:]) > 1:
            shapes = [x.shape[1:] for x in tensors_in([self.args, self.kwargs]) if not x.is_nested]
            if not any(set(outputs.shape[2:]) <= set(s) and outputs.shape[1] not in s for s in shapes):
                where = (
                    "if they are last, `outputs=lambda y: y.movedim(-1, 1)`; if they are there, `outputs=lambda y: y`"
                )
                got = f"got {[*outputs.shape]}; {where}"
                raise MisconfigurationException(f"`outputs` should move the classes to dimension 1, {got}.")
        return outputs

    def _first_floating(self, batch: Any) -> int | str:
        """Find the argument to perturb."""
        candidates: dict[int | str, Any] = dict(enumerate(self.args[:1]))
        candidates |= {name: value for name, value in self.kwargs.items() if name not in TARGET_NAMES}
        floating = [place for place, value in candidates.items() if any(map(is_floating, tensors_in(value)))]
        if len(floating) != 1:
            got = f"{floating} in {describe(batch)}" if self.kwargs else describe(self.args[:1])
            raise MisconfigurationException(f"Expected one dense floating input, got {got}. {_CHOOSE}")
        return floating[0]

    def _copy(self, place: int | str, value: Any, perturb: Perturb | None) -> Any:
        if perturb is None or place != self._perturbed:
            return clone_tensors(value)
        return clone_tensors(value, lambda tensor: perturb(tensor) if is_floating(tensor) else tensor.clone())


def _named_arguments(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any]:
    parameters = parameters_of(model)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if {p.kind for p in parameters} == {inspect.Parameter.VAR_KEYWORD}:
        names = [key for key in batch if isinstance(key, str)]
    arguments = {name: batch[name] for name in batch if name in names}
    if not arguments:
        got = f"from {describe(batch)}. {_CHOOSE}"
        raise MisconfigurationException(f"`inputs` should return the arguments of `forward`, {got}")
    return arguments


def select_outputs(result: Any, outputs: Function = None) -> Tensor:
    """Select the outputs in what the model returned.

    Args:
        result: A tensor; a tuple or list, of which the first element is taken; or a mapping or object with ``logits``.
        outputs: A function ``result -> tensor``, or None for the rules above.

    Raises:
        MisconfigurationException: If there is no floating tensor, or it is a scalar.
    """
    if outputs:
        selected = outputs(result)
    elif isinstance(result, Mapping):
        selected = result.get("logits")
    else:
        first = result[0] if isinstance(result, list | tuple) and result else result
        selected = getattr(result, "logits", first)
    if not isinstance(selected, Tensor) or selected.ndim == 0 or not is_floating(selected):
        got = f"got {describe(selected)}, from {describe(result)}"
        raise MisconfigurationException(f"`outputs` should select a floating tensor (N, K, ...) or (N,), {got}.")
    return selected


def select_targets(model: nn.Module, batch: Any, targets: Function = None) -> Tensor:
    """Select the labels in a batch.

    Args:
        model: The module, whose ``forward`` says how many elements of a batch are inputs.
        batch: What the loader gave.
        targets: A function ``batch -> tensor``, or None: the last of the elements of a tuple or list if all others are
            inputs of ``forward``; the only entry or attribute that is called ``label``, ``labels``, ``target``,
            ``targets`` or ``y``.

    Raises:
        MisconfigurationException: If it is not clear where they are, or they are not a tensor.
    """
    selected: Any = None
    if targets:
        selected = targets(clone_tensors(batch))
    elif isinstance(batch, list | tuple):
        selected = batch[-1] if len(batch) == max(1, num_required(model)) + 1 else None
    elif not isinstance(batch, Tensor):
        named = {n: batch.get(n) if isinstance(batch, Mapping) else getattr(batch, n, None) for n in TARGET_NAMES}
        tensors = [value for value in named.values() if isinstance(value, Tensor)]
        selected = tensors[0] if len(tensors) == 1 else None
    if not isinstance(selected, Tensor):
        where = "`targets` should return the labels, such as `targets=lambda batch: batch[1]`"
        raise MisconfigurationException(f"{where}, from {describe(batch)}.")
    return selected


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """List the parameters of the ``forward`` of a module, compiled or not."""
    module: Any = getattr(model, "_orig_mod", model)
    return list(inspect.signature(module.forward).parameters.values())


def num_required(model: nn.Module) -> int:
    """Count the positional arguments that the ``forward`` of a module requires."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.default is p.empty and p.kind in kinds for p in parameters_of(model))


def check_argument(name: str, value: object, valid: bool, expected: str) -> None:
    """Raise MisconfigurationException, saying what the argument should be, unless it is valid."""
    if not valid:
        raise MisconfigurationException(f"`{name}` should be {expected}, got {value!r}.")


def check_int(name: str, value: object, minimum: int) -> None:
    """Require an int (not a bool) of at least a minimum."""
    valid = isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= minimum
    check_argument(name, value, valid, f"an int of {minimum} or more")


def check_functions(**functions: object) -> None:
    """Require functions that select a part of a batch or of an output, or None."""
    for name, value in functions.items():
        check_argument(name, value, value is None or callable(value), "a function, such as `lambda x: x[0]`, or None")


def clone_tensors(value: Any, clone: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Copy a batch: clone the tensors in its tuples, lists and dicts, and deep-copy other objects."""
    if isinstance(value, Tensor):
        return clone(value)
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({key: clone_tensors(item, clone) for key, item in value.items()})
        return new
    if type(value) in (list, tuple) or hasattr(value, "_fields"):
        items = [clone_tensors(item, clone) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return copy.deepcopy(value)


def is_floating(tensor: Tensor) -> bool:
    """Check whether noise can be added: to dense floating tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested


def tensors_in(value: Any) -> list[Tensor]:
    """List the tensors in a value and its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def describe(value: Any) -> str:
    """Describe a value for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype}" + ("" if value.is_nested else f" and shape {tuple(value.shape)}")
    if isinstance(value, Mapping):
        return f"{type(value).__name__} of {', '.join(map(repr, value))}"
    if isinstance(value, list | tuple):
        return f"{type(value).__name__} of {len(value)}: {', '.join(map(describe, value[:5]))}"
    return type(value).__name__
