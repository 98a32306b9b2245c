import subprocess
import sys
from pathlib import Path

import numpy as np

SCRIPT = Path(__file__).parents[1] / "examples" / "reproduce_paper_fc.py"


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
