import math
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from lightning_sensitivity import compare_runs


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    for version, prefix in enumerate(("val_", "val_", "other_")):
        with SummaryWriter(str(tmp_path / "net" / f"version_{version}")) as writer:
            for step, factor in ((1, 99.0), (2, 1.0)):
                writer.add_scalar(f"{prefix}sensitivity", factor * (3 - version), step)
                writer.add_scalar(f"{prefix}sensitivity_stderr", 0.5 * factor, step)
                writer.add_scalar(f"{prefix}loss_estimate", 0.25 * factor, step)
                writer.add_scalar("val_loss", 2.0 * factor, step)
                writer.add_scalar("val_error", 0.125 * factor, step)
    return tmp_path


def test_runs_are_compared_by_their_last_values(logs: Path) -> None:
    result = compare_runs(logs)
    assert [run.name for run in result] == ["version_1", "version_0"]
    run = result["version_0"]
    assert (run.sensitivity, run.sensitivity_stderr, run.loss_estimate, run.loss) == (3, 0.5, 0.25, 2)
    assert math.isnan(run.error) and math.isnan(run.seconds)


def test_tags_and_folders(logs: Path) -> None:
    (run,) = compare_runs([logs / "net" / "version_2"], prefix="other_", loss=None, error="val_error")
    assert (run.name, run.error) == ("version_2", 0.125)
    assert math.isnan(run.loss)
    assert len(compare_runs([logs / "net" / "version_0", str(logs / "net" / "version_1")])) == 2


def test_nothing_to_compare(logs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"that logged 'test_sensitivity' .*, but got 3 with the tags .*'val_sens"):
        compare_runs(logs, prefix="test_")
    with pytest.raises(ValueError, match="but got 0 with the tags"):
        compare_runs(tmp_path / "missing")
