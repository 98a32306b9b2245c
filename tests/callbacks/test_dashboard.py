import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.risk import _NAMES
from tests.helpers import Classifier, loader, trainer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def test_custom_scalars_put_the_loss_and_its_estimate_on_one_chart(tmp_path: Path) -> None:
    monitors = [SensitivityMonitor(), SensitivityMonitor(0.3, at=["net"], prefix="wide/"), RiskMonitor()]
    run = trainer(callbacks=monitors, logger=TensorBoardLogger(tmp_path, name=None, version=0), max_epochs=1)
    run.fit(Classifier(), loader(), [loader(), loader(seed=1)])
    run.logger.experiment.flush()
    accumulator = EventAccumulator(run.logger.log_dir)
    accumulator.Reload()
    (tag,) = accumulator.PluginTagToContent("custom_scalars")
    (event,) = accumulator.Tensors(tag)
    tags = {tag for tag in accumulator.Tags()["scalars"] if tag.endswith("_1")}
    tags |= {f"a_{tag}" for tag in tags} | {"interval_loss", "val_sensitivity_log10_x", "val_risk"}
    charts: dict[str, set[str]] = {}
    for category in Layout.FromString(event.tensor_proto.string_val[0]).category:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            found = {tag.removesuffix("/dataloader_idx_1") for tag in tags if re.search(pattern, tag)}
            charts[f"{category.title}: {chart.title}"] = found
    assert list(charts.items()) == [
        ("Generalization (val_*): loss and loss estimate", {"val_loss", "val_loss_estimate"}),
        ("Generalization (val_*): sensitivity, log10", {"val_sensitivity_log10"}),
        ("Generalization (val_*): risk estimate and its terms", {f"val_{name}" for name in _NAMES}),
        ("Generalization (wide/*): loss and loss estimate", {"wide/loss_estimate/net"}),
        ("Generalization (wide/*): sensitivity, log10", {"wide/sensitivity_log10/net"}),
    ]


# The real page in a real browser


@pytest.fixture
def tensorboard_url(tmp_path: Path) -> Iterator[str]:
    """TensorBoard of a short fit."""
    run = trainer(callbacks=[SensitivityMonitor(), RiskMonitor()], logger=TensorBoardLogger(tmp_path, name=None))
    run.fit(Classifier(), loader(), loader(seed=1))
    run.logger.finalize("success")
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", tmp_path, "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            said = [""]
            while not (found := re.search(r" at (http://\S+)", said[-1])):
                said.append(server.stderr.readline())
                assert said[-1], f"tensorboard ended: {said}"
            yield found[1]
        finally:
            server.terminate()


@pytest.fixture
def page() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags.split())
        yield browser.new_page(viewport={"width": 1560, "height": 2000})
        browser.close()


@pytest.mark.browser
def test_tensorboard_draws_the_custom_scalars(tensorboard_url: str, page: Any) -> None:
    page.goto(f"{tensorboard_url}#custom_scalars")
    page.get_by_text("Generalization (val_*)").wait_for(timeout=60_000)
    for title, curves in (("risk estimate and its terms", 4), ("loss and loss estimate", 2), ("sensitivity, log10", 1)):
        page.get_by_text(title, exact=True).wait_for(timeout=60_000)
        page.get_by_text(f"Matches ({curves})").first.wait_for(timeout=60_000)
