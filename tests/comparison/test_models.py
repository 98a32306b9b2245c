import gc
import itertools
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from lightning_sensitivity import RiskMonitor, SensitivityMonitor, compare_models
from lightning_sensitivity.comparison import Comparison
from lightning_sensitivity.perturbations import Translation, UniformNoise
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    Classifier,
    Linear,
    inputs,
    labelled,
    loader,
    trainer,
    unlabelled_loader,
)


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> Iterator[None]:
    gc.freeze()  # else each model waits for a look at all modules that were imported
    yield
    gc.unfreeze()


def linear(scale: float = 1.0, seed: int = 0) -> Linear:
    torch.manual_seed(seed)
    model = Linear()
    model.scale = scale
    return model


def compare(models: dict[str, Any], dataloader: Any = None, **kwargs: Any) -> Comparison:
    dataloader = unlabelled_loader() if dataloader is None else dataloader
    return compare_models(models, dataloader, **{"trainer": trainer(), **kwargs})


def save(model: LightningModule, path: Path, steps: int = 0) -> Path:
    run = trainer(max_steps=steps)
    if steps:
        run.fit(model, loader(), loader())
    else:
        run.strategy.connect(model)
    run.save_checkpoint(path)
    return path


class Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of luck")


# What is measured


def test_linear_models_have_the_sensitivity_of_their_weights() -> None:
    models = {"large": linear(2.0), "small": linear(0.5)}
    result = compare(models, unlabelled_loader(2000, 500), noise_std=0.3, num_draws=2)
    assert [row.name for row in result] == ["small", "large"]
    for row in result:
        truth = models[row.name].sensitivity(0.3) * models[row.name].scale ** 2
        assert abs(row.sensitivity - truth) < 4 * row.sensitivity_stderr
        assert row.sensitivity_stderr < 0.1 * truth
        power = inputs(2000).double().square().mean().item() / 0.3**2
        assert row.loss_estimate == pytest.approx((0.5 * 3 / 4 * row.sensitivity * power) ** 0.5, rel=1e-6)
        assert row.num_parameters == NUM_FEATURES * NUM_CLASSES + NUM_CLASSES
        assert row.seconds > 0


@pytest.mark.parametrize(
    "options", [{}, {"num_draws": 2, "seed": 3}, {"perturbation": UniformNoise(0.2)}, {"at": "net"}]
)
def test_values_are_those_of_the_callback(options: dict[str, Any]) -> None:
    model = Classifier().eval()
    row = compare({"model": model}, **options)["model"]
    (logged,) = trainer(callbacks=[SensitivityMonitor(**options)]).validate(model, unlabelled_loader(), verbose=False)
    for name in ("sensitivity", "sensitivity_stderr", "loss_estimate"):
        assert getattr(row, name) == pytest.approx(logged[f"val_{name}"], rel=1e-6)


def test_a_perturbation_without_a_second_moment_gives_no_loss_estimate() -> None:
    images, model = DataLoader(torch.rand(20, 1, 8, 8), 10), nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    row = compare({"model": model}, images, perturbation=Translation(1.0))["model"]
    assert row.sensitivity > 0
    assert row.loss_estimate != row.loss_estimate and row.variance != row.variance


def test_parts_of_a_batch_are_chosen_as_in_the_callback() -> None:
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, image: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"scores": self.net(image) + shift}

    x = inputs(NUM_CLASSES)
    samples = [{"image": x[k], "shift": torch.zeros(NUM_CLASSES), "kind": torch.tensor(k)} for k in range(NUM_CLASSES)]
    data = DataLoader(samples, 2)  # type: ignore[arg-type]
    row = compare({"model": Dictionary()}, data, inputs="image", outputs="scores", targets="kind")["model"]
    with torch.no_grad():
        assert row.loss == pytest.approx(cross_entropy(linear()(x), torch.arange(NUM_CLASSES)).item(), rel=1e-5)
    both = compare({"model": Dictionary()}, data, inputs=["image", "shift"], outputs="scores")["model"]
    assert both.sensitivity > row.sensitivity


# Pairs


def test_pairs_are_sharper_than_values() -> None:
    models = {"model": linear(), "copy": linear(), "slightly larger": linear(1.02)}
    result = compare(models, unlabelled_loader(400, 100))
    assert result.difference("model", "copy") == (0, 0)
    value, stderr = result.difference("slightly larger", "model")
    assert value == pytest.approx((1.02**2 - 1) * result["model"].sensitivity, rel=1e-4)
    # The one is 1.0404 times the other, sample by sample, and so is its error.
    assert stderr == pytest.approx(0.0404 * result["model"].sensitivity_stderr, rel=0.02)
    assert result.ties() == {"model": ["copy"], "copy": ["model"], "slightly larger": []}


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
@pytest.mark.parametrize("has_own_generator", [False, True])
def test_a_loader_that_shuffles_gives_all_models_one_order(has_own_generator: bool) -> None:
    data, generator = labelled(50), torch.Generator().manual_seed(7) if has_own_generator else None
    shuffling = DataLoader(data, 16, sampler=RandomSampler(data, generator=generator))
    result = compare({"model": linear(), "copy": linear()}, shuffling)
    assert result.difference("model", "copy") == (0, 0)
    assert generator is None or torch.equal(generator.get_state(), torch.Generator().manual_seed(7).get_state())


class Changing(IterableDataset):
    """Gives other samples each time."""

    seeds = itertools.count()

    def __iter__(self) -> Iterator[Tensor]:
        return iter(inputs(40, next(self.seeds)).split(16))


def test_other_samples_for_another_model_are_an_error_of_that_model() -> None:
    result = compare({"first": linear(9), "second": linear(9)}, DataLoader(Changing(), None))
    assert result["first"].note == ""
    assert "Other inputs than those of 'first'" in result["second"].note


# Models


def test_modules_and_random_streams_are_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = Classifier(), trainer(max_epochs=1)
    run.fit(model, loader(), loader())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("nothing would put it back"))
    compare({"model": model}, trainer=trainer(precision="bf16-true"))
    assert model.training and model.trainer is run
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32
    assert torch.equal(random_state, torch.get_rng_state())


def test_paths_functions_and_modules_agree(tmp_path: Path) -> None:
    path = save(linear(9), tmp_path / "model.ckpt", steps=2)
    trained = Linear.load_from_checkpoint(path)
    result = compare(
        {"path": path, "text": str(path), "function": lambda: trained, "module": trained}, model_class=Linear
    )
    assert len({row.sensitivity for row in result}) == 1
    assert all(len(others) == 3 for others in result.ties().values())


def test_models_that_have_learned_nothing_say_so(tmp_path: Path) -> None:
    models = {"step 0": save(linear(9), tmp_path / "model.ckpt"), "uniform": linear(0.01), "decided": linear(9)}
    notes = {row.name: row.note for row in compare(models, model_class=Linear)}
    assert notes == {"step 0": "untrained (step 0)", "uniform": "undecided (untrained?)", "decided": ""}


class Remembering(Linear):
    """Keeps its arguments in checkpoints, and with them LightningCLI's word of its class."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.scale = scale


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_a_checkpoint_of_lightning_cli_knows_its_class(tmp_path: Path) -> None:
    name = f"{Remembering.__module__}.Remembering"
    args = ["--model", name, "--model.scale", "3", "--trainer.accelerator", "cpu"]
    options = {"subclass_mode_model": True, "run": False, "save_config_callback": None, "seed_everything_default": 0}
    model = LightningCLI(Linear, args=args, **options).model
    result = compare({"path": save(model, tmp_path / "model.ckpt"), "model": model})
    assert result["path"].sensitivity == result["model"].sensitivity


def test_only_one_model_that_a_function_makes_is_in_memory() -> None:
    alive: list[weakref.ref[nn.Module]] = []
    at_start = []

    def make(kind: type[nn.Module]) -> nn.Module:
        gc.collect()
        at_start.append(sum(reference() is not None for reference in alive))
        module = kind()
        alive.append(weakref.ref(module))
        return module

    kinds = [Linear, Failing, Linear, Linear]
    compare({str(index): lambda kind=kind: make(kind) for index, kind in enumerate(kinds)})
    assert at_start == [0, 0, 0, 0]


class Shifting(Linear):
    """Its hook triples each batch, and a part of it is built late."""

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 3

    def configure_model(self) -> None:
        self.late = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.late(super().forward(x))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_hooks_of_a_module_transform_its_batches(is_compiled: bool) -> None:
    torch.manual_seed(0)
    model = torch.compile(Shifting(), backend="eager") if is_compiled else Shifting()
    row = compare({"model": model})["model"]
    expected = compare({"model": linear()}, DataLoader(3 * inputs(50), 16))["model"]
    assert row.loss_estimate == pytest.approx(expected.loss_estimate, rel=1e-6)


# Data and Trainer


def test_the_trainer_says_how_many_batches() -> None:
    models, passes = {"first": linear(), "second": linear()}, []
    for model in models.values():
        model.net.register_forward_pre_hook(lambda module, args: passes.append(args))
    compare(models, num_draws=3, trainer=trainer(limit_val_batches=2))
    assert len(passes) == 2 * 2 * (1 + 3)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    exact = compare({"model": linear()}, noise_std=0.5)["model"]
    row = compare({"model": linear()}, noise_std=0.5, trainer=trainer(precision=precision))["model"]
    assert row.sensitivity == pytest.approx(exact.sensitivity, rel=1e-6 if precision == "64-true" else 0.05)


def test_without_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(compare_models({"model": linear()}, unlabelled_loader())) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_no_label_is_not_taken_for_one() -> None:
    data = DataLoader(TensorDataset(inputs(50), torch.arange(50)), 2)  # the first two batches could be labels
    with pytest.warns(UserWarning, match="takes the loader for one without labels.*Expected labels from 0 to 3"):
        row = compare({"model": linear()}, data)["model"]
    assert row.loss != row.loss and row.error != row.error
    assert row.sensitivity == compare({"model": linear()}, unlabelled_loader(50, 2))["model"].sensitivity
    told = compare({"model": linear()}, data, targets=lambda batch: None)["model"]
    assert told.loss != told.loss


# What goes wrong


def test_a_model_that_fails_is_a_row_and_does_not_lose_the_others(tmp_path: Path) -> None:
    torch.save(linear().state_dict(), tmp_path / "weights.pt")
    save(linear(), tmp_path / "model.ckpt")
    failures = {
        "broken": (Failing(), "failed: RuntimeError: out of luck"),
        "nan": (linear(float("nan")), "50 samples gave nan or inf"),
        "probabilities": (nn.Sequential(linear(), nn.Softmax(1)), "got probabilities"),
        "missing": ("nowhere.ckpt", "FileNotFoundError"),
        "function": (lambda: 3, "Expected a function that returns a module, but got int"),
        "number": (3, "TypeError"),
        "weights": (tmp_path / "weights.pt", "Expected a checkpoint of Lightning"),
        "class": (tmp_path / "model.ckpt", "`model_class` should be the class of the checkpoint, got None"),
    }
    result = compare({name: model for name, (model, _) in failures.items()} | {"good": linear(9)})
    assert next(iter(result)).name == "good"
    for name, (_, note) in failures.items():
        assert note in result[name].note and result[name].note.startswith("failed: ")
    alone = compare({"good": linear(9)})["good"]
    assert (result["good"].sensitivity, result["good"].note) == (alone.sensitivity, "")


def test_a_doubtful_sensitivity_is_said_of_its_model() -> None:
    class Centred(Linear):
        def forward(self, x: Tensor) -> Tensor:
            outputs = 9 * super().forward(x)
            return outputs - outputs.mean(1, keepdim=True)

    with pytest.warns(UserWarning, match="Model 'centred': The class average holds"):
        compare({"good": linear(9), "centred": Centred()})


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
@pytest.mark.parametrize(("dataloader", "kwargs", "message"), [
    *((unlabelled_loader(num), {}, f"two samples or more, but got {num}") for num in (0, 1)),
    ([unlabelled_loader(), unlabelled_loader()], {}, "`dataloader` should be one loader, got several"),
    (unlabelled_loader(), {"targets": "label"}, "targets='label'"),
    (unlabelled_loader(), {"at": "nowhere"}, "nowhere"),
    (loader(), {"targets": 1, "task": "regression"}, "one label per output"),
])  # fmt: skip
def test_data_that_no_model_can_take(dataloader: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s)No model could be scored.*{message}"):
        compare({"model": linear()}, dataloader, **kwargs)


@pytest.mark.parametrize(("kwargs", "message"), [
    *(({"models": models}, "a dict of names and models") for models in ({}, [nn.Linear(1, 1)], {1: nn.Linear(1, 1)})),
    ({"noise_std": 0}, "a positive, finite number"),
    ({"at": ["net", "net.0"]}, "a submodule's name or None"),
    ({"task": "auto"}, "one of 'multiclass'"),
    ({"trainer": trainer(callbacks=[SensitivityMonitor()])}, "one of its own"),
    ({"trainer": trainer(callbacks=[RiskMonitor()])}, "one of its own"),
    ({"trainer": trainer(strategy="ddp_fork", devices=2)}, "one of a single process, got '2 processes'"),
])  # fmt: skip
def test_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(MisconfigurationException, match=f"`{next(iter(kwargs))}` should be {message}"):
        compare_models(**{"models": {"model": linear()}, "dataloader": unlabelled_loader(), **kwargs})


def test_interrupting_ends_it() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        compare({"first": linear(), "second": Interrupted(), "third": Failing()})
    signal.signal(signal.SIGINT, handler)
