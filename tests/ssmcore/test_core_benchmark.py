"""`benchmarks/core.py`: a file that grows row by row, goes on after a stop, and few runs of what takes long."""

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import core

    monkeypatch.setattr(core.gc, "collect", lambda: 0)  # a second each beside what other tests have loaded
    yield core
    for name in ("core", "run"):
        sys.modules.pop(name, None)


def test_goes_on_after_a_stop(script, tmp_path, monkeypatch, capsys):
    measured, broken = [], []

    def cases(jobs, *_):
        def measure(job, batch):
            if broken and batch == 2:
                raise KeyboardInterrupt
            measured.append((job, batch))
            return {"step_ms": {"median": 1.5}, **({"wrong": "far off"} if batch == 3 else {})}

        for job in jobs:
            for batch in (1, 2):
                yield {"job": job, "batch": batch}, lambda job=job, batch=batch: measure(job, batch)
        if "mixers" in jobs:
            yield {"job": "mixers", "batch": 3}, lambda: measure("mixers", 3)

    monkeypatch.setattr(script, "cases", cases)
    words = ["--device", "cpu", "--seconds", "0.01", "--out", str(tmp_path), "--commit", "abc"]

    def rows():
        (path,) = tmp_path.glob("*/core.json")
        return [(row["job"], row["batch"]) for row in json.loads(path.read_text())["rows"]]

    broken.append(True)
    with pytest.raises(KeyboardInterrupt):
        script.main([*words, "--jobs", "training"])
    assert rows() == [("training", 1)]
    broken.clear()
    assert script.main([*words, "--jobs", "training", "decoding"]) == 0
    assert rows() == measured == [(job, batch) for job in ("training", "decoding") for batch in (1, 2)]
    assert script.main(words) == 1  # a wrong result
    assert len(measured) == len(set(measured)) == 9
    assert script.main([*words[:-1], "def", "--jobs", "training"]) == 0  # rows of other code are not kept
    assert rows() == [("training", 1), ("training", 2)]
    assert "'step_ms': {'median': 1.5}" in capsys.readouterr().out


def test_long_runs_are_repeated_twice(script, monkeypatch):
    """By a clock of its own: a run takes six seconds, or two milliseconds."""
    clock, count = [0.0], [0]
    monkeypatch.setattr(script.time, "process_time", lambda: clock[0])

    def run(seconds):
        clock[0] += seconds
        count[0] += 1

    timer = script.PatientTimer(torch.device("cpu"), 1.0)
    assert timer(lambda: run(6.0)) == {"median": 6000.0, "p20": 6000.0, "p80": 6000.0, "runs": 2}
    assert count == [3]
    assert timer(lambda: run(0.002)) == {"median": 2.0, "p20": 2.0, "p80": 2.0, "runs": 200}
