import random

import numpy as np
import pytest
import torch
from torch import nn

from lightning_sensitivity.isolation import evaluating, preserved_rng


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_random_streams_go_on_as_if_nothing_was_drawn(error: type[BaseException] | None) -> None:
    def seed() -> None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = draws()
    seed()
    if error is None:
        with preserved_rng({torch.device("cpu")}):
            draws()
    else:
        with pytest.raises(error), preserved_rng({torch.device("cpu")}):
            draws()
            raise error
    assert draws() == expected


@pytest.mark.parametrize("error", [None, ValueError])
def test_every_submodule_gets_its_own_mode_back(error: type[Exception] | None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(), nn.Sequential(nn.BatchNorm1d(2)))
    model[2].eval()
    model[2][0].train()
    before = [module.training for module in model.modules()]
    assert len(set(before)) == 2

    def run() -> None:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if error:
                raise error

    if error:
        with pytest.raises(error):
            run()
    else:
        run()
    assert [module.training for module in model.modules()] == before
