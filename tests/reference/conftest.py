"""What the tests of references share."""

from collections.abc import Iterator

import pytest

from lightning_sensitivity.reference import learners


@pytest.fixture(autouse=True, scope="package")
def quick_learners() -> Iterator[None]:
    """Learners that are quick to fit."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "_TREES_OF_PART", 15)
        patch.setattr(learners, "_TREES", 40)
        patch.setattr(learners, "_PART", 100)
        yield
