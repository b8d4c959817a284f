"""The wheel holds the package and nothing else, and the checkout hides nobody else's package."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "ssmcore", "vision", "genomics", "timeseries", "graphs", "configs")
ROOT_FILES = {"__init__.py", "__main__.py", "py.typed"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Names in a wheel that is built from a copy of the tree, under a folder name that is no identifier."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("build") / "a clone 1.x"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "runs", "demo")
    shutil.copytree(ROOT, copy, ignore=ignored)
    out = copy.parent / "out"
    options = ["-q", "--no-deps", "--no-build-isolation", "-w", str(out)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(copy)]
    environment = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_seven_folders_and_three_files(wheel):
    expected = {f"omnissm/{name}" for name in ROOT_FILES if (ROOT / name).exists()}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*"):
            packaged = path.is_file() and path.relative_to(ROOT).parts[:2] == ("genomics", "pretrained")
            if path.suffix == ".py" or (folder == "configs" and path.suffix == ".yaml") or packaged:
                expected.add(f"omnissm/{path.relative_to(ROOT).as_posix()}")
    found = {name for name in wheel if ".dist-info/" not in name}
    assert found == expected


def test_wheel_metadata(wheel):
    (metadata,) = (content.decode() for name, content in wheel.items() if name.endswith(".dist-info/METADATA"))
    assert "Name: omnissm" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    (entry,) = (content.decode() for name, content in wheel.items() if name.endswith("entry_points.txt"))
    assert "omnissm = omnissm.__main__:main" in entry
    assert any(name.endswith("LICENSE") for name in wheel)


def test_packaged_models_have_complete_cards():
    """Licence, origin of the data, how it was made, figures with their command or data, limits."""
    folders = [path.parent for path in (ROOT / "genomics" / "pretrained").glob("*/config.json")]
    assert folders
    for folder in folders:
        card = (folder / "README.md").read_text()
        _, front, body = card.split("---\n", 2)
        assert {line.split(":")[0] for line in front.splitlines()} >= {"library_name", "license", "tags"}, folder.name
        headings = " ".join(line.lower() for line in body.splitlines() if line.startswith("## "))
        for word in ("data", "training", "figures", "limits"):
            assert word in headings, f"the card of {folder.name} says nothing of its {word}"
        assert "INSDC" in body, f"the card of {folder.name} does not say where its data come from"


def test_changelog_has_no_entry_twice_and_names_its_packages():
    text = (ROOT / "CHANGELOG.md").read_text()
    entries = [line for line in text.splitlines() if line.startswith("- ")]
    assert len(entries) == len(set(entries))
    known = {*FOLDERS, "package", "command line", "readers", "docs", "benchmarks", "tests"}
    unknown = [entry for entry in entries if entry[2:].split(":")[0] not in known]
    assert not unknown, unknown


def test_changelog_and_citation_date_the_version():
    """The newest heading below Unreleased has the version of pyproject.toml, and the date of the citation."""
    text = (ROOT / "CHANGELOG.md").read_text()
    dated = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d)$", text, re.MULTILINE)
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert headings == ["## Unreleased", *(f"## {version} - {day}" for version, day in dated)]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert citation["version"] == version
    assert (version, citation["date-released"]) == dated[0]


def test_root_holds_no_other_python_file():
    """Any .py file in the root would become part of the package."""
    assert {path.name for path in ROOT.glob("*.py")} == {"__init__.py", "__main__.py", "setup.py"}


def run_in_checkout(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONSAFEPATH", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env={**kept, **environment}
    )


def test_import_from_the_checkout():
    done = run_in_checkout("import omnissm.kernels; print(omnissm.kernels.linear_scan.__name__)")
    assert done.stdout.strip() == "linear_scan", done.stderr


def test_another_package_named_kernels_is_found(tmp_path):
    """Python started in the checkout finds our folder first; it stands in for the installed one."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("from .part import get_kernel\n__version__ = '9.9'\n")
    (tmp_path / "kernels" / "part.py").write_text("def get_kernel():\n    return __name__\n")
    code = "import kernels, kernels.part; print(kernels.__version__, kernels.get_kernel(), kernels.__file__)"
    done = run_in_checkout(code, PYTHONPATH=str(tmp_path))
    version, name, file = done.stdout.split()
    assert (version, name) == ("9.9", "kernels.part"), done.stderr
    assert Path(file).parent == tmp_path / "kernels"


def test_our_folder_is_empty_where_nothing_else_is_named_kernels():
    """Libraries that look for a package `kernels` find one without content instead of a second copy of ours."""
    code = "import sys; sys.path[:] = [p for p in sys.path if 'site-packages' not in p]; import kernels\n"
    code += "print(hasattr(kernels, 'linear_scan'), 'torch' in sys.modules)"
    done = run_in_checkout(code)
    assert done.stdout.split() == ["False", "False"], done.stderr
