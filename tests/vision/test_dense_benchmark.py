import importlib.util
import json
import time
from pathlib import Path

import pytest

import omnissm

BENCHMARKS = Path(omnissm.__file__).parent / "benchmarks"


@pytest.fixture
def dense_train(monkeypatch):
    if not BENCHMARKS.is_dir():
        pytest.skip("installed without benchmarks")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("dense_train", BENCHMARKS / "dense_train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_new_row_takes_the_place_of_the_same_run(dense_train, tmp_path):
    path = tmp_path / "device" / "dense_training.json"
    runs = [("segment_wbc", 0, []), ("detect_bccd_fcos", 1, []), ("detect_bccd", 1, []), ("detect_bccd", 0, ["--x"])]
    for k, (config, seed, options) in enumerate([*runs, ("detect_bccd", 1, [])]):
        dense_train.add(
            path, {"commit": f"c{k // 2}"}, {"config": config, "seed": seed, "options": options, "map": k / 10}
        )
    content = json.loads(path.read_text())
    assert content["commit"] == "c2, c1, c0"
    assert [row["commit"] for row in content["rows"]] == ["c2", "c1", "c0", "c0"]
    assert [row["map"] for row in content["rows"]] == [0.4, 0.3, 0.1, 0.0]  # by configuration, options and seed


def test_a_run_that_is_not_done_in_time_is_named(dense_train, tmp_path, capsys):
    runs = dense_train.Runs(tmp_path, [None], time.monotonic() - 1, [])
    assert runs("segment_wbc", 7) is None
    assert "segment_wbc_7: not done in time" in capsys.readouterr().out
    assert runs.free.get_nowait() is None  # its place is free for the next one


def test_values_of_a_run_come_from_its_folder(dense_train, tmp_path):
    folder = tmp_path / "runs" / "detect_bccd_2"
    folder.mkdir(parents=True)
    found = {"metrics": {"val/map": 0.6123456, "val/map50": 0.9, "val/loss": 0.39}, "parameters": 5, "seed": 2}
    (folder / "metrics.json").write_text(json.dumps(found))
    (folder / "config.yaml").write_text("trainer: {max_epochs: 80}\n")
    row = dense_train.Runs(tmp_path, [None], 0.0, [])._read("detect_bccd_2")
    assert row == {"parameters": 5, "epochs": 80, "map": 0.61235, "map50": 0.9}
