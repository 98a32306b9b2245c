import copy
import gc
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning
import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_sensitivity import compare_models
from lightning_sensitivity.compare import Comparison, _default_device
from lightning_sensitivity.functional.scores import consensus_scores
from tests.helpers import Classifier, Linear, brute_force, inputs, labelled, loader, unlabelled_loader


def linear(scale: float = 9.0, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    model = Linear()
    model.scale = scale
    return model


def compare(models: dict[str, Any], dataloader: Any = unlabelled_loader(), **kwargs: Any) -> Comparison:  # noqa: B008
    gc.freeze()  # else each model waits for a look at all modules that were imported
    return compare_models(models, dataloader, device="cpu", **kwargs)


def test_linear_models_have_the_sensitivity_of_their_weights_and_differences_are_sharper() -> None:
    models = {"large": linear(1.02), "small": linear(0.5), "copy": linear(0.5)}
    result = compare(models, unlabelled_loader(2000, 500), noise=0.3, num_draws=2, task=None)
    assert [row.name for row in result] == ["small", "copy", "large"] and result.models[-1] is result["large"]
    for row in result:
        truth = (0.3 * models[row.name].scale * models[row.name].net.weight.mean(0)).square().sum().item()
        assert abs(row.sensitivity - truth) < 4 * row.sensitivity_stderr < 0.4 * truth
    value, stderr = result.difference("large", "small", "sensitivity")
    assert value == pytest.approx((2.04**2 - 1) * result["small"].sensitivity, rel=1e-4)
    assert stderr == pytest.approx((1 - 2.04**-2) * result["large"].sensitivity_stderr, rel=0.05)
    assert result.ties() == {"large": [], "small": ["copy"], "copy": ["small"]}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_scores_are_those_of_a_plain_loop_and_the_model_is_left_alone(is_compiled: bool) -> None:
    model, (x, y) = Classifier(), labelled(50).tensors
    before, passed = copy.deepcopy(model), torch.compile(model, backend="eager") if is_compiled else model
    row = compare({"model": passed}, loader(), num_draws=2, seed=3, targets=lambda batch: batch[1]).models[0]
    assert model.training and all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    changes, outputs = brute_force(before.eval(), x.split(16), num_draws=2, seed=3), before(x).detach()
    assert row.sensitivity == pytest.approx(changes.var(correction=0).item(), rel=1e-6)
    assert row.loss == pytest.approx(cross_entropy(outputs, y).item(), rel=1e-5)
    assert row.error == pytest.approx((outputs.argmax(1) != y).double().mean().item())
    assert row.num_parameters == sum(map(torch.numel, model.parameters())) and row.seconds > 0


def test_the_consensus_is_that_of_models_which_have_learned_something() -> None:
    models = {seed: linear(9.0, int(seed)) for seed in "012"} | {"undecided": linear(0.01)}
    result = compare(models, loader())
    log_p = {name: model(inputs(50)).detach().log_softmax(1)[:, None] for name, model in models.items()}
    for name, scores in consensus_scores(log_p, voters="012").items():
        actual = result[name].consensus_loss, result[name].consensus_error
        assert actual == pytest.approx([values.mean().item() for values in scores], rel=1e-5)
    assert result["undecided"].note.startswith("undecided")
    assert [row.consensus_error for row in result] == sorted(row.consensus_error for row in result)
    assert all(math.isnan(row.loss) for row in result)  # labels are those that the user names


def test_two_models_have_no_consensus_and_the_table_says_why() -> None:
    result = compare({"first": linear(seed=0), "second": linear(seed=1), "undecided": linear(0.01)})
    assert all(math.isnan(row.consensus_error) and math.isnan(row.consensus_loss) for row in result)
    text = " ".join(str(result).split())
    assert "Sorted by sensitivity" in text and "three models or more that have learned something" in text


def test_functions_make_models_one_after_another_for_the_same_batches(tmp_path: Path) -> None:
    checkpoint = {"pytorch-lightning_version": lightning.__version__, "state_dict": linear().state_dict()}
    torch.save(checkpoint, path := tmp_path / "linear.ckpt")
    shuffling, models = DataLoader(labelled(50), 16, shuffle=True), {"module": linear(1.0), "again": linear(1.0)}
    models["function"] = lambda: Linear.load_from_checkpoint(path)
    assert len({(row.sensitivity, row.loss) for row in compare(models, shuffling, targets=lambda batch: batch[1])}) == 1


def test_a_model_that_fails_is_a_row_that_says_why_and_does_not_lose_the_others() -> None:
    failures: dict[str, Any] = {"RuntimeError: mat1": nn.Linear(3, 3), "50 samples gave nan or inf": linear(math.nan)}
    failures |= {"logits of classes": nn.Sequential(linear(), nn.Softmax(1)), "`task='binary'`": nn.Linear(12, 1)}
    failures |= {"FileNotFoundError": lambda: Linear.load_from_checkpoint("nowhere.ckpt")}
    failures |= {"makes a module, but it made OrderedDict": lambda: linear().state_dict()}
    result = compare(failures | {"good": linear()})
    assert result.models[0].name == "good"
    assert result["good"].sensitivity == compare({"good": linear()})["good"].sensitivity
    assert all(name in result[name].note and result[name].note.startswith("failed: ") for name in failures)


def test_outputs_of_a_sigmoid_are_warned_of() -> None:
    with pytest.warns(UserWarning, match=r"lie in \[0, 1\]"):
        compare({"model": nn.Sequential(nn.Linear(12, 1), nn.Sigmoid())}, task="binary")


@pytest.mark.parametrize(("argument", "value", "message"), [
    *(("models", x, "`models` should be ") for x in ({}, [nn.Linear(1, 1)], {"a": "a.ckpt"})),
    *((name, [], f"`{name}` should be ") for name in ("noise", "at", "num_draws", "seed", "inputs", "targets", "task")),
    *(("at", x, "`at` should be ") for x in ("no", "")), ("dataloader", 1, "an iterable of batches, got 1"),
    ("dataloader", unlabelled_loader(1), "two samples or more"),
    ("targets", lambda batch: torch.full((len(batch),), 9), "Expected labels from 0 to 3"),
])  # fmt: skip
def test_arguments_and_data_that_no_model_can_take_are_refused(argument: str, value: Any, message: str) -> None:
    with pytest.raises((MisconfigurationException, RuntimeError), match=message):
        compare(**{"models": {"model": linear()}, argument: value})


def test_what_is_no_model_or_batch_is_given_by_keyword() -> None:
    with pytest.raises(TypeError, match="positional"):
        compare_models({"model": linear()}, unlabelled_loader(), 0.1)  # type: ignore[misc]


@dataclass
class Machine:
    """A torch and a machine: what torch was compiled for, and what is there."""

    compiled_for: str | None
    has_gpu: bool = False
    has_mps: bool = False
    has_torch_accelerator: bool = True  # since torch 2.6


@pytest.mark.parametrize(("machine", "expected"), [
    pytest.param(Machine("cuda", has_gpu=True), "cuda", id="GPU"),
    pytest.param(Machine("cuda"), "cpu", id="torch for CUDA, no GPU"),
    pytest.param(Machine(None), "cpu", id="torch for CPU"),
    pytest.param(Machine("cuda", has_gpu=True, has_torch_accelerator=False), "cuda", id="torch 2.5, GPU"),
    pytest.param(Machine("cuda", has_torch_accelerator=False), "cpu", id="torch 2.5 for CUDA, no GPU"),
    pytest.param(Machine("mps", has_mps=True, has_torch_accelerator=False), "mps", id="torch 2.5, MPS"),
])  # fmt: skip
def test_the_default_device_is_one_that_the_machine_has(
    machine: Machine, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_for = torch.device(machine.compiled_for) if machine.compiled_for else None
    if machine.has_torch_accelerator:
        accelerator = SimpleNamespace(
            current_accelerator=lambda: compiled_for, is_available=lambda: machine.has_gpu or machine.has_mps
        )
        monkeypatch.setattr(torch, "accelerator", accelerator, raising=False)
    else:
        monkeypatch.delattr(torch, "accelerator", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine.has_gpu)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: machine.has_mps)
    assert _default_device() == torch.device(expected)
    if expected == "cpu":
        assert math.isfinite(compare_models({"model": linear()}, unlabelled_loader())["model"].sensitivity)
