"""How to read a batch of any kind: the call of the model on it, its labels, and what a reference sees of it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_sensitivity.arguments import Refused, Selector, check_selectors, describe, explained
from lightning_sensitivity.functional.features import shrunk
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model.batches import clone_tensors, tensors_in
from lightning_sensitivity.model.call import TARGET_NAMES, ModelCall, has_targets, select_targets
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.samples import KeptBatch, KeptSamples

_NO_TOKENS = ("position_ids", "token_type_ids")  # names in transformers, as is the next one
_MASK = "attention_mask"  # says where tokens are, not padding


class BatchReader:
    """Read batches of any kind, by functions of the user or by what is usual.

    The functions get copies of a batch, and may draw random numbers without a trace.

    Args:
        inputs: A function ``batch -> arguments``; by default see :class:`~lightning_sensitivity.model.ModelCall`.
        outputs: A function ``result -> logits``; by default :func:`~lightning_sensitivity.model.select_outputs`.
        targets: A function ``batch -> labels``; by default :func:`~lightning_sensitivity.model.select_targets`.
        features: A function ``batch -> (N, D)``, what a reference sees; by default the inputs.
        task: The task, which labels have to fit; None without labels.

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

    def size(self, model: nn.Module, call: ModelCall) -> int:
        """Count the samples of a batch by the rows of its arguments, or by its outputs if that is unknown."""
        if call.size > 0:
            return call.size
        with isolated(model) as run:
            return len(run(call))

    def seen(self, model: nn.Module, batch: object, call: ModelCall, size: int) -> Tensor | None:
        """Find what a reference sees of a batch, on the CPU; None if there is nothing.

        Args:
            model: The model, which the function ``features`` may use.
            batch: The batch.
            call: The call of the model on it.
            size: N, the number of its samples.

        Raises:
            MisconfigurationException: If ``features`` fails, or does not return a floating ``(N, D)``.
        """
        if self._features is None:
            found = seen_inputs(call, size)
            return None if found is None else shrunk(found.detach().to("cpu", copy=True))  # the step may write to it
        with explained(f"`features` failed on {describe(batch)}", entry="features"), isolated(model) as run:
            values: object = run(self._features, clone_tensors(batch))
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != size or not size:
            expected = f"a function that returns a tensor ({size}, D)"
            raise Refused(f"`features` should be {expected}, got {describe(values)}.", entry="features")
        return values.detach().cpu().float().flatten(1)

    def keep(self, model: nn.Module, batch: object, index: int, with_seen: bool = False) -> KeptBatch:
        """Copy a batch to the CPU, so that it can be run again.

        Args:
            model: The model.
            batch: The batch, on the model's device.
            index: Its index in its loader.
            with_seen: Whether to keep what a reference sees of it.

        Raises:
            MisconfigurationException: If it can't be read.
        """
        call = self.call(model, batch)
        size = self.size(model, call)
        seen = self.seen(model, batch, call, size) if with_seen and size > 0 else None
        return KeptBatch(index, size, call.copy_to_cpu(), seen=seen)


def seen_inputs(call: ModelCall, size: int) -> Tensor | None:
    """Find what a reference can see in the inputs of a model.

    Args:
        call: A call of the model on a batch.
        size: The number of its samples.

    Returns:
        The dense input, ``(N, ...)``; of several, their columns ``(N, D)``; or token ids ``(N, L)``, -1 for
        padding. None if there are none of these, or rows are no samples.
    """
    arguments = {name: value for name, value in call.named().items() if name not in (*TARGET_NAMES, *_NO_TOKENS)}
    mask = arguments.pop(_MASK, None)
    tensors = [x for x in tensors_in(arguments) if not x.is_nested and x.ndim > 0 and len(x) == size]
    dense = [x for x in tensors if x.is_floating_point() or (x.ndim > 2 and not x.is_complex())]
    dense = [x[:, None] if x.ndim == 1 else x for x in dense]
    if len(dense) == 1:
        return dense[0].float()
    return torch.cat([x.float().flatten(1) for x in dense], 1) if dense else _token_ids(tensors, mask)


def _token_ids(tensors: Iterable[Tensor], mask: object) -> Tensor | None:
    """Find token ids, and set those that a mask leaves out to -1."""
    tokens = next((x.long() for x in tensors if _may_be_tokens(x)), None)  # 8 bits have no -1
    if tokens is not None and isinstance(mask, Tensor) and mask.shape == tokens.shape:
        return tokens.where(mask > 0, -1)
    return tokens


def _may_be_tokens(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_complex() and tensor.dtype != torch.bool


def join_kept(samples: KeptSamples) -> Tensor:
    """Return what a reference sees of kept samples.

    Raises:
        ValueError: If it sees nothing of some, or inputs have different sizes.
    """
    seen = [batch.seen for batch in samples.batches if batch.seen is not None]
    if not seen or len(seen) < len(samples.batches):
        raise ValueError("Inputs are neither dense numbers nor token ids, with a row for each sample")
    return join_seen(seen)


def join_labelled(samples: KeptSamples, task: Task, num_outputs: int) -> tuple[Tensor, Tensor]:
    """Return what a reference sees of the kept samples that have a label, and these labels, ``(N, K)``.

    Raises:
        ValueError: As by :func:`join_kept`.
    """
    labels = torch.cat([task.as_matrix(x, num_outputs).float() for x in samples.labels])
    rows = torch.cat([task.has_label(x) for x in samples.labels])
    return join_kept(samples)[rows], labels[rows]


def join_seen(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate what a reference sees of several batches; token ids are padded to the longest.

    Raises:
        ValueError: If inputs have different sizes.
    """
    if not parts[0].is_floating_point() and all(x.ndim == 2 for x in parts):
        length = max(x.shape[1] for x in parts)
        return torch.cat([pad(ids, (0, length - ids.shape[1]), value=-1) for ids in parts])
    if len({x.shape[1:] for x in parts}) > 1:
        raise ValueError("Inputs have different sizes")
    return torch.cat(list(parts))
