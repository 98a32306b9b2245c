import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.functional import pieces
from lightning_sensitivity.functional.pieces import Together, in_pieces

Handed = list[tuple[Tensor, ...]]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_SIZE", 12)


def together() -> tuple[Together, Handed]:
    handed: Handed = []
    return Together(lambda *tensors: handed.append(tensors)), handed


@given(st.lists(st.integers(0, 9), max_size=8), st.lists(st.sampled_from([2, 3]), min_size=8, max_size=8))
@settings(deadline=None)
def test_all_samples_are_handed_on_once_and_in_order(sizes: list[int], widths: list[int]) -> None:
    some, handed = together()
    came = [torch.rand(size, width) for size, width in zip(sizes, widths, strict=False)]
    for each in came:
        some.add(each, -each)
    some.flush()
    some.flush()
    assert all(torch.equal(negative, -positive) for positive, negative in handed)
    rows = [[row.tolist() for batch in batches for row in batch] for batches in (came, (each[0] for each in handed))]
    assert rows[0] == rows[1]


def test_small_batches_go_together_and_a_large_one_alone_and_uncopied() -> None:
    some, handed = together()
    small, large = torch.ones(2, 3), torch.rand(5, 3)
    some.add(small)
    some.add(small.zero_())  # what waits is a copy
    assert not handed
    some.add(large)
    assert [each[0].tolist() for each in handed] == [[[1.0] * 3] * 2 + [[0.0] * 3] * 2, large.tolist()]
    assert handed[1][0] is large
    some.add(small, small[:1])  # not of the same samples: nothing that waits may be mixed with it
    assert [len(each) for each in handed[2]] == [2, 1]


def test_what_waits_is_never_more_than_a_piece() -> None:
    some, handed = together()
    for _ in range(5):
        some.add(torch.ones(2, 3))
    assert [len(each[0]) for each in handed] == [6]


@given(st.integers(0, 9), st.integers(1, 20))
@settings(deadline=None)
def test_pieces_are_small_and_hold_all_samples(size: int, width: int) -> None:
    x, seen = torch.rand(size, width), []
    total = torch.cat(in_pieces(lambda a, b: seen.append(a.numel()) or a + b, x, x))  # type: ignore[func-returns-value]
    assert torch.equal(total, 2 * x)
    assert all(count <= max(12, width) for count in seen)
