"""All pages: their code runs, what they name exists, they are short and plain, and the API is complete."""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

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


def num_words(page: Path) -> int:
    text = re.sub(r"```.*?```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL)
    return len(re.findall(r"\S*\w\S*", text))  # the bars of a table are no words


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if python_blocks(page)], ids=name_of)
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists", "ignore:.*survives averaging over classes")
def test_the_code_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "page", "ResNet": Classifier, "train_loader": loader()}
    names |= {name: Classifier() for name in ("model", "fc", "cnn")}
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
    blocks = re.findall(r"^```yaml\n(.*?)^```", (DOCS / "guide" / "cli.md").read_text(), re.DOTALL | re.MULTILINE)
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
    commands = re.findall(r"```sh\n(python3 .*?)\n```", README.read_text())
    install, tests = commands[1].rsplit(" && ", 1)
    lines = (ROOT / ".ci" / "test").read_text().splitlines()
    assert install.replace("pip install", "pip install -q") in lines and tests == lines[-1]


@pytest.mark.parametrize("page", [README, *(page for page in PAGES if DOCS in page.parents)], ids=name_of)
def test_the_code_of_a_page_is_not_cut_off(page: Path) -> None:
    text = re.sub(r"^python3 -m venv .*\n", "", page.read_text(), flags=re.MULTILINE)  # one command to copy
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert [line for block in blocks for line in block.splitlines() if len(line) > 88] == []


def test_every_message_that_names_an_entry_finds_it() -> None:
    sources = [path.read_text() for path in SOURCES]
    start = r"(?:link_to\(|\.warn\(\s*|messages\[|entry = )"
    named = {name for source in sources for name in re.findall(start + r"['\"]([\w-]+)['\"]", source)}
    assert len(named) > 10 and named - entries().keys() == set()


def entries() -> dict[str, list[str]]:
    """The entries of the page on troubleshooting, as Sphinx names them, with the parts of messages that they quote."""
    parts = re.split(r"^### (.*)\n", (DOCS / "troubleshooting.md").read_text(), flags=re.MULTILINE)[1:]
    found = {}
    for heading, text in zip(parts[::2], parts[1::2], strict=True):
        quoted = " ".join(re.findall(r"^> (.*)$", text, re.MULTILINE))
        found[re.sub("[ _]", "-", heading.lower())] = [quote for quote in map(str.strip, quoted.split("·")) if quote]
    return found


Names = dict[str, list[ast.expr]]
MESSAGE_OF = {"rank_zero_warn": 0, "Diagnosis": 0, "report_failure": 0, "append": 0}  # the place of the argument
# Functions that return a part of a message, and those that only pass on what they get.
RETURNING = ("_problem_of_steps", "stop", "_find_difference", "_checkpoint_of", "describe_error")
RETURNING += ("_lowest", "_noise", "_train_on", "_trust")
PASSING = ("__getattr__", "check_argument")


def texts(node: ast.expr, names: Names) -> list[str]:
    """What an expression may say, with "…" for what only a run knows."""
    match node:
        case ast.Constant(value=str(value)):
            return [value]
        case ast.JoinedStr(values=parts):
            return ["".join(found) for found in product(*(texts(part, names) for part in parts))]
        case ast.FormattedValue(value=ast.Name() | ast.IfExp() as value):
            return texts(value, names)
        case ast.BinOp(left=left, right=right):
            return [start + end for start in texts(left, names) for end in texts(right, names)]
        case ast.IfExp(body=body, orelse=other):
            return texts(body, names) + texts(other, names)
        case ast.Name(id=name) if name in names:
            others = {other: values for other, values in names.items() if other != name}
            return [text for value in names[name] for text in texts(value, others)]
    return ["…"]


def messages_in(node: ast.AST, file: str, names: Names) -> list[str]:
    """The messages of a `raise`, of a call that warns, or of a check of an argument."""
    match node:
        case ast.Raise(exc=ast.Call(args=[message, *_])) | ast.Return(value=ast.expr() as message):
            return texts(message, names)
        case ast.Call(func=ast.Name(id="check_argument"), args=[name, _, _, expected]):
            return [f"`{a}` should be {b}" for a in texts(name, names) for b in texts(expected, names)]
        case ast.Call(func=ast.Attribute(attr="warn"), args=[*_, message]):
            return texts(message, names)
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[message, *_]):
            is_message = name in MESSAGE_OF and (name != "append" or file == "closing.py")
            return texts(message, names) if is_message else []
    return []


def messages() -> set[str]:
    """All messages in the sources."""
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    found = set[str]()
    constants: Names = {}
    for tree in trees.values():
        add_names(constants, tree.body)
    for path, tree in trees.items():
        for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
            if function.name in PASSING:
                continue
            names = dict(constants)
            add_names(names, ast.walk(function))
            for node in ast.walk(function):
                if function.name in RETURNING or not isinstance(node, ast.Return):
                    found.update(messages_in(node, path.name, names))
    return {text for text in found if sum(map(str.isalpha, text)) > 8}


def add_names(names: Names, nodes: Iterable[ast.AST]) -> None:
    for node in nodes:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names.setdefault(name, []).append(value)


def test_every_message_is_quoted_by_exactly_one_entry() -> None:
    found, quotes = messages(), entries()
    assert len(found) > 80
    quoting = {text: [name for name, parts in quotes.items() if any(part in text for part in parts)] for text in found}
    assert {text: names for text, names in quoting.items() if len(names) != 1} == {}
    assert [part for parts in quotes.values() for part in parts if not any(part in text for text in found)] == []


def test_pages_are_short_each_and_together() -> None:
    words = {name_of(page): num_words(page) for page in PAGES if DOCS in page.parents or page == README}
    limits = {name_of(page): 900 if page == README else 500 for page in (README, *GUIDE)}
    assert {name: words[name] for name, limit in limits.items() if words[name] > limit} == {}
    assert sum(words.values()) - words[name_of(README)] <= 11_000


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
