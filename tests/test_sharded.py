"""Models that no process has whole: FSDP and FSDP2 in two gloo processes, started once."""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_sensitivity import SensitivityMonitor
from tests.helpers import Classifier, loader, run_processes, trainer

try:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
except ImportError:
    pytest.skip("needs torch 2.6 or newer", allow_module_level=True)

WORLD_SIZE = 2


class BySample:
    """A perturbation that depends on the sample alone."""

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        return x + 0.1 * torch.sin(1e4 * x)

    def second_moment(self, x: Tensor) -> float:
        return 0.005


class Net(Classifier):
    """Its own `predict_step` must not matter."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(dropout=0.0)

    def predict_step(self, *args: Any) -> None:
        raise AssertionError("not to be called")


class Sharded(Net):
    def configure_model(self) -> None:
        if not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self, mesh=self.device_mesh["data_parallel"])


class ShardedInside(Net):
    """Its forward bypasses the module that is sharded."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x

    def configure_model(self) -> None:
        if not any(isinstance(parameter, DTensor) for parameter in self.parameters()):
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class OnCPU(FSDPStrategy):
    """Lightning refuses FSDP without a GPU, and passes no device to it; torch itself runs it on gloo."""

    def _setup_model(self, model: nn.Module) -> FullyShardedDataParallel:
        return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **self.kwargs)


def strategies() -> dict[str, tuple[Any, type[Net]]]:
    return {
        "fsdp": (OnCPU(auto_wrap_policy={nn.Linear}), Net),
        "fsdp of the root alone": (OnCPU(), Net),
        "fsdp2": (ModelParallelStrategy(data_parallel_size=WORLD_SIZE, tensor_parallel_size=1), Sharded),
    }


def values(run: Any) -> dict[str, float]:
    return {name: float(value) for name, value in run.callback_metrics.items() if name != "train_loss"}


def monitor(**kwargs: Any) -> SensitivityMonitor:
    return SensitivityMonitor(perturbation=BySample(), task=None, **kwargs)


def run_all(rank: int, folder: Path) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    results: dict[str, Any] = {}
    data = {"train_dataloaders": loader(48, 8), "val_dataloaders": loader(48, 8, seed=1)}
    for name in strategies():

        def run(*callbacks: Any, name: str = name, **kwargs: Any) -> Any:
            strategy, kind = strategies()[name]
            return trainer(callbacks=list(callbacks), strategy=strategy, devices=WORLD_SIZE, **kwargs), kind()

        validation, model = run(monitor(num_draws=2))
        validation.validate(model, loader(48, 8, seed=1), verbose=False)
        results[f"{name}, validate"] = values(validation)
        profile, model = run(monitor(at=["net.0", "net.1"]))
        profile.validate(model, loader(48, 8, seed=1), verbose=False)
        results[f"{name}, profile"] = values(profile)
        for kind, callbacks in {"with": [monitor()], "without": []}.items():
            fit, model = run(*callbacks, max_epochs=2)
            fit.fit(model, **data)
            results[f"{name}, fit {kind}"] = values(fit)
        warns = pytest.warns(UserWarning, match="no risk estimate.*got a strategy that shards it")
        with warns if rank == 0 else nullcontext():
            fit, model = run(SensitivityMonitor(), max_epochs=1)
            fit.fit(model, **data)
        assert not any(name.startswith("val_risk") for name in fit.callback_metrics)
        stopping = EarlyStopping("val_risk_estimate")
        with pytest.raises(MisconfigurationException, match="got a strategy that shards it"):
            fit, model = run(SensitivityMonitor(), stopping, max_epochs=1)
            fit.fit(model, **data)
    inside, _ = run(monitor())
    with pytest.raises(MisconfigurationException, match="Shard the LightningModule itself, too"):
        inside.validate(ShardedInside(), loader(48, 8, seed=1), verbose=False)
    return results


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_processes(run_all, tmp_path_factory.mktemp("sharded"), WORLD_SIZE)


@pytest.mark.parametrize("name", strategies())
def test_a_sharded_model_has_the_value_of_a_whole_one(both: list[dict[str, Any]], name: str) -> None:
    for kind, kwargs in {"validate": {"num_draws": 2}, "profile": {"at": ["net.0", "net.1"]}}.items():
        whole = trainer(callbacks=[monitor(**kwargs)])
        whole.validate(Net(), loader(48, 8, seed=1), verbose=False)
        sharded = both[0][f"{name}, {kind}"]
        ours = [key for key in sharded if "sensitivity" in key or "estimate" in key]
        assert {key: both[1][f"{name}, {kind}"][key] for key in ours} == {key: sharded[key] for key in ours}
        assert len(ours) == 4 * len(kwargs.get("at", [None]))
        assert {key: sharded[key] for key in ours} == pytest.approx({key: values(whole)[key] for key in ours}, rel=1e-5)


@pytest.mark.parametrize("name", strategies())
def test_training_of_a_sharded_model_is_the_same_with_and_without(both: list[dict[str, Any]], name: str) -> None:
    fits = [both[0][f"{name}, fit {kind}"] for kind in ("with", "without")]
    assert fits[0]["val_loss"] == fits[1]["val_loss"]
    assert fits[0]["val_sensitivity"] > 0
