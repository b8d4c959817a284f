"""Build the documentation site: the pages of `docs/`, the project's own files, and a reference from docstrings.

    python docs/build.py [--out site]

The site opens from the file system and loads nothing from the network. A link without a target, a page that the
navigation of `docs/site.yml` lacks, a public name without a docstring, or with one that describes arguments which are
not there, stops the build with exit code 1.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
PACKAGES = ("kernels", "ssmcore", "vision", "genomics", "timeseries", "graphs")
# Files of the repository that are pages of the site.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "genomics/pretrained/dnahnet_debug_ecoli/README.md": "model_card_dnahnet_debug_ecoli.md",
}
IMPORT = re.compile(r"^from (omnissm[\w.]+) import ([\w, ]+)", re.MULTILINE)
CLASS_PATH = re.compile(r"class_path: (omnissm[\w.]+)\.(\w+)")
LINK = re.compile(r"(!?)\[([^\]\[]*)\]\(([^)#\s]+)(#[^)]*)?\)")


def relinked(text: str, source: Path, page: Path, here: dict[Path, Path]) -> str:
    """The text of a file, with links that hold on its page of the site.

    Args:
        text: Markdown.
        source: The file it came from.
        page: Where it stands, relative to the pages.
        here: Page of the site by file of the repository.

    Returns:
        Markdown in which a link to a file that is no page is its text alone.
    """

    def link(match: re.Match[str]) -> str:
        bang, label, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        file = (source.parent / target).resolve()
        if file not in here:
            if not file.exists():
                raise ValueError(f"{source.relative_to(ROOT)} links to {target}, which does not exist")
            return label
        return f"{bang}[{label}]({os.path.relpath(here[file], page.parent)}{anchor or ''})"

    return LINK.sub(link, text)


def surfaces() -> dict[ModuleType, list[str]]:
    """What the reference shows: every `__all__`, and what pages and configurations name of other modules.

    Returns:
        Names by module, in the order of `PACKAGES`, an outer package before what is in it.
    """
    folders = [file.parent.relative_to(ROOT).parts for name in PACKAGES for file in (ROOT / name).rglob("__init__.py")]
    packages = [import_module(".".join(("omnissm", *parts))) for parts in sorted(folders)]
    found = {module: list(module.__all__) for module in packages if hasattr(module, "__all__")}
    known = {path_of(module, name) for module, names in found.items() for name in names}
    for home, name in sorted(named()):
        module = import_module(home)
        value = getattr(module, name, None)
        own = (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__ == home
        if own and path_of(module, name) not in known:
            found.setdefault(module, []).append(name)
    order = {f"omnissm.{name}": place for place, name in enumerate(PACKAGES)}

    def place(module: ModuleType) -> tuple[int, str]:
        return order[".".join(module.__name__.split(".")[:2])], module.__name__

    return {module: found[module] for module in sorted(found, key=place)}


def named() -> set[tuple[str, str]]:
    """Modules and names in them that Python blocks of pages import or configurations ask for."""
    names: set[tuple[str, str]] = set()
    for page in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for home, several in IMPORT.findall(page.read_text()):
            names |= {(home, name.split(" as ")[0].strip()) for name in several.split(",")}
    for config in (ROOT / "configs").rglob("*.yaml"):
        names |= set(CLASS_PATH.findall(config.read_text()))
    return names


def path_of(module: ModuleType, name: str) -> str:
    """Where a public name is defined: a function may be named like the folder that it lives in."""
    value = getattr(module, name)
    if (inspect.isclass(value) or inspect.isfunction(value)) and value.__module__.startswith("omnissm."):
        return f"{value.__module__}.{value.__qualname__}"
    return f"{module.__name__}.{name}"


def documented(module: ModuleType, name: str) -> bool:
    """Whether a public name has a docstring; that of a constant stands below its assignment."""
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        return bool(inspect.getdoc(value))
    files = Path(module.__file__ or "").parent.rglob("*.py")
    return any(name in constants(file) for file in files)


def constants(file: Path) -> set[str]:
    """Names that a file assigns and describes in the string of the next line."""
    body = ast.parse(file.read_text()).body
    found: set[str] = set()
    for node, after in pairwise(body):
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and isinstance(after.value.value, str):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def reference(module: ModuleType, names: list[str]) -> str:
    """The page of a module: its docstring, then one section for each name."""
    text = f"# {module.__name__}\n\n{inspect.getdoc(module)}\n"
    for name in names:
        if not documented(module, name):
            raise ValueError(f"{module.__name__}.{name} has no docstring")
        text += f"\n::: {path_of(module, name)}\n    options:\n      heading: {name}\n      toc_label: {name}\n"
    return text


def listed(nav: list[Any]) -> set[str]:
    """Every page that a navigation names."""
    pages: set[str] = set()
    for entry in nav:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            pages |= listed(value) if isinstance(value, list) else {value}
    return pages


def stage(folder: Path) -> None:
    """Write what the generator reads into an empty folder: pages, configuration, and the package under its name."""
    pages = folder / "docs"
    shutil.copytree(DOCS, pages, ignore=shutil.ignore_patterns("*.py", "*.md", "site.yml", "__pycache__"))
    here = {file: file.relative_to(DOCS) for file in sorted(DOCS.rglob("*")) if file.suffix in (".md", ".png")}
    here |= {ROOT / source: Path(page) for source, page in PAGES.items()}
    for source, page in here.items():
        if source.suffix == ".md":
            (pages / page).parent.mkdir(parents=True, exist_ok=True)
            (pages / page).write_text(relinked(source.read_text(), source, page, here))
    (pages / "api").mkdir()
    api: dict[str, list[dict[str, str]]] = {}
    for module, names in surfaces().items():
        page = f"api/{module.__name__.removeprefix('omnissm.')}.md"
        (pages / page).write_text(reference(module, names))
        _, package, *inside = module.__name__.split(".")
        api.setdefault(package, []).append({".".join(inside) or f"omnissm.{package}": page})
    config = yaml.safe_load((DOCS / "site.yml").read_text())
    config["nav"].append({"Reference": [{package: found} for package, found in api.items()]})
    missing = {path.relative_to(pages).as_posix() for path in pages.rglob("*.md")} - listed(config["nav"])
    if missing:
        raise ValueError(f"docs/site.yml does not list {', '.join(sorted(missing))}")
    (folder / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False))
    package = folder / "omnissm"  # docstrings are read from source files; all files below are searched, so not of ROOT
    package.mkdir()
    for name in ("__init__.py", *PACKAGES):
        (package / name).symlink_to(ROOT / name)


def build(out: Path) -> None:
    """Write the site, whole or not at all.

    Args:
        out: Folder, replaced if it is there.

    Raises:
        ValueError: if a page, a link or a docstring is missing; the text names it.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stage(folder)
        command = [sys.executable, "-m", "zensical", "build", "--strict"]
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        faults = [line for line in done.stdout.splitlines() if line.startswith("griffe:")]
        if done.returncode or faults:
            raise ValueError("the site does not build:\n" + ("\n".join(faults) or done.stdout))
        if out.exists():
            shutil.rmtree(out)
        shutil.move(folder / "site", out)


def main(argv: list[str] | None = None) -> int:
    """Build the site; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "site", help="folder to write (default: site)")
    options = parser.parse_args(argv)
    try:
        build(options.out)
    except ValueError as error:
        sys.stderr.write(f"docs/build.py: error: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
