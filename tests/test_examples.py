"""Each example in its quick form, in this process: to import torch and lightning again would take most of the time."""

import importlib.util
import logging
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kendalltau

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "track_generalization.ipynb"
Run = Callable[..., tuple[str, dict[str, Any]]]
# Right of networks whose class average stays small; the pages speak of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*The class average holds")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    def run(script: str, *options: str) -> tuple[str, dict[str, Any]]:
        """What an example prints, and its variables."""
        monkeypatch.setattr(sys, "argv", [script, *options])
        variables = runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out, variables

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # given back at the end, as the level of the logger is
    monkeypatch.setenv("MPLBACKEND", "agg")
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    yield run
    logger.setLevel(level)


def rows(text: str) -> np.ndarray:
    """The numbers of the lines that begin with the number of an epoch."""
    lines = [line for line in text.splitlines() if line[:5].strip().isdigit()]
    return np.array(
        [[float(word) for word in line.split() if re.fullmatch(r"-?[\d.]+(e-\d+)?", word)] for line in lines]
    )


def test_the_first_example_prints_a_table_that_fits_a_terminal(run: Run) -> None:
    text, found = run("track_generalization.py", "--max-epochs", "12", "--figure", "figure.png")
    assert max(map(len, text.splitlines()[:-1])) <= 80  # the last one is a command, with a path
    assert text.splitlines()[-1].endswith("tensorboard --logdir runs/track_generalization/version_0")
    assert Path(found["checkpoint"].best_model_path).stem == f"epoch={found['chosen']}"
    table, estimates = rows(text), found["curves"]["val_risk_estimate"]
    assert table[:, 0].tolist() == list(range(12))
    np.testing.assert_allclose(table[:, 4], estimates, atol=1e-3)
    assert f"lowest at epoch {np.argmin(estimates)} " in text
    assert 10_000 < Path("figure.png").stat().st_size < 150_000


def test_the_notebook_has_the_cells_of_the_script_and_small_outputs() -> None:
    nbformat = pytest.importorskip("nbformat", reason="nbformat is missing")
    spec = importlib.util.spec_from_file_location("make_notebook", EXAMPLES / "make_notebook.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.notebook(NOTEBOOK.with_suffix(".py").read_text())
    kept = nbformat.read(NOTEBOOK, as_version=4)
    assert [cell.source for cell in kept.cells] == [cell.source for cell in made.cells]
    assert "tensorboard --logdir" in str(kept.cells[-1].outputs)
    assert NOTEBOOK.stat().st_size < 150_000


@pytest.mark.long
def test_the_notebook_runs(tmp_path: Path) -> None:
    pytest.importorskip("nbmake", reason="nbmake is missing")
    (tmp_path / "short.ipynb").write_text(NOTEBOOK.read_text().replace("type=int, default=60", "type=int, default=2"))
    command = [sys.executable, "-m", "pytest", "--nbmake", "-p", "no:xdist", "-p", "no:cacheprovider", "short.ipynb"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout


def test_the_plain_loop_is_short_and_sums_up(run: Run) -> None:
    text, _ = run("plain_pytorch.py", "--max-epochs", "3")
    _, risk, *terms, sensitivity, _ = rows(text).T
    np.testing.assert_allclose(risk, sum(terms), atol=2e-3)
    assert (np.diff(sensitivity) > 0).all()
    loop = (EXAMPLES / "plain_pytorch.py").read_text().split("# The loop\n")[1]
    assert len([line for line in loop.splitlines() if line]) <= 30


def test_the_identity_of_the_twins_is_exact(run: Run) -> None:
    text, found = run("twins/twins.py", "--quick")
    table = found["table"]
    np.testing.assert_allclose(table[:, 8], table[:, 0], atol=1e-5)
    np.testing.assert_allclose(table[:, 3] - table[:, 6], table[:, 0] - table[:, 7], atol=1e-5)
    assert (table[:, 4:7] > 0).all() and len(rows(text)) == 3


def test_a_fine_tuned_resnet_is_told_its_first_weights(run: Run) -> None:
    pytest.importorskip("torchvision", reason="torchvision is missing")
    text, found = run("images/resnet18.py", "--quick", "--finetune")
    assert [line.split()[1] for line in text.splitlines() if line[:5].strip().isdigit()] == ["head", "all", "all"]
    variances = found["curves"]["val_risk_variance"]
    assert np.isfinite(variances).all() and min(variances) > 0


@pytest.mark.long
def test_a_resnet_from_scratch(run: Run) -> None:
    pytest.importorskip("torchvision", reason="torchvision is missing")
    text, _ = run("images/resnet18.py", "--quick", "--figure", "figure.png")
    assert len(rows(text)) == 2 and Path("figure.png").exists()


@pytest.mark.parametrize("task", ["sentences", pytest.param("tokens", marks=pytest.mark.long)])
def test_the_transformers_are_measured_at_their_embeddings(run: Run, task: str) -> None:
    pytest.importorskip("transformers", reason="transformers is missing")
    text, found = run("text/transformer.py", "--quick", "--task", task)
    assert len(rows(text)) == 2
    assert min(found["curves"]["val_sensitivity"]) > 0 and min(found["curves"]["val_risk_variance"]) > 0
    assert 0.8 < found["curves"]["val_risk_estimate"][-1] / found["curves"]["val_brier"][-1] < 1.25


OTHERS = pytest.param("learning memorizing batch_norm dont_stop", marks=pytest.mark.long)


@pytest.mark.parametrize("only", ["easy", OTHERS])
def test_the_pictures_of_the_page_on_curves(run: Run, only: str) -> None:
    text, found = run("reading_curves/curves.py", "--quick", "--only", *only.split())
    for name in only.split():
        assert f"\n{name} " in text
        assert (Path("runs/reading_curves") / f"{name}.png").stat().st_size > 10_000
        lines = (Path("runs/reading_curves") / f"{name}.csv").read_text().splitlines()
        assert len(lines) == 3 and {"risk_claim", "sensitivity", "true_loss"} <= set(lines[0].split(","))
    terms = sum(np.array(found["curves"][f"risk_{term}"]) for term in ("claim", "overconfidence", "variance"))
    np.testing.assert_allclose(found["curves"]["risk_estimate"], terms)


def test_what_a_comparison_is_worth_in_labels(run: Run) -> None:
    text, found = run("comparing_models/worth.py", "--quick")
    assert "| 1000 labels | 1.00 [1.00, 1.00] | " in text
    assert len(Path("runs/worth_quick/worth.csv").read_text().splitlines()) == 1 + 2 * (9 + 7)
    rng = np.random.default_rng(0)
    scores, truth = rng.integers(0, 9, (5, 12)), rng.integers(0, 9, 12)
    taus = found["taus"](scores, truth, np.stack([np.ones(12), np.arange(12) % 3]))
    np.testing.assert_allclose(taus[:, 0], [kendalltau(score, truth).statistic for score in scores])
    drawn = np.repeat(np.arange(12), np.arange(12) % 3)
    np.testing.assert_allclose(taus[:, 1], [kendalltau(score[drawn], truth[drawn]).statistic for score in scores])
    curve, tau = np.linspace(0.2, 0.8, 7)[:, None], np.array([[0.1], [0.3], [0.9]])
    np.testing.assert_allclose([found["worth"](t, curve)[0] for t in tau], [10, 20, 1000])
