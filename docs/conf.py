"""Settings of the documentation; `.ci/docs` builds it, and takes warnings as errors."""

import importlib
import inspect
import re
import shutil
import sys
from pathlib import Path

import tomllib
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform

import lightning_sensitivity

sys.path.insert(0, str(Path(__file__).parent))
import inventories

ROOT = Path(__file__).parents[1]
_urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
REPOSITORY = _urls["Homepage"]
FILES = f"{REPOSITORY}/blob/main/"
NOTEBOOK = "examples/track_generalization.ipynb"

project = "lightning-sensitivity"
author = "The lightning-sensitivity developers"
copyright = author
version = release = lightning_sensitivity.__version__

extensions = [
    "matplotlib.sphinxext.plot_directive",
    "myst_nb",
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
nb_execution_mode = "off"  # the notebook has its outputs

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
plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
intersphinx_mapping = inventories.write(Path(__file__).parent / "_build" / "inventories")

# Names for types, which are explained where they are used; sums, which have no page; a function that has one under
# another name; and an exception that Lightning does not document.
nitpick_ignore_regex = [
    ("py:class", r"matplotlib\..*|numpy\.ndarray|Noise|Selector|lightning_sensitivity\.functional\.sums\.\w+"),
    ("py:func", "variance_factor"),
    ("py:exc", "MisconfigurationException"),
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
    """Link the names of classes in plain `code`, such as `Trainer`, so that the sources read well on GitHub, too."""

    default_priority = 300
    targets = inventories.short_names() | {
        name: f"lightning_sensitivity.{name}" for name in lightning_sensitivity.__all__ if not name.startswith("_")
    }

    def apply(self) -> None:
        """Put a reference around each of them, except in titles and links."""
        for literal in list(self.document.findall(nodes.literal)):
            target = self.targets.get(literal.astext().removesuffix("()"))
            if target and not isinstance(literal.parent, nodes.title | nodes.reference | pending_xref):
                reference = pending_xref("", refdomain="py", reftype="obj", reftarget=target, refexplicit=True)
                literal.replace_self(reference)
                reference += literal


def link_to_repository(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn links to files outside of this folder into links to the repository; on GitHub they work as they are."""
    up = "../" * (docname.count("/") + 1)
    source[0] = source[0].replace(f"({up}{NOTEBOOK})", f"({up[3:]}notebook.ipynb)")
    source[0] = re.sub(rf"(?<!!)\[([^][]*)\]\({up}(?!\.\.)", rf"[\1]({FILES}", source[0])


def move_links(app: Sphinx, path: Path, docname: str, source: list[str]) -> None:
    """Change the links of README and others, which this folder includes from the folder above."""
    source[0] = re.sub(r"(!\[[^][]*\])\((?!https:)", r"\1(../", source[0])
    source[0] = re.sub(r"(?<!!)(\[[^][]*\])\(docs/", r"\1(", source[0])
    source[0] = re.sub(r"(?<!!)(\[[^][]*\])\((?=examples/|tests/|[A-Z])", rf"\1({FILES}", source[0])


def setup(app: Sphinx) -> None:
    """Connect what changes the pages, and fetch the notebook."""
    shutil.copy(ROOT / NOTEBOOK, Path(app.srcdir) / "notebook.ipynb")
    app.add_transform(LinkNames)
    app.connect("source-read", link_to_repository)
    app.connect("include-read", move_links)
