"""The pages of the documentation: their code runs, their links exist, they are short, and the API is complete."""

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lightning_sensitivity
from lightning_sensitivity.callbacks import risk, sensitivity
from tests.helpers import Classifier, loader, unlabelled_loader

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
GUIDE = sorted((DOCS / "guide").glob("*.md"))
API = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
PUBLIC_MODULES = ("lightning_sensitivity", "lightning_sensitivity.functional")


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


def public_objects() -> list[tuple[str, Any]]:
    """All public classes and functions, with their names."""
    found = {}
    for module_name in PUBLIC_MODULES:
        module = importlib.import_module(module_name)
        for name in module.__all__:
            if name != "__version__":
                found[name] = getattr(module, name)
    return sorted(found.items())


def num_words(page: Path) -> int:
    return len(re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL).split())


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists", "ignore:.*survives averaging over classes")
def test_the_code_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {"__name__": "page", "model": Classifier(), "train_loader": loader(), "val_loader": loader(seed=1)}
    names |= {"other_val_loader": loader(seed=2), "unlabelled_val_loader": unlabelled_loader()}
    for block in python_blocks(page):
        exec(compile(block, name_of(page), "exec"), names)


def test_the_configuration_file_of_the_guide_makes_its_callbacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli = pytest.importorskip("lightning.pytorch.cli")
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "guide" / "cli.md").read_text(), re.DOTALL | re.MULTILINE)
    path = tmp_path / "config.yaml"
    path.write_text(blocks[0] + "\n  logger: false\n")
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", str(path)])
    made = cli.LightningCLI(Classifier, run=False)
    names = [type(callback).__name__ for callback in made.trainer.callbacks]
    wanted = [entry["class_path"].rsplit(".", 1)[-1] for entry in yaml.safe_load(blocks[0])["trainer"]["callbacks"]]
    assert [name for name in wanted if name not in names] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_links_to_exists(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    paths = [page.parent / path for path in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text)]
    scripts = [DOCS.parent / path for path in re.findall(r"python (examples/[\w./]+\.py)", page.read_text())]
    assert [path for path in paths + scripts if not path.exists()] == []


@pytest.mark.parametrize("page", [page for page in PAGES if "```" in page.read_text()], ids=name_of)
def test_the_code_of_a_page_is_not_cut_off(page: Path) -> None:
    blocks = re.findall(r"^```.*?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []


def test_every_message_that_names_an_entry_finds_it() -> None:
    sources = [path.read_text() for path in sorted(Path(lightning_sensitivity.__file__).parent.rglob("*.py"))]
    named = {name for source in sources for name in re.findall(r"(?:see|\.warn)\(\s*['\"]([\w-]+)['\"]", source)}
    named |= {"failed", "out-of-memory", *risk._ENTRIES.values(), *sensitivity._ENTRIES.values()}
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    entries = {re.sub("[ _]", "-", heading.lower()) for heading in headings}  # as Sphinx names them
    assert len(named) > 10 and named - entries == set()


@pytest.mark.parametrize("page", GUIDE, ids=name_of)
def test_a_page_of_the_guide_is_short(page: Path) -> None:
    assert num_words(page) <= 500


def test_every_page_of_the_guide_is_in_the_table_of_contents() -> None:
    contents = (DOCS / "index.md").read_text().splitlines()
    assert [page.stem for page in GUIDE if f"guide/{page.stem}" not in contents] == []


def test_every_public_name_is_in_the_api() -> None:
    assert [
        name for name, _ in public_objects() if not re.search(rf"auto\w+:: (\S+\.)?{name}$", API, re.MULTILINE)
    ] == []


@pytest.mark.parametrize(("name", "thing"), public_objects())
def test_every_argument_of_a_public_name_is_explained(name: str, thing: Any) -> None:
    documentation = inspect.getdoc(thing) or ""
    section = "Attributes" if issubclass(type(thing), type) and issubclass(thing, tuple) else "Args"
    explained = re.findall(r"^ {4}\*{0,2}(\w+):", documentation.partition(f"{section}:\n")[2], re.MULTILINE)
    assert [argument for argument in inspect.signature(thing).parameters if argument not in explained] == []
    if section == "Args":
        assert "Example:" in documentation


def test_the_version_is_in_the_changelog() -> None:
    text = (DOCS.parent / "CHANGELOG.md").read_text()
    assert f"## [{lightning_sensitivity.__version__}]" in text
