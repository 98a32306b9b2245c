"""How to read a batch of any kind: the call of the model on it, its labels, and what a reference sees of it."""

from contextlib import suppress

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_sensitivity.arguments import Refused, Selector, check_selectors, describe, explained
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model.batches import clone_tensors
from lightning_sensitivity.model.call import ModelCall, count_samples, has_targets, select_targets
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.samples import KeptBatch


class BatchReader:
    """Read batches of any kind, by functions of the user or by what is usual.

    The functions get copies of a batch, and may draw random numbers without a trace.

    Args:
        inputs: A function ``batch -> arguments``; by default see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``; by default :func:`~lightning_sensitivity.model.select_outputs`.
        targets: A function ``batch -> labels``; by default :func:`~lightning_sensitivity.model.select_targets`.
        features: A function ``batch -> (N, D)``, what a reference sees; by default the inputs.
        task: The kind of classification, which labels have to fit; None without labels.

    Attributes:
        trains_features: Whether parameters of the model that are trained compute the features; None before a batch.

    Raises:
        MisconfigurationException: If a selector is no function; in its methods, if a batch can't be read so.
    """

    def __init__(
        self,
        *,
        inputs: Selector | None = None,
        outputs: Selector | None = None,
        targets: Selector | None = None,
        features: Selector | None = None,
        task: Task | None = None,
    ) -> None:
        check_selectors(inputs=inputs, outputs=outputs, targets=targets, features=features)
        self._inputs = inputs
        self._outputs = outputs
        self._targets = targets
        self._features = features
        self._task = task
        self._follows_rows: bool | None = None  # whether outputs of the model do; None before a batch is kept
        self.trains_features: bool | None = None

    def forget_model(self) -> None:
        """Forget what was found of a model, before another one comes."""
        self._follows_rows = self.trains_features = None

    def call(self, model: nn.Module, batch: object) -> ModelCall:
        """Make the call of a model on a batch."""
        if self._inputs is None:
            return ModelCall(model, batch, None, self._outputs)
        with isolated(model) as run:
            return run(ModelCall, model, batch, self._inputs, self._outputs)

    def may_have_labels(self, model: nn.Module, batch: object) -> bool:
        """Return whether it is clear where the labels of a batch would be."""
        return self._targets is not None or has_targets(model, batch)

    def labels(self, model: nn.Module, batch: object, output_shape: tuple[int, ...] | None = None) -> Tensor:
        """Copy the labels of a batch to the CPU.

        Args:
            model: The model.
            batch: The batch.
            output_shape: The shape of the outputs for a sample; None if it is not known yet.

        Raises:
            MisconfigurationException: If it is not clear where they are, or they do not fit the task.
        """
        if self._targets is None:
            labels = select_targets(model, batch)
        else:
            with isolated(model) as run:
                labels = run(select_targets, model, batch, self._targets)
        labels = labels.detach().to("cpu", copy=True)
        if self._task is not None and output_shape is not None:
            try:
                self._task.check(torch.zeros(labels.shape[:1] + output_shape), labels)
            except ValueError as error:
                raise Refused(f"{error}.", entry="task") from error
        return labels

    def features(self, model: nn.Module, batch: object, size: int) -> Tensor | None:
        """Call the user's function for the features of a batch, floating ``(N, D)`` on the CPU; None without one.

        Args:
            model: The model, which the function may use.
            batch: The batch.
            size: N, the number of its samples.

        Raises:
            MisconfigurationException: If the function fails, or returns something else.
        """
        if self._features is None:
            return None
        with explained(f"`features` failed on {describe(batch)}", entry="features"), isolated(model) as run:
            values: object = run(self._call_features, model, batch)
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != size:
            expected = f"a function that returns a tensor ({size}, D)"
            raise Refused(f"`features` should be {expected}, got {describe(values)}.", entry="features")
        return values.detach().cpu().float().flatten(1)

    def _call_features(self, model: nn.Module, batch: object) -> object:
        """Call the user's function; the first time with gradients, to see where they lead."""
        assert self._features is not None
        if self.trains_features is None:
            self.trains_features = False
            with suppress(Exception), torch.enable_grad():  # which it may forbid, such as by `numpy()`
                values = self._features(clone_tensors(batch))
                self.trains_features = _is_trained(values, model)
                return values
        return self._features(clone_tensors(batch))

    def keep(self, model: nn.Module, batch: object, index: int, labels: Tensor | None = None) -> KeptBatch:
        """Copy a batch to the CPU, with its features.

        Its outputs show its size if its inputs do not, as with graphs, or with sequences whose first dimension
        is time. The first batch says which is the case.

        Args:
            model: The model.
            batch: The batch, on the model's device.
            index: Its index in its loader.
            labels: Its labels, if they are wanted.

        Raises:
            MisconfigurationException: If there is not one label for each sample, or it can't be read.
        """
        call = self.call(model, batch)
        may_have_rows = call.size > 0
        size = self._count(model, call)
        if labels is not None and len(labels) != size:
            message = f"`targets` should return a label for each of {size} samples, got {len(labels)}."
            raise Refused(message, entry="task")
        has_rows = call.size > 0 or not may_have_rows
        return KeptBatch(index, call.copy_to_cpu(), size, labels, self.features(model, batch, size), has_rows)

    def _count(self, model: nn.Module, call: ModelCall) -> int:
        """Count the samples of a batch by its rows, if outputs follow them, or by its outputs."""
        is_lazy_yet = any(map(is_lazy, model.parameters()))  # until a step of the user runs it
        if call.size > 0 and (self._follows_rows or is_lazy_yet):
            return call.size
        with isolated(model) as run:
            size = count_samples(call, run)
        if size > 1 and self._follows_rows is None:  # a single row has no order
            self._follows_rows = call.size > 0
        return size


def _is_trained(values: Tensor, model: nn.Module) -> bool:
    """Return whether gradients of values reach a parameter of a model."""
    parameters = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    nodes, seen = [values.grad_fn], set[object]()
    while nodes:
        node = nodes.pop()
        if id(getattr(node, "variable", None)) in parameters:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return False
