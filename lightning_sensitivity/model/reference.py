"""The reference of a model: what it sees of kept samples, and how it is fitted to them."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lightning_sensitivity.functional.features import bags_of_words, different_samples, principal_components
from lightning_sensitivity.functional.reference import Reference, fit_reference
from lightning_sensitivity.functional.tasks import Task
from lightning_sensitivity.model.batches import tensors_in
from lightning_sensitivity.model.call import TARGET_NAMES, ModelCall
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.samples import KeptBatch, KeptSamples, count_labels

NUM_TRAINING = 1000  # samples that a reference learns from, over all processes
_NO_TOKENS = ("position_ids", "token_type_ids")  # names in transformers, as is the next one
_MASK = "attention_mask"  # says where tokens are, not padding


def keep_training_samples(
    reader: BatchReader,
    model: nn.Module,
    batches: Iterable[object],
    output_shape: tuple[int, ...] | None = None,
    num_samples: int = NUM_TRAINING,
) -> tuple[list[KeptBatch], int]:
    """Read all training batches, and keep evenly spaced ones that hold enough samples for a reference.

    Args:
        reader: Reads batches, and their labels.
        model: A model that can be called on them.
        batches: The batches, on the model's device.
        output_shape: The shape of the model's outputs for a sample, which labels have to fit; None if unknown.
        num_samples: How many samples to keep, or a few more.

    Returns:
        The kept batches; and the number of all samples that have a label.

    Raises:
        MisconfigurationException: If a batch can't be read, or has no labels that fit.
    """
    kept, num_labelled = KeptSamples(0, num_samples), 0
    for index, batch in enumerate(batches):
        labels = reader.labels(model, batch, output_shape)
        num_labelled += count_labels([labels])
        if kept.wants(index):
            kept.add(reader.keep(model, batch, index, labels))
    return kept.batches, num_labelled


def fit_to_samples(
    training: Sequence[KeptBatch], unseen: Sequence[KeptBatch], num_outputs: int, task: Task
) -> Reference:
    """Fit a reference to at most 1,000 training samples, to predict the labels of unseen ones.

    Args:
        training: Batches of training samples, with labels.
        unseen: Batches whose labels it predicts, in this order.
        num_outputs: K, the number of outputs of the model for a sample.
        task: The kind of classification.

    Raises:
        ValueError: If a batch has no features, or no sample a label.
        RuntimeError: If features do not fit together.
    """
    with torch.autocast("cpu", enabled=False):
        features, new_features = _reduce(*([_features_of(batch) for batch in part] for part in (training, unseen)))
        targets = torch.cat([batch.labels for batch in training if batch.labels is not None])
        y, counts = task.target_probabilities(torch.zeros(len(targets), num_outputs, dtype=torch.float64), targets)
        rows = counts.flatten().nonzero()[:, 0]  # with a label
        if not len(rows):
            raise ValueError("no sample has a label")
        places = torch.linspace(0, len(rows) - 1, min(len(rows), NUM_TRAINING), dtype=torch.float64)
        rows = rows[places.long()]  # of a large batch
        features, y = features[rows], y.flatten(1)[rows]
        rows = different_samples(features, y)
        return fit_reference(features[rows], y[rows], new_features, task.name)


def compare_moments(training: Sequence[KeptBatch], unseen: Sequence[KeptBatch]) -> tuple[float, float] | None:
    """Compare what a reference sees of training and unseen samples, to find out whether they were prepared alike.

    Returns:
        The squared distance of the means, as a share of the variance of training samples, both summed over columns;
        and how many times as large the variance of unseen samples is, summed or in the median column, whichever
        differs less. None if they are not dense, have other columns, are not finite, or do not vary.
    """
    try:
        features, new_features = ([_features_of(batch) for batch in part] for part in (training, unseen))
    except ValueError:
        return None
    shapes = {x.shape[1:] for x in (*features, *new_features)}
    if len(shapes) > 1 or not features[0].is_floating_point():
        return None
    (mean, variances), (new_mean, new_variances) = map(_moments, (features, new_features))
    varies, variance = variances > 0, variances.sum()
    if not (varies.any() and bool(torch.stack([variance, new_variances.sum()]).isfinite().all())):
        return None
    median = (new_variances[varies] / variances[varies]).median()  # a column with heavy tails changes the sum
    ratios = torch.stack([new_variances.sum() / variance, median])
    return float((new_mean - mean).square().sum() / variance), float(ratios[ratios.log().abs().argmin()])


def _moments(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the mean and the variance of each column."""
    size = sum(map(len, features))
    mean = torch.stack([x.double().sum(0) for x in features]).sum(0) / size
    return mean, torch.stack([(x.double() - mean).square().sum(0) for x in features]).sum(0) / size


def _features_of(batch: KeptBatch) -> Tensor:
    """Return what the reference sees of a batch, dense ``(N, D)`` or token ids; or raise ValueError."""
    if batch.features is not None:
        return batch.features
    if not batch.has_rows:
        raise ValueError("rows of the inputs are no samples")
    return input_features(batch.call, batch.size)


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
