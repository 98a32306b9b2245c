"""Groups: numbers for their names, whole groups that are left out, and what is counted by them."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor

from lightning_sensitivity import Reference, label_noise
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.reference import learners
from lightning_sensitivity.reference.calibration import calibrate
from lightning_sensitivity.reference.observations import (
    count_groups,
    group_means,
    group_numbers,
    known_share,
    stderr_of_mean,
)
from tests.reference.conftest import generator

NAMES: dict[str, tuple[Any, Any]] = {  # of the same groups, in two forms
    "integers": ([3, 7, 3], torch.tensor([3, 7, 3])),
    "whole floats": (torch.tensor([3.0, 7.0, 3.0]), [3, 7, 3]),
    "bytes": (torch.tensor([3, 7, 3], dtype=torch.uint8), np.array([3, 7, 3])),
    "a column": (np.array([[3], [7], [3]]), [3, 7, 3]),
    "strings": (["ann", "bob", "ann"], np.array(["ann", "bob", "ann"], dtype=object)),
    "a series": (pd.Series(["ann", "bob", "ann"]).astype("category"), ("ann", "bob", "ann")),
    "numbers as objects": (np.array([3, 7, 3], dtype=object), [3, 7, 3]),
    "a nullable column": (pd.Series([3, 7, 3], dtype="Int64"), [3.0, 7.0, 3.0]),
    "16 bits": (torch.tensor([3, 7, 3], dtype=torch.bfloat16), [3, 7, 3]),
    "words beside numbers": ([3, "bob", 3], np.array([3, "bob", 3], dtype=object)),
    "flags": ([True, False, True], torch.tensor([1, 0, 1])),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_group_has_the_same_number_in_any_form(name: str) -> None:
    found, other = map(group_numbers, NAMES[name])
    assert torch.equal(found, other) and found.dtype == torch.int64 and found.shape == (3,)
    assert found[0] == found[2] != found[1]


def test_numbers_of_strings_and_fractions_depend_on_no_process_and_no_other_samples() -> None:
    assert group_numbers(["ann"]).tolist() == [953319920708613029]
    assert group_numbers([0.5, 2.0])[1] == group_numbers([2.0])[0] == 2 != group_numbers([0.5])[0]
    assert group_numbers([2, "ann"]).tolist() == [2, *group_numbers(["ann"]).tolist()]


@pytest.mark.parametrize(("groups", "match"), [
    ([1.0, math.nan], "some are None or nan"),
    (["a", None], "some are None"),
    (np.array(["a", math.nan], dtype=object), "some are None"),
    (["a", pd.NA], "some are None"),
    (np.array(["a", np.float32("nan")], dtype=object), "some are None"),
    (pd.Series(["a", None], dtype="string"), "some are None"),
    (pd.Series(pd.to_datetime(["2020-01-01", None])), "some are None"),
    ([pd.Timestamp("2020-01-01"), pd.NaT], "some are None"),
    (torch.zeros(3, 2), r"one per sample, but got shape \(3, 2\)"),
    (3, r"one per sample, but got shape \(\)"),
])  # fmt: skip
def test_what_are_no_groups_is_refused(groups: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        group_numbers(groups)


def test_means_and_standard_errors_count_groups() -> None:
    values = torch.randn(60, 3, generator=generator(), dtype=torch.float64)
    groups = torch.arange(60) // 5
    expected = values.reshape(12, 5, 3).mean(1)
    torch.testing.assert_close(group_means(values, groups), expected)
    assert stderr_of_mean(values[:, 0], groups) == pytest.approx(float(expected[:, 0].std()) / math.sqrt(12))
    assert stderr_of_mean(values[:, 0], torch.arange(60)) == pytest.approx(stderr_of_mean(values[:, 0], None))
    repeated = values[:, 0].repeat_interleave(4)  # which tells nothing more
    assert stderr_of_mean(repeated, torch.arange(240) // 4) == pytest.approx(stderr_of_mean(values[:, 0], None))
    assert math.isnan(stderr_of_mean(values[:, 0], torch.zeros(60))) and math.isnan(stderr_of_mean(values[:1, 0], None))
    assert count_groups(groups, 60) == 12 and count_groups(None, 60) == 60 and group_means(values, None) is values
    assert known_share(torch.tensor([1, 2, 2, 99]), groups) == 0.75 and known_share(None, None) == 0


# Left out


def persons(num_persons: int = 60, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Ten samples of each person, whose label says nothing of another's."""
    g = generator(seed)
    who = torch.arange(10 * num_persons) // 10
    centres, labels = torch.randn(num_persons, 6, generator=g), torch.randint(2, (num_persons,), generator=g)
    return centres[who] + 0.05 * torch.randn(len(who), 6, generator=g), labels[who], who


@pytest.mark.parametrize("estimator", [None, LogisticRegression(C=1e4)], ids=["chosen", "a classifier"])
@pytest.mark.parametrize("names", [lambda who: who, lambda who: [f"person {each}" for each in who.tolist()]])
def test_with_groups_a_reference_says_what_it_is_of_new_ones(names: Any, estimator: Any) -> None:
    x, y, who = persons(120)
    known, new = who < 40, who >= 40
    found = Reference(estimator=estimator).fit(x[known], y[known], names(who[known]))
    assert found.accuracy_ == pytest.approx(found.score(x[new], y[new]), abs=0.2) and found.accuracy_ < 0.7
    assert found.skill_ < 0.05 and len(found.groups_) == found.num_samples_ == 400
    assert np.isnan(label_noise(x[known], y[known], groups=who[known])) and label_noise(x[known], y[known]) < 0.05
    plain = Reference().fit(x[known], y[known])
    assert plain.accuracy_ > 0.95 and plain.groups_ is None


def test_a_forest_leaves_out_whole_groups_too() -> None:
    x, y, who = persons()
    folds = list(GroupKFold(5).split(x, groups=who))
    left_out = learners._fit_forest(x.numpy(), y.double().numpy()[:, None], folds, num_columns=2, leaf=2)[1]
    by_itself = learners._fit_forest(x.numpy(), y.double().numpy()[:, None], None, num_columns=2, leaf=2)[1]
    assert ((by_itself > 0.5) == y.numpy()).mean() > 0.95 > 0.7 > ((left_out > 0.5) == y.numpy()).mean()


def test_ridge_regression_leaves_out_what_sklearn_leaves_out() -> None:
    x, y, who = persons(12)
    folds, targets = list(GroupKFold(5).split(x, groups=who)), np.stack([y, 1 - y], 1).astype(float)
    left_out_by_ridge = learners._leave_folds_out(x.double().numpy(), targets, folds)
    for alpha, left_out in zip(learners._ALPHAS, left_out_by_ridge, strict=True):
        expected = cross_val_predict(Ridge(alpha), x.double().numpy(), targets, cv=folds)
        np.testing.assert_allclose(left_out, expected, atol=1e-8)


@pytest.mark.parametrize("num_groups", [2, 3, 40])
def test_two_groups_are_enough(num_groups: int) -> None:
    x, y, who = persons(40)
    assert Reference().fit(x, y, who % num_groups).left_out_.shape == (400, 2)


@pytest.mark.parametrize("estimator", [None, LogisticRegression()], ids=["chosen", "a classifier"])
def test_a_single_group_and_another_number_of_them_are_refused(estimator: Any) -> None:
    x, y, _ = persons(4)
    with pytest.raises(ValueError, match="two or more groups, but all are of one: leave `groups` out"):
        Reference(estimator=estimator).fit(x, y, torch.zeros(40))
    with pytest.raises(ValueError, match=r"inconsistent numbers of samples: \[40, 40, 39\]"):
        Reference().fit(x, y, torch.zeros(39))


def test_where_the_learner_is_chosen_on_samples_of_one_group_it_is_chosen_by_leaving_them_out_singly() -> None:
    x, y, _ = persons(30)
    order = Reference().fit(x, y).rows_  # of which every third is in the part
    groups = torch.zeros(300)
    groups[torch.from_numpy(order[1::3].copy())] = 1
    assert Reference().fit(x, y, groups).left_out_.shape == (300, 2)


def test_equal_samples_are_one_within_a_group_only() -> None:
    x, y, who = persons(8)
    twice, others = torch.cat([x, x]), torch.cat([who, who + 100])
    assert Reference().fit(twice, torch.cat([y, y]), torch.cat([who, who])).num_samples_ == 80
    found = Reference().fit(twice, torch.cat([y, 1 - y]), others)
    assert found.num_samples_ == 160 and {*found.labels_[:, 0]} == {0, 1}
    order = torch.randperm(160, generator=generator())
    shuffled = Reference().fit(twice[order], torch.cat([y, 1 - y])[order], others[order])
    np.testing.assert_array_equal(shuffled.left_out_, found.left_out_)


def test_smoothing_needs_more_than_chance_among_groups() -> None:
    p = torch.tensor([[0.9, 0.1]]).repeat(1000, 1)
    y = torch.eye(2)[(torch.arange(1000) < 150).long()].double()  # 85 % are right, and so sure are all
    groups = torch.arange(1000) // 150
    task = TASKS["multiclass"]
    assert calibrate(p, y, task).power == calibrate(p, y, task, groups).power
    sure = torch.tensor([[1.0, 0.0]]).repeat(1000, 1).double()
    assert calibrate(sure, y, task).smoothing > 0.2 and calibrate(sure, y, task, groups).smoothing == 0
