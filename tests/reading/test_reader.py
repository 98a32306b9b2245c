"""A reader of batches needs no Trainer, and what it keeps is what a reference needs."""

from collections import namedtuple
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import evenly_spaced
from lightning_sensitivity.reading.kept import KeptSamples
from lightning_sensitivity.reading.reader import BatchReader
from lightning_sensitivity.reference.kinds import KINDS
from tests.helpers import labelled, labels, module, see

MODEL = nn.Linear(12, 4)
X, Y = labelled(60).tensors
Named = namedtuple("Named", ["x", "Y"])
READ = {"inputs": lambda batch: batch["image"].mul_(2), "targets": lambda batch: batch["class"]}


def test_functions_say_where_everything_is_and_get_copies() -> None:
    reader, batch = BatchReader(**READ, features=lambda batch: batch["image"].mul_(3)[:, :2]), {"image": X, "class": Y}
    kept = reader.keep(MODEL, batch, 5)
    assert (kept.index, kept.size) == (5, 60) and kept.labels is None
    assert torch.equal(kept.call(), MODEL(2 * X)) and torch.equal(kept.seen["columns"], 3 * X[:, :2])
    found = labels(reader, MODEL, batch)
    assert torch.equal(found, Y) and found.data_ptr() != Y.data_ptr()
    assert torch.equal(reader.kept_labels(batch, kept), Y)
    assert torch.equal(batch["image"], X)


def test_without_functions_it_takes_what_is_usual() -> None:
    reader = BatchReader()
    kept = reader.keep(MODEL, (X, Y), 0)
    assert torch.equal(kept.call(), MODEL(X)) and torch.equal(labels(reader, MODEL, (X, Y)), Y)
    assert kept.seen is None and torch.equal(see(reader, MODEL, (X, Y))["columns"], X)
    assert torch.equal(reader.kept_labels((X, Y), kept), Y)
    assert reader.kept_labels(X, reader.keep(MODEL, X, 0)) is None


SHOWN: dict[str, tuple[Any, Tensor]] = {
    "an entry": (lambda batch: batch["x"][:, :3], X[:, :3]),
    "several": (lambda batch: (batch["x"], batch["x"]), torch.cat([X, X], 1)),
    "several by name": (lambda batch: {"a": batch["x"], "b": batch["x"]}, torch.cat([X, X], 1)),
}


@pytest.mark.parametrize("what", SHOWN)
def test_beside_a_function_in_place_of_forward_inputs_say_what_a_reference_sees(what: str) -> None:
    inputs, expected = SHOWN[what]
    batch = {"x": X, "label": Y, "names": ["a"]}
    reader = BatchReader(inputs=inputs, call=lambda model, batch: model(batch["x"]))
    kept = reader.keep(MODEL, batch, 0)
    assert torch.equal(kept.call(), MODEL(X)) and torch.equal(see(reader, MODEL, batch)["columns"], expected)
    samples = KeptSamples(60)
    samples.add(kept)
    assert torch.equal(reader.join(samples.batches).seen["columns"], expected)


def test_functions_may_draw_random_numbers_and_change_the_model_without_a_trace() -> None:
    model, state = nn.Sequential(nn.BatchNorm1d(12), nn.Linear(12, 4)), torch.get_rng_state()

    def select(batch: Any) -> Tensor:
        return model.train()(batch[0]) + torch.rand(1)

    reader = BatchReader(inputs=lambda batch: batch[0] + torch.rand(1), targets=select, features=select)
    labels(reader, model, (X, Y)), see(reader, model, (X, Y))
    assert torch.equal(torch.get_rng_state(), state) and model[0].num_batches_tracked == 0


def of_user(result: Any) -> Any:
    return see(BatchReader(features=lambda batch: result), MODEL, X)


@pytest.mark.parametrize(("read", "match"), [
    (lambda reader: labels(reader, MODEL, (X, Y + 1), (4,)),
        r"`targets` should fit the outputs: Expected labels from 0 to 3.*\. \(More: docs/"),
    (lambda reader: labels(reader, MODEL, (X, Y.where(Y > 0, 255).byte()), (4,)), "-100 to be ignored, but got"),
    (lambda reader: BatchReader(call=3), "`call` should be a function"),
    (lambda reader: BatchReader(call=lambda model, batch: X), "`call=` needs `inputs=`.*; or `features=`"),
    (lambda reader: BatchReader(call=lambda model, batch: X, features=MODEL), "`call=` needs `inputs=`.* an encoder"),
    (lambda reader: labels(reader, MODEL, X), "`targets` should return the labels"),
    (lambda reader: of_user(X[:5]), r"`features` should be a module, or a function .*\(60, D\), got .*\(5, 12\)"),
    (lambda reader: of_user(X[:, 0]), r"`features` should be .*\(60,\)"),
    (lambda reader: of_user([X]), "`features` should be .*list of 1"),
    (lambda reader: BatchReader(features=lambda batch: 1 / 0).keep(MODEL, X, 0), "`features` failed on a tensor"),
    (lambda reader: BatchReader(inputs=3), "`inputs` should be a function"),
    (lambda reader: BatchReader(features=[]), "`features` should be a module, a function, such as"),
])  # fmt: skip
def test_what_is_not_clear_or_does_not_fit_is_refused(read: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        read(BatchReader(task=TASKS["multiclass"]))


# What a reference sees


def test_a_graph_is_seen_by_features_alone() -> None:
    graph, model = SimpleNamespace(x=X, y=Y), module(lambda self, data: data.x[:, :4])
    reader = BatchReader()
    assert see(reader, model, graph) == {} and reader.unread == ["data"]
    reader.reset()
    assert reader.unread == []
    kept = BatchReader(features=lambda batch: batch.x).keep(model, graph, 0)
    assert kept.size == 60 and torch.equal(kept.seen["columns"], X)


def test_of_a_whole_batch_labels_are_not_seen() -> None:
    reader, model = BatchReader(inputs=lambda batch: (batch,)), nn.ModuleDict()
    assert torch.equal(see(reader, model, {"image": X, "label": Y})["columns"], X)


def test_inputs_by_position_are_seen_whatever_their_names() -> None:
    both = module(lambda self, x, y: x + y)
    assert torch.equal(see(BatchReader(), both, (X, X + 1, Y))["columns"], torch.cat([X, X + 1], 1))


def test_a_batch_with_other_inputs_than_the_first_is_read_by_itself() -> None:
    reader, model = BatchReader(), module(lambda self, **inputs: inputs["x"])
    assert torch.equal(see(reader, model, {"x": X, "more": X[:5]})["columns"], X)
    assert torch.equal(see(reader, model, {"x": X, "other": X})["columns"], torch.cat([X, X], 1))


def net_of(forward: Any, **makers: Any) -> Any:
    """A network, and how to make its batch of N samples, of texts that have so many tokens."""
    make = lambda size, length: {name: make(size, length) for name, make in makers.items()}  # noqa: E731
    return module(forward), make


def integers(size: int, length: int) -> Tensor:
    return torch.ones(size, length, dtype=torch.int64)


TEXT = {"input_ids": integers, "attention_mask": integers}
# A network with a batch of 10 samples, whose texts have 16 tokens; what is seen of it, and how many of it are kept.
BY_CHANCE: dict[str, tuple[Any, dict[str, int], int]] = {
    "as many shared numbers as samples": (
        net_of(lambda self, x, prior: x, x=torch.rand, prior=lambda size, length: torch.rand(10)),
        {"columns": 16}, 10),
    "as many numbers as tokens": (
        net_of(lambda self, input_ids, attention_mask, token_type_ids, x: x, **TEXT, token_type_ids=integers,
                 x=lambda size, length: torch.rand(size, 16)),
        {"tokens": 16, "columns": 16}, 5),
}  # fmt: skip


@pytest.mark.parametrize("what", BY_CHANCE)
def test_sizes_that_are_equal_by_chance_change_nothing(what: str) -> None:
    (model, make), expected, num_kept = BY_CHANCE[what]
    reader = BatchReader()
    see(reader, model, make(50, 12))
    unread = [*reader.unread]
    assert {kind: x.shape[1] for kind, x in see(reader, model, make(10, 16)).items()} == expected
    assert reader.unread == unread and reader.keep(model, make(10, 16), 0, max_samples=5).size == num_kept


def kept_of(reader: BatchReader, batches: Any, num_wanted: int = 100) -> KeptSamples:
    samples = KeptSamples(num_wanted)
    for index, batch in enumerate(batches):
        samples.add(reader.keep(MODEL, batch, index, max_samples=num_wanted))
    return samples


def test_of_a_large_batch_some_rows_are_kept_with_their_features() -> None:
    expected = X[evenly_spaced(torch.arange(60), 7)]
    for reader in (BatchReader(), BatchReader(features=lambda batch: batch[0])):
        samples = kept_of(reader, [(X, Y)], 7)
        kept = samples.batches[0]
        assert torch.equal(reader.join(samples.batches).seen["columns"], expected) and kept.size == 7
        assert torch.equal(kept.call(), MODEL(expected)) and torch.equal(X[kept.indices], expected)
        assert reader.keep(MODEL, (X, Y), 0, max_samples=60).indices is None


# Training samples


def test_training_samples_with_labels_are_kept_also_where_only_some_batches_are_mixed() -> None:
    reader, labels = BatchReader(task=TASKS["multiclass"]), Y.where(torch.arange(60) % 3 > 0, -100)
    kept, mixed = reader.make_kept(4), one_hot(Y, 4).float().where(labels[:, None] >= 0, -100)
    for x, y, soft in zip(X.split(15), labels.split(15), mixed.split(15), strict=True):
        reader.keep_observations(kept, MODEL, (x, soft if kept.size else y), (4,))
    joined = kept.joined()
    assert torch.equal(joined.seen["columns"], X[labels >= 0])
    assert torch.equal(joined.labels, one_hot(Y, 4).float()[labels >= 0])
    assert kept.num_seen == kept.size == 40


def test_numbers_in_double_precision_stay_so() -> None:
    reader, x, y = BatchReader(task=TASKS["regression"]), X.double() + 1e8, X[:, :1].double() + 1e8
    for each in (reader, BatchReader(task=TASKS["regression"], features=lambda batch: batch[0])):
        kept = each.make_kept(1)
        each.keep_observations(kept, MODEL, (x, y), (1,))
        known = kept.joined()
        assert torch.equal(known.seen["columns"], x) and torch.equal(known.labels, y)


@pytest.mark.parametrize(("num_expected", "most"), [(2000, 66), (0, 64 * 5)])  # 64 + 64 / 2 + 64 / 3 ... are 274
def test_samples_are_chosen_before_they_are_averaged(
    num_expected: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    averaged = list[int]()
    images = KINDS["images"]
    shrunk = images.shrunk
    monkeypatch.setattr(images, "shrunk", lambda x: (averaged.append(len(x)), shrunk(x))[1])
    monkeypatch.setattr("lightning_sensitivity.reading.kept.max_samples", lambda kinds, num_columns: 64)
    model = module(lambda self, x: x.mean((2, 3)))
    reader, images = BatchReader(task=TASKS["multiclass"]), torch.rand(50, 3, 40, 40)
    kept = reader.make_kept(3)
    kept.num_expected = num_expected
    for _ in range(40):
        reader.keep_observations(kept, model, (images, torch.zeros(50).long()), (3,))
    assert 62 <= len(kept.joined()) <= 66 and sum(averaged) <= most


def test_there_is_one_label_for_each_training_sample() -> None:
    reader = BatchReader(task=TASKS["multiclass"], targets=lambda batch: batch[1][:50])
    match = "`targets` should return a label for each of 60 samples, got 50"
    with pytest.raises(MisconfigurationException, match=match):
        reader.keep_observations(reader.make_kept(4), MODEL, (X, Y), (4,))
    for max_samples in (55, 60):
        kept = reader.keep(MODEL, (X, Y), 0, max_samples=max_samples)
        with pytest.raises(MisconfigurationException, match="got 50"):
            reader.kept_labels((X, Y), kept, (4,))
    kept = BatchReader().keep(MODEL, (X, Y), 0, max_samples=7)
    assert torch.equal(BatchReader().kept_labels((X, Y), kept, (4,)), Y[evenly_spaced(torch.arange(60), 7)])
