"""What a RiskMonitor keeps beside samples: labels, features, and the reference that is fitted to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_sensitivity.arguments import Selector, describe, see
from lightning_sensitivity.callbacks.samples import MAX_BYTES, Group, KeptSamples
from lightning_sensitivity.functional.features import bags_of_words, principal_components
from lightning_sensitivity.functional.reference import Reference, fit_reference
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model import ModelCall, select_targets
from lightning_sensitivity.model.call import TARGET_NAMES, clone_tensors, tensors_in

_MASK = "attention_mask"  # the name in transformers, which says where tokens are, not padding


@dataclass
class Features:
    """Hold what the reference sees of a batch.

    Attributes:
        values: Floating features ``(N, ...)``, or integer token ids ``(N, L)``.
        mask: Where ``values`` are tokens, not padding.
    """

    values: Tensor
    mask: Tensor | None = None


@dataclass
class Companions:
    """Hold what is kept beside the samples of a loader, by the index of the batch.

    Attributes:
        labels: Labels of the batches that have some.
        features: What the user's function returns for the reference, if there is one.
        labelled: More batches with labels, which are only scored.
        reference: The reference, once it is fitted; None if there is none.
        num_fitted: To how many training samples it is fitted; 0 before.
        num_outputs: K, beside training samples.
    """

    labels: dict[int, Tensor] = field(default_factory=dict)
    features: dict[int, Tensor] = field(default_factory=dict)
    labelled: KeptSamples = field(default_factory=lambda: KeptSamples(0, math.inf, math.inf, MAX_BYTES))
    reference: Reference | None = None
    num_fitted: int = 0
    num_outputs: int = 0

    def labels_of(self, group: Group) -> Tensor:
        """Return the labels of a group whose batches all have some."""
        return torch.cat([self.labels[index] for index in group.batch_indices])

    def predictions(self, start: int, rows: slice) -> Tensor | None:
        """Return the reference's predictions for some rows of a group, which starts somewhere; None without one."""
        return None if self.reference is None else self.reference.predictions[start + rows.start : start + rows.stop]

    def features_of(self, samples: KeptSamples, has_function: bool) -> list[Features]:
        """Return what the reference sees of some samples; nothing if there is none for a part of them.

        Args:
            samples: The samples.
            has_function: Whether features come from the user's function, not from inputs.
        """
        if has_function:
            indices = samples.batch_indices
            is_complete = self.features.keys() >= set(indices)
            return [Features(self.features[index]) for index in indices] if is_complete else []
        found = [input_features(group.call) for group in samples.groups]
        return [each for each in found if each is not None] if None not in found else []


class BatchReader:
    """Read labels and features from copies of batches, since the user's functions may write to them.

    Args:
        targets: The user's function ``batch -> labels``, or None.
        features: The user's function ``batch -> (N, D)``, or None.
    """

    def __init__(self, targets: Selector | None, features: Selector | None) -> None:
        self._targets = targets
        self._features = features

    @property
    def has_targets(self) -> bool:
        """Whether the user says where labels are."""
        return self._targets is not None

    @property
    def has_features(self) -> bool:
        """Whether the user says what the reference sees."""
        return self._features is not None

    def labels(self, module: nn.Module, batch: Any) -> Tensor:
        """Select the labels, on the CPU."""
        return select_targets(module, batch, self._targets).detach().to("cpu", copy=True)

    def features(self, batch: Any, size: int) -> Tensor:
        """Call the user's function for the features of a batch.

        Args:
            batch: The batch.
            size: Its number of samples.

        Returns:
            The features, ``(N, D)``, on the CPU.
        """
        assert self._features is not None
        try:
            values = self._features(clone_tensors(batch))
        except Warning:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            raise MisconfigurationException(
                f"`features` failed on {describe(batch)}: {reason}.{see('features')}"
            ) from error
        if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != size:
            expected = f"a function that returns a tensor ({size}, D)"
            raise MisconfigurationException(
                f"`features` should be {expected}, got {describe(values)}.{see('features')}"
            )
        return values.detach().cpu().float().flatten(1)


def input_features(call: ModelCall) -> Features | None:
    """Find what a reference can see in the inputs of a model: dense floating tensors, or token ids.

    Args:
        call: A call of the model on a batch.

    Returns:
        The features; None if the inputs are something else.
    """
    arguments = call.named()
    mask = arguments.pop(_MASK, None)
    inputs = [value for name, value in arguments.items() if name not in TARGET_NAMES]
    tensors = [x.detach().cpu() for x in tensors_in(inputs) if _has_row_for_each(x, call.size)]
    dense = [x.float()[:, None].flatten(1) for x in tensors if x.is_floating_point()]
    if dense:
        return Features(torch.cat(dense, 1))
    tokens = [x for x in tensors if x.ndim == 2 and not x.is_complex() and x.dtype != torch.bool]
    if not tokens:
        return None
    if not isinstance(mask, Tensor) or mask.shape != tokens[0].shape:
        return Features(tokens[0])
    return Features(tokens[0], mask.detach().cpu())


def _has_row_for_each(tensor: Tensor, num_samples: int) -> bool:
    return not tensor.is_nested and tensor.ndim > 0 and len(tensor) == num_samples


def fit_to_kept(
    training: KeptSamples,
    kept: Companions,
    holdout: KeptSamples,
    companions: Companions,
    task: Task,
    has_function: bool,
) -> Reference | None:
    """Fit the reference to the labels of the kept training samples, and predict those of the validation samples.

    Args:
        training: The training samples.
        kept: What is kept beside them.
        holdout: The validation samples of a loader.
        companions: What is kept beside them.
        task: The kind of classification.
        has_function: Whether features come from the user's function, not from inputs.

    Returns:
        The reference; None if a batch has no features, or no sample a label.
    """
    found, new_found = kept.features_of(training, has_function), companions.features_of(holdout, has_function)
    if not found or not new_found:
        return None
    labels = torch.cat([kept.labels_of(group) for group in training.groups])
    y, counts = task.target_probabilities(torch.zeros(len(labels), kept.num_outputs, dtype=torch.float64), labels)
    has_label = counts > 0
    if not bool(has_label.any()):
        return None
    features, new_features = _reduce(found, new_found)
    return fit_reference(features[has_label], y[has_label], new_features, task.name)


def _reduce(features: list[Features], new_features: list[Features]) -> tuple[Tensor, Tensor]:
    """Turn features of training and new samples into a few columns."""
    if features[0].values.is_floating_point():
        if len({each.values.shape[1] for each in (*features, *new_features)}) > 1:
            raise ValueError("inputs have different sizes")
        values, new_values = (torch.cat([each.values for each in part]) for part in (features, new_features))
        return principal_components(values, new_values)
    length = max(each.values.shape[1] for each in [*features, *new_features])
    (ids, mask), (new_ids, new_mask) = _join_tokens(features, length), _join_tokens(new_features, length)
    return principal_components(*bags_of_words(ids, new_ids, mask, new_mask))


def _join_tokens(features: list[Features], length: int) -> tuple[Tensor, Tensor]:
    """Join token ids of batches of different lengths, with a mask of what is not padding."""
    ids, masks = [], []
    for each in features:
        mask = torch.ones_like(each.values) if each.mask is None else each.mask
        padding = (0, length - each.values.shape[1])
        ids.append(pad(each.values, padding))
        masks.append(pad(mask, padding))
    return torch.cat(ids), torch.cat(masks)
