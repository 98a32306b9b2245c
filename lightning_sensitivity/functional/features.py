"""Features for the reference, from inputs as they are: principal components, and bags of words."""

import torch
from torch import Tensor

_MAX_COLUMNS = 4096  # of which principal components are computed
_MAX_WORDS = 4096
_NUM_ITERATIONS = 4
_NUM_EXTRA = 10  # components that only make the others more exact
_ROUNDING = 1e-9  # relative distance of equal samples
_FEW_VALUES = 0.2  # share of different rows, in a table of categories
_CONSTANT = 1e-9  # relative standard deviation of a column that holds nothing but rounding


def principal_components(features: Tensor, new_features: Tensor, num_components: int = 50) -> tuple[Tensor, Tensor]:
    """Reduce features to the principal components of training and new samples together.

    Columns that are no more than ``num_components`` are only scaled, to a mean of 0 and a variance of 1 on
    training samples. More columns are taken as they are, like pixels, unless one of them has most of the
    variance: then units differ, and all are scaled first. If several have large units, scale them yourself.
    More than 4,096 are first added up with random signs to 4,096, as in feature hashing
    (Weinberger et al., 2009), which keeps distances within some 2 %. Components come from subspace iteration
    (Halko, Martinsson and Tropp, 2011). Random numbers are the same in every call, and global streams are not
    touched.

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
    variance = x.square().mean(0)
    if x.shape[1] <= num_components or bool(variance.max() > variance.sum() / 2):
        std = variance.sqrt()
        std = std.where(std > _CONSTANT * mean.abs(), torch.inf)
        x, new_x = x / std, new_x / std
    if x.shape[1] <= num_components:
        return x, new_x
    scores = _top_components(torch.cat([x, new_x]), num_components)
    return scores[: len(x)], scores[len(x) :]


def different_samples(features: Tensor, labels: Tensor) -> Tensor:
    """Find the places of different samples: of one that comes repeatedly, the first.

    A sampler with replacement draws a sample repeatedly, with the same label. That is no second observation, and a
    reference that leaves one of them out still knows its label. Where equal features have several labels, or only a
    few values are possible, as in a table of categories, rows are samples of their own.

    Args:
        features: ``(N, D)``, such as :func:`principal_components`.
        labels: Their labels as probabilities, ``(N, K)``.

    Returns:
        Indices of rows.
    """
    distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
    first = (distances <= _ROUNDING * distances.max()).int().argmax(1)
    places = torch.arange(len(features))
    chosen = places[first == places]
    is_repeated = torch.equal(labels, labels[first]) and len(chosen) > _FEW_VALUES * len(places)
    return chosen if is_repeated else places


def _reduced(name: str, features: Tensor) -> Tensor:
    """Return features ``(N, D)`` in float64 on the CPU, with at most 4,096 columns."""
    features = features.detach().cpu()[:, None].flatten(1)
    num_columns = features.shape[1]
    if num_columns > _MAX_COLUMNS:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(0, 2, (num_columns,), generator=generator).float() * 2 - 1
        reduced = torch.zeros(len(features), _MAX_COLUMNS, dtype=torch.float32)
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


def bags_of_words(ids: Tensor, new_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Count how often each token occurs in each sample.

    Args:
        ids: Token ids of training samples, integers ``(N, L)``, negative ones for padding.
        new_ids: Token ids of new samples, ``(M, L')``.

    Returns:
        Counts of the 4,096 ids at most that occur most often in both, in the order of the ids, ``(N, V)`` and
        ``(M, V)``, float64, on the CPU.

    Raises:
        ValueError: If ids are no integers.

    Example:
        >>> import torch
        >>> from lightning_sensitivity.functional import bags_of_words
        >>> bags_of_words(torch.tensor([[7, 7, 3, -1]]), torch.tensor([[3, 9]]))
        (tensor([[1., 2., 0.]], dtype=torch.float64), tensor([[1., 0., 1.]], dtype=torch.float64))
    """
    ids, new_ids = _checked_ids("ids", ids), _checked_ids("new_ids", new_ids)
    words = torch.cat([ids[ids >= 0], new_ids[new_ids >= 0]])
    vocabulary, counts = torch.unique(words, return_counts=True)
    most_frequent = counts.argsort(descending=True, stable=True)[:_MAX_WORDS]
    vocabulary = vocabulary[most_frequent.sort().values]
    return _counts(ids, vocabulary), _counts(new_ids, vocabulary)


def _checked_ids(name: str, ids: Tensor) -> Tensor:
    """Return token ids ``(N, L)`` on the CPU."""
    if ids.is_floating_point() or ids.ndim < 1:
        raise ValueError(f"Expected `{name}` to be integers (N, L), but got {ids.dtype} of shape {tuple(ids.shape)}.")
    return ids.cpu().long()[:, None].flatten(1)


def _counts(ids: Tensor, vocabulary: Tensor) -> Tensor:
    """Count the words of a sorted vocabulary in each sample."""
    is_known = torch.isin(ids, vocabulary)
    columns = torch.searchsorted(vocabulary, ids[is_known])
    cells = is_known.nonzero()[:, 0] * len(vocabulary) + columns
    counts = torch.bincount(cells, minlength=len(ids) * len(vocabulary))
    return counts.reshape(len(ids), len(vocabulary)).double()
