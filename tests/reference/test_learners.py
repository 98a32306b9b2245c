"""Learners: what they leave out, which of them is chosen, and how much work that is."""

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import pairwise
from sklearn.multioutput import MultiOutputClassifier, MultiOutputRegressor, RegressorChain
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVR
from sklearn.tree import DecisionTreeClassifier
from torch import Tensor
from torch.nn.functional import one_hot

from lightning_sensitivity import Reference
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.reference import learners
from lightning_sensitivity.reference.calibration import Calibration
from lightning_sensitivity.reference.learners import quiet
from lightning_sensitivity.reference.observations import Observations
from tests.reference.conftest import generator, steps


def known(x: Tensor, y: Tensor) -> Observations:
    return Observations({"columns": x}, y.double())


SIZES = {"multiclass": 3, "binary": 1, "regression": 2}


def sample(task: str = "multiclass", num_samples: int = 24, num_new: int = 7, seed: int = 0) -> tuple[Tensor, ...]:
    """Three columns in several units, noisy labels as a matrix, and new samples."""
    g = generator(seed)
    x = torch.randn(num_samples + num_new, 3, generator=g, dtype=torch.float64)
    y = x[:num_samples, :2] + 0.5 * torch.randn(num_samples, 2, generator=g)
    if task == "multiclass":
        y = one_hot((y[:, 0] > 0).long() + (y[:, 1] > 0), 3).double()
    if task == "binary":
        y = (y[:, :1] > 0).double()
    x = 3 + x * torch.tensor([1.0, 2.0, 0.5])
    return x[:num_samples], y, x[num_samples:]


@pytest.fixture
def uncalibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "calibrate", lambda p, y, task, groups: Calibration(task))


# Left-out predictions


@pytest.mark.usefixtures("uncalibrated")
@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_forest_leaves_out_as_the_classifier_of_sklearn_does(num_classes: int) -> None:
    """By hand: which rows a tree did not draw, and what these trees say of them."""
    x, y = sample(num_samples=90)[0].float().numpy(), torch.randint(num_classes, (90,), generator=generator())
    model, left_out = learners._fit_forest(x, one_hot(y).double().numpy(), None, num_columns=2, leaf=5)
    options = {"max_features": 2, "min_samples_leaf": 5, "oob_score": True, "random_state": 0}
    forest = RandomForestClassifier(40, **options).fit(x, y.numpy())
    np.testing.assert_allclose(left_out, forest.oob_decision_function_, atol=1e-6)
    np.testing.assert_allclose(model.predict(x[:9]), forest.predict_proba(x[:9]), atol=1e-6)
    drawn = [np.random.RandomState(tree.random_state).randint(0, 90, 90) for tree in model.forest.estimators_]
    votes = [
        tree.predict(x[:1])[0] for tree, rows in zip(model.forest.estimators_, drawn, strict=True) if 0 not in rows
    ]
    np.testing.assert_allclose(left_out[0], np.mean(votes, axis=0))


@pytest.mark.usefixtures("no_forest", "uncalibrated")
@pytest.mark.parametrize("task", SIZES)
def test_ridge_regression_leaves_out_what_it_says(task: str) -> None:
    """By refits without each sample, for all features, widths and ridges, of which the best ones count."""
    x, y, new = sample(task, num_samples=8)
    y, found = y.numpy(), []
    for name, units in (("columns", x.std(0, correction=0)), ("values", torch.ones(3))):
        rows = (torch.cat([x, new]) / units).numpy()
        distances = pairwise.euclidean_distances(rows, squared=True)
        median = np.median(distances[:8, :8][distances[:8, :8] > 1e-9])
        for width in (0.1, 0.4, 1.6, 6.4):
            kernel = np.exp(-distances / (width * median))
            values, vectors = np.linalg.eigh(kernel[:8, :8])
            features = kernel[:, :8] @ vectors / np.sqrt(values)  # whose products are the kernel
            for alpha in (0.03, 0.1, 0.3, 1, 3, 10, 30):
                folds = [(np.arange(8) != each, features[each : each + 1]) for each in range(8)]
                left_out = [Ridge(alpha).fit(features[:8][keep], y[keep]).predict(row)[0] for keep, row in folds]
                left_out = np.reshape(left_out, y.shape)
                q = Ridge(alpha).fit(features[:8], y).predict(features[8:]).reshape(7, -1)
                found.append((np.square(left_out - y).mean(), name, left_out, q))
    _, name, left_out, q = min(found, key=lambda each: each[0])
    expected, score = (Calibration(TASKS[task])(both(each, task)) for each in (q, left_out))
    fitted = Reference(task).fit(x, y)
    np.testing.assert_allclose(fitted.predict_matrix(new), expected, rtol=1e-5, atol=1e-5)
    score = float(TASKS[task].distances(score, both(y, task)).mean())
    assert (fitted.learner_, fitted.features_, fitted.score_) == ("ridge", name, pytest.approx(score, rel=1e-4))


def both(p: Any, task: str) -> Tensor:
    """Of two classes, both columns."""
    p = torch.tensor(p)
    return torch.cat([1 - p, p], 1) if task == "binary" else p


# The choice


def fits(monkeypatch: pytest.MonkeyPatch, name: str, place: int = 0) -> list[int]:
    """The numbers of samples to which a learner is fitted, by its argument at some place."""
    sizes, fit = [], getattr(learners, name)
    monkeypatch.setattr(
        learners, name, lambda *args, **options: sizes.append(len(args[place])) or fit(*args, **options)
    )
    return sizes


def test_a_learner_is_chosen_on_a_part_and_the_winner_alone_fitted_to_all(monkeypatch: pytest.MonkeyPatch) -> None:
    forests, ridges = fits(monkeypatch, "_leave_out", 1), fits(monkeypatch, "_fit_ridge")
    Reference().fit(*steps(400))
    assert ridges == [100] * 8 and forests == [100] * 6 + [400]
    forests.clear(), ridges.clear()
    x = torch.randn(400, 62, generator=generator())
    found = Reference("regression").fit(x, x.sum(1))  # smooth: the first try of a forest is far from ridge regression
    assert found.learner_ == "ridge" and ridges == [100] * 8 + [400] and forests == [100]


@pytest.mark.parametrize(("gap", "num_samples", "learner"), [
    (1.019, 101, "forest"), (1.021, 101, "ridge"), (0.999, 100, "forest"), (1.001, 100, "ridge")
])  # fmt: skip
def test_a_forest_makes_more_of_more_samples(
    gap: float, num_samples: int, learner: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = steps(num_samples)
    ridge = learners._choose_ridge(known(x[:100], one_hot(y[:100])), TASKS["multiclass"])
    forest = learners._choose_forest(known(x[:100], one_hot(y[:100])), TASKS["multiclass"], 0.0)
    monkeypatch.setattr(learners, "_choose_ridge", lambda *args: ridge._replace(score=1.0))
    monkeypatch.setattr(learners, "_choose_forest", lambda *args, limit: forest._replace(score=gap))
    assert Reference().fit(x, y).learner_ == learner


def test_each_learner_takes_as_many_samples_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = steps(200, num_columns=4)
    monkeypatch.setattr(learners, "_MIN_ROWS", 50)
    monkeypatch.setattr(learners, "_MAX_CELLS", 4 * 80)  # rows times columns of a forest
    assert Reference().fit(x, y).num_samples_ == 80
    monkeypatch.setattr(learners, "_MAX_TARGETS", 2 * 60)  # rows times classes
    assert Reference().fit(x, y).num_samples_ == 60
    monkeypatch.setattr(learners, "_MAX_TARGETS", 2 * 49)
    monkeypatch.setattr(learners, "MOST", 30)
    known = Reference().fit(x, y)
    assert (known.learner_, known.num_samples_) == ("ridge", 30)
    np.testing.assert_array_equal(known.labels_, np.eye(2)[y[known.rows_]])


@pytest.mark.filterwarnings("ignore:Some inputs do not have OOB scores")  # of two trees
def test_columns_of_a_split_and_trees_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    make = learners._forest
    monkeypatch.setattr(
        learners, "_forest", lambda y, columns, leaf, trees: sizes.append(columns) or make(y, 1, leaf, 2)
    )
    x = torch.rand(40, 900, generator=generator())
    learners._choose_forest(known(x, one_hot(torch.arange(40) % 2)), TASKS["multiclass"], limit=9.0)
    assert sizes == [30] * 4 + [100]  # half of 900 and all of them are 100, and their root is 30
    monkeypatch.setattr(learners, "_MAX_WORK", 40 * 2 * 30)
    monkeypatch.setattr(learners, "_MIN_TREES", 7)
    for num_columns, num_trees in ((1, 30), (3, 10), (4, 7)):
        assert make(np.eye(2)[np.arange(40) % 2], num_columns, 5, 150).n_estimators == num_trees


# Other estimators


def test_an_estimator_takes_the_place_of_both_learners_and_stays_as_it_is() -> None:
    x, y, new = sample(num_samples=60)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    found = Reference(estimator=model).fit(x, y)
    assert not hasattr(model[1], "coef_") and (found.learner_, found.features_) == ("Pipeline", "columns")
    p = model.fit(x.numpy(), y.argmax(1).numpy()).predict_proba(new.numpy())
    calibrated = p ** (1 / found.temperature_) / (p ** (1 / found.temperature_)).sum(1, keepdims=True)
    mixed = (1 - found.smoothing_) * calibrated + found.smoothing_ * found.shares_
    np.testing.assert_allclose(found.predict_proba(new), mixed, atol=1e-3)
    assert found.is_trusted_ and found.score_ > np.square(model.predict_proba(x.numpy()) - y.numpy()).sum(1).mean()


def test_the_folds_of_an_estimator_have_samples_from_everywhere() -> None:
    x = torch.rand(500, 1, generator=generator())
    assert Reference(estimator=KNeighborsClassifier()).fit(x, (8 * x[:, 0]).long() % 2).accuracy_ > 0.95
    assert Reference("regression", KNeighborsRegressor()).fit(x, 8 * x[:, 0]).skill_ > 0.99


@pytest.mark.parametrize("num_classes", [1, 30, 60])
def test_of_few_samples_of_each_class_an_estimator_has_fewer_folds(num_classes: int) -> None:
    x, y = torch.rand(60, 2, generator=generator()), torch.arange(60) % num_classes
    found = Reference(estimator=GaussianNB()).fit(x, y)
    assert found.left_out_.shape == (60, num_classes) and np.isfinite(found.predict_proba(x)).all()


class HasClasses(LinearRegression):
    classes_ = ()  # as CatBoost's regressors


@pytest.mark.parametrize("estimator", [HasClasses(), MultiOutputRegressor(Ridge(0)), RegressorChain(Ridge(0))])
def test_a_regressor_is_fitted_to_all_targets(estimator: Any) -> None:
    x, y, new = sample("regression", num_samples=40)
    expected = LinearRegression().fit(x.numpy(), y.numpy()).predict(new.numpy())
    np.testing.assert_allclose(Reference("regression", estimator).fit(x, y).predict(new), expected)


@pytest.mark.parametrize("estimator", [MultiOutputClassifier(GaussianNB()), RandomForestClassifier(), MLPClassifier()])
def test_a_classifier_is_fitted_to_all_labels(estimator: Any) -> None:
    x, y, _ = sample("regression", num_samples=60)
    labels = torch.cat([y > 0, torch.zeros(60, 1)], 1)  # of which one is always no
    with quiet():
        found = Reference("multilabel", estimator).fit(x, labels)
    assert found.score(x, labels) > 0.8 and found.blind_labels_.tolist() == [2]
    assert found.left_out_.shape == (60, 3) and found.predict_proba(x)[:, 2].max() < 0.01


UNKNOWN = torch.eye(2).repeat(12, 1).masked_fill(torch.arange(48).reshape(24, 2) == 0, torch.nan)
REFUSED: dict[str, tuple[str, Any, Any, str]] = {
    "parameters": ("regression", SVR(C=-1.0), torch.rand(24), "SVR can't be fitted: The 'C' parameter"),
    "several targets": ("regression", SVR(), torch.rand(24, 2), "SVR can't be fitted: y should be a 1d array"),
    "several labels": ("multilabel", GaussianNB(), torch.eye(2).repeat(12, 1), "GaussianNB can't be fitted: y should"),
    "unknown labels": ("multilabel", RandomForestClassifier(), UNKNOWN, "RandomForestClassifier needs all labels"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_an_estimator_does_not_take_is_said_by_its_name(what: str) -> None:
    task, estimator, labels, message = REFUSED[what]
    with pytest.raises(ValueError, match=message):
        Reference(task, estimator).fit(sample()[0], labels)


@pytest.mark.usefixtures("uncalibrated")
def test_an_estimator_knows_classes_without_a_sample_and_both_answers_of_one_output() -> None:
    x, y, new = sample("binary", num_samples=40)
    q = GaussianNB().fit(x.numpy(), y[:, 0].numpy()).predict_proba(new.numpy())
    np.testing.assert_allclose(Reference("binary", GaussianNB()).fit(x, y).predict_proba(new), q, atol=1e-4)
    of_label = Reference("multilabel", GaussianNB()).fit(x, y).predict_proba(new)
    np.testing.assert_allclose(of_label, q[:, 1:], atol=1e-4)
    gaps = Reference(estimator=GaussianNB()).fit(x, one_hot(3 * y[:, 0].long(), 6).float())
    np.testing.assert_allclose(gaps.predict_proba(new), np.insert(q, [1, 1, 2, 2], 0, axis=1), atol=1e-4)


def test_an_estimator_without_a_random_state_gives_the_same_each_time() -> None:
    x, y, _ = sample(num_samples=60)
    states = np.random.get_state()[1].copy(), torch.get_rng_state()
    model = make_pipeline(StandardScaler(), DecisionTreeClassifier(max_features=1))
    found = [Reference(estimator=model).fit(pd.DataFrame(x.numpy()), y).left_out_ for _ in range(2)]
    np.testing.assert_array_equal(*found)
    assert (np.random.get_state()[1] == states[0]).all() and torch.equal(torch.get_rng_state(), states[1])
