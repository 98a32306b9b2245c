"""Which samples are the same one, and what differs between two sets of them."""

import pytest
import torch
from torch import Tensor

from lightning_sensitivity.reference.observations import largest_difference

CONSTANT, ONE_FLAG = torch.zeros(50_000, 1), torch.arange(600)[:, None] == 0


@pytest.mark.parametrize(
    ("known", "new", "is_large"),
    [
        (CONSTANT, ONE_FLAG.float(), False),
        (CONSTANT, 1e6 * ONE_FLAG.float(), False),
        (CONSTANT, torch.ones(600, 1), True),
    ],
    ids=["a rare flag", "a heavy tail", "other constants"],
)
def test_a_column_differs_if_more_than_a_few_samples_do(known: Tensor, new: Tensor, is_large: bool) -> None:
    assert (largest_difference(known, new)[1] > 8) == is_large
