"""Models are ranked by how often a reference disagrees with each, with the interval that the samples allow."""

import copy
import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import pandas
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import compare_models
from lightning_sensitivity.compare import Comparison, ModelScores
from lightning_sensitivity.functional import Reference, fit_reference
from tests.helpers import Classifier, Linear, Stream, brute_force, inputs, labelled, loader, unlabelled_loader

NEW = 50  # unseen samples, in batches of 16, 16, 16 and 2
X, Y = labelled(150, seed=1).tensors
TRAINING = DataLoader(TensorDataset(X, Y), 40)
NOISE_X = torch.rand(150, 12, generator=torch.Generator().manual_seed(5))  # nothing of the labels is seen in them


def linear(seed: int = 0, scale: float = 9.0) -> Linear:
    model = Linear(seed=seed)
    model.scale = scale
    return model


def three() -> dict[str, Any]:
    return {name: linear(seed) for seed, name in enumerate("abc")}


def compare(models: Any = None, batches: Any = None, **kwargs: Any) -> dict[str, ModelScores]:
    """The rows by name, in their order."""
    gc.freeze()  # else each model waits for a look at all modules that were imported
    batches = unlabelled_loader() if batches is None else batches
    return {row.name: row for row in compare_models(models or three(), batches, **{"training": TRAINING, **kwargs})}


def found(rows: dict[str, ModelScores]) -> dict[str, float]:
    return {name: row.disagreement for name, row in rows.items()}


def classes(models: dict[str, Any]) -> Tensor:
    return torch.stack([model(inputs(NEW)).detach().argmax(1) for model in models.values()])


def by_reference(models: dict[str, Any], reference: Reference) -> dict[str, Any]:
    differs = classes(models) != reference.predictions.argmax(1)
    return pytest.approx(dict(zip(models, differs.double().mean(1).tolist(), strict=True)))


# The rank


def test_models_are_ranked_by_the_share_of_samples_whose_class_is_not_the_references() -> None:
    rows, reference = compare(), fit_reference(X, Y, inputs(NEW))
    assert found(rows) == by_reference(three(), reference)
    assert [row.rank for row in rows.values()] == [1, 2, 3]
    assert list(found(rows).values()) == sorted(found(rows).values())


def test_differences_to_the_first_are_paired_by_sample() -> None:
    models = {"reversed": linear(0, scale=-9.0)} | three() | {"same": linear(0)}
    rows, q = compare(models), fit_reference(X, Y, inputs(NEW)).predictions.argmax(1)
    losses = dict(zip(models, (classes(models) != q).double(), strict=True))
    first = next(iter(rows))
    for name, row in rows.items():
        differences = (losses[name] - losses[first]).numpy()
        stderr = differences.std(ddof=1) / math.sqrt(NEW)
        assert (row.difference, row.difference_stderr) == pytest.approx((differences.mean(), stderr))
        assert row.may_be_best == (differences.mean() <= 1.96 * stderr)
    assert rows[first].may_be_best and rows[first].difference == 0 and not rows["reversed"].may_be_best
    assert rows["a"][2:] == rows["same"][2:]


def test_the_reference_knows_as_many_training_samples_as_it_can_evenly_spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_sensitivity.compare.MAX_SAMPLES", 70)
    rows = torch.cat([torch.arange(40), torch.arange(80, 120)])  # of the first and the third batch
    assert found(compare()) == by_reference(three(), fit_reference(X[rows], Y[rows], inputs(NEW)))


def test_features_are_what_the_reference_sees_and_ignored_labels_teach_it_nothing() -> None:
    seen = []

    def features(batch: Any) -> Tensor:
        seen.append(batch)
        return (batch[0] if isinstance(batch, list) else batch)[:, :4]

    is_known = torch.arange(150) % 3 > 0
    training = DataLoader(TensorDataset(X, Y.where(is_known, -100)), 40)
    reference = fit_reference(X[is_known, :4], Y[is_known], inputs(NEW)[:, :4])
    assert found(compare(training=training, features=features)) == by_reference(three(), reference) and len(seen) == 8


@pytest.mark.parametrize("num_labels", [50, 20])
@pytest.mark.parametrize("is_blind", [False, True])
def test_validation_labels_count_as_many_as_they_are_and_the_reference_as_200(num_labels: int, is_blind: bool) -> None:
    x, y = labelled(NEW).tensors
    given = y.where(torch.arange(NEW) < num_labels, -100)
    seen = (NOISE_X, NOISE_X[:NEW]) if is_blind else (X, x)
    reference = fit_reference(seen[0], Y, seen[1])
    assert reference.is_trusted != is_blind
    options: dict[str, Any] = {"features": lambda batch: NOISE_X[: len(batch[0])] if is_blind else batch[0]}
    if is_blind:
        options["training"] = [(X, Y)]
    wrong = (classes(three()) != y)[:, :num_labels].double().mean(1)
    disagreement = (classes(three()) != reference.predictions.argmax(1)).double().mean(1)
    weight = 0 if is_blind else 200
    expected = (num_labels * wrong + weight * disagreement) / (num_labels + weight)
    rows = compare(batches=DataLoader(TensorDataset(x, given), 16), validation_labels=True, **options)
    assert found(rows) == pytest.approx(dict(zip("abc", expected.tolist(), strict=True)))


def test_a_blind_reference_is_refused_with_advice() -> None:
    with pytest.raises(MisconfigurationException, match="sees too little.*set `features=`, or `validation_la"):
        compare(training=[(NOISE_X, Y)])


@pytest.mark.parametrize("select", [lambda y: y[:, 0], lambda y: y[:, :1]])
def test_one_output_decides_between_two_classes(select: Any) -> None:
    labels, options = (Y == 0).float(), {"task": "binary", "outputs": select}
    q = fit_reference(X, labels, inputs(NEW), task="binary").predictions[:, 0] > 0.5
    p = torch.stack([model(inputs(NEW)).detach()[:, 0] > 0 for model in three().values()])
    rows = compare(training=[(X, labels)], **options)
    assert found(rows) == pytest.approx(dict(zip("abc", (p != q).double().mean(1).tolist(), strict=True)))


@pytest.mark.parametrize("num_outputs", [1, 2])
def test_in_a_regression_the_mean_squared_difference_ranks(num_outputs: int) -> None:
    models = three()
    targets, y = ((x[:, :num_outputs] - x[:, 3:4]) for x in (X, inputs(NEW)))
    options = {"task": "regression", "outputs": lambda y: y[:, :num_outputs], "training": [(X, targets.squeeze(1))]}
    q = fit_reference(X, targets, inputs(NEW), task="regression").predictions
    p = torch.stack([model(inputs(NEW)).detach()[:, :num_outputs] for model in models.values()]).double()
    by_q, by_y = ((p - each).square().mean((1, 2)) for each in (q, y))
    assert found(compare(models, **options)) == pytest.approx(dict(zip("abc", by_q.tolist(), strict=True)))
    both = (50 * by_y + 200 * by_q) / 250
    rows = compare(models, [(inputs(NEW), y.squeeze(1))], validation_labels=True, **options)
    assert found(rows) == pytest.approx(dict(zip("abc", both.tolist(), strict=True)), rel=1e-5)


# Sensitivity


@pytest.mark.parametrize("is_compiled", [False, True])
def test_sensitivity_is_that_of_a_plain_loop_and_models_are_left_as_they_were(is_compiled: bool) -> None:
    model = Classifier()
    before, passed = copy.deepcopy(model), torch.compile(model, backend="eager") if is_compiled else model
    row = compare({"model": passed, "other": Classifier(seed=1)}, loader())["model"]
    assert model.training and all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    changes = brute_force(before.eval(), inputs(NEW).split(16))
    assert row.sensitivity == pytest.approx(changes.var(correction=0).item(), rel=1e-5)


def test_without_noise_there_is_no_sensitivity_and_noise_may_be_added_at_a_submodule() -> None:
    models = three() | {"small": linear(0, 0.5)}
    assert all(math.isnan(row.sensitivity) for row in compare(models, noise=None).values())
    of_head = compare(models, noise=lambda x, generator: 1.1 * x, at="net")
    assert of_head["a"].sensitivity == pytest.approx(18**2 * of_head["small"].sensitivity)


def test_two_class_heads_are_warned_of_by_name() -> None:
    torch.manual_seed(0)
    head = nn.Linear(12, 2)
    head.weight.data[1] = -head.weight.data[0]
    with pytest.warns(UserWarning, match="Model 'centred': Only"):
        compare({"centred": head, "b": nn.Linear(12, 2)}, training=[(X, Y // 2)])


# Models and batches


def test_batches_pass_through_the_hooks_of_a_module_without_a_trace() -> None:
    class Moved(Linear):
        def on_before_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [batch[0].add_(1), *batch[1:]]

        def on_after_batch_transfer(self, batch: list[Tensor], dataloader_idx: int) -> list[Tensor]:
            return [2 * batch[0] + 0 * torch.rand(1), *batch[1:]]

    model, batches, options = Moved(), [[inputs(NEW)]], {"noise": lambda x, generator: 1.1 * x}
    models, state = {"hooks": model, "again": model, "other": linear(1)}, torch.get_rng_state()
    moved = compare(models, batches, training=[(X, Y)], **options)
    assert torch.equal(batches[0][0], inputs(NEW)) and torch.equal(torch.get_rng_state(), state)
    plain = compare({"plain": model.net} | three(), [2 * (inputs(NEW) + 1)], training=[(2 * (X + 1), Y)], **options)
    assert moved["hooks"].sensitivity == moved["again"].sensitivity == pytest.approx(plain["plain"].sensitivity)
    assert moved["hooks"].disagreement == pytest.approx(plain["plain"].disagreement)


def test_functions_load_each_model_once_and_streams_are_read_once(tmp_path: Path) -> None:
    checkpoint = {"pytorch-lightning_version": lightning.__version__, "state_dict": linear().state_dict()}
    torch.save(checkpoint, path := tmp_path / "linear.ckpt")
    made = []

    def make(seed: int) -> Linear:
        made.append(seed)
        return linear(seed, 1.0)

    models = {"checkpoint": partial(Linear.load_from_checkpoint, path), "a": partial(make, 0), "b": partial(make, 1)}
    rows = compare(models, (batch for batch in unlabelled_loader()), training=DataLoader(Stream(has_labels=True), 16))
    assert made == [0, 1] and rows["checkpoint"][2:] == rows["a"][2:]


class Named(Linear):
    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"loss": image.sum(), "logits": self.net(image)}


def test_batches_are_dicts_or_what_functions_make_of_them() -> None:
    named = {name: Named(seed=seed) for seed, name in enumerate("abc")}
    of_dicts = compare(named, [{"image": inputs(NEW)}], training=[{"image": X, "label": Y}])
    options = {"inputs": lambda batch: batch["x"] - 1, "targets": lambda batch: batch["z"] - 1}
    selected = compare(batches=[{"x": inputs(NEW) + 1}], training=[{"x": X + 1, "z": Y + 1}], **options)
    for rows in (of_dicts, selected):
        assert [*found(rows).values()] == pytest.approx([*found(compare()).values()])


def test_half_precision_and_a_single_sample_are_compared() -> None:
    half = {name: model.bfloat16() for name, model in three().items()}
    rows = compare(half, [inputs(NEW).bfloat16()], training=[(X.bfloat16(), Y)])
    assert all(math.isfinite(row.disagreement) for row in rows.values())
    single = compare(batches=[inputs(1)])
    assert all(row.disagreement in (0, 1) and math.isnan(row.sensitivity_stderr) for row in single.values())
    assert all(math.isnan(row.difference_stderr) and row.may_be_best for row in single.values())


# What is refused


def broken(act: Callable[[Tensor], Any]) -> nn.Module:
    class Broken(Linear):
        def forward(self, x: Tensor) -> Any:
            return act(self.net(x))

    return Broken()


@pytest.mark.parametrize(("model", "message"), [
    pytest.param(broken(lambda y: y / 0 * 0), "should be finite, got 'nan or inf'", id="nan"),
    pytest.param(broken(lambda y: y.softmax(1)), "should be logits, got 'numbers from 0 to 1'", id="a softmax"),
    pytest.param(broken(lambda y: y[..., None].expand(-1, -1, 3)), "a logit of each class for each", id="dense"),
    pytest.param(broken(lambda y: (y[:, :2], y)), r"which of several.*`outputs=lambda out: out\[1\]`", id="features"),
    pytest.param(nn.Linear(3, 3), "RuntimeError: mat1", id="another input"),
    pytest.param(partial(Linear.load_from_checkpoint, "nowhere.ckpt"), "FileNotFoundError", id="no file"),
    pytest.param(dict, "`models` should be modules, or functions that return one", id="no model"),
])  # fmt: skip
def test_a_model_that_fails_is_named(model: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"Model 'bad' can't be compared.*{message}"):
        compare(three() | {"bad": model})


def test_a_sigmoid_of_a_rare_class_is_refused() -> None:
    models = {str(seed): broken(lambda y, seed=seed: y[:, seed].sigmoid() / 4) for seed in (0, 1)}
    with pytest.raises(MisconfigurationException, match="Model '0' .*should be logits, got 'numbers from 0 to 1'"):
        compare(models, training=[(X, (Y == 0).float())], task="binary")


V, L = labelled(NEW).tensors
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no dict", {"models": [nn.Linear(1, 1)]}, "`models` should be a dict"),
    ("one", {"models": {"a": linear()}}, "`models` should be 2 models or more"),
    ("other classes", {"models": three() | {"bad": nn.Linear(12, 5)}}, "same number of outputs, got .*'bad': 5"),
    ("a loop of lambdas", {"models": dict.fromkeys("abc", linear)}, r"take `partial\(load, path\)`\), got 'equal outp"),
    ("no batches", {"dataloader": []}, "`dataloader` should be an iterable of batches"),
    ("training is empty", {"training": []}, "`training` should be batches with labels"),
    ("training of ignored labels", {"training": [(X, 0 * Y - 100)]}, "`training` should be batches with labels"),
    ("training without labels", {"training": [X]}, "`training` gives no reference.*`targets` should return the labels"),
    ("inputs of another size", {"training": [(X[:, :7], Y)]}, r"no reference: set `features=`.*fail: Expected `in"),
    ("inputs that can't be seen", {"features": lambda batch: None}, "`features` should be a function"),
    ("labels only in training", {"validation_labels": True}, "`validation_labels` can't be read.*`targets` should ret"),
    ("ignored labels", {"dataloader": [(V, 0 * L - 100)], "validation_labels": True}, "all labels are -100"),
    ("logits of another task", {"task": "binary"}, "one logit for each sample"),
    *((name, {name: []}, f"`{name}` should be ") for name in ("noise", "at", "inputs", "validation_labels")),
]


@pytest.mark.parametrize(("change", "message"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_wrong_input_is_refused_in_a_sentence_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        compare_models(**({"models": three(), "dataloader": unlabelled_loader(), "training": TRAINING} | change))


def test_the_result_is_a_list_that_prints_as_a_table_and_goes_into_pandas() -> None:
    result = Comparison([ModelScores(1, "conv", 0.1, 0.0, 0.0, True, 0.01234, 0.0004)])
    lines = [line.split() for line in str(result).splitlines()]
    assert lines == [list(ModelScores._fields), ["1", "conv", "0.1", "0", "0", "True", "0.0123", "0.0004"]]
    frame = pandas.DataFrame(result)
    assert list(frame) == list(ModelScores._fields) and np.isclose(frame.loc[0, "sensitivity"], 0.01234)
