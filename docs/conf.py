"""Settings of the documentation; `.ci/docs` builds it, and takes warnings as errors."""

import os
import re
from pathlib import Path

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.writers.html5 import HTML5Translator

import lightning_sensitivity

project = "lightning-sensitivity"
author = "The lightning-sensitivity developers"
copyright = author
version = release = lightning_sensitivity.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = f"lightning-sensitivity {version}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_copyright = False
html_math_renderer = "mathml"

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
        r"(collections|contextlib|lightning|matplotlib|numpy|sklearn|torch|torchmetrics)\..*|Tensor|MisconfigurationException",
    ),
    ("py:class", r"Noise|Selector|.*\.ScoreSums"),
]


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


def link_to_files(app: Sphinx, docname: str, source: list[str]) -> None:
    """Let links to files outside of this folder download them; in the repository they work as they are."""
    up = "../" * (docname.count("/") + 1)
    source[0] = re.sub(rf"(?<!!)\[([^][]*)\]\(({up}(?!\.\.)[^)#]*)[^)]*\)", r"{download}`\1 <\2>`", source[0])


def move_links(app: Sphinx, path: Path, docname: str, source: list[str]) -> None:
    """Change the links of README and others, which this folder includes from the folder above."""
    source[0] = re.sub(r"(!\[[^][]*\])\((?!https:)", r"\1(../", source[0])
    source[0] = re.sub(r"(?<!!)(\[[^][]*\])\(docs/", r"\1(", source[0])
    outside = r"(?<!!)\[([^][]*)\]\(((?:examples/|tests/|[A-Z])[^)#]*)[^)]*\)"
    source[0] = re.sub(outside, r"{download}`\1 <../\2>`", source[0])


def show_formula(translator: HTML5Translator, node: nodes.math | nodes.math_block) -> None:
    """Write a formula as MathML, which browsers show by themselves."""
    is_block = isinstance(node, nodes.math_block)
    translator.body.append(convert(node.astext(), display="block" if is_block else "inline"))
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Connect what changes the pages."""
    app.add_transform(LinkNames)
    app.add_html_math_renderer("mathml", (show_formula, None), (show_formula, None))
    app.connect("source-read", link_to_files)
    app.connect("include-read", move_links)
