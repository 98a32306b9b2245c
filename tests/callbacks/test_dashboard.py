import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.callbacks.test_loggers import events
from tests.helpers import Classifier, fitted, loader

TERMS = ("claim", "overconfidence", "memorization", "variance")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_custom_scalars_begin_with_the_estimate_and_the_loss(tmp_path: Path) -> None:
    monitors = [SensitivityMonitor(), SensitivityMonitor(0.3, prefix="wide/"), RiskMonitor()]
    logger = TensorBoardLogger(tmp_path, name=None, version="")
    fitted(monitors, Classifier(), val=[loader(), loader(seed=1)], logger=logger, max_epochs=1)
    logger.experiment.flush()
    read = events(tmp_path)
    (tag,) = read.PluginTagToContent("custom_scalars")
    (event,) = read.Tensors(tag)
    tags = {tag for tag in read.Tags()["scalars"] if tag.endswith("_1")}
    tags |= {f"a_{tag}" for tag in tags} | {"interval_loss", "val_output_sensitivity_x", "val_risk"}
    charts: dict[str, set[str]] = {}
    for category in Layout.FromString(event.tensor_proto.string_val[0]).category:
        for chart in category.chart:
            patterns = "|".join(chart.multiline.tag)
            matches = {tag.removesuffix("/dataloader_idx_1") for tag in tags if re.search(patterns, tag)}
            charts[f"{category.title}: {chart.title}"] = matches
    assert list(charts.items()) == [
        ("Generalization (val_*): risk estimate and loss", {"val_risk_estimate", "val_loss"}),
        ("Generalization (val_*): output sensitivity", {"val_output_sensitivity"}),
        *((f"Generalization (val_*): risk {name}", {f"val_risk_{name}"}) for name in TERMS),
        ("Generalization (wide/*): loss", set()),
        ("Generalization (wide/*): output sensitivity", {"wide/output_sensitivity"}),
    ]


@pytest.fixture
def tensorboard_url(tmp_path: Path) -> Iterator[str]:
    """TensorBoard of a short fit, or of what $LOGDIR holds, in a process of its own."""
    if not (logs := os.environ.get("LOGDIR", "")):
        monitors = [SensitivityMonitor(prefix="val/"), RiskMonitor(prefix="val/")]
        logger = TensorBoardLogger(logs := tmp_path, name=None)
        fitted(monitors, Classifier(), val=loader(seed=1), logger=logger, max_epochs=5)
        logger.finalize("success")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", logs, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = [""]
            while not (url := re.search(r" at (http://\S+)", said[-1])):
                said.append(server.stderr.readline())
                assert said[-1], f"tensorboard ended: {said}"
            yield url[1]
        finally:
            server.terminate()


@pytest.fixture
def page() -> Iterator[Any]:
    """The real page in a real browser."""
    playwright = pytest.importorskip("playwright.sync_api")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_tensorboard_draws_the_custom_scalars(tensorboard_url: str, page: Any, tmp_path: Path) -> None:
    page.goto(f"{tensorboard_url}#custom_scalars", wait_until="commit", timeout=60_000)
    page.get_by_text("Generalization (val/*)").wait_for(timeout=60_000)
    titles = ["risk estimate and loss", "output sensitivity", *(f"risk {name}" for name in TERMS)]
    for title in titles:
        page.get_by_text(title, exact=True).wait_for(timeout=60_000)
    assert page.locator("tf-custom-scalar-multi-line-chart-card .name").all_inner_texts() == titles
    page.get_by_text("Matches (1)").nth(len(TERMS)).wait_for(timeout=60_000)  # of sensitivity, too
    page.screenshot(path=tmp_path / "tensorboard.png")  # the one of examples/studies/reading_curves, with --basetemp
