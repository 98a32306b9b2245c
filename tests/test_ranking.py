import csv
import math
from pathlib import Path

import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor

from lightning_sensitivity.ranking import Comparison
from lightning_sensitivity.scores import ModelScores


def comparison(num_models: int = 8, labelled: bool = True, seed: int = 0) -> Comparison:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(num_models, 4, generator=generator).tolist()
    rows = [
        ModelScores(
            f"model {index}",
            sensitivity=s,
            sensitivity_stderr=0.01,
            entropy=entropy,
            num_parameters=1234 + index,
            loss=loss if labelled else math.nan,
            error=round(error, 1) if labelled else math.nan,
        )
        for index, (s, entropy, loss, error) in enumerate(values)
    ]
    return Comparison(rows)


def pair(first: Tensor, second: Tensor) -> Comparison:
    rows = [ModelScores(name, sensitivity=float(values.mean())) for name, values in (("a", first), ("b", second))]
    return Comparison(rows, {"a": {"sensitivity": first}, "b": {"sensitivity": second}})


def test_models_are_in_the_order_of_sensitivity_and_failures_come_last() -> None:
    result = Comparison(
        [
            ModelScores("failed", note="failed: why"),
            ModelScores("b", sensitivity=2.0),
            ModelScores("a", sensitivity=1.0),
        ]
    )
    assert [model.name for model in result] == ["a", "b", "failed"]
    assert len(result) == 3
    assert result["b"].sensitivity == 2
    with pytest.raises(KeyError, match="Expected one of 'a', 'b', 'failed', but got 'c'"):
        result["c"]


def test_a_difference_has_the_error_of_its_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(100, generator=generator).double()
    own = 0.1 * torch.randn(100, generator=generator).double()
    value, stderr = pair(common, common + own + 0.05).difference("b", "a")
    assert value == pytest.approx((own + 0.05).mean().item())
    assert stderr == pytest.approx((own.std() / 10).item())


def test_samples_that_have_no_label_do_not_count_in_a_difference() -> None:
    first, second = torch.tensor([1.0, 2.0, math.nan, 4.0]), torch.tensor([0.0, 0.0, math.nan, 0.0])
    _, stderr = pair(first, second).difference("a", "b")
    assert stderr == pytest.approx(torch.tensor([1.0, 2.0, 4.0]).std().item() / math.sqrt(3))


def test_ties_are_pairs_whose_interval_holds_zero() -> None:
    noise = torch.tensor([1.0, -1.0] * 50)
    assert pair(noise, noise + 0.01).ties() == {"a": [], "b": []}  # the same noise
    assert pair(noise, -noise + 0.01).ties() == {"a": ["b"], "b": ["a"]}
    assert pair(noise, -noise + 0.41).ties() == {"a": [], "b": []}  # 1.96 · 0.201 = 0.39


def test_without_samples_the_errors_of_both_add_up() -> None:
    rows = [
        ModelScores("a", sensitivity=1.0, sensitivity_stderr=0.3),
        ModelScores("b", sensitivity=2.0, sensitivity_stderr=0.4),
    ]
    assert Comparison(rows).ties("entropy") == {}
    value, stderr = Comparison(rows).difference("a", "b")
    assert (value, stderr) == (-1, 0.5)
    assert math.isnan(Comparison(rows).difference("a", "b", "entropy")[1])


@pytest.mark.parametrize("truth", ["loss", "error"])
def test_kendall_is_that_of_scipy(truth: str) -> None:
    result = comparison()
    taus = result.kendall(truth)
    assert list(taus) == ["sensitivity", "entropy", "num_parameters"]
    for score, tau in taus.items():
        expected = kendalltau([getattr(m, score) for m in result], [getattr(m, truth) for m in result])
        assert tau.tau == pytest.approx(expected.statistic, abs=1e-6)
        assert -1 <= tau.low <= tau.tau <= tau.high <= 1


def test_the_interval_of_kendall_holds_the_truth() -> None:
    """Normal scores that correlate by ρ have τ = 2/π arcsin ρ."""
    covered = 0
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        loss = torch.randn(30, generator=generator)
        score = 0.7 * loss + math.sqrt(1 - 0.7**2) * torch.randn(30, generator=generator)
        rows = [
            ModelScores(str(i), sensitivity=float(s), loss=float(x))
            for i, (s, x) in enumerate(zip(score, loss, strict=True))
        ]
        tau = Comparison(rows).kendall()["sensitivity"]
        covered += tau.low <= 2 / math.pi * math.asin(0.7) <= tau.high
    assert covered >= 16


def test_few_models_have_no_interval_and_two_have_no_tau() -> None:
    assert math.isnan(comparison(5).kendall()["sensitivity"].low)
    assert math.isfinite(comparison(6).kendall()["sensitivity"].low)
    rows = [ModelScores(str(i), sensitivity=float(i), entropy=1.0, loss=float(i)) for i in range(8)]
    assert Comparison(rows).kendall().keys() == {"sensitivity"}  # the entropy is the same for all
    assert math.isnan(Comparison(rows).kendall()["sensitivity"].low)  # and here all resamples agree
    assert comparison(2).kendall() == {}
    assert comparison(8, labelled=False).kendall() == {}
    with pytest.raises(ValueError, match="Expected `truth` to be 'loss' or 'error', but got 'accuracy'"):
        comparison().kendall("accuracy")


def test_a_score_that_a_model_lacks_has_no_tau() -> None:
    rows = [
        ModelScores(str(i), sensitivity=float(i), entropy=float(i) if i else math.nan, loss=float(i)) for i in range(5)
    ]
    assert list(Comparison(rows).kendall()) == ["sensitivity"]


def test_a_failed_model_is_left_out_of_kendall() -> None:
    rows = [ModelScores(str(i), sensitivity=float(i), loss=float(i)) for i in range(5)]
    assert Comparison([*rows, ModelScores("failed", note="failed: x")]).kendall()["sensitivity"].tau == 1


def test_the_table_shows_what_there_is() -> None:
    rows = [
        ModelScores("conv", 0.0123456, 0.0004, entropy=1.0, num_parameters=123456, loss=0.5, error=0.25),
        ModelScores("fc", 0.0124, 0.0004, entropy=0.5, num_parameters=2e10, loss=0.75, error=0.3),
        ModelScores("broken", note="failed: RuntimeError:\n  a long story " + "that goes on " * 20),
    ]
    lines = str(Comparison(rows)).splitlines()
    assert lines[0].split("  ")[-1] == "note"
    header = " ".join(lines[0].split())
    assert header == "model sensitivity ties with entropy parameters loss error note"
    assert " ".join(lines[1].split()) == "1 conv 0.0123 ± 0.0004 2 1 123,456 0.5 0.25"
    assert " ".join(lines[2].split()) == "2 fc 0.0124 ± 0.0004 1 0.5 2e+10 0.75 0.3"
    assert " ".join(lines[3].split()).startswith("3 broken failed: RuntimeError: a long story that")
    assert len(lines) == 4
    assert "Kendall" in str(comparison(5))
    assert repr(comparison(5)) == str(comparison(5))


def test_a_csv_file_has_all_digits(tmp_path: Path) -> None:
    result = comparison(3)
    result.to_csv(tmp_path / "folder" / "table.csv")
    with (tmp_path / "folder" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [model.name for model in result]
    assert [float(row["sensitivity"]) for row in rows] == [model.sensitivity for model in result]
    assert {row["flips"] for row in rows} == {""}
    assert rows[0].keys() == result.rows()[0].keys()
