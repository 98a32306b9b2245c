import pandas
import pytest
import torch

from lightning_sensitivity.comparison import Comparison, ModelScores

ROWS = [ModelScores("conv", 0.0124, 0.0004), ModelScores("fc", 0.0123456, note="failed: " * 20), ModelScores("no")]


def of_four() -> Comparison:
    """By consensus_error a, b, c and d; a ties with b in it, c with d in sensitivity."""
    errors = torch.tensor([[0.1, 0.3], [0.2, 0.21], [0.4, 0.42], [0.6, 0.62]])
    changes = torch.tensor([[4.0, 4.1], [3.0, 3.1], [1.0, 2.0], [2.0, 1.0]])
    by_sample = {
        name: {"consensus_error": error, "sensitivity": change}
        for name, error, change in zip("abcd", errors, changes, strict=True)
    }
    rows = [
        ModelScores(name, sensitivity=float(scores["sensitivity"].mean()), consensus_error=float(error.mean()))
        for (name, scores), error in zip(by_sample.items(), errors, strict=True)
    ]
    return Comparison(rows[::-1], by_sample)


def test_the_table_shows_what_there_is() -> None:
    lines = str(Comparison(ROWS)).splitlines()
    table = "model sensitivity", "fc * 0.0123", "conv 0.0124 ± 0.0004", "no"
    assert tuple(" ".join(line.split()) for line in lines[:4]) == table
    assert "* fc: failed: failed" in "".join(lines) and max(map(len, lines)) <= 100
    assert pandas.DataFrame(Comparison(ROWS)).loc[0, "sensitivity"] == 0.0123456


def test_models_are_found_by_name_and_places_are_those_of_models() -> None:
    result = Comparison(ROWS)
    assert [model.name for model in result.models[:2]] == ["fc", "conv"] and result["conv"] is ROWS[0]
    for key in (0, slice(1), "other"):
        with pytest.raises(KeyError, match=r"'fc', 'conv', 'no'.*`\.models`"):
            result[key]  # type: ignore[index]


def test_ties_are_about_the_column_that_sorts_and_the_table_says_which() -> None:
    result = of_four()
    assert [model.name for model in result] == ["a", "b", "c", "d"]
    assert result.ties() == {"a": ["b"], "b": ["a"], "c": [], "d": []}
    assert result.ties("sensitivity") == {"a": [], "b": [], "c": ["d"], "d": ["c"]}
    assert result.difference("d", "c")[0] == pytest.approx(0.2)
    text = " ".join(str(result).split())
    assert "Sorted by consensus_error" in text
    assert "`ties with` names models whose consensus_error could be the same" in text
