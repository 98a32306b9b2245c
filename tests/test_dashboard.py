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

from lightning_sensitivity import SensitivityMonitor
from lightning_sensitivity.dashboard import custom_scalars_layout
from lightning_sensitivity.readings import RISK
from tests.helpers import Classifier, brute_force, inputs, loader, trainer

EXAMPLE = Path(__file__).parents[1] / "examples" / "track_generalization.py"
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


def test_events_have_the_tags_steps_and_values(logger: TensorBoardLogger) -> None:
    model = Classifier()
    fit = trainer(callbacks=[SensitivityMonitor(before_training=True)], logger=logger, max_epochs=3)
    fit.fit(model, loader(), loader(seed=1))
    accumulator = events(logger)
    losses = accumulator.Scalars("val_loss")
    for name in ("sensitivity", "sensitivity_stderr", "sensitivity_log10", "loss_estimate"):
        first, *others = accumulator.Scalars(f"val_{name}")
        assert first.step == 0
        assert [event.step for event in others] == [event.step for event in losses] == [3, 7, 11]
    expected = brute_force(model, list(inputs(50, seed=1).split(16))).var(correction=0)
    assert accumulator.Scalars("val_sensitivity")[-1].value == pytest.approx(expected.item(), rel=1e-6)
    assert accumulator.Scalars("val_sensitivity_log10")[-1].value == pytest.approx(expected.log10().item(), rel=1e-6)


def test_custom_scalars_put_the_loss_and_its_estimate_on_one_chart(logger: TensorBoardLogger) -> None:
    monitors = [SensitivityMonitor(), SensitivityMonitor(0.3, prefix="wide/")]
    trainer(callbacks=monitors, logger=logger, max_epochs=1).fit(Classifier(), loader(), loader())
    accumulator = events(logger)
    (layout,) = layouts(accumulator)
    tags = accumulator.Tags()["scalars"]

    def matches(category: int, chart: int) -> set[str]:
        (pattern,) = layout.category[category].chart[chart].multiline.tag
        return {tag for tag in tags if re.search(pattern, tag)}

    assert [category.title for category in layout.category] == ["Generalization (val_*)", "Generalization (wide/*)"]
    for category, prefix in enumerate(("val_", "wide/")):
        assert matches(category, 0) == {prefix + name for name in RISK.values()}
        assert matches(category, 1) == {f"{prefix}loss_estimate", *(["val_loss"] if prefix == "val_" else [])}
        assert matches(category, 2) == {f"{prefix}sensitivity_log10"}


def test_custom_scalars_take_in_every_loader_and_nothing_else() -> None:
    (charts,) = custom_scalars_layout({"val_": True}).values()
    (risk,), (losses,), (sensitivity,) = (patterns for _, patterns in charts.values())
    tags = [f"val_{name}/dataloader_idx_{idx}" for name in ("loss", "loss_estimate") for idx in (0, 11)]
    assert all(re.search(losses, tag) for tag in tags)
    assert not any(re.search(losses, tag) for tag in ("train_loss", "interval_loss", "val_sensitivity"))
    assert re.search(sensitivity, "val_sensitivity_log10/dataloader_idx_3")
    assert re.search(risk, "val_risk_estimate/dataloader_idx_3") and re.search(risk, "val_risk_variance")
    assert not re.search(risk, "val_risk") and not re.search(risk, "b_val_risk_estimate")
    assert not any(
        re.search(sensitivity, tag) for tag in ("val_sensitivity", "a_val_sensitivity_log10", "val_sensitivity_log10_x")
    )


def test_without_a_risk_estimate_there_is_no_chart_of_it() -> None:
    (charts,) = custom_scalars_layout({"val_": False}).values()
    assert list(charts) == ["loss and loss estimate", "sensitivity, log10"]


# The real page in a real browser


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    out = tmp_path_factory.mktemp("run")
    shortened = [] if pytestconfig.getoption("--screenshot") else ["--max-epochs", "12"]
    command = [sys.executable, str(EXAMPLE), "--out", str(out), *shortened]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    table = result.stdout[result.stdout.index("epoch  train loss") :].splitlines()
    epochs = [int(line.split()[0]) for line in table[1:] if line[:5].strip().isdigit()]
    assert epochs == sorted(set(epochs))
    assert len(epochs) >= 11
    assert f"tensorboard --logdir {out}" in table[-1]
    return out


def test_the_example_shows_a_table_and_logs_the_untrained_network(run_dir: Path) -> None:
    accumulator = EventAccumulator(str(run_dir / "version_0"))
    accumulator.Reload()
    sensitivity = accumulator.Scalars("val/sensitivity")
    assert len(sensitivity) == len(accumulator.Scalars("val/loss")) + 1
    assert sensitivity[0].value < sensitivity[-1].value


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
    for name in ("loss", "loss_estimate", *RISK.values(), "sensitivity", "sensitivity_log10", "sensitivity_stderr"):
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
