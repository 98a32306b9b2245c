"""Features for the reference, by kind of input: columns, random patches of images and signals, bags of words.

A maker looks at the inputs of training samples, and returns a function that turns inputs of any samples into rows
of numbers, and can be pickled. Random numbers are the same in every call, and global streams are not touched.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_sensitivity.functional.tensors import wide_dtype

Transform = Callable[[Tensor], Any]  # inputs to rows: a tensor, or a sparse matrix
Maker = Callable[[Tensor], Transform]

_CHUNK = 50  # samples of which features are made at a time
_MAX_SIDE, _MAX_VOXELS = 32, 16  # a side, of an image and of a volume
_MAX_LENGTH = 512  # steps of a signal
_MAX_COLUMNS = 4096  # of which distances are computed
_CONSTANT = 1e-9  # relative standard deviation of a column that holds nothing but rounding
_TINY = 1e-12  # length of a row of zeros

_NUM_PATCHES, _NUM_FILTERS = 20_000, 256
_MIN_PATCH, _MAX_PATCH, _MAX_STEPS = 3, 6, 16  # pixels a side, and steps of a signal
_MAX_NUMBERS = 1024  # in a patch, of all channels
_MIN_SIDE = 6  # of images that have patches
_COARSE = 24  # pixels a side from which every second place is taken
_CONTRAST, _WHITENING = 0.1, 0.1  # what keeps flat patches and weak directions small
_THRESHOLD = 0.5  # of responses
_SOME = 500  # samples that give responses their scale
_RARE = 0.1  # of the scale of all responses, added to that of each

_MAX_WORDS = 8192  # and pairs of words
_PAIR_WEIGHT = 0.5
_FEW_TEXTS = 50  # below, words that occur once are kept, too


def kind_of(inputs: Tensor) -> str:
    """Return ``"vectors"``, ``"images"``, ``"signals"`` or ``"tokens"``.

    Args:
        inputs: ``(N, D)``, which are token ids if they are integers; signals ``(N, C, L)``; images ``(N, C, H, W)``.
            With more dimensions they count as images, though they have no patches.
    """
    if inputs.ndim <= 2:
        return "vectors" if inputs.is_floating_point() or inputs.ndim < 2 else "tokens"
    return "signals" if inputs.ndim == 3 else "images"


def shrunk(inputs: Tensor) -> Tensor:
    """Average images to at most 32 pixels a side, volumes to 16, and signals to 512 steps; all else stays as it is.

    Args:
        inputs: Of any kind, ``(N, ...)``. A reference sees no more of them than what this returns.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional.features import shrunk
        >>> shrunk(torch.rand(2, 3, 320, 640)).shape
        torch.Size([2, 3, 16, 32])
    """
    limit = {3: _MAX_LENGTH, 4: _MAX_SIDE, 5: _MAX_VOXELS}.get(inputs.ndim)
    largest = max(inputs.shape[2:], default=0)
    if limit is None or largest <= limit or len(inputs) == 0:
        return inputs
    sizes = [max(1, round(size * limit / largest)) for size in inputs.shape[2:]]
    return torch.cat([F.interpolate(part.float(), sizes, mode="area") for part in torch.split(inputs, _CHUNK)])


def feature_makers(inputs: Tensor) -> dict[str, Maker]:
    """Return the features that fit inputs, which come from :func:`shrunk`, by name."""
    if kind_of(inputs) == "tokens":
        return {"words": words, "columns": token_columns}
    if _patch_size(inputs):
        return {"patches": patches, "values": values}
    return {"columns": columns, "values": values}


def make_rows(transform: Transform, inputs: Tensor) -> Any:
    """Turn inputs into rows for scikit-learn: an array in double precision, or a sparse matrix of words."""
    rows = transform(inputs) if kind_of(inputs) == "tokens" else _in_parts(transform, inputs)
    return rows.cpu().double().numpy() if isinstance(rows, Tensor) else rows


def _in_parts(transform: Transform, inputs: Tensor) -> Tensor:
    """Turn inputs into features, a few samples at a time."""
    return torch.cat([transform(part) for part in torch.split(inputs, _CHUNK)])


def fit_size(inputs: Tensor, shape: torch.Size) -> Tensor:
    """Resize images to the size of others, and cut or pad signals; all else stays as it is.

    Args:
        inputs: Of any kind, ``(N, ...)``.
        shape: The shape of the others.
    """
    if inputs.shape[2:] == shape[2:] or inputs.ndim != len(shape) or len(inputs) == 0:
        return inputs
    if kind_of(inputs) == "signals":
        return F.pad(inputs.float(), (0, shape[2] - inputs.shape[2]))
    return torch.cat([F.interpolate(part.float(), shape[2:], mode="area") for part in torch.split(inputs, _CHUNK)])


def columns(inputs: Tensor) -> Transform:
    """Take all numbers of a sample, each column with a mean of 0 and a variance of 1."""
    return _standardized(flat, _in_parts(flat, inputs), floor=0.0)


def token_columns(ids: Tensor) -> Transform:
    """Take integers as columns of a table, for those who have one; other samples may be shorter or longer."""
    return partial(_fit_length, transform=columns(ids), length=ids.shape[1])


def _fit_length(ids: Tensor, transform: Transform, length: int) -> Tensor:
    found: Tensor = transform(F.pad(ids, (0, length - ids.shape[1]), value=-1))
    return found


def values(inputs: Tensor) -> Transform:
    """Take all numbers of a sample in the units that they have."""
    return partial(_scaled, transform=flat, mean=_in_parts(flat, inputs).mean(0), scale=1.0)


def flat(inputs: Tensor) -> Tensor:
    """Flatten samples; more than 4,096 numbers are added up with random signs (Weinberger et al., 2009)."""
    x = inputs[:, None].flatten(1)
    x = x.to(wide_dtype(x.device))
    num_columns = x.shape[1]
    if num_columns <= _MAX_COLUMNS:
        return x
    signs = torch.randint(2, (num_columns,), generator=_generator()).to(x) * 2 - 1
    padded = F.pad(x * signs, (0, -num_columns % _MAX_COLUMNS))
    return padded.reshape(len(x), -1, _MAX_COLUMNS).sum(1)


def _standardized(transform: Transform, features: Tensor, floor: float) -> Transform:
    """Scale what a transform gives by means and standard deviations of some of its features."""
    mean = features.mean(0)
    scale = _scale(features, 0) + floor * features.std(correction=0)
    return partial(_scaled, transform=transform, mean=mean, scale=scale)


def _scaled(inputs: Tensor, transform: Transform, mean: Tensor, scale: Tensor | float) -> Tensor:
    found: Tensor = (transform(inputs) - mean) / scale
    return found


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
    filters, offsets = _filters(_random_patches((images - mean) / scale, *_patch_size(inputs)))
    filters, offsets = filters.to(images.device), offsets.to(images.device)[:, None, None]
    responses = partial(_responses, mean=mean, scale=scale, filters=filters, offsets=offsets)
    return _standardized(responses, _in_parts(responses, _some(inputs)), floor=_RARE)


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


def _some(inputs: Tensor) -> Tensor:
    """Return at most 500 evenly spaced samples."""
    return inputs[:: math.ceil(len(inputs) / _SOME)]


def _as_images(inputs: Tensor) -> Tensor:
    """Return images as they are, and signals as images of a height of 1, in single precision."""
    return (inputs[:, :, None] if inputs.ndim == 3 else inputs).float()


def _patch_size(inputs: Tensor) -> tuple[int, ...]:
    """Return height and width of a patch; () if there are no patches."""
    if inputs.ndim not in (3, 4):
        return ()
    side = min(inputs.shape[2:])
    largest = _MAX_STEPS if inputs.ndim == 3 else _MAX_PATCH
    patch = max(_MIN_PATCH, min(largest, side // 4))
    size = (1, patch) if inputs.ndim == 3 else (patch, patch)
    return size if side >= _MIN_SIDE and inputs.shape[1] * math.prod(size) <= _MAX_NUMBERS else ()


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
    vectorizer = TfidfVectorizer(analyzer=_words, sublinear_tf=True, min_df=rarest, max_features=_MAX_WORDS)
    try:
        vectorizer.fit(ids.tolist())
    except ValueError:  # no word is in two texts
        return _no_words
    is_pair = [len(each) > 1 for each in vectorizer.get_feature_names_out()]
    vectorizer.idf_ = np.where(is_pair, _PAIR_WEIGHT, 1.0) * vectorizer.idf_
    return partial(_counts, vectorizer=vectorizer)


def _no_words(ids: Tensor) -> Tensor:
    return torch.zeros(len(ids), 1)


def _counts(ids: Tensor, vectorizer: Any) -> Any:
    return vectorizer.transform(ids.tolist())


def _words(ids: list[int]) -> list[tuple[int, ...]]:
    """List the words of a text, and pairs of neighbours; negative ids are padding."""
    known = [each for each in ids if each >= 0]
    return [*zip(known, strict=True), *pairwise(known)]


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
