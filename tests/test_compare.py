import copy
import csv
import gc
import itertools
import math
import weakref
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lightning_sensitivity import compare_models
from lightning_sensitivity.comparison import Comparison, ModelScores
from tests.helpers import Classifier, Linear, brute_force, inputs, labelled, loader, trainer, unlabelled_loader


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    gc.freeze()  # else each model waits for a look at all modules that were imported
    yield
    gc.unfreeze()


def linear(scale: float = 9.0, seed: int = 0, kind: type[Linear] = Linear) -> Linear:
    torch.manual_seed(seed)
    model = kind()
    model.scale = scale
    return model


def compare(models: dict[str, Any], dataloader: Any = None, **kwargs: Any) -> Comparison:
    return compare_models(models, dataloader or unlabelled_loader(), **{"device": "cpu", **kwargs})


def test_linear_models_have_the_sensitivity_of_their_weights_and_differences_are_sharper() -> None:
    models = {"large": linear(1.02), "small": linear(0.5), "copy": linear(0.5)}
    result = compare(models, unlabelled_loader(2000, 500), noise=0.3, num_draws=2, task=None)
    assert [row.name for row in result] == ["small", "copy", "large"] and result[-1] is result["large"]
    for row in result:
        truth = models[row.name].sensitivity(0.3) * models[row.name].scale ** 2
        assert abs(row.sensitivity - truth) < 4 * row.sensitivity_stderr < 0.4 * truth
    value, stderr = result.difference("large", "small")
    assert value == pytest.approx((2.04**2 - 1) * result["small"].sensitivity, rel=1e-4)
    assert stderr == pytest.approx((1 - 2.04**-2) * result["large"].sensitivity_stderr, rel=0.05)
    assert result.ties() == {"large": [], "small": ["copy"], "copy": ["small"]}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_scores_are_those_of_a_plain_loop_and_the_model_is_left_alone(is_compiled: bool) -> None:
    model, (x, y) = Classifier(), labelled(50).tensors
    before, passed = copy.deepcopy(model), torch.compile(model, backend="eager") if is_compiled else model
    row = compare({"model": passed}, loader(), num_draws=2, seed=3)[0]
    assert model.training and all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))
    changes, outputs = brute_force(before.eval(), x.split(16), num_draws=2, seed=3), before(x).detach()
    assert row.sensitivity == pytest.approx(changes.var(correction=0).item(), rel=1e-6)
    power = x.double().square().mean().item() / 0.1**2
    assert row.loss_estimate == pytest.approx((0.5 * 3 / 4 * row.sensitivity * power) ** 0.5, rel=1e-6)
    assert row.loss == pytest.approx(cross_entropy(outputs, y).item(), rel=1e-5)
    assert row.error == pytest.approx((outputs.argmax(1) != y).double().mean().item())
    assert row.num_parameters == sum(map(torch.numel, model.parameters())) and row.seconds > 0


def test_the_others_say_how_often_a_model_is_wrong() -> None:
    models = {str(seed): linear(9.0, seed) for seed in range(3)}
    p = {name: model(inputs(50)).detach().double().softmax(1) for name, model in models.items()}
    result = compare(models | {"undecided": linear(0.01)})
    for name in models:
        votes = sum(p[other] for other in p if other != name) / 2
        wrong, loss = (
            1 - votes.gather(1, p[name].argmax(1, keepdim=True)).mean(),
            -(votes * p[name].log()).sum(1).mean(),
        )
        assert result[name].consensus_error == pytest.approx(wrong.item(), rel=1e-5)
        assert result[name].consensus_loss == pytest.approx(loss.item(), rel=1e-5)
    assert result["undecided"].note.startswith("undecided") and result["undecided"].consensus_loss > 0
    errors = [row.consensus_error for row in result]
    assert errors == sorted(errors) and math.isnan(compare(dict([*models.items()][:2]))[0].consensus_error)


def test_labels_are_those_that_fit() -> None:
    samples: Any = [{"image": x, "kind": y} for x, y in labelled(50)]
    for targets, is_nan in (("kind", False), (lambda batch: None, True)):
        row = compare({"model": linear()}, DataLoader(samples, 16), inputs="image", targets=targets)[0]
        assert math.isnan(row.loss) == is_nan
    for model, y in ((linear(), torch.arange(50)), (nn.Linear(12, 500), torch.arange(50) % 4)):  # an embedding
        with pytest.warns(UserWarning, match="finds no labels: .*`targets=`"):
            row = compare({"model": model}, DataLoader(TensorDataset(inputs(50), y), 16))[0]
        assert math.isnan(row.loss) and math.isnan(row.error) and row.sensitivity > 0


class Transforming(Linear):
    """Its hook triples each batch, and a part of it is built late."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 3

    def configure_model(self) -> None:
        self.forward = self.net.forward


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_hooks_of_a_module_transform_its_batches(is_compiled: bool) -> None:
    model: Any = linear(kind=Transforming)
    row = compare({"model": torch.compile(model, backend="eager") if is_compiled else model})[0]
    expected = compare({"model": linear(1.0)}, DataLoader(3 * inputs(50), 16))[0]
    assert row.loss_estimate == pytest.approx(expected.loss_estimate, rel=1e-6)


def save(path: Path, **more: Any) -> Path:
    run = trainer()
    run.strategy.connect(linear(1.0))
    run.save_checkpoint(path)
    torch.save(torch.load(path, weights_only=False) | more, path)
    return path


def test_checkpoints_and_functions_agree_and_run_no_code_unless_the_user_trusts_them(tmp_path: Path) -> None:
    models = {
        "path": save(tmp_path / "a"),
        "code": save(tmp_path / "b", more=Fraction(9)),
        "function": lambda: linear(1.0),
    }
    for weights_only in (True, False):
        result = compare(models, model_class=Linear, weights_only=weights_only)
        assert result["path"].sensitivity == result["function"].sensitivity
        assert result["path"].note == "untrained (step 0)"
        assert ("could run code" in result["code"].note) == weights_only


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of luck")


def test_only_one_model_that_a_function_makes_is_in_memory() -> None:
    models, at_start = list[weakref.ref[nn.Module]](), list[int]()

    def make(kind: type[nn.Module]) -> nn.Module:
        at_start.append(sum(model() is not None for model in models))
        model = kind()
        models.append(weakref.ref(model))
        return model

    compare({str(index): lambda kind=kind: make(kind) for index, kind in enumerate([Linear, Failing, Linear])})
    assert at_start == [0, 0, 0]


class Changing(IterableDataset):
    """Gives other samples each time."""

    seeds = itertools.count()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(inputs(40, next(self.seeds)).split(16))


def test_a_model_that_fails_is_a_row_that_says_why_and_does_not_lose_the_others(tmp_path: Path) -> None:
    torch.save(linear().state_dict(), tmp_path / "weights.pt")
    failures: dict[str, Any] = {
        "out of luck": Failing(),
        "50 samples gave nan or inf": linear(math.nan),
        "got probabilities": nn.Sequential(linear(), nn.Softmax(1)),
        "FileNotFoundError": "nowhere.ckpt",
        "Error": lambda: 3,
        "a checkpoint of Lightning": tmp_path / "weights.pt",
        "`model_class`": save(tmp_path / "model.ckpt"),
    }
    result = compare(failures | {"good": linear()})
    assert result[0].name == "good" and result[0].sensitivity == compare({"good": linear()})[0].sensitivity
    assert all(name in result[name].note and result[name].note.startswith("failed: ") for name in failures)
    result = compare({"first": linear(), "second": linear()}, DataLoader(Changing(), None))
    assert not result["first"].note and "Other inputs than those of 'first'" in result["second"].note


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
@pytest.mark.parametrize(("kwargs", "message"), [
    *(({"dataloader": unlabelled_loader(num)}, f"two samples or more, but got {num}") for num in (0, 1)),
    ({"targets": "label"}, "`targets='label'`"),
    ({"dataloader": loader(), "targets": 1, "task": "binary"}, "one output"),
    *(({"models": models}, "`models` should be a dict") for models in ({}, [nn.Linear(1, 1)], {1: nn.Linear(1, 1)})),
    *(({name: value}, f"`{name}` should be ") for name, value in [("noise", 0), ("num_draws", 0), ("seed", 0.5)]),
    *(({name: value}, f"`{name}` should ") for name, value in [("at", "no"), ("task", "auto"), ("inputs", [])]),
])  # fmt: skip
def test_arguments_and_data_that_no_model_can_take_are_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises((MisconfigurationException, RuntimeError), match=message):
        compare(**{"models": {"model": linear()}, **kwargs})


def test_kendall_is_that_of_scipy_for_six_models_or_more() -> None:
    values = torch.rand(8, 3, generator=torch.Generator().manual_seed(0)).tolist()
    rows = [ModelScores(str(i), s, consensus_loss=1.0, loss=x, error=round(e, 1)) for i, (s, x, e) in enumerate(values)]
    for truth in ("loss", "error"):
        ((name, tau),) = Comparison(rows).kendall(truth).items()
        expected = kendalltau([row.sensitivity for row in rows], [getattr(row, truth) for row in rows])
        assert name == "sensitivity" and tau.tau == pytest.approx(expected.statistic, abs=1e-6)
    assert "Kendall" in str(Comparison(rows)) and "Kendall" not in str(Comparison(rows[:5]))


def test_the_table_shows_what_there_is_and_a_file_has_all_digits(tmp_path: Path) -> None:
    conv, fc = (
        ModelScores(n, s, 0.0004, consensus_error=e) for n, s, e in [("conv", 0.0124, 0.1), ("fc", 0.0123456, 0.2)]
    )
    result = Comparison([fc, ModelScores("broken", note="failed: why, " + "a long story " * 20), conv])
    lines = str(result).splitlines()
    assert [line.split() for line in lines[:4]] == [
        ["model", "consensus_error", "sensitivity", "ties", "with"],
        ["conv", "0.1", "0.0124", "±", "0.0004", "fc"],
        ["fc", "0.2", "0.0123", "±", "0.0004", "conv"],
        ["broken", "*"],
    ]
    assert "* broken: failed: why" in lines[7] and max(map(len, lines)) <= 100
    result.to_csv(tmp_path / "folder" / "table.csv")
    table = list(csv.DictReader((tmp_path / "folder" / "table.csv").open()))
    assert [(row["name"], row["sensitivity"], row["loss"]) for row in table[:2]] == [
        ("conv", "0.0124", ""),
        ("fc", "0.0123456", ""),
    ]
