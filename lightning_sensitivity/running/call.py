"""Call any model on any batch: which arguments it takes, where its outputs are, and where the labels are."""

import copy
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeGuard
from weakref import WeakKeyDictionary

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_sensitivity.compat import original_module
from lightning_sensitivity.messages import Refused, Selector, describe, refuse_on_error
from lightning_sensitivity.running.batches import (
    TARGET_NAMES,
    beside_labels,
    clone_tensors,
    entry,
    first_of,
    inputs_hint,
    is_constant,
    is_dense,
    is_empty,
    is_floating,
    is_like_targets,
    places,
    take,
    targets_hint,
    tensors_in,
    without_labels,
)

Perturb = Callable[[Tensor], Tensor]
Function = Callable[[Any, Any], Any]  # of a module and a batch, in place of ``forward``
Arguments = dict[str, object]

_BATCH = "the batch"  # the name of what such a function gets
_ANY, _KEYWORDS = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_DEFAULTS = ("torch.nn.modules.module", "lightning.pytorch", "pytorch_lightning")  # where `forward` is nobody's
# Parameters of ``forward`` by module: to read them for each batch takes longer than a small network.
_PARAMETERS: WeakKeyDictionary[nn.Module, Mapping[str, inspect.Parameter]] = WeakKeyDictionary()


class ModelCall:
    """Call a model on a batch, any number of times, with clean or perturbed inputs.

    The arguments of the model are

    - with a function ``inputs``, what it returns: one argument, a tuple of them, or a dict of those that
      ``forward`` names;
    - of a mapping, the entries that ``forward`` names, or all if it takes only ``**kwargs``. If it names none
      and has one argument, the only entry beside labels, if that is a tensor, or the whole of several;
    - of a named tuple that has all that ``forward`` requires, the fields that it names;
    - of another tuple or list, as many elements as ``forward`` requires arguments, at least one: the first
      ones, or those of the first one in ``((a, b), y)``;
    - otherwise the batch.

    Perturbed is the first argument, or of several by name the only one that has floating tensors and is not
    called like labels. If it holds several of these, you have to say by ``inputs`` which.

    Args:
        model: The module, whose ``forward`` names the arguments.
        batch: What the loader gave, on the model's device.
        inputs: A function ``batch -> arguments``, or None for the rules above.
        outputs: A function ``result -> outputs``, or None; see :func:`select_outputs`.

    Attributes:
        by_name: Whether the model gets its arguments by name, and not by position.
        arguments: The arguments of the model by their names in ``forward``; those of ``*args`` by numbers.
        size: The number of samples, if that is the first dimension of all tensors, and all else belongs to all
            samples; 0 if that is unknown, as with graphs and lists.

    Raises:
        MisconfigurationException: If it is not clear how to call the model.
    """

    def __init__(
        self, model: nn.Module, batch: object, inputs: Selector | None = None, outputs: Selector | None = None
    ) -> None:
        self._model = model
        self._outputs = outputs
        # The code that selects an argument has a place for its name or number; there is none if the user has chosen.
        self.by_name, self.arguments, self._place = _find_arguments(model, batch, inputs)
        self.size = _num_samples(self.arguments)

    def inputs(self) -> dict[str, object]:
        """Return the arguments, but for entries that are named like labels, also in a whole batch."""
        found = {name: without_labels(value) for name, value in self.arguments.items()}
        if not self.by_name:
            return found
        asked = {*parameters_of(self._model)} - {*TARGET_NAMES}  # which may be named a little like labels
        return {name: value for name, value in found.items() if name in asked or not is_like_targets(name)}

    def left_out(self) -> set[str]:
        """Name the entries that :meth:`inputs` leaves out, though their names are not those that labels have."""
        return _names(self.arguments) - _names(self.inputs()) - {*TARGET_NAMES}

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
        call = self._with(clone_tensors(self.arguments))
        if perturb is not None:
            name = self._argument_to_perturb()
            call.arguments[name] = apply_to_collection(
                call.arguments[name], Tensor, lambda x: perturb(x) if is_floating(x) else x, allow_frozen=True
            )
        result = call._result()
        if self.size == 1 and isinstance(result, Tensor) and result.shape[:1] != (1,):
            result = result[None]  # a single sample gets back its dimension, which `squeeze()` drops
        outputs = select_outputs(result, self._outputs)
        if self._outputs is None:
            self._check_class_dimension(outputs)
        return outputs

    def _result(self) -> object:
        return self._model(**self.arguments) if self.by_name else self._model(*self.arguments.values())

    def spread(self, max_samples: float) -> Tensor | None:
        """Choose evenly spaced samples; None for all, if these are no more than wanted, or unknown."""
        count = math.ceil(min(max_samples, self.size))
        return torch.arange(count) * self.size // count if count < self.size else None

    def take(self, indices: Tensor) -> "ModelCall":
        """Return the call on some of its samples."""
        new = self._with(apply_to_collection(self.arguments, Tensor, take, indices))
        new.size = len(indices)
        return new

    def to(self, device: torch.device) -> "ModelCall":
        """Return a call on the CPU as a call on a device."""
        return self if device.type == "cpu" else self._with(move_data_to_device(self.arguments, device))

    def copy_to_cpu(self) -> "ModelCall":
        """Copy the call to the CPU; non-tensors that can't be cloned are shared."""
        return self._with(move_data_to_device(clone_tensors(self.arguments), torch.device("cpu")))

    def _with(self, arguments: Arguments) -> "ModelCall":
        """Return the call with other arguments."""
        new = copy.copy(self)
        new.arguments = arguments
        return new

    def _check_class_dimension(self, outputs: Tensor) -> None:
        """Refuse dense outputs whose first dimensions, and not their last ones, are those of an input."""
        first, last = outputs.shape[1:-1], outputs.shape[2:]
        shapes = [x.shape[1:] for x in tensors_in(self.arguments) if not x.is_nested]
        are_first = first in [shape[: len(first)] for shape in shapes]
        are_last = last in [shape[-len(last) :] for shape in shapes]
        if min(first.numel(), last.numel()) > 1 and are_first and not are_last:
            raise Refused(
                f"`outputs` should move the classes to dimension 1, got {[*outputs.shape]}; if they are last, "
                "`outputs=lambda y: y.movedim(-1, 1)`; if they are there, `outputs=lambda y: y`."
            )

    def _floating(self) -> list[tuple[str, str]]:
        """List what noise can be added to: the name of its argument, and the code that selects it there."""
        floating = []
        for name in self.inputs() if self.by_name else [*self.arguments][:1]:
            value = self.arguments[name]
            found = places(beside_labels(value) if isinstance(value, Mapping) else value, name)
            floating += [(name, place) for place, _, x in found if is_floating(x) and not is_empty(x)]
        return floating

    def _argument_to_perturb(self) -> str:
        """Find the name of the argument to perturb, which is the first one by position."""
        floating = self._floating()
        has_choice = len(floating) > 1 and self._place != ""
        if len({name for name, _ in floating}) == 1 and not has_choice:
            return floating[0][0]
        listed = ", ".join(f"`{place}`" for _, place in floating) or "none"
        modules = original_module(self._model).named_modules()
        layers = [(name, each) for name, each in modules if name and [*each.parameters(recurse=False)]]
        layers.sort(key=lambda layer: not isinstance(layer[1], nn.Embedding))  # these come first
        at = repr(layers[0][0]) if layers else ""
        selected = ", ".join(map(self._place.format, self.arguments if self.by_name else range(len(self.arguments))))
        hint = f"; of a tuple, the first one is perturbed, with all that it holds: `inputs=lambda batch: ({selected},)`"
        raise Refused(
            f"Expected one dense floating input to perturb, got {listed} among the arguments of `forward` ({self}). "
            f"Perturb the output of a submodule by `at={at}`, or select an input by `inputs=`{hint * has_choice}.",
            entry="noise",
        )


class FunctionCall(ModelCall):
    """Call a function of the user on a model and a batch, in place of the model.

    Args:
        model: The module.
        batch: What the loader gave, on the model's device.
        function: A function ``(model, batch) -> result``.
        inputs: A function ``batch -> arguments`` that says what a reference sees, or None for nothing.
        outputs: A function ``result -> outputs``, or None; see :func:`select_outputs`.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: object,
        function: Function,
        inputs: Selector | None = None,
        outputs: Selector | None = None,
    ) -> None:
        self._model = model
        self._outputs = outputs
        self._function = function
        seen = () if inputs is None else inputs(clone_tensors(batch))
        self.by_name = isinstance(seen, Mapping)
        named = seen if isinstance(seen, Mapping) else dict(enumerate(as_tuple(seen)))
        self.arguments = {_BATCH: batch, **{str(name): value for name, value in named.items()}}
        self.size = _num_samples(self.arguments)

    def inputs(self) -> dict[str, object]:
        """Return what a reference sees."""
        return {name: value for name, value in self.arguments.items() if name != _BATCH}

    def left_out(self) -> set[str]:
        """Return nothing: the user has chosen."""
        return set()

    def _result(self) -> object:
        return self._function(self._model, self.arguments[_BATCH])


def _names(named: Mapping[str, object]) -> set[str]:
    """Collect the names of values, and of entries of those that are mappings."""
    return {*named, *(name for value in named.values() if isinstance(value, Mapping) for name in value)}


def _num_samples(arguments: Mapping[str, object]) -> int:
    """Count the samples by the first dimension of all tensors; 0 if that is unknown, as with lists and graphs."""
    numbers = {len(x) for x in tensors_in(arguments) if x.ndim > 0} if _has_samples(arguments) else {0}
    return numbers.pop() if len(numbers) == 1 else 0


def _has_samples(value: object) -> bool:
    """Return whether a value is made of dense tensors and constants; a list may be of samples."""
    if isinstance(value, Mapping):
        return all(map(_has_samples, value.values()))
    if isinstance(value, tuple) and not isinstance(value, PackedSequence):
        return all(map(_has_samples, value))
    return is_dense(value) or is_constant(value)


# Arguments


def _find_arguments(model: nn.Module, batch: Any, inputs: Selector | None) -> tuple[bool, Arguments, str]:
    """Return whether a model gets its arguments by name, these, and the code that selects one; see ModelCall."""
    if inputs is not None:
        return *_chosen_arguments(model, inputs(clone_tensors(batch))), ""  # it may write to the batch
    parameters, required = parameters_of(model), {*required_names(model)}
    if required and required <= {*getattr(batch, "_fields", ())}:  # of a named tuple
        return True, {name: x for name, x in batch._asdict().items() if name in parameters}, "batch.{}"
    if is_sequence(batch):
        elements = split_elements(model, batch)[0]
        return False, by_position(model, elements), "batch[0][{}]" if elements is batch[0] else "batch[{}]"
    if not isinstance(batch, Mapping):
        return False, by_position(model, (batch,)), "batch"
    named = {name: x for name, x in batch.items() if name in parameters or takes_only_keywords(model)}
    if named:
        return True, named, "batch[{!r}]"
    return False, by_position(model, (_only_argument(model, batch),)), "batch"


def _chosen_arguments(model: nn.Module, chosen: object) -> tuple[bool, Arguments]:
    """Return the arguments that a function of the user has chosen: one, a tuple, or a dict of those named."""
    if not isinstance(chosen, Mapping):
        return False, by_position(model, as_tuple(chosen))
    unknown = [name for name in chosen if name not in parameters_of(model)]
    if len(unknown) == len(chosen) and not takes_only_keywords(model):
        return False, by_position(model, (chosen,))
    if unknown and _KEYWORDS not in _kinds(model):
        names = ", ".join(map(repr, unknown))
        raise Refused(f"`inputs` should return arguments of `forward`, which has none that is called {names}.")
    return True, dict(chosen)


def _only_argument(model: nn.Module, batch: Mapping[str, object]) -> object:
    """Return the only tensor of a mapping, or all of it, as the only argument of a ``forward`` says that it takes."""
    required, beside = required_names(model), [*beside_labels(batch).values()]
    has_one = len(required) == 1
    annotation = str(parameters_of(model)[required[0]].annotation) if has_one else ""
    if re.search("dict|mapping", annotation, re.IGNORECASE):
        return batch
    takes_one = has_one or (not required and _ANY in _kinds(model))
    if takes_one and len(beside) == 1 and isinstance(beside[0], Tensor):
        return beside[0]
    if has_one and len(beside) > 1 and "Tensor" not in annotation:
        return batch
    raise Refused(
        f"`inputs` should return the arguments of `forward`, which names none of {describe(batch)}. Select them: "
        f"{inputs_hint(batch)}."
    )


def by_position(model: nn.Module, values: Sequence[object]) -> Arguments:
    """Name arguments that are given by position; those of ``*args`` by numbers."""
    return dict(zip([*parameters_of(model), *map(str, range(len(values)))], values, strict=False))


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the ``forward`` of a module, compiled or not, by name."""
    module = original_module(model)
    if module not in _PARAMETERS:
        _PARAMETERS[module] = inspect.signature(module.forward).parameters
    return _PARAMETERS[module]


def required_names(model: nn.Module) -> list[str]:
    """List the names of the positional arguments that ``forward`` requires."""
    return [name for name, p in parameters_of(model).items() if p.default is p.empty and p.kind in _POSITIONAL]


def has_options(model: nn.Module) -> bool:
    """Return whether a ``forward`` of one's own takes more arguments by position than it requires."""
    is_own = not type(original_module(model)).forward.__module__.startswith(_DEFAULTS)
    return is_own and sum(kind in (_ANY, *_POSITIONAL) for kind in _kinds(model)) > len(required_names(model))


def takes_only_keywords(model: nn.Module) -> bool:
    """Return whether ``forward`` takes only ``**kwargs``."""
    return {*_kinds(model)} <= {_KEYWORDS}


def is_sequence(batch: object) -> TypeGuard[Sequence[Any]]:
    """Return whether a batch has elements by position."""
    return isinstance(batch, list | tuple) and not isinstance(batch, PackedSequence)


def as_tuple(chosen: object) -> tuple[object, ...]:
    """Return what a function of the user returns as several values, of which a tuple has more than one."""
    return chosen if type(chosen) is tuple else (chosen,)


def split_elements(model: nn.Module, batch: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the inputs, as many elements as ``forward`` requires, or those of a in (a, y), and what follows."""
    count = max(1, len(required_names(model)))
    may_be_pair = len(batch) == 2 and count >= 2 and is_sequence(batch[0]) and len(batch[0]) == count
    if may_be_pair and isinstance(y := batch[1], Tensor):
        has_one_number = y.ndim in (1, 2) and y.shape[1:].numel() == 1  # for each sample
        if count > 2 or has_one_number:
            return batch[0], batch[1:]
    return batch[:count], batch[count:]


def _kinds(model: nn.Module) -> list[object]:
    return [p.kind for p in parameters_of(model).values()]


# Outputs


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
    if outputs is None or outputs is select_outputs:
        selected = _find_outputs(result)
    else:
        with refuse_on_error(f"`outputs` failed on {describe(result)}, which `forward` returned"):
            selected = outputs(result)
    if not is_floating(selected) or selected.ndim == 0:
        found = [place for place, _, x in places(result, "result") if is_floating(x) and x.ndim > 0]
        example = f": `outputs=lambda result: {found[0]}`" if len(found) == 1 else ""
        raise Refused(
            f"`outputs` should select a floating tensor (N, K, ...) or (N,), got {describe(selected)}, "
            f"from {describe(result)}, which `forward` returned{example}."
        )
    return selected


def _find_outputs(result: object) -> object:
    """Find the logits by name, else the first item; refuse (features, logits), which may be either."""
    if isinstance(result, Mapping) or hasattr(result, "logits"):
        return entry(result, "logits")
    if len({x.shape[1] for x in tensors_in(result) if x.ndim == 2 and is_floating(x)}) > 1:
        has_tensors = is_sequence(result) and any(map(is_floating, result))
        example = (
            "such as `outputs=lambda out: out[1]`" if has_tensors else "if none, set `call=lambda module, batch: ...`"
        )
        raise Refused(
            f"`outputs` should say which of several outputs are the logits, of {describe(result)}, which `forward` "
            f"returned: {example}."
        )
    return first_of(result)


# Labels


def select_targets(model: nn.Module, batch: Any, targets: Selector | None = None) -> Tensor:
    """Select the labels in a batch.

    Args:
        model: The module, whose ``forward`` says how many elements of a batch are inputs.
        batch: What the loader gave. A function ``targets`` gets a copy of its tensors.
        targets: A function ``batch -> tensor``. By default, the labels are the only entry, field or attribute
            that is called ``label``, ``labels``, ``target``, ``targets``, ``y``, ``Y`` or ``class``; otherwise
            the element of a tuple or list that follows the inputs of ``forward``, if no other one may be it.

    Raises:
        MisconfigurationException: If it is not clear where the labels are, or they are not a tensor.
    """
    if targets is None:
        selected = find_targets(model, batch)
    else:
        with refuse_on_error(f"`targets` failed on {describe(batch)}"):
            selected = targets(clone_tensors(batch))
    if not isinstance(selected, Tensor):
        rest = split_elements(model, batch)[1] if is_sequence(batch) else ()
        hint = "" if targets else targets_hint(batch, rest or batch)
        raise Refused(f"`targets` should return the labels{hint} from {describe(batch)}.")
    return selected


def find_targets(model: nn.Module, batch: object) -> object:
    """Find the labels by name or position; None if it is not clear where they are."""
    names = set(TARGET_NAMES).difference(required_names(model) if isinstance(batch, tuple) else ())
    found = [value for value in map(partial(entry, batch), names) if isinstance(value, Tensor)]
    if found or not is_sequence(batch):
        return found[0] if len(found) == 1 else None
    rest = split_elements(model, batch)[1]  # what follows the inputs
    has_choice = len(rest) > 1 and (any(isinstance(x, Tensor) for x in rest[1:]) or has_options(model))
    return rest[0] if rest and not has_choice else None
