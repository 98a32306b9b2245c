import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_sensitivity.functional import bags_of_words, features, principal_components
from lightning_sensitivity.functional.features import different_samples


def low_rank(num_rows: int, num_columns: int, rank: int) -> Tensor:
    g = torch.Generator().manual_seed(0)
    factors = torch.randn(num_rows, rank, generator=g) * torch.arange(1, rank + 1) ** -0.5
    return 3 + factors @ torch.randn(rank, num_columns, generator=g)


def distances(features: Tensor) -> Tensor:
    return torch.cdist(features.double(), features.double(), compute_mode="donot_use_mm_for_euclid_dist")


def test_few_columns_get_standard_units_of_training_samples() -> None:
    x, new = 5 * torch.rand(2, 30, 2, 25, generator=torch.Generator().manual_seed(0)).double() + 2
    x[:, 0, :2] = torch.tensor([7.0, 0.1])  # constant: nothing to learn, whatever new samples have there
    a, b = principal_components(x, new)
    assert a.shape == b.shape == (30, 50) and not a[:, :2].any() and not b[:, :2].any()
    mean, std = x.flatten(1).mean(0), x.flatten(1).std(0, correction=0)
    torch.testing.assert_close(a[:, 2:], ((x.flatten(1) - mean) / std)[:, 2:])
    torch.testing.assert_close(b[:, 2:], ((new.flatten(1) - mean) / std)[:, 2:])


def test_of_many_columns_one_in_large_units_does_not_hide_the_others() -> None:
    x = low_rank(60, 51, 30).double()
    x[:, 3] *= 1000
    scaled = (x - x[:40].mean(0)) / x[:40].std(0, correction=0)
    found, expected = (torch.cat(principal_components(each[:40], each[40:])) for each in (x, scaled))
    torch.testing.assert_close(distances(found), distances(expected))


@pytest.mark.parametrize(("num_rows", "num_columns"), [(40, 200), (200, 64)])
def test_components_keep_all_distances_that_have_room_in_them(num_rows: int, num_columns: int) -> None:
    x = low_rank(num_rows, num_columns, 30)
    kept = torch.cat(principal_components(x[: num_rows // 2], x[num_rows // 2 :]))
    assert kept.shape == (num_rows, 50)
    torch.testing.assert_close(distances(kept), distances(x), rtol=1e-5, atol=1e-4)


def test_components_hold_as_much_variance_as_the_exact_ones() -> None:
    x = low_rank(300, 500, 200).double()
    kept = torch.cat(principal_components(x[:200], x[200:]))
    exact = torch.linalg.svdvals(x - x[:200].mean(0))[:50]
    assert float(kept.square().sum() / exact.square().sum()) == pytest.approx(1, abs=2e-3)


def test_many_columns_keep_their_distances_within_a_few_percent() -> None:
    x = low_rank(40, 3 * 64 * 64, 30).reshape(40, 3, 64, 64)
    state = torch.get_rng_state()
    first, second = (torch.cat(principal_components(x[:30], x[30:])) for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)
    pairs = ~torch.eye(40, dtype=torch.bool)
    ratio = distances(first)[pairs] / distances(x.flatten(1))[pairs]
    assert 0.9 < float(ratio.min()) <= float(ratio.max()) < 1.1
    for few in (1, 2):  # fewer samples than components
        assert principal_components(x[:few], x[:0])[0].isfinite().all()


IDS = st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=5)


@given(ids=IDS, new_ids=IDS, padding=st.integers(0, 9), max_words=st.integers(1, 10))
@settings(max_examples=40, deadline=None)
def test_bags_of_words_count_the_most_frequent_tokens(
    ids: list[list[int]], new_ids: list[list[int]], padding: int, max_words: int
) -> None:
    samples = [torch.tensor(ids), torch.tensor(new_ids)]
    total = Counter(word for row in [*ids, *new_ids] for word in row if word != padding)
    words = sorted(sorted(total, key=lambda word: (-total[word], word))[:max_words])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(features, "_MAX_WORDS", max_words)
        bags = bags_of_words(*(each.where(each != padding, -1) for each in samples))
    for rows, bag in zip((ids, new_ids), bags, strict=True):
        assert bag.tolist() == [[Counter(row)[word] for word in words] for row in rows]
    assert principal_components(*bags)[0].isfinite().all()


ROWS, EACH = torch.tensor([[0.1], [0.2], [0.1], [0.3]]), torch.eye(4)
DIFFERENT: dict[str, tuple[Tensor, Tensor, list[int]]] = {
    "no sample comes twice": (torch.rand(4, 2), EACH, [0, 1, 2, 3]),
    "one is drawn twice": (ROWS, EACH[[0, 1, 0, 2]], [0, 1, 3]),
    "equal features have several labels": (ROWS, EACH, [0, 1, 2, 3]),
    "a table has few values": (ROWS[[0, 1]].repeat(10, 1), EACH[[0, 1]].repeat(10, 1), [*range(20)]),
    "all features are constant": (torch.ones(6, 2), torch.ones(6, 1), [*range(6)]),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_which_samples_are_different_if(case: str) -> None:
    x, labels, expected = DIFFERENT[case]
    assert different_samples(x, labels).tolist() == expected


def test_bad_input_is_refused_by_name() -> None:
    x, ids = torch.rand(6, 3), torch.ones(2, 3).long()
    bad: list[tuple[str, Any]] = [
        ("`features` and `new_features`.*same columns", lambda: principal_components(x, x[:, :2])),
        ("`features` and `new_features`.*same columns", lambda: principal_components(x[:0], x)),
        ("`features` to be finite", lambda: principal_components(x * math.nan, x)),
        ("`new_features` to be finite", lambda: principal_components(x.repeat(1, 2000), (x / 0).repeat(1, 2000))),
        ("`ids` to be integers", lambda: bags_of_words(x, ids)),
        ("`new_ids` to be integers", lambda: bags_of_words(ids, x)),
    ]
    for message, refused in bad:
        with pytest.raises(ValueError, match=f"Expected .*{message}"):
            refused()
