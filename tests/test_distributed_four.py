"""Four gloo processes, started once, run the scenarios of two that numbers of processes matter to."""

from typing import Any

import pytest

from tests.test_distributed import (
    EVEN,
    check_early_stopping,
    check_even,
    check_exchange,
    check_uneven,
    results_of,
)

SCENARIOS = ["even", "uneven", "early_stopping_on_the_risk", "few_training_samples"]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    return results_of(tmp_path_factory.mktemp("distributed_four"), 4, SCENARIOS)


@pytest.mark.parametrize("name", EVEN)
def test_on_even_data_all_that_is_logged_is_what_one_process_logs(four: dict[str, list[Any]], name: str) -> None:
    check_even(four["even"], name)


def test_on_uneven_data_samples_count_as_often_as_they_are_dealt_out(four: dict[str, list[Any]]) -> None:
    check_uneven(four["uneven"])


def test_early_stopping_on_the_risk_stops_all_at_the_same_epoch(four: dict[str, list[Any]]) -> None:
    check_early_stopping(four["early_stopping_on_the_risk"])


@pytest.mark.parametrize("name", SCENARIOS)
def test_all_enter_the_same_collectives(four: dict[str, list[Any]], name: str) -> None:
    calls = [collectives[name] for collectives in four["collectives"]]
    assert calls == [calls[0]] * 4


def test_the_number_of_collectives_is_that_of_two(four: dict[str, list[Any]]) -> None:
    check_exchange(four["collectives"][0]["few_training_samples"])
