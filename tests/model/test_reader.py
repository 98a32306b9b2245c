"""A reader of batches needs no Trainer, and what it keeps is enough to fit a reference."""

from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lightning_sensitivity.functional import fit_reference, principal_components
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.model.reader import BatchReader
from lightning_sensitivity.model.reference import fit_to_samples, keep_training_samples
from tests.helpers import inputs, labelled

MODEL = nn.Linear(12, 4)
X, Y = labelled(60).tensors
BATCHES = [{"image": X[start : start + 20], "class": Y[start : start + 20]} for start in (0, 20, 40)]
READ = {"inputs": lambda batch: batch["image"].mul_(2), "targets": lambda batch: batch["class"]}


def test_functions_say_where_everything_is_and_get_copies() -> None:
    reader, batch = BatchReader(**READ, features=lambda batch: batch["image"].mul_(3)[:, :2]), BATCHES[0]
    kept = reader.keep(MODEL, batch, 5, reader.labels(MODEL, batch))
    assert (kept.index, kept.size) == (5, 20) and torch.equal(kept.labels, Y[:20])
    assert torch.equal(kept.call(), MODEL(2 * X[:20])) and torch.equal(kept.features, 3 * X[:20, :2])
    assert torch.equal(batch["image"], X[:20])


def test_without_functions_it_takes_what_is_usual() -> None:
    reader = BatchReader()
    kept = reader.keep(MODEL, (X, Y), 0, reader.labels(MODEL, (X, Y)))
    assert torch.equal(kept.call(), MODEL(X)) and torch.equal(kept.labels, Y) and kept.features is None
    assert reader.may_have_labels(MODEL, (X, Y)) and not reader.may_have_labels(MODEL, X)


@pytest.mark.parametrize(("read", "match"), [
    (lambda reader: reader.labels(MODEL, (X, Y + 1), (4,)), "Expected labels from 0 to 3"),
    (lambda reader: reader.labels(MODEL, X), "`targets` should return the labels"),
    (lambda reader: reader.keep(MODEL, X, 0, Y[:5]), "should return a label for each of 60 samples, got 5"),
])  # fmt: skip
def test_labels_that_are_not_clear_or_do_not_fit_are_refused(read: Any, match: str) -> None:
    with pytest.raises(MisconfigurationException, match=match):
        read(BatchReader(task=TASKS["multiclass"]))


@pytest.mark.parametrize(("num_samples", "kept"), [(1000, [0, 1, 2]), (40, [0, 2]), (21, [0, 2])])
def test_a_reference_is_fitted_to_evenly_spaced_training_samples(num_samples: int, kept: list[int]) -> None:
    reader, new = BatchReader(**READ), inputs(30, seed=1)
    training, num_labelled = keep_training_samples(reader, MODEL, BATCHES, num_samples=num_samples)
    assert [batch.index for batch in training] == kept and num_labelled == 60
    unseen = [reader.keep(MODEL, {"image": part}, index) for index, part in enumerate(new.split(10))]
    found = fit_to_samples(training, unseen, 4, TASKS["multiclass"])
    rows = torch.cat([torch.arange(20 * index, 20 * index + 20) for index in kept])
    features: tuple[Tensor, Tensor] = principal_components(2 * X[rows], 2 * new)
    expected = fit_reference(features[0], one_hot(Y[rows], 4), features[1])
    assert torch.equal(found.predictions, expected.predictions)
