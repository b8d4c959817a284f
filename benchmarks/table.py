"""Write the table of operators in `docs/results.md` from the result files of one device.

    python benchmarks/table.py [--check]

The table stands between two marks in the page. `--check` writes nothing and exits with 1 if the page is out of date.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "results.md"
RESULTS = HERE / "results" / "nvidia-h100-80gb-hbm3"
BEGIN, END = "<!-- operators: begin -->\n", "<!-- operators: end -->\n"
HEAD = (
    "| op, size, dtype | path | graph | eager | floor | required | aim | extra MiB |\n"
    "| --- | --- | --- | --- | --- | --- | --- | --- |\n"
)


def pair(forward: Any, both: Any) -> str:
    return f"{forward:.3f} / {both:.3f}"


def line(op: str, row: dict[str, Any]) -> str:
    size = ", ".join(f"{key} {value}" for key, value in row["size"].items() if value is not False)
    cells = [f"`{op}`, {size}, {row['dtype']}", row["path"]]
    for kind in ("_graph_ms", "_ms"):
        forward, both = row[f"forward{kind}"], row[f"forward_backward{kind}"]
        cells.append("" if forward is None or both is None else pair(forward["median"], both["median"]))
    cells.append(pair(row["forward_floor_ms"], row["forward_backward_floor_ms"]))
    for key in ("required_ms", "stretch_ms"):
        cells.append(" / ".join(f"{value:g}" for value in row[key]) if key in row else "")
    cells.append("" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}")
    return "| " + " | ".join(cells) + " |\n"


def table() -> str:
    """The whole block between the marks: one row per implementation that was timed, and the commits of the files."""
    rows, commits = "", []
    for path in sorted(RESULTS.glob("*.json")):
        content = json.loads(path.read_text())
        if "op" not in content:
            continue
        commits.append(f"`{content['op']}` {content['commit']}")
        rows += "".join(line(content["op"], row) for row in content["rows"] if "forward_ms" in row)
    return f"{HEAD}{rows}\nCommits: {', '.join(commits)}.\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    options = parser.parse_args(argv)
    page = PAGE.read_text()
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    new = before + BEGIN + table() + END + after
    if options.check:
        return int(new != page)
    temporary = PAGE.with_suffix(".tmp")
    temporary.write_text(new)
    os.replace(temporary, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
