"""Forecaster end to end on a small set: fit, predict, backtest, intervals, save and load, and what it refuses."""

import subprocess
import sys
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from omnissm.timeseries import Forecaster, backtest, evaluate, forecast
from omnissm.timeseries.files import read_series, write_series
from omnissm.timeseries.inputs import forecast_to_long

LOOKBACK, HORIZON, STEPS = 36, 6, 400


def make(steps: int = STEPS, series: int = 2, missing: float = 0.05) -> xr.Dataset:
    """Hourly sines of two units and scales with noise and gaps."""
    rng = np.random.default_rng(0)
    hours = np.arange(steps)[None, :, None]
    phase = rng.uniform(0, 6, (series, 1, 2))
    values = np.array([10.0, 500.0]) * (
        np.sin(hours * 2 * np.pi / 12 + phase) + 0.2 * rng.normal(size=(series, steps, 2))
    )
    values += np.array([20.0, 1000.0])
    values[rng.random(values.shape) < missing] = np.nan
    coords = {
        "series": [f"s{k}" for k in range(series)],
        "time": pd.date_range("2024-01-01", periods=steps, freq="h"),
        "variate": ["temp", "load"],
        "units": ("variate", ["degC", "kW"]),
    }
    return xr.Dataset({"target": (("series", "time", "variate"), values.astype(np.float32))}, coords, {"freq": "h"})


@pytest.fixture(scope="module")
def data():
    return make()


@pytest.fixture(scope="module")
def fitted(data):
    return Forecaster("rlinear", LOOKBACK, HORIZON, accelerator="cpu").fit(data, max_epochs=4, lr=0.01, progress=False)


def test_fit_learns_and_keeps_the_best_epoch(data, fitted):
    history = fitted.history
    assert list(history["epoch"]) == list(range(len(history)))
    assert {"train_loss", "val_loss", "val_mse", "val_mae", "seconds"} <= set(history)
    assert history["val_mse"].min() < 0.3  # the variance is 1, the noise 0.08
    own = fitted.backtest(start=int(0.8 * STEPS), progress=False)
    assert float(evaluate(own, ("mse",), ())["mse"]) == pytest.approx(history["val_mse"].min(), rel=1e-4)


def test_same_seed_same_forecaster(data, fitted):
    again = Forecaster("rlinear", LOOKBACK, HORIZON, accelerator="cpu")
    again.fit(data, max_epochs=4, lr=0.01, progress=False)
    xr.testing.assert_identical(again.predict(), fitted.predict())


def test_forecast_layout(data, fitted):
    result = fitted.predict()
    assert dict(result.sizes) == {"series": 2, "cutoff": 1, "horizon": HORIZON, "variate": 2, "quantile": 7}
    assert result["cutoff"].values[0] == data["time"].values[-1]
    steps = (result["valid_time"].values[0] - result["cutoff"].values[0]) / np.timedelta64(1, "h")
    assert steps.tolist() == [1, 2, 3, 4, 5, 6]
    assert result["units"].values.tolist() == ["degC", "kW"]
    assert result.attrs["model"] == "rlinear"
    assert result.attrs["rollout"] == "direct"
    assert "target" not in result  # nobody knows it yet
    assert (np.diff(result["quantiles"].values, axis=-1) >= 0).all()
    np.testing.assert_allclose(result["quantiles"].sel(quantile=0.5), result["mean"], rtol=1e-6)
    assert abs(float(result["mean"].sel(variate="load").mean()) - 1000) < 300  # original units


@pytest.mark.parametrize("name", ["f.nc", "f.zarr"])
def test_forecast_survives_files(tmp_path, fitted, name):
    result = fitted.backtest(start=390, progress=False)
    write_series(result, tmp_path / name)
    with read_series(tmp_path / name) as back:
        xr.testing.assert_identical(back.load(), result)


def test_save_and_load(tmp_path, data, fitted):
    loaded = Forecaster.load(fitted.save(tmp_path / "model"))
    xr.testing.assert_identical(loaded.predict(data), fitted.predict(data))
    xr.testing.assert_identical(forecast(tmp_path / "model", data), fitted.predict(data))
    with pytest.raises(ValueError, match="holds no data; pass the series"):
        loaded.predict()


def test_backtest_is_what_predict_would_have_said(data, fitted):
    result = fitted.backtest(data, start=350, stride=7, progress=False)
    assert result.sizes["cutoff"] == len(range(349, STEPS - HORIZON, 7))
    for k in (0, 3):
        cutoff = result["cutoff"].values[k]
        alone = fitted.predict(data.sel(time=slice(None, cutoff)))
        np.testing.assert_allclose(result["mean"][:, k], alone["mean"][:, 0], rtol=1e-4)
        np.testing.assert_allclose(result["quantiles"][:, k], alone["quantiles"][:, 0], rtol=1e-4)
        truth = data["target"].sel(time=result["valid_time"][k].values)
        np.testing.assert_array_equal(result["target"][:, k], truth)
        np.testing.assert_array_equal(result["observed"][:, k], np.isfinite(truth))


def test_backtest_does_not_see_the_future(data, fitted):
    result = fitted.backtest(data, start=350, stride=7, progress=False)
    changed = data.copy(deep=True)
    changed["target"].loc[{"time": slice(result["valid_time"].values[2, 0], None)}] = 7.0
    other = fitted.backtest(changed, start=350, stride=7, progress=False)
    np.testing.assert_array_equal(other["mean"][:, :3], result["mean"][:, :3])
    assert not np.array_equal(other["mean"][:, 4], result["mean"][:, 4])


@pytest.mark.parametrize(
    "start", ["2024-01-15 00:00", datetime(2024, 1, 15), date(2024, 1, 15), 336, np.int32(336), 336 / STEPS]
)
def test_backtest_start_in_three_ways(data, fitted, start):
    result = fitted.backtest(data, start=start, progress=False)
    assert result["valid_time"].values[0, 0] == np.datetime64("2024-01-15T00:00")


def test_backtest_start_counts_as_splits_do(data, fitted):
    hundred = data.isel(time=slice(0, 100))  # 0.58 * 100 is 57.999...
    assert fitted.backtest(hundred, start=0.58, progress=False)["valid_time"].values[0, 0] == data["time"].values[58]
    assert fitted.backtest(data, start=np.float32(0.5), progress=False)["cutoff"].values[0] == data["time"].values[199]
    with pytest.raises(ValueError, match=r"start=2\.5 is a fraction"):
        fitted.backtest(data, start=2.5)
    with pytest.raises(ValueError, match="start=-3 must not be negative"):
        fitted.backtest(data, start=-3)
    with pytest.raises(TypeError, match="start is list"):
        fitted.backtest(data, start=[3])


def test_backtest_without_start_begins_after_the_first_lookback(data, fitted):
    result = backtest(fitted, data, stride=50, progress=False)
    assert result["cutoff"].values[0] == data["time"].values[LOOKBACK - 1]


def test_refit_trains_on_everything_before_the_cutoff(data):
    model = Forecaster("ridge", LOOKBACK, HORIZON).fit(data.isel(time=slice(0, 300)), coverages=None)
    result = model.backtest(data, start=380, stride=4, refit=2, progress=False)
    assert result.attrs["refit"] == 2
    for k in (0, 2):
        upto = data.sel(time=slice(None, result["cutoff"].values[k]))
        anew = Forecaster("ridge", LOOKBACK, HORIZON).fit(upto, coverages=None)
        np.testing.assert_allclose(result["mean"][:, k], anew.predict()["mean"][:, 0], rtol=1e-4)
    first = Forecaster("ridge", LOOKBACK, HORIZON).fit(
        data.sel(time=slice(None, result["cutoff"].values[0])), coverages=None
    )
    kept = first.predict(data.sel(time=slice(None, result["cutoff"].values[1])))
    np.testing.assert_allclose(result["mean"][:, 1], kept["mean"][:, 0], rtol=1e-4)


def test_longer_horizons_feed_the_forecast_back(data, fitted):
    result = fitted.predict(data, horizon=15)
    assert result.sizes["horizon"] == 15
    assert "fed back in blocks of 6" in result.attrs["rollout"]
    assert "quantiles" not in result  # the radii are those of the trained horizon
    direct = fitted.predict(data)
    np.testing.assert_allclose(result["mean"][:, :, :HORIZON], direct["mean"], rtol=1e-5)
    longer = np.concatenate([data["target"].values, direct["mean"].values[:, 0]], axis=1)
    times = pd.date_range("2024-01-01", periods=longer.shape[1], freq="h")
    fed = data.drop_dims("time").assign_coords(time=times).assign(target=(("series", "time", "variate"), longer))
    np.testing.assert_allclose(result["mean"][:, 0, 6:12], fitted.predict(fed)["mean"][:, 0], rtol=1e-3)
    short = fitted.predict(data, horizon=2)
    np.testing.assert_allclose(short["mean"], direct["mean"][:, :, :2], rtol=1e-5)


def test_conformal_intervals_cover(data):
    model = Forecaster("ridge", LOOKBACK, HORIZON).fit(data, val=0.4, coverages=(0.5, 0.9))
    rest = make(800).isel(time=slice(360, None))  # the same signals go on
    result = model.backtest(rest, start=100, progress=False)
    inner = result["quantiles"].sel(quantile=[0.25, 0.75])
    for quantiles, coverage in ((inner, 0.5), (result["quantiles"].sel(quantile=[0.05, 0.95]), 0.9)):
        inside = (result["target"] >= quantiles[..., 0]) & (result["target"] <= quantiles[..., 1])
        assert float(inside.where(result["observed"]).mean()) == pytest.approx(coverage, abs=0.06)
    assert float(evaluate(result, ("coverage",), ())["coverage"]) == pytest.approx(0.9, abs=0.06)


def test_calibrate_sets_the_intervals_of_a_loaded_model(tmp_path, data):
    model = Forecaster("ridge", LOOKBACK, HORIZON).fit(data.isel(time=slice(0, 250)), val=None)
    assert model.intervals is None
    with pytest.raises(ValueError, match="intervals were asked for and this forecaster has none"):
        model.predict(data, intervals=True)
    loaded = Forecaster.load(model.save(tmp_path / "m")).calibrate(data.isel(time=slice(250, None)), (0.8,))
    assert loaded.predict(data)["quantile"].values.tolist() == [0.1, 0.5, 0.9]
    with pytest.raises(ValueError, match="needs at least 1000 validation residuals"):
        loaded.calibrate(data, (0.999,))


def test_coverages_that_lack_residuals(data, monkeypatch):
    """By default they are left out with a warning; those that were asked for are refused before any training."""
    short = data.isel(series=[0], time=slice(0, 150))  # 30 validation steps, 25 windows
    with pytest.warns(UserWarning, match="coverage 0.95 needs at least 20 validation residuals") as caught:
        model = Forecaster("ridge", 24, 12).fit(short)
    assert [Path(each.filename).name for each in caught] == ["test_forecaster.py"]
    assert model.intervals["coverages"] == [0.5, 0.8]
    with pytest.warns(UserWarning, match="left out"):
        assert Forecaster("ridge", 24, 12).fit(short, val=12).intervals is None
    monkeypatch.setattr("omnissm.timeseries.fitting.train", lambda *_, **__: pytest.fail("trained first"))
    for coverages, message in (((0.95,), "needs at least 20"), ((95,), r"inside \(0, 1\)")):
        with pytest.raises(ValueError, match=message):
            Forecaster("rlinear", 24, 12).fit(short, coverages=coverages)
    with pytest.raises(ValueError, match="at least one coverage, got none"):
        model.calibrate(short, ())


def test_refits_keep_the_intervals_that_all_have(data):
    one = data.isel(series=[0])
    model = Forecaster("ridge", 24, 12).fit(one)
    with pytest.warns(UserWarning, match="left out"):
        result = model.backtest(start=150, stride=100, refit=1, progress=False)
    assert result["quantile"].values.tolist() == [0.1, 0.25, 0.5, 0.75, 0.9]
    assert np.isfinite(result["quantiles"]).all()
    with pytest.warns(UserWarning, match="left out"):
        assert "quantiles" not in model.backtest(start=60, stride=100, refit=1, progress=False)


def test_quantile_model(data):
    model = Forecaster("rlinear", LOOKBACK, HORIZON, quantiles=(0.1, 0.5, 0.9), accelerator="cpu")
    model.fit(data, max_epochs=4, lr=0.01, progress=False)
    assert model.loss == "pinball"
    result = model.backtest(start=int(0.8 * STEPS), progress=False)
    np.testing.assert_array_equal(result["mean"], result["quantiles"].sel(quantile=0.5))
    assert result.attrs["intervals"] == "quantiles of the model"
    assert 0.6 < float(evaluate(result, ("coverage",), ())["coverage"]) < 0.95
    longer = model.predict(horizon=9)  # later blocks see the median as if it were observed
    assert "quantiles" not in longer
    assert longer.attrs["intervals"] == "none"
    with pytest.raises(ValueError, match="has them for 6 steps, not 9"):
        model.predict(horizon=9, intervals=True)


def test_validation_set_of_its_own(data):
    train, val = data.isel(time=slice(0, 320)), data.isel(time=slice(320 - LOOKBACK, None))
    own = Forecaster("rlinear", LOOKBACK, HORIZON, accelerator="cpu").fit(train, val, max_epochs=2, progress=False)
    part = Forecaster("rlinear", LOOKBACK, HORIZON, accelerator="cpu").fit(data, 80, max_epochs=2, progress=False)
    np.testing.assert_allclose(own.history["val_mse"], part.history["val_mse"], rtol=1e-5)
    np.testing.assert_allclose(own.intervals["radius"], part.intervals["radius"], rtol=1e-3)


@pytest.mark.parametrize("val", [np.int64(80), np.float32(0.2), "2024-01-14 08:00", datetime(2024, 1, 14, 8)])
def test_validation_part_in_several_ways(data, val):
    part = Forecaster("ridge", LOOKBACK, HORIZON).fit(data, 80)
    np.testing.assert_array_equal(Forecaster("ridge", LOOKBACK, HORIZON).fit(data, val).net.weight, part.net.weight)


def test_validation_data_of_any_kind(tmp_path, data):
    one = data.isel(series=0)
    train, rest = one.isel(time=slice(0, 300)), one.isel(time=slice(264, None))
    write_series(rest, tmp_path / "rest.nc")
    expected = Forecaster("ridge", LOOKBACK, HORIZON).fit(train, rest).intervals
    for val in (rest["target"], rest["target"].to_pandas(), tmp_path / "rest.nc", str(tmp_path / "rest.nc")):
        assert Forecaster("ridge", LOOKBACK, HORIZON).fit(train, val).intervals == expected
    for val in ([1, 2], True):
        with pytest.raises(TypeError, match="Expected a pandas or polars frame"):
            Forecaster("ridge", LOOKBACK, HORIZON).fit(train, val)
    with pytest.raises(ValueError, match="validation would begin at 2025-01-01, behind the data"):
        Forecaster("ridge", LOOKBACK, HORIZON).fit(train, "2025-01-01")


def test_averaged_weights_and_other_schedules(data):
    options = {"max_epochs": 2, "progress": False, "val": None}
    plain = Forecaster("rlinear", LOOKBACK, HORIZON, accelerator="cpu").fit(data, **options)
    averaged = Forecaster("rlinear", LOOKBACK, HORIZON, accelerator="cpu").fit(data, ema=0.9, **options)
    halving = Forecaster("rlinear", LOOKBACK, HORIZON, accelerator="cpu").fit(data, schedule="halving", **options)
    weights = [model.net.linear.weight.detach() for model in (plain, averaged, halving)]
    assert not weights[0].equal(weights[1])
    assert not weights[0].equal(weights[2])
    with pytest.raises(ValueError, match="unknown schedule 'linear'"):
        plain.fit(data, schedule="linear")


@pytest.mark.parametrize("name", ["last_value", "seasonal_naive", "window_mean"])
def test_models_without_parameters(data, name):
    args = {"season": 12} if name == "seasonal_naive" else {}
    model = Forecaster(name, LOOKBACK, HORIZON, model_args=args).fit(data)
    assert model.history.empty
    result = model.predict()
    assert np.isfinite(result["mean"]).all()
    if name == "last_value":
        last = data["target"].sel(series="s0", variate="temp").dropna("time").values[-1]
        np.testing.assert_allclose(result["mean"].sel(series="s0", variate="temp"), last, rtol=1e-5)


def test_long_frame_in_long_frame_out(data):
    one = data.isel(series=0)
    frame = one["target"].to_series().rename("y").reset_index().rename(columns={"time": "ds", "variate": "unique_id"})
    frame = frame[["unique_id", "ds", "y"]]
    model = Forecaster("ridge", LOOKBACK, HORIZON).fit(frame, coverages=(0.8,))
    result = model.predict()
    assert list(result.columns) == ["unique_id", "ds", "cutoff", "ridge", "ridge-q10", "ridge-q50", "ridge-q90"]
    assert len(result) == 2 * HORIZON
    as_dataset = Forecaster("ridge", LOOKBACK, HORIZON).fit(one, coverages=(0.8,)).predict()
    temp = result[result["unique_id"] == "temp"]
    np.testing.assert_allclose(temp["ridge"], as_dataset["mean"].sel(variate="temp").values.ravel(), rtol=1e-5)
    assert list(forecast_to_long(as_dataset)["unique_id"].unique()) == ["temp", "load"]
    both = forecast_to_long(Forecaster("ridge", LOOKBACK, HORIZON).fit(data, coverages=None).predict())
    assert list(both.columns) == ["unique_id", "variate", "ds", "cutoff", "ridge"]
    assert list(both["unique_id"].unique()) == ["s0", "s1"]


def test_data_that_do_not_fit_are_refused_with_the_way_out(data, fitted):
    with pytest.raises(ValueError, match="trained on the variate 'load', which the data lacks"):
        fitted.predict(data.sel(variate=["temp"]))
    with pytest.raises(ValueError, match="trained on data of freq 'h', got 'D'"):
        fitted.predict(data.assign_coords(time=pd.date_range("2024", periods=STEPS)).assign_attrs(freq="D"))
    with pytest.raises(ValueError, match="looks back 36 steps, the series has 20"):
        fitted.predict(data.isel(time=slice(0, 20)))
    silent = data.copy(deep=True)
    silent["target"][1, -LOOKBACK:] = np.nan
    with pytest.raises(ValueError, match=r"s1 has no observed value in the last 36 steps .* before the common end"):
        fitted.predict(silent)
    with pytest.raises(ValueError, match="no cutoff has 36 steps before and 6 behind"):
        fitted.backtest(data, start="2024-03-01")
    with pytest.raises(ValueError, match="Series 's9' was not in the training data"):
        fitted.predict(data.assign_coords(series=["s0", "s9"]))
    with pytest.raises(ValueError, match="not trained; call fit"):
        Forecaster("rlinear", 10, 2).predict(data)
    with pytest.raises(ValueError, match="did you mean rlinear"):
        Forecaster("rliner")
    with pytest.raises(ValueError, match="horizon of at least 1 step, got 0"):
        fitted.predict(data, horizon=0)
    with pytest.raises(ValueError, match="number of cutoffs of at least 1, got -2"):
        fitted.backtest(data, refit=-2)
    with pytest.raises(TypeError, match="has an option 'scalar'; did you mean scaler"):
        Forecaster("ridge", scalar="robust").fit(data)
    for option in ({"max_epochs": 1}, {"logger": False}):
        with pytest.raises(TypeError, match=f"the trainer option '{next(iter(option))}' is set by Forecaster.fit; "):
            Forecaster("rlinear", LOOKBACK, HORIZON, **option).fit(data)
    with pytest.raises(TypeError, match="Expected a pandas or polars frame"):
        fitted.predict([1, 2, 3])


def test_variates_in_another_order_are_found_by_name(data, fitted):
    turned = fitted.predict(data.sel(variate=["load", "temp"]))
    xr.testing.assert_identical(turned, fitted.predict(data))


def test_training_on_too_little_is_refused():
    with pytest.raises(ValueError, match="lookback"):
        Forecaster("rlinear", LOOKBACK, HORIZON).fit(make(30))
    bad = make(100)
    bad["target"][0, 50, 0] = np.inf
    with pytest.raises(ValueError, match="infinite"):
        Forecaster("rlinear", LOOKBACK, HORIZON).fit(bad)


def test_import_loads_no_lightning():
    code = (
        "import sys, omnissm.timeseries as t; t.Forecaster; t.create_model; t.evaluate;"
        "sys.exit(any(m.startswith(('pytorch_lightning', 'matplotlib')) for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("features", [{"calendar": True}, {"fourier": (12,)}])
def test_calendar_and_fourier_features_reach_past_and_horizon(tmp_path, data, features):
    """A model that reads the clock: saved, rolled on, and equal to the same features given by hand."""
    model = Forecaster(
        "chimera_tiny",
        LOOKBACK,
        HORIZON,
        model_args={"d_model": 8, "patch_len": 6, "stride": 6},
        accelerator="cpu",
        **features,
    )
    model.fit(data, max_epochs=1, batch_size=128, progress=False, coverages=None)
    with torch.no_grad():
        model.net.known_future.weight.add_(0.5)  # one epoch hardly moves it from zero
    result = model.predict(horizon=14)
    assert np.isfinite(result["mean"]).all()
    loaded = Forecaster.load(model.save(tmp_path / "m"))
    xr.testing.assert_identical(loaded.predict(data, horizon=14), result)
    shifted = data.assign_coords(time=data["time"] + np.timedelta64(5, "h"))
    assert not np.allclose(loaded.predict(shifted)["mean"], result["mean"][:, :, :HORIZON])  # another hour of the day


@pytest.fixture(scope="module")
def driven():
    """A series that follows a covariate known in advance, the covariate up to one horizon behind the series."""
    rng = np.random.default_rng(3)
    times = pd.date_range("2024-01-01", periods=STEPS + HORIZON, freq="h")
    driver = rng.normal(size=(len(times), 1)).astype(np.float32)
    values = driver[:STEPS] * [2.0, -1.0] + 0.01 * rng.normal(size=(STEPS, 2))
    known = xr.DataArray(driver, {"time": times, "future_feature": ["driver"]}, ("time", "future_feature"))
    ds = xr.Dataset(
        {"target": (("time", "variate"), values.astype(np.float32)), "future": known.isel(time=slice(0, STEPS))},
        {"time": times[:STEPS], "variate": ["a", "b"]},
        {"freq": "h"},
    )
    args = {"d_model": 8, "patch_len": 6, "stride": 6, "instance_norm": False}
    model = Forecaster("chimera_tiny", 12, HORIZON, model_args=args, accelerator="cpu")
    model.fit(ds, max_epochs=30, lr=0.02, batch_size=64, progress=False, coverages=None)
    return ds, known, model


def run_past(ds, known):
    """Data whose covariate runs past the last target."""
    return ds.drop_vars("future").reindex(time=known["time"]).assign(future=known)


def test_future_covariates_are_required_and_used(driven):
    ds, known, model = driven
    forecast = model.predict(future=known)["mean"].isel(series=0, cutoff=0)
    np.testing.assert_allclose(forecast, known[STEPS:] * [2.0, -1.0], atol=0.5)
    with pytest.raises(ValueError, match="Future-known covariates are missing at 6 times"):
        model.predict()
    with pytest.raises(ValueError, match="`future` has no variable 'future', only target"):
        model.predict(future=ds[["target"]])
    with pytest.raises(ValueError, match="reads the future covariates driver; the data lack the variable 'future'"):
        model.predict(ds.drop_vars("future"), future=known)


def test_data_whose_future_runs_past_the_last_target(driven):
    ds, known, model = driven
    longer = run_past(ds, known)
    xr.testing.assert_identical(model.predict(longer), model.predict(future=known))
    half = run_past(ds, known[: STEPS + 3])
    xr.testing.assert_identical(model.predict(half, future=known), model.predict(future=known))
    with pytest.raises(ValueError, match="missing at 3 times"):
        model.predict(half)
    looked = model.backtest(longer, start=390, progress=False)
    xr.testing.assert_identical(looked, model.backtest(ds, start=390, progress=False))
    assert looked["cutoff"].values[-1] == ds["time"].values[-1 - HORIZON]
    naive = Forecaster("last_value", 12, HORIZON).fit(longer)
    np.testing.assert_allclose(naive.predict()["mean"][0, 0, 0], ds["target"][-1], rtol=1e-5)


@pytest.mark.parametrize("horizon", [HORIZON - 2, HORIZON + 2])
def test_covariates_are_asked_for_wanted_steps_only(driven, horizon):
    """A model forecasts in whole blocks, of which the last may be needed in part."""
    ds, known, model = driven
    short = ds.isel(time=slice(0, STEPS + HORIZON - horizon))
    result = model.predict(short, known, horizon)
    truth = known.sel(time=result["valid_time"].values[0])
    np.testing.assert_allclose(result["mean"][0, 0], truth * [2.0, -1.0], atol=0.5)
    assert model.backtest(horizon=horizon, start=350, progress=False).sizes["horizon"] == horizon


def test_past_covariates_cannot_be_rolled_on(data):
    past = xr.DataArray(np.zeros((2, STEPS, 1), np.float32), dims=("series", "time", "past_feature"))
    ds = data.assign(past=past.assign_coords(past_feature=["p"]))
    args = {"d_model": 8, "patch_len": 6, "stride": 6}
    model = Forecaster("chimera_tiny", LOOKBACK, HORIZON, model_args=args, accelerator="cpu")
    model.fit(ds, max_epochs=1, batch_size=256, progress=False, coverages=None)
    assert np.isfinite(model.predict()["mean"]).all()
    with pytest.raises(ValueError, match="reads past-only covariates, so it cannot be rolled on to 9"):
        model.predict(horizon=9)


def test_covariates_that_a_model_does_not_read_are_not_asked_for(data, driven):
    ds, known, _ = driven
    past = xr.DataArray(np.zeros((STEPS, 1), np.float32), dims=("time", "past_feature"))
    model = Forecaster("last_value", 12, HORIZON).fit(ds.assign(past=past.assign_coords(past_feature=["p"])))
    assert np.isfinite(model.predict(horizon=15)["mean"]).all()
    xr.testing.assert_identical(model.predict(ds[["target"]]), model.predict())
    with pytest.raises(ValueError, match="this last_value reads no covariates known in advance"):
        model.predict(future=known)


def test_refits_share_one_yardstick(data):
    """Errors of a backtest with refits are in the units of the first fit, as those of one without."""
    growing = data.assign(target=data["target"] * (1 + data["target"]["time"].dt.dayofyear))
    model = Forecaster("ridge", LOOKBACK, HORIZON).fit(growing, coverages=None)
    kept, anew = (model.backtest(start=300, stride=20, refit=n, progress=False) for n in (0, 2))
    assert anew.attrs["scaler"] == kept.attrs["scaler"]
    for name in ("seasonal_mae", "seasonal_mse", "target", "observed"):
        xr.testing.assert_identical(anew[name], kept[name])


def test_refit_on_variates_in_another_order_and_more_of_them(data):
    model = Forecaster("ridge", LOOKBACK, HORIZON).fit(data, coverages=None)
    more = xr.concat([data["target"], data["target"].isel(variate=[0]).assign_coords(variate=["x"])], "variate")
    other = more.drop_vars("units", errors="ignore").sel(variate=["load", "x", "temp"]).to_dataset(name="target")
    options = {"start": 390, "stride": 2, "refit": 2, "progress": False}
    np.testing.assert_array_equal(
        model.backtest(other.assign_attrs(freq="h"), **options)["mean"], model.backtest(data, **options)["mean"]
    )


def test_refit_pieces_without_any_target(data):
    silent = data.copy(deep=True)
    silent["target"][:, 382:390] = np.nan
    model = Forecaster("ridge", LOOKBACK, HORIZON).fit(data, coverages=None)
    result = model.backtest(silent, start=379, stride=4, refit=1, progress=False)
    assert result["observed"].dtype == bool
    assert not result["observed"].values[:, 1].any()  # cutoff 382 and its 6 steps
    assert np.isfinite(evaluate(result, ("mse",), ())["mse"])
    assert "target" in model.backtest(silent.isel(time=slice(0, 389)), start=383, stride=9, progress=False)


@pytest.mark.parametrize("scaler", ["standard", "robust", "minmax", "log1p", "none"])
def test_units_come_back_from_every_scaler(data, scaler):
    model = Forecaster("last_value", LOOKBACK, HORIZON, scaler=scaler).fit(data, coverages=(0.8,))
    result = model.predict()
    for name in ("temp", "load"):
        for series in ("s0", "s1"):
            last = data["target"].sel(series=series, variate=name).dropna("time").values[-1]
            np.testing.assert_allclose(result["mean"].sel(series=series, variate=name), last, rtol=1e-4)
    width = (result["quantiles"].sel(quantile=0.9) - result["quantiles"].sel(quantile=0.1)).mean(
        ("series", "cutoff", "horizon")
    )
    assert float(width.sel(variate="load")) > 10 * float(width.sel(variate="temp"))  # 50 times the amplitude


def test_irregular_times(data):
    odd = data.isel(time=np.delete(np.arange(STEPS), [50, 51, 52, 390])).drop_attrs()
    args = {"d_model": 8, "patch_len": 6, "stride": 6}
    model = Forecaster("chimera_tiny", LOOKBACK, HORIZON, model_args=args, accelerator="cpu")
    model.fit(odd, max_epochs=1, batch_size=128, progress=False, coverages=None)
    result = model.predict(horizon=9)
    assert np.isfinite(result["mean"]).all()
    assert "freq" not in result.attrs
    assert (np.diff(result["valid_time"].values[0]) == np.timedelta64(1, "h")).all()  # the usual step goes on


def test_integer_times_and_one_variate():
    steps = np.arange(100, 300, 2)
    values = np.sin(steps / 5).astype(np.float32)[:, None]
    ds = xr.Dataset({"target": (("time", "variate"), values)}, {"time": steps, "variate": ["v"]}, {"freq": 2})
    model = Forecaster("ridge", 12, 1).fit(ds, coverages=None)
    result = model.predict(horizon=5)
    assert result["cutoff"].values.tolist() == [298]
    assert result["valid_time"].values.tolist() == [[300, 302, 304, 306, 308]]
    np.testing.assert_allclose(result["mean"].values.ravel(), np.sin(result["valid_time"].values[0] / 5), atol=0.05)
    assert model.backtest(ds, start=90, progress=False)["valid_time"].values[0].tolist() == [280]


@pytest.mark.parametrize(
    ("options", "fitting", "message"),
    [
        ({"horizon": -1}, {}, "horizon must be at least 1, got -1"),
        ({"lookback": 0}, {}, "lookback must be at least 1, got 0"),
        ({"threads": 0}, {}, "at least 1 thread, or None"),
        ({}, {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({}, {"max_epochs": 0}, "max_epochs of at least 1, got 0"),
    ],
)
def test_numbers_below_one_are_refused(options, fitting, message):
    with pytest.raises(ValueError, match=message):
        Forecaster("rlinear", **{"lookback": 12, "horizon": 2, **options}).fit(make(60), **fitting)
