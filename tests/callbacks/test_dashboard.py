import io
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.nn.functional import cross_entropy

from lightning_sensitivity import RiskMonitor, SensitivityMonitor
from lightning_sensitivity.callbacks.risk import _NAMES
from tests.helpers import Classifier, loader, trainer

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture
def logger(tmp_path: Path) -> TensorBoardLogger:
    return TensorBoardLogger(tmp_path, name=None, version=0)


def events(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.flush()
    accumulator = EventAccumulator(logger.log_dir)
    accumulator.Reload()
    return accumulator


def layouts(accumulator: EventAccumulator) -> list[Layout]:
    (tag,) = accumulator.PluginTagToContent("custom_scalars")
    return [Layout.FromString(event.tensor_proto.string_val[0]) for event in accumulator.Tensors(tag)]


def test_custom_scalars_put_the_loss_and_its_estimate_on_one_chart(logger: TensorBoardLogger) -> None:
    monitors = [SensitivityMonitor(), SensitivityMonitor(0.3, at=["net"], prefix="wide/"), RiskMonitor()]
    run = trainer(callbacks=monitors, logger=logger, max_epochs=1)
    run.fit(Classifier(), loader(), [loader(), loader(seed=1)])
    accumulator = events(logger)
    (layout,) = layouts(accumulator)
    tags = {tag for tag in accumulator.Tags()["scalars"] if tag.endswith("_1")}
    tags |= {f"a_{tag}" for tag in tags} | {"interval_loss", "val_sensitivity_log10_x", "val_risk"}
    charts: dict[str, set[str]] = {}
    for category in layout.category:
        for chart in category.chart:
            (pattern,) = chart.multiline.tag
            key = f"{category.title}: {chart.title}"
            charts[key] = {tag.removesuffix("/dataloader_idx_1") for tag in tags if re.search(pattern, tag)}
    assert list(charts.items()) == [
        ("Generalization (val_*): loss and loss estimate", {"val_loss", "val_loss_estimate"}),
        ("Generalization (val_*): sensitivity, log10", {"val_sensitivity_log10"}),
        ("Generalization (val_*): risk estimate and its terms", {f"val_{name}" for name in _NAMES}),
        ("Generalization (wide/*): loss and loss estimate", {"wide/loss_estimate/net"}),
        ("Generalization (wide/*): sensitivity, log10", {"wide/sensitivity_log10/net"}),
    ]


# The real page in a real browser


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """A short fit; for README's picture, the example."""
    out = tmp_path_factory.mktemp("run")
    if pytestconfig.getoption("--screenshot"):
        (example,) = (Path(__file__).parents[2] / "examples").rglob("track_generalization.py")
        subprocess.run([sys.executable, str(example), "--out", str(out)], check=True, timeout=300)
        return out
    monitors = [SensitivityMonitor(prefix="val/"), RiskMonitor(prefix="val/")]
    run = trainer(callbacks=monitors, logger=TensorBoardLogger(out, name=None), max_epochs=12)
    run.fit(Slashed(), loader(), loader(seed=1))
    run.logger.finalize("success")
    return out


class Slashed(Classifier):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", cross_entropy(self(batch[0]), batch[1]))


@pytest.fixture(scope="module")
def tensorboard_url(run_dir: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_dir), "--host", "127.0.0.1"]
    open_directly = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
    with subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True) as server:
        url = f"http://127.0.0.1:{port}/"
        try:
            for _ in range(240):
                try:
                    open_directly(url, timeout=5).close()
                    break
                except (urllib.error.URLError, ConnectionError):
                    time.sleep(0.25)
                if server.poll() is not None:
                    pytest.fail(f"tensorboard ended: {server.stderr.read()}")
            else:
                pytest.fail("tensorboard did not answer in a minute")
            yield url
        finally:
            server.terminate()


@pytest.fixture
def page(tmp_path: Path) -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (Debian: apt-get install chromium)")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=[*flags.split(), "--disable-component-update", "--disable-sync"]
        )
        yield browser.new_page(viewport={"width": 1560, "height": 2000})
        browser.close()


def curve_pixels(chart: Any) -> int:
    """Dark pixels that a chart's canvas adds to its grid and markers."""
    read = pytest.importorskip("matplotlib.image").imread
    dark = []
    for visibility in ("visible", "hidden"):
        chart.evaluate("(e, v) => e.querySelectorAll('canvas').forEach(c => c.style.visibility = v)", visibility)
        image = read(io.BytesIO(chart.screenshot()), format="png")
        dark.append(int((torch.tensor(image[..., :3]).mean(-1) < 0.5).sum()))
    chart.evaluate("e => e.querySelectorAll('canvas').forEach(c => c.style.visibility = 'visible')")
    return dark[0] - dark[1]


@pytest.mark.browser
def test_tensorboard_draws_loss_and_sensitivity(
    tensorboard_url: str, page: Any, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    options = "darkMode=false&smoothing=0&tagFilter="
    page.goto(f"{tensorboard_url}?{options}val%2F#timeseries")
    drawn = {}
    for name in ("loss", "loss_estimate", *_NAMES, "sensitivity", "sensitivity_log10", "sensitivity_stderr"):
        card = page.locator("scalar-card").filter(has=page.get_by_text(f"/{name}", exact=True))
        card.wait_for(timeout=60_000)
        chart = card.locator(".series-view").first
        chart.scroll_into_view_if_needed()
        for _ in range(100):  # the curve comes after the axes
            drawn[name] = curve_pixels(chart)
            if drawn[name] > 100:
                break
            time.sleep(0.1)
    assert min(drawn.values()) > 100, drawn
    # What README shows: the loss, which needs labels, beside what needs none.
    page.set_viewport_size({"width": 1560, "height": 620})
    page.goto(f"{tensorboard_url}?{options}val%2F(loss%7Crisk_estimate%7Csensitivity)%24#timeseries")
    page.get_by_text("3 cards").wait_for(timeout=60_000)
    page.get_by_role("button", name="Settings").click()  # closes the pane
    page.wait_for_timeout(2000)
    picture = pytestconfig.getoption("--screenshot") or tmp_path / "tensorboard.png"
    page.screenshot(path=picture)
    assert picture.stat().st_size > 10_000


@pytest.mark.browser
def test_tensorboard_draws_the_custom_scalars(tensorboard_url: str, page: Any) -> None:
    page.goto(f"{tensorboard_url}#custom_scalars")
    page.get_by_text("Generalization (val/*)").wait_for(timeout=60_000)
    for title, curves in (("risk estimate and its terms", 4), ("loss and loss estimate", 2), ("sensitivity, log10", 1)):
        page.get_by_text(title, exact=True).wait_for(timeout=60_000)
        page.get_by_text(f"Matches ({curves})").first.wait_for(timeout=60_000)
