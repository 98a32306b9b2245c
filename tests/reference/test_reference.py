"""What a reference predicts, and what it knows of itself."""

import math
import pickle
import random
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge
from sklearn.metrics import accuracy_score, mean_squared_error, pairwise, roc_auc_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import one_hot, pad

from lightning_sensitivity.functional import Reference, fit_reference, learners, reference, unexplained_share
from lightning_sensitivity.functional.learners import Learner
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.functional.tensors import as_tensor

DIGITS, DIGIT = (torch.tensor(each) for each in load_digits(return_X_y=True))
SIZES = {"multiclass": 3, "binary": 1, "regression": 2}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


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


def steps(num_samples: int, seed: int = 0, num_columns: int = 8) -> tuple[Tensor, Tensor]:
    """A table in which a threshold of one column makes the class, which a forest sees better than what is smooth."""
    x = torch.rand(num_samples, num_columns, generator=generator(seed))
    return x, ((x[:, 0] > 0.4) & (x[:, 1] < 0.8)).long()


@pytest.fixture
def no_forest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "_MAX_CELLS", 0)


# Left-out predictions


@pytest.mark.parametrize("leaf", [5, 15])
def test_a_forest_leaves_out_as_the_classifier_of_sklearn_does(leaf: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learners, "_LEAVES", (leaf,))
    x, y = sample(num_samples=90)[0].float(), torch.randint(2, (90,), generator=generator())

    def of_sklearn(trees: int, share: Any) -> tuple[float, Any]:
        options = {"max_features": share, "min_samples_leaf": leaf, "oob_score": True, "random_state": 0}
        forest = RandomForestClassifier(trees, **options).fit(x.numpy(), y.numpy())
        return float(np.square(forest.oob_decision_function_ - np.eye(2)[y]).mean()), forest

    share = min(("sqrt", 0.5, 1.0), key=lambda share: of_sklearn(15, share)[0])
    forest = of_sklearn(40, share)[1]
    found = learners._fit_forest(x, one_hot(y).double(), TASKS["multiclass"])
    np.testing.assert_allclose(found.left_out, forest.oob_decision_function_, atol=1e-6)
    np.testing.assert_allclose(found.predict(x[:9]), forest.predict_proba(x[:9].numpy()), atol=1e-6)
    assert found.score == pytest.approx(float(np.square(forest.oob_decision_function_ - np.eye(2)[y]).sum(1).mean()))


@pytest.mark.usefixtures("no_forest")
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
    clip = TASKS[task].clip
    fitted = fit_reference(x, y, task)
    torch.testing.assert_close(fitted.predictions(new), clip(torch.tensor(q)), rtol=1e-5, atol=1e-5)
    score = float(TASKS[task].distances(clip(torch.tensor(left_out)), torch.tensor(y)).mean())
    assert (fitted.learner, fitted.features, fitted.score) == ("ridge", name, pytest.approx(score, rel=1e-4))


def test_the_lower_left_out_score_decides() -> None:
    x, _, _ = sample("regression", 120)
    for inputs, y, task, name in ((x, x[:, :1] + x[:, 1:2], "regression", "ridge"), (*steps(300), "binary", "forest")):
        found, labels = fit_reference(inputs, y, task), y.double().reshape(len(y), -1)
        both = [fit(inputs, labels, TASKS[task]).score for fit in (learners._fit_ridge, learners._fit_forest)]
        assert found.learner == name and found.score == pytest.approx(min(both), rel=0.05)


@pytest.mark.parametrize("task", SIZES)
def test_what_it_says_of_itself_is_what_sklearn_says_of_its_left_out_predictions(task: str) -> None:
    x, y, _ = sample(task, num_samples=60)
    found = fit_reference(x, y, task)
    p, labels, factor = found.left_out.numpy(), found.labels.numpy(), 3 if task == "multiclass" else 1
    scores = [factor * mean_squared_error(labels, each) for each in (p, labels.mean(0) + 0 * p)]
    assert (found.score, found.chance, found.skill) == pytest.approx((*scores, 1 - scores[0] / scores[1]))
    assert found.num_samples == 60 and found.shares.tolist() == pytest.approx(y.mean(0).tolist())
    of_classes = found.accuracy, found.auroc, found.majority, found.unexplained
    if task == "regression":
        assert all(map(math.isnan, of_classes))
        return
    q, classes = (p, labels.argmax(1)) if task == "multiclass" else (np.append(1 - p, p, 1), labels[:, 0])
    area = roc_auc_score(classes, p if task == "multiclass" else p[:, 0], multi_class="ovr")
    expected = accuracy_score(classes, q.argmax(1)), area, np.bincount(classes.astype(int)).max() / 60
    assert of_classes == pytest.approx((*expected, unexplained_share(found.left_out, found.labels)))


def test_new_samples_are_predicted_as_probabilities_classes_and_targets() -> None:
    x, y, new = sample("multiclass")
    found = fit_reference(x, y)
    assert found.predictions(new).shape == (7, 3) and torch.equal(found.predict_proba(new), found.predictions(new))
    torch.testing.assert_close(found.predictions(new).sum(1), torch.ones(7).double())
    assert torch.equal(found.predict(new), found.predictions(new).argmax(1))
    x, y, new = sample("binary")
    found = fit_reference(x, y, "binary")
    q = found.predictions(new)
    assert q.shape == (7, 1) and torch.equal(found.predict_proba(new), torch.cat([1 - q, q], 1))
    assert torch.equal(found.predict(new), (q[:, 0] > 0.5).long())
    for size, shape in ((1, (7,)), (2, (7, 2))):
        x, y, new = sample("regression")
        found = fit_reference(x, y[:, :size], "regression")
        assert found.predict(new).shape == shape and found.predictions(new).shape == (7, size)
    with pytest.raises(AttributeError, match="no probabilities: use `predict`"):
        found.predict_proba(new)


# Other estimators


def test_an_estimator_takes_the_place_of_both_learners_and_stays_as_it_is() -> None:
    x, y, new = sample(num_samples=60)
    model = make_pipeline(StandardScaler(), LogisticRegression())
    found = fit_reference(x, y, estimator=model)
    assert not hasattr(model[1], "coef_") and (found.learner, found.features) == ("Pipeline", "columns")
    expected = model.fit(x.numpy(), y.argmax(1).numpy()).predict_proba(new.numpy())
    np.testing.assert_allclose(found.predict_proba(new), expected, atol=1e-4)
    in_sample = model.predict_proba(x.numpy())
    assert found.score > np.square(in_sample - y.numpy()).sum(1).mean() and found.is_trusted


def test_the_folds_of_an_estimator_have_samples_from_everywhere() -> None:
    x = torch.rand(500, 1, generator=generator())
    assert fit_reference(x, (8 * x[:, 0]).long() % 2, estimator=KNeighborsClassifier()).accuracy > 0.95
    assert fit_reference(x, 8 * x[:, 0], "regression", estimator=KNeighborsRegressor()).skill > 0.99


@pytest.mark.parametrize("num_classes", [1, 30, 60])
def test_of_few_samples_of_each_class_an_estimator_has_fewer_folds(num_classes: int) -> None:
    x, y = torch.rand(60, 2, generator=generator()), torch.arange(60) % num_classes
    found = fit_reference(x, y, estimator=GaussianNB())
    assert found.left_out.shape == (60, max(2, num_classes)) and found.predict_proba(x).isfinite().all()


def test_of_many_classes_fewer_samples_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_MAX_LABELS", 600)
    x, y = torch.rand(90, 2, generator=generator()), torch.arange(90) % 20
    assert fit_reference(x, y).num_samples == 30 and fit_reference(x, y % 2).num_samples == 90


@pytest.mark.parametrize("num_targets", [1, 2])
def test_a_regressor_is_fitted_to_targets(num_targets: int) -> None:
    x, y, new = sample("regression", num_samples=40)
    found = fit_reference(x, y[:, :num_targets], "regression", estimator=LinearRegression())
    expected = LinearRegression().fit(x.numpy(), y[:, :num_targets].numpy()).predict(new.numpy())
    np.testing.assert_allclose(found.predictions(new), expected)


def test_an_estimator_knows_classes_without_a_sample_and_two_classes_of_one_output() -> None:
    x, y, new = sample("binary", num_samples=40)
    q = GaussianNB().fit(x.numpy(), y[:, 0].numpy()).predict_proba(new.numpy())
    np.testing.assert_allclose(fit_reference(x, y, "binary", estimator=GaussianNB()).predict_proba(new), q, atol=1e-5)
    gaps = fit_reference(x, one_hot(3 * y[:, 0].long(), 6).float(), estimator=GaussianNB())
    np.testing.assert_allclose(gaps.predict_proba(new), np.insert(q, [1, 1, 2, 2], 0, axis=1), atol=1e-5)


# What does not matter

INPUTS: dict[str, Tensor] = {
    "vectors": torch.randn(300, 6, generator=generator()),
    "images": torch.randint(256, (300, 2, 9, 9), generator=generator(), dtype=torch.uint8),
    "signals": torch.randn(300, 1, 24, generator=generator()),
    "tokens": torch.randint(-1, 30, (300, 8), generator=generator()),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_the_order_of_samples_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "MAX_SAMPLES", dict.fromkeys(INPUTS, 120))
    monkeypatch.setattr(learners, "_PART", 60)
    inputs, labels = INPUTS[kind], INPUTS[kind].flatten(1).double().sum(1)
    labels = (labels > labels.median()).long()
    order = torch.randperm(200, generator=generator(1))
    first = fit_reference(inputs[:200], labels[:200])
    second = fit_reference(inputs[:200][order], labels[:200][order])
    both = [each.predictions(inputs[200:]) for each in (first, second)]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-6)
    assert (first.kind, first.num_samples) == (kind, 120) and first.skill == pytest.approx(second.skill)


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-9, 0.1, 1e9]), shift=st.sampled_from([0.0, 1.0, 100.0]))
@settings(max_examples=8, deadline=None)
def test_units_and_origin_of_features_and_targets_do_not_matter(seed: int, scale: float, shift: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "_MAX_CELLS", 0)  # a forest rounds to single precision, so that a split may move
        x, y, new = sample("regression", seed=seed)
        expected = fit_reference(x, y, "regression").predictions(new)
        moved = fit_reference(scale * (x + shift), scale * (y + shift), "regression")
    q = moved.predictions(scale * (new + shift)) / scale - shift
    torch.testing.assert_close(q, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("no_forest")
def test_arrays_tables_and_lists_are_as_good_as_tensors() -> None:
    x, y, new = sample("regression", num_samples=12)
    expected = fit_reference(x, y[:, 0], "regression").predictions(new)
    for convert in (np.asarray, pd.DataFrame, Tensor.tolist):
        convert = convert if convert is Tensor.tolist else lambda each, made=convert: made(each.numpy())
        found = fit_reference(convert(x), convert(y[:, :1]), "regression").predictions(convert(new))
        torch.testing.assert_close(found, expected)
    mixed = pd.DataFrame({"a": [0.5, 1.5] * 6, "b": [True, False, False] * 4})  # as by `get_dummies`
    assert torch.equal(as_tensor("inputs", mixed), torch.tensor(mixed.to_numpy(float)))
    integers = pd.DataFrame({"a": range(12), "b": [5, 7] * 6})
    found = fit_reference(integers, y[:, 0], "regression")
    assert torch.equal(found.predict(integers), found.predict(integers.to_numpy(float)))
    classes = fit_reference(x, [True, False] * 6).predictions(new)
    torch.testing.assert_close(classes, fit_reference(x, torch.tensor([1, 0] * 6)).predictions(new))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_give_what_their_numbers_give_in_64_bits(dtype: torch.dtype) -> None:
    x, y, new = (each.to(dtype) for each in sample(num_samples=40))
    found = fit_reference(x, y).predictions(new)
    torch.testing.assert_close(found, fit_reference(x.double(), y.double()).predictions(new.double()))


@pytest.mark.usefixtures("no_forest")
def test_classes_may_be_one_hot_and_soft_labels_are_targets() -> None:
    x, y, new = sample(num_samples=40)
    found = fit_reference(x, y).predictions(new)
    for labels in (y.argmax(1), y.argmax(1).to(torch.uint8), y.long(), y.float()):
        torch.testing.assert_close(fit_reference(x, labels).predictions(new), found)
    soft, unused = 0.5 * y + 0.5 / 3, torch.zeros(40, 2)
    half = fit_reference(x, torch.cat([soft, unused], 1))
    torch.testing.assert_close(half.labels[:, :3].sort(0).values, soft.sort(0).values, rtol=1e-6, atol=1e-6)
    q = half.predictions(new)  # ridge regression is linear in its labels
    torch.testing.assert_close(q[:, :3], 0.5 * found + 0.5 / 3, rtol=0, atol=0.06)
    assert not q[:, 3:].any()


class Drawing(LinearRegression):
    """Its predictions have noise from all global streams."""

    def fit(self, x: Any, y: Any) -> Any:
        self.noise_ = float(torch.rand(()) + np.random.rand() + random.random())
        return super().fit(x, y)

    def predict(self, x: Any) -> Any:
        return super().predict(x) + self.noise_


def test_global_random_numbers_are_left_alone_and_the_same_in_every_call() -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    fit_reference(DIGITS.reshape(-1, 1, 8, 8)[:60], DIGIT[:60])
    x, y = steps(60)
    fit_reference(x, y)
    found = [fit_reference(x, y.float(), "regression", estimator=Drawing()) for _ in range(2)]
    assert torch.equal(found[0].left_out, found[1].left_out) and torch.equal(found[0].predict(x), found[1].predict(x))
    assert torch.equal(torch.get_rng_state(), states[0]) and (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


# What it sees


def test_of_digits_it_learns_most_and_more_with_more_samples() -> None:
    images = DIGITS.reshape(-1, 1, 8, 8)
    few, many = (fit_reference(images[:size], DIGIT[:size]) for size in (120, 500))
    accuracies = [accuracy_score(DIGIT[1200:], each.predict(images[1200:])) for each in (few, many)]
    assert 0.85 < accuracies[0] < accuracies[1] and accuracies[1] > 0.95
    assert few.score > many.score and many.is_trusted and many.accuracy == pytest.approx(accuracies[1], abs=0.04)


def test_it_sees_a_shape_anywhere_in_images_and_signals() -> None:
    places, labels = torch.randint(16, (200,), generator=generator()), torch.arange(200) % 2
    signals = 0.3 * torch.randn(200, 1, 40, generator=generator(1))
    images = 0.3 * torch.randn(200, 1, 20, 20, generator=generator(2))
    for signal, image, place, label in zip(signals, images, places.tolist(), labels.tolist(), strict=True):
        signal[0, place : place + 20] += torch.arange(20) % 4 - 1.5 if label else 1.5 - torch.arange(20) % 4
        stripes = (torch.arange(8) % 2 * 2.0 - 1).expand(8, 8)
        image[0, place % 12 : place % 12 + 8, place // 2 : place // 2 + 8] += stripes if label else stripes.T
    for inputs in (signals, images):
        found = fit_reference(inputs, labels)
        assert found.features == "patches" and found.skill > 0.8


def test_categories_as_integers_are_seen_by_a_forest_also_as_a_column_beside_numbers() -> None:
    codes = torch.randint(6, (300, 3), generator=generator())
    found = fit_reference(codes, (codes[:, 0] % 2) ^ (codes[:, 2] > 4).long())
    assert (found.kind, found.learner, found.features) == ("tokens", "forest", "columns") and found.skill > 0.6
    numbers, codes = torch.randn(300, 2, generator=generator()), torch.randint(8, (300, 1), generator=generator(1))
    labels = (codes[:, 0] % 2) ^ (numbers[:, 0] > 1).long()
    assert fit_reference(torch.cat([numbers, codes.float()], 1), labels).skill > 0.5


@pytest.mark.parametrize("what", ["images", "signals", "texts", "categories"])
def test_inputs_of_other_sizes_are_fitted_to_those_that_it_knows(what: str) -> None:
    images, ids = DIGITS.reshape(-1, 1, 8, 8)[:60].float(), torch.randint(9, (60, 6), generator=generator())
    known, labels, other = {
        "images": (images, DIGIT[:60], images.repeat_interleave(20, 2).repeat_interleave(20, 3)),
        "signals": (images[:, 0], DIGIT[:60], pad(images[:, 0], (0, 5))),
        "texts": (ids, (ids == 3).any(1).long(), pad(ids, (0, 2), value=-1)),
        "categories": (ids, ids[:, 0] % 2, pad(ids, (0, 2), value=-1)),
    }[what]
    found = fit_reference(known, labels)
    torch.testing.assert_close(found.predictions(other), found.predictions(known), rtol=1e-4, atol=1e-4)
    assert found.predictions(known[..., :5]).isfinite().all()


@pytest.mark.parametrize("what", [*INPUTS, "words", "an estimator", "three samples"])
def test_it_can_be_saved(what: str) -> None:
    x = INPUTS.get("tokens" if what == "words" else what, INPUTS["vectors"])[: 3 if what == "three samples" else 60]
    x = x + 1000 if what == "words" else x  # too many for columns
    found = fit_reference(x, DIGIT[: len(x)] % 2, estimator=GaussianNB() if what == "an estimator" else None)
    assert torch.equal(pickle.loads(pickle.dumps(found)).predictions(x), found.predictions(x))


def test_new_samples_are_predicted_a_few_at_a_time_and_there_may_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for x, y in (steps(60), (DIGITS.reshape(-1, 1, 8, 8)[:60], DIGIT[:60]), (INPUTS["tokens"][:60], DIGIT[:60])):
        found = fit_reference(x, y)
        monkeypatch.setattr(reference, "_CHUNK", 500)
        expected = found.predictions(x)
        monkeypatch.setattr(reference, "_CHUNK", 7)
        torch.testing.assert_close(found.predictions(x), expected)
        assert found.predictions(x[:0]).shape == (0, expected.shape[1])


# Samples that come repeatedly


def noisy_table(seed: int = 0) -> tuple[Tensor, Tensor]:
    """300 different rows, of whose labels 39 % are wrong."""
    x = torch.randn(300, 5, generator=generator(seed))
    right = (x[:, 0] + 0.5 * x[:, 1] > 0).long()
    return x, right ^ (torch.rand(300, generator=generator(seed + 1)) < 0.39).long()


REPEATED = {
    "5 times": torch.arange(300).repeat(5),
    "drawn with replacement": torch.randint(300, (3000,), generator=generator(3)),
    "some often": torch.multinomial((torch.arange(300) % 10 + 0.1), 3000, replacement=True, generator=generator(3)),
}


@pytest.mark.parametrize("how", REPEATED)
@pytest.mark.parametrize("num_contradictions", [0, 1, 30])
def test_samples_that_come_repeatedly_count_once(how: str, num_contradictions: int) -> None:
    x, y = noisy_table()
    rows = REPEATED[how]
    labels = y[rows]
    labels[:num_contradictions] = 1 - labels[:num_contradictions]
    once, found = fit_reference(x, y), fit_reference(x[rows], labels)
    assert found.num_samples == len(torch.unique(rows)) <= 300
    assert found.skill < 0.3 and found.skill == pytest.approx(once.skill, abs=0.06)
    assert found.unexplained > 0.1


def test_labels_of_equal_samples_are_averaged() -> None:
    x, y = noisy_table()
    found = fit_reference(torch.cat([x, x[:200]]), torch.cat([y, 1 - y[:200]]))
    counts = torch.unique(found.labels[:, 0], return_counts=True)
    assert counts[0].tolist() == [0, 0.5, 1] and counts[1][1] == 200 and found.num_samples == 300


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_a_table_of_few_categories_keeps_its_frequencies(noise: float) -> None:
    """Different people have the same columns: four kinds of rows, of which each comes a hundred times."""
    kinds = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    which = torch.multinomial(torch.tensor([0.55, 0.15, 0.15, 0.15]), 400, replacement=True, generator=generator())
    labels = (kinds[which, 0] != kinds[which, 1]).long()
    wrong = torch.rand(400, generator=generator(1)) < noise
    labels = labels ^ wrong.long()
    found = fit_reference(kinds[which], labels)
    assert found.num_samples == 400 and found.accuracy == pytest.approx(1 - noise, abs=0.05)
    assert found.shares[1] == pytest.approx(float(labels.double().mean()))


def test_equal_images_and_texts_with_other_labels_count_once() -> None:
    for kind in ("images", "signals", "tokens"):
        x = INPUTS[kind][:40]
        found = fit_reference(torch.cat([x, x]), torch.cat([torch.arange(40) % 2, torch.arange(40) % 3 % 2]))
        assert found.num_samples == 40


# Bounds


def test_each_learner_takes_as_many_samples_as_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = steps(200, num_columns=4)
    monkeypatch.setattr(learners, "_MIN_ROWS", 50)
    monkeypatch.setattr(learners, "_MAX_CELLS", 4 * 80)  # rows times columns of a forest
    assert len(learners._rows_for_forest(x, one_hot(y))) == 80
    monkeypatch.setattr(learners, "_MAX_TARGETS", 2 * 60)  # rows times classes
    assert len(learners._rows_for_forest(x, one_hot(y))) == 60
    monkeypatch.setattr(learners, "_MAX_TARGETS", 2 * 49)
    assert len(learners._rows_for_forest(x, one_hot(y))) == 0 and fit_reference(x, y).learner == "ridge"
    monkeypatch.setattr(learners, "_MAX_RIDGE_ROWS", 30)
    known = fit_reference(x, y)
    assert known.num_samples == 30 and torch.equal(known.labels, one_hot(y[known.rows]).double())


# Nothing to learn


def made(kind: str, skill: float, num_samples: int = 4000, task: str = "binary") -> Reference:
    """A reference of a skill, by left-out predictions that are wrong by as much."""
    labels = (torch.arange(num_samples) % 2)[:, None].double()
    left_out = labels + (1 - 2 * labels) * 0.5 * math.sqrt(1 - skill)
    learner = Learner("ridge", "columns", left_out, labels, lambda new: new, float((left_out - labels).square().mean()))
    return Reference(task, kind, torch.Size([num_samples, 3]), learner, torch.arange(num_samples))


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("skill", [-0.01, 0.0, 0.001, 0.049, 0.051])
def test_it_is_trusted_where_it_sees_enough(kind: str, skill: float) -> None:
    least = 0.0 if kind == "vectors" else 0.05
    found = made(kind, skill)
    assert found.skill == pytest.approx(skill) and found.is_trusted == (found.skill > least)


@pytest.mark.parametrize(("num_samples", "least"), [(4000, 0.01), (100, 0.015), (20, 0.075)])
def test_a_reference_that_has_learned_nothing_does_not_say_how_many_labels_are_wrong(
    num_samples: int, least: float
) -> None:
    for skill, is_known in ((least - 0.001, False), (least + 0.001, True)):
        assert math.isnan(made("vectors", skill, num_samples).unexplained) != is_known


def test_permuted_labels_have_no_skill_and_unknown_noise() -> None:
    for seed in range(2):
        x, y, _ = sample(num_samples=200, seed=seed)
        order = torch.randperm(200, generator=generator(seed))
        permuted = fit_reference(x, y[order])
        assert permuted.skill < 0.02 and (permuted.skill > 0.01 or math.isnan(permuted.unexplained))


ONE_HOT = torch.eye(3)[[0, 1, 2, 0, 1, 2]]
DEGENERATE: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "one sample": (torch.rand(1, 3), ONE_HOT[:1], torch.rand(4, 3)),
    "one class": (torch.rand(6, 3), ONE_HOT[:1].expand(6, 3), torch.rand(4, 3)),
    "constant features": (torch.full((6, 3), 0.1), ONE_HOT, torch.full((4, 3), 0.1)),
    "constant features, others of new samples": (torch.zeros(6, 3), ONE_HOT, torch.rand(4, 3)),
    "images of one color": (torch.ones(6, 3, 8, 8), ONE_HOT, torch.rand(4, 3, 8, 8)),
    "texts of padding": (torch.full((6, 3), -1), ONE_HOT, torch.ones(4, 5).long()),
}


@pytest.mark.parametrize("what", DEGENERATE)
def test_what_holds_nothing_to_learn_gives_the_shares(what: str) -> None:
    x, y, new = DEGENERATE[what]
    found = fit_reference(x, y)
    torch.testing.assert_close(found.predictions(new), y.double().mean(0).expand(4, 3), atol=0.02, rtol=0)
    assert found.skill <= 1e-9 and not found.is_trusted and math.isnan(found.unexplained)
    assert math.isnan(found.auroc) == (found.majority == 1)
    alike = fit_reference(x, torch.zeros(len(x)).long())
    assert (alike.accuracy, alike.majority) == (1, 1) and alike.predict_proba(new).shape == (4, 2)


def test_texts_of_other_words_each_and_a_sample_far_away_have_finite_predictions() -> None:
    texts = torch.arange(60 * 4).reshape(60, 4) + 2000
    assert fit_reference(texts, torch.arange(60) % 2).predictions(texts + 9).isfinite().all()
    x, y = steps(60)
    assert fit_reference(x, y).predictions(torch.full((1, 8), 1e30)).isfinite().all()


# What is refused

X, Y, NAN = torch.rand(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.full((6, 3), math.nan)
SHAPES = r"`inputs` \(N, \.\.\.\) and `labels` .* but got"
BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "inputs of nan": ("`inputs` to be finite", (NAN, Y)),
    "no samples": (SHAPES + r" \(0, 3\) and \(0,\)", (X[:0], Y[:0])),
    "fewer labels": (SHAPES + r" .*\(5,\)", (X, Y[:5])),
    "a number": (SHAPES + r" \(\)", (X[0, 0], Y)),
    "classes as floats": (r"`labels` to be class indices .*task='binary'", (X, Y.float())),
    "a column of classes": (r"`labels` to be class indices .*\(6, 1\)", (X, Y[:, None])),
    "negative classes": ("labels from 0 to 3, .* got -1 to 3", (X, 2 * Y - 1)),
    "labels of nan": ("`labels` to be finite", (X, NAN)),
    "a binary matrix": ("one label per output.* Leave `task` out", (X, X, "binary")),
    "ignored labels": ("at least one label in `labels` that is not -100", (X, 0 * Y - 100)),
    "strings": ("`labels` to be real numbers.*factorize", (X, ["a", "b"] * 3)),
    "rows of several lengths": ("`inputs` to be numbers in rows of one length", ([[1, 2], [3]], Y)),
    "another task": ("`task` to be one of", (X, Y, "multilabel")),
}


@pytest.mark.parametrize("what", BAD)
def test_what_it_can_not_learn_from_is_refused_by_name(what: str) -> None:
    message, arguments = BAD[what]
    with pytest.raises(ValueError, match=f"Expected {message}"):
        fit_reference(*arguments)


OTHERS: dict[str, tuple[str, Any]] = {
    "nan": ("to be finite", NAN),
    "other columns": (r"to be vectors \(M, 3\), but got vectors of shape \(2, 2\)", X[:2, :2]),
    "another kind": ("to be vectors .* but got images", torch.rand(2, 1, 8, 8)),
    "token ids": ("to be vectors .* but got tokens", Y.reshape(2, 3)),
}


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 8, 8), (3, 24)])
def test_images_and_signals_of_other_channels_are_not_predicted(shape: tuple[int, ...]) -> None:
    found = fit_reference(torch.rand(12, *shape), Y.repeat(2))
    with pytest.raises(ValueError, match=r"Expected `inputs` to be .* \(M, 3, "):
        found.predict(torch.rand(2, 1, *shape[1:]))


@pytest.mark.parametrize("what", OTHERS)
def test_inputs_of_another_kind_are_not_predicted(what: str) -> None:
    message, new = OTHERS[what]
    with pytest.raises(ValueError, match=f"Expected `inputs` {message}"):
        fit_reference(X, Y).predict(new)


def test_ignored_labels_are_left_out() -> None:
    x, y = steps(80)
    is_known = torch.arange(80) % 4 > 0
    found = fit_reference(x, y.where(is_known, -100))
    assert found.num_samples == 60
    torch.testing.assert_close(found.predictions(x), fit_reference(x[is_known], y[is_known]).predictions(x))
