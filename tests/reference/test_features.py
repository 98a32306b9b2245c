"""What becomes of inputs, by their kind."""

import math
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_sensitivity.reference import blocks as features
from lightning_sensitivity.reference.kinds import KINDS as ALL
from lightning_sensitivity.reference.kinds import kind_of, possible_blocks
from lightning_sensitivity.reference.learners import Features


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def distances(rows: Tensor) -> Tensor:
    return torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist")


def shrunk(x: Tensor) -> Tensor:
    return ALL[kind_of(x)].shrunk(x)


def rows_of(block: str, known: Tensor, new: Tensor, kind: str | None = None) -> Any:
    """What a block of features that has seen some samples makes of new ones."""
    kind = kind or kind_of(known)
    return Features({kind: getattr(features, block)}, {kind: known})({kind: new})


KINDS: dict[str, tuple[Tensor, str, set[str]]] = {
    "a table": (random(9, 5), "columns", {"columns", "values"}),
    "token ids": (torch.ones(9, 5).long(), "tokens", {"words", "columns"}),
    "signals": (random(9, 2, 50), "signals", {"patches", "values"}),
    "short signals": (random(9, 2, 1), "signals", {"patches", "values"}),
    "images": (random(9, 3, 16, 16), "images", {"patches", "values"}),
    "images of bytes": ((255 * random(9, 1, 16, 16)).byte(), "images", {"patches", "values"}),
    "images of many channels": (random(9, 200, 16, 16), "images", {"patches", "values"}),
    "tiny images": (random(9, 3, 1, 2), "images", {"patches", "values"}),
}


@pytest.mark.parametrize("what", KINDS)
def test_each_kind_of_samples_has_features_of_finite_numbers(what: str) -> None:
    inputs, kind, names = KINDS[what]
    state = torch.get_rng_state()
    assert kind_of(inputs) == kind and {each[kind].__name__ for each in possible_blocks({kind: inputs})} == names
    for name in names:
        rows = rows_of(name, inputs, inputs)
        rows = rows if isinstance(rows, np.ndarray) else rows.toarray()
        assert rows.ndim == 2 and len(rows) == 9 and rows.dtype == np.float64 and np.isfinite(rows).all()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("others", ["tokens", "images"])
def test_several_kinds_are_seen_side_by_side_and_none_drowns_the_other(others: str) -> None:
    ids = torch.randint(40, (60, 8), generator=torch.Generator().manual_seed(0))
    seen = {"columns": 1e6 * random(60, 300), others: ids if others == "tokens" else random(60, 3, 12, 12)}
    (blocks,) = possible_blocks(seen)
    made = Features(blocks, seen)
    assert made.name == f"columns and {'words' if others == 'tokens' else 'patches'}"
    rows = made(seen)
    rows = rows if isinstance(rows, np.ndarray) else rows.toarray()
    for part in (rows[:, :300], rows[:, 300:]):
        assert np.median(distances(torch.tensor(part))[np.triu_indices(60, 1)]) == pytest.approx(1, abs=0.05)


def test_large_images_and_signals_are_averaged_and_all_else_stays_as_it_is() -> None:
    images = (255 * random(60, 3, 64, 128)).byte()
    assert shrunk(images).shape == (60, 3, 16, 32)
    torch.testing.assert_close(shrunk(images), torch.nn.functional.avg_pool2d(images.float(), 4))
    torch.testing.assert_close(shrunk(random(5, 2, 1024)), random(5, 2, 512, 2).mean(3))
    for small in (images[..., :32, :32], random(5, 2, 512), random(5, 9999), images[:0]):
        assert shrunk(small) is small


def test_columns_get_standard_units_of_training_samples_and_values_keep_theirs() -> None:
    x, new = (5 * random(30, 2, 25, seed=seed).double() + 2 for seed in (0, 1))
    x[:, 0, :2] = torch.tensor([7.0, 0.1])  # constant: nothing to learn, whatever new samples have there
    expected = (new.flatten(1) - x.flatten(1).mean(0)) / x.flatten(1).std(0, correction=0)
    found = rows_of("columns", x, new)
    np.testing.assert_allclose(found[:, 2:], expected[:, 2:])
    assert not found[:, :2].any()
    torch.testing.assert_close(distances(torch.tensor(rows_of("values", x, new))), distances(new.flatten(1)))


def test_of_very_many_columns_evenly_spaced_ones_are_seen() -> None:
    x = torch.arange(3.0)[:, None] * torch.arange(10_000)
    found = rows_of("values", x, x)
    assert found.shape == (3, 4096) and {*np.diff(found[2] - found[1])} == {2, 3}


@pytest.mark.parametrize("shape", [(3, 24, 20), (2, 60)])
def test_patches_do_not_see_units_of_channels_nor_the_order_of_new_samples(shape: tuple[int, ...]) -> None:
    x, new = random(40, *shape), random(130, *shape, seed=1)
    units = 10.0 ** torch.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
    expected = rows_of("patches", x, new)
    np.testing.assert_allclose(rows_of("patches", units * x + 5, units * new + 5), expected, rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(rows_of("patches", x, new.flip(0))[::-1], expected, rtol=1e-4, atol=1e-4)


def test_patches_that_are_rare_count_less(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random(40, 1, 12, 12)
    found = rows_of("patches", x, x)
    monkeypatch.setattr(features, "_RARE", 1e9)  # all are divided by the same number
    raw = torch.tensor(rows_of("patches", x, x))
    scale = raw.std(0, correction=0) + 0.1 * raw.std(correction=0)
    np.testing.assert_allclose(found, raw / scale, rtol=5e-3, atol=5e-3)  # but for the means of all


def test_patches_of_constant_channels_or_images_are_finite() -> None:
    x = random(20, 3, 12, 12)
    x[:, 0], x[0] = 0.3, 0.3
    assert np.isfinite(rows_of("patches", x, x)).all() and not rows_of("patches", x[:1], x[:1]).any()


def weighed(text: list[int], known: list[list[int]]) -> dict[Any, float]:
    """Words of a text, and pairs of neighbours by half, by tf-idf, with a length of 1."""
    documents = [Counter([*text, *pairwise(text)]) for text in known]
    of_texts = Counter(each for document in documents for each in document)
    rarest = 1 if len(known) < 50 else 2
    found = {}
    for word, count in Counter([*text, *pairwise(text)]).items():
        if of_texts[word] >= rarest:
            rarity = 1 + math.log((1 + len(known)) / (1 + of_texts[word]))
            found[word] = (0.5 if isinstance(word, tuple) else 1) * (1 + math.log(count)) * rarity
    length = math.sqrt(sum(each**2 for each in found.values()))
    return {word: each / length for word, each in found.items()}


@pytest.mark.parametrize("num_texts", [20, 60])
def test_words_and_pairs_are_weighed_by_how_few_texts_have_them(num_texts: int) -> None:
    lengths = torch.arange(num_texts) % 5 + 2
    ids = torch.randint(25, (num_texts, 6), generator=torch.Generator().manual_seed(0))
    ids = ids.where(torch.arange(6) < lengths[:, None], -1)
    texts = [[each for each in text if each >= 0] for text in ids.tolist()]
    new = torch.tensor([[3, 3, 4, 99, 3, 4, 7], [4, 3, -1, -1, -1, -1, -1], [5, 3, 4, 3, 4, 3, -1]])
    rows = rows_of("words", ids, new)
    expected = [weighed([each for each in text if each >= 0], texts) for text in new.tolist()]
    products = [[sum(a[word] * b.get(word, 0) for word in a) for b in expected] for a in expected]
    np.testing.assert_allclose((rows @ rows.T).toarray(), products, atol=1e-6)
    assert not rows_of("words", ids, torch.tensor([[-1, -1], [99, -1]])).toarray().any()


def test_the_most_frequent_words_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_MAX_WORDS", 2)
    ids = torch.tensor([[1, 2, 3], [3, 2, 4], [5, 3, 6], [7, 2, 3]])
    rows = rows_of("words", ids, torch.arange(1, 8)[None])
    assert np.count_nonzero(rows.toarray()) == 2


HUGE = {"one of 1e8": (1e8, 1), "a thirtieth of -1e20": (-1e20, 7), "a fifth of 1e9": (1e9, 40)}


@pytest.mark.parametrize("what", HUGE)
def test_numbers_beside_a_few_huge_ones_stay_different_in_single_precision(what: str) -> None:
    value, number = HUGE[what]
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    known = x.index_fill(0, torch.arange(number), value)
    rows = rows_of("columns", known, known).astype(np.float32)
    assert all(len(np.unique(column)) == 201 - number for column in rows.T)
    np.testing.assert_array_equal(np.argsort(rows[number:, 0]), x[number:, 0].argsort().numpy())


def test_numbers_of_a_long_tail_are_standardized_as_they_are() -> None:
    x = (3 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).exp()
    np.testing.assert_array_equal(rows_of("columns", x, x), ((x - x.mean(0)) / x.std(0, correction=0)).numpy())
