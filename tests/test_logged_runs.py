import math
from pathlib import Path

import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_sensitivity import SensitivityMonitor, compare_runs
from tests.helpers import Classifier, loader, trainer


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logs")
    for version in range(3):
        logger = TensorBoardLogger(folder, name="net", version=version)
        monitor = SensitivityMonitor(task=None, prefix="other_" if version == 2 else "val_")
        run = trainer(callbacks=[monitor], logger=logger, max_epochs=3, log_every_n_steps=1)
        run.fit(Classifier(), loader(), loader(seed=1))
        (folder / f"last-{version}").write_text(repr({name: float(v) for name, v in run.callback_metrics.items()}))
    return folder


def last(logs: Path, version: int) -> dict[str, float]:
    values: dict[str, float] = eval((logs / f"last-{version}").read_text())
    return values


def test_runs_are_compared_by_their_last_values(logs: Path) -> None:
    result = compare_runs(logs)
    assert sorted(run.name for run in result) == ["version_0", "version_1"]
    for version in range(2):
        run, values = result[f"version_{version}"], last(logs, version)
        assert run.sensitivity == pytest.approx(values["val_sensitivity"], rel=1e-6)
        assert run.sensitivity_stderr == pytest.approx(values["val_sensitivity_stderr"], rel=1e-6)
        assert run.loss_estimate == pytest.approx(values["val_loss_estimate"], rel=1e-6)
        assert run.loss == pytest.approx(values["val_loss"], rel=1e-6)
        assert math.isnan(run.error) and math.isnan(run.seconds)
    assert [run.sensitivity for run in result] == sorted(run.sensitivity for run in result)


def test_tags_and_folders(logs: Path) -> None:
    result = compare_runs([logs / "net" / "version_2"], prefix="other_", loss=None, error="train_loss")
    (run,) = result
    assert run.name == "version_2"
    assert math.isnan(run.loss)
    assert run.error == pytest.approx(last(logs, 2)["train_loss"], rel=1e-6)
    assert len(compare_runs([logs / "net" / "version_0", logs / "net" / "version_1"])) == 2


def test_nothing_to_compare(logs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="that logged 'test_sensitivity' .*, but got the tags .*'val_sensitivity'"):
        compare_runs(logs, prefix="test_")
    with pytest.raises(ValueError, match="but got 0 event files with scalars"):
        compare_runs(tmp_path)
    with pytest.raises(ValueError, match="but got 0 event files with scalars"):
        compare_runs(tmp_path / "missing")
