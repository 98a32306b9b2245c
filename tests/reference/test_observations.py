"""Which samples are the same one, and which of many a reference knows."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import pad

from lightning_sensitivity import Reference
from lightning_sensitivity.reference import observations
from lightning_sensitivity.reference.observations import (
    has_few_values,
    largest_difference,
    max_samples,
    projection,
    repeated_share,
)
from tests.reference.conftest import INPUTS, generator


def noisy_table(seed: int = 0) -> tuple[Tensor, Tensor]:
    """300 different rows, of whose labels 39 % are wrong."""
    x = torch.randn(300, 5, generator=generator(seed))
    right = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    return x, right ^ (torch.rand(300, generator=generator(seed + 1)) < 0.39).long()


# Repeated samples

REPEATED = {
    "5 times": torch.arange(300).repeat(5),
    "drawn with replacement": torch.randint(300, (3000,), generator=generator(3)),
    "some often": torch.multinomial((torch.arange(300) % 10 + 0.1), 3000, replacement=True, generator=generator(3)),
}


@pytest.mark.parametrize("how", REPEATED)
@pytest.mark.parametrize("num_contradictions", [0, 30])
def test_samples_that_come_repeatedly_count_once(how: str, num_contradictions: int) -> None:
    x, y = noisy_table()
    rows = REPEATED[how]
    labels = y[rows]
    labels[:num_contradictions] = 1 - labels[:num_contradictions]
    once, found = Reference().fit(x, y), Reference().fit(x[rows], labels)
    assert found.num_samples_ == len(torch.unique(rows)) <= 300
    assert found.skill_ < 0.3 and found.skill_ == pytest.approx(once.skill_, abs=0.06)
    assert found.unexplained_ > 0.1


def test_samples_that_single_precision_can_not_tell_apart_are_different_in_double() -> None:
    x, y = noisy_table()
    far = x.double() + 1e8
    assert len(torch.unique(far.float(), dim=0)) < 100
    found = Reference().fit(far.repeat(2, 1), y.repeat(2))
    assert found.num_samples_ == 300 and found.score_ == pytest.approx(Reference().fit(x, y).score_, rel=0.05)


def test_labels_of_equal_samples_are_averaged() -> None:
    x, y = noisy_table()
    found = Reference().fit(torch.cat([x, x[:200]]), torch.cat([y, 1 - y[:200]]))
    counts = torch.unique(torch.tensor(found.labels_[:, 0]), return_counts=True)
    assert counts[0].tolist() == [0, 0.5, 1] and counts[1][1] == 200 and found.num_samples_ == 300


def test_equal_images_and_texts_with_other_labels_count_once() -> None:
    for kind in ("images", "signals", "tokens"):
        x = INPUTS[kind][:40]
        found = Reference().fit(torch.cat([x, x]), torch.cat([torch.arange(40) % 2, torch.arange(40) % 3 % 2]))
        assert found.num_samples_ == 40


KINDS = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_table_of_few_categories_keeps_its_frequencies(noise: float) -> None:
    """Different people have the same columns: four kinds of rows, of which each comes a hundred times."""
    which = torch.multinomial(torch.tensor([0.55, 0.15, 0.15, 0.15]), 400, replacement=True, generator=generator())
    labels = (KINDS[which, 0] != KINDS[which, 1]).long()
    labels = labels ^ (torch.rand(400, generator=generator(1)) < noise).long()
    found = Reference().fit(KINDS[which], labels)
    assert found.num_samples_ == 400 and found.accuracy_ == pytest.approx(1 - noise, abs=0.05)
    assert found.shares_[1] == pytest.approx(float(labels.double().mean()))


@pytest.mark.parametrize(("share", "is_kept"), [(0.02, False), (0.2, True)])
def test_many_categories_keep_their_frequencies_if_equal_rows_contradict_each_other(
    share: float, is_kept: bool
) -> None:
    """With 2 % of its labels turned, a row that comes repeatedly is a sampler's; with 20 %, there are many people."""
    codes = torch.randint(10, (200, 6), generator=generator()).float().repeat(4, 1)
    labels = (codes[:, 0] > 4).long()
    turned = torch.rand(800, generator=generator(1)) < share
    found = Reference().fit(codes, labels.where(~turned, 1 - labels))
    assert found.num_samples_ == (800 if is_kept else 200)


TABLES: dict[str, tuple[Any, bool]] = {
    "two columns of 10": (
        torch.arange(100).unflatten(0, (10, 10)).flatten()[:, None] // torch.tensor([1, 10]) % 10,
        True,
    ),
    "11 combinations for each row": (torch.stack([torch.arange(100) % 11, torch.arange(100)], 1), False),
    "more than 100 values": (torch.arange(101)[:, None], False),
    "constant columns": (torch.ones(9, 50), True),
}


@pytest.mark.parametrize("what", TABLES)
def test_categories_are_few_values_and_at_most_ten_combinations_for_each_row(what: str) -> None:
    table, is_few = TABLES[what]
    assert has_few_values({"columns": table.float()}) == is_few
    assert has_few_values({"columns": table[:9].float(), "images": torch.zeros(9, 1, 4, 4)}) is False


def test_the_first_column_that_decides_ends_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, unique = [], torch.unique
    monkeypatch.setattr(torch, "unique", lambda *args, **options: calls.append(1) or unique(*args, **options))
    assert not has_few_values({"columns": torch.randn(500, 2048)}) and len(calls) == 1


# Fingerprints


@given(seed=st.integers(0, 99), kind=st.sampled_from(sorted(INPUTS)), cut=st.integers(1, 299))
@settings(max_examples=20, deadline=None)
def test_equal_samples_have_equal_projections_in_batches_of_any_size_and_others_have_not(
    seed: int, kind: str, cut: int
) -> None:
    x = INPUTS[kind][torch.randperm(300, generator=generator(seed))]
    whole = projection({kind: x})
    assert torch.equal(torch.cat([projection({kind: part}) for part in x.split(cut)]), whole)
    assert len(torch.unique(whole)) == len(torch.unique(x, dim=0)) and whole.dtype == torch.float64
    if x.is_floating_point():
        assert torch.equal(projection({kind: x.double() * (1 + 1e-12)}), whole)  # single precision
    if kind == "tokens":
        assert torch.equal(projection({kind: pad(x, (0, 5), value=-1)}), whole)


def test_a_number_as_a_column_is_no_token() -> None:
    numbers, ids = torch.tensor([[3.0], [4.0]]), torch.tensor([[3], [2]])
    first, second = projection({"columns": numbers, "tokens": ids})
    assert first != second


def test_new_samples_are_repeated_ones_if_far_more_are_known_than_known_ones_recur() -> None:
    new = torch.tensor([1.0, 3, 8, 9])
    assert repeated_share(new, torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 7, 7])) == 0.5
    assert repeated_share(new, torch.tensor([1.0, 1, 2, 3, 3, 3, 4, 5, 6, 7])) == 0


CONSTANT, ONE_FLAG = torch.zeros(50_000, 1), (torch.arange(600)[:, None] == 0).float()
COLUMNS = {  # of new samples, and whether they differ from a constant one
    "a rare flag": (ONE_FLAG, False),
    "a heavy tail": (1e6 * ONE_FLAG, False),
    "another constant": (CONSTANT[:600] + 1, True),
}


@pytest.mark.parametrize("what", COLUMNS)
def test_a_column_differs_if_more_than_a_few_samples_do(what: str) -> None:
    new, is_different = COLUMNS[what]
    assert (largest_difference(CONSTANT, new)[1] > 8) == is_different


# Of many samples


def test_of_many_classes_or_samples_fewer_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    table, wide = {"columns": torch.zeros(1, 1250)}, {"columns": torch.zeros(1, 1251)}  # more than a forest takes
    assert max_samples(table, 2) == max_samples(table | {"tokens": torch.zeros(1, 9)}, 2) == 50_000
    assert max_samples({"images": torch.zeros(1, 1, 4, 4)}, 2) == max_samples(wide, 2) == 10_000
    assert max_samples(table, 5000) == 2000
    monkeypatch.setattr(observations, "_MAX_LABELS", 600)
    x, y = torch.rand(90, 2, generator=generator()), torch.arange(90) % 20
    assert Reference().fit(x, y).num_samples_ == 30 and Reference().fit(x, y % 2).num_samples_ == 90


def test_classes_become_a_matrix_of_chosen_samples_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, label_matrix = [], torch.nn.functional.one_hot
    monkeypatch.setattr(torch.nn.functional, "one_hot", lambda *args: sizes.append(label_matrix(*args)) or sizes[-1])
    monkeypatch.setattr(observations, "_MAX_LABELS", 6000)
    Reference().fit(torch.rand(400, 2), 1000 * (torch.arange(400) % 200))
    assert [tuple(each.shape) for each in sizes] == [(30, 200)]
