"""What a reference sees of samples, and the rows of numbers that scikit-learn gets of it.

Random numbers are the same in every call, and global streams are not touched.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

# Of N samples, by kind: "columns" (N, D), "images" (N, C, H, W) and "signals" (N, C, L), floating or bytes; "tokens"
# (N, L), integers, of which negative ones are padding.
Seen: TypeAlias = dict[str, Tensor]
Array: TypeAlias = Any  # of NumPy, or what becomes one
Samples: TypeAlias = Any  # a tensor, array, data frame or list, or a mapping of kinds to these
Rows: TypeAlias = Any  # an array in double precision, or a sparse matrix of words
Transform: TypeAlias = Callable[[Tensor], Rows]
Block: TypeAlias = Callable[[Tensor], Transform]  # of features; it sees training samples

_CHUNK = 50  # samples of which features are made at a time
_MAX_SIDE, _MAX_LENGTH = 32, 512  # pixels of an image, and steps of a signal
_SOME = 500  # samples that give features their scale
_MAX_COLUMNS = 4096  # of more, evenly spaced ones are seen
_CONSTANT = 1e-9  # relative standard deviation of a column that holds nothing but rounding
_TINY = 1e-12  # length of a row of zeros
_EQUAL = 1e-12  # relative squared distance of equal rows

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


def kind_of(inputs: Tensor) -> str:
    """Return the kind of inputs, by the number of dimensions and the type.

    Args:
        inputs: ``(N, D)``, which are token ids if they are integers; signals ``(N, C, L)``; images
            ``(N, C, H, W)``. All others are columns, if they are flattened.
    """
    if inputs.ndim == 2 and not inputs.is_floating_point():
        return "tokens"
    return {3: "signals", 4: "images"}.get(inputs.ndim, "columns")


def shrunk(inputs: Tensor) -> Tensor:
    """Average images to at most 32 pixels a side, and signals to 512 steps; all else stays as it is.

    Args:
        inputs: Of any kind, ``(N, ...)``. A reference sees no more of them than what this returns.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.reference.features import shrunk
        >>> shrunk(torch.rand(2, 3, 320, 640)).shape
        torch.Size([2, 3, 16, 32])
    """
    limit = {3: _MAX_LENGTH, 4: _MAX_SIDE}.get(inputs.ndim)
    largest = max(inputs.shape[2:], default=0)
    if limit is None or largest <= limit or len(inputs) == 0:
        return inputs
    return _averaged(inputs, [max(1, round(size * limit / largest)) for size in inputs.shape[2:]])


def _averaged(inputs: Tensor, sizes: Sequence[int]) -> Tensor:
    return _in_parts(lambda part: F.interpolate(part.float(), sizes, mode="area"), inputs)


def fit_size(inputs: Tensor, shape: torch.Size) -> Tensor:
    """Resize images to the size of others, and cut or pad signals; all else stays as it is.

    Args:
        inputs: Of any kind, ``(N, ...)``.
        shape: The shape of the others.
    """
    if inputs.shape[2:] == shape[2:] or len(inputs) == 0:
        return inputs
    if inputs.ndim == 3:
        return F.pad(inputs.float(), (0, shape[2] - inputs.shape[2]))
    return _averaged(inputs, shape[2:])


def of_rows(seen: Seen, rows: Tensor) -> Seen:
    """Return what a reference sees of some of the samples."""
    return {kind: x[rows] for kind, x in seen.items()}


def possible_blocks(seen: Seen) -> list[dict[str, Block]]:
    """Return what may be seen of samples: each time a block of features for each kind."""
    if len(seen) > 1:
        return [{kind: KINDS[kind][0] for kind in seen}]
    return [{kind: block} for kind in seen for block in KINDS[kind]]


class Features:
    """What makes rows of samples: a block for each kind, side by side, scaled so that none drowns the others.

    Args:
        blocks: A block for each kind: ``columns``, ``values``, ``patches`` or ``words``.
        seen: Training samples, no larger than ``shrunk`` makes them.

    Attributes:
        name: The names of the blocks.
        shapes: The shape of the samples of each kind.
    """

    def __init__(self, blocks: dict[str, Block], seen: Seen) -> None:
        self.name = " and ".join(block.__name__ for block in blocks.values())
        self.shapes = {kind: x.shape for kind, x in seen.items()}
        self._transforms = {kind: block(seen[kind]) for kind, block in blocks.items()}
        self._scales = dict.fromkeys(blocks, 1.0)
        if len(blocks) > 1:
            for kind, transform in self._transforms.items():
                self._scales[kind] = math.sqrt(median_distance(transform(_some(seen[kind]))))

    def __call__(self, seen: Seen) -> Rows:
        """Return the rows of samples, of any size."""
        from scipy.sparse import hstack, issparse

        fitted = {kind: fit_size(seen[kind], shape) for kind, shape in self.shapes.items()}
        rows = [transform(fitted[kind]) / self._scales[kind] for kind, transform in self._transforms.items()]
        if len(rows) == 1:
            return rows[0]
        return hstack(rows, format="csr") if any(map(issparse, rows)) else np.hstack(rows)

    def check(self, seen: Seen) -> None:
        """Raise ValueError if samples lack a kind, or have other dimensions, columns or channels."""
        for kind, shape in self.shapes.items():
            found = seen.get(kind, torch.empty(0)).shape
            num_fixed = 1 if kind == "tokens" else 2  # texts may have any length
            if len(found) != len(shape) or found[1:num_fixed] != shape[1:num_fixed]:
                got = ", ".join(f"{kind} of shape {tuple(each.shape)}" for kind, each in seen.items())
                wanted = ", ".join(map(str, shape[1:]))
                raise ValueError(f"Expected `x` to have {kind} (M, {wanted}), but got {got}.")


def median_distance(rows: Rows) -> float:
    """Return the median of squared distances of different rows, of at most 500."""
    from sklearn.metrics import pairwise

    distances = pairwise.euclidean_distances(rows[spread(rows.shape[0], _SOME).numpy()], squared=True)
    positive = distances[distances > _EQUAL * distances.max()]
    return float(np.median(positive)) if len(positive) else 1.0


def _in_parts(function: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
    """Turn inputs into features, a few samples at a time."""
    return torch.cat([function(part) for part in torch.split(inputs, _CHUNK)])


def columns(inputs: Tensor) -> Transform:
    """Take all numbers of a sample, each column with a mean of 0 and a variance of 1."""
    return _standardized(partial(flat, length=inputs.shape[1]), flat(inputs), floor=0.0)


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


def _scaled(inputs: Tensor, function: Callable[[Tensor], Tensor], mean: Tensor, scale: Tensor | float) -> Rows:
    return ((_in_parts(function, inputs) - mean) / scale).double().numpy()


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
    responses = partial(_responses, mean=mean, scale=scale, filters=filters, offsets=offsets[:, None, None])
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
    return inputs[spread(len(inputs), _SOME)]


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


def _counts(ids: Tensor, vectorizer: Any) -> Rows:
    return vectorizer.transform(ids.tolist())


def _words(ids: list[int]) -> list[tuple[int, ...]]:
    """List the words of a text, pairs of neighbours, and nothing, which each has; negative ids are padding."""
    known = [each for each in ids if each >= 0]
    return [(), *zip(known, strict=True), *pairwise(known)]


KINDS: dict[str, tuple[Block, Block]] = {  # of inputs, and what blocks of features may be made of each
    "columns": (columns, values),
    "images": (patches, values),
    "signals": (patches, values),
    "tokens": (words, columns),
}
