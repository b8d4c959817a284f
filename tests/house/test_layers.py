"""One direction of imports: kernels <- ssmcore <- the four domains, read from the import statements."""

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("vision", "genomics", "timeseries", "graphs")
# Package -> packages of ours that it may import beside itself.
MAY_IMPORT = {"kernels": (), "ssmcore": ("kernels",), **dict.fromkeys(DOMAINS, ("kernels", "ssmcore"))}
# What one package may see of another; everything else is free to change. Modules of `training` are imported one by one,
# because only some of them load Lightning.
PUBLIC = {
    "kernels": ("kernels", "kernels.testing"),
    "ssmcore": (
        "ssmcore",
        "ssmcore.mixers",
        "ssmcore.chunking",
        "ssmcore.init",
        "ssmcore.training",
        "ssmcore.training.*",
    ),
}
# Names of distributions that a file of the same name would hide once its folder is on sys.path.
DEPENDENCIES = {"torch", "torchvision", "triton", "timm", "xarray", "pandas", "numpy", "zarr", "rich", "yaml", "Bio"}

FILES = [path for package in MAY_IMPORT for path in sorted((ROOT / package).rglob("*.py"))]


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file; modules of ours as `kernels.x`, others by their full name."""
    folder = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, node.module or ""
        elif isinstance(node, ast.ImportFrom):
            base = folder[: len(folder) - node.level + 1]
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            # `from .. import kernels` names a package in its list.
            names = [alias.name for alias in node.names] if not module else [""]
            yield from ((node.lineno, f"{module}.{name}".strip(".")) for name in names)


def problems(path: Path) -> Iterator[str]:
    package = path.relative_to(ROOT).parts[0]
    for line, module in imported_modules(path):
        where = f"{path.relative_to(ROOT)}:{line} imports {module}"
        top = module.split(".")[0]
        if top == "omnissm":
            yield f"{where}; library code imports relatively"
        elif top in ("tests", "benchmarks", "examples"):
            yield f"{where}; nothing imports {top}"
        elif top in MAY_IMPORT and top != package:
            if top not in MAY_IMPORT[package]:
                yield f"{where}; {package} may import {MAY_IMPORT[package] or 'nothing of ours'}"
            elif not any(fnmatch(module, public) for public in PUBLIC[top]):
                yield f"{where}; public are {', '.join(PUBLIC[top])}"
        elif top == "lightning":
            yield f"{where}; write pytorch_lightning, the other name is a second class tree"
        elif package == "kernels" and top not in sys.stdlib_module_names | {"kernels", "torch", "triton", ""}:
            yield f"{where}; kernels need torch and Triton only"


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_point_in_one_direction(package):
    found = [problem for path in FILES if path.relative_to(ROOT).parts[0] == package for problem in problems(path)]
    assert not found, "\n".join(found)


def test_only_training_loads_lightning_in_the_core():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in FILES
        if path.is_relative_to(ROOT / "ssmcore") and not path.is_relative_to(ROOT / "ssmcore" / "training")
        for line, module in imported_modules(path)
        if module.split(".")[0] in ("pytorch_lightning", "jsonargparse")
    ]
    assert not found, found


def test_no_file_is_named_like_a_dependency():
    hidden = {path.stem for path in FILES if path.name != "__init__.py"} & (set(sys.stdlib_module_names) | DEPENDENCIES)
    assert not hidden - {"__main__", "__init__"}, hidden


def test_the_reader_of_imports_sees_what_it_should(tmp_path, monkeypatch):
    """The rules above fail when they are broken."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "kernels" / "scan").mkdir(parents=True)
    path = tmp_path / "kernels" / "scan" / "op.py"
    ours = "from ...vision import x\nfrom ..checks import y\nimport omnissm.ssmcore\n"
    path.write_text(ours + "import xarray\nimport torch\n")
    found = list(problems(path))
    assert [problem.split()[0].rsplit(":", 1)[1] for problem in found] == ["1", "3", "4"]
