"""Several labels per sample, and several targets, of which some are unknown."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from lightning_sensitivity import Reference, label_noise
from lightning_sensitivity.reference import learners
from tests.reference.conftest import generator

X, NEW = torch.randn(2, 400, 5, generator=generator())


def labels(x: Tensor, seed: int = 0) -> Tensor:
    noise = torch.randn(len(x), 3, generator=generator(seed))
    return (x[:, :3] + 0.5 * noise > torch.tensor([0.0, 0.5, 1.0])).double()


def some_unknown(y: Tensor) -> Tensor:
    return y.where(torch.rand(y.shape, generator=generator(1)) > 0.4, math.nan)


Y, Y_NEW = labels(X), labels(NEW, 1)
U = some_unknown(Y)
TARGETS = X[:, :2] + X[:, 2:4] ** 2 / 5
UNKNOWN = some_unknown(TARGETS)


LEARNERS: dict[str, Any] = {"forest": {"_NEAR": 9.0, "_GAIN": 9.0}, "ridge": {"_MAX_CELLS": 0}}


@pytest.mark.parametrize("name", LEARNERS)
@pytest.mark.parametrize("y", [Y, U, U.nan_to_num(-100.0).long()], ids=["all", "nan", "-100"])
def test_learners_tell_several_labels_also_where_some_are_unknown(
    name: str, y: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    for option, value in LEARNERS[name].items():
        monkeypatch.setattr(learners, option, value)
    if name == "forest":
        monkeypatch.setattr(learners, "_choose_ridge", lambda part, task, *rest: learners._Choice(9.0, "", {}, None))
    found = Reference("multilabel").fit(X, y)
    assert found.learner_ == name and found.blind_labels_.tolist() == []
    q = found.predict_proba(NEW)
    assert all(roc_auc_score(Y_NEW[:, each], q[:, each]) > 0.85 for each in range(3))
    assert found.auroc_ > 0.85 > 0.6 < found.accuracy_ == pytest.approx(found.score(NEW, Y_NEW.numpy()), abs=0.08)
    np.testing.assert_allclose(q.mean(0), Y_NEW.mean(0), atol=0.1)  # calibrated
    assert not np.isnan(found.left_out_).any()


def test_labels_that_can_not_be_told_are_named_and_left_out_of_what_is_said() -> None:
    chance = torch.zeros(400, 3).double()
    chance[:3, 0], chance[:, 1] = 1, math.nan
    chance[:, 2] = torch.randint(2, (400,), generator=generator(3))
    found = Reference("multilabel").fit(X, torch.cat([Y, chance], 1))
    only = Reference("multilabel").fit(X, Y)
    assert found.blind_labels_.tolist() == [3, 4, 5] and only.blind_labels_.tolist() == []
    of_told = pytest.approx((only.skill_, only.accuracy_, only.auroc_), abs=0.02)  # of another learner
    assert (found.skill_, found.accuracy_, found.auroc_) == of_told
    assert np.isfinite(found.predict_proba(NEW)).all()
    blind = Reference("multilabel").fit(X, chance)
    assert blind.inputs_tell_nothing_ and blind.blind_labels_.tolist() == [1]  # of the others, the mean is expected


def test_unexplained_labels_are_a_mean_over_labels() -> None:
    wrong = torch.rand(Y.shape, generator=generator(4)) < 0.3
    clean, noisy = (X[:, :3] > 0).double(), (X[:, :3] > 0).double()
    noisy = noisy.where(~wrong, 1 - noisy)
    assert label_noise(X, some_unknown(clean), "multilabel") < 0.1 < 0.2 < label_noise(X, noisy, "multilabel") < 0.4


def test_targets_that_are_unknown_are_left_out_of_their_column() -> None:
    found = Reference("regression").fit(X, UNKNOWN)
    errors = (torch.from_numpy(found.predict(NEW)) - (NEW[:, :2] + NEW[:, 2:4] ** 2 / 5)).square().mean()
    assert float(errors) < 0.2 and found.score_ == pytest.approx(float(errors), abs=0.1)
    assert np.isfinite(found.residuals_).all() and not np.isnan(found.left_out_).any()
    one = Reference("regression").fit(X, UNKNOWN[:, 0])
    assert one.num_samples_ == int((~UNKNOWN[:, 0].isnan()).sum())


def test_a_target_that_is_never_known_is_refused() -> None:
    y = TARGETS.clone()
    y[:, 1] = math.nan
    with pytest.raises(ValueError, match="No target of column 1 is known"):
        Reference("regression").fit(X, y)
