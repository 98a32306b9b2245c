"""Kept samples: whole batches, evenly spaced, as few as hold what is wanted, and within a number of bytes."""

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_sensitivity.reading import kept as kept_module
from lightning_sensitivity.reading.kept import NUM_BATCHES, KeptBatch, KeptObservations, KeptSamples
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.reference.observations import Observations
from lightning_sensitivity.running import ModelCall
from tests.helpers import Watch

CALL = ModelCall(nn.Identity(), torch.zeros(0))  # of no bytes
SIZES = st.lists(st.integers(0, 9), min_size=1, max_size=60)


def kept(sizes: list[int], num_wanted: float, max_bytes: float = math.inf, has_rows: bool = False) -> KeptSamples:
    """Samples of batches of these sizes, each of 4 bytes; of 8, if some rows of a batch can be kept."""
    samples = KeptSamples(num_wanted, max_bytes=max_bytes)
    for index, size in enumerate(sizes):
        if samples.wants(index):
            numbers = torch.arange(size, dtype=torch.float32)[:, None]
            call = ModelCall(nn.Identity(), numbers) if has_rows else CALL
            samples.add(KeptBatch(index, size, size, call, seen={"columns": numbers}))
    samples.complete()
    samples.complete()  # which changes nothing
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


def kept_rows(sizes: list[int], max_bytes: float = math.inf, num_wanted: int = 600) -> KeptSamples:
    return kept(sizes, num_wanted, max_bytes, has_rows=True)


@pytest.mark.parametrize(("sizes", "sizes_kept"), [
    ([20] * 40, [20] * 30),  # small batches are kept as a whole
    ([256] * 50, [30] * 20),
    ([256] * 9 + [16], [67] * 9 + [5]),
    ([500, 500, 20], [295, 295, 12]),
    ([100, 500], [100, 500]),
    ([700] * 2, [300] * 2),
    ([5000], [600]),
    ([20, 30], [20, 30]),
])  # fmt: skip
def test_of_twenty_batches_or_all_the_same_share_is_kept(sizes: list[int], sizes_kept: list[int]) -> None:
    samples = kept_rows(sizes)
    assert [batch.size for batch in samples.batches] == sizes_kept and samples.size == sum(sizes_kept)
    for batch in samples.batches:
        (rows,) = batch.call.inputs().values()
        assert isinstance(rows, torch.Tensor) and batch.seen is not None and torch.equal(rows, *batch.seen.values())
        assert batch.indices is None or torch.equal(rows[:, 0], batch.indices.float())
        assert len(rows) == batch.size and rows[:, 0].diff().max() <= 3 * sizes[batch.index] / batch.size


def test_of_batches_of_two_sizes_each_sample_is_kept_as_often() -> None:
    samples = kept_rows([500] * 10 + [50] * 100)
    shares = [batch.size / batch.whole_size for batch in samples.batches]
    assert {batch.whole_size for batch in samples.batches} == {50, 500} and max(shares) - min(shares) < 1 / 50


def test_where_memory_is_short_fewer_samples_of_as_many_batches_are_kept() -> None:
    samples, max_bytes = KeptSamples(600, max_bytes=4 * 300), 4 * 300 / NUM_BATCHES
    for index in filter(samples.wants, range(50)):
        samples.add(BatchReader().keep(nn.Identity(), torch.zeros(256, 1), index, 600, max_bytes))
    samples.complete()
    assert [batch.size for batch in samples.batches] == [15] * 20 and samples.is_truncated


def test_large_samples_alone_in_their_batches_take_nothing_from_later_ones() -> None:
    samples = KeptSamples(600, max_bytes=4 * 64 * 25)
    for index, (size, width) in enumerate([(1, 64)] * 40 + [(64, 1)] * 60):
        if samples.wants(index):
            samples.add(KeptBatch(index, size, size, ModelCall(nn.Identity(), torch.zeros(size, width))))
    assert samples.size > 200


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40), max_bytes=st.integers(4, 200))
@settings(max_examples=30, deadline=None)
def test_batches_go_as_soon_as_they_take_too_many_bytes_but_the_last_one(sizes: list[int], max_bytes: int) -> None:
    samples = kept(sizes, math.inf, max_bytes)
    num_bytes = sum(batch.num_bytes for batch in samples.batches)
    assert num_bytes == 4 * samples.size and (num_bytes <= max_bytes or len(samples.batches) == 1)
    assert samples.is_truncated == (samples.size < sum(sizes))


def test_memory_was_not_short_where_all_wanted_samples_are_kept() -> None:
    samples = kept([2] * 6, 4, max_bytes=4 * 5)
    assert samples.size == 4 and not samples.is_truncated
    samples = kept_rows([50] * 30, max_bytes=2 * 4 * 610)  # short on the way
    assert samples.size == 600 and not samples.is_truncated


def test_memory_was_short_where_it_left_fewer_than_are_wanted() -> None:
    sizes = [20 + 130 * (3 * index % 5) // 4 for index in range(60)]
    samples = kept_rows(sizes, max_bytes=2 * 4 * 620)  # for all wanted, but for more on the way
    assert samples.size < 600 and samples.is_truncated


def test_after_its_end_it_wants_no_more_unless_nothing_has_come() -> None:
    samples = KeptSamples(20)
    samples.complete()
    assert samples.wants(0)
    samples.add(KeptBatch(0, 5, 5, CALL))
    samples.add(KeptBatch(1, 0, 0, CALL))
    samples.complete()
    assert not samples.wants(1) and samples.size == 5
    assert [batch.index for batch in samples.batches] == [0]


# Training samples


@contextmanager
def limits(max_samples: int, max_bytes: float = 2**40) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept_module, "max_samples", lambda kinds, num_columns: max_samples)
        patch.setattr(kept_module, "MAX_BYTES", max_bytes)
        yield


def add(kept: KeptObservations, numbers: torch.Tensor) -> None:
    """Add those samples of a batch that are wanted, each of two floats and a label of 8 bytes, which are its number."""

    chosen, priorities = kept.choose(len(numbers))
    if len(chosen) > 0:
        wanted = numbers[chosen]
        kept.add(Observations({"columns": wanted[:, None].float().repeat(1, 2)}, wanted), priorities)


@given(sizes=SIZES, most=st.integers(1, 90), max_bytes=st.integers(20, 4000))
@settings(max_examples=60, deadline=None)
def test_evenly_spaced_samples_are_kept_whatever_the_batches(sizes: list[int], most: int, max_bytes: int) -> None:
    total, limit = sum(sizes), min(most, int(max_bytes / 1.25 / 16))
    with limits(most, max_bytes):
        kept = KeptObservations(2)
        for numbers in torch.arange(total).split(sizes):
            add(kept, numbers)
            assert 16 * kept.size <= max_bytes + 2 * 16 and kept.size <= 1.25 * limit + 2
    assert kept.num_seen == total and kept.is_full == (total >= limit and total > 0)
    if total == 0:
        return
    joined = kept.joined()
    assert abs(len(joined) - min(limit, total)) <= 2
    assert torch.equal(joined.seen["columns"][:, 0], joined.labels.float())
    assert joined.labels.tolist() == [
        number for number in range(total) if number * (math.sqrt(5) - 1) / 2 % 1 < limit / total
    ]


@pytest.mark.parametrize(("most", "max_bytes"), [(60, 2**40), (2000, 16 * 1.25 * 60)])
def test_processes_share_what_a_reference_knows_and_the_memory(most: int, max_bytes: float) -> None:
    with limits(most, max_bytes):
        kept = KeptObservations(2, num_processes=3)
        before = kept.num_to_read
        add(kept, torch.arange(200))
        assert before - kept.num_to_read in (19, 20, 21, 200)
        assert len(kept.joined()) in (19, 20, 21)


def test_of_a_table_in_one_batch_a_copy_of_the_wanted_samples_is_all_that_is_made() -> None:
    table, made = torch.zeros(10_000, 50), list[int]()
    with limits(2_000), Watch(lambda function, args, kwargs, result: made.append(getattr(result, "nbytes", 0))):
        kept = KeptObservations(2)
        rows, priorities = kept.choose(10_000)
        kept.add(Observations({"columns": table[rows]}, torch.zeros(len(rows))), priorities)
        kept.joined()
    assert max(made) == pytest.approx(table.nbytes / 5, rel=1e-2) and sum(size > 2**18 for size in made) <= 2


def test_what_is_joined_is_not_copied_again() -> None:
    kept = KeptObservations(2)
    for numbers in torch.arange(40).split(10):
        add(kept, numbers)
    joined = kept.joined()
    assert len(joined) == 40 and kept.joined() is Observations.join([joined]) is joined


def test_keeping_is_linear_in_batches() -> None:
    counts = Counter[int]()
    for num_batches in (500, 1000, 2000):
        with limits(200), Watch(lambda *_, key=num_batches: counts.update([key])):
            kept = KeptObservations(2)
            for numbers in torch.arange(2 * num_batches).split(2):
                add(kept, numbers)
    assert counts[2000] < 2 * counts[1000] < 4 * counts[500] and counts[2000] < 25 * 2000


def test_samples_are_joined_only_if_all_were_seen() -> None:
    kept = KeptObservations(2)
    with pytest.raises(ValueError, match="No sample has a label"):
        kept.joined()
    indices, priorities = kept.choose(3)
    kept.add(Observations({}, indices), priorities)
    with pytest.raises(ValueError, match="neither dense numbers nor token ids"):
        kept.joined()
