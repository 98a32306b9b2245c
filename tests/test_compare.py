import copy
import gc
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pandas
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import compare_models
from lightning_sensitivity.compare import Comparison, ModelScores
from lightning_sensitivity.functional import fit_reference, principal_components
from lightning_sensitivity.functional.consensus import jury_classes
from tests.helpers import Classifier, Linear, Stream, brute_force, inputs, labelled, loader, unlabelled_loader


def linear(seed: int = 0, scale: float = 9.0) -> Linear:
    model = Linear(seed=seed)
    model.scale = scale
    return model


def three() -> dict[str, Any]:
    return {name: linear(seed) for seed, name in enumerate("abc")}


def compare(models: Any, batches: Any = unlabelled_loader(), **kwargs: Any) -> dict[str, ModelScores]:  # noqa: B008
    """The rows by name, in their order."""
    gc.freeze()  # else each model waits for a look at all modules that were imported
    return {row.name: row for row in compare_models(models, batches, **kwargs)}


def probabilities(models: dict[str, Any], x: Tensor) -> Tensor:
    return torch.stack([model(x).detach().softmax(1) for model in models.values()])


def disagreement(models: dict[str, Any], *jury: Any) -> dict[str, float]:
    p = probabilities(models, inputs(50))
    differs = p.argmax(2) != jury_classes(p, *jury)
    return dict(zip(models, differs.float().mean(1).tolist(), strict=True))


def found(rows: dict[str, ModelScores]) -> dict[str, float]:
    return {name: row.disagreement for name, row in rows.items()}


# The rank


def test_without_a_reference_models_are_judged_by_the_class_of_their_mean() -> None:
    rows = compare(three())
    assert found(rows) == pytest.approx(disagreement(three()))
    assert [row.rank for row in rows.values()] == [1, 2, 3] and list(found(rows).values()) == sorted(
        found(rows).values()
    )


@pytest.mark.parametrize("num_training", [200, 1600])
def test_with_training_samples_a_reference_has_a_seat_in_the_jury(num_training: int) -> None:
    models, (x, y) = {"a": linear(0), "b": linear(1)}, labelled(num_training, seed=1).tensors
    kept = (
        torch.arange(num_training) if num_training <= 1000 else torch.cat([torch.arange(400), torch.arange(800, 1400)])
    )
    batches = DataLoader(TensorDataset(x, y), 200)
    if num_training > 1000:  # evenly spaced batches
        turns = sorted(range(8), key=lambda index: index * (math.sqrt(5) - 1) / 2 % 1)
        kept = torch.cat([torch.arange(200 * index, 200 * index + 200) for index in sorted(turns[:5])])
    features = principal_components(x[kept], inputs(50))
    reference = fit_reference(features[0], one_hot(y[kept], 4), features[1]).predictions
    assert found(compare(models, training=batches)) == pytest.approx(
        disagreement(models, reference, len(kept) / num_training)
    )


def test_the_features_of_the_user_are_what_the_reference_sees() -> None:
    models, seen = {"a": linear(0), "b": linear(1)}, []

    def features(batch: Any) -> Tensor:
        seen.append(batch)
        return (batch[0] if isinstance(batch, list) else batch)[:, :4]

    x, y = labelled(50, seed=1).tensors
    reduced = principal_components(x[:, :4], inputs(50)[:, :4])
    reference = fit_reference(reduced[0], one_hot(y, 4), reduced[1]).predictions
    rows = compare(models, training=loader(seed=1), features=features)
    assert found(rows) == pytest.approx(disagreement(models, reference)) and len(seen) == 8


@pytest.mark.parametrize("num_labels", [50, 20])
def test_validation_labels_count_as_many_as_they_are_and_the_jury_as_100(num_labels: int) -> None:
    x, y = labelled(50).tensors
    given = torch.where(torch.arange(50) < num_labels, y, -100)
    wrong = (probabilities(three(), x).argmax(2) != y)[:, :num_labels].float().mean(1)
    by_jury = torch.tensor(list(disagreement(three()).values()))
    expected = dict(zip("abc", ((num_labels * wrong + 100 * by_jury) / (num_labels + 100)).tolist(), strict=True))
    rows = compare(three(), DataLoader(TensorDataset(x, given), 16), validation_labels=True)
    assert found(rows) == pytest.approx(expected)


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_other_tasks_have_a_decision_for_each_output(task: str) -> None:
    num_outputs, (x, y) = 1 if task == "binary" else 4, labelled(50, seed=1).tensors
    labels = (y == 0).float() if task == "binary" else one_hot(y, 4).float()
    options = {"task": task, "outputs": lambda logits: logits[:, :num_outputs]}
    p = torch.stack([model(inputs(50)).detach()[:, :num_outputs].sigmoid() for model in three().values()])
    differs = (p > 0.5) != (p.mean(0) > 0.5)
    assert found(compare(three(), **options)) == pytest.approx(
        dict(zip("abc", differs.float().mean((1, 2)).tolist(), strict=True))
    )
    batches = [(x, labels)]
    if task == "binary":  # outputs (N,)
        options["outputs"] = lambda logits: logits[:, 0]
    rows = compare(three(), batches, training=batches, validation_labels=True, **options)
    assert all(0 <= row.disagreement < 1 for row in rows.values())


def test_models_that_samples_cannot_tell_from_the_first_may_be_best() -> None:
    models = three() | {"same": linear(0), "reversed": linear(0, scale=-9.0)}
    rows = compare(models, unlabelled_loader(500))
    assert rows["same"].may_be_best == rows["a"].may_be_best and rows["same"].disagreement == rows["a"].disagreement
    assert next(iter(rows.values())).may_be_best and not rows["reversed"].may_be_best


# Sensitivity


@pytest.mark.parametrize("is_compiled", [False, True])
def test_sensitivity_is_that_of_a_plain_loop_and_models_are_left_as_they_were(is_compiled: bool) -> None:
    model = Classifier()
    before, passed = copy.deepcopy(model), torch.compile(model, backend="eager") if is_compiled else model
    row = compare({"model": passed, "other": Classifier(seed=1)}, loader(), training=loader(seed=1))["model"]
    assert model.training and all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    changes = brute_force(before.eval(), inputs(50).split(16))
    assert row.sensitivity == pytest.approx(changes.var(correction=0).item(), rel=1e-5)


def test_linear_models_have_the_sensitivity_of_their_weights() -> None:
    models = three() | {"small": linear(0, 0.5)}
    rows = compare(models, unlabelled_loader(2000, 500), noise=0.3)
    for name, row in rows.items():
        truth = (0.3 * models[name].scale * models[name].net.weight.mean(0)).square().sum().item()
        assert abs(row.sensitivity - truth) < 4 * row.sensitivity_stderr < 0.4 * truth
    assert all(math.isnan(row.sensitivity) for row in compare(models, noise=None).values())


# Models and batches


def test_batches_pass_through_the_hooks_of_a_module_without_a_trace() -> None:
    class Moved(Linear):
        def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch.add_(1)

        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return 2 * batch + 0 * torch.rand(1)

    model, batches, options = Moved(), [inputs(50)], {"noise": lambda x, generator: 1.1 * x}
    models, state = {"hooks": model, "again": model, "other": linear(1)}, torch.get_rng_state()
    moved = compare(models, batches, **options)
    assert torch.equal(batches[0], inputs(50)) and torch.equal(torch.get_rng_state(), state)
    plain = compare({"plain": model.net} | three(), [2 * (inputs(50) + 1)], **options)
    assert moved["hooks"].sensitivity == moved["again"].sensitivity == pytest.approx(plain["plain"].sensitivity)


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


def test_half_precision_and_a_single_sample_are_compared() -> None:
    half = {name: model.bfloat16() for name, model in three().items()}
    training = [(inputs(50).bfloat16(), labelled(50).tensors[1])]
    assert all(
        math.isfinite(row.disagreement) for row in compare(half, [inputs(50).bfloat16()], training=training).values()
    )
    single = compare(three(), [inputs(1)])
    assert all(row.disagreement in (0, 1) and math.isnan(row.sensitivity_stderr) for row in single.values())


def broken(act: Callable[[Tensor], Tensor]) -> nn.Module:
    class Broken(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return act(self.net(x))

    return Broken()


@pytest.mark.parametrize(("model", "message"), [
    pytest.param(broken(lambda y: y / 0 * 0), "should be finite, got 'nan or inf'", id="nan"),
    pytest.param(broken(lambda y: y.softmax(1)), "should be logits, got 'numbers from 0 to 1'", id="probabilities"),
    pytest.param(broken(lambda y: y[:, :1]), "a logit of each class for each sample", id="one output"),
    pytest.param(broken(lambda y: y[..., None].expand(-1, -1, 3)), "a logit of each class for each", id="dense"),
    pytest.param(nn.Linear(3, 3), "RuntimeError: mat1", id="another input"),
    pytest.param(partial(Linear.load_from_checkpoint, "nowhere.ckpt"), "FileNotFoundError", id="no file"),
    pytest.param(dict, "`models` should be modules, or functions that return one", id="no model"),
])  # fmt: skip
def test_a_model_that_fails_is_named(model: Any, message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"Model 'bad' can't be compared.*{message}"):
        compare_models(three() | {"bad": model}, unlabelled_loader())


X, Y = labelled(50).tensors
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("no dict", {"models": [nn.Linear(1, 1)]}, "`models` should be a dict"),
    ("paths", {"models": {"a": "a.ckpt", "b": "b.ckpt"}}, r"`models` should be .*load_from_checkpoint, path\).*'str'"),
    ("names", {"models": {0: linear(), 1: linear()}}, "`models` should be a dict"),
    ("two without a reference", {"models": {"a": linear(), "b": linear()}}, "`models` should be 3 models or more"),
    ("one", {"models": {"a": linear()}, "training": [(X, Y)]}, "`models` should be 2 models or more"),
    ("other classes", {"models": three() | {"bad": nn.Linear(12, 5)}}, "same number of outputs, got .*'bad': 5"),
    ("a loop of lambdas", {"models": dict.fromkeys("abc", linear)}, r"take `partial\(load, path\)`\), got 'equal outp"),
    ("no batches", {"dataloader": []}, "`dataloader` should be an iterable of batches"),
    ("no loader", {"dataloader": 3}, "`dataloader` should be an iterable of batches"),
    ("training is no loader", {"training": 3}, "`training` should be an iterable of batches"),
    ("training is empty", {"training": []}, "`training` should be batches with labels"),
    ("training without labels", {"training": [X]}, "`training` gives no reference.*`targets` should return the labels"),
    ("labels of another task", {"training": [(X, Y + 4)]}, "Expected labels from 0 to 3"),
    ("inputs of another size", {"training": [(X[:, :7], Y)]}, "`training` gives no reference .set `features=`"),
    ("labels only in training", {"training": [(X, Y)], "validation_labels": True}, "`targets` should return the lab"),
    ("ignored labels", {"dataloader": [(X, 0 * Y - 100)], "validation_labels": True}, "all labels are -100"),
    ("logits of another task", {"task": "binary"}, "one logit for each sample"),
    ("a submodule", {"at": "no"}, "`at` should be "),
    *(
        (name, {name: []}, f"`{name}` should be ")
        for name in ("noise", "at", "inputs", "features", "validation_labels")
    ),
    ("a task", {"task": None}, "`task` should be one of"),
]


@pytest.mark.parametrize(("change", "message"), [each[1:] for each in WRONG], ids=[each[0] for each in WRONG])
def test_wrong_input_is_refused_in_a_sentence_that_names_it(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=message):
        compare_models(**({"models": three(), "dataloader": unlabelled_loader()} | change))


def test_two_class_heads_are_warned_of_by_name() -> None:
    head = nn.Linear(12, 2)
    head.weight.data[1] = -head.weight.data[0]
    with pytest.warns(UserWarning, match="Model 'centred': Only"):
        compare({"centred": head, "b": nn.Linear(12, 2), "c": nn.Linear(12, 2)})


def test_the_result_is_a_list_that_prints_as_a_table_and_goes_into_pandas() -> None:
    result = Comparison([ModelScores(1, "conv", 0.1, True, 0.01234, 0.0004)])
    lines = [line.split() for line in str(result).splitlines()]
    assert lines == [list(ModelScores._fields), ["1", "conv", "0.1", "True", "0.0123", "0.0004"]]
    frame = pandas.DataFrame(result)
    assert list(frame) == list(ModelScores._fields) and frame.loc[0, "sensitivity"] == 0.01234
