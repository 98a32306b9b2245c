"""Labels among the inputs are found, also in a matrix, and no good feature is taken for them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_sensitivity.reading.inputs import find_leaked_label

RANDOM = torch.Generator().manual_seed(0)
X, Z = torch.randn(60, 5, generator=RANDOM), torch.randn(60, 2, generator=RANDOM)
RARE = (torch.arange(60) % 8 == 0).long() + (torch.arange(60) % 16 == 0)
K, FLAG = torch.randint(4, (60,), generator=RANDOM), torch.randint(2, (60,), generator=RANDOM)


def find(inputs: Any, labels: Tensor) -> str | None:
    return find_leaked_label(inputs, labels, torch.ones(len(labels), dtype=torch.bool))


FOUND: dict[str, tuple[dict[str, Any], Tensor, str]] = {
    "a target": ({"a": X, "b": Z[:, 0]}, Z[:, 0], "b"),
    "two targets in an entry of a dict": ({"x": {"a": X, "b": Z}}, Z, "x['b']"),
    "one of two targets among columns": ({"x": torch.cat([X, Z[:, :1]], 1)}, Z, "x"),
    "a target in a signal": ({"x": torch.cat([X, Z[:, :1]], 1)[:, None]}, Z[:, 0], "x"),
    "class indices among columns": ({"x": torch.cat([X, K[:, None]], 1)}, K, "x"),
    "class indices in a tuple": ({"x": (X, K)}, K, "x[1]"),
}
PASSED: dict[str, tuple[dict[str, Any], Tensor]] = {
    "a target with noise": ({"x": Z[:, :1] + 1e-2 * X[:, :1]}, Z[:, 0]),
    "eight samples": ({"x": Z[:8]}, Z[:8]),
    "constants, nan, sparse and nothing": (
        {"a": torch.ones(60, 2), "b": X * torch.nan, "c": X.to_sparse(), "d": X[:, :0], "e": [], "f": "a"},
        Z,
    ),
    "a flag, which may be a good one": ({"x": X, "flag": FLAG.float()}, FLAG),
    "few labels that are not those of most": ({"x": X, "k": RARE}, RARE),
    "a flag among columns": ({"flag": torch.cat([X, FLAG[:, None]], 1)}, FLAG),
}


@pytest.mark.parametrize("what", FOUND)
def test_labels_among_the_inputs_are_found_by_name(what: str) -> None:
    inputs, labels, name = FOUND[what]
    assert find(inputs, labels) == name


@pytest.mark.parametrize("what", PASSED)
def test_what_may_be_no_label_passes(what: str) -> None:
    assert find(*PASSED[what]) is None


def test_ignored_labels_are_not_compared() -> None:
    labels = torch.where(torch.arange(60) % 3 > 0, K, -100)
    assert find_leaked_label({"x": K}, labels, labels >= 0) == "x"
