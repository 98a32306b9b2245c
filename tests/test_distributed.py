"""Two gloo processes, started once, run every scenario; each test then reads what both of them saw."""

import inspect
import math
import operator
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, Subset, TensorDataset

from lightning_sensitivity import SensitivityMonitor, compare_models
from tests.helpers import (
    NUM_CLASSES,
    NUM_FEATURES,
    Linear,
    brute_force,
    csv_rows,
    inputs,
    labelled,
    loader,
    run_processes,
    trainer,
    unlabelled_loader,
)

WORLD_SIZE = 2
SCENARIOS: dict[str, Callable[[int, Path], Any]] = {}


def scenario(function: Callable[[int, Path], Any]) -> Callable[[int, Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


def model(kind: type[Linear] = Linear) -> Linear:
    seed_everything(0, verbose=False)
    return kind()


def distributed(*callbacks: Any, **kwargs: Any) -> Any:
    # A process that waits for the others in vain fails long before the test's own limit.
    strategy = DDPStrategy(timeout=timedelta(seconds=120))
    return trainer(callbacks=list(callbacks), strategy=strategy, devices=int(os.environ["WORLD_SIZE"]), **kwargs)


def alone(*callbacks: Any, **kwargs: Any) -> Any:
    return trainer(callbacks=list(callbacks), **kwargs)


def logged(run: Any) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val_")}


class OnRank(IterableDataset):
    """Batches for one rank alone (or for both, with None), without a length."""

    def __init__(self, rank: int | None, seed: int = 0) -> None:
        self.rank, self.seed = rank, seed

    def __iter__(self) -> Iterator[Tensor]:
        if self.rank in (None, int(os.environ["RANK"])):
            yield from inputs(40, self.seed).split(16)


def on_rank(rank: int | None, seed: int = 0) -> DataLoader:
    return DataLoader(OnRank(rank, seed), batch_size=None)


class Still(Linear):
    """It has several places to perturb, and training does not move it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(NUM_FEATURES, 8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Reducing(Still):
    """Its own collectives come between those of the monitor."""

    def validation_step(self, batch: list[Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val_loss", cross_entropy(self(batch[0]), batch[1]), sync_dist=True)


class TwoInputs(Still):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x * other)


class Ripples:
    """A change that depends on the sample alone, not on its batch or process, and is another one in each draw."""

    def __init__(self, num_draws: int) -> None:
        self.num_draws = num_draws
        self.num_calls = 0

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        draw = self.num_calls % self.num_draws
        self.num_calls += 1
        return x + 0.1 * torch.sin((37 + draw) * x)

    def second_moment(self, x: Tensor) -> float:
        return 0.005


def rippled(
    make_trainer: Callable[..., Any],
    val: Any,
    net: type[Linear] = Still,
    fits: bool = False,
    use_distributed_sampler: bool = True,
    num_draws: int = 1,
    **kwargs: Any,
) -> dict[str, float]:
    """What is logged under such a change; in 64 bits, because batches of another size are rounded in another way."""
    monitor = SensitivityMonitor(perturbation=Ripples(num_draws), num_draws=num_draws, **kwargs)
    sampling = {"use_distributed_sampler": use_distributed_sampler}
    run = make_trainer(monitor, max_epochs=1, precision="64-true", **sampling)
    if fits:
        run.fit(model(net), loader(48, 8), val)  # all 48 are kept as training samples
    else:
        run.validate(model(net), val, verbose=False)
    return logged(run)


LAYERS = ["net.0", "net.1"]
EVEN: dict[str, dict[str, Any]] = {
    "validate": {"val": loader(48, 8, seed=1)},
    "fit": {"val": loader(48, 8, seed=1), "fits": True},
    "draws": {"val": loader(48, 8, seed=1), "num_draws": 2},
    "two inputs": {
        "val": DataLoader(TensorDataset(inputs(48), inputs(48, seed=1)), 8),
        "net": TwoInputs,
        "inputs": [0, 1],
    },
    "a loss of its own": {"val": [loader(48, 8, seed=1), loader(32, 8, seed=2)], "net": Reducing},
    "one layer": {"val": loader(48, 8, seed=1), "at": "net.1"},
    "profile": {"val": [loader(48, 8, seed=1), loader(32, 8, seed=2)], "at": LAYERS},
    "profile of a fit": {"val": loader(48, 8, seed=1), "at": LAYERS, "fits": True, "num_draws": 2},
}


@scenario
def validate(rank: int, folder: Path) -> Any:
    return distributed(SensitivityMonitor(num_draws=2)).validate(model(), loader(48, 8), verbose=False)


@scenario
def two_loaders(rank: int, folder: Path) -> Any:
    loaders = [loader(48, 8), loader(32, 8, seed=1)]
    return distributed(SensitivityMonitor()).validate(model(), loaders, verbose=False)


@scenario
def early_stopping(rank: int, folder: Path) -> Any:
    stopping = EarlyStopping(monitor="val_sensitivity", mode="min", patience=2)
    logger = CSVLogger(folder, name="early_stopping", version=0)
    fit = distributed(SensitivityMonitor(before_training=True), stopping, max_epochs=20, logger=logger)
    fit.fit(model(), loader(48, 8), unlabelled_loader(48, 8, seed=1))
    return fit.current_epoch, stopping.best_score.item()


@scenario
def even(rank: int, folder: Path) -> Any:
    return {name: rippled(distributed, **kwargs) for name, kwargs in EVEN.items()}


@scenario
def uneven(rank: int, folder: Path) -> Any:
    world_size = int(os.environ["WORLD_SIZE"])
    dropping = DistributedSampler(labelled(49), world_size, rank, shuffle=False, drop_last=True)
    own = DataLoader(labelled(49), 8, sampler=range(rank, 49, world_size))
    return {
        "repeated": rippled(distributed, [loader(49, 8), loader(35, 8, seed=1)]),
        "drop_last": rippled(distributed, loader(49, 8, drop_last=True)),
        "a sampler that drops": rippled(distributed, DataLoader(labelled(49), 8, sampler=dropping)),
        "own sampler": rippled(distributed, own, use_distributed_sampler=False),
        "the same everywhere": rippled(distributed, loader(49, 8), use_distributed_sampler=False),
    }


@scenario
def default_noise(rank: int, folder: Path) -> Any:
    run = distributed(SensitivityMonitor(num_samples=None))
    run.validate(model(), loader(2000, 250), verbose=False)
    return logged(run)


@scenario
def early_stopping_on_the_risk(rank: int, folder: Path) -> Any:
    stopping = EarlyStopping(monitor="val_risk_estimate", patience=2, min_delta=0.01)
    fit = distributed(SensitivityMonitor(), stopping, max_epochs=50)
    fit.fit(model(), loader(48, 8), unlabelled_loader(48, 8, seed=1))
    return fit.current_epoch, stopping.best_score.item(), stopping.wait_count, logged(fit)


@scenario
def profile_without_a_batch_of_some_loaders(rank: int, folder: Path) -> Any:
    loaders = [on_rank(0), on_rank(None, 1), on_rank(1, 2)]
    return rippled(distributed, loaders, fits=True, at=LAYERS)


@scenario
def a_process_without_a_batch(rank: int, folder: Path) -> Any:
    stopping = EarlyStopping(monitor="val_sensitivity", mode="min", patience=1)
    fit = distributed(SensitivityMonitor(), stopping, max_epochs=3)
    fit.fit(net := model(), loader(48, 8), on_rank(0))
    return fit.current_epoch, float(fit.callback_metrics["val_sensitivity"]), net.state_dict()


@scenario
def a_process_without_a_batch_of_some_loaders(rank: int, folder: Path) -> Any:
    run = distributed(SensitivityMonitor())
    run.validate(model(), [on_rank(1), on_rank(None, 1), on_rank(0, 2), on_rank(None, 3), on_rank(1, 4)], verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


@scenario
def per_output_without_a_batch(rank: int, folder: Path) -> Any:
    run = distributed(SensitivityMonitor(per_output=True))
    run.validate(model(), [on_rank(1), on_rank(0, 1)], verbose=False)
    return {name: float(value) for name, value in run.callback_metrics.items()}


@scenario
def a_datamodule_whose_loaders_may_be_empty(rank: int, folder: Path) -> Any:
    data = LightningDataModule.from_datasets(val_dataset=inputs(48), batch_size=8)
    data.allow_zero_length_dataloader_with_multiple_devices = True
    with pytest.raises(MisconfigurationException, match="should get a batch in every process"):
        distributed(SensitivityMonitor()).validate(model(), datamodule=data, verbose=False)
    return True


@scenario
def risk(rank: int, folder: Path) -> Any:
    checkpoint = ModelCheckpoint(folder / "risk", monitor="val_risk_estimate/dataloader_idx_0")
    run = distributed(SensitivityMonitor(), checkpoint, max_epochs=1, enable_checkpointing=True)
    run.fit(net := model(), loader(48, 8), [unlabelled_loader(48, 8, seed=1), on_rank(1, seed=2)])
    return {name: float(value) for name, value in run.callback_metrics.items() if "risk" in name}, net.state_dict()


@scenario
def few_training_samples(rank: int, folder: Path) -> Any:
    run = distributed(SensitivityMonitor(num_training_samples=16), max_epochs=1)
    run.fit(net := model(), loader(48, 8), unlabelled_loader(48, 8, seed=1))
    return float(run.callback_metrics["val_risk_training"]), net.state_dict()


@scenario
def nan_in_one_process(rank: int, folder: Path) -> Any:
    net = model()
    net.scale = torch.nan if rank == 1 else 1.0
    with pytest.raises(ValueError, match="nan or inf in the clean outputs of batch 0"):
        distributed(SensitivityMonitor()).validate(net, loader(48, 8), verbose=False)
    return True


def one_bad_sample() -> DataLoader:
    x = inputs(48)
    x[1] = math.nan  # the first sample of rank 1
    return DataLoader(x, 8)


@scenario
def nan_in_a_batch_of_one_process(rank: int, folder: Path) -> Any:
    steps = []
    for num_sanity_val_steps in (1, 0):
        run = distributed(SensitivityMonitor(at=LAYERS), num_sanity_val_steps=num_sanity_val_steps)
        with pytest.raises(ValueError, match=r"dataloader 1: .*nan or inf in the clean outputs of batch 0"):
            run.fit(model(Still), loader(48, 8), [unlabelled_loader(48, 8), one_bad_sample()])
        steps.append(run.global_step)
    return steps


@scenario
def a_warning_of_nan_in_a_batch_of_one_process(rank: int, folder: Path) -> Any:
    # Of the loader with nan: its key is never there.
    stopping = EarlyStopping(monitor="val_sensitivity/net.0/dataloader_idx_1", patience=1, strict=False)
    run = distributed(SensitivityMonitor(at=LAYERS, nan_strategy="warn"), stopping)
    run.fit(model(Still), loader(48, 8), [unlabelled_loader(48, 8), one_bad_sample()])
    return run.current_epoch, logged(run)


@scenario
def loaders_that_may_be_empty(rank: int, folder: Path) -> Any:
    net = model()
    net.allow_zero_length_dataloader_with_multiple_devices = True
    with pytest.raises(MisconfigurationException, match="should get a batch in every process"):
        distributed(SensitivityMonitor()).validate(net, loader(48, 8), verbose=False)
    return True


@scenario
def comparison(rank: int, folder: Path) -> Any:
    models = {"model": model(), "copy": model(), "broken": torch.nn.Linear(1, 1), "double": model()}
    models["double"].scale = 2.0
    result = compare_models(models, loader(48, 8), trainer=distributed())
    return [{**row, "seconds": 0} for row in result.rows()], result.ties(), result.difference("double", "model")


@scenario
def comparison_in_a_process_without_a_batch(rank: int, folder: Path) -> Any:
    result = compare_models({"model": model()}, on_rank(1), trainer=distributed())
    return [{**row, "seconds": 0} for row in result.rows()]


Call = tuple[str, int, bool]  # name of a collective, bytes that this process gives, whether for the monitor


def recorded(function: Callable[..., Any], calls: list[Call]) -> Callable[..., Any]:
    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        frame: Any = sys._getframe(1)
        while frame is not None and not frame.f_globals["__name__"].startswith("lightning_sensitivity"):
            frame = frame.f_back
        num_bytes = sum(argument.nbytes for argument in args if isinstance(argument, Tensor))
        calls.append((function.__name__, num_bytes, frame is not None))
        return function(*args, **kwargs)

    return wrapper


@scenario
def a_combined_loader_that_is_not_sequential(rank: int, folder: Path) -> Any:
    run = distributed(SensitivityMonitor())
    run.validate(model(), CombinedLoader([on_rank(0), on_rank(0, 1)], "max_size_cycle"), verbose=False)
    return logged(run)


class Ignoring(Linear):
    """With 255 for "unlabelled", as in many segmentation sets."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return cross_entropy(self(batch[0]), batch[1], ignore_index=255)


@scenario
def labels_that_only_one_process_can_tell(rank: int, folder: Path) -> Any:
    x, y = labelled(48).tensors
    y = torch.where(torch.arange(48) % 2 == 0, 255, y) if rank == 1 else y
    data = DataLoader(TensorDataset(x, y), 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = distributed(SensitivityMonitor(), max_epochs=1)
        run.fit(Ignoring(), data, unlabelled_loader(48, 8, seed=1))
        with pytest.raises(MisconfigurationException, match="task"):
            distributed(SensitivityMonitor(), EarlyStopping("val_risk_estimate"), max_epochs=1).fit(
                Ignoring(), data, unlabelled_loader(48, 8, seed=1)
            )
    return logged(run)


class Opaque(NamedTuple):
    """With a part that can't be copied, in one process."""

    x: Tensor
    meta: Any


class Interleaved(Linear):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_mine", self(batch.x).mean(), sync_dist=True)


@scenario
def batches_that_can_be_copied_in_one_process_alone(rank: int, folder: Path) -> Any:
    batches = [Opaque(x, operator.add if rank == 1 else 0) for x in inputs(48).split(16)]
    run = distributed(SensitivityMonitor(), max_epochs=1)
    run.fit(Interleaved(), loader(48, 8), DataLoader(batches, batch_size=None))
    return logged(run)


class Normalizing(Linear):
    """Its buffers differ between processes after a training step, until DDP has broadcast them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(NUM_FEATURES)
        self.passes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.passes:
            self.passes[-1] += 1
        return super().forward(self.norm(x))

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.passes.append(0)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self(batch)


@scenario
def buffers_that_the_first_step_broadcasts(rank: int, folder: Path) -> Any:
    run = distributed(SensitivityMonitor(task=None), max_epochs=1, num_sanity_val_steps=0)
    run.fit(net := Normalizing(), loader(48, 8), unlabelled_loader(64, 8, seed=1))
    return net.passes


def record_collectives(calls: list[Call]) -> None:
    kinds = ("all_", "barrier", "broadcast", "gather", "monitored", "reduce", "scatter")
    for name, function in inspect.getmembers(torch.distributed, inspect.isfunction):
        if name.startswith(kinds):
            setattr(torch.distributed, name, recorded(function, calls))


def run_all(rank: int, folder: Path, names: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {"collectives": {}}
    record_collectives(calls := [])
    for name in names:
        calls.clear()
        results[name] = SCENARIOS[name](rank, folder)
        results["collectives"][name] = calls.copy()
        torch.distributed.barrier()
    return results


def results_of(folder: Path, world_size: int, names: Iterable[str]) -> dict[str, list[Any]]:
    """What each process saw in each scenario."""
    ranks = run_processes(run_all, folder, world_size, list(names))
    return {name: [results[name] for results in ranks] for name in ranks[0]} | {"folder": [folder]}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return results_of(tmp_path_factory.mktemp("distributed"), WORLD_SIZE, SCENARIOS)


def expected(num_samples: int, batch_size: int = 8, seed: int = 0, **kwargs: Any) -> float:
    """Brute force over both processes' shares, as the DistributedSampler deals them out."""
    changes = [
        brute_force(model(), list(inputs(num_samples, seed)[rank::WORLD_SIZE].split(batch_size)), rank=rank, **kwargs)
        for rank in range(WORLD_SIZE)
    ]
    return torch.cat(changes).var(correction=0).item()


def test_the_value_is_that_of_brute_force_over_both(both: dict[str, list[Any]]) -> None:
    for (values,) in both["validate"]:
        assert values["val_sensitivity"] == pytest.approx(expected(48, num_draws=2), rel=1e-9)
    assert both["validate"][0] == both["validate"][1]


def test_two_loaders(both: dict[str, list[Any]]) -> None:
    for first, second in both["two_loaders"]:
        assert first["val_sensitivity/dataloader_idx_0"] == pytest.approx(expected(48), rel=1e-9)
        second_expected = expected(32, seed=1, dataloader_idx=1)
        assert second["val_sensitivity/dataloader_idx_1"] == pytest.approx(second_expected, rel=1e-9)


def to_nine_digits(values: dict[str, float]) -> Any:
    return pytest.approx(values, rel=1e-9, abs=0)


def check_even(results: list[dict[str, dict[str, float]]], name: str) -> None:
    found = [result[name] for result in results]
    assert found == [found[0]] * len(found)
    assert found[0] == to_nine_digits(rippled(alone, **EVEN[name]))


@pytest.mark.parametrize("name", EVEN)
def test_on_even_data_all_that_is_logged_is_what_one_process_logs(both: dict[str, list[Any]], name: str) -> None:
    check_even(both["even"], name)


def check_uneven(results: list[dict[str, dict[str, float]]]) -> None:
    world_size, found = len(results), results[0]
    assert results == [found] * world_size

    def dealt(num_samples: int, num_repeated: int = 0, seed: int = 0, num_kept: int | None = None) -> DataLoader:
        indices = [*range(num_samples), *range(num_repeated)][:num_kept]
        return DataLoader(Subset(labelled(num_samples, seed), indices), 8)

    # Lightning's DistributedSampler deals the first ones out again until all processes have as many: at most
    # world_size - 1 samples of a loader count twice.
    repeated = [-num_samples % world_size for num_samples in (49, 35)]
    assert 1 <= repeated[0] == world_size - 1
    twice = [dealt(49, repeated[0]), dealt(35, repeated[1], seed=1)]
    assert found["repeated"] == to_nine_digits(rippled(alone, twice))
    # `drop_last` drops the last batch of each process, here with all that was repeated.
    num_kept = world_size * (math.ceil(49 / world_size) // 8 * 8)
    assert found["drop_last"] == to_nine_digits(rippled(alone, dealt(49, num_kept=num_kept)))
    # A sampler of one's own is the way to measure each sample once, and processes need not have as many batches.
    every = rippled(alone, dealt(49))
    assert found["own sampler"] == to_nine_digits(every)
    # One that drops up to world_size - 1 samples instead of repeating some.
    assert found["a sampler that drops"] == to_nine_digits(rippled(alone, dealt(49, num_kept=48)))
    # All samples in every process: the value is the same, and the error bar takes the copies for further samples.
    stderr = "val_sensitivity_stderr"
    too_small = every[stderr] * math.sqrt(48 / (49 * world_size - 1))
    assert found["the same everywhere"] == to_nine_digits(every | {stderr: too_small})


def test_on_uneven_data_samples_count_as_often_as_they_are_dealt_out(both: dict[str, list[Any]]) -> None:
    check_uneven(both["uneven"])


def test_other_noise_in_each_process_gives_a_value_within_the_error_bars(both: dict[str, list[Any]]) -> None:
    run = alone(SensitivityMonitor(num_samples=None))
    run.validate(model(), loader(2000, 250), verbose=False)
    (one, first), second = (logged(run), both["default_noise"][0]), both["default_noise"][1]
    assert first == second
    assert first["val_sensitivity"] != one["val_sensitivity"]
    errors = [values["val_sensitivity_stderr"] for values in (first, one)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)
    assert first["val_sensitivity"] == pytest.approx(one["val_sensitivity"], abs=2 * math.hypot(*errors))
    assert math.hypot(*errors) < 0.1 * one["val_sensitivity"]


def check_early_stopping(results: list[Any]) -> None:
    assert results == [results[0]] * len(results)
    num_epochs, best, wait_count, values = results[0]
    assert 2 < num_epochs < 50
    assert wait_count == 2
    assert values["val_risk_estimate"] > best - 0.01


def test_early_stopping_on_the_risk_stops_both_at_the_same_epoch(both: dict[str, list[Any]]) -> None:
    check_early_stopping(both["early_stopping_on_the_risk"])


def test_early_stopping_stops_both_at_the_same_epoch(both: dict[str, list[Any]]) -> None:
    assert both["early_stopping"][0] == both["early_stopping"][1]
    assert both["early_stopping"][0][0] < 20


def test_the_untrained_network_is_that_of_both(both: dict[str, list[Any]]) -> None:
    rows = csv_rows(both["folder"][0] / "early_stopping" / "version_0")
    (value,) = (float(row["val_sensitivity"]) for row in rows if row["val_sensitivity"] and row["step"] == "0")
    assert value == pytest.approx(expected(48, seed=1), rel=1e-9)


def test_a_process_without_a_batch_has_the_others_value(both: dict[str, list[Any]]) -> None:
    (epochs, value, weights), (other_epochs, other_value, _) = both["a_process_without_a_batch"]
    assert epochs == other_epochs
    assert value == other_value
    net = model()
    net.load_state_dict(weights)
    assert value == pytest.approx(brute_force(net, list(inputs(40).split(16))).var(correction=0).item(), rel=1e-9)


def test_a_process_without_a_batch_of_some_loaders(both: dict[str, list[Any]]) -> None:
    first, second = both["a_process_without_a_batch_of_some_loaders"]
    assert first == second
    for idx, ranks in enumerate([[1], [0, 1], [0], [0, 1], [1]]):
        batches = list(inputs(40, seed=idx).split(16))
        changes = torch.cat([brute_force(model(), batches, rank=rank, dataloader_idx=idx) for rank in ranks])
        value = first[f"val_sensitivity/dataloader_idx_{idx}"]
        assert value == pytest.approx(changes.var(correction=0).item(), rel=1e-9)


def test_per_output_in_a_process_without_a_batch(both: dict[str, list[Any]]) -> None:
    first, second = both["per_output_without_a_batch"]
    assert first == second
    for idx, rank in enumerate((1, 0)):
        batches = list(inputs(40, seed=idx).split(16))
        changes = brute_force(model(), batches, rank=rank, dataloader_idx=idx, per_output=True)
        value = first[f"val_sensitivity/dataloader_idx_{idx}"]
        assert value == pytest.approx(changes.var(0, correction=0).mean().item(), rel=1e-9)


def test_a_profile_in_a_process_without_a_batch_of_some_loaders(both: dict[str, list[Any]]) -> None:
    first, second = both["profile_without_a_batch_of_some_loaders"]
    assert first == second
    one = rippled(alone, [unlabelled_loader(40, 16, seed) for seed in range(3)], fits=True, at=LAYERS)
    assert first.keys() == one.keys()
    sensitivities = {name: value for name, value in one.items() if name.startswith("val_sensitivity")}
    assert {name.split("/")[1] for name in sensitivities} == set(LAYERS)
    # Both processes have all samples of the loader in the middle.
    ratio = math.sqrt(39 / 79)
    expected = {
        name: value * (ratio if name.startswith("val_sensitivity_stderr") and name.endswith("1") else 1)
        for name, value in sensitivities.items()
    }
    assert {name: first[name] for name in expected} == to_nine_digits(expected)


def test_nan_in_a_batch_of_one_process_stops_both_at_the_same_step(both: dict[str, list[Any]]) -> None:
    # In the sanity check, and without one after an epoch of three batches.
    assert both["nan_in_a_batch_of_one_process"] == [[0, 3], [0, 3]]


def test_nan_in_a_batch_of_one_process_leaves_its_loader_out_in_both(both: dict[str, list[Any]]) -> None:
    (epochs, first), (other_epochs, second) = both["a_warning_of_nan_in_a_batch_of_one_process"]
    assert epochs == other_epochs == 2
    assert first == second
    assert "val_sensitivity/net.1/dataloader_idx_0" in first
    assert not any(name.endswith("dataloader_idx_1") for name in first)


@pytest.mark.parametrize("name", SCENARIOS)
def test_both_enter_the_same_collectives(both: dict[str, list[Any]], name: str) -> None:
    first, second = (collectives[name] for collectives in both["collectives"])
    assert first == second


def check_exchange(calls: list[Call]) -> None:
    """That of a sanity check and a validation, of one loader and four classes."""
    sizes = [(0, 16, 120), (0, 8, 80), (0, 8, 24), (0, 16, 48 * NUM_CLASSES)]  # a barrier, shapes, state
    names = ("barrier", "all_gather", "all_gather")
    exchange = [(name, size, True) for state in sizes for name, size in zip(names, state, strict=True)]
    calls = [call for call in calls if call[2]]
    # After the first training batch the processes agree on the task: one number.
    assert calls[12:14] == [("barrier", 0, True), ("all_gather", 8, True)]
    assert calls[14:] == exchange
    # Before training nothing is known of the risk.
    assert calls[:12] == [*exchange[:-1], ("all_gather", 48, True)]


def test_the_monitor_exchanges_a_few_numbers_a_loader_and_epoch(both: dict[str, list[Any]]) -> None:
    check_exchange(both["collectives"][0]["few_training_samples"])


def test_the_training_samples_are_shared_out(both: dict[str, list[Any]]) -> None:
    (first, weights), (second, _) = both["few_training_samples"]
    net = model()
    net.load_state_dict(weights)
    # Lightning shuffles what it deals out for training.
    kept = [i for rank in range(WORLD_SIZE) for i in list(DistributedSampler(labelled(48), WORLD_SIZE, rank))[:8]]
    x, y = (part[kept] for part in labelled(48).tensors)
    p = net(x).detach().double().softmax(1)
    expected = (p - torch.nn.functional.one_hot(y, 4)).square().sum(1).mean()
    assert first == second == pytest.approx(float(expected), rel=1e-6)


def test_the_risk_estimate_is_that_of_both(both: dict[str, list[Any]]) -> None:
    (first, weights), (second, _) = both["risk"]
    assert first == second
    net = model()
    net.load_state_dict(weights)
    train = labelled(48)
    with torch.no_grad():
        p, q = (net(x).double().softmax(1) for x in (train.tensors[0], inputs(48, seed=1)))
    y = torch.nn.functional.one_hot(train.tensors[1], 4).double()
    terms = {name.removeprefix("val_risk_"): value for name, value in first.items()}
    assert terms["training/dataloader_idx_0"] == pytest.approx(float((p - y).square().sum(1).mean()), rel=1e-6)
    certainty = [float(values.square().sum(1).mean()) for values in (p, q)]
    assert terms["uncertainty/dataloader_idx_0"] == pytest.approx(certainty[0] - certainty[1], abs=1e-7)
    assert terms["variance/dataloader_idx_0"] > 0
    assert terms["estimate/dataloader_idx_1"] > 0  # one process had no batch of this loader


def test_a_broadcast_of_buffers_costs_one_pass_of_one_batch(both: dict[str, list[Any]]) -> None:
    # Our own two passes of a batch come before its hook: those of the first batch are not seen, and those of the second
    # one, in the process whose buffers were written to, are seen with the first.
    passes = both["buffers_that_the_first_step_broadcasts"]
    # torch 2.4 broadcasts in the second step, too, and writes to the buffers of the process that sends them.
    assert passes in ([[1, 2, 2, 2], [3, 1, 2, 2]], [[3, 3, 3, 1]] * 2)


def test_models_are_compared_over_both(both: dict[str, list[Any]]) -> None:
    (rows, ties, (value, stderr)), others = both["comparison"]
    assert repr(others) == repr((rows, ties, (value, stderr)))
    found = {row["name"]: row for row in rows}
    assert found["model"]["sensitivity"] == pytest.approx(expected(48), rel=1e-9)
    assert found["broken"]["note"].startswith("failed: RuntimeError")
    assert ties == {"model": ["copy"], "copy": ["model"], "double": []}
    assert value == pytest.approx(3 * expected(48), rel=1e-6)
    assert stderr == pytest.approx(3 * found["model"]["sensitivity_stderr"], rel=0.02)
    x, y = labelled(48).tensors
    with torch.no_grad():
        assert found["model"]["loss"] == pytest.approx(float(cross_entropy(model()(x), y)), rel=1e-6)


def test_models_are_compared_where_one_process_has_no_batch(both: dict[str, list[Any]]) -> None:
    first, second = both["comparison_in_a_process_without_a_batch"]
    assert repr(first) == repr(second)
    truth = brute_force(model(), list(inputs(40).split(16)), rank=1).var(correction=0).item()
    assert first[0]["sensitivity"] == pytest.approx(truth, rel=1e-9)
    assert first[0]["loss_estimate"] > 0


def test_processes_that_lightning_spawns() -> None:
    run = trainer(strategy="ddp_spawn", devices=WORLD_SIZE)
    result = compare_models({"model": model(), "copy": model()}, loader(48, 8), trainer=run)
    assert result["model"].sensitivity == pytest.approx(expected(48), rel=1e-9)
    assert result.ties() == {"model": ["copy"], "copy": ["model"]}


class Aborts(Callback):
    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.abort)

    def abort(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_rank == 1:
            os.abort()


def test_a_process_that_dies_with_its_work_done_costs_nothing() -> None:
    run = trainer(strategy="ddp_spawn", devices=WORLD_SIZE, callbacks=[Aborts("on_validation_end")])
    result = compare_models({"model": model()}, loader(48, 8), trainer=run)
    assert result["model"].sensitivity == pytest.approx(expected(48), rel=1e-9)


def test_a_process_that_dies_at_work_is_an_error() -> None:
    run = trainer(strategy="ddp_spawn", devices=WORLD_SIZE, callbacks=[Aborts("on_validation_batch_end")])
    with pytest.raises(RuntimeError, match="No model could be scored"):
        compare_models({"model": model()}, loader(48, 8), trainer=run)


@pytest.mark.parametrize(
    "name", ["nan_in_one_process", "loaders_that_may_be_empty", "a_datamodule_whose_loaders_may_be_empty"]
)
def test_errors_reach_both(both: dict[str, list[Any]], name: str) -> None:
    assert both[name] == [True, True]


@pytest.mark.parametrize(
    "name", ["a_combined_loader_that_is_not_sequential", "batches_that_can_be_copied_in_one_process_alone"]
)
def test_both_log_the_same_names(both: dict[str, list[Any]], name: str) -> None:
    first, second = both[name]
    assert first == second
    assert "val_sensitivity" in first


def test_a_task_that_one_process_can_not_tell_is_no_task_in_both(both: dict[str, list[Any]]) -> None:
    first, second = both["labels_that_only_one_process_can_tell"]
    assert first == second
    assert not any("risk" in name for name in first)
