from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy

from lightning_sensitivity.checks import check_model, check_processes


def trainer_with(strategy: Any) -> Any:
    return SimpleNamespace(strategy=strategy, datamodule=None, world_size=2)


def test_deepspeed_is_refused() -> None:
    strategy = DeepSpeedStrategy.__new__(DeepSpeedStrategy)  # its constructor needs the package
    with pytest.raises(MisconfigurationException, match="does not support `DeepSpeedStrategy`"):
        check_processes(trainer_with(strategy), BoringModel())


@pytest.mark.parametrize("size", [1, 2])
def test_tensor_parallelism_is_refused(size: int) -> None:
    strategy = ModelParallelStrategy()
    strategy._device_mesh = {"tensor_parallel": SimpleNamespace(size=lambda: size)}
    is_refused = pytest.raises(MisconfigurationException, match="got .* with `tensor_parallel_size=2`. With 1 it works")
    with is_refused if size > 1 else nullcontext():
        check_processes(trainer_with(strategy), BoringModel())


def test_the_other_lightnings_strategies_are_known_by_name() -> None:
    module = pytest.importorskip("pytorch_lightning.strategies")
    strategy = module.DeepSpeedStrategy.__new__(module.DeepSpeedStrategy)
    with pytest.raises(MisconfigurationException, match="does not support `DeepSpeedStrategy`"):
        check_processes(trainer_with(strategy), BoringModel())


def test_lightnings_own_demo_model_has_a_forward() -> None:
    check_model(BoringModel())


def test_a_users_file_may_be_named_as_lightnings() -> None:
    class Model(BoringModel):
        def forward(self, x: object) -> object:
            return x

    Model.forward.__module__ = "core.module"
    check_model(Model())
