"""Write `docs/results.md` from the text of `benchmarks/page.md` and the files of `benchmarks/results`.

    python benchmarks/table.py [--check]

A line `{{ KIND PATTERN | COLUMNS | ... }}` of the text becomes a table for each file that the pattern finds, with the
command that measured it; `tables.py` has the kinds. What stands between `{{ if PATTERN }}` and `{{ end }}` is left out
while there is no such file. Files that no line finds are shown at the end of the page, so that
a new one cannot be forgotten. `--check` writes nothing and exits with 1 if the page is out of date.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # not there under PYTHONSAFEPATH

import tables
from command import leave

TEXT = HERE / "page.md"
PAGE = HERE.parent / "docs" / "results.md"
MARK = re.compile(r"^\{\{ *(\w+) +(\S+) *((?:\|[^|}]*)*)\}\}$", re.MULTILINE)
CONDITION = re.compile(r"^\{\{ if (\S+) \}\}\n(.*?)^\{\{ end \}\}\n", re.MULTILINE | re.DOTALL)
NOTE = "<!-- Written by `python benchmarks/table.py`; change benchmarks/page.md or the result files. -->\n\n"

Kind = Callable[..., str]
KINDS: dict[str, Kind] = {
    "rows": tables.rows,
    "seeds": tables.seeds,
    "pivot": tables.pivot,
    "files": tables.files,
    "dna": tables.dna,
    "protocol": tables.protocol,
    "operators": tables.operators,
    "untimed": tables.untimed,
}


def page(text: str, results: Path = HERE / "results") -> str:
    """The page.

    Args:
        text: Markdown with marks.
        results: Folder of the result files.

    Raises:
        ValueError: if a mark has an unknown kind or finds no file.
    """
    used: set[Path] = set()

    def fill(mark: re.Match[str]) -> str:
        kind, pattern, rest = mark.groups()
        if kind not in KINDS:
            raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(KINDS)}.")
        found = sorted(results.glob(pattern))
        if kind in ("operators", "untimed"):  # other files lie beside them
            found = [path for path in found if "op" in tables.read(path)]
        if not found:
            raise ValueError(f"no file of {results} is {pattern!r}.")
        used.update(found)
        columns = [[name.strip() for name in part.split(",")] for part in rest.split("|")[1:]]
        return KINDS[kind](results, found, *columns)

    text = CONDITION.sub(lambda block: block[2] if any(results.glob(block[1])) else "", text)
    filled = MARK.sub(fill, text)
    left = [path for path in sorted(results.rglob("*.json")) if path not in used]
    if left:
        filled += "\n## Other measurements\n\n" + "\n".join(tables.anything(results, path) for path in left)
    return NOTE + re.sub(r"\n{3,}", "\n\n", filled)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args(argv)
    new = page(TEXT.read_text())
    if options.check:
        return int(not PAGE.is_file() or new != PAGE.read_text())
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(new)
    os.replace(temporary, PAGE)
    return 0


if __name__ == "__main__":
    leave(main)
