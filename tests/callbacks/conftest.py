import pytest
from lightning.pytorch import seed_everything


@pytest.fixture(autouse=True)
def _seed() -> None:
    seed_everything(0, verbose=False)
