"""Call any model on any batch: choose its arguments, its outputs and its labels."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.func import functional_call

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
        self.sizes = [_num_samples(batch, [*self.args, *self.kwargs.values()])]

    @property
    def size(self) -> int:
        """The number of samples; 0 if it is unknown."""
        return sum(self.sizes)

    @property
    def num_bytes(self) -> int:
        """The memory of the tensors in the arguments."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in([self.args, self.kwargs]))

    def __call__(self, perturb: Perturb | None = None, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Call the model with copies of the arguments, perturbed or not, and select its outputs.

        Args:
            perturb: Function that returns the perturbed tensor; None for the batch as it is.
            weights: Parameters by name that take the place of the model's own; None for its own.

        Raises:
            MisconfigurationException: If there are no outputs, their dimension 1 could be a position, or no input can
                be perturbed.
        """
        perturbed = None if perturb is None else self.perturbed_argument()
        args = [_copy(value, perturb if index == perturbed else None) for index, value in enumerate(self.args)]
        kwargs = {name: _copy(value, perturb if name == perturbed else None) for name, value in self.kwargs.items()}
        if weights is None:
            result = self._model(*args, **kwargs)
        else:
            result = functional_call(self._model, dict(weights), tuple(args), kwargs)
        outputs = select_outputs(result, self._outputs)
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
        raise MisconfigurationException(self._advice(floating))

    def to(self, device: torch.device | str) -> "ModelCall":
        """Copy the call, with its tensors on a device; other objects in its arguments are shared."""
        return self._with(lambda value: clone_tensors(value, lambda tensor: tensor.detach().to(device, copy=True)))

    def select(self, samples: slice) -> "ModelCall":
        """Return the call on some of the samples; only for calls with a :meth:`layout`."""
        new = self._with(lambda value: value[samples] if isinstance(value, Tensor) else value)
        new.sizes = [len(range(self.size)[samples])]
        return new

    def layout(self) -> tuple[object, ...] | None:
        """Return what must be equal in calls that are joined: shapes and types of one sample; None if none can be."""
        values = (*self.args, *self.kwargs.values())
        has_samples = any(isinstance(value, Tensor) for value in values)
        if not has_samples or not all(_is_joinable(value, self.size) for value in values):
            return None
        return len(self.args), *self.kwargs, *map(_layout_of, values)

    def _with(self, change: Callable[[Any], Any]) -> "ModelCall":
        """Return the call with other arguments, which a function makes of those of this call."""
        new = copy.copy(self)
        new.args = tuple(map(change, self.args))
        new.kwargs = {name: change(value) for name, value in self.kwargs.items()}
        return new

    def _advice(self, floating: Sequence[int | str]) -> str:
        """Say what to do if it is not clear what to perturb."""
        arguments = dict[int | str, Any](enumerate(self.args)) | self.kwargs
        got = "; ".join(f"{key!r}: {describe(value)}" for key, value in arguments.items())
        if floating:
            several = ", ".join(map(repr, floating))
            return f"Expected one dense floating input to perturb, got several: {several}, among {got}. {_CHOOSE}"
        none = (
            f"Expected a dense floating input to perturb, got none among the arguments of `forward` ({got}). {_CHOOSE}"
        )
        name = _submodule_to_perturb(self._model)
        return none if name is None else f"Perturb the output of a submodule, such as `at={name!r}`. {none}"

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


def select_targets(model: nn.Module, batch: Any, targets: Selector | None = None) -> Tensor:
    """Select the labels in a batch.

    Args:
        model: The module, whose ``forward`` says how many elements of a batch are inputs.
        batch: What the loader gave. A function ``targets`` gets a copy of its tensors.
        targets: A function ``batch -> tensor``. By default, the labels are the last element of a tuple or list, if all
            other elements are inputs of ``forward``; otherwise the only entry or attribute that is called ``label``,
            ``labels``, ``target``, ``targets`` or ``y``.

    Raises:
        MisconfigurationException: If it is not clear where the labels are, or they are not a tensor.
    """
    selected = _find_targets(model, batch) if targets is None else _call_targets(targets, batch)
    if not isinstance(selected, Tensor):
        key = repr(list(batch)[-1]) if isinstance(batch, Mapping) and batch else "1"
        raise MisconfigurationException(
            f"`targets` should return the labels, such as `targets=lambda batch: batch[{key}]`, from {describe(batch)}."
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
    """Clone the tensors in a value and its tuples, lists and dicts; other objects are shared, not copied."""
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
    return value


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


def _submodule_to_perturb(model: nn.Module) -> str | None:
    """Name a submodule as an example for ``at``: the first embedding, or else the first of all; None without any."""
    modules = {name: module for name, module in original_module(model).named_modules() if name}
    embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
    return next(iter(embeddings or modules), None)


def _num_samples(batch: Any, arguments: Iterable[Any]) -> int:
    """Count the samples: rows of the first tensor, or items of the first list if it has a tensor for each sample."""
    entries = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    known = {_num_rows(entry) for entry in entries if isinstance(entry, Tensor)}
    for value in arguments:
        rows = [number for number in map(_num_rows, tensors_in(value)) if number]
        if rows:
            return len(value) if _is_list_of_samples(value, rows, known) else rows[0]
    return 0


def _is_list_of_samples(value: object, rows: Sequence[int], known: set[int]) -> bool:
    """Return whether a list has a tensor for each sample, judging by the rows of other tensors in the batch."""
    if not isinstance(value, list) or rows[0] in known:
        return False
    return len(value) in known if known else len(set(rows)) > 1


def _num_rows(tensor: Tensor) -> int:
    return 0 if tensor.is_nested or tensor.ndim == 0 else len(tensor)


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


def _find_targets(model: nn.Module, batch: Any) -> object:
    """Find the labels by position or name; None if it is not clear where they are."""
    if isinstance(batch, Tensor):
        return None
    if isinstance(batch, list | tuple):
        return batch[-1] if len(batch) == max(1, num_required(model)) + 1 else None
    named = [_entry(batch, name) for name in TARGET_NAMES]
    tensors = [value for value in named if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None


def _call_targets(targets: Selector, batch: Any) -> object:
    try:
        return targets(clone_tensors(batch))
    except Warning:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise MisconfigurationException(f"`targets` failed on {describe(batch)}: {reason}.") from error


def _entry(batch: Any, name: str) -> object:
    """Return an entry of a mapping, or an attribute of another object; None if there is none."""
    return batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
