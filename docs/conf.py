"""Settings of the documentation; `.ci/docs` builds it, and takes warnings as errors."""

import importlib
import inspect
import os
import re
from pathlib import Path

import tomllib
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import lightning_sensitivity

ROOT = Path(__file__).parents[1]
_urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
REPOSITORY = _urls["Homepage"]
FILES = f"{REPOSITORY}/blob/main/"

project = "lightning-sensitivity"
author = "The lightning-sensitivity developers"
copyright = author
version = release = lightning_sensitivity.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.linkcode",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"lightning-sensitivity {version}"
html_baseurl = _urls["Documentation"]
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_context = {"repository": REPOSITORY}
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}
html_sidebars = {
    "**": [
        "sidebar/brand.html",
        "sidebar/repository.html",
        "sidebar/search.html",
        "sidebar/scroll-start.html",
        "sidebar/navigation.html",
        "sidebar/scroll-end.html",
    ]
}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
# Types of other packages link to their pages where the site is made. Other builds need no network: names stay plain.
_packages = {
    "python": "https://docs.python.org/3/",
    "torch": "https://docs.pytorch.org/docs/stable/",
    "torchmetrics": "https://lightning.ai/docs/torchmetrics/stable/",
    "lightning": "https://lightning.ai/docs/pytorch/stable/",
}
intersphinx_mapping = {name: (url, None) for name, url in _packages.items()} if "GITHUB_ACTIONS" in os.environ else {}

# Names of other packages; names for types, which are explained where they are used.
nitpick_ignore_regex = [
    (
        "py:.*",
        r"(collections|contextlib|lightning|matplotlib|numpy|torch|torchmetrics)\..*|Tensor|MisconfigurationException",
    ),
    ("py:class", r"Noise|Selector|.*\.ScoreSums"),
]


def linkcode_resolve(domain: str, info: dict[str, str]) -> str | None:
    """Return where the source of an object is, for its [source] link."""
    thing: object = importlib.import_module(info["module"])
    for name in info["fullname"].split("."):
        thing = getattr(thing, name, None)
    thing = inspect.unwrap(getattr(thing, "fget", thing))  # of a property
    try:
        lines, start = inspect.getsourcelines(thing)
        path = Path(inspect.getsourcefile(thing)).relative_to(Path(lightning_sensitivity.__file__).parents[1])
    except (TypeError, OSError, ValueError):  # an attribute, or an object of another package
        return None
    return f"{FILES}{path}#L{start}-L{start + len(lines) - 1}"


class LinkNames(SphinxTransform):
    """Link the names of our classes in plain `code`, so that the sources read well on GitHub, too."""

    default_priority = 300
    names = {*lightning_sensitivity.__all__} - {"__version__"}

    def apply(self) -> None:
        """Put a reference around each of them, except in titles and links."""
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().removesuffix("()")
            if name in self.names and not isinstance(literal.parent, nodes.title | nodes.reference | pending_xref):
                target = f"lightning_sensitivity.{name}"
                reference = pending_xref("", refdomain="py", reftype="obj", reftarget=target, refexplicit=True)
                literal.replace_self(reference)
                reference += literal


def link_to_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links to files outside of this folder into links to the repository; on GitHub they work as they are."""
    up = "../" * (docname.count("/") + 1)
    source[0] = re.sub(rf"(?<!!)\[([^][]*)\]\({up}(?!\.\.)", rf"[\1]({FILES}", source[0])


def move_links(app: Sphinx, path: Path, docname: str, source: list[str]) -> None:
    """Change the links of README and others, which this folder includes from the folder above."""
    source[0] = re.sub(r"(!\[[^][]*\])\((?!https:)", r"\1(../", source[0])
    source[0] = re.sub(r"(?<!!)(\[[^][]*\])\(docs/", r"\1(", source[0])
    source[0] = re.sub(r"(?<!!)(\[[^][]*\])\((?=examples/|tests/|[A-Z])", rf"\1({FILES}", source[0])


def setup(app: Sphinx) -> None:
    """Connect what changes the pages."""
    app.add_transform(LinkNames)
    app.connect("source-read", link_to_repository)
    app.connect("include-read", move_links)
