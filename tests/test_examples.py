import csv
import importlib.util
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "reproduce_paper_fc.py"


def run(folder: Path) -> str:
    options = ["--data", "images.npz", "--seeds", "0", "--max-epochs", "2", "--init", "default", "--out", "rows.csv"]
    result = subprocess.run([sys.executable, SCRIPT, *options], cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_reproduce_paper_fc_writes_a_row_a_seed_and_resumes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = {f"x_{split}": rng.integers(0, 256, (1000, 3, 32, 32), np.uint8) for split in ("train", "test")}
    labels = {f"y_{split}": rng.integers(0, 10, 1000) for split in ("train", "test")}
    np.savez(tmp_path / "images.npz", **images, **labels)
    first = run(tmp_path)
    assert "1 runs in rows.csv" in first
    rows = (tmp_path / "rows.csv").read_text()
    header, row = (line.split(",") for line in rows.splitlines())
    values = dict(zip(header, map(float, row), strict=True))
    assert values["epochs"] == 2
    assert 0 < values["stderr"] < values["sensitivity"]
    assert "seed 0: already in rows.csv" in run(tmp_path)
    assert (tmp_path / "rows.csv").read_text() == rows


# The study of early stopping


@pytest.fixture
def study() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("early_stopping_study", EXAMPLES / "early_stopping_study.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    logger, num_threads = logging.getLogger("lightning.pytorch"), torch.get_num_threads()
    level = logger.level
    yield module
    logger.setLevel(level)
    torch.set_num_threads(num_threads)


def test_the_pool_of_the_study_is_what_was_asked_for(study: ModuleType) -> None:
    shapes = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32), "fashion": (1, 28, 28)}
    halves = [[run for run in study.RUNS if run.half == half] for half in ("design", "report")]
    assert sum(map(len, halves)) == 48
    assert len({run.name for run in study.RUNS}) == len(study.RUNS)
    halves.append([run for run in study.RUNS if run.half == "further"])
    for runs in halves:
        assert {run.data for run in runs} == ({"fashion"} if runs[0].half == "further" else {"mnist", "cifar10"})
        assert {run.label_noise for run in runs} == {0.0, 0.2, 0.4}
        assert len({run.optimizer for run in runs}) >= 3
        assert all(1000 <= run.num_samples <= 2000 for run in runs)
        for run in runs:
            net = study.network(run.network, torch.Size(shapes[run.data])).eval()
            assert net(torch.zeros(2, *shapes[run.data])).shape == (2, 10)
            assert study.optimizer(run.optimizer, net.parameters()).defaults["lr"] in (1e-3, 3e-4, 0.05)


@pytest.mark.parametrize(
    ("values", "chosen"),
    [([3, 2, 2.5, *[2.5] * 8, 1], 11), ([3, 2, 2.5, *[2.5] * 9, 1], 1), ([1, 2], 0), ([3, 2, 1], 2)],
)
def test_patience_is_that_of_early_stopping(study: ModuleType, values: list[float], chosen: int) -> None:
    assert study.patient(np.array(values)) == chosen


def test_gradient_disparity_stops_at_the_fifth_rise(study: ModuleType) -> None:
    assert study.fifth_rise(np.array([1, 2, 1, 2, 3, 1, 2, 3, 4.0])) == 7
    assert study.fifth_rise(np.array([1, 2, 1.0])) == 2


def test_the_study_trains_through_the_callback_and_reports(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    images = {f"x_{split}": rng.integers(0, 256, (700, 1, 28, 28), np.uint8) for split in ("train", "test")}
    np.savez(
        tmp_path / "mnist.npz", **images, **{f"y_{split}": rng.integers(0, 10, 700) for split in ("train", "test")}
    )
    runs = [study.Run("mnist", "fc1x512", 200, noise, "adam1e-3", 40, normalized=noise > 0) for noise in (0.0, 0.4)]
    for name, value in {"RUNS": runs, "NUM_HOLDOUT": 500, "NUM_TEST": 100}.items():
        monkeypatch.setattr(study, name, value)
    done = {}
    for run in runs:
        study.train(tmp_path, tmp_path, run, max_epochs=3)
        done[run.name] = study.read(tmp_path / f"{run.name}.csv")
    for series in done.values():
        assert series["epoch"].tolist() == [0, 1, 2]
        assert all(np.isfinite(values).all() for values in series.values())
        terms = series["val_risk_training"] + series["val_risk_uncertainty"] + series["val_risk_variance"]
        np.testing.assert_allclose(series["val_risk_estimate"], terms)
        # The kept samples are all there are: both ways to the training part must agree.
        np.testing.assert_allclose(series["val_risk_training"], series["all_train_brier"], rtol=1e-5)
        np.testing.assert_allclose(
            series["val_risk_uncertainty"], series["all_train_power"] - series["holdout_power"], atol=1e-5
        )
    text = study.report(done, "test")
    assert all(f"| {rule} |" in text for rule in study.RULES)
    assert all(f"| {run.name} |" in text for run in runs)
    study.figure(done, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_regret_is_what_a_choice_costs(study: ModuleType) -> None:
    series = {"test_loss": np.array([2.0, 1.0, 1.5])}
    assert study.regrets([series], lambda _: [0, 1, 2]).tolist() == [100.0, 0.0, 50.0]


def test_the_tables_run() -> None:
    command = [sys.executable, EXAMPLES / "early_stopping_tabular.py", "--seeds", "0", "--max-epochs", "2"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if "(regression)" in line or "(binary)" in line]
    assert len(rows) == 3 and not any("nan" in row for row in rows)


# The comparison


def test_compare_models_prints_a_table_and_writes_it(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "compare_models.py", "--max-epochs", "1"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for name in ("narrow", "untrained (step 0)", "shift loss", "Kendall's τ with"):
        assert name in result.stdout
    assert {path.name for path in (tmp_path / "runs/compare_models").iterdir()} >= {"ranking.csv", "ranking.png"}


# Text


def test_the_text_classifier_is_measured_at_its_embeddings_and_layers(tmp_path: Path) -> None:
    options = ["--num-sentences", "200", "--max-epochs", "30"]
    command = [sys.executable, EXAMPLES / "text_classifier.py", *options]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "runs/text_classifier"
    assert (folder / "text_classifier.png").stat().st_size > 10_000
    lines = (folder / "seed_0/version_0/metrics.csv").read_text().splitlines()
    logged: dict[str, list[float]] = {}
    for line in lines[1:]:  # validation, training and test have lines of their own
        for name, value in zip(lines[0].split(","), line.split(","), strict=True):
            if value:
                logged.setdefault(name, []).append(float(value))
    for layer in ("embeddings", "tokens", "sentence"):
        sensitivity, estimate = (np.array(logged[f"val_{name}/{layer}"]) for name in ("sensitivity", "loss_estimate"))
        assert len(sensitivity) == len(estimate) == 30
        assert (sensitivity > 0).all() and np.isfinite(estimate).all()
        assert estimate[-1] > 2 * estimate[0]  # memorizing shows at every layer
    assert "val_sensitivity" not in logged
    # The network knows its 300 sentences by heart, and the estimate, which saw no other label, is still the true size.
    assert logged["val_risk_training"][-1] < 0.1
    assert 0.6 < logged["val_risk_estimate"][-1] / logged["test_brier"][-1] < 1.6
    assert 0 < np.argmin(logged["val_risk_estimate"]) < 29
    assert f"(epoch {np.argmin(logged['val_risk_estimate'])})" in result.stdout.split("What stopping costs")[1]


# The benchmark


def test_benchmark_overhead_writes_its_rows_and_resumes(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "benchmark_overhead.py", "--quick", "--only", "mlp", "--out", "rows.csv"]
    first, second = (
        subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120) for _ in range(2)
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) > {"model", "samples", "measured", "case", "against", "ratio", "low", "high", "passes"}
    assert {row["model"] for row in rows} == {"mlp"}
    assert all(float(row[name]) > 0 for row in rows for name in ("ratio", "low", "high", "seconds"))
    found = {(row["measured"], row["case"]): float(row["passes"]) for row in rows if row["passes"]}
    # Forward passes over 1,000 samples in 25 batches, of which a budget of 120 measures 3, or with 4 draws 1. The risk
    # estimate runs a twin on each batch, or three of them on each of 3, and the model on 50 training samples.
    epoch = {"without": 1, "one forward more": 2, "one noisy forward more": 2, "1 draw": 2.04, "4 draws": 5.04}
    # The first batch is also run by itself, to see whether the step's outputs can be trusted.
    epoch |= {"1 draw, budget": 1.16, "4 draws, budget": 1.2, "with risk": 3.09, "with risk, budget": 1.57}
    assert epoch.items() <= {case: n for (measured, case), n in found.items() if measured == "validation epoch"}.items()
    growth = {f"{n} draws": 1.04 + n for n in (1, 2, 4, 8)}
    growth |= {f"budget, {n} samples": round(1 + (120 + 40) / n, 2) for n in (250, 4000)}
    assert growth.items() <= {case: n for (measured, case), n in found.items() if measured == "growth"}.items()
    against = {row["against"] for row in rows if row["measured"] == "authors' loop"}
    how = {f"{case}, {how}" for case in ("1 draw", "1 draw, budget") for how in ("alone", "reuse")}
    assert against == how | {"the metric in a loop"}
    peaks = {row["case"]: float(row["peak_mib"]) for row in rows if row["peak_mib"]}
    assert peaks["4 draws"] == pytest.approx(peaks["1 draw"], rel=0.05)  # one draw at a time
    assert peaks["without"] < peaks["1 draw"] < peaks["with risk"]
    assert second.stdout.count("already in rows.csv") >= 4 and second.stdout.endswith(first.stdout[-2000:])
