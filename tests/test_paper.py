"""The zoo of examples/paper and what is measured on it; the studies themselves take hours."""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lightning_sensitivity import compare_models
from tests.helpers import trainer

FOLDER = Path(__file__).parents[1] / "examples" / "paper"
MODULES = ("zoo", "measure", "ranking", "figures", "peers", "bias_variance")


@pytest.fixture(scope="module")
def paper() -> Iterator[dict[str, ModuleType]]:
    """Its modules, which import each other as scripts do."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: __import__(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


def test_folds_are_disjoint(paper: dict[str, ModuleType]) -> None:
    images = []
    for fold in range(3):
        data = paper["zoo"].Images("digits", fold=fold)
        data.setup("fit")
        images.append({x.numpy().tobytes() for x, _ in data.train_set})
    assert not images[0] & images[1] and not images[1] & images[2] and not images[0] & images[2]


def test_networks_are_measured_as_the_package_does(paper: dict[str, ModuleType], tmp_path: Path) -> None:
    zoo, measure = paper["zoo"], paper["measure"]
    specs = [zoo.Spec(1, 16), zoo.Spec(1, 32, init="normal")]
    args = Namespace(data=None, out=tmp_path, max_epochs=2, processes=1)
    table = measure.measure(specs, "digits", args).set_index("network")
    assert list(table.index) == ["fc1x16-s0", "fc1x32-normal-s0"]
    assert not table["converged"].any()
    paths = [zoo.checkpoints(spec, "digits", tmp_path) for spec in specs]
    times = [path.trained.stat().st_mtime_ns for path in paths]
    assert measure.measure(specs, "digits", args).set_index("network").equals(table)
    assert [path.trained.stat().st_mtime_ns for path in paths] == times

    models = {spec.name: path.trained for spec, path in zip(specs, paths, strict=True)}
    models["untrained"] = paths[0].untrained
    result = compare_models(models, zoo.Images("digits"), model_class=zoo.Network, trainer=trainer())
    for spec in specs:
        row, found = table.loc[spec.name], result[spec.name]
        assert found.loss == pytest.approx(row["loss"], rel=1e-5)
        assert found.error == pytest.approx(row["error"], abs=1e-6)
        assert found.entropy == pytest.approx(row["entropy"], rel=1e-5)
        assert found.sensitivity == pytest.approx(row["sensitivity"], abs=5 * found.sensitivity_stderr)
        assert found.loss_estimate / found.sensitivity**0.5 == pytest.approx(
            row["equation9"] / row["sensitivity"] ** 0.5, rel=1e-4
        )
    assert result["untrained"].note == "untrained (step 0)"
    assert result["untrained"].loss != result["fc1x16-s0"].loss


def test_the_decomposition_adds_up(paper: dict[str, ModuleType]) -> None:
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
    script, out = FOLDER / "added_layers.py", tmp_path / "out"
    command = [sys.executable, str(script), "--quick", "--out", str(out), "--processes", "2"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert {path.suffix for path in (out / "quick").iterdir()} == {".csv", ".md", ".png"}
