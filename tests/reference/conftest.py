"""What the tests of references share."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from lightning_sensitivity.reference import learners


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


INPUTS: dict[str, Tensor] = {
    "columns": torch.randn(300, 6, generator=generator()),
    "images": torch.randint(256, (300, 2, 9, 9), generator=generator(), dtype=torch.uint8),
    "signals": torch.randn(300, 1, 24, generator=generator()),
    "tokens": torch.randint(-1, 30, (300, 8), generator=generator()),
}


def steps(num_samples: int, seed: int = 0, num_columns: int = 8) -> tuple[Tensor, Tensor]:
    """A table in which a threshold of one column makes the class, which a forest sees better than what is smooth."""
    x = torch.rand(num_samples, num_columns, generator=generator(seed))
    return x, ((x[:, 0] > 0.4) & (x[:, 1] < 0.8)).long()


@pytest.fixture(autouse=True, scope="package")
def quick_learners() -> Iterator[None]:
    """Learners that are quick to fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "_TREES_OF_PART", 15)
        patch.setattr(learners, "_TREES", 40)
        patch.setattr(learners, "_PART", 100)
        yield


@pytest.fixture
def no_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "_MAX_CELLS", 0)
