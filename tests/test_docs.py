"""All pages: their code runs, what they name exists, and the API is complete."""

import ast
import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml

import lightning_sensitivity
from tests.helpers import Classifier, fitted, loader, unlabelled_loader

ROOT = Path(__file__).parents[1]
DOCS, README, TESTS = ROOT / "docs", ROOT / "README.md", ROOT / "tests" / "README.md"
PAGES = [README, TESTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("examples/**/README.md"))]
PAGES += sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
GUIDE = sorted((DOCS / "guide").glob("*.md"))
API = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
SOURCES = sorted(Path(lightning_sensitivity.__file__).parent.rglob("*.py"))
PUBLIC_MODULES = ("lightning_sensitivity", "lightning_sensitivity.functional")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def public_objects() -> list[tuple[str, Any]]:
    """All public classes and functions, with their names."""
    modules = [importlib.import_module(name) for name in PUBLIC_MODULES]
    found = {name: getattr(module, name) for module in modules for name in module.__all__}
    return sorted((name, thing) for name, thing in found.items() if name != "__version__")


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists", "ignore:.*survives averaging over classes")
def test_the_code_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page", "ResNet": Classifier, "train_loader": loader()}
    names |= {name: Classifier() for name in ("model", "fc", "cnn")}
    names["self"] = MagicMock(side_effect=Classifier())  # a module, of which a page shows single lines
    names |= {"val_loader": loader(seed=1), "other_val_loader": loader(seed=2)}
    names["unlabelled_val_loader"] = unlabelled_loader()
    names["x"], names["y"] = torch.rand(200, 12), torch.arange(200) % 4
    fitted([], Classifier(), max_epochs=1).save_checkpoint(tmp_path / "runs" / "resnet.ckpt")
    for block in python_blocks(page):
        exec(compile(block, name_of(page), "exec"), names)
    if page == README:
        assert "val/risk_criterion" in names["trainer"].callback_metrics
        assert Path(names["checkpoint"].best_model_path).is_file()


def test_the_configuration_file_of_the_guide_makes_its_callbacks(tmp_path: Path, monkeypatch: Any) -> None:
    cli = pytest.importorskip("lightning.pytorch.cli")
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "guide" / "project.md").read_text(), re.DOTALL | re.MULTILINE)
    path = tmp_path / "config.yaml"
    path.write_text(blocks[0] + "\n  logger: false\n")
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", str(path)])
    made = cli.LightningCLI(Classifier, run=False)
    names = [type(callback).__name__ for callback in made.trainer.callbacks]
    wanted = [entry["class_path"].rsplit(".", 1)[-1] for entry in yaml.safe_load(blocks[0])["trainer"]["callbacks"]]
    assert [name for name in wanted if name not in names] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    scripts = [ROOT / path for path in re.findall(r"python (examples/[\w./]+\.py)", text)]
    assert [path for path in [*(page.parent / link for link in links), *scripts] if not path.exists()] == []
    assert re.findall(r"@\w+@|TODO", text) == []
    tests = re.findall(r"`(\w+(?:/\w+)*\.py)::(test_\w+)`", text)
    assert [name for path, name in tests if f"def {name}(" not in (page.parent / path).read_text()] == []
    assert bool(tests) == (page == TESTS)


def test_the_test_command_is_what_ci_runs() -> None:
    (command,) = re.findall(r"```sh\n(python3 .*? -m pytest .*?)\n```", README.read_text())
    install, tests = command.rsplit(" && ", 1)
    lines = (ROOT / ".ci" / "test").read_text().splitlines()
    assert install.replace("pip install", "pip install -q") in lines and tests == lines[-1]


@pytest.mark.parametrize("page", [README, *(page for page in PAGES if DOCS in page.parents)], ids=name_of)
def test_the_code_of_a_page_is_not_cut_off(page: Path) -> None:
    text = re.sub(r"^python3 -m venv .*\n", "", page.read_text(), flags=re.MULTILINE)  # one command to copy
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []


def entries() -> dict[str, list[str]]:
    """The entries of the page on troubleshooting, as Sphinx names them, with the parts of messages that they quote."""
    parts = re.split(r"^### (.*)\n", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)[1:]
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        quoted = " ".join(re.findall(r"^> (.*)$", text, re.MULTILINE))
        found[re.sub("[ _]", "-", heading.lower())] = [quote for quote in map(str.strip, quoted.split("·")) if quote]
    return found


def test_every_message_that_names_an_entry_finds_it() -> None:
    sources = "\n".join(path.read_text() for path in SOURCES)
    named = re.findall(r"(?:link_to\(|\.warn\(\s*|messages\[|entry ?= ?)['\"]([\w-]+)['\"]", sources)
    assert len(named) > 20 and {*named} - entries().keys() == set()


def test_what_an_entry_quotes_is_in_the_package_and_in_no_other_entry() -> None:
    nodes = (node for path in SOURCES for node in ast.walk(ast.parse(path.read_text())))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    quotes = [quote.removeprefix("should be ") for quotes in entries().values() for quote in quotes]
    assert [quote for quote in quotes if not any(quote in text for text in texts)] == []
    assert sorted(quotes) == sorted({*quotes})


def test_every_page_of_the_guide_is_in_the_table_of_contents() -> None:
    contents = (DOCS / "index.md").read_text().splitlines()
    assert [page.stem for page in GUIDE if f"guide/{page.stem}" not in contents] == []


def test_every_public_name_is_in_the_api() -> None:
    in_api = re.findall(r"auto\w+:: (?:\S+\.)?(\w+)$", API, re.MULTILINE)
    assert {name for name, _ in public_objects()} - {*in_api} == set()


@pytest.mark.parametrize(("name", "thing"), public_objects())
def test_every_argument_of_a_public_name_is_explained(name: str, thing: Any) -> None:
    documentation = inspect.getdoc(thing) or ""
    section = "Attributes" if issubclass(type(thing), type) and issubclass(thing, tuple) else "Args"
    explained = re.findall(r"^ {4}\*{0,2}(\w+):", documentation.partition(f"{section}:\n")[2], re.MULTILINE)
    assert [argument for argument in inspect.signature(thing).parameters if argument not in explained] == []
    if section == "Args":
        assert "Example:" in documentation


def test_the_version_is_in_the_changelog() -> None:
    assert f"## [{lightning_sensitivity.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
