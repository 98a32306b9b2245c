"""Call any model on any batch: choose its arguments and its outputs."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.arguments import Selector, describe
from lightning_sensitivity.compat import original_module

Perturb = Callable[[Tensor], Tensor]

# Names of labels in batches of torch, transformers and Lightning's examples.
TARGET_NAMES = ("label", "labels", "target", "targets", "y")
_CHOOSE = (
    "Select the model's arguments: `inputs=lambda batch: batch['image']`; "
    "for `forward(batch)`, `inputs=lambda batch: (batch,)`."
)


class ModelCall:
    """Call a model on one batch, or on several at once, any number of times, with clean or perturbed inputs.

    =======================  =========================================  ===============================================
    batch                    how the model is called                    what is perturbed
    =======================  =========================================  ===============================================
    a function ``inputs``    with what the function returns: one        all floating tensors in the first argument
                             argument, or a tuple of them
    a mapping                with the entries that ``forward`` names    the only floating tensor that is not called
                             (all, if it takes only ``**kwargs``)       like labels
    a tuple or list          with as many elements as ``forward``       all floating tensors in the first element
                             requires arguments, at least one
    anything else            with the batch                             the batch, if it is a tensor
    =======================  =========================================  ===============================================

    Args:
        model: The module, whose ``forward`` names the arguments.
        batch: What the loader gave, on the model's device.
        inputs: A function ``batch -> arguments``, or None for the rules above.
        outputs: A function ``result -> outputs``, or None; see :func:`select_outputs`.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        sizes: The number of samples in each batch that was joined into this call; 0 if it is unknown.

    Raises:
        MisconfigurationException: If it is not clear how to call the model.
    """

    def __init__(
        self, model: nn.Module, batch: Any, inputs: Selector | None = None, outputs: Selector | None = None
    ) -> None:
        self._model = model
        self._outputs = outputs
        self.args: tuple[Any, ...] = (batch,)
        self.kwargs: dict[str, Any] = {}
        if inputs:
            arguments = inputs(clone_tensors(batch))  # `inputs` may write to the batch
            self.args = arguments if type(arguments) is tuple else (arguments,)
        elif isinstance(batch, Mapping):
            self.args = ()
            self.kwargs = _named_arguments(model, batch)
        elif isinstance(batch, list | tuple) and len(batch):
            self.args = _positional_arguments(model, batch)
        self.sizes = [_num_samples(self.args, self.kwargs)]

    def __call__(self, perturb: Perturb | None = None) -> Tensor:
        """Call the model with copies of the arguments, perturbed or not, and select its outputs.

        Args:
            perturb: Function that returns the perturbed tensor; None for the batch as it is.

        Raises:
            MisconfigurationException: If there are no outputs, their dimension 1 could be a position, or no input can
                be perturbed.
        """
        perturbed = None if perturb is None else self.perturbed_argument()
        args = [_copy(value, perturb if index == perturbed else None) for index, value in enumerate(self.args)]
        kwargs = {name: _copy(value, perturb if name == perturbed else None) for name, value in self.kwargs.items()}
        outputs = select_outputs(self._model(*args, **kwargs), self._outputs)
        if self._outputs is None:
            self._check_class_dimension(outputs)
        return outputs

    def perturbed_argument(self) -> int | str:
        """Find the argument to perturb: its index or name.

        Raises:
            MisconfigurationException: If there is none, or several could be.
        """
        candidates: dict[int | str, Any] = dict(enumerate(self.args[:1]))
        candidates |= {name: value for name, value in self.kwargs.items() if name not in TARGET_NAMES}
        floating = [key for key, value in candidates.items() if any(map(is_floating, tensors_in(value)))]
        if len(floating) == 1:
            return floating[0]
        got = "; ".join(
            f"{key!r}: {describe(value)}" for key, value in (dict(enumerate(self.args)) | self.kwargs).items()
        )
        found = f"several: {', '.join(map(repr, floating))}" if floating else "none"
        raise MisconfigurationException(
            f"Expected one dense floating input to perturb, got {found} among the arguments of `forward` ({got}). "
            f"{_CHOOSE} For inputs that take no noise, such as token ids, perturb a submodule: `at='embedding'`."
        )

    def copied(self) -> "ModelCall":
        """Copy the call with its arguments, which the user's step may write to."""
        new = copy.copy(self)
        new.args = clone_tensors(self.args)
        new.kwargs = clone_tensors(self.kwargs)
        return new

    def select(self, samples: slice) -> "ModelCall":
        """Return the call on some of the samples; only for calls with a :meth:`layout`."""
        new = copy.copy(self)
        new.args = tuple(value[samples] if isinstance(value, Tensor) else value for value in self.args)
        kwargs = self.kwargs.items()
        new.kwargs = {name: value[samples] if isinstance(value, Tensor) else value for name, value in kwargs}
        new.sizes = [_num_samples(new.args, new.kwargs)]
        return new

    def layout(self) -> tuple[object, ...] | None:
        """Return what must be equal in calls that are joined: shapes and types of one sample; None if none can be."""
        values = (*self.args, *self.kwargs.values())
        has_samples = any(isinstance(value, Tensor) for value in values)
        if not has_samples or not all(_is_joinable(value, sum(self.sizes)) for value in values):
            return None
        return len(self.args), *self.kwargs, *map(_layout_of, values)

    def _check_class_dimension(self, outputs: Tensor) -> None:
        if math.prod(outputs.shape[2:]) <= 1:
            return
        shapes = [x.shape[1:] for x in tensors_in([self.args, self.kwargs]) if not x.is_nested]
        if not any(set(outputs.shape[2:]) <= set(s) and outputs.shape[1] not in s for s in shapes):
            raise MisconfigurationException(
                f"`outputs` should move the classes to dimension 1, got {[*outputs.shape]}; if they are last, "
                "`outputs=lambda y: y.movedim(-1, 1)`; if they are there, `outputs=lambda y: y`."
            )


def join_calls(calls: Sequence[ModelCall]) -> ModelCall:
    """Join calls of the same layout (see :meth:`ModelCall.layout`) into one call on all of their samples."""
    if len(calls) == 1:
        return calls[0]
    joint = copy.copy(calls[0])
    joint.args = tuple(_join(values) for values in zip(*(call.args for call in calls), strict=True))
    joint.kwargs = {name: _join([call.kwargs[name] for call in calls]) for name in joint.kwargs}
    joint.sizes = [size for call in calls for size in call.sizes]
    return joint


def select_outputs(result: Any, outputs: Selector | None = None) -> Tensor:
    """Select the outputs from the result of a model.

    Args:
        result: A tensor; a tuple or list, whose first element is taken; or a mapping or object with ``logits``.
        outputs: A function ``result -> tensor``; None to select them as described for ``result``.

    Raises:
        MisconfigurationException: If the selection is not a floating tensor, or is a scalar.
    """
    if outputs:
        selected = outputs(result)
    elif isinstance(result, Mapping):
        selected = result.get("logits")
    else:
        first = result[0] if isinstance(result, list | tuple) and result else result
        selected = getattr(result, "logits", first)
    if not isinstance(selected, Tensor) or selected.ndim == 0 or not is_floating(selected):
        raise MisconfigurationException(
            f"`outputs` should select a floating tensor (N, K, ...) or (N,), got {describe(selected)}, "
            f"from {describe(result)}, which `forward` returned."
        )
    return selected


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """List the parameters of the ``forward`` of a module, compiled or not."""
    return list(inspect.signature(original_module(model).forward).parameters.values())


def num_required(model: nn.Module) -> int:
    """Count the positional arguments that the ``forward`` of a module requires."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.default is p.empty and p.kind in kinds for p in parameters_of(model))


def clone_tensors(value: Any, clone: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Copy a batch: clone the tensors in its tuples, lists and dicts, and deep-copy other objects."""
    if isinstance(value, Tensor):
        return clone(value)
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({key: clone_tensors(item, clone) for key, item in value.items()})
        return new
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[clone_tensors(item, clone) for item in value])
    if type(value) in (list, tuple):
        return type(value)(clone_tensors(item, clone) for item in value)
    return copy.deepcopy(value)


def is_floating(tensor: Tensor) -> bool:
    """Check whether noise can be added: to dense floating tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested


def tensors_in(value: object) -> list[Tensor]:
    """List the tensors in a value and its tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


def _positional_arguments(model: nn.Module, batch: Sequence[Any]) -> tuple[Any, ...]:
    count = max(1, num_required(model))
    if len(batch) < count:
        raise MisconfigurationException(
            f"`inputs` should return the {count} arguments that `forward` requires, from {describe(batch)}. {_CHOOSE}"
        )
    return tuple(batch[:count])


def _named_arguments(model: nn.Module, batch: Mapping[Any, Any]) -> dict[str, Any]:
    parameters = parameters_of(model)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if {p.kind for p in parameters} == {inspect.Parameter.VAR_KEYWORD}:
        names = [key for key in batch if isinstance(key, str)]
    arguments = {name: batch[name] for name in batch if name in names}
    if not arguments:
        raise MisconfigurationException(
            f"`inputs` should return the arguments of `forward`, which names none of {describe(batch)}: for example, "
            f"`inputs=lambda batch: batch[{next(iter(batch), None)!r}]`, or `inputs=lambda batch: (batch,)` for "
            "`forward(batch)`."
        )
    return arguments


def _num_samples(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Count the samples of a batch by the first dimension of the first tensor; 0 if there is none."""
    for tensor in tensors_in([args, kwargs]):
        if not tensor.is_nested and tensor.ndim > 0:
            return len(tensor)
    return 0


def _copy(value: Any, perturb: Perturb | None) -> Any:
    if perturb is None:
        return clone_tensors(value)
    return clone_tensors(value, lambda tensor: perturb(tensor) if is_floating(tensor) else tensor.clone())


def _is_joinable(value: object, size: int) -> bool:
    """Return whether an argument can be part of a joint call: a tensor with one row per sample, or a plain value."""
    if isinstance(value, Tensor):
        is_plain = type(value) is Tensor and value.layout == torch.strided and not value.is_nested
        return is_plain and value.ndim > 0 and len(value) == size
    return value is None or isinstance(value, bool | int | float | str)


def _layout_of(value: object) -> object:
    """Return what must be equal in arguments that are joined."""
    return (value.shape[1:], value.dtype, value.device) if isinstance(value, Tensor) else value


def _join(values: Sequence[Any]) -> Any:
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else values[0]
