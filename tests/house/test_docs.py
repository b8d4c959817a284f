"""What the documentation shows runs: code blocks, examples in docstrings, links."""

import doctest
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (ROOT / name).exists()]
PAGES += sorted((ROOT / "docs").rglob("*.md")) + sorted((ROOT / "benchmarks").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
PACKAGES = ("kernels", "ssmcore", "vision", "genomics", "timeseries", "graphs")


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCK.search(page.read_text())], ids=named)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """The blocks of a page, in order, in one namespace and an empty folder."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace: dict[str, object] = {"__name__": "__main__"}
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(1))
        exec(compile("\n" * line + match.group(1), str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    missing = [
        target
        for target in LINK.findall(page.read_text())
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists()
    ]
    assert not missing, f"{named(page)} links to missing {missing}"


def test_examples_in_docstrings():
    """Modules are imported by name: collecting them from files would load second copies."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if ">>> " not in path.read_text():
                continue
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(("omnissm", *(part for part in parts if part != "__init__")))
            result = doctest.testmod(import_module(name))
            assert result.failed == 0, name


def test_table_of_operators_is_that_of_the_result_files():
    command = [sys.executable, ROOT / "benchmarks" / "table.py", "--check"]
    assert subprocess.run(command).returncode == 0, "run `python benchmarks/table.py`"
