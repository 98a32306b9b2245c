"""A reader of batches needs no Trainer, and what it keeps is what a reference needs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, pad

from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.model import ModelCall
from lightning_sensitivity.model.reader import BatchReader, join_features, join_kept
from lightning_sensitivity.model.samples import KeptBatch, KeptSamples
from tests.helpers import labelled

MODEL = nn.Linear(12, 4)
X, Y = labelled(60).tensors
READ = {"inputs": lambda batch: batch["image"].mul_(2), "targets": lambda batch: batch["class"]}


def test_functions_say_where_everything_is_and_get_copies() -> None:
    reader, batch = BatchReader(**READ, features=lambda batch: batch["image"].mul_(3)[:, :2]), {"image": X, "class": Y}
    kept = reader.keep(MODEL, batch, 5, with_features=True)
    assert (kept.index, kept.size) == (5, 60) and kept.labels is None
    assert torch.equal(kept.call(), MODEL(2 * X)) and torch.equal(kept.features, 3 * X[:, :2])
    labels = reader.labels(MODEL, batch)
    assert torch.equal(labels, Y) and labels.data_ptr() != Y.data_ptr() and reader.may_have_labels(MODEL, X)
    assert torch.equal(batch["image"], X)


def test_without_functions_it_takes_what_is_usual() -> None:
    reader = BatchReader()
    kept = reader.keep(MODEL, (X, Y), 0)
    assert torch.equal(kept.call(), MODEL(X)) and kept.features is None and torch.equal(reader.labels(MODEL, (X, Y)), Y)
    assert torch.equal(reader.keep(MODEL, (X, Y), 0, with_features=True).features, X)
    assert reader.may_have_labels(MODEL, (X, Y)) and not reader.may_have_labels(MODEL, X)


def test_functions_may_draw_random_numbers_and_change_the_model_without_a_trace() -> None:
    model, state = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 4)), torch.get_rng_state()

    def select(batch: Any) -> Tensor:
        return model.train()(batch[0]) + torch.rand(1)

    reader = BatchReader(inputs=lambda batch: batch[0] + torch.rand(1), targets=select, features=select)
    call = reader.call(model, (X, Y))
    reader.labels(model, (X, Y)), reader.features(model, (X, Y), call, 60)
    assert torch.equal(torch.get_rng_state(), state) and model[0].num_batches_tracked == 0


def test_samples_of_a_list_are_counted_by_outputs() -> None:
    model = type("Lists", (nn.Module,), {"forward": lambda self, x: torch.stack(x)})()
    assert BatchReader().keep(model, [list(X[:7])], 0).size == 7


def of_user(result: Any) -> Any:
    reader = BatchReader(features=lambda batch: result)
    return reader.features(MODEL, X, reader.call(MODEL, X), 60)


@pytest.mark.parametrize(("read", "match"), [
    (lambda reader: reader.labels(MODEL, (X, Y + 1), (4,)), r"Expected labels from 0 to 3.*\. \(More: docs/"),
    (lambda reader: reader.labels(MODEL, (X, Y[:, None]), (4,)), r"Remove the extra dimension"),
    (lambda reader: reader.labels(MODEL, X), "`targets` should return the labels"),
    (lambda reader: of_user(X[:5]), r"`features` should be a function .*\(60, D\), got .*\(5, 12\)"),
    (lambda reader: of_user(X[:, 0]), r"`features` should be .*\(60,\)"),
    (lambda reader: of_user([X]), "`features` should be .*list of 1"),
    (lambda reader: BatchReader(features=lambda batch: 1 / 0).keep(MODEL, X, 0, True), "`features` failed on a tensor"),
    (lambda reader: BatchReader(inputs=3), "`inputs` should be a function"),
])  # fmt: skip
def test_what_is_not_clear_or_does_not_fit_is_refused(read: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        read(BatchReader(task=TASKS["multiclass"]))


# What a reference sees

IDS, IMAGES = torch.arange(12).reshape(3, 4), torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
ROWS, OTHER = X[:3], X[3:6, :5]
ANY = type("Any", (nn.Module,), {"forward": lambda self, **kwargs: kwargs})()
SEEN: dict[str, tuple[dict[str, Any], Tensor | None]] = {
    "columns of a table": ({"x": ROWS}, ROWS),
    "one column": ({"x": ROWS[:, 0]}, ROWS[:, :1]),
    "columns in 64 and 16 bits": ({"x": ROWS.double(), "z": OTHER.half()}, torch.cat([ROWS, OTHER.half().float()], 1)),
    "images": ({"x": IMAGES}, IMAGES),
    "images in 8 bits": ({"x": (9 * IMAGES).byte()}, (9 * IMAGES).byte().float()),
    "signals": ({"x": IMAGES[:, :, 0]}, IMAGES[:, :, 0]),
    "an image and columns beside it": ({"x": IMAGES, "z": OTHER}, torch.cat([IMAGES.flatten(1), OTHER], 1)),
    "categories beside columns": ({"x": ROWS, "z": IDS.byte()}, torch.cat([ROWS, IDS.float()], 1)),
    "columns, and not large integers beside them": ({"x": ROWS, "z": 100 * IDS}, ROWS),
    "columns, and not a mask of them": ({"x": ROWS, "mask": ROWS > 0.5}, ROWS),
    "token ids": ({"input_ids": IDS}, IDS),
    "token ids with padding": ({"input_ids": IDS, "attention_mask": MASK}, IDS.where(MASK > 0, -1)),
    "token ids in 8 bits": ({"input_ids": IDS.byte(), "attention_mask": MASK}, IDS.where(MASK > 0, -1)),
    "token ids beside what is none": ({"token_type_ids": IDS * 0, "position_ids": IDS, "input_ids": IDS}, IDS),
    "embeddings, without their mask": ({"inputs_embeds": IMAGES[:, 0], "attention_mask": MASK}, IMAGES[:, 0]),
    "inputs, and not the labels": ({"x": ROWS, "labels": OTHER, "y": OTHER}, ROWS),
    "inputs in a part": ({"x": {"deep": [ROWS]}}, ROWS),
    "numbers of other rows": ({"x": ROWS[:2], "length": IDS[:, 0]}, None),
    "complex numbers": ({"x": ROWS.to(torch.complex64), "z": IMAGES.to(torch.complex64)}, None),
    "no tensor": ({"x": "name"}, None),
}


@pytest.mark.parametrize("what", SEEN)
def test_a_reference_sees(what: str) -> None:
    batch, expected = SEEN[what]
    seen = BatchReader().features(ANY, batch, ModelCall(ANY, batch), 3)
    assert seen is expected is None or (torch.equal(seen, expected) and seen.dtype == expected.dtype)


def test_large_images_are_kept_small_but_not_the_features_of_the_user() -> None:
    large = torch.rand(3, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    flat = type("Flat", (nn.Module,), {"forward": lambda self, x: x.flatten(1)[:, :4]})()
    assert BatchReader().keep(flat, large, 0, with_features=True).features.shape == (3, 1, 32, 32)
    assert BatchReader(features=lambda batch: batch).keep(flat, large, 0, True).features.shape == (3, 64 * 64)


def test_a_graph_is_seen_by_features_alone() -> None:
    graph, model = SimpleNamespace(x=X, y=Y), type("Net", (nn.Module,), {"forward": lambda self, data: data.x[:, :4]})()
    assert BatchReader().keep(model, graph, 0, with_features=True).features is None
    kept = BatchReader(features=lambda batch: batch.x).keep(model, graph, 0, with_features=True)
    assert kept.size == 60 and torch.equal(kept.features, X)


def test_the_first_batch_decides_for_all_whether_integers_are_categories() -> None:
    for factors, width in (((1, 1000), 16), ((1000, 1), 12)):
        reader, batches = BatchReader(), [{"x": ROWS, "z": factor * IDS} for factor in factors]
        assert [reader.features(ANY, b, ModelCall(ANY, b), 3).shape[1] for b in batches] == [width, width]


def test_of_a_large_batch_some_rows_are_kept_with_their_features() -> None:
    expected = X[torch.arange(7) * 60 // 7]
    for reader in (BatchReader(), BatchReader(features=lambda batch: batch[0])):
        kept = reader.keep(MODEL, (X, Y), 0, with_features=True, max_samples=7)
        assert kept.size == 7 and torch.equal(kept.features, expected) and torch.equal(kept.call(), MODEL(expected))
        assert torch.equal(X[kept.rows], expected) and reader.keep(MODEL, (X, Y), 0, max_samples=60).rows is None


LARGE, IMAGE = torch.rand(2, 2, 8, 6), torch.rand(3, 2, 4, 3)
JOINED: dict[str, tuple[list[Tensor], Tensor]] = {
    "rows": ([X[:7], X[7:]], X),
    "token ids": ([IDS, IDS[:2, :3]], torch.cat([IDS, pad(IDS[:2, :3], (0, 1), value=-1)])),
    "signals": ([LARGE[0], LARGE[1, :, :, :4]], torch.cat([LARGE[0], pad(LARGE[1, :, :, :4], (0, 2))])),
    "images": ([IMAGE, LARGE], torch.cat([IMAGE, avg_pool2d(LARGE, 2)])),
}


@pytest.mark.parametrize("what", JOINED)
def test_batches_of_several_sizes_are_joined(what: str) -> None:
    parts, expected = JOINED[what]
    torch.testing.assert_close(join_features(parts), expected)


@pytest.mark.parametrize("parts", [(X, X[:, :3]), (LARGE, LARGE[:, :1]), (X, LARGE), (X, IDS)])
def test_batches_that_can_not_be_joined_are_refused(parts: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match="different sizes"):
        join_features(parts)


def test_samples_of_which_some_are_not_seen_have_no_reference() -> None:
    samples = KeptSamples(100)
    for index, x in enumerate(X.split(20)):
        samples.add(KeptBatch(index, 20, ModelCall(MODEL, x), features=x))
    assert torch.equal(join_kept(samples), X)
    samples.batches[1].features = None
    with pytest.raises(ValueError, match="neither dense numbers nor token ids, with a row for each sample"):
        join_kept(samples)
