"""Settings of the documentation; `.ci/docs` builds it, and takes warnings as errors."""

import re
from pathlib import Path

import tomllib
from sphinx.application import Sphinx

import lightning_sensitivity

_urls = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["urls"]
REPOSITORY = _urls["Homepage"]

project = "lightning-sensitivity"
author = "The lightning-sensitivity developers"
copyright = author
version = release = lightning_sensitivity.__version__

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "lightning-sensitivity"
html_baseurl = _urls["Documentation"]
html_static_path = ["_static"]
html_css_files = ["narrow.css"]
html_show_copyright = False
html_theme_options = {"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"}

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False

# Types of other packages: a build needs no network, so that it can't look them up.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|lightning|matplotlib|numpy|pytorch_lightning|torch|torchmetrics|typing)\..*"),
    ("py:exc", "MisconfigurationException"),
    ("py:class", "AxType|Noise|PlotType|Selector|Tensor"),  # names for types, explained where they are used
]


def link_to_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links to files outside of this folder into links to the repository; on GitHub they work as they are."""
    up = "../" * (docname.count("/") + 1)
    source[0] = re.sub(rf"(?<!!)\[([^]]*)\]\({up}(?!\.\.)", rf"[\1]({REPOSITORY}/blob/main/", source[0])


def setup(app: Sphinx) -> None:
    """Connect what changes the pages."""
    app.connect("source-read", link_to_repository)
