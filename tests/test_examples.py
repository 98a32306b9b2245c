"""Each example in its quick form, in this process: to import torch and lightning again would take most of the time."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = EXAMPLES / "track_generalization.ipynb"
# True of networks whose class average stays small; the pages speak of it.
pytestmark = pytest.mark.filterwarnings("ignore:.*survives averaging over classes")


def numbers(text: str) -> np.ndarray:
    """Read the numbers of the lines that begin with the number of an epoch."""
    lines = [line.split() for line in text.splitlines() if line[:5].strip().isdigit()]
    return np.array([[float(word) for word in line if re.fullmatch(r"-?[\d.]+(e-\d+)?", word)] for line in lines])


@pytest.mark.parametrize("noise", ["0.2", "0"])
def test_the_first_example_keeps_the_checkpoint_of_the_highest_expected_accuracy(run: Any, noise: str) -> None:
    text, variables = run("track_generalization.py", "--max-epochs", "3", "--noise", noise)
    expected = variables["curves"]["val/expected_accuracy"]
    np.testing.assert_allclose(numbers(text)[:, [0, -2]], np.stack([range(3), expected], 1), rtol=0.01)
    assert Path(variables["keep"].best_model_path).stem == f"epoch={np.argmax(expected)}"
    assert f"highest at epoch {np.argmax(expected)}: accuracy " in text
    assert variables["distance"]("accuracy") < 0.05 > variables["distance"]("loss")
    picture, command = text.splitlines()[-2:]
    assert picture.startswith("The picture is ") and Path("runs/track_generalization.png").stat().st_size > 10_000
    assert command.endswith("tensorboard --logdir runs/churn/version_0")
    logged = EventAccumulator("runs/churn/version_0").Reload()
    steps = {name: [event.step for event in logged.Scalars(name)] for name in logged.Tags()["scalars"]}
    curves = {name: each for name, each in steps.items() if "/" in name and len(each) > 1}
    assert all(each == [0, 1, 2] for each in curves.values())  # one axis of epochs
    wanted = {"train/loss", "train/accuracy", "val/output_sensitivity", "val/stop_progress", "val/expected_loss"}
    assert wanted < curves.keys()


@pytest.mark.parametrize("option", ["--labels", "--regression"])
def test_an_epoch_is_chosen_of_classes_beside_labels_and_of_numbers(run: Any, option: str) -> None:
    text, variables = run("choose_an_epoch.py", option, "--max-epochs", "3")
    expected = variables["expected"]
    np.testing.assert_allclose(numbers(text)[:, 1], expected, atol=1e-3)
    best, word = (np.argmin, "lowest") if option == "--regression" else (np.argmax, "highest")
    assert Path(variables["checkpoint"].best_model_path).stem == f"epoch={best(expected)}"
    assert f"{word} at epoch {best(expected)}: " in text


def test_the_notebook_has_the_cells_of_the_script() -> None:
    nbformat = pytest.importorskip("nbformat")
    made = runpy.run_path(str(EXAMPLES / "make_notebook.py"))["notebook"](NOTEBOOK.with_suffix(".py").read_text())
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    assert [cell.source for cell in cells] == [cell.source for cell in made.cells]
    assert "image/png" in str(cells[-1].outputs) and NOTEBOOK.stat().st_size < 150_000


def test_sensitivity_of_the_callback_and_of_the_metric_grow_as_the_gap_does(run: Any) -> None:
    text, _ = run("watch.py", "--max-epochs", "4")
    columns = numbers(text).T
    assert all((np.diff(values) > 0).all() for values in columns)
    np.testing.assert_allclose(columns[2], columns[3], rtol=0.2)  # of other noise


def test_a_final_run_on_all_labels_stops_where_it_is_as_far_as_the_tuned_one(run: Any) -> None:
    text, variables = run("stop_by_sensitivity.py", "--max-epochs", "40")
    curve, stopped = variables["curves"].progress, variables["stopped"]
    assert max(curve[:stopped]) <= 1 < curve[stopped] and stopped < 39
    assert variables["accuracy"](variables["new_model"]) == variables["curves"].accuracy[stopped]
    assert f"stopped at epoch {stopped}:" in text and Path("runs/digits/stop_by_sensitivity.png").is_file()
