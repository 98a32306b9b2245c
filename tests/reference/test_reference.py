"""What a reference predicts, and what it knows of itself."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import config_context
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_digits, load_iris
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.metrics import accuracy_score, mean_squared_error, r2_score, roc_auc_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.naive_bayes import GaussianNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor
from torch.nn.functional import one_hot, pad

from lightning_sensitivity import Reference
from lightning_sensitivity.functional.tasks import TASKS
from lightning_sensitivity.reference import learners, reference
from lightning_sensitivity.reference.calibration import Calibration, _unexplained, error_quantiles
from lightning_sensitivity.reference.kinds import KINDS
from lightning_sensitivity.reference.learners import Features, Learner
from lightning_sensitivity.reference.observations import Observations
from tests.reference.conftest import INPUTS, generator, steps
from tests.reference.test_learners import sample

DIGITS, DIGIT = (torch.tensor(each) for each in load_digits(return_X_y=True))
IMAGES = DIGITS.reshape(-1, 1, 8, 8)
IRIS, SPECIES = load_iris(return_X_y=True)
NAMES = load_iris().target_names[SPECIES]


# What it says


@pytest.mark.parametrize("task", ["multiclass", "binary", "regression"])
def test_what_it_says_of_itself_is_what_sklearn_says_of_its_left_out_predictions(task: str) -> None:
    x, y, _ = sample(task, num_samples=60)
    found = Reference(task).fit(x, y)
    p, labels, factor = found.left_out_, found.labels_, 3 if task == "multiclass" else 1
    score, of_chance = (factor * mean_squared_error(labels, each) for each in (p, labels.mean(0) + 0 * p))
    assert (found.score_, found.skill_) == pytest.approx((score, 1 - score / of_chance))
    assert found.num_samples_ == 60 and found.shares_[-1] == pytest.approx(float(y.mean(0)[-1]))
    of_classes = found.accuracy_, found.auroc_, found.majority_, found.unexplained_
    if task == "regression":
        assert all(map(math.isnan, of_classes)) and found.temperature_ == 1
        return
    classes = labels.argmax(1)
    area = roc_auc_score(classes, p if task == "multiclass" else p[:, 1], multi_class="ovr")
    expected = accuracy_score(classes, p.argmax(1)), area, np.bincount(classes).max() / 60
    assert of_classes == pytest.approx((*expected, _unexplained(*map(torch.as_tensor, (p, labels)))))
    assert str(found).startswith(f"Reference({found.learner_} on ") and not len(found.residuals_)


def test_new_samples_are_predicted_as_probabilities_classes_and_targets() -> None:
    for task in ("multiclass", "binary"):
        x, y, new = sample(task)
        found = Reference(task).fit(x, y)
        p = found.predict_proba(new)
        assert p.shape == (7, 3 if task == "multiclass" else 2)
        np.testing.assert_allclose(p.sum(1), 1)
        np.testing.assert_array_equal(found.predict(new), p.argmax(1))
    for size, shape in ((1, (7,)), (2, (7, 2))):
        x, y, new = sample("regression")
        found = Reference("regression").fit(x, y[:, :size])
        assert found.predict(new).shape == shape and found.predict_matrix(new).shape == (7, size)
        assert found.score(x, y[:, :size]) == pytest.approx(r2_score(y[:, :size], found.predict(x)))
    assert not hasattr(found, "predict_proba")


def test_errors_of_a_regression_have_quantiles_with_their_mean_square() -> None:
    x, noise = torch.rand(200, 3, generator=generator()), torch.randn(200, 2, generator=generator(1)).exp()
    found = Reference("regression", LinearRegression()).fit(x, 5 * x[:, :2] + noise)
    assert found.residuals_.shape == (20, 2)
    np.testing.assert_allclose(found.residuals_.mean(0), 0, atol=1e-9)
    np.testing.assert_allclose(np.square(found.residuals_).mean(0), np.square(found.left_out_ - found.labels_).mean(0))
    assert (found.residuals_[-1] > -2 * found.residuals_[0]).all()  # skewed, as the noise is
    many = error_quantiles(np.random.default_rng(0).normal(size=(20_001, 1)) * np.ones(300))
    assert many.shape == (20, 300) and many[-1, 0] == pytest.approx(2, abs=0.1)
    assert not error_quantiles(np.zeros((9, 2))).any()


# As scikit-learn's


@parametrize_with_checks([Reference(), Reference("regression")])
def test_it_passes_the_checks_of_sklearn(estimator: Reference, check: Any) -> None:
    check(estimator)


def in_a_grid(estimator: Reference) -> float:
    models = [DummyClassifier(), GaussianNB()]
    found = GridSearchCV(estimator, {"estimator": models}).fit(IRIS, NAMES)
    assert isinstance(found.best_params_["estimator"], GaussianNB)
    return float(found.best_score_)


USES: dict[str, Callable[[Reference], float]] = {
    "a copy": lambda each: clone(each).fit(IRIS, NAMES).score(IRIS, NAMES),
    "in a pipeline": lambda each: make_pipeline(StandardScaler(), each).fit(IRIS, NAMES).score(IRIS, NAMES),
    "in cross-validation": lambda each: cross_val_score(each, IRIS, NAMES).mean(),
    "in a grid": in_a_grid,
}


@pytest.mark.parametrize("use", USES)
def test_scikit_learn_uses_it_as_any_estimator(use: str) -> None:
    assert USES[use](Reference(estimator=GaussianNB())) > 0.9


@pytest.mark.parametrize("form", ["indices", "one-hot", "soft", "names"])
def test_its_accuracy_is_that_on_labels_in_any_form_but_for_unknown_ones(form: str) -> None:
    y = torch.from_numpy(SPECIES.copy())
    known = torch.arange(150) % 3 > 0
    labels: Any = {"indices": y, "names": NAMES}.get(form, one_hot(y, 3).float())
    labels = 0.9 * labels + 0.1 / 3 if form == "soft" else labels
    found = Reference(estimator=GaussianNB()).fit(IRIS, labels)
    expected = (found.predict_proba(IRIS).argmax(1) == SPECIES)[known].mean()
    if form != "names":
        labels = labels.where(known if form == "indices" else known[:, None], -100)
    else:
        labels = np.where(known, NAMES.astype(object), -100)
    assert 1 > found.score(IRIS, labels) == pytest.approx(expected)


def test_its_score_leaves_out_what_is_unknown_of_several_answers() -> None:
    x, y, _ = sample("regression")
    found = Reference("regression", LinearRegression()).fit(x, y)
    some = y.clone()
    some[:9, 0] = some[4:20, 1] = torch.nan
    rows = [~some[:, column].isnan() for column in range(y.shape[1])]
    p = found.predict(x)
    expected = np.mean([r2_score(y[each, column], p[each, column]) for column, each in enumerate(rows)])
    assert found.score(x, some) == pytest.approx(expected)
    assert found.score(x[:1].expand(4, -1), y[:1].expand(4, -1)) <= 1  # of equal targets, too
    bits = torch.stack([y[:, 0] > y[:, 0].median(), y[:, 1] > 0], 1).double()
    of_bits = Reference("multilabel", KNeighborsClassifier()).fit(x, bits)
    right = torch.from_numpy(of_bits.predict(x)) == bits
    assert of_bits.score(x, bits.where(~some[:, :2].isnan(), torch.nan)) == pytest.approx(
        float(right[~some[:, :2].isnan()].double().mean())
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.uint16])
def test_ids_of_few_bits_are_the_same_texts(dtype: torch.dtype) -> None:
    ids = torch.randint(200, 256, (80, 6), generator=generator())
    found = Reference().fit(ids, ids[:, 0] % 2)
    for some in (ids, ids[:, :4]):  # shorter ones are padded
        np.testing.assert_array_equal(found.predict_proba(some.to(dtype)), found.predict_proba(some))


LABELS: dict[str, tuple[Any, Any]] = {
    "names of a categorical column": (pd.Series(NAMES).astype("category"), NAMES),
    "whole numbers": (SPECIES.astype(float), SPECIES),
    "integers far apart": (SPECIES * 1_000_000 - 7, SPECIES * 1_000_000 - 7),
    "bytes": (torch.tensor(SPECIES).byte(), SPECIES),
    "a nullable series": (pd.Series(SPECIES, dtype="Int64"), SPECIES),
    "one-hot integers": (np.eye(3, dtype=int)[SPECIES], SPECIES),
    "one-hot floats with another class": (torch.eye(5)[SPECIES], SPECIES),
}


@pytest.mark.usefixtures("no_forest")
@pytest.mark.parametrize("what", LABELS)
def test_classes_may_have_any_names(what: str) -> None:
    labels, names = LABELS[what]
    found, expected = Reference().fit(IRIS, labels), Reference().fit(IRIS, SPECIES)
    assert (found.predict(IRIS) == names).mean() > 0.95 and len(found.classes_) == (5 if "another" in what else 3)
    np.testing.assert_allclose(found.left_out_[:, :3], expected.left_out_, atol=1e-4)


def test_a_data_frame_also_within_a_mapping_has_names_and_flags() -> None:
    frame = pd.DataFrame(IRIS, columns=list("abcd")).assign(flag=IRIS[:, 0] > 5)
    both, others = ({"columns": each, "tokens": SPECIES[:, None]} for each in (frame, frame[frame.columns[::-1]]))
    for x, other in ((frame, others["columns"]), (both, others)):
        found = Reference().fit(x, NAMES)
        assert [*found.feature_names_in_] == [*"abcd", "flag"] and found.score(x, NAMES) > 0.95
        with pytest.raises(ValueError, match="Feature names must be in the same order"):
            found.predict(other)


@pytest.mark.parametrize("what", [*INPUTS, "words", "numbers beside texts", "an estimator"])
def test_it_can_be_saved(what: str) -> None:
    x: Any = INPUTS.get(what, INPUTS["columns"])[:60]
    if what == "words":
        x = INPUTS["tokens"][:60] + 1000  # too many for columns
    if what == "numbers beside texts":
        x = {"columns": x, "tokens": INPUTS["tokens"][:60]}
    found = Reference(estimator=GaussianNB() if what == "an estimator" else None).fit(x, DIGIT[:60] % 2)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(found)).predict_proba(x), found.predict_proba(x))


# Calibration


def real(name: str) -> tuple[Any, Any]:
    if name == "digits":
        return IMAGES.float(), DIGIT
    table = load_breast_cancer()
    rows = torch.randperm(len(table.data), generator=generator())
    return torch.tensor(table.data)[rows], torch.tensor(table.target)[rows]


@pytest.mark.parametrize("redrawn", [0.0, 0.2])
@pytest.mark.parametrize("name", ["digits", "a table"])
def test_it_is_right_as_often_as_it_says(name: str, redrawn: float) -> None:
    """Of left-out labels, and of new ones that are as noisy."""
    x, y = real(name)
    y = y.where(torch.rand(len(y), generator=generator()) >= redrawn, y[torch.randperm(len(y), generator=generator())])
    found = Reference().fit(x[:300], y[:300])
    assert found.left_out_.max(1).mean() == pytest.approx(found.accuracy_, abs=0.035)
    p = found.predict_proba(x[300:])
    assert p.max(1).mean() == pytest.approx((p.argmax(1) == y[300:].numpy()).mean(), abs=0.06)
    assert found.temperature_ < 1 or redrawn


# What does not matter


@pytest.mark.parametrize("kind", INPUTS)
def test_the_order_of_samples_does_not_matter(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KINDS[kind], "most_of", lambda x: 120)
    monkeypatch.setattr(learners, "_PART", 60)
    inputs, labels = INPUTS[kind], INPUTS[kind].flatten(1).double().sum(1)
    labels = (labels > labels.median()).long()
    order = torch.randperm(200, generator=generator(1))
    first = Reference().fit(inputs[:200], labels[:200])
    second = Reference().fit(inputs[:200][order], labels[:200][order])
    np.testing.assert_allclose(*(each.predict_proba(inputs[200:]) for each in (first, second)), rtol=1e-5, atol=1e-6)
    assert (first.kind_, first.num_samples_, first.score_) == (kind, 120, second.score_)


@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-9, 0.1, 1e9]), shift=st.sampled_from([0.0, 1.0, 100.0]))
@settings(max_examples=8, deadline=None)
def test_units_and_origin_of_features_and_targets_do_not_matter(seed: int, scale: float, shift: float) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "_MAX_CELLS", 0)  # a forest rounds to single precision, so that a split may move
        x, y, new = sample("regression", seed=seed)
        plain = Reference("regression").fit(x, y)
        moved = Reference("regression").fit(scale * (x + shift), scale * (y + shift))
    predicted = moved.predict(scale * (new + shift)) / scale - shift
    np.testing.assert_allclose(predicted, plain.predict(new), rtol=1e-4, atol=1e-4)
    assert moved.skill_ == pytest.approx(plain.skill_, abs=1e-4)
    assert moved.inputs_tell_nothing_ == plain.inputs_tell_nothing_


@pytest.mark.filterwarnings("error")
def test_it_is_the_same_where_scikit_learn_makes_data_frames() -> None:
    x, y, new = sample("regression")
    with config_context(transform_output="pandas"):
        framed = Reference("regression").fit(x, y).predict(new)
    np.testing.assert_array_equal(framed, Reference("regression").fit(x, y).predict(new))


@pytest.mark.usefixtures("no_forest")
def test_arrays_tables_and_lists_are_as_good_as_tensors() -> None:
    x, y, new = sample("regression", num_samples=12)
    expected = Reference("regression").fit(x, y[:, 0]).predict(new)
    for convert in (np.asarray, pd.DataFrame, np.ndarray.tolist, np.asfortranarray):
        found = Reference("regression").fit(*(convert(each.numpy()) for each in (x, y[:, :1])))
        np.testing.assert_allclose(found.predict(convert(new.numpy())), expected)
    integers = pd.DataFrame({"a": range(12), "b": [5, 7] * 6})  # columns, where an array would be token ids
    assert Reference("regression").fit(integers, y[:, 0]).kind_ == "columns"
    assert Reference("regression").fit(x[:, :1], y[:, 0]).n_features_in_ == 1
    found = Reference("regression").fit(10 * x.numpy()[::-1], y[:, 0].numpy()[::-1])  # of negative strides
    np.testing.assert_allclose(found.predict(new.round().long()), found.predict(new.round()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_give_what_their_numbers_give_in_64_bits(dtype: torch.dtype) -> None:
    x, y, new = (each.to(dtype) for each in sample(num_samples=40))
    expected = Reference().fit(x.double(), y.double()).predict_proba(new.double())
    np.testing.assert_allclose(Reference().fit(x, y).predict_proba(new), expected)


def test_soft_labels_are_targets_and_ignored_ones_are_left_out() -> None:
    x, y, _ = sample(num_samples=40)
    soft = Reference().fit(x, 0.5 * y + 0.5 / 3)
    np.testing.assert_allclose(np.sort(soft.labels_, 0), np.sort(0.5 * y + 0.5 / 3, 0))
    x, y = steps(80)
    is_known = torch.arange(80) % 4 > 0
    expected = Reference().fit(x[is_known], y[is_known]).predict_proba(x)
    for labels in (y.where(is_known, -100), one_hot(y).float().where(is_known[:, None], -100.0)):
        found = Reference().fit(x, labels)
        assert found.num_samples_ == 60 and (found.rows_ % 4 > 0).all()
        np.testing.assert_allclose(found.predict_proba(x), expected)


# What it sees


def test_of_digits_it_learns_most_and_more_with_more_samples() -> None:
    few, many = (Reference().fit(IMAGES[:size], DIGIT[:size]) for size in (120, 500))
    accuracies = [each.score(IMAGES[1200:], DIGIT[1200:]) for each in (few, many)]
    assert 0.85 < accuracies[0] < accuracies[1] and accuracies[1] > 0.95
    assert few.score_ > many.score_ and many.is_trusted_ and many.accuracy_ == pytest.approx(accuracies[1], abs=0.04)


def test_it_sees_a_shape_anywhere_in_images_and_signals() -> None:
    places, labels = torch.randint(16, (200,), generator=generator()), torch.arange(200) % 2
    signals = 0.3 * torch.randn(200, 1, 40, generator=generator(1))
    images = 0.3 * torch.randn(200, 1, 20, 20, generator=generator(2))
    for signal, image, place, label in zip(signals, images, places.tolist(), labels.tolist(), strict=True):
        signal[0, place : place + 20] += torch.arange(20) % 4 - 1.5 if label else 1.5 - torch.arange(20) % 4
        stripes = (torch.arange(8) % 2 * 2.0 - 1).expand(8, 8)
        image[0, place % 12 : place % 12 + 8, place // 2 : place // 2 + 8] += stripes if label else stripes.T
    for inputs in (signals, images):
        found = Reference().fit(inputs, labels)
        assert found.features_ == "patches" and found.skill_ > 0.8


def test_categories_as_integers_are_seen_by_a_forest_also_as_a_column_beside_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(learners, "_PART", 300)
    codes = torch.randint(6, (300, 3), generator=generator())
    found = Reference().fit(codes, (codes[:, 0] % 2) ^ (codes[:, 2] > 4).long())
    assert (found.kind_, found.learner_, found.features_) == ("tokens", "forest", "columns") and found.skill_ > 0.6
    numbers, codes = torch.randn(300, 2, generator=generator()), torch.randint(8, (300, 1), generator=generator(1))
    labels = (codes[:, 0] % 2) ^ (numbers[:, 0] > 1).long()
    assert Reference().fit(torch.cat([numbers, codes.float()], 1), labels).skill_ > 0.5


def test_numbers_beside_texts_or_images_are_seen_together() -> None:
    """Neither tells the class: it is whether a number, and a word or the digit, agree."""
    numbers, ids = (
        torch.randn(400, 3, generator=generator()),
        torch.randint(1000, 3000, (400, 6), generator=generator()),
    )
    ids[:, 2] = torch.arange(400) % 2
    for other, sign in (({"tokens": ids}, ids[:, 2]), ({"images": IMAGES[:400].float()}, (DIGIT[:400] > 4).long())):
        labels = sign ^ (numbers[:, 0] > 0).long()
        alone = [Reference().fit(x, labels).skill_ for x in ({"columns": numbers}, other)]
        found = Reference().fit({"columns": numbers, **other}, labels)
        assert found.features_.startswith("columns and ") and found.skill_ > 0.15 + max(alone)
        assert found.kind_ == ", ".join(["columns", *other]) and found.predict_proba(
            {"columns": numbers, **other}
        ).shape == (400, 2)
    frame = {"columns": pd.DataFrame(numbers.numpy()), "tokens": ids.numpy()}
    by_columns = Reference().fit(frame, (numbers[:, 0] > 0.3).long())
    assert (by_columns.learner_, by_columns.features_) == ("forest", "columns") and by_columns.skill_ > 0.9


@pytest.mark.parametrize("what", ["images", "signals", "texts", "categories"])
def test_inputs_of_other_sizes_are_fitted_to_those_that_it_knows(what: str) -> None:
    images, ids = IMAGES[:60].float(), torch.randint(9, (60, 6), generator=generator())
    known, labels, other = {
        "images": (images, DIGIT[:60], images.repeat_interleave(20, 2).repeat_interleave(20, 3)),
        "signals": (images[:, 0], DIGIT[:60], pad(images[:, 0], (0, 5))),
        "texts": (ids + 2000, (ids == 3).any(1).long(), pad(ids + 2000, (0, 2), value=-1)),
        "categories": (ids, ids[:, 0] % 2, pad(ids, (0, 2), value=-1)),
    }[what]
    found = Reference().fit(known, labels)
    np.testing.assert_allclose(found.predict_proba(other), found.predict_proba(known), rtol=1e-3, atol=1e-4)
    assert np.isfinite(found.predict_proba(known[..., :5])).all()


def test_new_samples_are_predicted_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Reference().fit(IMAGES[:60], DIGIT[:60])
    expected = found.predict_proba(IMAGES[:60])
    monkeypatch.setattr(reference, "_CHUNK", 7)
    np.testing.assert_allclose(found.predict_proba(IMAGES[:60]), expected, rtol=1e-5, atol=1e-7)


# Nothing to learn


def made(kind: str, skill: float, num_samples: int = 4000) -> Reference:
    """A reference of a skill, by left-out predictions that are wrong by as much."""
    found, task = Reference(), TASKS["multiclass"]
    labels = one_hot(torch.arange(num_samples) % 2).double()
    known = Observations({}, labels)
    left_out = labels + (1 - 2 * labels) * 0.5 * math.sqrt(1 - skill)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learners, "calibrate", lambda p, y, task, groups: Calibration(task))
        learner = Learner("ridge", Features({}, {kind: torch.zeros(1, 3)}), None, left_out.numpy(), known, task)
    found._describe(learner, torch.arange(num_samples), task)
    return found


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize(("num_samples", "least"), [(4000, 0.02), (250, 0.02), (100, 0.05)])
@pytest.mark.parametrize("skill", [-0.01, 0.0, 0.001, 0.019, 0.021, 0.049, 0.051])
def test_it_is_trusted_where_it_sees_enough(kind: str, skill: float, num_samples: int, least: float) -> None:
    found, is_table = made(kind, skill, num_samples), kind == "columns"
    assert found.skill_ == pytest.approx(max(skill, 0.0) if is_table else skill)
    assert found.inputs_tell_nothing_ == (is_table and skill <= 0)
    assert found.is_trusted_ == (is_table or skill > least) and found.may_choose(sees_all=False) == (skill > least)


@pytest.mark.parametrize(("num_samples", "least"), [(4000, 0.01), (100, 0.015), (20, 0.075)])
def test_a_reference_that_has_learned_nothing_does_not_say_how_many_labels_are_wrong(
    num_samples: int, least: float
) -> None:
    for skill, is_known in ((least - 0.001, False), (least + 0.001, True)):
        assert math.isnan(made("columns", skill, num_samples).unexplained_) != is_known


def test_permuted_labels_have_no_skill_and_unknown_noise() -> None:
    for seed in range(2):
        x, y, _ = sample(num_samples=200, seed=seed)
        permuted = Reference().fit(x, y[torch.randperm(200, generator=generator(seed))])
        assert permuted.skill_ < 0.02 and (permuted.skill_ > 0.01 or math.isnan(permuted.unexplained_))


ONE_HOT, NEW = torch.eye(3)[[0, 1, 2, 0, 1, 2]], torch.rand(4, 3, generator=generator())
DEGENERATE: dict[str, tuple[Tensor, Tensor, Tensor]] = {
    "four samples": (
        torch.tensor([[0.0, 0], [1, 1], [0, 1], [1, 0]]),
        torch.eye(2).repeat_interleave(2, 0),
        NEW[:, :2],
    ),
    "one class": (torch.rand(6, 3), ONE_HOT[:1].expand(6, 3), NEW),
    "constant features": (torch.full((6, 3), 0.1), ONE_HOT, torch.full((4, 3), 0.1)),
    "constant features, others of new samples": (torch.zeros(6, 3), ONE_HOT, NEW),
    "texts of padding": (torch.full((6, 3), -1), ONE_HOT, torch.ones(4, 5).long()),
}


@pytest.mark.parametrize("what", DEGENERATE)
def test_what_holds_nothing_to_learn_gives_the_shares(what: str) -> None:
    x, y, new = DEGENERATE[what]
    found = Reference().fit(x, y)
    np.testing.assert_allclose(found.predict_proba(new), y.double().mean(0).expand(4, -1), atol=0.03)
    assert found.skill_ <= 1e-9 and not found.is_trusted_ and math.isnan(found.unexplained_)
    assert math.isnan(found.auroc_) == (found.majority_ == 1)
    alike = Reference().fit(x, torch.zeros(len(x)).long())
    assert (alike.accuracy_, alike.majority_) == (1, 1) and alike.predict_proba(new).tolist() == [[1.0]] * 4


def test_texts_of_other_words_each_and_a_sample_far_away_have_finite_predictions() -> None:
    texts = torch.arange(60 * 4).reshape(60, 4) + 2000
    assert np.isfinite(Reference().fit(texts, torch.arange(60) % 2).predict_proba(texts + 9)).all()
    assert np.isfinite(Reference().fit(*steps(60)).predict_proba(torch.full((1, 8), 1e30))).all()


# What is refused

X, Y, NAN = torch.rand(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]), torch.full((6, 3), math.nan)
FRAME = pd.DataFrame({"a": range(6), "b": [0.5, None, 1, 2, 3, 4]})
BAD: dict[str, tuple[str, tuple[Any, ...]]] = {
    "images of one color": ("4 or more different samples with labels, but got 1", (torch.ones(6, 3, 8, 8), Y)),
    "kinds of several numbers of samples": ("inconsistent numbers", ({"columns": X, "tokens": Y[:5, None]}, Y)),
    "a mapping of columns": ("`x` to have columns, images, signals, tokens, but got a, b", ({"a": X, "b": X}, Y)),
    "nothing": ("`x` to have columns, images", ({}, Y)),
    "labels of nan": ("from 0 to 1, .* got nan", (X, NAN)),
    "a binary matrix": ("one label per output", (X, X, "binary")),
    "several classes at once": ("soft labels that sum to 1", (X, torch.ones(6, 3))),
    "ignored labels": ("a label in `y` that is not -100", (X, 0 * Y - 100)),
    "a constant target": (r"All targets in `y` are 2.5: there is nothing to learn", (X, [2.5] * 6, "regression")),
    "a constant target that has no exact sum": ("nothing to learn", (torch.rand(300, 2), [0.1] * 300, "regression")),
    "another task": ("`task` to be one of", (X, Y, "multi-label")),
    "missing values in a column": ("Input x contains NaN", (FRAME, Y)),
    "names in a column": ("could not convert string to float: 'x'", (FRAME.assign(b="x"), Y)),
}


@pytest.mark.parametrize("what", BAD)
def test_what_it_can_not_learn_from_is_refused_by_name(what: str) -> None:
    message, (x, y, *task) = BAD[what]
    with pytest.raises((ValueError, TypeError), match=message):
        Reference(*task).fit(x, y)


def test_a_fit_that_fails_leaves_it_as_it_was() -> None:
    new, old = Reference(), Reference(estimator=GaussianNB()).fit(IRIS, NAMES)
    assert str(new) == "Reference()"
    for each in (new, old):
        with pytest.raises(ValueError, match="Expected 4 or more different samples"):
            each.fit(IRIS[:3], ["no", "yes", "no"])
    with pytest.raises(NotFittedError):
        new.predict(IRIS)
    assert {*old.predict(IRIS)} == {*NAMES}


OTHERS: dict[str, tuple[Tensor, str, Any]] = {
    "images for columns": (X, r"to have columns \(M, 3\), but got columns of shape \(2, 64\)", torch.rand(2, 1, 8, 8)),
    "token ids by name": (X, "to have columns .* but got tokens", {"tokens": Y.reshape(2, 3)}),
    "columns for images": (torch.rand(6, 1, 2, 3), "to have images .* of shape", X),
    "images of other channels": (torch.rand(6, 3, 8, 8), r"images \(M, 3, 8, 8\), but got", torch.rand(2, 1, 8, 8)),
    "signals of other channels": (torch.rand(6, 3, 24), r"signals \(M, 3, 24\), but got", torch.rand(2, 1, 24)),
}


@pytest.mark.parametrize("what", OTHERS)
def test_inputs_of_another_kind_are_not_predicted(what: str) -> None:
    known, message, new = OTHERS[what]
    with pytest.raises(ValueError, match=message):
        Reference().fit(known, Y).predict(new)
