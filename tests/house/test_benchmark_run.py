"""`benchmarks/run.py`: what it times and in what order, what it keeps, and what does not end it."""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch

from omnissm.kernels.testing import BenchSize


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    yield import_module("run")
    for name in ("run", "op_case", "op_peers", "tables"):
        sys.modules.pop(name, None)


@pytest.fixture
def small(run, monkeypatch):
    """`gated_norm` as the only op, at two small sizes."""
    sizes = BenchSize({"r": 4, "d": 8}, required_mib=3), BenchSize({"r": 2, "d": 4})
    offered = "reference", "chunked"
    spec = replace(run.read_specs()["gated_norm"], cpu_bench_sizes=sizes, implementations=offered)
    monkeypatch.setattr(run, "read_specs", lambda: {"gated_norm": spec})
    return spec


def rows(folder):
    (path,) = folder.glob("*/gated_norm.json")
    return json.loads(path.read_text())["rows"]


def test_paths_are_timed_and_kept(run, small, tmp_path, capsys):
    arguments = ["--device", "cpu", "--seconds", "0.001", "--commit", "abc", "--out", str(tmp_path)]
    assert run.main([*arguments, "--limit", "0"]) == 0
    assert "out of time, 4 steps are left" in capsys.readouterr().out
    assert run.main(arguments) == 0
    first = rows(tmp_path)
    assert [row["size"]["r"] for row in first] == [4] * 3 + [2] * 3
    timed = {row["path"]: row for row in first[:3]}
    assert set(timed) == {"chunked", "reference", "torch rms_norm"}
    assert timed["chunked"]["repeatable"] is True
    assert timed["chunked"]["required_mib"] == 3
    assert timed["chunked"]["forward_ms"]["p20"] <= timed["chunked"]["forward_ms"]["median"]
    assert run.main([*arguments, "--resume"]) == 0
    assert rows(tmp_path) == first
    changed = [*arguments[:5], "def", *arguments[6:]]
    assert run.main([*changed, "--resume"]) == 0
    assert rows(tmp_path) != first


def test_what_fails_is_a_row(run, small, tmp_path, monkeypatch):
    def failing(**_):
        raise RuntimeError("no such kernel")

    def wrong(x, **_):
        return torch.zeros_like(x)

    monkeypatch.setitem(import_module("op_case").PEERS, "gated_norm", {"failing": failing, "wrong": wrong})
    assert run.main(["--device", "cpu", "--seconds", "0.001", "--out", str(tmp_path)]) == 1
    found = {row["path"]: row for row in rows(tmp_path)}
    assert found["failing"]["wrong"] == "RuntimeError: no such kernel"
    assert "differs from the chunked path by 1.0e+00" in found["wrong"]["wrong"]
    assert "forward_ms" in found["chunked"]


def test_references_run_at_smaller_sizes(run):
    case, specs = import_module("op_case"), run.read_specs()
    size = {"b": 8, "l": 4096, "h": 32, "p": 64, "n": 128, "state": False}
    assert case.smaller(specs["ssd"], size) == ({**size, "b": 2, "l": 130},)
    grouped = {"b": 128, "i": 7, "j": 12, "d": 64, "n": 8, "g": 4}
    assert case.smaller(specs["selective_scan2d"], grouped) == ({**grouped, "b": 4},)
    assert case.smaller(specs["fft_conv"], {"b": 1, "l": 64, "c": 3, "k": 4096})[0]["k"] == 130
    for one in case.smaller(specs["dag_scan"], {"v": 65536, "e": 131072, "h": 8, "p": 64, "n": 64, "span": 4096}):
        assert one in specs["dag_scan"].test_sizes


def test_every_op_comes_once(run):
    specs = run.read_specs()
    assert set(run.ORDER) <= set(specs)
    assert len(set(run.ORDER)) == len(run.ORDER)


def test_tasks_are_done_once_and_slow_ones_first(run):
    specs = run.read_specs()
    tasks = run.tasks_of(specs, ["gated_norm", "grid_scan", "fft_conv"])
    assert len(set(tasks)) == len(tasks)
    assert tasks[0] == "first:grid_scan:0"
    assert [task for task in tasks if task.startswith("first:gated_norm")] == [
        "first:gated_norm:0",
        "first:gated_norm:1",
    ]
    assert not any(task.startswith("first:fft_conv") for task in tasks)  # not in Triton
    assert {"check:fft_conv:0:chunked", "check:gated_norm:0:chunked", "compiled:gated_norm:0"} <= set(tasks)


def test_what_was_found_beforehand_is_used(run):
    case, specs = import_module("op_case"), run.read_specs()
    ssd, gpu = specs["ssd"], torch.device("cuda")
    one = case.Case(ssd, ssd.bench_sizes[3], gpu)  # 784 positions, whose smaller size is that of 196
    run.tell(one, 3, {"check:ssd:2:triton": "`y` is off", "check:ssd:0:triton": None})
    assert one.checked == {"triton": "`y` is off"}
    assert one.find_error("triton", lambda **_: None, {}, {}) == "`y` is off"
    first = case.Case(ssd, ssd.bench_sizes[0], gpu)
    run.tell(first, 0, {"check:ssd:0:triton": None})
    assert first.checked == {"triton": None, case.COMPILED: "did not compile in time"}


def test_missed_limits(run):
    missed = run.missed
    row = {"path": "triton", "required_ms": [1.0, 3.0], "required_mib": 10, "peak_mib": 11.0}
    for name, forward, both in (("forward_ms", 1.5, 3.0), ("graph", 0.9, 2.9)):
        kind = "_graph_ms" if name == "graph" else "_ms"
        row |= {f"forward{kind}": {"median": forward}, f"forward_backward{kind}": {"median": both}}
    assert missed(row) == ["eager", "extra MiB"]
    assert missed(row | {"peak_mib": None, "forward_backward_graph_ms": {"median": 3.1}}) == ["graph", "eager"]
    assert missed(row | {"cold_s": 20.1}) == ["eager", "extra MiB", "first call"]
    assert missed(row | {"cold_s": 19.9}) == ["eager", "extra MiB"]
    assert missed(row | {"path": "chunked"}) == []
    assert missed({"path": "triton", "skipped": "no GPU"}) == []
