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
from torch.nn.functional import cross_entropy

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from tests.helpers import Classifier, fitted, loader

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SIDE_BY_SIDE = ["val/loss", "val/output_sensitivity", "val/risk_criterion"]


class WithGroup(Classifier):
    """A module that logs its loss with a prefix, which TensorBoard takes for a group."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]))


@pytest.fixture
def tensorboard_url(tmp_path: Path) -> Iterator[str]:
    """TensorBoard of a short fit, or of what $LOGDIR holds, in a process of its own."""
    if not (logs := os.environ.get("LOGDIR", "")):
        monitors = [SensitivityMonitor(), RiskMonitor()]
        logger = TensorBoardLogger(logs := tmp_path, name=None)
        fitted(monitors, WithGroup(), val=loader(seed=1), logger=logger, max_epochs=5, log_every_n_steps=1)
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
        page = browser.new_page(viewport={"width": 1400, "height": 4000})  # all cards: others would not be drawn
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def set_as_the_guide_says(page: Any) -> None:
    """Switch smoothing, the cut of outliers and the tables below the charts off, and close the settings."""
    settings = page.locator("metrics-dashboard-settings")
    settings.locator(".scalars-smoothing input[type=number]").fill("0")
    for name in ("Ignore outliers", "Enable step selection"):
        settings.locator("mat-checkbox").filter(has_text=name).locator("input").click()
    page.get_by_label("Toggle settings side pane").click()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_the_values_stand_beside_the_loss_on_the_page_that_opens(
    tensorboard_url: str, page: Any, tmp_path: Path
) -> None:
    page.goto(tensorboard_url, wait_until="commit")
    set_as_the_guide_says(page)
    group = page.locator("metrics-card-groups .card-group").filter(has=page.get_by_title("val", exact=True))
    group.get_by_label("Expand group").click()  # only the first two groups are open
    cards = group.locator("card-view")
    for name in SIDE_BY_SIDE:
        card = cards.filter(has=page.get_by_title(name, exact=True))
        card.get_by_label("Pin card").click()
    pinned = page.locator("metrics-pinned-view card-view")
    pinned.nth(2).wait_for()
    titles = [card.locator("tb-truncated-path").get_attribute("title") for card in pinned.all()]
    assert titles == SIDE_BY_SIDE
    assert len({card.bounding_box()["y"] for card in pinned.all()}) == 1
    page.wait_for_timeout(1000)  # until the curves are drawn
    # This is the picture of docs/guide, with $LOGDIR and --basetemp.
    page.screenshot(path=tmp_path / "tensorboard.png", clip={"x": 0, "y": 0, "width": 1400, "height": 480})
