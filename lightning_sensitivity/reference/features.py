"""Features: a matrix of what is seen of samples of one or several kinds, side by side."""

import math

import numpy as np
import torch

from lightning_sensitivity.reference.blocks import Block, Matrix, some, spread
from lightning_sensitivity.reference.kinds import KINDS, Seen

_SOME = 500  # samples that give features their scale
_EQUAL = 1e-12  # relative squared distance of equal rows


class Features:
    """What makes a matrix of samples: a block for each kind, side by side, scaled so that none drowns the others.

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
                self._scales[kind] = math.sqrt(median_distance(transform(some(seen[kind]))))

    def __call__(self, seen: Seen) -> Matrix:
        """Return the matrix of samples, of any size."""
        from scipy.sparse import hstack, issparse

        fitted = {kind: KINDS[kind].fitted(seen[kind], shape) for kind, shape in self.shapes.items()}
        matrices = [transform(fitted[kind]) / self._scales[kind] for kind, transform in self._transforms.items()]
        if len(matrices) == 1:
            return matrices[0]
        return hstack(matrices, format="csr") if any(map(issparse, matrices)) else np.hstack(matrices)

    def check(self, seen: Seen) -> None:
        """Raise ValueError if samples lack a kind, or have other dimensions, columns or channels."""
        for kind, shape in self.shapes.items():
            found = seen.get(kind, torch.empty(0)).shape
            fixed = slice(1, KINDS[kind].num_fixed)
            if len(found) != len(shape) or found[fixed] != shape[fixed]:
                got = ", ".join(f"{kind} of shape {tuple(each.shape)}" for kind, each in seen.items())
                wanted = ", ".join(map(str, shape[1:]))
                raise ValueError(f"Expected `x` to have {kind} (M, {wanted}), but got {got}.")


def median_distance(matrix: Matrix) -> float:
    """Return the median of squared distances of different rows, of at most 500."""
    from sklearn.metrics import pairwise

    distances = pairwise.euclidean_distances(matrix[spread(matrix.shape[0], _SOME).numpy()], squared=True)
    positive = distances[distances > _EQUAL * distances.max()]
    return float(np.median(positive)) if len(positive) else 1.0
