"""The reference of a loader: what it sees of the kept samples, and how it is fitted to them."""

from collections.abc import Iterable

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.nn.functional import pad

from lightning_sensitivity.arguments import Selector, describe, link_to
from lightning_sensitivity.callbacks.checks import Reporter, describe_error
from lightning_sensitivity.callbacks.samples import KeptBatch, KeptSamples
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


def select_features(module: LightningModule, batch: object, features: Selector, size: int) -> Tensor:
    """Call the user's function for the features of a batch, ``(N, D)``.

    Raises:
        MisconfigurationException: If it fails, or returns something else.
    """
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


def find_reference(fit: FitRecord, unseen: KeptSamples, task: Task, reporter: Reporter) -> Reference | None:
    """Fit the reference of a loader, once; None if there can be none, which is said.

    Args:
        fit: What is known of the fit.
        unseen: The validation samples of the loader, whose labels it predicts.
        task: The kind of classification.
        reporter: Says why there is none.
    """
    index, size = unseen.dataloader_idx, fit.training.size
    if size != fit.num_reference_samples:  # more have come
        fit.references, fit.num_reference_samples = {}, size
    if index in fit.references or size == 0 or unseen.size == 0:
        return fit.references.get(index)
    fit.references[index] = None
    try:
        with torch.autocast("cpu", enabled=False):
            fit.references[index] = _fit(fit.training.batches, unseen.batches, fit.num_outputs, task)
    except (RuntimeError, ValueError) as error:
        advice = "Set `features=` to a function `batch -> (N, D)`. Until then, the estimate does without one."
        reporter.warn("features", f"has no reference: {describe_error(error)} {advice}")
    return fit.references[index]


def _fit(training: list[KeptBatch], unseen: list[KeptBatch], num_outputs: int, task: Task) -> Reference:
    """Fit the reference, or raise ValueError if a batch has no features, or no sample a label."""
    features, new_features = _reduce(*([_features_of(batch) for batch in part] for part in (training, unseen)))
    targets = torch.cat([batch.labels for batch in training if batch.labels is not None])
    y, counts = task.target_probabilities(torch.zeros(len(targets), num_outputs, dtype=torch.float64), targets)
    rows = counts.flatten().nonzero()[:, 0]  # with a label
    if not len(rows):
        raise ValueError("no sample has a label")
    places = torch.linspace(0, len(rows) - 1, min(len(rows), NUM_TRAINING), dtype=torch.float64)
    rows = rows[places.long()]  # of a large batch
    return fit_reference(features[rows], y.flatten(1)[rows], new_features, task.name)


def _features_of(batch: KeptBatch) -> Tensor:
    """Return what the reference sees of a batch, dense ``(N, D)`` or token ids; or raise ValueError."""
    return input_features(batch.call, batch.size) if batch.features is None else batch.features


def input_features(call: ModelCall, size: int) -> Tensor:
    """Find what a reference can see in the inputs of a model.

    Args:
        call: A call of the model on a batch.
        size: The number of its samples.

    Returns:
        Dense inputs, floating ``(N, D)``; or token ids ``(N, L)``, -1 for padding.

    Raises:
        ValueError: If there are neither.
    """
    arguments = {name: value for name, value in call.named().items() if name not in (*TARGET_NAMES, *_NO_TOKENS)}
    mask = arguments.pop(_MASK, None)
    tensors = [x.cpu() for x in tensors_in(arguments) if _has_row_for_each(x, size)]
    dense = [x.float()[:, None].flatten(1) for x in tensors if x.is_floating_point()]
    return torch.cat(dense, 1) if dense else _token_ids(tensors, mask)


def _token_ids(tensors: Iterable[Tensor], mask: object) -> Tensor:
    """Find token ids, and set those that a mask leaves out to -1."""
    tokens = next((x.long() for x in tensors if _may_be_tokens(x)), None)  # 8 bits have no -1
    if tokens is None:
        raise ValueError("inputs are neither dense numbers nor token ids")
    if isinstance(mask, Tensor) and mask.shape == tokens.shape:
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
