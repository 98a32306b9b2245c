"""Each example in its quick form, in this process: to import torch and lightning again would take most of the time."""

import importlib
import re
import runpy
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_sensitivity import compare_models

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "track_generalization.ipynb"
# True of networks whose class average stays small; the pages speak of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*survives averaging over classes")


def numbers(text: str) -> np.ndarray:
    """Read the numbers of the lines that begin with the number of an epoch."""
    lines = [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]
    return np.array([[float(word) for word in line if re.fullmatch(r"-?[\d.]+(e-\d+)?", word)] for line in lines])


def test_the_first_example_keeps_the_checkpoint_of_the_lowest_criterion(run: Any) -> None:
    text, variables = run("track_generalization.py", "--max-epochs", "4")
    table, criteria = numbers(text), variables["curves"]["val/risk_criterion"]
    np.testing.assert_allclose(table[:, [0, 4]], np.stack([range(4), criteria], 1), atol=1e-3)
    assert Path(variables["checkpoint"].best_model_path).stem == f"epoch={np.argmin(criteria)}"
    assert f"lowest at epoch {np.argmin(criteria)}: accuracy " in text
    picture, command = text.splitlines()[-2:]
    assert picture.startswith("The picture is runs/curves.png.") and Path("runs/curves.png").stat().st_size > 10_000
    assert command.endswith("tensorboard --logdir runs/digits/version_0")
    logged = EventAccumulator("runs/digits/version_0").Reload().Tags()["scalars"]
    assert "val/risk_criterion" in logged and "hp_metric" not in logged


@pytest.mark.parametrize("command", ["tables.py", "finetuning.py", "signals.py --unlabelled"])
def test_the_other_examples_keep_it_too(run: Any, command: str) -> None:
    text, variables = run(*command.split(), "--max-epochs", "3")
    criteria = variables["criteria"]
    np.testing.assert_allclose(numbers(text)[:, 1], criteria, atol=1e-3)
    assert Path(variables["checkpoint"].best_model_path).stem == f"epoch={np.argmin(criteria)}"
    assert f"lowest at epoch {np.argmin(criteria)}, where the accuracy is " in text
    assert variables["risk"].metrics[0].compute()["risk_reference_weight"] > 0


def test_the_notebook_has_the_cells_of_the_script() -> None:
    nbformat = pytest.importorskip("nbformat")
    made = runpy.run_path(str(EXAMPLES / "make_notebook.py"))["notebook"](NOTEBOOK.with_suffix(".py").read_text())
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert [cell.source for cell in cells] == [cell.source for cell in made.cells]
    assert "image/png" in str(cells[-1].outputs) and NOTEBOOK.stat().st_size < 150_000


def test_the_plain_loop_sees_sensitivity_grow(run: Any) -> None:
    text, _ = run("plain_pytorch.py", "--max-epochs", "3")
    _, criterion, sensitivity, *_ = numbers(text).T
    assert (np.diff(sensitivity) > 0).all() and (np.diff(criterion) < 0).all()


@pytest.mark.long
@pytest.mark.parametrize("option", ["--finetune", "--mixup"])
def test_a_resnet_has_an_estimate_in_every_epoch(run: Any, option: str) -> None:
    pytest.importorskip("torchvision")
    text, variables = run("images/resnet18.py", "--quick", option)
    table = np.array(variables["rows"])
    assert len(numbers(text)) == len(table) == (3 if option == "--finetune" else 2)
    assert np.isfinite(table).all() and (table > 0).all()


@pytest.mark.parametrize("task", ["sentences", pytest.param("words", marks=pytest.mark.long)])
def test_the_transformers_are_measured_at_their_embeddings(run: Any, task: str) -> None:
    pytest.importorskip("transformers")
    text, variables = run("text/transformer.py", "--quick", "--task", task)
    assert ("val/risk_criterion" in variables["columns"]) == (task == "sentences")
    np.testing.assert_allclose(numbers(text)[:, 1:].T, list(variables["columns"].values()), atol=1e-3, rtol=0.05)
    assert min(variables["columns"]["val/output_sensitivity"]) > 0


def test_tuning_without_labels_ends_with_a_table_and_a_picture(run: Any) -> None:
    text, variables = run("tuning.py", "--max-epochs", "2")
    assert str(variables["result"]) in text and len(variables["result"]) == 8
    assert f"Chosen: {variables['chosen']}" in text and "The mean of all eight" in text
    assert Path("runs/tuning/tuning.png").stat().st_size > 10_000


@pytest.mark.long
def test_networks_of_the_paper_are_measured_as_the_package_does(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "studies" / "paper")  # whose modules import each other as scripts do
    zoo, measure, peers = map(importlib.import_module, ("zoo", "measure", "peers"))
    specs = [zoo.Spec(1, 16), zoo.Spec(1, 32, init="normal"), zoo.Spec(2, 16)]
    args = Namespace(data=None, out=tmp_path, max_epochs=120, processes=1)
    table = peers.add_consensus(measure.measure(specs, "digits", args), specs, args).set_index("network")
    models = {spec.name: zoo.checkpoints(spec, "digits", tmp_path).trained for spec in specs}
    models["untrained"] = zoo.checkpoints(specs[0], "digits", tmp_path).untrained
    models = {name: partial(zoo.Network.load_from_checkpoint, path) for name, path in models.items()}
    images = zoo.Images("digits")
    images.setup("validate")
    result = {row.name: row for row in compare_models(models, images.val_dataloader())}
    for spec in specs:
        row, scores = table.loc[spec.name], result[spec.name]
        assert not row["converged"]
        assert scores.sensitivity == pytest.approx(row["sensitivity"], abs=5 * scores.sensitivity_stderr)
    assert result["untrained"].rank == 4 and 0 < table["consensus_error"].max() < 0.5
