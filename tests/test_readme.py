import inspect
import re
from pathlib import Path

import pytest

import lightning_sensitivity
from lightning_sensitivity import SensitivityMonitor
from tests.helpers import Classifier, loader, unlabelled_loader
from tests.test_comparison import save
from tests.test_models import BATCHES, OUTPUTS
from tests.test_setups import SETUPS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*was lowest at validation")
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty")
def test_the_code_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    names = {
        "model": Classifier(),
        "train_loader": loader(),
        "unlabelled_val_loader": unlabelled_loader(),
        "fc": Classifier(),
        "cnn": Classifier(),
        "ResNet": Classifier,
    }
    (tmp_path / "runs").mkdir()
    save(Classifier(), tmp_path / "runs" / "resnet.ckpt")
    for block in blocks:
        exec(block, names)
    assert {"val_sensitivity", "val_risk_estimate"} <= names["trainer"].callback_metrics.keys()
    assert list(tmp_path.glob("lightning_logs/version_*/checkpoints/epoch=*-val_risk_estimate=*.ckpt"))


def test_the_table_of_options_is_that_of_the_constructor() -> None:
    table = README[README.index("## Options") : README.index("Left alone")]
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    documented = {}
    for names, defaults in rows:
        documented |= zip(re.findall("`(.*?)`", names), re.findall("`(.*?)`", defaults), strict=True)
    parameters = inspect.signature(SensitivityMonitor).parameters
    assert documented == {
        name: str(p.default).join('""' if isinstance(p.default, str) else ("", "")) for name, p in parameters.items()
    }


def test_the_test_command_is_what_ci_runs() -> None:
    commands = re.findall(r"```sh\n(python3 .*?)\n```", README)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_files_that_are_named_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"python (examples/[\w.]+)", README):
        assert (ROOT / path).exists(), path


def test_public_names_resolve() -> None:
    assert all(hasattr(lightning_sensitivity, name) for name in lightning_sensitivity.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        lightning_sensitivity.nothing  # noqa: B018


def test_the_tests_that_are_named_exist() -> None:
    named = re.findall(r"\[(test_\w+)\]\((tests/test_\w+\.py)\)`::(test_\w+)`", README)
    assert len(named) >= 15
    for name, path, function in named:
        assert path == f"tests/{name}.py"
        assert f"\ndef {function}(" in (ROOT / path).read_text(), function


def test_the_numbers_of_combinations_are_those_of_the_tests() -> None:
    assert f"{len(SETUPS)} set-ups" in README
    assert f"{len(BATCHES)} kinds of batches" in README
    assert f"{len(OUTPUTS)} kinds of outputs" in README
    assert f"all {len(BATCHES) * len(OUTPUTS)}" in README
