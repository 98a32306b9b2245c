"""The reference in RiskMonitor: what it sees of batches, what it is fitted to, and where there is none."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor
from lightning_sensitivity.functional import bags_of_words, fit_reference, principal_components
from lightning_sensitivity.functional.features import different_samples
from tests.callbacks.plain_loop import HOLDOUT, REFERENCE_NAMES, Plain, Truth, fit
from tests.helpers import Classifier, Quiet, first_tensor, fitted, labelled, loader, logged, refused

X, Y = labelled(50).tensors
SHUFFLED = Y[torch.randperm(50, generator=torch.Generator().manual_seed(1))]
NOISY = Y.where(torch.arange(50) % 3 > 0, SHUFFLED)


def test_over_epochs_its_score_is_calibrated_as_by_a_plain_loop() -> None:
    model = Plain()
    model.net[0], model.net[3] = nn.Linear(12, 256).double(), nn.Linear(256, 4).double()
    model.lr = 0.02
    fit(model, DataLoader(TensorDataset(X, NOISY), 16), RiskMonitor(), truth := Truth(), max_epochs=20)
    # The network learns, and then memorizes: the factor is that of an epoch in between, and between its bounds.
    ratios = truth.ratios
    assert 1 < min(ratios) < 3 and 0 < ratios.index(min(ratios)) < len(ratios) - 1


def images(x: Tensor) -> Tensor:
    return x.reshape(-1, 3, 2, 2)


def many_columns(x: Tensor) -> Tensor:
    """More columns than principal components; the network sees the first ones."""
    return torch.cat([x, (37 * x @ torch.ones(12, 60)).sin() + x[:, :1]], 1)


class Narrow(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(1)[:, :12].double())


@pytest.mark.parametrize("change", [images, many_columns])
def test_it_sees_dense_inputs_as_they_are(change: Any) -> None:
    holdout = change(HOLDOUT)
    truth, model = Truth(holdout=holdout), Narrow()
    train = DataLoader(TensorDataset(change(X), Y), 16)
    fitted([RiskMonitor(), truth], model, train, DataLoader(holdout, 16), max_epochs=2)


def test_a_function_says_what_it_sees() -> None:
    def reduced(x: Tensor, new_x: Tensor) -> tuple[Tensor, Tensor]:
        return principal_components(x[:, :2].sin(), new_x[:, :2].sin())

    # It gets copies, to which it may write.
    monitor = RiskMonitor(features=lambda batch: first_tensor(batch).sin_()[:, :2])
    fit(Plain(), loader(), monitor, Truth(features=reduced))


def test_of_a_large_batch_it_sees_evenly_spaced_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sensitivity.model.reference.NUM_TRAINING", 20)
    fit(Plain(), loader(50, 50), monitor := RiskMonitor())
    assert monitor.metrics[0].reference_sums[0] == 20


# Token ids


class Tokens(Classifier):
    """A bag of embeddings, as transformers call it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(30, 8), nn.Linear(8, 4)

    def forward(
        self, position_ids: Tensor, is_word: Tensor, input_ids: Tensor, attention_mask: Tensor, labels: Any = None
    ) -> Any:
        x = (self.words(input_ids.long()) * attention_mask[..., None]).mean(1)
        logits = self.head(x)
        return SimpleNamespace(logits=logits, loss=None if labels is None else cross_entropy(logits, labels))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return self(**batch).loss

    validation_step = Quiet.validation_step


def token_batches(num_batches: int, seed: int) -> list[dict[str, Tensor]]:
    """Batches of sequences of other lengths; the first word says the class, behind a padding of any ids."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for length in range(4, 4 + num_batches):
        labels = torch.randint(4, (16,), generator=generator)
        ids = torch.randint(4, 30, (16, length), generator=generator).to(torch.uint8)
        no_ids = {"position_ids": torch.arange(length).expand(16, -1), "is_word": ids > 9}
        ids[:, 0] = labels
        mask = (torch.arange(length) < 3).long().expand(16, -1)
        batches.append({**no_ids, "input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def fit_tokens(train: Any, val: Any) -> tuple[RiskMonitor, dict[str, float]]:
    run = fitted(monitor := RiskMonitor(), Tokens(), DataLoader(train, None), DataLoader(val, None))
    return monitor, logged(run, "val/risk")


def test_it_sees_token_ids_as_bags_of_words_without_padding_and_labels() -> None:
    train, val = token_batches(4, seed=0), token_batches(3, seed=1)
    monitor, _ = fit_tokens(train, val)
    words, new_words = ([row[:3] for batch in part for row in batch["input_ids"]] for part in (train, val))
    features, new_features = principal_components(*bags_of_words(torch.stack(words), torch.stack(new_words)))
    labels = one_hot(torch.cat([batch["labels"] for batch in train]), 4)
    rows = different_samples(features, labels)
    expected = fit_reference(features[rows], labels[rows], new_features)
    sums = monitor.metrics[0].reference_sums
    assert (float(sums[1] / sums[0]), sums[0]) == (pytest.approx(expected.score), len(rows))


def test_labels_in_a_validation_batch_never_reach_it() -> None:
    train, val = token_batches(4, seed=0), token_batches(3, seed=1)
    others = [{**batch, "labels": 3 - batch["labels"]} for batch in val]
    without = [{name: value for name, value in batch.items() if name != "labels"} for batch in val]
    found = [fit_tokens(train, each)[1] for each in (val, others, without)]
    assert found[0] == found[1] == found[2] and found[0].keys() >= {*REFERENCE_NAMES}


class Taking(Plain):
    """It takes labels."""

    def forward(
        self, x: Tensor, y: Any = None, label: Any = None, labels: Any = None, target: Any = None, targets: Any = None
    ) -> Tensor:
        return super().forward(x)

    validation_step = Quiet.validation_step


@pytest.mark.parametrize("name", ["label", "labels", "target", "targets", "y"])
def test_floating_labels_that_forward_takes_by_name_are_no_features(name: str) -> None:
    model, labels = Taking(), one_hot(Y, 4).double()
    model.training_step = lambda batch, batch_idx: cross_entropy(model(**batch), batch[name])
    train, val = ([{"x": X, name: labels}], [{"x": HOLDOUT}])  # if labels were features, there would be none here
    run = fitted(RiskMonitor(), model, DataLoader(train, None), DataLoader(val, None), max_epochs=1)
    assert run.callback_metrics["val/risk_reference_weight"] > 0


# A function that fails


@pytest.mark.parametrize(("features", "match"), [
    (lambda batch: {}[0], "KeyError"),
    (lambda batch: first_tensor(batch)[:3], r"`features` should be a function that returns a tensor \(16, D\)"),
    (lambda batch: first_tensor(batch)[:, 0], r"returns a tensor \(16, D\)"),
])  # fmt: skip
def test_a_function_that_fails_is_an_error_before_the_first_step(features: Any, match: str) -> None:
    refused(RiskMonitor(features=features), Plain(), match="^`RiskMonitor` .*" + match)


def test_an_empty_batch_moves_no_prediction() -> None:
    def values(batches: list[Tensor]) -> dict[str, float]:
        return logged(fitted(RiskMonitor(), Taking(), val=DataLoader(batches, None)), "val/risk_reference")

    full = list(HOLDOUT.split(25))
    assert values([full[0], HOLDOUT[:0], full[1]]) == pytest.approx(values(full))
