"""Make a notebook of a script with `# %%` cells, and run it.

    python examples/make_notebook.py examples/track_generalization.py

It writes `examples/track_generalization.ipynb`. Needs nbclient, nbformat and ipykernel.
"""

import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

INSTALL = '# Once; the package lies in the folder above.\n%pip install -q "..[examples]"'
SWITCH = "args.noise = 0.2  # the share of all labels that are made wrong; 0: as they are"


def notebook(script: str) -> nbformat.NotebookNode:
    """The cells of a script, without outputs."""
    cells: list[nbformat.NotebookNode] = []
    for part in re.split(r"^# %%", script, flags=re.MULTILINE)[1:]:
        kind, source = part.split("\n", 1)
        if "[markdown]" in kind:
            source = "\n".join(line.removeprefix("#").removeprefix(" ") for line in source.strip().splitlines())
        cells.append((new_markdown_cell if "[markdown]" in kind else new_code_cell)(source.strip()))
        if "parse_args(" in source:  # in a notebook there are no options
            cells.append(new_code_cell(SWITCH))
    cells.insert(1, new_code_cell(INSTALL))  # below the title
    for index, cell in enumerate(cells):
        cell.id = f"cell-{index}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


if __name__ == "__main__":
    from nbclient import NotebookClient

    script = Path(sys.argv[1])
    os.environ["MATPLOTLIBRC"] = str(script.resolve().parents[1] / "docs")  # it has colours for light and dark pages
    made = notebook(script.read_text())
    install = made.cells.pop(1)  # it is installed here
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(made, resources={"metadata": {"path": folder}}, record_timing=False).execute()
    made.cells.insert(1, install)
    for cell in made.cells:  # what went to stderr is Lightning's advice about this machine
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
    made.metadata["language_info"] = {"name": "python"}
    nbformat.write(made, script.with_suffix(".ipynb"))
