"""Outputs that are the same but for rounding."""

import pytest
import torch
from torch import Tensor

from lightning_sensitivity.functional.tensors import are_same

OUTPUTS = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 300.0, 0.0])


@pytest.mark.parametrize(("first", "second", "same"), [
    (OUTPUTS, OUTPUTS, True),
    (OUTPUTS, OUTPUTS + 1e-5, True),
    (OUTPUTS, OUTPUTS + torch.tensor([0.0, 0.0, 1e-3]), False),  # of one output
    (OUTPUTS, OUTPUTS + 1e-3 * (torch.arange(50) == 7)[:, None], False),  # of one sample
    (OUTPUTS, OUTPUTS[:40], False),
    (0 * OUTPUTS, 0 * OUTPUTS, False),  # a head of zeros tells nothing
    (OUTPUTS.log().neg().log(), OUTPUTS.log().neg().log(), False),  # nor do numbers that are nan
])  # fmt: skip
def test_outputs_are_the_same_if_they_differ_by_less_than_samples_do(first: Tensor, second: Tensor, same: bool) -> None:
    assert are_same(first, second) == same
