"""How to read a batch of any kind: the call of the model on it, its labels, and what a reference sees of it."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_sensitivity.arguments import Refused, Selector, check_selectors, describe, refuse_on_error
from lightning_sensitivity.functional.features import fit_size, kind_of, shrunk
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model.batches import clone_tensors, tensors_in
from lightning_sensitivity.model.call import TARGET_NAMES, ModelCall, has_targets, select_targets
from lightning_sensitivity.model.isolation import isolated
from lightning_sensitivity.model.samples import KeptBatch, KeptSamples

_NO_TOKENS = ("position_ids", "token_type_ids")  # names in transformers, as is the next one
_MASK = "attention_mask"  # says where tokens are, not padding
_MAX_CATEGORY = 1000  # integers beside columns that stay below are categories


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
        self._has_categories: bool | None = None  # beside columns of numbers; None before a batch has shown it

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

    def features(self, model: nn.Module, batch: object, call: ModelCall, size: int) -> Tensor | None:
        """Find what a reference sees of a batch, on the CPU; None if there is nothing.

        Args:
            model: The model, which the function ``features`` may use.
            batch: The batch.
            call: The call of the model on it.
            size: N, the number of its samples.

        Returns:
            Images, signals, columns or token ids, ``(N, ...)``, which may share memory with the batch or the call.

        Raises:
            MisconfigurationException: If ``features`` fails, or does not return a floating ``(N, D)``.
        """
        if self._features is None:
            found = self._find_features(call, size)
            return None if found is None else shrunk(found.detach().cpu())
        what = f"`features` failed on {describe(batch)}"
        with refuse_on_error(what, entry="features"), isolated(model) as run:
            values: object = run(self._features, clone_tensors(batch))
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != size or not size:
            expected = f"a function that returns a tensor ({size}, D)"
            raise Refused(f"`features` should be {expected}, got {describe(values)}.", entry="features")
        return values.detach().cpu().float().flatten(1)

    def keep(
        self,
        model: nn.Module,
        batch: object,
        index: int,
        with_features: bool = False,
        max_samples: float = math.inf,
    ) -> KeptBatch:
        """Copy a batch to the CPU, so that it can be run again.

        Args:
            model: The model.
            batch: The batch, on the model's device.
            index: Its index in its loader.
            with_features: Whether to keep what a reference sees of it.
            max_samples: How many samples to keep, evenly spaced, if its rows are samples.

        Raises:
            MisconfigurationException: If it can't be read.
        """
        whole = self.call(model, batch)
        call, rows = whole.sliced(max_samples)
        size = self.size(model, call)
        kept = KeptBatch(index, size, call.copy_to_cpu(), rows=rows)
        if with_features and size > 0 and self._features is None:
            kept.features = self.features(model, batch, kept.call, size)
        elif with_features and size > 0:
            features = self.features(model, batch, whole, whole.size or size)
            kept.features = features if features is None or rows is None else features[rows]
        return kept

    def _find_features(self, call: ModelCall, size: int) -> Tensor | None:
        """Find what a reference can see in the inputs of a model.

        Returns:
            The dense input, ``(N, ...)``; of several, their columns ``(N, D)``; or token ids ``(N, L)``, -1 for
            padding. None if there are none of these, or rows are no samples.
        """
        arguments = {name: x for name, x in call.named().items() if name not in (*TARGET_NAMES, *_NO_TOKENS)}
        mask = arguments.pop(_MASK, None)
        tensors = [x for x in tensors_in(arguments) if not x.is_nested and x.ndim > 0 and len(x) == size]
        dense = [x for x in tensors if x.is_floating_point() or (x.ndim > 2 and not x.is_complex())]
        if not dense:
            return _token_ids(tensors, mask)
        dense = [x[:, None] if x.ndim == 1 else x for x in dense]
        dense += self._categories(dense, tensors)
        return dense[0].float() if len(dense) == 1 else torch.cat([x.float().flatten(1) for x in dense], 1)

    def _categories(self, dense: Sequence[Tensor], tensors: Iterable[Tensor]) -> list[Tensor]:
        """Find matrices of categories beside columns of numbers; the first batch decides for all."""
        integers = [x for x in tensors if _may_be_tokens(x) and not x.is_floating_point()]
        if not integers or any(x.ndim > 2 for x in dense):
            return []
        if self._has_categories is None:
            self._has_categories = all(bool((x < _MAX_CATEGORY).all()) for x in integers)
        return integers if self._has_categories else []


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
    features = [batch.features for batch in samples.batches if batch.features is not None]
    if len(features) < len(samples.batches):
        raise ValueError("Inputs are neither dense numbers nor token ids, with a row for each sample")
    return join_features(features)


def join_features(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate what a reference sees of several batches.

    Token ids are padded to the longest by -1, and signals by 0; images get the size of those of the first part.

    Raises:
        ValueError: If inputs have different numbers of columns or channels, or are of several kinds.
    """
    kind, is_text = kind_of(parts[0]), kind_of(parts[0]) == "tokens"
    fixed = {(kind_of(x), x.ndim, None if is_text else x.shape[1:2]) for x in parts}  # what can't be changed
    if len(fixed) > 1:
        raise ValueError("Inputs have different sizes")
    if kind in ("signals", "tokens"):
        length = max(x.shape[-1] for x in parts)
        parts = [pad(x, (0, length - x.shape[-1]), value=-1 if is_text else 0) for x in parts]
    elif kind == "images":
        parts = [fit_size(x, parts[0].shape) for x in parts]
    return torch.cat(list(parts))
