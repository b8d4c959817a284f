"""What an import costs: no package loads what it does not need, seen from a fresh process."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ["pytorch_lightning", "torchvision", "timm", "xarray", "Bio", "pandas", "matplotlib", "jsonargparse", "triton"]
# Package -> heavy modules that importing it may load.
ALLOWED = {
    "kernels": [],
    "ssmcore": [],
    "vision": ["torchvision", "timm", "triton"],
    "genomics": ["Bio"],
    "timeseries": ["xarray", "pandas"],
    "graphs": [],
}


def run(code: str, *options: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ALLOWED)
def test_import_loads_no_more_than_it_may(package):
    out = run(f"import sys, omnissm.{package}; print([name for name in {HEAVY} if name in sys.modules])", "-P")
    assert set(eval(out)) <= set(ALLOWED[package]), out


def test_the_root_loads_no_subpackage():
    out = run("import sys, omnissm; print([n for n in sys.modules if n.startswith('omnissm.') or n == 'torch'])", "-P")
    assert out.strip() == "[]"


@pytest.mark.parametrize("words", [["--help"], ["timeseries", "--help"], ["--version"]], ids=" ".join)
def test_help_loads_no_torch(words):
    code = f"""
import sys
from omnissm.__main__ import main
try:
    code = main({words})
except SystemExit as end:
    code = end.code
print("exit", code or 0, "torch" in sys.modules)
"""
    assert run(code, "-P").splitlines()[-1] == "exit 0 False"


def test_modules_of_one_name_are_loaded_once():
    """Starting in the checkout must not give a second copy of the package under another name."""
    code = "import sys, omnissm.kernels; print([n for n in sys.modules if n.split('.')[0] in ('kernels', 'ssmcore')])"
    assert run(code, cwd=ROOT).strip() == "[]"
