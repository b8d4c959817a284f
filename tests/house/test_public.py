"""The public surface: every package lists it in `__all__`, the list is complete, and each name is documented."""

import ast
import inspect
from importlib import import_module
from pathlib import Path

import pytest

PACKAGES = ["kernels", "ssmcore", "vision", "genomics", "timeseries", "graphs"]
ROOT = Path(__file__).resolve().parents[2]
FILLED = [name for name in PACKAGES if len(list((ROOT / name).glob("**/*.py"))) > 1]


def exported_names(package: str) -> set[str]:
    """Names that the package's `__init__` imports for others: `from .x import name as name`."""
    tree = ast.parse((ROOT / package / "__init__.py").read_text())
    return {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level > 0
        for alias in node.names
        if alias.asname == alias.name
    }


@pytest.mark.parametrize("package", FILLED)
def test_all_is_complete_and_sorted(package):
    module = import_module(f"omnissm.{package}")
    assert sorted(set(module.__all__)) == list(module.__all__)
    missing = exported_names(package) - set(module.__all__)
    assert not missing, f"exported by {package}/__init__.py, not in __all__: {missing}"
    for name in module.__all__:
        assert hasattr(module, name), f"{package}.__all__ names {name}, which does not exist"


@pytest.mark.parametrize("package", FILLED)
def test_public_names_are_documented(package):
    module = import_module(f"omnissm.{package}")
    bare = []
    for name in module.__all__:
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isfunction(value)):
            continue
        documentation = inspect.getdoc(value) or ""
        parameters = inspect.signature(value).parameters if inspect.isfunction(value) else {}
        if len(documentation) < 20 or (len(parameters) > 1 and "Args:" not in documentation):
            bare.append(name)
    assert not bare, f"without docstring, or without its Args: {bare}"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is(package):
    bare = [
        str(path.relative_to(ROOT))
        for path in sorted((ROOT / package).rglob("*.py"))
        if not ast.get_docstring(ast.parse(path.read_text()))
    ]
    assert not bare, bare


def test_ops_have_their_files_and_their_page():
    """Reference, spec, tests and documentation of every op; faster paths may come later."""
    for folder in sorted(path.parent for path in (ROOT / "kernels").glob("*/op.py")):
        for name in ("reference.py", "spec.py"):
            assert (folder / name).exists(), f"{folder.name} has no {name}"
        page = ROOT / "docs" / "ops" / f"{folder.name}.md"
        assert (ROOT / "tests" / "kernels" / f"test_{folder.name}.py").exists(), folder.name
        assert page.exists(), f"docs/ops/{folder.name}.md is missing"
        headings = [line[3:].strip().lower() for line in page.read_text().splitlines() if line.startswith("## ")]
        assert headings[:5] == ["equation", "shapes", "algorithm", "gradient", "limits"], (folder.name, headings)
