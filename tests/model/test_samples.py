"""Kept samples: whole batches, evenly spaced, as few as hold what is wanted, and within a number of bytes."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sensitivity.model import ModelCall
from lightning_sensitivity.model.samples import KeptBatch, KeptRows, KeptSamples
from tests.helpers import Watch

CALL = ModelCall(nn.Identity(), torch.zeros(0))  # of no bytes
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=60)


def kept(sizes: list[int], num_wanted: float, max_bytes: float = math.inf) -> KeptSamples:
    """Samples of batches of these sizes, each of 4 bytes."""
    samples = KeptSamples(num_wanted, max_bytes=max_bytes)
    for index, size in enumerate(sizes):
        if samples.wants(index):
            samples.add(KeptBatch(index, size, CALL, features=torch.full((size,), float(index))))
    return samples


def indices(samples: KeptSamples) -> list[int]:
    return [batch.index for batch in samples.batches]


@given(sizes=SIZES, num_wanted=st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_as_few_whole_batches_as_hold_what_is_wanted_are_kept(sizes: list[int], num_wanted: int) -> None:
    samples = kept(sizes, num_wanted)
    assert samples.size == sum(sizes[index] for index in indices(samples)) >= min(num_wanted, sum(sizes))
    assert indices(samples) == sorted(indices(samples)) and all(sizes[index] for index in indices(samples))
    assert samples.size - num_wanted < max(sizes) and not samples.is_truncated  # less than one batch too many


@pytest.mark.parametrize(("num_batches", "num_wanted"), [(100, 100), (1000, 80), (37, 50)])
def test_they_are_evenly_spaced_whatever_the_length_of_a_stream(num_batches: int, num_wanted: int) -> None:
    samples = kept([7] * num_batches, num_wanted)
    places = indices(samples)
    assert sum(map(samples.wants, range(num_batches))) <= len(places)  # no batch is copied in vain
    gaps = [after - before for before, after in pairwise([*places, num_batches + places[0]])]
    assert len(places) == math.ceil(num_wanted / 7) and max(gaps) < 3 * num_batches / len(places)
    for num_workers in (2, 3, 4):  # which take turns
        assert {place % num_workers for place in places} == {*range(num_workers)}


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40), max_bytes=st.integers(4, 200))
@settings(max_examples=30, deadline=None)
def test_batches_go_as_soon_as_they_take_too_many_bytes_but_the_last_one(sizes: list[int], max_bytes: int) -> None:
    samples = kept(sizes, math.inf, max_bytes)
    num_bytes = sum(batch.num_bytes for batch in samples.batches)
    assert num_bytes == 4 * samples.size and (num_bytes <= max_bytes or len(samples.batches) == 1)
    assert samples.is_truncated == (samples.size < sum(sizes))


def test_all_that_is_kept_of_a_batch_counts_as_bytes() -> None:
    x = torch.zeros(3, 2)
    batch = KeptBatch(0, 3, ModelCall(nn.Linear(2, 2), x), torch.zeros(3).long(), x.double())
    assert batch.num_bytes == 6 * 4 + 3 * 8 + 6 * 8 and KeptBatch(0, 3, CALL).num_bytes == 0


def test_after_its_end_it_wants_no_more_unless_nothing_has_come() -> None:
    samples = KeptSamples(20)
    samples.complete()
    assert samples.wants(0)
    samples.add(KeptBatch(0, 5, CALL))
    samples.add(KeptBatch(1, 0, CALL))
    samples.complete()
    assert not samples.wants(1) and samples.size == 5
    assert [batch.index for batch in samples.batches] == [0]


# Rows


def added(sizes: list[int], max_rows: int, max_bytes: float = math.inf) -> KeptRows:
    """Rows of batches of these sizes, each of two floats and a label of 8 bytes, which are its number."""
    rows, numbers = KeptRows(max_rows, max_bytes), torch.arange(sum(sizes))
    for labels in numbers.split(sizes):
        rows.add(labels[:, None].float().repeat(1, 2), labels)
    return rows


@given(sizes=SIZES, max_rows=st.integers(1, 90), max_bytes=st.integers(16, 4000))
@settings(max_examples=60, deadline=None)
def test_evenly_spaced_rows_are_kept_whatever_the_batches(sizes: list[int], max_rows: int, max_bytes: int) -> None:
    total, limit = sum(sizes), min(max_rows, max_bytes // 16)
    rows = added(sizes, max_rows, max_bytes)
    assert rows.num_seen == total and rows.size <= 1.25 * limit + 2 and rows.is_full == (total >= limit)
    features, labels = (torch.cat([torch.zeros(0), *parts]) for parts in rows.parts())
    assert abs(len(labels) - min(limit, total)) <= 2 and torch.equal(features.reshape(-1, 2)[:, 0], labels.float())
    share = limit / max(total, 1)
    assert labels.tolist() == [number for number in range(total) if number * (math.sqrt(5) - 1) / 2 % 1 < share]


def test_of_a_table_in_one_batch_a_copy_of_the_wanted_rows_is_all_that_is_made() -> None:
    table, made = torch.zeros(10_000, 50), list[int]()
    rows = KeptRows(2_000)
    with Watch(lambda function, args, kwargs, result: made.append(getattr(result, "nbytes", 0))):
        rows.add(table, torch.zeros(10_000))
        rows.parts()
    assert max(made) == pytest.approx(table.nbytes / 5, rel=1e-2) and sum(size > 2**18 for size in made) == 1


def test_rows_without_features_have_labels_alone_and_nothing_comes_after_the_end() -> None:
    rows = added([4, 3], 50)
    rows.add(None, torch.arange(2))
    assert not rows.has_features and rows.parts()[0] == [] and torch.cat(rows.parts()[1]).tolist()[-2:] == [0, 1]
    rows.complete()
    rows.add(None, torch.arange(5))
    assert rows.num_seen == rows.size == 9
    rows.clear()
    assert rows.size == 0 and rows.is_complete
    empty = KeptRows(5)
    empty.complete()
    assert not empty.is_complete and empty.parts() == ([], [])
