"""Features for the reference, by kind of input: columns, random patches of images and signals, bags of words.

Each kind has one or more makers. A maker looks at the inputs of training samples, and returns a function that turns
inputs of any samples into rows of numbers, float32, on their device.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Transform = Callable[[Tensor], Tensor]
Maker = Callable[[Tensor], Transform]

_MAX_SIDE = 32  # pixels of an image
_MAX_LENGTH = 512  # steps of a signal
_MAX_COLUMNS = 4096  # of which distances are computed
_CONSTANT = 1e-9  # relative standard deviation of a column that holds nothing but rounding
_CHUNK = 100  # samples of which features are made at a time

_NUM_PATCHES, _NUM_FILTERS = 20_000, 256
_MIN_PATCH, _MAX_PATCH = 3, 6  # pixels a side
_MIN_STEPS, _MAX_STEPS = 3, 24  # of a signal
_MAX_NUMBERS = 1024  # in a patch
_MIN_SIDE = 6  # of images that have patches
_THRESHOLD = 0.25  # of responses
_CONTRAST, _WHITENING, _RARE = 0.1, 0.1, 0.01  # what keeps flat patches, weak directions and rare responses small

_MAX_WORDS = 4096
_MAX_PAIRS = 8192


def kind_of(inputs: Tensor) -> str:
    """Return ``"vectors"``, ``"images"``, ``"signals"`` or ``"tokens"``.

    Args:
        inputs: Floating or boolean ``(N, D)``, ``(N, C, L)``, ``(N, C, H, W)`` or with more dimensions, which count
            as images; or integers, of which ``(N, L)`` are token ids.
    """
    is_floating = inputs.is_floating_point() or inputs.dtype == torch.bool
    if inputs.ndim == 2 and not is_floating:
        return "tokens"
    if inputs.ndim <= 2:
        return "vectors"
    return "signals" if inputs.ndim == 3 else "images"


def shrunk(inputs: Tensor) -> Tensor:
    """Return images of at most 32 pixels a side, and signals of at most 512 steps, by averaging; all else as it is.

    Args:
        inputs: Of any kind, ``(N, ...)``.
    """
    limit = {3: _MAX_LENGTH, 4: _MAX_SIDE}.get(inputs.ndim)
    largest = max(inputs.shape[2:], default=0)
    if limit is None or largest <= limit:
        return inputs
    sizes = [max(1, round(size * limit / largest)) for size in inputs.shape[2:]]
    parts = [F.interpolate(part.float(), sizes, mode="area") for part in inputs.split(_CHUNK)]
    return torch.cat(parts) if parts else inputs.new_zeros(0, inputs.shape[1], *sizes, dtype=torch.float32)


def feature_makers(inputs: Tensor) -> dict[str, Maker]:
    """Return what may be made of inputs, by name.

    Args:
        inputs: Those of training samples, after :func:`shrunk`.
    """
    kind = kind_of(inputs)
    if kind == "tokens":
        return {"words": words, "words and pairs": words_and_pairs, "columns": columns}
    if kind in ("images", "signals") and _patch_size(inputs):
        return {"patches": patches, "columns": columns}
    return {"columns": columns, "units": units} if inputs[0].numel() > 1 else {"columns": columns}


def make_features(transform: Transform, inputs: Tensor) -> Tensor:
    """Turn inputs into features, a few samples at a time."""
    return torch.cat([transform(part) for part in inputs.split(_CHUNK)])


def columns(inputs: Tensor) -> Transform:
    """Take all numbers of a sample as columns, each with a mean of 0 and a variance of 1."""
    return _standardized(_flat, _flat(inputs), floor=0.0)


def units(inputs: Tensor) -> Transform:
    """Take all numbers of a sample as columns in the units that they have."""
    x = _flat(inputs)
    mean = x.mean(0)
    return lambda new: _flat(new) - mean


def _flat(inputs: Tensor) -> Tensor:
    """Flatten samples; more than 4,096 numbers are added up with random signs (Weinberger et al., 2009)."""
    x = inputs[:, None].flatten(1)
    if x.dtype != torch.float64:
        x = x.float()
    if x.shape[1] <= _MAX_COLUMNS:
        return x
    signs = torch.randint(0, 2, (x.shape[1],), generator=_generator()).to(x.device, x.dtype) * 2 - 1
    x = F.pad(x * signs, (0, -x.shape[1] % _MAX_COLUMNS))
    return x.unflatten(1, (-1, _MAX_COLUMNS)).sum(1)


def _standardized(transform: Transform, features: Tensor, floor: float) -> Transform:
    """Scale what a transform gives by means and standard deviations of features that it gave."""
    mean, std = features.mean(0), features.std(0, correction=0)
    scale = (std + floor * features.std(correction=0)).where(std > _CONSTANT * mean.abs(), torch.inf)
    return lambda inputs: (transform(inputs) - mean) / scale


def patches(inputs: Tensor) -> Transform:
    """Compare images or signals with random patches of themselves (Coates and Ng, 2011).

    Patches are normalized and whitened, and are used as filters; responses are rectified on both sides, and
    averaged over quadrants of an image, or quarters of a signal.
    """
    images = _as_images(inputs)
    scale = images.std(correction=0).clamp(min=1e-12)
    mean = images.mean()
    height, width = _patch_size(inputs)
    chosen = _random_patches((images - mean) / scale, height, width)
    kernels, offsets = (each.to(images.device) for each in _filters(chosen))
    totals, size = kernels.flatten(1).sum(1), kernels[0].numel()
    strides = [2 if side >= 24 else 1 for side in images.shape[2:]]
    cells = (1, 4) if inputs.ndim == 3 else (2, 2)

    def responses(new: Tensor) -> Tensor:
        batch = (_as_images(new) - mean) / scale
        average = F.avg_pool2d(batch.mean(1, keepdim=True), (height, width), strides)
        power = F.avg_pool2d(batch.square().mean(1, keepdim=True), (height, width), strides)
        variance = (power - average.square()).clamp(min=0) * size / (size - 1)
        response = F.conv2d(batch, kernels, stride=strides) - average * totals[:, None, None]
        response = response / (variance + _CONTRAST**2).sqrt() - offsets[:, None, None]
        both = torch.cat([(response - _THRESHOLD).clamp(min=0), (-response - _THRESHOLD).clamp(min=0)], 1)
        return F.adaptive_avg_pool2d(both, cells).flatten(1)

    return _standardized(responses, make_features(responses, inputs), floor=_RARE)


def _as_images(inputs: Tensor) -> Tensor:
    """Return images as they are, and signals as images of a height of 1, in single precision."""
    return (inputs[:, :, None] if inputs.ndim == 3 else inputs).float()


def _patch_size(inputs: Tensor) -> tuple[int, int] | None:
    """Return height and width of a patch; None if patches do not fit."""
    if inputs.ndim == 3:
        length = inputs.shape[2]
        size = (1, max(_MIN_STEPS, min(_MAX_STEPS, length // 4)))
        fits = length >= _MIN_SIDE
    else:
        side = min(inputs.shape[2:])
        size = (max(_MIN_PATCH, min(_MAX_PATCH, side // 4)),) * 2
        fits = inputs.ndim == 4 and side >= _MIN_SIDE
    return size if fits and inputs.shape[1] * math.prod(size) <= _MAX_NUMBERS else None


def _random_patches(images: Tensor, height: int, width: int) -> Tensor:
    """Cut patches ``(P, C, height, width)`` from random places."""
    ends = len(images), images.shape[2] - height + 1, images.shape[3] - width + 1
    generator = _generator()
    samples, tops, lefts = (
        torch.randint(end, (_NUM_PATCHES, 1, 1), generator=generator).to(images.device) for end in ends
    )
    rows = tops + torch.arange(height, device=images.device)[:, None]
    columns = lefts + torch.arange(width, device=images.device)
    return images[samples, :, rows, columns].movedim(3, 1)


def _filters(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Turn patches ``(P, C, h, w)`` into filters ``(F, C, h, w)`` of normalized patches, and their offsets ``(F,)``."""
    x = patches.flatten(1).cpu()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + _CONTRAST**2).sqrt()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((x - mean).T))
    whitening = vectors * (values.clamp(min=0) + _WHITENING).rsqrt() @ vectors.T
    filters = (x[:_NUM_FILTERS] - mean) @ whitening
    filters = filters / filters.norm(dim=1, keepdim=True).clamp(min=1e-12) @ whitening
    return filters.reshape(-1, *patches.shape[1:]), filters @ mean


def words(ids: Tensor) -> Transform:
    """Count the words of texts, and weigh rare ones more (tf-idf)."""
    return _weighed_counts(ids, with_pairs=False)


def words_and_pairs(ids: Tensor) -> Transform:
    """Count words and pairs of neighbours, and weigh rare ones more."""
    return _weighed_counts(ids, with_pairs=True)


def _weighed_counts(ids: Tensor, with_pairs: bool) -> Transform:
    """Count the most frequent words (and pairs) of training samples, ``(N, V)``.

    Counts w become :math:`(1 + \\log w)\\log(N / N_w)` for a word in :math:`N_w` of N texts, with rows of length 1.
    """
    vocabularies = [_vocabulary(_words(ids), _MAX_WORDS)]
    if with_pairs:
        vocabularies.append(_vocabulary(_pairs(ids), _MAX_PAIRS))

    def counts(new: Tensor) -> Tensor:
        parts = [_counts(_words(new), vocabularies[0])]
        if with_pairs:
            parts.append(_counts(_pairs(new), vocabularies[1]))
        return torch.cat(parts, 1)

    texts = sum(((counts(part) > 0).sum(0) for part in ids.split(_CHUNK)), torch.zeros((), device=ids.device))
    weights = ((1 + len(ids)) / (1 + texts)).log()

    def weighed(new: Tensor) -> Tensor:
        found = counts(new)
        x = (1 + found.clamp(min=1).log()) * (found > 0) * weights
        return x / x.norm(dim=1, keepdim=True).clamp(min=1e-12)

    return weighed


def _words(ids: Tensor) -> Tensor:
    return ids.long()


def _pairs(ids: Tensor) -> Tensor:
    """Return a number for each pair of neighbours, -1 where one of them is padding."""
    first, second = ids[:, :-1].long(), ids[:, 1:].long()
    return (first * 2**31 + second).where((first >= 0) & (second >= 0), -1)


def _vocabulary(tokens: Tensor, size: int) -> Tensor:
    """Return the tokens that occur most often, sorted."""
    found, counts = torch.unique(tokens[tokens >= 0], return_counts=True)
    return found[counts.argsort(descending=True, stable=True)[:size]].sort().values


def _counts(tokens: Tensor, vocabulary: Tensor) -> Tensor:
    """Count the tokens of a sorted vocabulary in each sample."""
    is_known = torch.isin(tokens, vocabulary)
    places = torch.searchsorted(vocabulary, tokens[is_known])
    cells = is_known.nonzero()[:, 0] * len(vocabulary) + places
    counts = torch.bincount(cells, minlength=len(tokens) * len(vocabulary))
    return counts.reshape(len(tokens), len(vocabulary)).float()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
