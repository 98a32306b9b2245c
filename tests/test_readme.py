import re
from pathlib import Path

import pytest
import torch

import lightning_sensitivity
from tests.helpers import Classifier, loader, trainer, unlabelled_loader

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted(ROOT.glob("examples/*/README.md"))]


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists")
def test_the_code_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) == 3
    names = {name: Classifier() for name in ("model", "fc", "cnn")} | {"ResNet": Classifier}
    names |= {"train_loader": loader(), "unlabelled_val_loader": unlabelled_loader()}
    own = trainer(max_epochs=1)
    own.fit(Classifier(), loader(), loader())
    own.save_checkpoint(tmp_path / "runs" / "resnet.ckpt")
    for block in blocks:
        exec(block, names)
    assert {"val_sensitivity", "val_risk_estimate"} <= names["trainer"].callback_metrics.keys()
    assert list(tmp_path.glob("lightning_logs/version_*/checkpoints/epoch=*-val_risk_estimate=*.ckpt"))
    assert (tmp_path / "comparison.csv").exists()
    assert isinstance(names["metric"].compute(), torch.Tensor)


def test_the_test_command_is_what_ci_runs() -> None:
    commands = re.findall(r"```sh\n(python3 .*?)\n```", README)
    assert len(commands) == 2
    ci = (ROOT / ".ci" / "run").read_text()
    assert all(part in ci.splitlines() for part in commands[1].rsplit(" && ", 1))


def test_readme_is_short() -> None:
    assert len(re.sub(r"```.*?```", "", README, flags=re.DOTALL).split()) <= 1200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(r"python (examples/[\w./]+\.py)", text):
        assert (ROOT / path).exists(), path


def test_the_tests_that_are_named_exist() -> None:
    named = re.findall(r"`(\w+(?:/\w+)*\.py)::(test_\w+)`", (ROOT / "tests" / "README.md").read_text())
    assert len(named) >= 20
    for path, function in named:
        assert f"def {function}(" in (ROOT / "tests" / path).read_text(), (path, function)


def test_public_names_resolve() -> None:
    assert all(hasattr(lightning_sensitivity, name) for name in lightning_sensitivity.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lightning_sensitivity.nothing  # noqa: B018
