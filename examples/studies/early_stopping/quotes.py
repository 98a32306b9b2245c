"""What pages quote of the report, from one file of numbers.

    python examples/studies/early_stopping/quotes.py  # brings the pages up to date

`study.py` writes `numbers.json`. What pages quote of it is in `quotes.md`: under a heading `page: name` a text, with
the place of each number. The page has the text with the numbers between `<!-- numbers: name -->` and `<!-- end -->`; a
test compares them.
"""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
WIDTH = 126


def quotes() -> dict[tuple[str, str], str]:
    """Give what each page quotes, by page and name, with the numbers."""
    told = json.loads((HERE / "numbers.json").read_text())
    parts = re.split(r"^## (.+?): (.+)$", (HERE / "quotes.md").read_text(), flags=re.MULTILINE)[1:]
    found = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return {(page, name): wrapped(filled(text.strip(), told)) for page, name, text in found}


def filled(text: str, told: dict[str, Any]) -> str:
    """Put numbers into a text: `{group > rule > what:.1f}`, with `+` before the dot for a sign."""

    def put(found: re.Match[str]) -> str:
        place, _, form = found[1].rpartition(":")
        value: Any = told
        for key in place.split(" > "):
            value = value[key]
        return format(value, form).replace("-", "−") if form != "s" else str(value)

    return re.sub(r"\{([^{}]+)\}", put, text)


def wrapped(text: str) -> str:
    """Break the lines of a text, but not those of tables."""
    lines = []
    for line in text.splitlines():
        indent = "  " if line.startswith("- ") else ""
        is_text = line.strip() and not line.startswith("|")
        options = {"subsequent_indent": indent, "break_long_words": False, "break_on_hyphens": False}
        lines += textwrap.wrap(line, WIDTH, **options) if is_text else [line]
    return "\n".join(lines)


def place(name: str) -> re.Pattern[str]:
    """Give the pattern of the place where a page has a quote."""
    return re.compile(rf"(<!-- numbers: {re.escape(name)} -->\n)(.*?)(\n?<!-- end -->)", re.DOTALL)


def quoted(page: str, name: str) -> str:
    """Give what a page has in the place of a quote."""
    found = place(name).search(page)
    return "" if found is None else found[2].strip()


def update_pages() -> None:
    for (page, name), text in quotes().items():
        file = ROOT / page
        before = file.read_text()
        assert place(name).search(before), f"{page} has no place for {name}"
        block = f"<!-- numbers: {name} -->\n{text}\n<!-- end -->"
        file.write_text(place(name).sub(lambda _, block=block: block, before))


if __name__ == "__main__":
    update_pages()
