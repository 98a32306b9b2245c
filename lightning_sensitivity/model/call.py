"""Call any model on any batch: choose its arguments, its outputs and its labels."""

import copy
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.messages import Refused, Selector, describe, refuse_on_error
from lightning_sensitivity.model.batches import clone_tensors, first_of, is_floating, take, tensors_in

Perturb = Callable[[Tensor], Tensor]

# Names of labels in batches of torch, transformers and Lightning's examples.
TARGET_NAMES = ("label", "labels", "target", "targets", "y")
# Parameters of ``forward`` by module: to read them for each batch takes longer than a small network.
_PARAMETERS: WeakKeyDictionary[nn.Module, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()
_CHOOSE = "Select them: `inputs=lambda batch: batch['image']`; for `forward(batch)`, `inputs=lambda batch: (batch,)`."


class ModelCall:
    """Call a model on a batch, any number of times, with clean or perturbed inputs.

    The arguments of the model are

    - with a function ``inputs``, what it returns: one argument, or a tuple of them;
    - of a mapping, the entries that ``forward`` names, or all if it takes only ``**kwargs``;
    - of a tuple or list, as many elements as ``forward`` requires arguments, at least one: by their names
      if a named tuple has all of these, else the first ones;
    - otherwise the batch.

    Perturbed are all floating tensors in the first argument; of a mapping, those in the only entry that has
    some and is not called like labels.

    Args:
        model: The module, whose ``forward`` names the arguments.
        batch: What the loader gave, on the model's device.
        inputs: A function ``batch -> arguments``, or None for the rules above.
        outputs: A function ``result -> outputs``, or None; see :func:`select_outputs`.

    Attributes:
        by_name: Whether the model gets its arguments by name, and not by position.
        arguments: The arguments of the model by their names in ``forward``; those of ``*args`` by numbers.
        size: The number of samples, if tensors have a row for each, and all else belongs to all samples;
            0 if that is unknown, as with graphs and lists.

    Raises:
        MisconfigurationException: If it is not clear how to call the model.
    """

    def __init__(
        self, model: nn.Module, batch: object, inputs: Selector | None = None, outputs: Selector | None = None
    ) -> None:
        self._model = model
        self._outputs = outputs
        if inputs is None and isinstance(batch, Mapping):
            self.by_name = True
            self.arguments = _named_arguments(model, batch)
        else:
            self.by_name = False
            values = _positional_arguments(model, batch, inputs)
            names = [*parameters_of(model), *map(str, range(len(values)))]
            self.arguments = dict(zip(names, values, strict=False))
        self.size = _num_samples(self.arguments)

    def inputs(self) -> dict[str, object]:
        """Return the arguments, but for entries that are named like labels, also in a whole batch."""
        arguments = _without_labels(self.arguments) if self.by_name else self.arguments
        return {name: _without_labels(value) for name, value in arguments.items()}

    def __str__(self) -> str:
        """Describe the arguments for an error message."""
        return "; ".join(f"{name!r}: {describe(value)}" for name, value in self.arguments.items())

    def __call__(self, perturb: Perturb | None = None) -> Tensor:
        """Call the model with copies of the arguments, perturbed or not, and select its outputs.

        Args:
            perturb: Function that returns the perturbed tensor; None for the batch as it is.

        Raises:
            MisconfigurationException: If it is not clear what to perturb, or where outputs are.
        """
        call = self._with(clone_tensors)
        if perturb is not None:
            name = self._argument_to_perturb()
            call.arguments[name] = clone_tensors(call.arguments[name], lambda x: perturb(x) if is_floating(x) else x)
        outputs = select_outputs(call._run(), self._outputs)
        if self._outputs is None:
            self._check_class_dimension(outputs)
        return outputs

    def _run(self) -> object:
        """Run the model; a single sample gets back its dimension, which ``squeeze()`` drops."""
        result = self._model(**self.arguments) if self.by_name else self._model(*self.arguments.values())
        if self.size == 1 and isinstance(result, Tensor) and result.shape[:1] != (1,):
            return result[None]
        return result

    def spread(self, max_samples: float) -> Tensor | None:
        """Choose evenly spaced rows; None for all, if these are no more than wanted, or unknown."""
        count = math.ceil(min(max_samples, self.size))
        return torch.arange(count) * self.size // count if count < self.size else None

    def take(self, rows: Tensor) -> "ModelCall":
        """Return the call on some of its rows."""
        new = self._with(lambda value: apply_to_collection(value, Tensor, take, rows))
        new.size = len(rows)
        return new

    def to(self, device: torch.device) -> "ModelCall":
        """Return a call on the CPU as a call on a device."""
        return self if device.type == "cpu" else self._with(lambda value: move_data_to_device(value, device))

    def copy_to_cpu(self) -> "ModelCall":
        """Copy the call to the CPU; non-tensors that can't be cloned are shared."""
        return self._with(lambda value: move_data_to_device(clone_tensors(value), torch.device("cpu")))

    def _with(self, change: Callable[[object], object]) -> "ModelCall":
        """Return the call with other arguments, which a function makes of those of this call."""
        new = copy.copy(self)
        new.arguments = {name: change(value) for name, value in self.arguments.items()}
        return new

    def _check_class_dimension(self, outputs: Tensor) -> None:
        """Refuse dense outputs whose first dimensions, and not their last ones, are those of an input."""
        first, last = outputs.shape[1:-1], outputs.shape[2:]
        shapes = [x.shape[1:] for x in tensors_in(self.arguments) if not x.is_nested]
        are_first = any(shape[: len(first)] == first for shape in shapes)
        are_last = any(shape[-len(last) :] == last for shape in shapes)
        if first.numel() > 1 and last.numel() > 1 and are_first and not are_last:
            raise Refused(
                f"`outputs` should move the classes to dimension 1, got {[*outputs.shape]}; if they are last, "
                "`outputs=lambda y: y.movedim(-1, 1)`; if they are there, `outputs=lambda y: y`."
            )

    def _argument_to_perturb(self) -> str:
        """Find the name of the argument to perturb, which is the first one by position."""
        inputs = [*self.inputs()] if self.by_name else [*self.arguments][:1]
        floating = [name for name in inputs if any(map(is_floating, tensors_in(self.arguments[name])))]
        if len(floating) != 1:
            names = ", ".join(map(repr, floating)) or "none"
            raise Refused(
                f"Expected one dense floating input to perturb, got {names} among the arguments of `forward` ({self}). "
                f"{_CHOOSE} Or perturb the output of a submodule, such as an embedding, by `at=`.",
                entry="noise",
            )
        return floating[0]


def _without_labels(value: Any) -> Any:
    """Return a mapping without the entries that are named like labels, and all else as it is."""
    if not isinstance(value, Mapping) or value.keys().isdisjoint(TARGET_NAMES):
        return value
    return {name: item for name, item in value.items() if name not in TARGET_NAMES}


def _num_samples(arguments: Mapping[str, object]) -> int:
    """Count the samples by the rows that all tensors have; 0 if that is unknown, as with lists and graphs."""
    numbers = {len(x) for x in tensors_in(arguments) if x.ndim > 0} if _has_rows(arguments) else {0}
    return numbers.pop() if len(numbers) == 1 else 0


def _has_rows(value: object) -> bool:
    """Check whether a value is made of dense tensors and constants; a list may be of samples."""
    if isinstance(value, Tensor):
        return value.layout == torch.strided and not value.is_nested
    if isinstance(value, Mapping | tuple) and not isinstance(value, PackedSequence):
        return all(map(_has_rows, value.values() if isinstance(value, Mapping) else value))
    return isinstance(value, bool | int | float | str | None)


def select_outputs(result: object, outputs: Selector | None = None) -> Tensor:
    """Select the outputs from the result of a model.

    Args:
        result: A tensor; a tuple or list, whose first element is taken, unless there is a choice; or a
            mapping or object with ``logits``.
        outputs: A function ``result -> tensor``; None to select them as described for ``result``.

    Raises:
        MisconfigurationException: If the selection is not a floating tensor, or is a scalar; if several
            elements of a tuple may be the outputs.
    """
    selected = outputs(result) if outputs else _find_outputs(result)
    if not is_floating(selected) or selected.ndim == 0:
        example = f": `outputs=lambda result: result[{list(result)[-1]!r}]`" if isinstance(result, Mapping) else ""
        raise Refused(
            f"`outputs` should select a floating tensor (N, K, ...) or (N,), got {describe(selected)}, "
            f"from {describe(result)}, which `forward` returned{example}."
        )
    return selected


def select_targets(model: nn.Module, batch: Any, targets: Selector | None = None) -> Tensor:
    """Select the labels in a batch.

    Args:
        model: The module, whose ``forward`` says how many elements of a batch are inputs.
        batch: What the loader gave. A function ``targets`` gets a copy of its tensors.
        targets: A function ``batch -> tensor``. By default, the labels are the only entry, field or attribute
            that is called ``label``, ``labels``, ``target``, ``targets`` or ``y``; otherwise the last element
            of a tuple or list, if all other elements are inputs of ``forward``.

    Raises:
        MisconfigurationException: If it is not clear where the labels are, or they are not a tensor.
    """
    if targets is None:
        selected = _find_targets(model, batch)
    else:
        with refuse_on_error(f"`targets` failed on {describe(batch)}"):
            selected = targets(clone_tensors(batch))
    if not isinstance(selected, Tensor):
        example = "`targets=lambda batch: batch[...]`"
        raise Refused(f"`targets` should return the labels, such as {example}, from {describe(batch)}.")
    return selected


def has_targets(model: nn.Module, batch: object) -> bool:
    """Return whether it is clear where the labels in a batch are."""
    return isinstance(_find_targets(model, batch), Tensor)


def _find_targets(model: nn.Module, batch: object) -> object:
    """Find the labels by name or position; None if it is not clear where they are."""
    required = _required_names(model)
    names = set(TARGET_NAMES).difference(required if isinstance(batch, tuple) else ())
    found = [value for value in map(partial(_entry, batch), names) if isinstance(value, Tensor)]
    if not found and isinstance(batch, list | tuple) and len(batch) == max(1, len(required)) + 1:
        return batch[-1]
    return found[0] if len(found) == 1 else None


def _find_outputs(result: object) -> object:
    """Find the logits by name, else the first item; refuse (features, logits), which may be either."""
    if isinstance(result, Mapping) or hasattr(result, "logits"):
        return _entry(result, "logits")
    if len({x.shape[1] for x in tensors_in(result) if x.ndim == 2 and is_floating(x)}) > 1:
        raise Refused(
            f"`outputs` should say which of several outputs are the logits, such as `outputs=lambda out: out[1]`, "
            f"of {describe(result)}, which `forward` returned."
        )
    return first_of(result)


def _entry(value: object, name: str) -> object:
    """Return an entry of a mapping or an attribute of another object; None if it is not there."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the ``forward`` of a module, compiled or not, by name."""
    module = original_module(model)
    if module not in _PARAMETERS:
        _PARAMETERS[module] = inspect.signature(module.forward).parameters
    return _PARAMETERS[module]


def _required_names(model: nn.Module) -> list[str]:
    """List the names of the positional arguments that ``forward`` requires."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return [name for name, p in parameters_of(model).items() if p.default is p.empty and p.kind in kinds]


def _positional_arguments(model: nn.Module, batch: object, inputs: Selector | None) -> Sequence[object]:
    if inputs is not None:
        arguments: object = inputs(clone_tensors(batch))  # which may write to the batch
        return arguments if type(arguments) is tuple else (arguments,)
    if not isinstance(batch, list | tuple) or isinstance(batch, PackedSequence):
        return (batch,)
    names = _required_names(model)
    if names and set(names) <= {*getattr(batch, "_fields", ())}:
        return [getattr(batch, name) for name in names]
    return batch[: max(1, len(names))]


def _named_arguments(model: nn.Module, batch: Mapping[str, object]) -> dict[str, object]:
    parameters = parameters_of(model)
    takes_all = all(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_all and parameters.keys().isdisjoint(batch):
        raise Refused(
            f"`inputs` should return the arguments of `forward`, which names none of {describe(batch)}. {_CHOOSE}"
        )
    return {name: value for name, value in batch.items() if takes_all or name in parameters}
