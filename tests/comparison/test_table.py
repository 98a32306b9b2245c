import csv
import math
import sys
from pathlib import Path

import matplotlib
import pytest
import torch
from scipy.stats import kendalltau
from torch import Tensor

from lightning_sensitivity.comparison import Comparison, ModelScores

matplotlib.use("Agg")


def comparison(num_models: int = 8, labelled: bool = True, seed: int = 0) -> Comparison:
    values = torch.rand(num_models, 4, generator=torch.Generator().manual_seed(seed)).tolist()
    truths = [(loss, round(error, 1)) if labelled else (math.nan, math.nan) for _, _, loss, error in values]
    return Comparison(
        [
            ModelScores(f"model {i}", s, 0.01, entropy=entropy, num_parameters=1234 + i, loss=loss, error=error)
            for i, ((s, entropy, _, _), (loss, error)) in enumerate(zip(values, truths, strict=True))
        ]
    )


def pair(first: Tensor, second: Tensor) -> Comparison:
    rows = [ModelScores(name, sensitivity=float(values.mean())) for name, values in (("a", first), ("b", second))]
    return Comparison(rows, {"a": {"sensitivity": first}, "b": {"sensitivity": second}})


def test_models_are_in_the_order_of_sensitivity_and_failures_come_last() -> None:
    rows = [ModelScores("failed", note="failed: why"), ModelScores("b", 2.0), ModelScores("a", 1.0)]
    result = Comparison(rows)
    assert [model.name for model in result] == ["a", "b", "failed"]
    assert (len(result), result["b"].sensitivity) == (3, 2)
    with pytest.raises(KeyError, match="'c'"):
        result["c"]


# Pairs


def test_a_difference_has_the_error_of_its_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(100, generator=generator).double()
    own = 0.1 * torch.randn(100, generator=generator).double()
    value, stderr = pair(common, common + own + 0.05).difference("b", "a")
    assert value == pytest.approx((own + 0.05).mean().item())
    assert stderr == pytest.approx((own.std() / 10).item())


@pytest.mark.parametrize(
    ("sign", "shift", "tied"),
    [(1, 0.01, False), (1, 1e-9, True), (-1, 0.01, True), (-1, 0.41, False)],  # 1.96 · 0.201 = 0.39
)
def test_ties_are_pairs_whose_interval_holds_zero(sign: int, shift: float, tied: bool) -> None:
    noise = torch.tensor([1.0, -1.0] * 50).double()
    ties = pair(1 + noise, 1 + sign * noise + shift).ties()
    assert ties == ({"a": ["b"], "b": ["a"]} if tied else {"a": [], "b": []})


def test_without_samples_the_errors_of_both_add_up() -> None:
    result = Comparison([ModelScores("a", 1.0, 0.3), ModelScores("b", 2.0, 0.4), ModelScores("c", note="failed: x")])
    assert result.difference("a", "b") == (-1, 0.5)
    assert result.ties() == {"a": [], "b": []}
    assert math.isnan(result.difference("a", "b", "entropy")[1])
    assert result.ties("entropy") == {}


# Rank correlations


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
    for seed in range(10):
        loss, noise = torch.randn(2, 30, generator=torch.Generator().manual_seed(seed))
        score = 0.7 * loss + math.sqrt(1 - 0.7**2) * noise
        rows = [ModelScores(str(i), float(s), loss=float(x)) for i, (s, x) in enumerate(zip(score, loss, strict=True))]
        tau = Comparison(rows).kendall()["sensitivity"]
        covered += tau.low <= 2 / math.pi * math.asin(0.7) <= tau.high
    assert covered >= 8


def test_few_models_have_no_interval_and_two_have_no_tau() -> None:
    assert math.isnan(comparison(5).kendall()["sensitivity"].low)
    assert math.isfinite(comparison(6).kendall()["sensitivity"].low)
    assert comparison(2).kendall() == {}
    assert comparison(8, labelled=False).kendall() == {}
    with pytest.raises(ValueError, match="Expected `truth` to be 'loss' or 'error', but got 'accuracy'"):
        comparison().kendall("accuracy")


def test_scores_that_a_model_lacks_or_that_are_the_same_have_no_tau() -> None:
    rows = [ModelScores(str(i), float(i), entropy=1.0, flips=i or math.nan, loss=float(i)) for i in range(8)]
    (name, tau), *others = Comparison([*rows, ModelScores("failed", note="failed: x")]).kendall().items()
    assert (name, tau.tau, others) == ("sensitivity", 1, [])
    assert math.isnan(tau.low)  # all resamples agree


# Table and picture


def test_the_table_shows_what_there_is() -> None:
    rows = [
        ModelScores("conv", 0.0123456, 0.0004, variance=9, entropy=1.0, num_parameters=9, loss=0.5, error=0.25),
        ModelScores("fc", 0.0124, 0.0004, entropy=0.5, consensus_loss=0.25, loss=0.75, error=0.3),
        ModelScores("broken", note="failed: RuntimeError:\n  a long story " + "that goes on " * 20),
    ]
    lines = str(Comparison(rows)).splitlines()
    assert lines[:5] == [
        "                                        consensus",
        "  model        sensitivity ties entropy      loss loss error",
        "1 conv     0.0123 ± 0.0004    2       1            0.5  0.25",
        "2 fc       0.0124 ± 0.0004    1     0.5      0.25 0.75   0.3",
        "3 broken *",
    ]
    assert " ".join(lines[8:]).startswith("* broken: failed: RuntimeError:   a long story that")
    assert max(map(len, lines)) <= 100
    assert repr(comparison(5)) == str(comparison(5))


def test_kendalls_tau_is_printed_for_all_scores() -> None:
    lines = str(comparison(6)).splitlines()
    assert lines[10].split() == ["Kendall's", "τ", "with", "loss", "error"]
    assert [line.split("  ")[0] for line in lines[11:]] == ["sensitivity", "entropy", "parameters"]
    assert "[" in lines[11] and "[" not in str(comparison(5))


def test_a_csv_file_has_all_digits(tmp_path: Path) -> None:
    result = comparison(3)
    result.to_csv(tmp_path / "folder" / "table.csv")
    with (tmp_path / "folder" / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [model.name for model in result]
    assert [float(row["sensitivity"]) for row in rows] == [model.sensitivity for model in result]
    assert {row["flips"] for row in rows} == {""}
    assert rows[0].keys() == result.rows()[0].keys()


ROWS = [
    ModelScores("small", sensitivity=0.01, sensitivity_stderr=0.001, loss_estimate=0.2, loss=0.5),
    ModelScores(r"_large $\foo$", sensitivity=1.0, sensitivity_stderr=2.0, loss_estimate=2.0, loss=3.0),
    ModelScores("failed", note="failed: why"),
]


def test_the_loss_against_sensitivity() -> None:
    figure, axes = Comparison(ROWS).plot()
    figure.canvas.draw()  # names are no mathematics
    assert axes.figure is figure
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [text.get_text() for text in axes.texts] == ["small", r"_large $\foo$"]
    (line,) = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    assert line.get_xydata().tolist() == [[0.01, 0.2], [1, 2]]


def test_sensitivity_alone_where_there_is_no_label() -> None:
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots()
    rows = [ModelScores(row.name, row.sensitivity, row.sensitivity_stderr) for row in ROWS]
    assert Comparison(rows).plot(ax) == (figure, ax)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["small", r"_large $\foo$"]
    assert ax.get_xscale() == "log"


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="A plot needs matplotlib: `pip install matplotlib`"):
        Comparison(ROWS).plot()
