"""Benchmarks told something wrong say so in one line; faults of their own keep the traceback."""

import sys
from pathlib import Path
from runpy import run_path

import pytest
import torch

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["timeseries.py", "coverage"], "coverage needs --run FOLDER"),
        (["timeseries.py", "nab", "--root", "nowhere"], "nowhere/nyc_taxi.csv does not exist"),
        (["dense_train.py", "--data", "nowhere"], "--data nowhere is no folder"),
        (["genomics_train.py", "dnahnet_smal", "--data", ".", "--out", "o"], "invalid choice: 'dnahnet_smal'"),
        (["core.py", "--device", "cuda", "--out", "o"], "no CUDA device"),
        (["vision.py", "plot", "--file", "nowhere.json"], "there is no nowhere.json; measure first"),
        (["vision.py", "--models", "hydra_vit_tini", "--device", "cpu", "--out", "o"], "hydra_vit_tini"),
        (["run.py", "--op", "gated_norm", "--device", "cpu", "--base", "nowhere.json"], "No such file"),
        (["table.py", "--chek"], "unrecognized arguments: --chek"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_wrong_argument_gets_one_line(words, answer, tmp_path, monkeypatch, capfd):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("this machine has the device")
    monkeypatch.chdir(tmp_path)
    script = BENCHMARKS / words[0]
    monkeypatch.setattr(
        sys, "argv", [str(script), *words[1:], *(["--out", "o"] if words[0] == "timeseries.py" else [])]
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit) as stop:
        run_path(str(script), run_name="__main__")
    assert stop.value.code == 2
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"{words[0]}: error: ")
    assert answer in last


def test_fault_of_a_benchmark_keeps_its_traceback(monkeypatch):
    leave = run_path(str(BENCHMARKS / "command.py"))["leave"]
    with pytest.raises(KeyError):
        leave(lambda: {}["row"])
    with pytest.raises(SystemExit) as stop:
        leave(lambda: None)
    assert stop.value.code is None
