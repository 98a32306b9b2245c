"""The zoo of examples/paper and what is measured on it; the studies themselves take hours."""

import importlib
import subprocess
import sys
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_sensitivity import compare_models

FOLDER = Path(__file__).parents[1] / "examples" / "paper"


@pytest.fixture(scope="module")
def paper() -> Any:
    """Its modules, which import each other as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)
        yield {name: importlib.import_module(name) for name in ("zoo", "measure", "peers", "bias_variance")}


def test_networks_are_measured_as_the_package_does(paper: Any, tmp_path: Path) -> None:
    zoo, measure, peers = paper["zoo"], paper["measure"], paper["peers"]
    specs = [zoo.Spec(1, 16), zoo.Spec(1, 32, init="normal"), zoo.Spec(2, 16)]
    args = Namespace(data=None, out=tmp_path, max_epochs=120, processes=1)
    table = peers.add_consensus(measure.measure(specs, "digits", args), specs, args).set_index("network")
    models = {spec.name: zoo.checkpoints(spec, "digits", tmp_path).trained for spec in specs}
    models["untrained"] = zoo.checkpoints(specs[0], "digits", tmp_path).untrained  # that of N(0, 1) would vote
    models = {name: partial(zoo.Network.load_from_checkpoint, path) for name, path in models.items()}
    images = zoo.Images("digits")
    images.setup("validate")
    result = compare_models(models, images.val_dataloader(), targets=lambda batch: batch[1])
    for spec in specs:
        row, scores = table.loc[spec.name], result[spec.name]
        assert not row["converged"]
        for name in ("loss", "error", "consensus_error"):
            assert getattr(scores, name) == pytest.approx(row[name], rel=1e-5, abs=1e-6)
        assert scores.sensitivity == pytest.approx(row["sensitivity"], abs=5 * scores.sensitivity_stderr)
    assert result["untrained"].note.startswith("undecided")


def test_the_decomposition_adds_up(paper: Any) -> None:
    """Networks that are a fixed function plus noise of a known variance have it, and the rest is bias."""
    generator = torch.Generator().manual_seed(0)
    mean = torch.randn(2000, 10, generator=generator).double()
    noisy = [mean + 0.5 * torch.randn(2000, 10, generator=generator).double() for _ in range(5)]
    networks = [paper["measure"].Outputs(clean, clean + 0.1, 29.0) for clean in noisy]
    labels = torch.randint(10, (2000,), generator=generator)
    rows = {row["output"]: row for row in paper["bias_variance"].decompose(networks, labels)}
    assert rows["logits"]["variance"] == pytest.approx(0.25, rel=0.05)
    assert rows["class-average"]["variance"] == pytest.approx(0.025, rel=0.1)
    target = torch.nn.functional.one_hot(labels, 10)
    assert rows["logits"]["bias2"] == pytest.approx(float((mean - target).square().mean()), rel=0.05)
    brier = torch.stack([(clean.softmax(1) - target).square().sum(1).mean() for clean in noisy]).mean()
    assert rows["probabilities"]["mse"] == pytest.approx(float(brier))


@pytest.mark.long
def test_a_script_runs_on_embedded_data(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "added_layers.py"), "--quick", "--out", "out", "--processes", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert {path.suffix for path in (tmp_path / "out" / "quick").iterdir()} == {".csv", ".md", ".png"}
