"""What tests of callbacks share."""

from collections.abc import Iterator

import pytest

from tests.helpers import small_forests


@pytest.fixture(autouse=True)
def quick_learners() -> Iterator[None]:
    """Fit a reference in a tenth of a second."""
    with small_forests():
        yield
