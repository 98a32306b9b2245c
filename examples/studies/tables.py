"""Fill in every number that a page quotes of a study, from the CSV of its runs.

    python examples/studies/tables.py          # brings the pages up to date
    python examples/studies/tables.py --check  # fails if one of them is not

A page has a block of numbers between `<!-- numbers: NAME -->` and `<!-- end -->`. What is in a block is said by the
`blocks.py` of a study (`summaries.py` shows how). A block may be on any page, on several or on none, and has no links.
One whose runs are not there is empty.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
import textwrap
from pathlib import Path

STUDIES = Path(__file__).parent
ROOT = STUDIES.parents[1]
WIDTH = 126
PLACE = re.compile(r"<!-- numbers: (.+?) -->\n.*?<!-- end -->", re.DOTALL)


def pages() -> list[Path]:
    found = [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]
    return sorted(page for page in found if "_build" not in page.parts)


def blocks() -> dict[str, str]:
    """Give the text of each block, with its numbers."""
    sys.path.insert(0, str(STUDIES))  # where `blocks.py` finds `summaries.py`
    found: dict[str, str] = {}
    for file in sorted(STUDIES.glob("*/blocks.py")):
        study = runpy.run_path(str(file))
        for name, text in study["BLOCKS"].items():
            if name in found:
                raise ValueError(f"two blocks are called {name!r}")
            found[name] = filled_in(text.strip(), study["NAMES"])
    return found


def filled_in(text: str, names: dict[str, object]) -> str:
    """Put numbers into the text of a block; without runs, there is none."""
    from summaries import NoRunsError

    try:
        return text.format_map(names)
    except NoRunsError:
        return ""


def filled(page: Path, text: str, found: dict[str, str]) -> str:
    """Put the blocks into the text of a page."""

    def put(place: re.Match[str]) -> str:
        name = place[1]
        if name not in found:
            raise KeyError(f"{page.relative_to(ROOT)}: no study has a block {name!r}")
        return f"<!-- numbers: {name} -->\n{wrapped(found[name])}\n<!-- end -->"

    return PLACE.sub(put, text)


def wrapped(text: str) -> str:
    """Break a text into lines anew, but leave its tables."""
    parts: list[str] = []
    for line in text.splitlines():
        begins = not line or line.startswith(("|", "- "))
        if begins or not parts or not parts[-1] or parts[-1].startswith("|"):
            parts.append(line)
        else:
            parts[-1] += f" {line}"
    return "\n".join(part if part.startswith("|") else filled_up(part) for part in parts)


def filled_up(part: str) -> str:
    indent = "  " if part.startswith("- ") else ""
    return textwrap.fill(part, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fill in the numbers of all pages, from the CSVs of the studies.")
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if a page has other numbers")
    args = parser.parse_args()
    found = blocks()
    used: set[str] = set()
    changed = []
    for page in pages():
        before = page.read_text()
        used.update(PLACE.findall(before))
        after = filled(page, before, found)
        if after != before:
            changed.append(str(page.relative_to(ROOT)))
            if not args.check:
                page.write_text(after)
    print(f"{len(used)} of {len(found)} blocks are on pages. On none: {', '.join(found.keys() - used) or 'none'}.")
    print(f"Without runs: {', '.join(name for name, text in found.items() if not text) or 'none'}.")
    if args.check and changed:
        sys.exit(f"run examples/studies/tables.py: it would change {', '.join(changed)}")
    print(f"Changed: {', '.join(changed) or 'nothing'}.")


if __name__ == "__main__":
    main()
