import gc
import signal
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, TensorDataset

from lightning_sensitivity import SensitivityMonitor, compare_models
from lightning_sensitivity.ranking import Comparison
from lightning_sensitivity.scored_model import ComparisonProgressBar
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    Classifier,
    Linear,
    brute_force,
    inputs,
    labelled,
    loader,
    trainer,
    unlabelled_loader,
)


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


class Counted(nn.Module):
    """Counts its forward passes, in all copies together."""

    passes = 0

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        Counted.passes += 1
        return self.net(x)


class Failing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("out of luck")


# What is measured


def test_linear_models_have_the_sensitivity_of_their_weights() -> None:
    models = {"small": linear(0.5), "large": linear(2.0)}
    result = compare(models, unlabelled_loader(2000, 500), noise_std=0.3, num_draws=2)
    assert [row.name for row in result] == ["small", "large"]
    for row in result:
        truth = models[row.name].sensitivity(0.3) * models[row.name].scale ** 2
        assert abs(row.sensitivity - truth) < 4 * row.sensitivity_stderr
        assert row.sensitivity_stderr < 0.1 * truth
        power = inputs(2000).double().square().mean().item() / 0.3**2
        assert row.loss_estimate == pytest.approx((0.5 * 3 / 4 * row.sensitivity * power) ** 0.5, rel=1e-5)
        assert row.num_parameters == NUM_FEATURES * NUM_CLASSES + NUM_CLASSES
        assert row.seconds > 0


def test_the_noise_is_that_of_the_callback() -> None:
    model = Classifier().eval()
    batches = list(inputs(50).split(16))
    expected = brute_force(model, batches, num_draws=2, seed=3).var(correction=0).item()
    row = compare({"model": model}, num_draws=2, seed=3)["model"]
    assert row.sensitivity == pytest.approx(expected, rel=1e-6)
    monitored = trainer(callbacks=[SensitivityMonitor(num_draws=2, seed=3)])
    (logged,) = monitored.validate(model, unlabelled_loader(), verbose=False)
    assert row.sensitivity == pytest.approx(logged["val_sensitivity"], rel=1e-6)
    assert row.sensitivity_stderr == pytest.approx(logged["val_sensitivity_stderr"], rel=1e-6)
    assert row.loss_estimate == pytest.approx(logged["val_loss_estimate"], rel=1e-6)


def test_labels_give_the_true_loss_and_error() -> None:
    model, data = linear(), labelled(50)
    row = compare({"model": model}, loader())["model"]
    x, y = data.tensors
    with torch.no_grad():
        assert row.loss == pytest.approx(cross_entropy(model(x), y).item(), rel=1e-5)
        assert row.error == pytest.approx((model(x).argmax(1) != y).float().mean().item())
    unlabelled = compare({"model": model})["model"]
    assert unlabelled.loss != unlabelled.loss
    assert (unlabelled.sensitivity, unlabelled.entropy) == (row.sensitivity, row.entropy)


def test_a_regression_has_a_mean_squared_error_and_no_decisions() -> None:
    data = TensorDataset(inputs(40), torch.zeros(40, 1))
    model = nn.Linear(NUM_FEATURES, 1)
    row = compare({"model": model}, DataLoader(data, 16), task="regression")["model"]
    with torch.no_grad():
        assert row.loss == pytest.approx(model(inputs(40)).square().mean().item(), rel=1e-5)
    assert row.error != row.error
    assert row.loss_estimate != row.loss_estimate
    # One output: C · E[Δf²], with the square of the mean change that a variance leaves out.
    power = inputs(40).double().square().mean().item() / 0.01
    assert row.variance == pytest.approx(row.sensitivity * power, rel=0.2)


def test_one_plus_num_draws_passes_a_batch() -> None:
    Counted.passes = 0
    compare({"first": Counted(), "second": Counted()}, unlabelled_loader(48, 16), num_draws=3)
    assert Counted.passes == 2 * 3 * (1 + 3)


class Images(nn.Module):
    """Says bright or dark of the upper left pixel."""

    passes = 0

    def forward(self, x: Tensor) -> Tensor:
        Images.passes += 1
        first = 5 * (x[:, :, 0, 0] - 0.5)
        return torch.cat([2 * first, -first], 1)


def test_moved_images() -> None:
    x = torch.rand(20, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    row = compare({"model": Images()}, DataLoader(x, 10), shifts=[1])["model"]
    assert Images.passes == 2 * (1 + 1 + 4)
    p = Images()(x).double().softmax(1)
    # Moved down or right, the pixel is still in its place; moved up or left, its neighbour is.
    below, right = Images()(x[:, :, 1:]).double().softmax(1), Images()(x[:, :, :, 1:]).double().softmax(1)
    losses = [-(q * p.log()).sum(1).mean() for q in (p, p, below, right)]
    assert row.shift_loss == pytest.approx(float(sum(losses) / 4), rel=1e-6)
    errors = [1 - q.gather(1, p.argmax(1, keepdim=True)).mean() for q in (p, p, below, right)]
    assert row.shift_error == pytest.approx(float(sum(errors) / 4), rel=1e-6)
    without = compare({"model": Images()}, DataLoader(x, 10))["model"]
    assert without.shift_loss != without.shift_loss
    assert without.sensitivity == row.sensitivity


def test_parts_of_a_batch_are_chosen_as_in_the_callback() -> None:
    class Dictionary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = linear()

        def forward(self, image: Tensor, shift: Tensor) -> dict[str, Tensor]:
            return {"scores": self.net(image) + shift}

    samples = [
        {"image": x, "shift": torch.zeros(NUM_CLASSES), "kind": torch.tensor(k)}
        for k, x in enumerate(inputs(NUM_CLASSES))
    ]
    data = DataLoader(samples, 2)  # type: ignore[arg-type]
    row = compare({"model": Dictionary()}, data, inputs="image", outputs="scores", targets="kind")["model"]
    x = inputs(NUM_CLASSES)
    with torch.no_grad():
        assert row.loss == pytest.approx(cross_entropy(linear()(x), torch.arange(NUM_CLASSES)).item(), rel=1e-5)


# Pairs


def test_a_copy_ties_and_another_model_does_not() -> None:
    model = linear()
    result = compare({"model": model, "copy": linear(), "other": linear(1.5)}, unlabelled_loader(400, 100))
    assert result.difference("model", "copy") == (0, 0)
    assert result.ties() == {"model": ["copy"], "copy": ["model"], "other": []}


def test_pairs_are_sharper_than_values() -> None:
    models = {"model": linear(), "slightly larger": linear(1.02)}
    result = compare(models, unlabelled_loader(400, 100))
    value, stderr = result.difference("slightly larger", "model")
    assert value == pytest.approx((1.02**2 - 1) * result["model"].sensitivity, rel=1e-4)
    # The one is 1.0404 times the other, sample by sample, and so is its error.
    assert stderr == pytest.approx(0.0404 * result["model"].sensitivity_stderr, rel=0.02)
    assert result.ties() == {"model": [], "slightly larger": []}


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_a_loader_that_shuffles_gives_all_models_one_order() -> None:
    result = compare({"model": linear(), "copy": linear()}, loader(shuffle=True))
    assert result.difference("model", "copy") == (0, 0)


class Changing(IterableDataset):
    """Gives other samples each time."""

    def __init__(self) -> None:
        self.seed = 0

    def __iter__(self) -> Iterator[Tensor]:
        self.seed += 1
        return iter(inputs(40, self.seed).split(16))


def test_other_samples_for_another_model_are_an_error_of_that_model() -> None:
    result = compare({"first": linear(9), "second": linear(9)}, DataLoader(Changing(), None))
    assert result["first"].note == ""
    assert "Other inputs than those of 'first'" in result["second"].note


# Models


def test_modules_are_not_touched() -> None:
    model = Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    compare({"model": model}, trainer=trainer(precision="bf16-true"))
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert next(model.parameters()).dtype == torch.float32
    assert torch.equal(random_state, torch.get_rng_state())


def test_a_module_that_a_trainer_holds() -> None:
    model = linear(9)
    run = trainer(max_epochs=1)
    run.fit(model, loader(), loader())
    assert compare({"model": model})["model"].note == ""
    assert model.trainer is run


def test_paths_functions_and_modules_agree(tmp_path: Path) -> None:
    path = save(linear(9), tmp_path / "model.ckpt", steps=2)
    trained = Linear.load_from_checkpoint(path)
    result = compare({"path": path, "text": str(path), "function": lambda: trained}, model_class=Linear)
    assert result.ties() == {name: [other for other in result.ties() if other != name] for name in result.ties()}
    assert len({row.sensitivity for row in result}) == 1


def test_an_untrained_checkpoint_says_so(tmp_path: Path) -> None:
    path = save(linear(), tmp_path / "model.ckpt")
    assert compare({"model": path}, model_class=Linear)["model"].note == "untrained (step 0)"


def test_predictions_of_a_network_that_has_learned_nothing() -> None:
    small = linear(0.01)
    assert compare({"model": small})["model"].note == "undecided (untrained?)"
    assert compare({"model": linear(10)})["model"].note == ""


class Remembering(Linear):
    """Keeps its arguments in checkpoints, and with them LightningCLI's word of its class."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.scale = scale


@pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
def test_a_checkpoint_of_lightning_cli_knows_its_class(tmp_path: Path) -> None:
    arguments = ["--model", "tests.test_comparison.Remembering", "--model.scale", "3", "--trainer.accelerator", "cpu"]
    cli = LightningCLI(
        Linear,
        subclass_mode_model=True,
        args=arguments,
        run=False,
        save_config_callback=None,
        seed_everything_default=0,
    )
    model = cli.model
    path = save(model, tmp_path / "model.ckpt")
    assert compare({"model": path})["model"].sensitivity == compare({"model": model})["model"].sensitivity


def test_only_one_model_that_a_function_makes_is_in_memory() -> None:
    alive: list[weakref.ref[nn.Module]] = []
    at_start = []

    def make(kind: type[nn.Module]) -> nn.Module:
        gc.collect()
        at_start.append(sum(reference() is not None for reference in alive))
        module = kind()
        alive.append(weakref.ref(module))
        return module

    kinds = [Linear, Failing, Counted, Linear]
    compare({str(index): lambda kind=kind: make(kind) for index, kind in enumerate(kinds)})
    assert at_start == [0, 0, 0, 0]


class Shifting(Linear):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch * 3


def test_the_hooks_of_a_module_transform_its_batches() -> None:
    torch.manual_seed(0)
    row = compare({"model": Shifting()})["model"]
    expected = compare({"model": linear()}, DataLoader(3 * inputs(50), 16))["model"]
    assert row.loss_estimate == pytest.approx(expected.loss_estimate, rel=1e-6)


# Data


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true")
def test_a_data_module_gives_its_validation_samples() -> None:
    data = LightningDataModule.from_datasets(val_dataset=labelled(50), batch_size=16)
    row = compare({"model": linear()}, data)["model"]
    assert row.loss == compare({"model": linear()}, loader())["model"].loss


def test_the_trainer_says_how_many_batches() -> None:
    row = compare({"model": linear()}, trainer=trainer(limit_val_batches=2))["model"]
    expected = brute_force(linear(), list(inputs(32).split(16))).var(correction=0).item()
    assert row.sensitivity == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    exact = compare({"model": linear()}, unlabelled_loader(500, 100), noise_std=0.5)["model"]
    run = trainer(precision=precision)
    row = compare({"model": linear()}, unlabelled_loader(500, 100), noise_std=0.5, trainer=run)["model"]
    # Not the same noise, in 64 bits.
    assert abs(row.sensitivity - exact.sensitivity) < 4 * exact.sensitivity_stderr


@pytest.mark.filterwarnings("ignore:.*sampler has shuffling enabled")
def test_a_loader_that_shuffles_by_its_own_generator() -> None:
    data = DataLoader(inputs(50), 16, sampler=RandomSampler(inputs(50), generator=torch.Generator().manual_seed(1)))
    result = compare({"model": linear(), "copy": linear()}, data)
    assert result.difference("model", "copy") == (0, 0)


def test_what_is_no_label_is_not_taken_for_one() -> None:
    data = DataLoader(TensorDataset(inputs(50), torch.arange(50)), 2)  # the first two batches could be labels
    with pytest.warns(UserWarning, match="takes the loader for one without labels.*Expected labels from 0 to 3"):
        row = compare({"model": linear()}, data)["model"]
    assert row.loss != row.loss and row.error != row.error
    expected = compare({"model": linear()}, unlabelled_loader(50, 2))["model"]
    assert row.sensitivity == expected.sensitivity
    told = compare({"model": linear()}, data, targets=no_labels)["model"]
    assert told.loss != told.loss


def no_labels(batch: Any) -> None:
    return None


def test_the_random_streams_of_all_devices_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def reseeded(seed: int) -> None:
        raise AssertionError("CUDA was seeded, and nothing would put it back")

    model = linear(9)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", reseeded)
    assert compare({"model": model})["model"].note == ""


def test_a_compiled_module_keeps_its_hooks() -> None:
    torch.manual_seed(0)
    model = Shifting()
    compiled = torch.compile(model, backend="eager")
    assert compare({"model": compiled})["model"].variance == compare({"model": model})["model"].variance


def test_a_file_that_is_no_checkpoint_of_lightning(tmp_path: Path) -> None:
    torch.save(linear().state_dict(), tmp_path / "weights.pt")
    result = compare({"good": linear(9), "weights": tmp_path / "weights.pt"}, model_class=Linear)
    assert "Expected a checkpoint of Lightning" in result["weights"].note


# What goes wrong


def test_a_model_that_fails_is_a_row_and_does_not_lose_the_others() -> None:
    models = {
        "broken": Failing(),
        "nan": linear(float("nan")),
        "probabilities": nn.Sequential(linear(), nn.Softmax(1)),
        "missing": "nowhere.ckpt",
        "function": lambda: 3,
        "good": linear(9),
    }
    result = compare(models, model_class=Linear)
    notes = {row.name: row.note for row in result}
    assert next(iter(result)).name == "good"
    assert notes["good"] == ""
    assert notes["broken"] == "failed: RuntimeError: out of luck"
    assert "nan or inf in the clean outputs of batch 0" in notes["nan"] and "nan_strategy" not in notes["nan"]
    assert "got probabilities" in notes["probabilities"]
    assert "FileNotFoundError" in notes["missing"]
    assert "to return a module, but got int" in notes["function"]
    assert result["good"].sensitivity == compare({"good": linear(9)})["good"].sensitivity


def test_a_checkpoint_without_a_class(tmp_path: Path) -> None:
    path = save(linear(), tmp_path / "model.ckpt")
    with pytest.raises(RuntimeError, match="`model_class` should be the class of the checkpoint, got None"):
        compare({"model": path})


@pytest.mark.filterwarnings("ignore:Total length of `DataLoader`")
@pytest.mark.parametrize(
    ("dataloader", "kwargs", "message"),
    [
        (unlabelled_loader(0), {}, "two samples or more, but got no batch"),
        (unlabelled_loader(1), {}, "two samples or more, but got 1"),
        (DataLoader(torch.zeros(4, NUM_FEATURES, dtype=torch.long), 2), {}, "should be a floating tensor"),
        (unlabelled_loader(), {"targets": "label"}, "targets='label'"),
        (unlabelled_loader(), {"noise_std": [0.1, 0.2]}, "one standard deviation .* per channel"),
        (unlabelled_loader(), {"shifts": [1]}, "Expected images"),
        (loader(), {"targets": 1, "task": "regression"}, "one label per output"),
        (loader(), {"targets": 1, "task": "binary"}, "Expected one output"),
    ],
)
def test_data_that_no_model_can_take(dataloader: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"(?s)No model could be scored.*{message}"):
        compare({"model": linear()}, dataloader, **kwargs)


def test_several_loaders() -> None:
    class Two(LightningDataModule):
        def val_dataloader(self) -> list[DataLoader]:
            return [unlabelled_loader(), unlabelled_loader()]

    with pytest.raises(RuntimeError, match="`dataloader` should be one loader, got 2"):
        compare({"model": linear()}, Two())


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"models": {}}, "`models` should be a dict of names and models"),
        ({"models": [nn.Linear(1, 1)]}, "`models` should be a dict of names and models"),
        ({"models": {1: nn.Linear(1, 1)}}, "keys are the models' names, .*got 1"),
        ({"models": {"a": 3}}, r"`models\['a'\]` should be a module, the path of a checkpoint, or a function, got 3"),
        ({"dataloader": [unlabelled_loader()]}, "`dataloader` should be one loader .*, got list"),
        ({"dataloader": iter(unlabelled_loader())}, "`dataloader` should be one loader"),
        ({"noise_std": 0}, "`noise_std` should be a positive, finite number"),
        ({"num_draws": 0}, "`num_draws` should be an int of 1 or more, got 0"),
        ({"shifts": 2}, "`shifts` should be a list of pixels, got 2"),
        ({"models": {"a\nb": nn.Linear(1, 1)}}, "each of one line"),
        ({"trainer": trainer(callbacks=[SensitivityMonitor()])}, "`trainer` should be a Trainer of its own"),
        ({"shifts": [0]}, "`shifts` should be an int of 1 or more, got 0"),
        ({"seed": 0.5}, "`seed` should be an int, got 0.5"),
        ({"model_class": nn.Linear}, "`model_class` should be a class of LightningModule, or None"),
        ({"task": "auto"}, "`task` should be one of 'multiclass'"),
        ({"inputs": 1.5}, "`inputs` should be a key"),
        ({"outputs": True}, "`outputs` should be a key"),
        ({"targets": []}, "`targets` should be a key"),
    ],
)
def test_arguments(kwargs: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"models": {"model": linear()}, "dataloader": unlabelled_loader(), **kwargs}
    with pytest.raises(MisconfigurationException, match=message):
        compare_models(**arguments)


def test_interrupting_ends_it() -> None:
    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        compare({"first": linear(), "second": Interrupted(), "third": Failing()})
    signal.signal(signal.SIGINT, handler)


def test_the_progress_bar_says_which_model_runs(capsys: pytest.CaptureFixture[str]) -> None:
    run = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False,
        callbacks=[ComparisonProgressBar()],
    )  # fmt: skip
    compare({"small": linear(), "large": linear(2)}, trainer=run)
    printed = capsys.readouterr().out
    assert "small (1/2)" in printed and "large (2/2)" in printed


def test_without_a_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(compare_models({"model": linear()}, unlabelled_loader())) == 1
    assert not list(tmp_path.iterdir())


def test_each_pass_finds_the_same_buffers() -> None:
    class Drifting(Linear):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return self.count * super().forward(x)

    torch.manual_seed(0)
    drifting = Drifting()
    result = compare({"drifting": drifting, "linear": linear()}, shifts=[])
    assert result["drifting"].sensitivity == pytest.approx(result["linear"].sensitivity, rel=1e-6)
