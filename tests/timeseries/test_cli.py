"""The verbs end to end, and one line with exit code 2 for everything a user can get wrong."""

import errno
import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from omnissm.__main__ import main
from omnissm.timeseries import Forecaster, evaluate
from omnissm.timeseries.files import read_series, write_series
from omnissm.timeseries.forecast import run_data
from omnissm.timeseries.frames import from_long

LOOKBACK, HORIZON, STEPS = 24, 4, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """series.nc, table.csv (the same, wide), long.csv, and a trained model."""
    path = tmp_path_factory.mktemp("verbs")
    rng = np.random.default_rng(0)
    hours = np.arange(STEPS)[:, None]
    values = np.sin(hours * 2 * np.pi / 24 + np.array([0.0, 1.0])) * [1.0, 50.0] + 0.05 * rng.normal(size=(STEPS, 2))
    values[30:33, 1] = np.nan
    times = pd.date_range("2024-01-01", periods=STEPS, freq="h")
    coords = {"time": times, "variate": ["a", "b"]}
    ds = xr.Dataset({"target": (("time", "variate"), values.astype(np.float32))}, coords, {"freq": "h"})
    write_series(ds, path / "series.nc")
    frame = pd.DataFrame(ds["target"].values, columns=["a", "b"], index=pd.Index(times, name="when")).reset_index()
    frame.to_csv(path / "table.csv", index=False)
    frame.melt("when", var_name="name", value_name="y").to_csv(path / "long.csv", index=False)
    Forecaster("ridge", LOOKBACK, HORIZON, model_args={"steps": 12}).fit(ds, coverages=(0.8,)).save(path / "model")
    return path


def run(*words: object) -> int:
    return main(["timeseries", *map(str, words)])


def bad(capsys, *words: object) -> str:
    """The one line that a refused command prints."""
    assert run(*words) == 2
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert out == ""
    return lines[0]


def test_forecast_writes_what_the_api_says(folder, tmp_path, capsys):
    out = tmp_path / "f.nc"
    assert run("forecast", "--checkpoint", folder / "model", "--data", folder / "series.nc", "--out", out) == 0
    assert capsys.readouterr().out == f"{out}\n"
    expected = Forecaster.load(folder / "model").predict(read_series(folder / "series.nc"))
    with read_series(out) as written:
        xr.testing.assert_identical(written.load(), expected)


def test_forecast_to_stdout_is_csv_alone(folder, capsys):
    code = run(
        *("forecast", "--checkpoint", folder / "model", "--data", folder / "long.csv", "--out", "-"),
        *("--time", "when", "--ids", "variates", "--id_column", "name", "--horizon", 6),
    )
    assert code == 0
    frame = pd.read_csv(io.StringIO(capsys.readouterr().out), parse_dates=["ds", "cutoff"])
    assert list(frame.columns) == ["unique_id", "ds", "cutoff", "ridge"]
    assert frame.groupby("unique_id").size().to_dict() == {"a": 6, "b": 6}
    assert frame["ds"].min() == pd.Timestamp("2024-01-01") + pd.Timedelta(hours=STEPS)


@pytest.fixture(scope="module")
def driven(tmp_path_factory):
    """A model that reads the covariate known in advance `plan`, and its data as files; the covariate runs further."""
    path = tmp_path_factory.mktemp("driven")
    rng = np.random.default_rng(1)
    times = pd.date_range("2024-01-01", periods=STEPS + HORIZON, freq="h")
    plan = rng.normal(size=len(times)).astype(np.float32)
    frame = pd.DataFrame({"unique_id": "s", "ds": times, "y": 2 * plan, "plan": plan})
    frame.head(STEPS).to_csv(path / "long.csv", index=False)
    frame.assign(y=frame["y"].where(frame.index < STEPS)).to_csv(path / "longer.csv", index=False)
    rest = frame.tail(HORIZON)
    rest[["ds", "plan"]].to_csv(path / "wide_plan.csv", index=False)
    rest[["unique_id", "ds", "plan"]].to_csv(path / "long_plan.csv", index=False)
    ds = from_long(frame.head(STEPS), ids="series", future=["plan"])
    known = from_long(frame.assign(y=0.0), ids="series", future=["plan"])[["future"]]
    write_series(ds, path / "series.nc")
    write_series(known, path / "plan.nc")
    args = {"d_model": 8, "patch_len": 6, "stride": 6}
    model = Forecaster("chimera_tiny", LOOKBACK, HORIZON, model_args=args, accelerator="cpu")
    model.fit(ds, max_epochs=1, coverages=None, progress=False)
    with torch.no_grad():
        model.net.known_future.weight.add_(0.5)
    model.save(path / "model")
    model.predict(future=known).to_netcdf(path / "expected.nc", engine="h5netcdf")
    return path


@pytest.mark.parametrize(
    ("data", "plan", "table"),
    [
        ("long.csv", "long_plan.csv", ("--time", "ds", "--ids", "series")),
        ("longer.csv", None, ("--time", "ds", "--ids", "series")),
        ("series.nc", "wide_plan.csv", ("--time", "ds")),
        ("series.nc", "plan.nc", ()),
    ],
)
def test_forecast_with_covariates_known_in_advance(driven, tmp_path, data, plan, table):
    out = tmp_path / "f.nc"
    future = ("--future", driven / plan) if plan else ()
    words = ("--checkpoint", driven / "model", "--data", driven / data, *future, *table, "--out", out)
    assert run("forecast", *words) == 0
    with read_series(out) as written, xr.open_dataset(driven / "expected.nc", engine="h5netcdf") as expected:
        np.testing.assert_allclose(written["mean"], expected["mean"], rtol=1e-5)


def test_covariates_that_do_not_fit(folder, driven, tmp_path, capsys):
    words = ("--data", folder / "series.nc", "--future", driven / "plan.nc", "--out", tmp_path / "f.nc")
    assert "this ridge reads no covariates known in adv" in bad(
        capsys, "forecast", "--checkpoint", folder / "model", *words
    )
    words = ("--checkpoint", driven / "model", "--data", driven / "series.nc", "--out", tmp_path / "f.nc")
    assert "covariates are missing at 4 times" in bad(capsys, "forecast", *words)
    other = ("--future", folder / "table.csv", "--time", "when")
    assert "no column 'plan'" in bad(capsys, "forecast", *words, *other)
    assert "no variable 'future', only target" in bad(capsys, "forecast", *words, "--future", folder / "series.nc")


def test_backtest_evaluate_and_plot(folder, tmp_path, capsys):
    out = tmp_path / "bt.nc"
    words = ("--data", folder / "table.csv", "--time", "when", "--start", "2024-01-08", "--stride", 3, "--out", out)
    assert run("backtest", "--checkpoint", folder / "model", *words) == 0
    text = capsys.readouterr().out
    assert "ridge: 10 cutoffs x 1 series x 4 steps" in text
    assert text.splitlines()[0] == str(out)
    metrics = tmp_path / "m.csv"
    options = ("--metrics", "[mae_units,coverage,mase]", "--by", "[variate,horizon]", "--out", metrics)
    assert run("evaluate", "--forecast", out, *options) == 0
    table = pd.read_csv(metrics)
    assert list(table.columns) == ["horizon", "variate", "mae_units", "coverage", "mase"]
    with read_series(out) as written:
        error = np.abs(written["target"] - written["mean"]).sel(variate="b", horizon=2).mean()
    row = table[(table["variate"] == "b") & (table["horizon"] == 2)]
    assert row["mae_units"].item() == pytest.approx(float(error), rel=1e-5)
    assert run("evaluate", "--forecast", out, "--by", "[]", "--out", tmp_path / "m.md") == 0
    assert (tmp_path / "m.md").read_text().startswith("| mse | mae |")
    pytest.importorskip("matplotlib")
    for kind in ("auto", "error_by_horizon", "error_map", "calibration", "residuals"):
        assert run("plot", "--data", out, "--kind", kind, "--out", tmp_path / f"{kind}.png") == 0
        assert (tmp_path / f"{kind}.png").stat().st_size > 5000


def test_plot_of_forecast_and_series(folder, tmp_path):
    pytest.importorskip("matplotlib")
    run("forecast", "--checkpoint", folder / "model", "--data", folder / "series.nc", "--out", tmp_path / "f.nc")
    words = ("--history", folder / "series.nc", "--out", tmp_path / "f.svg")
    assert run("plot", "--data", tmp_path / "f.nc", *words) == 0
    assert run("plot", "--data", folder / "series.nc", "--out", tmp_path / "m.pdf") == 0
    assert (tmp_path / "f.svg").read_text().lstrip().startswith("<?xml")


def test_describe(folder, tmp_path, capsys):
    assert run("describe", "--data", folder / "table.csv", "--time", "when", "--out", tmp_path / "d.csv") == 0
    text = capsys.readouterr().out
    assert "suggested season    24" in text
    assert "freq                h" in text
    table = pd.read_csv(tmp_path / "d.csv").set_index("variate")
    assert table.loc["b", "longest_gap"] == 3
    assert table.loc["b", "missing"] == pytest.approx(3 / STEPS)
    assert table.loc["a", "outliers"] == 0


@pytest.mark.parametrize("verb", ["forecast", "backtest", "evaluate", "describe", "plot"])
def test_help_shows_defaults_and_an_example(verb, capsys):
    assert run(verb, "--help") == 0
    text = capsys.readouterr().out
    assert "default:" in text
    assert f"omnissm timeseries {verb} --" in text.split("example:")[1]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f.iloc[::-1], "not sorted"),
        (lambda f: pd.concat([f.iloc[:3], f.iloc[2:]]), "Duplicate time 2024-01-01 02:00 at row 3"),
        (lambda f: f.assign(a="text"), "expected numbers"),
        (lambda f: f.assign(b=np.nan), "Variate b has no observed value"),
        (lambda f: f.assign(a=np.where(f.index == 5, np.inf, f["a"])), "in variate a at 2024-01-01 05:00"),
        (lambda f: f.head(10), "looks back 24 steps, the series has 10"),
        (lambda f: f.drop(index=50), "trained on data of freq 'h', got irregular times"),
        (lambda f: f.drop(columns="b"), "trained on the variate 'b'"),
        (lambda f: f.rename(columns={"when": "time"}), "no column 'when'"),
    ],
)
def test_bad_tables(folder, tmp_path, capsys, edit, message):
    edit(pd.read_csv(folder / "table.csv")).to_csv(tmp_path / "bad.csv", index=False)
    words = ("--data", tmp_path / "bad.csv", "--time", "when", "--out", tmp_path / "f.nc")
    assert message in bad(capsys, "forecast", "--checkpoint", folder / "model", *words)
    assert not (tmp_path / "f.nc").exists()


def test_wrong_frequency(folder, capsys):
    line = bad(capsys, "describe", "--data", folder / "table.csv", "--time", "when", "--freq", "D")
    assert "do not follow freq 'D': after 2024-01-01" in line


def test_unreadable_files(folder, tmp_path, capsys):
    whole = (folder / "series.nc").read_bytes()
    (tmp_path / "cut.nc").write_bytes(whole[: len(whole) // 2])
    assert "cut.nc" in bad(capsys, "describe", "--data", tmp_path / "cut.nc")
    assert "does not exist" in bad(capsys, "describe", "--data", tmp_path / "none.nc")
    assert ".csv, .parquet, .nc, .zarr" in bad(capsys, "describe", "--data", folder / "model" / "README.md")
    assert "name its column of times" in bad(capsys, "describe", "--data", folder / "table.csv")
    assert "no model at" in bad(capsys, "forecast", "--checkpoint", "nowhere", "--data", folder / "series.nc")
    assert "no dimension 'cutoff'" in bad(capsys, "evaluate", "--forecast", folder / "series.nc")


def test_bad_options(folder, capsys):
    model, data = ("--checkpoint", folder / "model"), ("--data", folder / "series.nc")
    assert "Did you mean '--stride'" in bad(capsys, "backtest", *model, *data, "--stirde", 3)
    assert "expected a name ending in .nc" in bad(capsys, "forecast", *model, *data, "--out", "f.txt")
    assert "no cutoff has 24 steps before" in bad(capsys, "backtest", *model, *data, "--start", "2025-01-01")
    assert "no config.yaml" in bad(capsys, "backtest", *model)
    assert "of which there is no plot 'error_map'" in bad(capsys, "plot", *data, "--kind", "error_map")


def test_unknown_metric(folder, tmp_path, capsys):
    out = tmp_path / "bt.nc"
    words = ("--data", folder / "series.nc", "--start", 180, "--out", out)
    assert run("backtest", "--checkpoint", folder / "model", *words) == 0
    capsys.readouterr()
    assert "unknown metric 'mes'; did you mean mse" in bad(capsys, "evaluate", "--forecast", out, "--metrics", "[mes]")


def test_full_disk_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    def full(self, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(xr.Dataset, "to_netcdf", full)
    words = ("--data", folder / "series.nc", "--out", tmp_path / "f.nc")
    assert "No space left on device" in bad(capsys, "forecast", "--checkpoint", folder / "model", *words)
    assert list(tmp_path.iterdir()) == []


def test_damaged_model(folder, tmp_path, capsys):
    import shutil

    shutil.copytree(folder / "model", tmp_path / "model")
    (tmp_path / "model" / "data.json").write_text("{")
    line = bad(capsys, "forecast", "--checkpoint", tmp_path / "model", "--data", folder / "series.nc")
    assert "data.json is damaged" in line


def test_a_run_from_fit_to_backtest(tmp_path, monkeypatch, capsys):
    """fit and test through the trainer, then the verbs on the run's folder and its checkpoint."""
    monkeypatch.chdir(tmp_path)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}}
    data = {"kind": "sines", "lookback": 24, "horizon": 4, "length": 300, "eval_batch_size": 64}
    config = {
        "model": {
            "class_path": "omnissm.timeseries.tasks.Forecasting",
            "init_args": {"model": "rlinear", "optimizer": optimizer},
        },
        "data": {"class_path": "omnissm.timeseries.data.Synthetic", "init_args": data},
        "trainer": {"max_epochs": 1, "accelerator": "cpu"},
    }
    (tmp_path / "small.yaml").write_text(json.dumps(config))
    assert run("fit", "-c", "small.yaml") == 0
    assert run("test", "-c", "small.yaml") == 0
    measured = json.loads((tmp_path / "runs" / "small" / "metrics.json").read_text())
    assert run("backtest", "--checkpoint", "runs/small", "--out", "bt.nc") == 0  # the data and test part of the run
    with read_series(tmp_path / "bt.nc") as written:
        whole = written.load()
    assert whole.attrs["intervals"] == "split conformal"  # from the validation of the run
    errors = evaluate(whole, ("mse", "mae"), ())
    for name in ("mse", "mae"):
        assert find(measured, f"test/{name}") == pytest.approx(float(errors[name]), rel=1e-4)
    capsys.readouterr()
    assert "no config.yaml" in bad(capsys, "backtest", "--checkpoint", "runs/small/checkpoints/best.ckpt")
    write_series(run_data("runs/small")[0], tmp_path / "data.nc")
    words = ("--data", "data.nc", "--start", whole["valid_time"].values[0, 0], "--out", "again.nc")
    assert run("backtest", "--checkpoint", "runs/small/checkpoints/best.ckpt", *words) == 0
    with read_series(tmp_path / "again.nc") as again:
        np.testing.assert_allclose(again["mean"], whole["mean"], rtol=1e-5)


def find(tree, key):
    """The value of a key anywhere in nested dictionaries."""
    if key in tree:
        return tree[key]
    return next((found for part in tree.values() if isinstance(part, dict) and (found := find(part, key))), None)
