"""The protocol: every cell once, an interrupted run goes on, the table is that of the cells."""

import json

import numpy as np
import pandas as pd
import pytest
import yaml

from omnissm.__main__ import main
from omnissm.timeseries import metrics, protocol
from omnissm.timeseries.data import Synthetic

GRID = {
    "models": {
        "last_value": {},
        "rlinear": {"lr": 0.01},
        "rlinear_slow": {"model": "rlinear", "lr": 0.0001, "model_args": {}},
    },
    "data": {
        "sines": {
            "class_path": "omnissm.timeseries.data.Synthetic",
            "init_args": {"length": 400, "variate_count": 2},
        }
    },
    "horizons": [4, 8],
    "seeds": [0, 1],
    "training": {"lookback": 24, "max_epochs": 2},
    "published": {"rlinear": {"sines": {4: [0.5, 0.25]}}},
}

FOUND = {"mse": 1.0, "mae": 2.0, "seconds": 0.0}


def test_table_is_that_of_the_cells(tmp_path):
    table = protocol.run_protocol(GRID, tmp_path, progress=False)
    assert len(table) == 6
    assert (table["seeds"] == 2).all()
    cells = [json.loads(path.read_text()) for path in (tmp_path / "cells").iterdir()]
    assert len(cells) == 12
    own = [c["mse"] for c in cells if c["settings"]["label"] == "rlinear" and c["settings"]["horizon"] == 4]
    row = table.set_index(["model", "horizon"]).loc[("rlinear", 4)]
    assert row["mse"] == pytest.approx(np.mean(own))
    assert row["mse_std"] == pytest.approx(np.std(own, ddof=1))
    assert (row["published_mse"], row["published_mae"]) == (0.5, 0.25)
    assert np.isnan(table.set_index(["model", "horizon"]).loc[("last_value", 4), "published_mse"])
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "results.csv"), table, check_dtype=False)
    data = Synthetic(length=400, variate_count=2, lookback=24, horizon=4)
    data.setup()
    batch = next(data.windows("test").batches(1000))
    expected = metrics.mse(batch.y, batch.x[..., -1:])
    assert table.set_index(["model", "horizon"]).loc[("last_value", 4), "mse"] == pytest.approx(expected, rel=1e-6)


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    made = []

    def broken(cell):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(cell)
        return FOUND

    monkeypatch.setattr(protocol, "run_cell", broken)
    with pytest.raises(KeyboardInterrupt):
        protocol.run_protocol(GRID, tmp_path, progress=False)
    assert len(pd.read_csv(tmp_path / "results.csv")) == 2
    more = []
    monkeypatch.setattr(
        protocol, "run_cell", lambda cell: more.append(cell) or {"mse": 1.0, "mae": 2.0, "seconds": 0.0}
    )
    protocol.run_protocol(GRID, tmp_path, progress=False)
    assert len(made) + len(more) == 12
    assert not [cell for cell in more if cell in made]
    (damaged := next((tmp_path / "cells").iterdir())).write_text("{")
    protocol.run_protocol({**GRID, "training": {"lookback": 24, "max_epochs": 2}}, tmp_path, progress=False)
    assert json.loads(damaged.read_text())["mae"] == 2.0
    assert len(more) == 10
    protocol.run_protocol({**GRID, "training": {"lookback": 24, "max_epochs": 3}}, tmp_path, progress=False)
    assert len(more) == 22  # other settings are other cells


def test_verb(tmp_path, capsys):
    small = {**GRID, "models": {"last_value": None}, "seeds": [0], "horizons": [4]}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(small))
    words = ["timeseries", "protocol", "--grid", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    assert "last_value" in capsys.readouterr().out
    assert "last_value" in (tmp_path / "out" / "results.md").read_text()


def test_cases_and_places_of_a_model():
    own = {
        "lr": 0.1,
        "horizons": [8],
        "cases": [{"data": ["sines"], "lr": 0.2, "model_args": {"instance_norm": False}}],
    }
    models = {"rlinear": {"cases": [{"horizons": [4], "lr": 0.3}]}, "second": {"model": "rlinear", **own}}
    cells = protocol.cells(protocol.check_grid({**GRID, "models": models, "seeds": [0]}))
    found = {(cell["label"], cell["horizon"]): (cell["lr"], cell["model_args"]) for cell in cells}
    assert found == {
        ("rlinear", 4): (0.3, {}),
        ("rlinear", 8): (1e-3, {}),
        ("second", 8): (0.2, {"instance_norm": False}),
    }
    assert not {"cases", "horizons"} & set(cells[0])


def test_jobs_give_what_one_job_gives(tmp_path):
    """A cell that fails leaves the others alone."""
    grid = {**GRID, "models": {"last_value": {}, "rlinear": {}}, "horizons": [4], "seeds": [0]}
    one = protocol.run_protocol(grid, tmp_path / "one", progress=False)
    models = {"ridge": {"model_args": {"steps": 99}}, **grid["models"]}
    with pytest.raises(RuntimeError, match=r"1 of 3 cells failed; sines-4-ridge-0-\w+: expected steps from 1 to 24"):
        protocol.run_protocol({**grid, "models": models}, tmp_path / "two", jobs=2, progress=False)
    two = pd.read_csv(tmp_path / "two" / "results.csv")
    pd.testing.assert_frame_equal(
        one.drop(columns="seconds"), two.drop(columns="seconds"), rtol=1e-5, check_dtype=False
    )
    cells = json.loads((tmp_path / "two" / "results.json").read_text())
    assert [cell["settings"]["label"] for cell in cells] == ["last_value", "rlinear"]
    with pytest.raises(ValueError, match="jobs of at least 1"):
        protocol.run_protocol(grid, tmp_path, jobs=0)


def test_validation_alone(tmp_path):
    table = protocol.run_protocol({**GRID, "parts": ["val"], "models": {"last_value": {}}}, tmp_path, progress=False)
    assert table["mse"].isna().all()
    data = Synthetic(length=400, variate_count=2, lookback=24, horizon=4)
    data.setup()
    batch = next(data.windows("val").batches(1000))
    own = table[(table["model"] == "last_value") & (table["horizon"] == 4)]
    assert own["val_mse"].item() == pytest.approx(metrics.mse(batch.y, batch.x[..., -1:]), rel=1e-6)
    assert "Means over the horizons" in (tmp_path / "results.md").read_text()


def test_data_may_lie_elsewhere():
    source = {"class_path": "omnissm.timeseries.data.ETT", "init_args": {"root": "data/ett", "name": "ETTh1"}}
    cell = protocol.cells({**GRID, "data": {"ETTh1": source}})[0]
    moved = protocol._runnable(cell, "/elsewhere", "cpu")
    assert moved["source"]["init_args"] == {"root": "/elsewhere", "name": "ETTh1"}
    assert cell["source"] == source


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"rlinear": {"cases": [{"horizons": [5]}]}}}, "rlinear names the horizons 5"),
        ({"parts": ["train"]}, "unknown part 'train'"),
        ({"models": {"rliner": {}}}, "did you mean rlinear"),
        ({"seeds": []}, "the grid has no seeds"),
        ({"model": {}}, "unknown keys model"),
        ({"training": {"epochs": 3}}, "unknown setting 'epochs'"),
        ({"training": {"schedule": "step"}}, "unknown schedule 'step'"),
        ({"models": ["rlinear"]}, "models of the grid must be a mapping"),
        ({"models": {"rlinear": 3}}, "model rlinear of the grid must be a mapping"),
        ({"models": {"rlinear": {"horizons": 4}}}, "the horizons of rlinear must be a list"),
        ({"seeds": 3}, "seeds of the grid must be a list of different whole numbers"),
        ({"seeds": [0, 0]}, "seeds of the grid must be a list of different whole numbers"),
        ({"horizons": ["a"]}, "horizons of the grid must be a list"),
        ({"data": {"s": 3}}, "data s of the grid must be a mapping"),
        ({"data": {"s": {"class_path": "omnissm.timeseries.data.Sinthetic"}}}, "class_path .*Sinthetic', which there"),
        ({"data": {"s": {**GRID["data"]["sines"], "init_args": {"lenght": 9}}}}, "data s of the grid: .*'lenght'"),
        ({"published": {"rlinear": {"sines": {4: [1]}}}}, r"expected \[mse, mae\], got \[1\]"),
    ],
)
def test_says_what_is_wrong(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        protocol.run_protocol({**GRID, **change}, tmp_path, progress=False)


def test_verb_says_what_is_wrong(tmp_path, capsys):
    words = ["timeseries", "protocol", "--grid", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "out")]
    (tmp_path / "grid.yaml").write_text("- 1\n")
    assert main(words) == 2
    assert "a grid is a mapping" in capsys.readouterr().err
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(GRID))
    assert main([*words, "--table_only", "true"]) == 2
    assert "holds no cells" in capsys.readouterr().err


def test_names_with_slashes_stay_in_the_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(protocol, "run_cell", lambda cell: FOUND)
    grid = {**GRID, "models": {"../a/b": {"model": "last_value"}}, "horizons": [4], "seeds": [0]}
    assert protocol.run_protocol(grid, tmp_path / "run", progress=False)["seeds"].tolist() == [1, 0]
    assert [path.parent.name for path in tmp_path.rglob("*b-0-*.json")] == ["cells"]
