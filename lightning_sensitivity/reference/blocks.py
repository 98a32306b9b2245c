"""Blocks of features: rows of numbers that scikit-learn gets of samples of one kind.

Random numbers are the same in every call, and global streams are not touched.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Matrix: TypeAlias = Any  # an array in double precision, or a sparse matrix of words
Transform: TypeAlias = Callable[[Tensor], Matrix]
Block: TypeAlias = Callable[[Tensor], Transform]  # of features; it sees training samples

_CHUNK = 50  # samples of which features are made at a time
SOME = 500  # samples that give features their scale
_MAX_COLUMNS = 4096  # of more, evenly spaced ones are seen
_HUGE = 1e5  # standard deviation of a column that a few numbers make, in units of what most deviate from the median
_CONSTANT = 1e-9  # relative standard deviation of a column that holds nothing but rounding
_TINY = 1e-12  # length of a row of zeros

_NUM_PATCHES, _NUM_FILTERS = 20_000, 256
_MIN_PATCH, _MAX_PATCH, _MAX_STEPS = 3, 6, 16  # pixels a side, and steps of a signal
_MAX_NUMBERS = 1024  # in a patch, of all channels
_COARSE = 24  # pixels a side from which every second place is taken
_CONTRAST, _WHITENING = 0.1, 0.1  # what keeps flat patches and weak directions small
_THRESHOLD = 0.5  # of responses
_RARE = 0.1  # of the scale of all responses, added to that of each

_MAX_WORDS = 8192  # and pairs of words
_WEIGHTS = (0.0, 1.0, 0.5)  # of nothing, of a word and of a pair
_FEW_TEXTS = 50  # below, words that occur once are kept, too


def in_parts(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Turn inputs into features, a few samples at a time."""
    return torch.cat([function(part) for part in torch.split(inputs, _CHUNK)])


def columns(inputs: Tensor) -> Transform:
    """Take all numbers of a sample, each column with a mean of 0 and a variance of 1."""
    x = flat(inputs)
    # A few huge numbers, such as 1e9 for what is missing, would make one of all others, in single precision.
    center = some(x).median(0).values
    deviations = (some(x) - center).abs()
    scale = deviations.where(deviations > 0, torch.nan).nanmedian(0).values
    scale = scale.where(x.std(0) > _HUGE * scale, torch.nan)  # nan where a column stays as it is
    function = partial(_tamed, length=inputs.shape[1], center=center, scale=scale)
    return _standardized(function, function(inputs), floor=0.0)


def _tamed(inputs: Tensor, length: int, center: Tensor, scale: Tensor) -> Tensor:
    """Flatten samples, and take the logarithms of the numbers of some columns, in units of their scale."""
    x = flat(inputs, length)
    return x.where(scale.isnan(), ((x - center) / scale).asinh())


def values(inputs: Tensor) -> Transform:
    """Take all numbers of a sample in the units that they have."""
    return partial(_scaled, function=flat, mean=flat(inputs).mean(0), scale=1.0)


def flat(inputs: Tensor, length: int = 0) -> Tensor:
    """Flatten samples to at most 4,096 numbers, in double precision; token ids get a length."""
    x = inputs[:, None].flatten(1)
    if inputs.ndim == 2 and length:
        x = F.pad(x, (0, length - x.shape[1]), value=-1)
    if x.shape[1] > _MAX_COLUMNS:
        x = x[:, spread(x.shape[1], _MAX_COLUMNS)]
    return x.double()


def spread(number: int, most: int) -> Tensor:
    """Return the indices of at most so many evenly spaced samples."""
    return torch.linspace(0, number - 1, min(number, most), dtype=torch.float64).round().long()


def _standardized(function: Callable[[Tensor], Tensor], features: Tensor, floor: float) -> Transform:
    """Scale what a function gives by means and standard deviations of some of its features."""
    scale = _scale(features, 0) + floor * features.std(correction=0)
    return partial(_scaled, function=function, mean=features.mean(0), scale=scale)


def _scaled(inputs: Tensor, function: Callable[[Tensor], Tensor], mean: Tensor, scale: Tensor | float) -> Matrix:
    return ((function(inputs) - mean) / scale).double().numpy()


def _scale(x: Tensor, dims: int | tuple[int, ...]) -> Tensor:
    """Return standard deviations, inf where there is nothing but rounding."""
    std = x.std(dims, correction=0)
    constant = max(_CONSTANT, 10 * torch.finfo(x.dtype).eps)
    return std.where(std > constant * x.mean(dims).abs(), torch.inf)


def patches(inputs: Tensor) -> Transform:
    """Compare images or signals with random patches of themselves (Coates and Ng, 2011).

    Patches are normalized and whitened, and are used as filters; responses are rectified on both sides, and
    averaged over quadrants of an image, or quarters of a signal.
    """
    images = _as_images(inputs)
    mean, scale = (each[:, None, None] for each in (images.mean((0, 2, 3)), _scale(images, (0, 2, 3))))
    filters, offsets = _filters(_random_patches((images - mean) / scale, *_patch_size(images)))
    of_part = partial(_responses, mean=mean, scale=scale, filters=filters, offsets=offsets[:, None, None])
    responses = partial(in_parts, of_part)
    return _standardized(responses, responses(some(inputs)), floor=_RARE)


def _responses(inputs: Tensor, mean: Tensor, scale: Tensor, filters: Tensor, offsets: Tensor) -> Tensor:
    batch, size = (_as_images(inputs) - mean) / scale, filters.shape[2:]
    strides = [2 if side >= _COARSE else 1 for side in batch.shape[2:]]
    average = F.avg_pool2d(batch.mean(1, keepdim=True), size, strides)
    power = F.avg_pool2d(batch.square().mean(1, keepdim=True), size, strides)
    contrast = ((power - average.square()).clamp(min=0) + _CONTRAST**2).sqrt()
    response = F.softshrink(F.conv2d(batch, filters, stride=strides) / contrast - offsets, _THRESHOLD)
    cells = (1, 4) if inputs.ndim == 3 else (2, 2)
    pooled = [F.adaptive_avg_pool2d(each.clamp(min=0), cells).flatten(1) for each in (response, -response)]
    return torch.cat(pooled, 1)


def some(inputs: Tensor) -> Tensor:
    """Return at most 500 evenly spaced samples."""
    return inputs[spread(len(inputs), SOME)]


def _as_images(inputs: Tensor) -> Tensor:
    """Return images as they are, and signals as images of a height of 1, in single precision."""
    return (inputs[:, :, None] if inputs.ndim == 3 else inputs).float()


def _patch_size(images: Tensor) -> tuple[int, int]:
    """Return height and width of a patch, of images or of signals as images."""
    _, channels, height, width = images.shape
    if height == 1:
        return 1, min(width, max(_MIN_PATCH, min(_MAX_STEPS, width // 4)), max(1, _MAX_NUMBERS // channels))
    side = min(height, width)
    side = min(side, max(_MIN_PATCH, min(_MAX_PATCH, side // 4)), max(1, math.isqrt(_MAX_NUMBERS // channels)))
    return side, side


def _random_patches(images: Tensor, height: int, width: int) -> Tensor:
    """Cut patches ``(P, C, height, width)`` from random places."""
    ends = len(images), images.shape[2] - height + 1, images.shape[3] - width + 1
    generator = torch.Generator().manual_seed(0)
    samples, tops, lefts = (torch.randint(end, (_NUM_PATCHES, 1, 1), generator=generator) for end in ends)
    rows, columns = tops + torch.arange(height)[:, None], lefts + torch.arange(width)
    return images[samples, :, rows, columns].movedim(3, 1)


def _filters(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Turn patches ``(P, C, h, w)`` into filters ``(F, C, h, w)``, and their offsets ``(F,)``."""
    x = patches.flatten(1)
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + _CONTRAST**2).sqrt()
    mean = x.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov((x - mean).T))
    whitening = vectors * (values.clamp(min=0) + _WHITENING).rsqrt() @ vectors.T
    filters = (x[:_NUM_FILTERS] - mean) @ whitening
    filters = filters / filters.norm(dim=1, keepdim=True).clamp(min=_TINY) @ whitening
    centered = filters - filters.mean(1, keepdim=True)  # which takes the mean off a patch
    return centered.reshape(-1, *patches.shape[1:]), filters @ mean


def words(ids: Tensor) -> Transform:
    """Weigh the words of texts, and pairs of neighbours by half, by tf-idf, as sparse rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    rarest = 1 if len(ids) < _FEW_TEXTS else 2
    vectorizer = TfidfVectorizer(analyzer=_words, sublinear_tf=True, min_df=rarest, max_features=_MAX_WORDS + 1)
    vectorizer.fit(ids.tolist())
    vectorizer.idf_ = [_WEIGHTS[len(each)] for each in vectorizer.get_feature_names_out()] * vectorizer.idf_
    return partial(_counts, vectorizer=vectorizer)


def _counts(ids: Tensor, vectorizer: Any) -> Matrix:
    return vectorizer.transform(ids.tolist())


def _words(ids: list[int]) -> list[tuple[int, ...]]:
    """List the words of a text, pairs of neighbours, and nothing, which each has; negative ids are padding."""
    tokens = [each for each in ids if each >= 0]
    return [(), *zip(tokens, strict=True), *pairwise(tokens)]
