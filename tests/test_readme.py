import ast
import re
from pathlib import Path

import pytest
import torch

from tests.helpers import Classifier, loader, trainer, unlabelled_loader

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests" / "README.md"]
PAGES += sorted(ROOT.glob("examples/**/README.md"))

# Terms that the glossary has others for, and words that readers stumbled over.
STUMBLES = (
    r"(?:right|wrong) labels|labels as wrong|mislabelled|people's labels|foretell"
    r"|in the mean\b|hangs? on|but for\b|mind that|is warned of|\bof which\b|\balone\b(?!:)|\bgoes on\b|\bamid\b"
)


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists")
def test_the_code_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {name: Classifier() for name in ("model", "fc", "cnn")} | {"ResNet": Classifier}
    names |= {"train_loader": loader(), "unlabelled_val_loader": unlabelled_loader()}
    run = trainer(max_epochs=1)
    run.fit(Classifier(), loader(), loader())
    run.save_checkpoint(tmp_path / "runs" / "resnet.ckpt")
    for block in blocks:
        exec(block, names)
    assert any(name.endswith("risk_estimate") for name in names["trainer"].callback_metrics)
    assert Path(names["checkpoint"].best_model_path).is_file()


def test_the_test_command_is_what_ci_runs() -> None:
    commands = re.findall(r"```sh\n(python3 .*?)\n```", README)
    install, tests = commands[1].rsplit(" && ", 1)
    lines = (ROOT / ".ci" / "test").read_text().splitlines()
    assert install.replace("pip install", "pip install -q") in lines and tests == lines[-1]


def test_readme_is_short() -> None:
    assert len(re.sub(r"```.*?```|<!--.*?-->", "", README, flags=re.DOTALL).split()) <= 900


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / path for path in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)]
    scripts = [ROOT / path for path in re.findall(r"python (examples/[\w./]+\.py)", text)]
    assert [path for path in links + scripts if not path.exists()] == []
    assert re.findall(r"@\w+@|TODO(?!-NUMBERS)", text) == []
    tests = re.findall(r"`(\w+(?:/\w+)*\.py)::(test_\w+)`", text)
    assert [name for path, name in tests if f"def {name}(" not in (page.parent / path).read_text()] == []
    assert bool(tests) == (page.parent.name == "tests")


def texts(source: Path) -> str:
    """The docstrings and messages of a module."""
    strings = [node.value for node in ast.walk(ast.parse(source.read_text())) if isinstance(node, ast.Constant)]
    return "\n".join(text for text in strings if isinstance(text, str))


def test_nothing_has_terms_that_readers_stumbled_over() -> None:
    pages = [*PAGES, *sorted((ROOT / "docs").rglob("*.md")), ROOT / "CHANGELOG.md"]
    named = [(page.name, page.read_text()) for page in pages]
    named += [(source.name, texts(source)) for source in sorted((ROOT / "lightning_sensitivity").rglob("*.py"))]
    found = [(name, match) for name, text in named for match in re.findall(STUMBLES, text, re.IGNORECASE)]
    assert found == []
