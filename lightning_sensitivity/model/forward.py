"""How any model is run on any batch: its arguments, its outputs, and the labels of the batch."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from lightning_sensitivity.model.arguments import clone_tensors, describe, is_floating, tensors_in

# A function from the batch to the arguments, keys or indices of what is perturbed, or None for the rules of `Forward`.
Inputs = Callable[[Any], Any] | Sequence[int | str] | int | str | None
# A key, an attribute, an index or a function, or None where there is only one choice.
Selector = Callable[..., Any] | int | str | None
Perturb = Callable[[Tensor], Tensor]

# What mappings call their labels in torch, transformers and Lightning's examples.
TARGET_NAMES = ("label", "labels", "target", "targets", "y")
_CHOOSE = "Choose it: `inputs=lambda batch: batch['image']`, or `at=` a submodule where inputs can take no noise."


class Forward:
    """Run a model on one batch any number of times, with clean or perturbed inputs.

    ==========================  ==================================  ================================================
    batch                       how the model is called             what is perturbed
    ==========================  ==================================  ================================================
    a function ``inputs``       with what the function returns:     all floating tensors in the first argument
                                one argument, or a tuple of them
    a mapping                   with the entries that ``forward``   the only floating tensor that is not called like
                                names (all, if it takes             labels, or the keys in ``inputs``, which come
                                ``**kwargs`` alone)                 first if ``forward`` does not name them
    a tuple or list             with the first p elements, if       all floating tensors in the first element, or
                                ``forward`` requires p arguments    the indices in ``inputs``
    anything else               with the batch                      the batch, if it is a tensor
    ==========================  ==================================  ================================================

    Args:
        model: The module, of which ``forward`` names the arguments.
        batch: What the loader gave, on the model's device.
        inputs: A key or an index, a list of them, a function ``batch -> arguments``, or None for the rules above.
        outputs: Which outputs to take; see :func:`select_outputs`.
        perturbs_input: False where no floating input is needed.

    Attributes:
        args: Positional arguments of the model.
        kwargs: Keyword arguments of the model.
        perturbed: Positions and keywords of the arguments that are perturbed.

    Raises:
        MisconfigurationException: If it is not clear how to call the model, or what to perturb.
    """

    def __init__(
        self, model: nn.Module, batch: Any, inputs: Inputs = None, outputs: Selector = None, perturbs_input: bool = True
    ) -> None:
        if callable(inputs) or callable(outputs):  # which may write into the batch
            batch = clone_tensors(batch)
        self._model, self._outputs, self._batch = model, outputs, batch
        self.args: tuple[Any, ...] = (batch,)
        self.kwargs: dict[str, Any] = {}
        self.perturbed: list[int | str] = [0]
        chosen = inputs if isinstance(inputs, list | tuple) else [inputs]
        keys: list[Any] = [] if inputs is None or callable(inputs) else list(chosen)
        for key in keys:
            part(batch, key, "inputs")
        if callable(inputs):
            arguments = inputs(batch)
            self.args = arguments if type(arguments) is tuple else (arguments,)
        elif isinstance(batch, Mapping):
            self._call_by_name(batch, keys, perturbs_input)
        elif isinstance(batch, list | tuple) and len(batch):
            self._call_by_position(batch, keys)
        elif keys:
            raise MisconfigurationException(f"`inputs` should be a function for {describe(batch)}, got {inputs!r}.")
        self.perturbed = self.perturbed if perturbs_input else []
        for value in map(self.argument, self.perturbed):
            if not any(map(is_floating, tensors_in(value))):
                raise MisconfigurationException(f"Expected a dense floating input, got {describe(value)}. {_CHOOSE}")

    def __call__(self, perturb: Perturb | None = None) -> Tensor:
        """Run the model on copies of the arguments, perturbed or not, and select its outputs.

        Args:
            perturb: Gives what takes the place of a perturbed tensor; None for the batch as it is.

        Raises:
            MisconfigurationException: If there are no outputs, or their dimension 1 could be a position.
        """
        args = tuple(self._copy(index, value, perturb) for index, value in enumerate(self.args))
        kwargs = {name: self._copy(name, value, perturb) for name, value in self.kwargs.items()}
        outputs = select_outputs(self._model(*args, **kwargs), self._outputs, self._batch)
        if not callable(self._outputs) and math.prod(outputs.shape[2:]) > 1:
            shapes = [x.shape[1:] for x in tensors_in([self.args, self.kwargs]) if not x.is_nested]
            if not any(set(outputs.shape[2:]) <= set(s) and outputs.shape[1] not in s for s in shapes):
                where = "`outputs=lambda y: y` if in dimension 1, `outputs=lambda y: y.movedim(-1, 1)` if in the last"
                raise MisconfigurationException(f"`outputs` should say where {[*outputs.shape]} has classes: {where}.")
        return outputs

    def _call_by_name(self, batch: Mapping[Any, Any], keys: list[Any], perturbs_input: bool) -> None:
        parameters = parameters_of(self._model)
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if {p.kind for p in parameters} == {inspect.Parameter.VAR_KEYWORD}:
            names = [key for key in batch if isinstance(key, str)]
        named = {key: batch[key] for key in batch if key in names}
        if not keys and not named:
            raise MisconfigurationException(f"`inputs` should say what `forward` gets of {describe(batch)}. {_CHOOSE}")
        if not keys and perturbs_input:
            tensors = {key: value for key, value in named.items() if isinstance(value, Tensor) and is_floating(value)}
            keys = [key for key in tensors if key not in TARGET_NAMES]
            if len(keys) != 1:
                got = f"{keys} in {describe(batch)}"
                raise MisconfigurationException(f"Expected one floating input in the batch, got {got}. {_CHOOSE}")
        first = [key for key in keys if key not in named]
        self.args = tuple(batch[key] for key in first)
        self.kwargs = {name: value for name, value in named.items() if name not in names[: len(first)]}
        self.perturbed = [first.index(key) if key in first else key for key in keys]

    def _call_by_position(self, batch: Sequence[Any], keys: list[Any]) -> None:
        required = num_required(self._model)
        places = [int(k) % len(batch) if isinstance(k, Integral) else batch._fields.index(k) for k in keys or [0]]  # type: ignore[attr-defined]
        if required <= 1:
            self.args, self.perturbed = tuple(batch[place] for place in places), [*range(len(places))]
            return
        if len(batch) < required or max(places) >= required:
            expected = f"among the {required} arguments that `forward` requires, or a function that gives them"
            raise MisconfigurationException(f"`inputs` should be {expected}, got {keys or None} for {describe(batch)}.")
        self.args, self.perturbed = tuple(batch[:required]), [*places]

    def argument(self, place: int | str) -> Any:
        """Return the argument at a position or keyword."""
        return self.kwargs[place] if isinstance(place, str) else self.args[place]

    def _copy(self, place: int | str, value: Any, perturb: Perturb | None) -> Any:
        if perturb is None or place not in self.perturbed:
            return clone_tensors(value)
        return clone_tensors(value, lambda tensor: perturb(tensor) if is_floating(tensor) else tensor.clone())


def select_outputs(result: Any, outputs: Selector = None, batch: Any = None) -> Tensor:
    """Select the outputs in what the model returned.

    Args:
        result: A tensor; a tuple or list, of which the first element is taken; or a mapping or object with ``logits``.
        outputs: A key, attribute or index, a function ``result -> tensor`` or ``(result, batch) -> tensor``, or None
            for the rules above.
        batch: What the loader gave.

    Raises:
        MisconfigurationException: If there is no floating tensor, or it is a scalar.
    """
    if callable(outputs):
        selected = outputs(result, batch) if num_required(outputs) == 2 else outputs(result)
    elif outputs is not None:
        selected = part(result, outputs, "outputs")
    elif isinstance(result, Mapping) and "logits" in result:
        selected = result["logits"]
    else:
        first = result[0] if isinstance(result, list | tuple) and result else result
        selected = getattr(result, "logits", first)
    if not isinstance(selected, Tensor) or selected.ndim == 0 or not is_floating(selected):
        got = describe(selected) + (f" in {describe(result)}" if selected is not result else "")
        raise MisconfigurationException(f"`outputs` should choose a floating tensor (N, K, ...) or (N,), got {got}.")
    return selected


def select_targets(model: nn.Module, batch: Any, targets: Selector = None) -> Tensor:
    """Select the labels in a batch.

    Args:
        model: The module, of which ``forward`` says how many elements of a batch are inputs.
        batch: What the loader gave.
        targets: A key, an index, a function ``batch -> tensor``, or None: the last of the elements of a tuple or list
            if all others are inputs of ``forward``; the only entry or attribute that is called ``label``, ``labels``,
            ``target``, ``targets`` or ``y``.

    Raises:
        MisconfigurationException: If it is not clear where they are, or they are not a tensor.
    """
    selected: Any = None
    if callable(targets):
        selected = targets(clone_tensors(batch))
    elif targets is not None:
        selected = part(batch, targets, "targets")
    elif isinstance(batch, list | tuple):
        selected = batch[-1] if len(batch) == max(1, num_required(model)) + 1 else None
    elif not isinstance(batch, Tensor):
        named = {n: batch.get(n) if isinstance(batch, Mapping) else getattr(batch, n, None) for n in TARGET_NAMES}
        tensors = [value for value in named.values() if isinstance(value, Tensor)]
        selected = tensors[0] if len(tensors) == 1 else None
    if not isinstance(selected, Tensor):
        where = "`targets` should say where the labels are, such as `targets=1` or `targets='label'`"
        raise MisconfigurationException(f"{where}, got {describe(batch)}.")
    return selected


def part(value: Any, key: Any, argument: str) -> Any:
    """Take an entry, element or attribute that an argument of ours names; raise if there is none."""
    try:
        if isinstance(value, Tensor):
            raise TypeError
        if isinstance(key, str) and isinstance(value, list | tuple):
            key = getattr(value, "_fields", ()).index(key)
        return value[key] if isinstance(value, Mapping) or not isinstance(key, str) else getattr(value, key)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        message = f"`{argument}={key!r}` should name a part of what it chooses from, got {describe(value)}."
        raise MisconfigurationException(message) from None


def parameters_of(model: Any) -> list[inspect.Parameter]:
    """List the parameters of a function, or of the ``forward`` of a module, compiled or not."""
    function = getattr(getattr(model, "_orig_mod", model), "forward", model)
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # of a built-in function, such as an `itemgetter`
        return []


def num_required(model: Any) -> int:
    """Count the positional arguments that a function or the ``forward`` of a module requires."""
    kinds = inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return sum(p.default is p.empty and p.kind in kinds for p in parameters_of(model))
