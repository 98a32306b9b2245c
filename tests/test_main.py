import csv
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader
from torch.utils.tensorboard import SummaryWriter

from lightning_sensitivity import __main__ as command
from lightning_sensitivity import compare_models
from lightning_sensitivity.perturbations import UniformNoise
from tests.comparison.test_models import linear, save
from tests.helpers import Linear, loader, trainer


class Data(LightningDataModule):
    def __init__(self, num_samples: int = 50) -> None:
        super().__init__()
        self.num_samples = num_samples

    def val_dataloader(self) -> DataLoader:
        return loader(self.num_samples)


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "runs" / name / "best.ckpt" for name in "ab"]
    for seed, path in enumerate(paths):
        path.parent.mkdir(parents=True)
        save(linear(9, seed), path)
    return list(map(str, paths))


OPTIONS = ["--data", "tests.test_main.Data", "--data.num_samples", "40", "--model_class", "tests.helpers.Linear"]
OPTIONS += ["--trainer.accelerator", "cpu"]


def test_compare(checkpoints: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table, figure = tmp_path / "new" / "table.csv", tmp_path / "new" / "figure.png"
    noise = ["--perturbation=lightning_sensitivity.perturbations.UniformNoise", "--perturbation.std=0.2", "--at=net"]
    command.main(["compare", *checkpoints, *OPTIONS, *noise, "--csv", str(table), "--figure", str(figure)])
    printed = capsys.readouterr().out
    assert "a/best *" in printed and "* b/best: untrained (step 0)" in printed
    with table.open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert rows.keys() == {"a/best", "b/best"}
    models = {"a/best": Linear.load_from_checkpoint(checkpoints[0])}
    options = {"perturbation": UniformNoise(0.2), "at": "net", "trainer": trainer()}
    expected = compare_models(models, loader(40), **options)["a/best"]
    assert float(rows["a/best"]["sensitivity"]) == expected.sensitivity
    assert float(rows["a/best"]["loss"]) == expected.loss
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_names_of_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command._named(["fc/best.ckpt", "cnn/best.ckpt"])["fc/best"] == str(tmp_path / "fc/best.ckpt")
    assert list(command._named(["a.ckpt", "a.ckpt", str(tmp_path / "b.ckpt")])) == ["a", "b"]
    assert set(command._named(["x", "x.ckpt"])) == {str(tmp_path / "x"), str(tmp_path / "x.ckpt")}


def test_it_runs_as_a_module_with_a_file_and_the_users_code(checkpoints: list[str], tmp_path: Path) -> None:
    (tmp_path / "my_code.py").write_text("from tests.helpers import Linear\nfrom tests.test_main import Data\n")
    (tmp_path / "config.yaml").write_text(
        f"checkpoints: [{checkpoints[0]}]\nmodel_class: my_code.Linear\nnoise_std: 0.3\n"
        "data: {class_path: my_code.Data}\ntrainer: {accelerator: cpu, enable_progress_bar: false}\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "lightning_sensitivity", "compare", "--config", "config.yaml"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "best *" in result.stdout


def test_compare_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, sensitivity in (("x", 0.5), ("y", 0.25)):
        with SummaryWriter(str(tmp_path / name)) as writer:
            writer.add_scalar("val/sensitivity", sensitivity, 1)
            writer.add_scalar("val/loss", 1.5, 1)
    figure = tmp_path / "figure.svg"
    command.main(["compare_runs", str(tmp_path), "--prefix", "val/", "--loss", "val/loss", "--figure", str(figure)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["1", "y", "0.25", "1.5"]
    assert figure.exists()


def test_what_is_missing(
    checkpoints: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command.main(["compare", *checkpoints, "--model_class", "tests.helpers.Linear"])
    assert "data" in capsys.readouterr().err
    find_spec = command.find_spec
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    with pytest.raises(SystemExit, match="`--figure` needs matplotlib"):
        command.main(["compare", *checkpoints, *OPTIONS, "--figure", "x.png"])
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="needs jsonargparse: `pip install 'jsonargparse"):
        command.main(["compare", *checkpoints, *OPTIONS])
