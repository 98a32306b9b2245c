import copy
import gc
import math
import warnings
from pathlib import Path
from typing import Any

import lightning
import pandas
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torch.utils.data import DataLoader

from lightning_sensitivity import compare_models
from lightning_sensitivity.compare import Comparison, ModelScores
from lightning_sensitivity.functional.consensus import consensus_errors
from tests.helpers import Classifier, Linear, brute_force, inputs, labelled, loader, unlabelled_loader


def linear(scale: float = 9.0, seed: int = 0) -> Linear:
    model = Linear(seed=seed)
    model.scale = scale
    return model


def compare(models: Any, batches: Any = unlabelled_loader(), **kwargs: Any) -> dict[str, ModelScores]:  # noqa: B008
    """The rows by name, in their order."""
    gc.freeze()  # else each model waits for a look at all modules that were imported
    return {row.name: row for row in compare_models(models, batches, **kwargs)}


# Scores of one model


def test_linear_models_have_the_sensitivity_of_their_weights() -> None:
    models = {"large": linear(1.02), "small": linear(0.5)}
    rows = compare(models, unlabelled_loader(2000, 500), noise=0.3, num_draws=2, task=None)
    assert list(rows) == ["small", "large"]
    for name, row in rows.items():
        truth = (0.3 * models[name].scale * models[name].net.weight.mean(0)).square().sum().item()
        assert abs(row.sensitivity - truth) < 4 * row.sensitivity_stderr < 0.4 * truth
        assert math.isnan(row.consensus_error)


@pytest.mark.parametrize("is_compiled", [False, True])
def test_scores_are_those_of_a_plain_loop_and_the_model_is_left_as_it_was(is_compiled: bool) -> None:
    model = Classifier()
    before, passed = copy.deepcopy(model), torch.compile(model, backend="eager") if is_compiled else model
    (row,) = compare_models({"model": passed}, loader(), num_draws=2, seed=3)
    assert model.training and all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    changes = brute_force(before.eval(), inputs(50).split(16), num_draws=2, seed=3)
    assert row.sensitivity == pytest.approx(changes.var(correction=0).item(), rel=1e-5)


def test_batches_pass_through_the_hooks_of_a_module() -> None:
    class Moved(Linear):
        def on_before_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch.add_(1)

        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return 2 * batch

    model, batches, options = Moved(), [inputs(50)], {"noise": lambda x, generator: 1.1 * x}
    moved = compare({"hooks": model, "again": model}, batches, **options)
    plain = compare({"plain": model.net}, [2 * (inputs(50) + 1)], **options)
    assert moved["hooks"].sensitivity == moved["again"].sensitivity == pytest.approx(plain["plain"].sensitivity)
    assert torch.equal(batches[0], inputs(50))


def test_a_hook_that_draws_random_numbers_does_not_change_what_passes_draw() -> None:
    class Drawing(Linear):
        def on_after_batch_transfer(self, batch: Tensor, dataloader_idx: int) -> Tensor:
            return batch + 0 * torch.rand(1)

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) + torch.rand(len(x), 1)

    assert compare({"drawing": Drawing()}, [inputs(50)], noise=1e-6)["drawing"].sensitivity < 1e-6


# The consensus


def log_probabilities(num_models: int, decisions: int = 1) -> dict[str, Tensor]:
    """Of models that agree in part."""
    g = torch.Generator().manual_seed(0)
    truth, own = torch.randn(20, decisions, 4, generator=g), torch.randn(num_models, 20, decisions, 4, generator=g)
    return {str(index): values.log_softmax(2) for index, values in enumerate(3 * truth + 2 * own)}


def errors_by_loops(models: dict[str, Tensor], voters: str) -> dict[str, float]:
    """By plain loops, with each vote's confidence found on a fine grid."""
    predicted = {name: log_p.argmax(2) for name, log_p in models.items()}
    joint = torch.ones(20, 1, 4, dtype=torch.float64)
    for name in voters:
        agreement = sum((predicted[name] == predicted[other]).double().mean() for other in voters if other != name)
        scales = torch.logspace(-1.3, 1.3, 2000).double()
        grid = [(scale * models[name].double()).softmax(2).amax(2).mean() for scale in scales]
        nearest = (torch.stack(grid) - agreement / (len(voters) - 1)).abs().argmin()
        joint = joint * (scales[nearest] * models[name].double()).softmax(2)
    joint = joint / joint.sum(2, keepdim=True)
    return {name: 1 - joint.gather(2, index[..., None]).mean().item() for name, index in predicted.items()}


@pytest.mark.parametrize(("decisions", "voters"), [
    pytest.param(1, "0123", id="all vote"),
    pytest.param(3, "0123", id="three decisions a sample"),
    pytest.param(1, "012", id="one has no vote"),
])  # fmt: skip
def test_the_consensus_is_that_of_plain_loops(decisions: int, voters: str) -> None:
    models = log_probabilities(4, decisions)
    assert consensus_errors(models, voters) == pytest.approx(errors_by_loops(models, voters), abs=2e-3)


@pytest.mark.parametrize("task", ["multiclass", "binary", "multilabel"])
def test_the_consensus_is_that_of_the_probabilities_of_the_task(task: str) -> None:
    models = {str(seed): linear(seed=seed) for seed in range(3)}
    num_outputs = 1 if task == "binary" else 4
    found = compare(models, task=task, outputs=lambda logits: logits[:, :num_outputs])
    logits = {name: model(inputs(50)).detach()[:, :num_outputs] for name, model in models.items()}
    if task == "multiclass":
        log_p = {name: z.log_softmax(1)[:, None] for name, z in logits.items()}
    else:
        log_p = {name: torch.stack([logsigmoid(-z), logsigmoid(z)], 2) for name, z in logits.items()}
    expected = consensus_errors(log_p, models)
    assert {name: row.consensus_error for name, row in found.items()} == pytest.approx(expected, rel=1e-4)


def test_no_model_gains_by_being_unsure_of_itself() -> None:
    models = log_probabilities(4)
    before = consensus_errors(models, models)
    worst = max(before, key=lambda name: before[name])
    unsure = models | {worst: (0.4 * models[worst]).log_softmax(2)}
    assert consensus_errors(unsure, unsure) == pytest.approx(before, abs=1e-4)


def test_there_is_no_consensus_of_two_models_or_of_different_classes() -> None:
    models = log_probabilities(3)
    assert consensus_errors(models, "01") == {}
    assert consensus_errors(models | {"other": torch.zeros(20, 1, 5).log_softmax(2)}, "012") == {}
    rows = compare({"first": linear(seed=0), "second": linear(seed=1), "undecided": linear(0.01)})
    assert next(iter(rows)) == "undecided" and all(math.isnan(row.consensus_error) for row in rows.values())
    assert rows["undecided"].note.startswith("undecided") and rows["first"].note.startswith("no consensus")


def test_certain_models_that_disagree_give_finite_errors() -> None:
    certain, other, impossible = torch.tensor([[[[0, -1e5]]], [[[-1e5, 0]]], [[[0, -math.inf]]]])
    errors = consensus_errors({"a": certain, "b": certain, "c": other}, "abc")
    assert errors["a"] < 1e-6 and errors["c"] > 1 - 1e-6
    assert abs(consensus_errors(dict.fromkeys("abc", impossible), "abc")["a"]) < 1e-6


# Models, data and arguments


def test_functions_make_models_one_after_another_for_the_same_batches(tmp_path: Path) -> None:
    checkpoint = {"pytorch-lightning_version": lightning.__version__, "state_dict": linear().state_dict()}
    torch.save(checkpoint, path := tmp_path / "linear.ckpt")
    shuffling, models = DataLoader(labelled(50), 16, shuffle=True), {"module": linear(1.0), "again": linear(1.0)}
    models["function"] = lambda: Linear.load_from_checkpoint(path)
    rows = compare(models, shuffling)
    assert len({row[1:] for row in rows.values()}) == 1


def test_a_model_that_fails_is_a_row_that_says_why_and_does_not_lose_the_others() -> None:
    failures: dict[str, Any] = {"RuntimeError: mat1": nn.Linear(3, 3), "got 0 of 50": linear(math.nan)}
    failures |= {"logits of classes": nn.Sequential(linear(), nn.Softmax(1)), "`task='binary'`": nn.Linear(12, 1)}
    failures |= {"FileNotFoundError": lambda: Linear.load_from_checkpoint("nowhere.ckpt"), "it made dict": dict}
    rows = compare(failures | {"good": linear()})
    assert list(rows) == ["good", *failures]
    assert rows["good"].sensitivity == compare({"good": linear()})["good"].sensitivity
    assert all(name in rows[name].note and rows[name].note.startswith("failed: ") for name in failures)


def test_if_all_models_fail_the_last_failure_is_raised() -> None:
    with pytest.raises(ValueError, match="got 0 of 50"):
        compare({"shape": nn.Linear(3, 3), "nan": linear(math.nan)})


def test_outputs_of_a_sigmoid_are_warned_of_and_a_warning_that_is_an_error_ends_it() -> None:
    models, batches = {"sigmoid": nn.Sigmoid(), "other": nn.Identity()}, [torch.linspace(-3, 3, 20)[:, None]]
    with pytest.warns(UserWarning, match=r"lie in \[0, 1\]"):
        compare(models, batches, task="binary")
    compare({"last": nn.Identity()}, [-torch.ones(20, 1), torch.full((1, 1), 0.5)], task="binary")  # by chance
    with warnings.catch_warnings(), pytest.raises(UserWarning, match=r"lie in \[0, 1\]"):
        warnings.simplefilter("error")
        compare(models, batches, task="binary")


def test_two_class_heads_are_warned_of_by_name() -> None:
    head = nn.Linear(12, 2)
    head.weight.data[1] = -head.weight.data[0]
    with pytest.warns(UserWarning, match="Model 'centred': Only"):
        compare({"centred": head})


@pytest.mark.parametrize(("argument", "value", "message"), [
    *(("models", x, "`models` should be ") for x in ({}, [nn.Linear(1, 1)], {"a": "a.ckpt"}, {0: nn.Linear(1, 1)})),
    *((name, [], f"`{name}` should be ") for name in ("noise", "at", "num_draws", "seed", "inputs", "task")),
    *(("at", x, "`at` should be ") for x in ("no", "")), ("dataloader", [], "an iterable of batches"),
    ("dataloader", unlabelled_loader(1), "two samples or more"),
])  # fmt: skip
def test_arguments_and_data_that_no_model_can_take_are_refused(argument: str, value: Any, message: str) -> None:
    with pytest.raises((MisconfigurationException, ValueError), match=message):
        compare_models(**{"models": {"model": linear()}, "dataloader": unlabelled_loader(), argument: value})


def test_the_result_is_a_list_that_prints_as_a_table_and_goes_into_pandas() -> None:
    result = Comparison([ModelScores("conv", 0.1, 0.01234, 0.0004), ModelScores("no", note="failed: KeyError: 'x'")])
    lines = [line.split(maxsplit=4) for line in str(result).splitlines()]
    assert lines[0] == list(ModelScores._fields)
    assert lines[1] == ["conv", "0.1", "0.0123", "0.0004"]
    assert lines[2] == ["no", *["nan"] * 3, "failed: KeyError: 'x'"]
    frame = pandas.DataFrame(result)
    assert list(frame) == list(ModelScores._fields) and frame.loc[0, "sensitivity"] == 0.01234
