"""Models are ranked by the accuracy that a reference expects of each, with the interval that the samples allow."""

import copy
import gc
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy import stats
from sklearn.linear_model import LinearRegression
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import Reference, compare_models
from lightning_sensitivity.compare import Comparison, ModelScores, _scores
from lightning_sensitivity.functional import draw_labels
from lightning_sensitivity.reference.observations import projection
from tests.helpers import Classifier, Linear, Stream, inputs, labelled, small_forests, trainer, unlabelled_loader

NEW = 50  # unseen samples, in batches of 16, 16, 16 and 2
X, Y = labelled(150, seed=1).tensors
V, L = labelled(NEW).tensors
TRAINING = DataLoader(TensorDataset(X, Y), 40)
NOISE_X = torch.rand(150, 12, generator=torch.Generator().manual_seed(5))  # nothing of the labels is seen in them


def linear(seed: int = 0, scale: float = 9.0) -> Linear:
    model = Linear(seed=seed)
    model.scale = scale
    return model


def three() -> dict[str, Any]:
    return {name: linear(seed) for seed, name in enumerate("abc")}


def compare(models: Any = None, batches: Any = None, **kwargs: Any) -> dict[str, ModelScores]:
    """The rows by name, in their order; by a reference that is quick to fit, unless another is given."""
    gc.freeze()  # else each model waits for a look at all modules that were imported
    batches = unlabelled_loader() if batches is None else batches
    found = compare_models(models or three(), batches, **{"training": TRAINING, "reference": GaussianNB(), **kwargs})
    assert [row.difference for row in found] == pytest.approx([abs(row.expected - found[0].expected) for row in found])
    return {row.name: row for row in found}


def found(rows: dict[str, ModelScores]) -> dict[str, float]:
    return {name: row.expected for name, row in rows.items()}


def classes(models: dict[str, Any]) -> Tensor:
    return torch.stack([model(V).detach().argmax(1) for model in models.values()])


def drawn(q: Any, task: str = "multiclass", new: Tensor = V) -> Tensor:
    """Draw labels of samples in an order that depends on these alone."""
    order = projection({"columns": new.flatten(1)}).argsort()
    return draw_labels(q[order], task)[:, order.argsort()]


def hits(models: dict[str, Any], x: Any = X, y: Tensor = Y, new: Tensor = V, estimator: Any = GaussianNB) -> Tensor:
    """Whether the class of each model is one that is drawn from the predictions of a reference, ``(M, R, N)``."""
    q = Reference("multiclass", estimator and estimator()).fit(x, y).predict_proba(new)
    return (classes(models)[:, None] == drawn(q, new=new)).double()


def chances(*args: Any, **kwargs: Any) -> Tensor:
    """The share of these, ``(M, N)``."""
    return hits(*args, **kwargs).mean(1)


def named(values: Tensor) -> Any:
    return pytest.approx(dict(zip("abc", values.tolist(), strict=True)), rel=1e-5)


# The rank


@pytest.mark.parametrize("estimator", [None, GaussianNB])
def test_models_are_ranked_by_the_share_of_drawn_labels_that_each_gets_right(estimator: Any) -> None:
    with small_forests():
        rows = compare(reference=estimator and estimator())
        assert found(rows) == named(chances(three(), estimator=estimator).mean(1))
    assert [row.rank for row in rows.values()] == [1, 2, 3]
    assert list(found(rows).values()) == sorted(found(rows).values(), reverse=True)


@pytest.mark.parametrize("has_labels", [False, True])
@pytest.mark.parametrize("is_new", [False, True])
def test_rows_with_nan_are_left_out(is_new: bool, has_labels: bool) -> None:
    """The models read them, the reference can't."""
    models = three()
    for model in models.values():
        model.register_forward_pre_hook(lambda module, args: (args[0].nan_to_num(),))

    def with_nan(x: Tensor, y: Tensor) -> TensorDataset:
        row = torch.full((1, 12), math.nan)
        return TensorDataset(torch.cat([x[:7], row, x[7:]]), torch.cat([y[:7], y[:1], y[7:]]))

    new, known = TensorDataset(V, L), TensorDataset(X, Y)
    some, training = (with_nan(V, L), known) if is_new else (new, with_nan(X, Y))
    with pytest.warns(UserWarning, match="leaves out 1 .* with nan or inf"):
        rows = compare(models, DataLoader(some, 16), training=DataLoader(training, 40), validation_labels=has_labels)
    assert rows == compare(models, DataLoader(new, 16), validation_labels=has_labels)


def test_differences_to_the_first_are_paired_by_label_and_as_sure_as_values_of_a_monitor() -> None:
    good = nn.Linear(12, 4)
    good.weight.data = 9 * torch.eye(4, 12)  # as the labels are made
    worst = nn.Linear(12, 4)
    worst.weight.data = -good.weight.data
    models = {"worst": worst} | three() | {"good": good, "same": linear(0)}
    rows, values = compare(models), dict(zip(models, hits(models), strict=True))
    first = next(iter(rows))
    for name, row in rows.items():
        differences = values[first] - values[name]
        of_label = float((differences - differences.mean()).square().mean()) * NEW / (NEW - 1)
        quantile = stats.t.ppf(0.95, NEW - 1) / 1.645
        stderr = quantile * math.sqrt(of_label * (1 / NEW + 1 / len(X) + 1 / 500))  # 500 for a table
        assert (row.difference, row.difference_stderr) == pytest.approx((float(differences.mean()), stderr))
        assert row.may_be_best == (row.difference <= 1.96 * stderr)
    assert rows[first].may_be_best and rows[first].difference == 0 and not rows["worst"].may_be_best
    assert rows["a"][2:] == rows["same"][2:]


def test_equal_models_are_seldom_told_apart() -> None:
    """Mirror images have the same accuracy: the 95 % interval of their difference should hold 0 in 36 of 40 runs."""
    held = 0
    for seed in range(40):
        x = torch.randn(600, 2, generator=torch.Generator().manual_seed(seed))
        y = (x.sum(1) + 1.5 * torch.randn(600, generator=torch.Generator().manual_seed(100 + seed)) > 0).float()
        models = {"a": nn.Linear(2, 1), "b": nn.Linear(2, 1)}
        for model, weights in zip(models.values(), ([1.0, 0.3], [0.3, 1.0]), strict=True):
            model.weight.data, model.bias.data = torch.tensor([weights]), torch.zeros(1)
        rows = compare(models, [x[300:]], training=[(x[:300], y[:300])], task="binary")
        held += all(row.may_be_best for row in rows.values())
    assert held >= 36


def test_models_that_choose_the_same_classes_may_be_equal_and_no_more() -> None:
    _, other = compare({"a": linear(), "b": linear(scale=5.0)}).values()
    assert other.difference == 0 and 0.005 < other.difference_stderr < 0.05 and other.may_be_best


def test_a_model_may_be_the_best_if_the_interval_of_its_difference_holds_0() -> None:
    rows = _scores([("first", 0.5, 0.0, 0.0), ("near", 0.3, 0.2, 0.2 / 1.95), ("far", 0.3, 0.2, 0.2 / 1.97)])
    assert [(row.rank, row.may_be_best) for row in rows] == [(1, True), (2, True), (3, False)]


def test_features_are_what_the_reference_sees_and_ignored_labels_teach_it_nothing() -> None:
    seen = []

    def features(batch: Any) -> Tensor:
        seen.append(batch)
        return (batch[0] if isinstance(batch, list) else batch)[:, :4]

    is_known = torch.arange(150) % 3 > 0
    training = DataLoader(TensorDataset(X, Y.where(is_known, -100)), 40)
    expected = chances(three(), X[is_known, :4], Y[is_known], V[:, :4]).mean(1)
    assert found(compare(training=training, features=features)) == named(expected) and len(seen) == 9


@pytest.mark.parametrize(("num_labels", "shape"), [(50, (12,)), (20, (1, 3, 4))])
@pytest.mark.parametrize("is_blind", [False, True])
def test_validation_labels_count_as_many_as_they_are(num_labels: int, shape: tuple[int, ...], is_blind: bool) -> None:
    """The reference counts as 1,000 labels, and as none if it is blind."""
    models = {name: nn.Sequential(nn.Flatten(), model) for name, model in three().items()}
    x, new = X.reshape(-1, *shape), V.reshape(-1, *shape)
    accuracy = (classes(three()) == L)[:, :num_labels].double().mean(1)
    expected = chances(three(), x, Y, new).mean(1)
    wanted = accuracy if is_blind else (num_labels * accuracy + 1000 * expected) / (num_labels + 1000)
    batches = DataLoader(TensorDataset(new, L.where(torch.arange(NEW) < num_labels, -100)), 16)
    noise = {150: NOISE_X, 16: NOISE_X[:16] - 1, 2: NOISE_X[:2] - 1}  # by the size of a batch
    options: dict[str, Any] = {"features": lambda batch: noise[len(batch[0])]} if is_blind else {}
    assert found(compare(models, batches, training=[(x, Y)], validation_labels=True, **options)) == named(wanted)


def test_validation_labels_that_contradict_outweigh_the_reference_and_as_much_for_all_models() -> None:
    labels = (classes({"a": linear()})[0] + 1) % 4  # the best model is never right
    models = {"a": linear(), "b": linear(1)}
    rows = compare(
        models, [(V, labels)], training=[(V.repeat(3, 1) + 1e-3, (labels - 1).repeat(3) % 4)], validation_labels=True
    )
    assert rows["a"].expected < 0.5


def test_labels_that_the_reference_can_not_tell_count_as_the_monitor_counts_them() -> None:
    noise = torch.randint(2, (200, 3), generator=torch.Generator().manual_seed(0))
    y, labels = ((torch.cat([x[:, :1] > 0.5, part > 0], 1)).float() for x, part in ((X, noise[:150]), (V, noise[150:])))
    estimator = MultiOutputClassifier(GaussianNB())
    q = torch.from_numpy((known := Reference("multilabel", estimator).fit(X, y)).predict_proba(V))
    told = torch.isin(torch.arange(4), torch.as_tensor(known.blind_labels_), invert=True)
    says_yes = torch.stack([model(V).detach()[:, told] > 0 for model in three().values()])
    expected = (says_yes[:, None] == drawn(q, "multilabel")[..., told]).double().mean((1, 2, 3))
    of_labels = (says_yes == labels[:, told]).double().mean((1, 2))
    rows = compare(
        batches=[(V, labels)], training=[(X, y)], task="multilabel", reference=estimator, validation_labels=True
    )
    assert told.any() and not told.all() and found(rows) == named((1000 * expected + 50 * of_labels) / 1050)


def test_a_blind_reference_is_refused_with_advice() -> None:
    message = "reference sees too little of the inputs, and no label .*: set `features=`, or `validation_labels=True`"
    with pytest.raises(MisconfigurationException, match=message):
        compare(training=[(NOISE_X, Y)])
    with pytest.raises(MisconfigurationException, match=message):
        compare(batches=[(V, 0 * L - 100)], training=[(NOISE_X, Y)], validation_labels=True)


@pytest.mark.parametrize("select", [lambda y: y[:, 0], lambda y: y[:, :1]])
def test_one_output_decides_between_two_classes(select: Any) -> None:
    is_first = (Y == 0).float()
    draws = drawn(Reference("binary", GaussianNB()).fit(X, is_first).predict_proba(V), "binary")
    is_high = torch.stack([model(V).detach()[:, 0] > 0 for model in three().values()])
    expected = (draws == is_high[:, None]).double().mean((1, 2))
    rows = compare(training=[(X, is_first)], task="binary", outputs=select)
    assert found(rows) == named(expected)
    both = (1000 * expected + 50 * (is_high == (L == 0)).double().mean(1)) / 1050
    labels = [(V, (L == 0).float())]
    rows = compare(batches=labels, training=[(X, is_first)], task="binary", outputs=select, validation_labels=True)
    assert found(rows) == named(both)


def test_targets_that_are_mostly_0_are_no_unused_classes() -> None:
    y = torch.cat([X[:, :4].square() + X[:, 4:8], torch.zeros(150, 6)], 1)
    models = {"good": nn.Linear(12, 10), "other": nn.Linear(12, 10)}
    rows = compare(models, training=[(X, y)], task="regression", reference=LinearRegression())  # without a warning
    assert len(rows) == 2


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_in_a_regression_the_squared_error_to_expect_ranks(num_outputs: int) -> None:
    models, g = three(), torch.Generator().manual_seed(0)
    targets, y = (x[:, :num_outputs] - x[:, 3:4] + torch.randn(len(x), 1, generator=g) / 9 for x in (X, V))
    options = {"outputs": lambda y: y[:, :num_outputs], "task": "regression", "reference": LinearRegression()}
    known = Reference("regression", LinearRegression()).fit(X, targets)
    q = torch.from_numpy(known.predict(V)).reshape(NEW, num_outputs)
    p = torch.stack([model(V).detach()[:, :num_outputs] for model in models.values()]).double()
    by_q, by_y = ((p - each).square().mean((1, 2)) for each in (q, y))
    batches, training = [(V, y.squeeze(1))], [(X, targets.squeeze(1))]
    rows = compare(models, training=training, **options)
    assert found(rows) == named(by_q + known.score_) and known.score_ > 0.005
    assert list(found(rows).values()) == sorted(found(rows).values())
    assert all(row.difference >= 0 for row in rows.values())
    both = (50 * by_y + 1000 * (by_q + known.score_)) / 1050
    assert found(compare(models, batches, training=training, validation_labels=True, **options)) == named(both)


# Models and batches


def test_models_of_token_ids_are_compared_as_others_are() -> None:
    ids = torch.randint(30, (250, 9), generator=torch.Generator().manual_seed(0))
    labels = (ids[:, :6] < 3).any(1).long()
    weights = torch.tensor([[0.0, 9.0]] * 3 + [[1.0, 0.0]] * 27)
    bad, good = (nn.EmbeddingBag.from_pretrained(each) for each in (weights.flip(1), weights))
    training = [(ids[:80, :7], labels[:80]), (ids[80:200], labels[80:200])]  # texts of two lengths
    rows = compare({"bad": bad, "good": good}, [ids[200:]], training=training, reference=None)
    assert [*rows] == ["good", "bad"] and 0.6 < rows["good"].expected <= 1


@pytest.mark.parametrize("is_compiled", [False, True])
def test_models_run_in_eval_mode_and_are_left_as_they_were(is_compiled: bool) -> None:
    model = Classifier(dropout=0.9)
    passed = torch.compile(model, backend="eager") if is_compiled else model
    before, models = copy.deepcopy(model), {"model": passed, "other": linear()}
    rows = compare(models)
    assert model.training and all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    expected = chances(models | {"model": before.eval()}).mean(1)
    assert [rows[name].expected for name in ("model", "other")] == pytest.approx(expected.tolist())


def test_batches_pass_through_the_hooks_of_a_module_in_eval_mode_without_a_trace() -> None:
    class Moved(Linear):
        def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0].add_(1), *batch[1:]]

        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            self.num_batches.add_(1)
            return [2 * batch[0] + self.training * torch.rand(1), *batch[1:]]

    model, batches = Moved(), [[inputs(NEW)]]
    model.register_buffer("num_batches", torch.zeros(1))
    models, state = {"hooks": model, "again": model, "other": linear(1)}, torch.get_rng_state()
    moved = compare(models, batches, training=[(X, Y)])
    assert torch.equal(batches[0][0], V) and torch.equal(torch.get_rng_state(), state) and not model.num_batches
    plain = compare({"plain": model.net} | three(), [2 * (V + 1)], training=[(2 * (X + 1), Y)])
    assert moved["hooks"].expected == moved["again"].expected == pytest.approx(plain["plain"].expected)


def test_a_hook_that_needs_a_trainer_gets_one_from_you() -> None:
    class Augmented(Linear):
        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0] + self.trainer.training * torch.rand(1), *batch[1:]]

    models = {"augmented": Augmented(), "other": linear(1)}
    models["augmented"].load_state_dict(linear().state_dict())
    with pytest.raises(MisconfigurationException, match=r"set `model.trainer = trainer` before: RuntimeError: .*Augm"):
        compare(models, [[V]])
    models["augmented"].trainer = trainer()
    assert found(compare(models, [[V]])) == found(compare({"augmented": linear(), "other": linear(1)}, [[V]]))


def test_the_order_of_samples_does_not_matter() -> None:
    order = torch.randperm(NEW, generator=torch.Generator().manual_seed(3))
    assert found(compare(batches=[V[order]])) == pytest.approx(found(compare()), abs=1e-12)


def test_streams_are_read_once() -> None:
    rows = compare(batches=(batch for batch in unlabelled_loader()), training=DataLoader(Stream(150, True, 1), 40))
    assert found(rows) == found(compare())


class Named(Linear):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"loss": image.sum(), "logits": self.net(image)}


def test_batches_are_dicts_or_what_functions_make_of_them() -> None:
    named = {name: Named(seed=seed) for seed, name in enumerate("abc")}
    of_dicts = compare(named, [{"image": V}], training=[{"image": X, "label": Y}])
    options = {"inputs": lambda batch: batch["x"] / 2, "targets": lambda batch: batch["z"] - 1}
    selected = compare(batches=[{"x": 2 * V}], training=[{"x": 2 * X, "z": Y + 1}], **options)
    for rows in (of_dicts, selected):
        assert [*found(rows).values()] == pytest.approx([*found(compare()).values()], rel=1e-5)


def test_half_precision_and_a_single_sample_are_compared() -> None:
    half = {name: model.bfloat16() for name, model in three().items()}
    rows = compare(half, [V.bfloat16()], training=[(X.bfloat16(), Y)])
    assert all(0 < row.expected < 1 for row in rows.values())
    single = compare(batches=[inputs(1)])
    assert [math.isnan(row.difference_stderr) for row in single.values()] == [False, True, True]
    assert all(row.may_be_best for row in single.values())


@pytest.mark.parametrize(("num_known", "is_said"), [(5, False), (7, True)])
def test_training_samples_among_the_others_give_a_warning(num_known: int, is_said: bool) -> None:
    share = num_known / (num_known + NEW)
    match = f"finds that {share:.0%} of the samples of `dataloader` are training samples: .*Take others"
    with pytest.warns(UserWarning, match=match) if is_said else nullcontext():
        compare(batches=[torch.cat([X[:num_known], V])])


# What is refused


def broken(act: Callable[[Tensor], Any]) -> nn.Module:
    class Broken(Linear):
        def forward(self, x: Tensor) -> Any:
            return act(self.net(x))

    return Broken()


@pytest.mark.parametrize(("model", "message"), [
    pytest.param(broken(lambda y: y / 0 * 0), "should be finite, but some are nan or inf", id="nan"),
    pytest.param(broken(lambda y: y.softmax(1)), r"are probabilities, .*`outputs=lambda p: p.log\(\)`", id="a softmax"),
    pytest.param(broken(lambda y: y[..., None].expand(-1, -1, 3)), r"one row for each sample", id="dense"),
    pytest.param(broken(lambda y: (y[:, :2], y)), "which of several", id="features"),
    pytest.param(nn.Linear(3, 3), "RuntimeError: mat1", id="another input"),
])  # fmt: skip
def test_a_model_that_fails_is_named(model: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"Model 'bad' can't be compared.*{message}"):
        compare(three() | {"bad": model})


def test_what_a_sigmoid_gave_is_refused() -> None:
    models = dict.fromkeys("ab", broken(lambda y: y[:, :1].sigmoid()))
    with pytest.raises(MisconfigurationException, match=r"'a' can't be compared.* `outputs=lambda p: p.logit\(1e-6"):
        compare(models, training=[(X, (Y == 0).float())], task="binary")


def test_a_class_may_be_masked() -> None:
    mask = torch.tensor([False, False, False, True])
    models = {name: broken(lambda y: y.masked_fill(mask, -math.inf)) for name in "ab"}
    assert found(compare(models)) == {name: pytest.approx(float(chances(models).mean())) for name in "ab"}


def nan_for_one(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none").where(y != 2, math.nan)


@pytest.mark.parametrize(("loss", "message"), [
    pytest.param(cross_entropy, "`loss` fails: Expected a number for each sample, as with", id="a mean"),
    pytest.param(nan_for_one, "Model '[abc]' can't be compared: `loss` gives nan", id="nan"),
    pytest.param(lambda f, y: nn.functional.nll_loss(f, y.float()), "`loss` fails: RuntimeError", id="an error"),
])  # fmt: skip
def test_a_loss_that_says_nothing_of_samples_is_refused(loss: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        compare(loss=loss)


def test_a_loss_that_torch_broadcasts_is_refused() -> None:
    options = {"outputs": lambda y: y[:, :1], "training": [(X, X[:, 0].sin() + X[:, 1])]}
    options |= {"task": "regression", "reference": LinearRegression()}
    with pytest.raises(
        MisconfigurationException, match="`loss` fails: Expected a loss of each output .* are broadcast"
    ):
        compare(loss=lambda outputs, y: (outputs - y).abs(), **options)
    assert len(compare(loss=lambda outputs, y: (outputs.squeeze(1) - y).abs(), **options)) == 3


def test_outputs_of_which_most_are_no_class_are_said_to_be_features() -> None:
    with pytest.warns(UserWarning, match="gets 20 outputs, of which 16 are the class of none of 150 training labels"):
        compare({name: nn.Linear(12, 20) for name in "ab"})


WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no dict", {"models": [nn.Linear(1, 1)]}, "`models` should be a dict of names and modules, two or more, got "),
    ("one", {"models": {"a": linear()}}, "`models` should be a dict of names and modules, two or more"),
    ("functions", {"models": dict.fromkeys("ab", linear)}, "`models` should be .*, got {'a': <function"),
    ("other classes", {"models": three() | {"bad": nn.Linear(12, 5)}}, r"of the same shape, got .*'bad': \(50, 5\)"),
    ("no batches", {"dataloader": []}, "`dataloader` should be an iterable of batches"),
    ("training is empty", {"training": []}, "`training` gives no reference.* No sample has a label"),
    ("training without labels", {"training": [X]}, "`training` gives no reference.*`targets` should return the labels"),
    (
        "labels among inputs",
        {"training": [(X.index_copy(1, Y[:1], 1.0 * Y[:, None]), Y)]},
        "labels are among the inputs",
    ),
    (
        "a regression of integers",
        {"task": "regression", "training": [(X, one_hot(Y, 4))], "reference": None},
        "the targets of a regression are integers",
    ),
    ("inputs of another size", {"training": [(X[:, :7], Y)]}, r"no reference \(`features=.* to have columns \(M, 7\)"),
    ("inputs that can't be seen", {"features": lambda batch: None}, "`features` should be a module, or a function"),
    ("labels only in training", {"validation_labels": True}, "`validation_labels` can't be read.*`targets` should ret"),
    (
        "a label too few",
        {"validation_labels": True, "dataloader": [(V, L[:-1])]},
        "`targets` should return a label for each of 50 samples, got 49",
    ),
    ("logits of another task", {"task": "binary"}, "Expected one output"),
    (
        "other inputs",
        {"models": {"a": Named(), "b": linear()}, "dataloader": [{"image": V}]},
        r"models get different inputs, {'a': \('image',\), 'b': 1}: set `features=`",
    ),
    (
        "inputs of five dimensions",
        {"dataloader": [V[:, None, None, None]], "inputs": lambda batch: batch[0] if len(batch) == 2 else batch},
        r"no reference \(`features=` says what it sees\): Inputs are neither dense numbers nor token ids",
    ),
    ("no probabilities", {"reference": LinearRegression()}, "`reference` should be an estimator.*`predict_proba`, or"),
    *((name, {name: []}, f"`{name}` should be ") for name in ("inputs", "features", "outputs")),
]


@pytest.mark.parametrize(("change", "message"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_wrong_input_is_refused_in_a_sentence_that_names_it(change: dict[str, Any], message: str) -> None:
    options = {"models": three(), "dataloader": unlabelled_loader(), "training": TRAINING, "reference": GaussianNB()}
    with pytest.raises(MisconfigurationException, match=message):
        compare_models(**(options | change))


def test_the_result_is_a_list_that_prints_as_a_table_and_goes_into_pandas() -> None:
    result = Comparison([ModelScores(1, "conv", 0.81234, 0.0, 0.0, True)])
    lines = [line.split() for line in str(result).splitlines()]
    assert lines == [list(ModelScores._fields), ["1", "conv", "0.812", "0", "0", "True"]]
    frame = pandas.DataFrame(result)
    assert list(frame) == list(ModelScores._fields) and np.isclose(frame.loc[0, "expected"], 0.81234)
