"""Call any model on any batch: choose its arguments, its outputs and its labels."""

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning_utilities import apply_to_collection
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
        arguments: The arguments of the model, by position or name.
        sizes: The number of samples in each batch that was joined into this call; 0 if it is unknown.

    Raises:
        MisconfigurationException: If it is not clear how to call the model.
    """

    def __init__(
        self, model: nn.Module, batch: object, inputs: Selector | None = None, outputs: Selector | None = None
    ) -> None:
        self._model = model
        self._outputs = outputs
        self.arguments: dict[int | str, object] = {0: batch}
        if inputs:
            arguments = inputs(clone_tensors(batch))  # `inputs` may write to the batch
            self.arguments = dict(enumerate(arguments if type(arguments) is tuple else (arguments,)))
        elif isinstance(batch, Mapping):
            self.arguments = _named_arguments(model, batch)
        elif isinstance(batch, list | tuple) and len(batch):
            self.arguments = _positional_arguments(model, batch)
        self.sizes = [_num_samples(batch, self.arguments.values())]

    @property
    def args(self) -> tuple[object, ...]:
        """The positional arguments of the model."""
        return tuple(value for key, value in self.arguments.items() if isinstance(key, int))

    @property
    def kwargs(self) -> dict[str, object]:
        """The keyword arguments of the model."""
        return {key: value for key, value in self.arguments.items() if isinstance(key, str)}

    def named(self) -> dict[str, Any]:
        """Return the arguments by their names in ``forward``, and further ones by their position."""
        names: dict[int | str, str] = dict(enumerate(p.name for p in parameters_of(self._model)))
        return {names.get(key, str(key)): value for key, value in self.arguments.items()}

    @property
    def size(self) -> int:
        """The number of samples; 0 if it is unknown."""
        return sum(self.sizes)

    @property
    def num_bytes(self) -> int:
        """The memory of the tensors in the arguments."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(self.arguments))

    def __call__(self, perturb: Perturb | None = None, weights: Mapping[str, Tensor] | None = None) -> Tensor:
        """Call the model with copies of the arguments, perturbed or not, and select its outputs.

        Args:
            perturb: Function that returns the perturbed tensor; None for the batch as it is.
            weights: Parameters by name that take the place of the model's own; None for its own.

        Raises:
            MisconfigurationException: If there are no outputs, their dimension 1 could be a position, or no
                input can be perturbed.
        """
        call = self._with(clone_tensors)
        if perturb is not None:
            key = self._argument_to_perturb()
            call.arguments[key] = clone_tensors(self.arguments[key], lambda x: perturb(x) if is_floating(x) else x)
        if weights is None:
            result = self._model(*call.args, **call.kwargs)
        else:
            result = functional_call(self._model, dict(weights), call.args, call.kwargs)
        outputs = select_outputs(result, self._outputs)
        if self._outputs is None:
            self._check_class_dimension(outputs)
        return outputs

    def to(self, device: torch.device | str) -> "ModelCall":
        """Copy the call, with its tensors on a device; other objects in its arguments are shared."""
        cloned = self._with(lambda value: clone_tensors(value, lambda tensor: tensor.detach().clone()))
        return cloned._with(lambda value: move_data_to_device(value, torch.device(device)))

    def select(self, samples: slice) -> "ModelCall":
        """Return the call on some of the samples; only for calls with a :meth:`layout`."""
        new = self._with(lambda value: value[samples] if isinstance(value, Tensor) else value)
        new.sizes = [len(range(self.size)[samples])]
        return new

    def layout(self) -> tuple[object, ...] | None:
        """Return what must be equal in calls that are joined: shape and type of a sample; None if none can be."""
        if not self.size or not all(_is_joinable(value, self.size) for value in self.arguments.values()):
            return None
        return *self.arguments, *map(_layout_of, self.arguments.values())

    def _with(self, change: Callable[[object], object]) -> "ModelCall":
        """Return the call with other arguments, which a function makes of those of this call."""
        new = copy.copy(self)
        new.arguments = {key: change(value) for key, value in self.arguments.items()}
        return new

    def _argument_to_perturb(self) -> int | str:
        """Find the argument to perturb: 0, the first positional one, or its name."""
        named = [name for name in self.kwargs if name not in TARGET_NAMES]
        candidates: list[int | str] = [*range(len(self.args[:1])), *named]
        floating = [key for key in candidates if any(map(is_floating, tensors_in(self.arguments[key])))]
        if len(floating) == 1:
            return floating[0]
        raise MisconfigurationException(self._advice(floating))

    def _advice(self, floating: Sequence[int | str]) -> str:
        """Say what to do if it is not clear what to perturb."""
        got = "; ".join(f"{key!r}: {describe(value)}" for key, value in self.arguments.items())
        if floating:
            several = ", ".join(map(repr, floating))
            expected = "Expected one dense floating input to perturb, got several"
            return f"{expected}: {several}, among {got}. {_CHOOSE}"
        name = _submodule_to_perturb(self._model)
        perturb = "" if name is None else f"Perturb the output of a submodule, such as `at={name!r}`. "
        expected = "Expected a dense floating input to perturb, got none among the arguments of `forward`"
        return f"{perturb}{expected} ({got}). {_CHOOSE}"

    def _check_class_dimension(self, outputs: Tensor) -> None:
        if math.prod(outputs.shape[2:]) <= 1:
            return
        shapes = [x.shape[1:] for x in tensors_in(self.arguments) if not x.is_nested]
        if not any(set(outputs.shape[2:]) <= set(s) and outputs.shape[1] not in s for s in shapes):
            raise MisconfigurationException(
                f"`outputs` should move the classes to dimension 1, got {[*outputs.shape]}; if they are "
                "last, `outputs=lambda y: y.movedim(-1, 1)`; if they are there, `outputs=lambda y: y`."
            )


def join_calls(calls: Sequence[ModelCall]) -> ModelCall:
    """Join calls of the same layout (see :meth:`ModelCall.layout`) into one call on all of their samples."""
    if len(calls) == 1:
        return calls[0]
    joint = copy.copy(calls[0])
    joint.arguments = {key: _join([call.arguments[key] for call in calls]) for key in joint.arguments}
    joint.sizes = [size for call in calls for size in call.sizes]
    return joint


def select_outputs(result: object, outputs: Selector | None = None) -> Tensor:
    """Select the outputs from the result of a model.

    Args:
        result: A tensor; a tuple or list, whose first element is taken; or a mapping or object with
            ``logits``.
        outputs: A function ``result -> tensor``; None to select them as described for ``result``.

    Raises:
        MisconfigurationException: If the selection is not a floating tensor, or is a scalar.
    """
    selected = outputs(result) if outputs else _find_outputs(result)
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
        targets: A function ``batch -> tensor``. By default, the labels are the last element of a tuple or
            list, if all other elements are inputs of ``forward``; otherwise the only entry or attribute that
            is called ``label``, ``labels``, ``target``, ``targets`` or ``y``.

    Raises:
        MisconfigurationException: If it is not clear where the labels are, or they are not a tensor.
    """
    try:
        selected = _find_targets(model, batch) if targets is None else targets(clone_tensors(batch))
    except Warning:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise MisconfigurationException(f"`targets` failed on {describe(batch)}: {reason}.") from error
    if not isinstance(selected, Tensor):
        key = repr(list(batch)[-1]) if isinstance(batch, Mapping) else "1"
        raise MisconfigurationException(
            f"`targets` should return the labels, such as `targets=lambda batch: batch[{key}]`, from {describe(batch)}."
        )
    return selected


def _find_outputs(result: object) -> object:
    if isinstance(result, Mapping):
        return result.get("logits")
    return getattr(result, "logits", first_of(result))


def first_of(result: Any) -> Any:
    """Return the first item of a tuple or list, or another object as it is."""
    return result[0] if isinstance(result, list | tuple) and result else result


def parameters_of(model: nn.Module) -> list[inspect.Parameter]:
    """List the parameters of the ``forward`` of a module, compiled or not."""
    return list(inspect.signature(original_module(model).forward).parameters.values())


def num_required(model: nn.Module) -> int:
    """Count the positional arguments that the ``forward`` of a module requires."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.default is p.empty and p.kind in kinds for p in parameters_of(model))


@runtime_checkable
class _Cloneable(Protocol):
    """A tensor, or an object that can be cloned like one, such as a graph of PyTorch Geometric."""

    def clone(self) -> Any:
        """Return a copy."""


def clone_tensors(value: Any, clone: Callable[[Tensor], Tensor] = Tensor.clone) -> Any:
    """Clone what can be cloned in a value and its collections; other objects are shared, not copied.

    Args:
        value: A batch, or a part of one.
        clone: Function that clones a tensor.
    """
    return apply_to_collection(
        value, _Cloneable, lambda item: clone(item) if isinstance(item, Tensor) else item.clone(), allow_frozen=True
    )


def is_floating(tensor: Tensor) -> bool:
    """Check whether noise can be added: to dense floating tensors."""
    return tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_nested


def tensors_in(value: object) -> list[Tensor]:
    """List the tensors in a value and its tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for item in _items_of(value) for tensor in tensors_in(item)]


def _items_of(value: object) -> Iterable[object]:
    """Return the items of a mapping, tuple or list; nothing of another object."""
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _positional_arguments(model: nn.Module, batch: Sequence[object]) -> dict[int | str, object]:
    count = max(1, num_required(model))
    if len(batch) < count:
        raise MisconfigurationException(
            f"`inputs` should return the {count} arguments that `forward` requires, from {describe(batch)}. {_CHOOSE}"
        )
    return dict(enumerate(batch[:count]))


def _named_arguments(model: nn.Module, batch: Mapping[str, object]) -> dict[int | str, object]:
    parameters = parameters_of(model)
    takes_all = all(p.kind is p.VAR_KEYWORD for p in parameters)
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not takes_all and set(names).isdisjoint(batch.keys()):
        raise MisconfigurationException(
            f"`inputs` should return the arguments of `forward`, which names none of {describe(batch)}: "
            f"for example, `inputs=lambda batch: batch[{next(iter(batch), None)!r}]`, or "
            "`inputs=lambda batch: (batch,)` for `forward(batch)`."
        )
    return {name: value for name, value in batch.items() if takes_all or name in names}


def _submodule_to_perturb(model: nn.Module) -> str | None:
    """Name a submodule as an example for ``at``: the first embedding, or else the first; None without any."""
    modules = {name: module for name, module in original_module(model).named_modules() if name}
    embeddings = [name for name, module in modules.items() if isinstance(module, nn.Embedding)]
    return next(iter(embeddings or modules), None)


def _num_samples(batch: object, arguments: Iterable[object]) -> int:
    """Count the samples: rows of the first tensor, or items of a list that has a tensor for each sample."""
    known = _numbers_of_rows(_items_of(batch))
    for value in arguments:
        rows = _numbers_of_rows(tensors_in(value))
        if rows:
            return len(value) if _is_list_of_samples(value, rows, known) else rows[0]
    return 0


def _is_list_of_samples(value: object, rows: Sequence[int], known: Sequence[int]) -> TypeGuard[list[Tensor]]:
    """Return whether a list has a tensor for each sample, judging by the rows of other tensors in the batch."""
    if not isinstance(value, list) or rows[0] in known:
        return False
    return len(value) in known or len(set(rows)) > 1


def _numbers_of_rows(values: Iterable[object]) -> list[int]:
    return [len(x) for x in values if isinstance(x, Tensor) and x.ndim > 0 and not x.is_nested]


def _is_joinable(value: object, size: int) -> bool:
    """Return whether an argument can be part of a joint call: a tensor with a row per sample, or a plain value."""
    if not isinstance(value, Tensor):
        return isinstance(value, bool | int | float | str | None)
    is_plain = type(value) is Tensor and value.layout == torch.strided and not value.is_nested
    return is_plain and value.ndim > 0 and len(value) == size


def _layout_of(value: object) -> object:
    """Return what must be equal in arguments that are joined."""
    return (value.shape[1:], value.dtype, value.device) if isinstance(value, Tensor) else value


def _join(values: list[Any]) -> Any:
    return torch.cat(values) if isinstance(values[0], Tensor) else values[0]


def _find_targets(model: nn.Module, batch: Any) -> object:
    """Find the labels by position or name; None if it is not clear where they are."""
    if isinstance(batch, list | tuple):
        return batch[-1] if len(batch) == max(1, num_required(model)) + 1 else None
    is_mapping = isinstance(batch, Mapping)
    named = [batch.get(name) if is_mapping else getattr(batch, name, None) for name in TARGET_NAMES]
    tensors = [value for value in named if isinstance(value, Tensor)]
    return tensors[0] if len(tensors) == 1 else None
