"""The reference of a loader: what it sees of the kept samples, and how it is fitted to them."""

import math
from collections.abc import Iterable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import pad

from lightning_sensitivity.arguments import Selector, describe, link_to
from lightning_sensitivity.callbacks.checks import Reporter, describe_error
from lightning_sensitivity.callbacks.samples import KeptSamples
from lightning_sensitivity.callbacks.state import FitRecord
from lightning_sensitivity.functional.features import bags_of_words, principal_components
from lightning_sensitivity.functional.reference import Reference, fit_reference
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model import ModelCall, isolated
from lightning_sensitivity.model.batches import clone_tensors, tensors_in
from lightning_sensitivity.model.call import TARGET_NAMES

NUM_TRAINING = 1000  # samples that a reference learns from, over all processes
_NO_TOKENS = ("position_ids", "token_type_ids")  # names in transformers, as is the next one
_MASK = "attention_mask"  # says where tokens are, not padding


def select_features(module: LightningModule, batch: object, features: Selector | None, size: int) -> Tensor | None:
    """Call the user's function for the features of a batch, ``(N, D)``; None without one.

    Raises:
        MisconfigurationException: If it fails, or returns something else.
    """
    if features is None:
        return None
    try:
        with isolated(module) as run:  # of a copy of the batch, since it may write to it
            values: object = run(features, clone_tensors(batch))
    except Warning:
        raise
    except Exception as error:
        raise MisconfigurationException(
            f"`features` failed on {describe(batch)}: {type(error).__name__}: {error}.{link_to('features')}"
        ) from error
    if not isinstance(values, Tensor) or values.ndim < 2 or len(values) != size:
        expected = f"a function that returns a tensor ({size}, D)"
        raise MisconfigurationException(
            f"`features` should be {expected}, got {describe(values)}.{link_to('features')}"
        )
    return values.detach().cpu().float().flatten(1)


def find_reference(
    fit: FitRecord, unseen: KeptSamples, task: Task, has_features: bool, reporter: Reporter
) -> Reference | None:
    """Fit the reference of a loader, once; None if there can be none, which is said.

    Args:
        fit: What is known of the fit.
        unseen: The validation samples of the loader, whose labels it predicts.
        task: The kind of classification.
        has_features: Whether a function of the user's gives the features, not the inputs of the model.
        reporter: Says why there is none.
    """
    key = unseen.dataloader_idx, fit.training.size
    if key in fit.references or not fit.training.batches or not unseen.batches:
        return fit.references.get(key)
    fit.references = {other: found for other, found in fit.references.items() if other[0] != key[0]}
    fit.references[key] = None
    try:
        with torch.autocast("cpu", enabled=False):
            fit.references[key] = _fit(fit.training, unseen, math.prod(fit.output_shape or ()), task, has_features)
    except (RuntimeError, ValueError) as error:
        message = (
            f"has no reference: {describe_error(error)} Set `features=` to a function `batch -> (N, D)`. Until then, "
            "the estimate does without one."
        )
        reporter.warn("features", message)
    return fit.references[key]


def _fit(training: KeptSamples, unseen: KeptSamples, num_outputs: int, task: Task, has_features: bool) -> Reference:
    """Fit the reference, or raise ValueError if a batch has no features, or no sample a label."""
    found, new_found = (_features_of(samples, has_features) for samples in (training, unseen))
    targets = torch.cat([batch.labels for batch in training.batches if batch.labels is not None])
    y, counts = task.target_probabilities(torch.zeros(len(targets), num_outputs, dtype=torch.float64), targets)
    has_label = counts.flatten() > 0
    if found is None or new_found is None or not bool(has_label.any()):
        raise ValueError("inputs are neither dense numbers nor token ids, or no kept training sample has a label")
    features, new_features = _reduce(found, new_found)
    rows = has_label.nonzero()[:, 0]
    rows = rows[
        torch.linspace(0, len(rows) - 1, min(len(rows), NUM_TRAINING), dtype=torch.float64).long()
    ]  # of a large batch
    return fit_reference(features[rows], y.flatten(1)[rows], new_features, task.name)


def _features_of(samples: KeptSamples, has_features: bool) -> list[Tensor] | None:
    """Return what the reference sees, in parts; None if one is missing."""
    if has_features:
        found = [batch.features for batch in samples.batches]
    else:
        found = [input_features(batch.call, batch.size) for batch in samples.batches]
    present = [each for each in found if each is not None]
    return present if len(present) == len(found) else None


def input_features(call: ModelCall, size: int) -> Tensor | None:
    """Find what a reference can see in the inputs of a model.

    Args:
        call: A call of the model on a batch.
        size: The number of its samples.

    Returns:
        Dense inputs, floating ``(N, D)``; or token ids ``(N, L)``, -1 for padding; None if there are neither.
    """
    arguments = {name: value for name, value in call.named().items() if name not in (*TARGET_NAMES, *_NO_TOKENS)}
    mask = arguments.pop(_MASK, None)
    tensors = [x.cpu() for x in tensors_in(arguments) if _has_row_for_each(x, size)]
    dense = [x.float()[:, None].flatten(1) for x in tensors if x.is_floating_point()]
    if dense:
        return torch.cat(dense, 1)
    return _token_ids(tensors, mask)


def _token_ids(tensors: Iterable[Tensor], mask: object) -> Tensor | None:
    """Find token ids, and set those that a mask leaves out to -1."""
    tokens = next((x.long() for x in tensors if _may_be_tokens(x)), None)  # 8 bits have no -1
    if tokens is not None and isinstance(mask, Tensor) and mask.shape == tokens.shape:
        return tokens.where(mask.cpu() > 0, -1)
    return tokens


def _may_be_tokens(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_complex() and tensor.dtype != torch.bool


def _has_row_for_each(tensor: Tensor, num_samples: int) -> bool:
    return not tensor.is_nested and tensor.ndim > 0 and len(tensor) == num_samples


def _reduce(features: list[Tensor], new_features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Turn features of training and new samples into a few columns."""
    lengths = {each.shape[1] for each in (*features, *new_features)}
    if features[0].is_floating_point():
        if len(lengths) > 1:
            raise ValueError("inputs have different sizes")
        return principal_components(torch.cat(features), torch.cat(new_features))
    ids, new_ids = (_join_tokens(part, max(lengths)) for part in (features, new_features))
    return principal_components(*bags_of_words(ids, new_ids))


def _join_tokens(batches: Iterable[Tensor], length: int) -> Tensor:
    return torch.cat([pad(ids, (0, length - ids.shape[1]), value=-1) for ids in batches])
