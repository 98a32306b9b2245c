import os
from pathlib import Path

import pytest
import torch

# Two threads on tensors of this size only wait for each other; processes that the tests start inherit it.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshot", type=Path, help="where the browser test puts the picture that README shows")
