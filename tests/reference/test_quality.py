"""Where the inputs of a table tell nothing of the labels, the mean label is predicted, and trusted."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.dummy import DummyClassifier
from torch import Tensor

from lightning_sensitivity import Reference
from lightning_sensitivity.reference import reference
from lightning_sensitivity.reference.calibration import _FEWEST
from tests.reference.conftest import generator

SIZE = 2 * _FEWEST
CONSTANT, RANDOM = torch.ones(SIZE, 3), torch.randn(SIZE, 3, generator=generator())
CLASSES = torch.arange(SIZE) % 5 // 2
YES = (CLASSES == 2).double()
UNKNOWN = YES.where(torch.arange(SIZE) < _FEWEST - 1, math.nan)  # too few
NOTHING: dict[str, tuple[str, Tensor, Tensor, list[float]]] = {
    "classes": ("multiclass", CONSTANT, CLASSES, [0.4, 0.4, 0.2]),
    "random columns": ("multiclass", RANDOM, CLASSES, [0.4, 0.4, 0.2]),
    "one output": ("binary", CONSTANT, YES, [0.8, 0.2]),
    "targets": ("regression", CONSTANT, torch.stack([YES, 3 * YES], 1), [0.2, 0.6]),
    "labels": ("multilabel", CONSTANT, torch.stack([YES, 1 - YES], 1), [0.2, 0.8]),
}
NEW = torch.randn(4, 3, generator=generator(1))


@pytest.mark.parametrize("what", NOTHING)
def test_where_a_table_tells_nothing_the_mean_label_is_what_to_expect(what: str) -> None:
    task, x, y, shares = NOTHING[what]
    found = Reference(task).fit(x, y)
    assert found.inputs_tell_nothing_ and found.skill_ == 0 and found.blind_labels_.tolist() == []
    assert found.is_trusted_ and not found.may_choose(sees_all=False) and math.isnan(found.unexplained_)
    np.testing.assert_allclose(found.predict_matrix(NEW), np.tile(shares, (4, 1)))
    np.testing.assert_array_equal(found.left_out_, np.tile(found.shares_, (SIZE, 1)))


def test_of_several_labels_those_that_are_too_few_or_all_alike_stay_blind() -> None:
    found = Reference("multilabel").fit(CONSTANT, torch.stack([YES, 0 * YES, UNKNOWN], 1))
    assert found.is_trusted_ and found.blind_labels_.tolist() == [1, 2] and found.accuracy_ == pytest.approx(0.8)
    found = Reference("multilabel").fit(CONSTANT, torch.stack([0 * YES, UNKNOWN], 1))
    assert not found.is_trusted_ and found.blind_labels_.tolist() == [0, 1]
    told = torch.stack([(RANDOM[:, 0] > 0).double(), YES], 1)
    assert Reference("multilabel").fit(RANDOM, told).blind_labels_.tolist() == [1]  # since another one can be told


FEW = slice(_FEWEST - 1)
BLIND: dict[str, tuple[dict[str, Any], tuple[Any, ...]]] = {
    "too few labels": ({}, (CONSTANT[FEW], CLASSES[FEW])),
    "too few groups": ({}, (CONSTANT, CLASSES, torch.arange(SIZE) % (_FEWEST - 1))),
    "one class": ({}, (CONSTANT, 0 * CLASSES)),
    "an estimator of the user": ({"estimator": DummyClassifier()}, (CONSTANT, CLASSES)),
    "images": ({}, (CONSTANT[:, :, None, None] + torch.arange(SIZE)[:, None, None, None], CLASSES)),
}


@pytest.mark.parametrize("what", BLIND)
def test_it_stays_blind_where_nothing_can_be_said_of_the_inputs(what: str) -> None:
    options, samples = BLIND[what]
    found = Reference(**options).fit(*samples)
    assert found.skill_ <= 0.05 and not found.inputs_tell_nothing_ and not found.may_choose(sees_all=False)
    assert found.is_trusted_ == (found.kind_ == "columns" and found.skill_ > 0)


def test_of_more_columns_than_a_forest_takes_it_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_FOREST_COLUMNS", 2)
    assert not Reference().fit(CONSTANT, CLASSES).is_trusted_
