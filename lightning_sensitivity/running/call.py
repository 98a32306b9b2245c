"""Call any model on any batch by its layout, and select outputs and labels."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning_utilities import apply_to_collection
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import lightning_sensitivity.running.rules as rules
from lightning_sensitivity.functional.tensors import in_floats
from lightning_sensitivity.messages import Refused, Selector, describe, refuse_on_error
from lightning_sensitivity.reference.kinds import KINDS, Seen
from lightning_sensitivity.running.batches import at, clone_tensors, entry, is_floating, take

_MANY = 1000  # from which on integers are names, and no categories
_OF_NODES, _OF_EDGES = ("x", "V"), ("edge_attr", "E")  # names of features in graphs
_MAX_CATEGORIES = 128  # of integers in graphs, such as the numbers of atoms
_SIGMOIDS = ("sigmoid", "sigmoid_", "expit", "special_expit")

Perturb = Callable[[Tensor], Tensor]
Function = Callable[[Any, Any], Any]  # of a module and a batch, in place of ``forward``


class ModelCall:
    """A call of a model on a batch, which can be made any number of times, with clean or perturbed inputs.

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
        function: A function ``(model, batch) -> result`` in place of ``forward``, or None. With it, ``inputs``
            says only what a reference sees, and without ``inputs`` that is nothing.

    Attributes:
        model: The module.
        layout: What the batch is to the model.
        arguments: The arguments of the model by their names in ``forward``; those of ``*args`` by numbers.
        size: The number of samples, if that is the first dimension of all tensors, and all else belongs to all
            samples; 0 if that is unknown, as with graphs and lists.

    Raises:
        MisconfigurationException: If it is not clear how to call the model.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: object,
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        function: Function | None = None,
    ) -> None:
        self.model = model
        self._outputs = outputs
        self._function = function
        chosen: object = () if inputs is None else inputs(clone_tensors(batch))  # it may write to the batch
        if function is not None:
            found = rules.arguments_for_function(batch, chosen)
        elif inputs is not None:
            found = rules.chosen_arguments(model, chosen)
        else:
            found = rules.find_arguments(model, batch)
        self.arguments = found.values
        self.layout = rules.find_layout(model, found, is_chosen=inputs is not None or function is not None)
        self.size = self.layout.size

    def inputs(self) -> dict[str, object]:
        """Return the arguments, but for entries that are named like labels, also in a whole batch."""
        return {name: rules.without(self.arguments[name], names) for name, names in self.layout.inputs.items()}

    def __str__(self) -> str:
        """Describe the arguments for an error message."""
        return "; ".join(f"{name!r}: {describe(value)}" for name, value in self.arguments.items())

    def __call__(self, perturb: Perturb | None = None) -> Tensor:
        """Call the model with copies of the arguments, perturbed or not, and select its outputs.

        Args:
            perturb: Function that returns the perturbed tensor; None for the batch as it is.

        Raises:
            MisconfigurationException: If it is not clear what to perturb, or where outputs are; if there is not
                one output for each row of the inputs.
        """
        arguments = {name: clone_tensors(value) for name, value in self.arguments.items()}
        if perturb is not None:
            name = rules.find_perturbed(self.layout, self.arguments, str(self))
            arguments[name] = apply_to_collection(
                arguments[name], Tensor, lambda x: perturb(x) if is_floating(x) else x, allow_frozen=True
            )
        if self._function is not None:
            result = self._function(self.model, arguments[rules.BATCH])
        elif self.layout.by_name:
            result = self.model(**arguments)
        else:
            result = self.model(*arguments.values())
        if self.size == 1 and isinstance(result, Tensor) and result.shape[:1] != (1,):
            result = result[None]  # a single sample gets back its dimension, which `squeeze()` drops
        outputs = select_outputs(result, self._outputs)
        if len(outputs) != (self.size or len(outputs)):
            raise Refused(
                f"the inputs have {self.size} rows, and there are {len(outputs)} outputs; each sample should have a "
                "row of both: put samples first, by `inputs=` and in `forward`, or by `outputs=`."
            )
        if self._outputs is None:
            rules.check_class_dimension(outputs, self.arguments)
        return outputs

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

    def _with(self, arguments: dict[str, object]) -> "ModelCall":
        """Return the call with other arguments."""
        new = copy.copy(self)
        new.arguments = arguments
        return new


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
        selected = rules.find_outputs(result)
    else:
        with refuse_on_error(f"`outputs` failed on {describe(result)}, which `forward` returned"):
            selected = outputs(result)
    if not is_floating(selected) or selected.ndim == 0:
        raise Refused(
            f"`outputs` should select a floating tensor (N, K, ...) or (N,), got {describe(selected)}, from "
            f"{describe(result)}, which `forward` returned."
        )
    return selected


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
        place = rules.find_labels(model, batch)
        selected = None if place is None else at(batch, place)
    else:
        with refuse_on_error(f"`targets` failed on {describe(batch)}"):
            selected = targets(clone_tensors(batch))
    if not isinstance(selected, Tensor):
        raise Refused(f"`targets` should return the labels from {describe(batch)}.")
    return selected


# What a reference sees


def select_seen(
    arguments: Mapping[str, object], size: int, sight: rules.Sight, indices: Tensor | None = None
) -> tuple[Seen, list[str]]:
    """Select what a reference sees of samples.

    Args:
        arguments: The arguments of the model, by their names.
        size: N, the number of samples.
        sight: What a reference sees of them.
        indices: Which of them to look at; None for all.

    Returns:
        What a reference sees, on the CPU, and the names of arguments of which something can't be read; some repeatedly.
    """
    inputs, unread = sight[0], [*sight[1]]
    seen: dict[str, list[Tensor]] = {}
    for each in inputs:
        kind, value = each.kind, at(arguments, each.place)
        if kind == rules.GRAPHS:
            kind, value = "columns", sum_graphs(value, size)
        x = take(value, indices).detach()
        if kind == "columns":
            x = in_floats(x)
        elif kind == rules.INTEGERS:
            kind, x = "columns", x[:, None].flatten(1).cpu().long().float()
            unread += [each.place[0]] * bool((x >= _MANY).any())  # names, of which nothing is seen
            x = x.clamp(max=_MANY)
        else:
            mask = None if each.mask is None else take(at(arguments, each.mask), indices)
            x = KINDS[kind].of_input(x, mask)
        seen.setdefault(kind, []).append(x.cpu())
    alone = {kind: parts[0] for kind, parts in seen.items() if len(parts) == 1 and parts[0].ndim > 1}
    joined = {kind: alone[kind] if kind in alone else KINDS[kind].beside(parts) for kind, parts in seen.items()}
    return joined, unread


def sum_graphs(graphs: object, size: int) -> Tensor:
    """Count the nodes and edges of each graph, and sum their features; integers are categories.

    Args:
        graphs: An object, or the arguments of ``forward``, with the graph of each node as ``batch`` and the
            nodes of each edge as ``edge_index``, beside features as ``x`` or ``V``, and ``edge_attr`` or ``E``.
        size: N, the number of graphs.

    Returns:
        The sums, ``(N, D)``.
    """
    of_node, ends = entry(graphs, "batch"), entry(graphs, "edge_index")
    sums = []
    for graph, names in ((of_node, _OF_NODES), (of_node[ends[0]], _OF_EDGES)):
        columns = [torch.ones(len(graph), 1)]
        for x in (entry(graphs, name) for name in names):
            if isinstance(x, Tensor) and len(x) == len(graph):
                x = x.detach().cpu()
                if not x.is_floating_point():
                    x = nn.functional.one_hot(x.long().clamp(0, _MAX_CATEGORIES - 1), _MAX_CATEGORIES)
                columns.append(x[:, None].flatten(1).float())
        features = torch.cat(columns, 1)
        sums.append(torch.zeros(size, features.shape[1]).index_add_(0, graph.cpu().long(), features))
    return torch.cat(sums, 1)


class Sigmoids(TorchFunctionMode):
    """A mode that notes what sigmoids gave that were called inside: if outputs are that, they can't be logits."""

    def __init__(self) -> None:
        super().__init__()
        self._values: list[Tensor] = []  # copies, which nobody writes to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        result = func(*args, **(kwargs or {}))
        if getattr(func, "__name__", "") in _SIGMOIDS:
            self._values.append(result.detach().clone())
        return result

    def gave(self, outputs: Tensor) -> bool:
        """Return whether outputs are what one of them gave, in any shape and precision, and nobody wrote to."""
        return any(torch.equal(values.flatten().to(outputs), outputs.flatten()) for values in self._values)
