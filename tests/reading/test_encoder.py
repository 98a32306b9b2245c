"""An encoder gets the inputs of the model, on kept samples alone, and is left as it was."""

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from lightning_sensitivity import compare_models
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.reading import reader as reader_module
from lightning_sensitivity.reading.kept import KeptSamples
from lightning_sensitivity.reading.reader import BatchReader
from tests.helpers import labelled, module, see

X, Y = labelled(300).tensors
TENTHS = [*zip(X.split(30), Y.split(30), strict=True)]
MASK = (torch.arange(12) < torch.arange(300)[:, None] % 12 + 1).long()
MODEL = nn.Linear(12, 4)
Forward = Callable[..., Any]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(12, 5), nn.BatchNorm1d(5), nn.Dropout(0.9))


def net(forward: Forward = lambda self, x: self.body(x)) -> Any:
    """A network of a class of its own, whose forward is a function of itself and the inputs."""
    return type("Encoder", (Net,), {"forward": forward})()


def reader(features: Any, **options: Any) -> BatchReader:
    return BatchReader(features=features, task=TASKS["multiclass"], **options)


def seen(features: Any, model: Any, batch: Any, rows: Tensor | None = None, **options: Any) -> Tensor:
    return see(reader(features, **options), model, batch, rows)["columns"]


# What it gets, and what is made of what it returns


ONE, TWO = module(lambda self, image: image), module(lambda self, x, mask: x)
KEYWORDS = module(lambda self, **kwargs: kwargs["ids"])
TEXTS = {"ids": X, "attention_mask": MASK, "labels": Y, "style": X[:, :1]}
MEANS = (X * MASK).sum(1) / MASK.sum(1)
HIDDEN = torch.stack([X, -X], 2)  # of 12 tokens
GETS: dict[str, tuple[Forward, nn.Module, Any, Tensor]] = {  # an encoder, a model, a batch, and the features
    "a tuple, by position": (lambda self, a, b: a + b, TWO, (X, MASK, Y), X + MASK),
    "a mapping, by name": (lambda self, attention_mask, ids, more=0: ids * attention_mask + more, KEYWORDS, TEXTS,
        X * MASK),
    "the only entry, by position": (lambda self, x: 2 * x, ONE, {"image": X, "label": Y}, 2 * X),
    "no labels": (lambda self, ids, labels=None: ids if labels is None else 0 * ids, KEYWORDS, TEXTS, X),
    "one number": (lambda self, x: x[:, 0], ONE, (X, Y), X[:, :1]),
    "a mapping with one entry, of maps": (lambda self, x: {"layer4": x.reshape(-1, 3, 2, 2)}, ONE, (X, Y), X),
    "sentence embeddings": (lambda self, x: {"token_ids": Y, "sentence_embedding": x}, ONE, (X, Y), X),
    "pooled": (lambda self, x: {"last_hidden_state": x[..., None, None], "pooler_output": x}, ONE, (X, Y), X),
    "logits": (lambda self, x: {"loss": x.sum(), "logits": x}, ONE, (X, Y), X),
    "hidden states": (lambda self, x: {"last_hidden_state": torch.stack([x, -x], 2), "pooler_output": x[:, :1]}, ONE,
        (X, Y), HIDDEN.mean(1)),
    "hidden states, without padding": (
        lambda self, ids, attention_mask: {"last_hidden_state": torch.stack([ids, -ids], 2), "logits": ids},
        KEYWORDS, TEXTS, torch.stack([MEANS, -MEANS], 1)),
    "hidden states of a dict": (lambda self, x: {"last_hidden_state": torch.stack([x["ids"], -x["ids"]], 2)}, ONE,
        TEXTS, torch.stack([MEANS, -MEANS], 1)),
    "a list, of which each item is a sample": (lambda self, x: torch.stack(x), ONE, ([*X], Y), X),
}  # fmt: skip


@pytest.mark.parametrize("what", GETS)
def test_an_encoder_gets_what_the_model_gets_and_features_are_a_matrix(what: str) -> None:
    forward, model, batch, expected = GETS[what]
    rows = torch.tensor([5, 200, 7])
    for chosen, wanted in ((None, expected), (rows, expected[rows])):
        features = see(reader(net(forward)), model, batch, chosen, size=300)["columns"]
        torch.testing.assert_close(features, wanted)


REFUSED: dict[str, tuple[Forward, nn.Module, Any, str]] = {
    "it fails": (lambda self, x: x @ x, ONE, (X, Y), r"`features` failed on 'image': a tensor .*RuntimeError"),
    "it wants others": (lambda self, a, b: a, KEYWORDS, TEXTS, r"`features` failed on 'ids': .*TypeError: .*missing 2"),
    "other rows": (lambda self, x: x[:1], ONE, (X, Y), r"return a tensor \(64, D\), got a tensor .*\(1, 12\)"),
    "several": (lambda self, x: {"a": x, "b": x}, ONE, (X, Y), r"return a tensor \(64, D\), got dict of 'a', 'b'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_failure_says_what_came_and_what_was_expected(what: str) -> None:
    forward, model, batch, match = REFUSED[what]
    with pytest.raises(MisconfigurationException, match=match):
        see(reader(net(forward)), model, batch, size=300)


# How it runs


@pytest.mark.parametrize("is_training", [True, False])
def test_it_runs_in_eval_mode_without_gradients_in_parts_and_is_left_as_it_was(is_training: bool) -> None:
    modes = list[tuple[int, bool, bool, bool]]()

    def forward(self: Any, x: Tensor) -> Tensor:
        modes.append((len(x), self.training, self.body[2].training, torch.is_grad_enabled()))
        x += 1
        return self.body(x)

    encoder, state = net(forward).train(is_training), torch.get_rng_state()
    encoder.body[2].train(False)
    before, x = copy.deepcopy(encoder.state_dict()), X.clone()
    found = seen(encoder, MODEL, (x, Y))
    assert modes == [(64, False, False, False)] * 4 + [(44, False, False, False)] and not found.requires_grad
    assert torch.equal(x, X) and torch.equal(torch.get_rng_state(), state)
    assert [encoder.training, encoder.body[0].training, encoder.body[2].training] == [is_training, is_training, False]
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name])
    torch.testing.assert_close(found, encoder.eval().body(X + 1).detach())


@pytest.mark.parametrize(("of_batch", "of_encoder"), [
    (torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float32),
])  # fmt: skip
def test_it_keeps_its_own_precision_whatever_that_of_the_batch_is(of_batch: Any, of_encoder: Any) -> None:
    dtypes = list[Any]()

    def forward(self: Any, x: Tensor) -> Tensor:
        dtypes.append(x.dtype)
        return self.body(x)

    found = seen(net(forward).to(of_encoder), MODEL.to(of_batch), (X.to(of_batch), Y), torch.arange(3))
    MODEL.float()
    assert dtypes == [of_encoder] and found.dtype == torch.float32


def test_it_runs_on_the_device_of_the_model() -> None:
    model, encoder = nn.Linear(12, 4, device="meta"), net()
    with pytest.raises(MisconfigurationException, match="Cannot copy out of meta tensor|meta"):
        seen(encoder, model, (X, Y))
    assert next(encoder.parameters()).device.type == "meta"


# Which samples it runs on


def counting() -> tuple[Any, list[int]]:
    seen = list[int]()
    return net(lambda self, x: (seen.extend(x[:, 0].tolist()), x)[1]), seen


@pytest.mark.parametrize(("num_expected", "num_processes", "furthest"), [(300, 1, 299), (0, 1, 32), (0, 2, 16)])
def test_at_most_3000_training_samples_are_encoded_in_all_processes(
    num_expected: int, num_processes: int, furthest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Evenly spaced ones of an epoch of known length, else the first ones."""
    monkeypatch.setattr(reader_module, "MAX_ENCODED", 30)
    encoder, encoded = counting()
    read, most = reader(encoder), 30 / num_processes
    training = read.make_kept(4, num_processes)
    training.num_expected = num_expected
    numbers = torch.arange(300.0)[:, None].repeat(1, 12)
    for batch in zip(numbers.split(2), Y.split(2), strict=True):
        read.keep_observations(training, MODEL, batch, (4,))
    kept = training.joined().seen["columns"][:, 0].tolist()
    assert most - 2 <= len(kept) <= len(encoded) <= most and {*kept} <= {*encoded} and training.is_full
    assert furthest - 25 < max(encoded) <= furthest and max(b - a for a, b in pairwise(encoded)) < 25


def test_of_validation_samples_those_that_are_kept_are_encoded_once() -> None:
    encoder, encoded = counting()
    read, samples = reader(encoder), KeptSamples(50)
    for index, batch in enumerate(X.split(20)):
        if samples.wants(index):
            samples.add(read.keep(MODEL, batch, index, 50))
    assert encoded == []
    features = read.join(samples.batches).seen["columns"]
    kept = torch.cat([X[20 * batch.index : 20 * batch.index + 20] for batch in samples.batches])
    assert encoded == kept[:, 0].tolist() and torch.equal(features, kept)


def test_it_runs_in_16_bits_where_the_trainer_does() -> None:
    encoder = net(lambda self, x: self.body[0](x))
    with torch.autocast("cpu", torch.bfloat16):
        found = seen(encoder, MODEL, (X, Y))
    full = encoder.body[0](X).detach()
    assert found.dtype == torch.float32 and torch.equal(found, found.bfloat16().float())
    torch.testing.assert_close(found, full, rtol=0, atol=0.02)


def test_nothing_registers_it() -> None:
    holder = nn.Module()
    holder.reader = reader(net())
    assert [*holder.parameters()] == [] and holder.state_dict() == {}


# In a comparison


def test_models_are_compared_by_evenly_spaced_samples_that_are_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "MAX_ENCODED", 60)
    encoder, encoded = counting()
    training = [(x + torch.tensor([1.0] + 11 * [0]) * 10 * number, y) for number, (x, y) in enumerate(TENTHS)]
    options = {"features": encoder, "reference": LogisticRegression(), "validation_labels": True}
    compare_models({"a": MODEL, "b": nn.Linear(12, 4)}, [(X[:50] + 0.5, Y[:50])], training=training, **options)
    assert 58 + 50 <= len(encoded) <= 60 + 50 and {int(number / 10) for number in encoded} == {*range(10)}
