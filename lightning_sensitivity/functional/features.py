"""Features for the reference, from inputs as they are: principal components, and bags of words."""

import torch
from torch import Tensor

_MAX_COLUMNS = 4096  # of which principal components are computed
_MAX_WORDS = 4096
_NUM_ITERATIONS = 4
_NUM_EXTRA = 10  # components that only make the others more exact
_CONSTANT = 1e-9  # relative standard deviation of a column that holds nothing but rounding


def principal_components(features: Tensor, new_features: Tensor, num_components: int = 50) -> tuple[Tensor, Tensor]:
    """Reduce features to the principal components of training and new samples together.

    Columns that are no more than ``num_components`` are only scaled, to a mean of 0 and a variance of 1 on
    training samples. More than 4,096 are first added up with random signs to 4,096, as in feature hashing
    (Weinberger et al., 2009), which keeps distances within some 2 %. Components come from subspace iteration
    (Halko, Martinsson and Tropp, 2011). Random numbers are the same in every call, and global streams are not touched.

    Args:
        features: Inputs or features of training samples, ``(N, ...)``; they are flattened.
        new_features: Those of new samples, ``(M, ...)``.
        num_components: How many components at most.

    Returns:
        Both, reduced, ``(N, D)`` and ``(M, D)``, float64, on the CPU.

    Raises:
        ValueError: If shapes do not fit, there is no training sample, or a feature is nan or inf.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import principal_components
        >>> features, new_features = torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([[4.0, 5.0]])
        >>> principal_components(features, new_features)[1]
        tensor([[3., 0.]], dtype=torch.float64)
    """
    if features.ndim < 1 or features.shape[1:] != new_features.shape[1:] or not len(features):
        got = f"{tuple(features.shape)} and {tuple(new_features.shape)}"
        raise ValueError(f"Expected `features` and `new_features` of the same columns, but got {got}.")
    x, new_x = _reduced("features", features), _reduced("new_features", new_features)
    mean = x.mean(0)
    x, new_x = x - mean, new_x - mean
    if x.shape[1] > num_components:
        scores = _top_components(torch.cat([x, new_x]), num_components)
        return scores[: len(x)], scores[len(x) :]
    std = x.square().mean(0).sqrt()
    is_constant = std <= _CONSTANT * mean.abs()
    std = std.where(~is_constant, torch.inf)
    return x / std, new_x / std


def _reduced(name: str, features: Tensor) -> Tensor:
    """Return features ``(N, D)`` in float64 on the CPU, with at most 4,096 columns."""
    features = features.detach().cpu()[:, None].flatten(1)
    num_columns = features.shape[1]
    if num_columns > _MAX_COLUMNS:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (num_columns,), generator=generator).float() * 2 - 1
        reduced = torch.zeros(len(features), _MAX_COLUMNS)
        for columns in torch.split(torch.arange(num_columns), _MAX_COLUMNS):
            reduced[:, : len(columns)] += features[:, columns] * signs[columns]
        features = reduced
    if not bool(features.isfinite().all()):
        raise ValueError(f"Expected `{name}` to be finite, but got nan or inf.")
    return features.double()


def _top_components(rows: Tensor, num_components: int) -> Tensor:
    """Compute the coordinates of rows on their first principal axes (about 0), by subspace iteration."""
    generator = torch.Generator().manual_seed(0)
    size = min(rows.shape[1], num_components + _NUM_EXTRA)
    basis = torch.randn(rows.shape[1], size, generator=generator, dtype=rows.dtype)
    for _ in range(_NUM_ITERATIONS):
        basis = torch.linalg.qr(rows.T @ (rows @ basis)).Q
    coordinates = rows @ basis
    axes: Tensor = torch.linalg.eigh(coordinates.T @ coordinates).eigenvectors
    return coordinates @ axes[:, -num_components:]


def bags_of_words(
    ids: Tensor, new_ids: Tensor, mask: Tensor | None = None, new_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Count how often each token occurs in each sample.

    Args:
        ids: Token ids of training samples, integers ``(N, L)``.
        new_ids: Token ids of new samples, ``(M, L')``.
        mask: Where ``ids`` are tokens, not padding, of the same shape; by default everywhere.
        new_mask: The same for ``new_ids``.

    Returns:
        Counts of the 4,096 ids at most that occur most often in both, in the order of the ids, ``(N, V)`` and
        ``(M, V)``, float64, on the CPU.

    Raises:
        ValueError: If ids are no integers or masks have other shapes.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import bags_of_words
        >>> bags_of_words(torch.tensor([[7, 7, 3, 0]]), torch.tensor([[3, 9]]), mask=torch.tensor([[1, 1, 1, 0]]))
        (tensor([[1., 2., 0.]], dtype=torch.float64), tensor([[1., 0., 1.]], dtype=torch.float64))
    """
    samples, words = _words("ids", ids, mask)
    new_samples, new_words = _words("new_ids", new_ids, new_mask)
    vocabulary, counts = torch.unique(torch.cat([words, new_words]), return_counts=True)
    most_frequent = counts.argsort(descending=True, stable=True)[:_MAX_WORDS]
    vocabulary = vocabulary[most_frequent.sort().values]
    bags = _counts(samples, words, vocabulary, len(ids))
    return bags, _counts(new_samples, new_words, vocabulary, len(new_ids))


def _words(name: str, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the index of the sample and the id of each token that is not padding."""
    if ids.is_floating_point() or ids.ndim < 1:
        raise ValueError(f"Expected `{name}` to be integers (N, L), but got {ids.dtype} of shape {tuple(ids.shape)}.")
    is_word = torch.ones_like(ids) > 0 if mask is None else mask > 0
    if is_word.shape != ids.shape:
        got = f"{tuple(is_word.shape)} for {tuple(ids.shape)}"
        raise ValueError(f"Expected the mask of `{name}` to have its shape, but got {got}.")
    ids, is_word = (each.cpu()[:, None].flatten(1) for each in (ids, is_word))
    return is_word.nonzero()[:, 0], ids[is_word].long()


def _counts(samples: Tensor, words: Tensor, vocabulary: Tensor, num_samples: int) -> Tensor:
    """Count the words of a sorted vocabulary in each sample."""
    is_known = torch.isin(words, vocabulary)
    columns = torch.searchsorted(vocabulary, words[is_known])
    counts = torch.bincount(samples[is_known] * len(vocabulary) + columns, minlength=num_samples * len(vocabulary))
    return counts.reshape(num_samples, len(vocabulary)).double()
