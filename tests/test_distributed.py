"""Two gloo processes, started once, run every scenario; each test then reads what both of them saw."""

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from lightning_sensitivity import SensitivityMonitor, compare_models
from tests.helpers import Linear, brute_force, csv_rows, inputs, labelled, loader, trainer, unlabelled_loader

WORLD_SIZE = 2
SCENARIOS: dict[str, Callable[[int, Path], Any]] = {}


def scenario(function: Callable[[int, Path], Any]) -> Callable[[int, Path], Any]:
    SCENARIOS[function.__name__] = function
    return function


def model() -> Linear:
    seed_everything(0, verbose=False)
    return Linear()


def distributed(*callbacks: Any, **kwargs: Any) -> Any:
    return trainer(callbacks=list(callbacks), strategy="ddp", devices=WORLD_SIZE, **kwargs)


class OnRank(IterableDataset):
    """Batches for one rank alone (or for both, with None), without a length."""

    def __init__(self, rank: int | None, seed: int = 0) -> None:
        self.rank, self.seed = rank, seed

    def __iter__(self) -> Iterator[Tensor]:
        if self.rank in (None, int(os.environ["RANK"])):
            yield from inputs(40, self.seed).split(16)


def on_rank(rank: int | None, seed: int = 0) -> DataLoader:
    return DataLoader(OnRank(rank, seed), batch_size=None)


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


def run_all(rank: int, folder: Path, port: int) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), NODE_RANK="0"
    )
    os.environ.update(WORLD_SIZE=str(WORLD_SIZE), LOCAL_WORLD_SIZE=str(WORLD_SIZE), GROUP_RANK="0")
    os.environ["TORCHELASTIC_RUN_ID"] = "tests"  # Lightning then takes the processes as they are
    results = {}
    for name, function in SCENARIOS.items():
        results[name] = function(rank, folder)
        torch.distributed.barrier()
    torch.save(results, folder / f"rank_{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("distributed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(run_all, args=(folder, port), nprocs=WORLD_SIZE)
    ranks = [torch.load(folder / f"rank_{rank}.pt", weights_only=False) for rank in range(WORLD_SIZE)]
    return {name: [results[name] for results in ranks] for name in SCENARIOS} | {"folder": [folder]}


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


@pytest.mark.parametrize(
    "name", ["nan_in_one_process", "loaders_that_may_be_empty", "a_datamodule_whose_loaders_may_be_empty"]
)
def test_errors_reach_both(both: dict[str, list[Any]], name: str) -> None:
    assert both[name] == [True, True]
