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

from lightning_sensitivity import SensitivityMonitor
from tests.helpers import Classifier, fitted, loader, quick_risk

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DOCS = Path(__file__).parents[2] / "docs"
ADDRESS = "?smoothing=0&tagFilter=val%2F(loss%7Coutput_sensitivity%7Cexpected)#timeseries"
EXPECTED = [f"val/expected_{name}" for name in ("accuracy", "auroc", "loss")]
(LAYOUT,) = re.findall(r"^names = .*?custom_scalars\(.*?\)$", (DOCS / "guide" / "stopping.md").read_text(), re.M | re.S)
CARDS = [*EXPECTED, "val/loss", "val/output_sensitivity", "val/output_sensitivity_stderr"]


class WithGroup(Classifier):
    """A module that logs its loss with a prefix, which TensorBoard takes for a group."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss


@pytest.fixture
def tensorboard_url(tmp_path: Path) -> Iterator[str]:
    """TensorBoard of a short fit, or of what $LOGDIR holds, in a process of its own."""
    if not (logs := os.environ.get("LOGDIR", "")):
        monitors = [SensitivityMonitor(), quick_risk()]
        logger = TensorBoardLogger(logs := tmp_path, name=None)
        exec(LAYOUT, {"logger": logger})
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
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def show_all_of_the_curves(page: Any) -> None:
    """Switch the cut of outliers and the tables below the charts off, the axis of sensitivity to log, and clear up."""
    settings = page.locator("metrics-dashboard-settings")
    for name in ("Ignore outliers", "Enable step selection"):
        settings.locator("mat-checkbox").filter(has_text=name).locator("input").click()
    page.get_by_label("Toggle settings side pane").click()
    card = page.locator("metrics-filtered-view card-view").filter(has=page.get_by_title(CARDS[4], exact=True))
    card.get_by_label("More line chart options").click()
    page.get_by_role("menuitem", name="Toggle Y-axis log scale").click()


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_values_stand_beside_the_loss_at_the_address_of_the_guide_and_losses_in_one_chart(
    tensorboard_url: str, page: Any, tmp_path: Path
) -> None:
    assert f"http://localhost:6006/{ADDRESS}" in (DOCS / "getting_started.md").read_text()
    page.goto(tensorboard_url + ADDRESS, wait_until="commit")
    cards = page.locator("metrics-filtered-view card-view")
    cards.nth(5).wait_for()
    show_all_of_the_curves(page)
    assert [card.locator("tb-truncated-path").get_attribute("title") for card in cards.all()] == CARDS
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # until the curves are drawn
    # This is the picture of docs/guide, with $LOGDIR and --basetemp.
    page.screenshot(path=tmp_path / "tensorboard.png", clip={"x": 0, "y": 0, "width": 1400, "height": 840})

    page.goto(f"{tensorboard_url}#custom_scalars", wait_until="commit")  # training, expected and validation loss
    page.get_by_text("Matches (3)").wait_for()
    page.wait_for_timeout(1000)
    page.screenshot(path=tmp_path / "one_chart.png")
