"""What all tests share: threads, and a way to run an example."""

import os

# Two threads on tensors of this size only wait for each other; processes that the tests start inherit it.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.register_assert_rewrite("tests.helpers", "tests.callbacks.plain_loop", "tests.faults.subject")  # to say why

EXAMPLES = Path(__file__).parents[1] / "examples"

torch.set_num_threads(1)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, caplog: Any) -> Any:
    """Run an example, and give what it prints and its variables."""

    def run(script: str, *options: str) -> tuple[str, dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [script, *options])
        variables = runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return capsys.readouterr().out, variables

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # put back at the end, as the level of the logger is
    monkeypatch.setenv("MPLBACKEND", "agg")
    caplog.set_level("INFO", "lightning.pytorch")
    return run
