"""The numbers of the studies: every page has those of the CSVs. With `-m long`, each study is run once, in small."""

import dataclasses
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_sensitivity import RiskMonitor

STUDIES = Path(__file__).parents[1] / "examples" / "studies"
LONG = pd.DataFrame(
    {
        "run": [0, 0, 1, 1, 2],
        "pool": ["x", "x", "y", "y", "y"],
        "rule": ["criterion", "never", "criterion", "never", "criterion"],
        "lost": [1.0, 3.0, 2.0, 1.5, 6.0],
    }
)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Three runs, the last of which one rule has no value of, read from a CSV with a row for each rule."""
    monkeypatch.syspath_prepend(STUDIES)
    import summaries

    LONG.to_csv(tmp_path / "results.csv", index=False)
    return summaries.Runs.read_long(tmp_path / "results.csv", measures=["lost"])


def test_pages_have_the_numbers_of_the_studies() -> None:
    command = [sys.executable, str(STUDIES / "tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("{runs.count}", "3"),
        ("{runs.criterion_lost:.1f}", "3.0"),
        ("{runs.criterion_lost.median:.1f}", "2.0"),
        ("{runs.criterion_lost.p90:.1f}", "5.2"),
        ("{runs.never_lost.count}", "2"),
        ("{runs.criterion_lost.minus[never_lost]:+.2f}", "−0.75"),
        ("{runs.criterion_lost.minus[never_lost].interval:.1f}", "−0.8 [−2.0, 0.5]"),
        ("{runs.criterion_lost.bounds:.1f}", "1.0 to 6.0"),
    ],
)
def test_a_field_of_a_text(field: str, expected: str, runs: Any) -> None:
    assert field.format(runs=runs) == expected


def test_a_run_of_two_pools_is_refused(runs: Any, tmp_path: Path) -> None:
    LONG.assign(pool=["x", "y", "y", "y", "y"]).to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(ValueError, match="'pool': 'y'"):
        type(runs).read_long(tmp_path / "results.csv", measures=["lost"])


def test_a_row_for_each_rule_is_read_as_a_row_for_each_run(runs: Any) -> None:
    assert list(runs.frame) == ["run", "pool", "criterion_lost", "never_lost"]
    assert runs.where("pool == 'y'").count == 2
    np.testing.assert_array_equal(runs.frame["never_lost"], [3, 1.5, np.nan])


@pytest.mark.parametrize("field", ["{runs.another_lost:.1f}", "{runs.criterion_lost.mode:.1f}"])
def test_a_number_that_is_not_there_is_refused(field: str, runs: Any) -> None:
    with pytest.raises(AttributeError, match="another_lost|mode"):
        field.format(runs=runs)


def test_a_table_is_rows_columns_and_a_cell(runs: Any) -> None:
    import summaries

    columns = summaries.across({"mean": "mean", "worst": "worst"}, "{runs.ROW_lost.COLUMN:.1f}")
    text = summaries.table("rule", {"ours": "criterion", "none": "never"}, columns).format(runs=runs)
    assert text.splitlines() == [
        "| rule | mean | worst |",
        "|---|---|---|",
        "| ours | 3.0 | 6.0 |",
        "| none | 2.2 | 3.0 |",
    ]


@pytest.mark.long
def test_the_study_of_early_stopping_replays_what_a_fit_logs(run: Any) -> None:
    text, _ = run("studies/early_stopping/study.py", "--quick")
    results = pd.read_csv("runs/early_stopping_quick/results.csv")
    assert f"{len(results)} runs" in text and results["criterion_accuracy_lost"].ge(0).all()
    training, replay = sys.modules["training"], sys.modules["replay"]
    drawn = dataclasses.replace(sys.modules["pools"].DRAWS["tables"](2, None), epochs=2)
    x, y = drawn.x_holdout[:300], torch.full((300,), replay.NO_LABEL)

    class Real(training.Classifier):  # type: ignore[name-defined, misc]
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

    validation = DataLoader(TensorDataset(x, y), replay.BATCH_SIZE, generator=torch.Generator())
    callbacks = [RiskMonitor(), recorder := replay.Recorder()]
    trainer = Trainer(max_epochs=2, accelerator="cpu", callbacks=callbacks, **training.QUIET)
    trainer.fit(Real(drawn), training.training_loader(drawn), validation)
    replayed = replay.replayed(drawn, training.trained(drawn)["weights"], [RiskMonitor()], x, y)
    for row, expected in zip(replayed.rows, recorder.rows, strict=True):
        assert row == {name: value for name, value in expected.items() if name != "train_loss"}
        assert "val/risk_criterion" in row


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*survives averaging over classes")
def test_the_pictures_of_the_page_on_curves(run: Any) -> None:
    text, _ = run("studies/reading_curves/curves.py", "--quick", "--only", "terms")
    assert "terms" in text.splitlines() and Path("runs/reading_curves/terms.png").stat().st_size > 10_000


@pytest.mark.long
def test_a_slice_of_the_random_attack() -> None:
    ends = runpy.run_path(str(STUDIES / "robustness" / "attack.py"))["attack"](8)
    assert sum(ends.values()) >= 8
    assert ends["the same, and S that of a plain loop"] > 0
