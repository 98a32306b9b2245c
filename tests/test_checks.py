from types import SimpleNamespace

import pytest
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy

from lightning_sensitivity.checks import check_model, check_processes


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharded_strategies_are_refused(strategy: type) -> None:
    trainer = SimpleNamespace(strategy=strategy(), datamodule=None, world_size=2)
    with pytest.raises(MisconfigurationException, match=f"the whole model.*got {strategy.__name__}, which is not supp"):
        check_processes(trainer, BoringModel())


def test_lightnings_own_demo_model_has_a_forward() -> None:
    check_model(BoringModel())


def test_a_users_file_may_be_named_as_lightnings() -> None:
    class Model(BoringModel):
        def forward(self, x: object) -> object:
            return x

    Model.forward.__module__ = "core.module"
    check_model(Model())
