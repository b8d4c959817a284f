"""Forecasts of distributions: learned, in units of the data, in files, as samples, and refused without sense."""

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from omnissm.timeseries import Forecaster, evaluate, list_models
from omnissm.timeseries.distributions import DEFAULT_LEVELS, DISTRIBUTIONS, find_distribution
from omnissm.timeseries.files import read_series, write_series
from omnissm.timeseries.models import MODELS, create_model, model_options
from omnissm.timeseries.tasks import check_loss

ABLE = sorted(name for name in MODELS if "distribution" in model_options(name))


def series(kind="normal", steps=500, seed=0):
    """Hourly values around a daily curve with known noise: N(0, 3^2) on 200, t with 3 degrees, or counts."""
    rng = np.random.default_rng(seed)
    curve = np.sin(2 * np.pi * np.arange(steps) / 24)[:, None] + np.zeros(2)
    if kind == "counts":
        values = rng.negative_binomial(4.0, 1 / (1 + 0.25 * np.exp(2 + curve))).astype(float)
    else:
        noise = rng.standard_t(3.0, curve.shape) if kind == "student_t" else rng.normal(size=curve.shape)
        values = np.array([200.0, -5.0]) + np.array([20.0, 2.0]) * curve + np.array([3.0, 0.3]) * noise
    times = pd.date_range("2024-01-01", periods=steps, freq="h")
    return xr.DataArray(values, coords={"time": times, "variate": ["a", "b"]}, dims=("time", "variate"))


def fitted(kind, distribution, **options):
    options = {"scaler": "none" if distribution == "negative_binomial" else "standard", **options}
    model = Forecaster("rlinear", 48, 6, distribution=distribution, **options)
    return model.fit(series(kind), val=0.2, max_epochs=20, lr=0.02, early_stopping=None, progress=False)


@pytest.fixture(scope="module")
def normal():
    return fitted("normal", "normal")


@pytest.fixture(scope="module")
def counts():
    return fitted("counts", "negative_binomial")


def test_spread_is_that_of_the_data_in_their_units(normal):
    forecast = normal.backtest(series(seed=1), progress=False)
    scale = forecast["scale"].mean(("series", "cutoff", "horizon")).values
    assert scale == pytest.approx([3.0, 0.3], rel=0.25)
    assert forecast.attrs["distribution"] == "normal"
    result = evaluate(forecast, ("coverage", "crps_units", "nll"), ("variate",))
    assert result["coverage"].values == pytest.approx([0.95, 0.95], abs=0.05)
    # The least possible CRPS of N(0, s^2) is s / sqrt(pi), the least negative log-likelihood its entropy.
    assert (result["crps_units"].values / np.array([3.0, 0.3]) * np.pi**0.5).max() < 1.25
    entropy = 0.5 * np.log(2 * np.pi * np.e * np.array([9.0, 0.09]))
    assert (result["nll"].values > entropy - 0.1).all()
    assert (result["nll"].values < entropy + 0.3).all()


def test_quantiles_are_those_of_the_parameters(normal):
    forecast = normal.predict()
    assert tuple(forecast["quantile"].values) == DEFAULT_LEVELS
    y = np.stack([forecast["mean"].values, forecast["scale"].values], axis=-1)
    expected = find_distribution("normal").quantiles(y, DEFAULT_LEVELS)
    np.testing.assert_allclose(forecast["quantiles"].values, expected, rtol=1e-5)


def test_heavy_tails_are_found():
    model = fitted("student_t", "student_t", quantiles=(0.1, 0.5, 0.9))
    forecast = model.backtest(series("student_t", seed=1), progress=False)
    assert set(forecast["quantile"].values) == {0.1, 0.5, 0.9}
    assert 2 < float(forecast["df"].median()) < 8  # 3 in truth, with the error of the mean added
    heavy = float(evaluate(forecast, "nll", ())["nll"])
    light = fitted("student_t", "normal").backtest(series("student_t", seed=1), progress=False)
    assert heavy < float(evaluate(light, "nll", ())["nll"])


def test_counts(counts):
    data = series("counts", seed=1)
    forecast = counts.backtest(data, samples=20, progress=False)
    assert (forecast["samples"] == forecast["samples"].round()).all()
    assert (forecast["quantiles"] >= 0).all()
    assert (forecast["quantiles"] == forecast["quantiles"].round()).all()
    assert float(forecast["dispersion"].median()) == pytest.approx(0.25, abs=0.15)
    level, truth = float(forecast["mean"].mean()), float(data.mean())
    assert level == pytest.approx(truth, rel=0.15)
    naive = Forecaster("seasonal_naive", 48, 6, scaler="none").fit(series("counts"), progress=False)
    other = evaluate(naive.backtest(data, intervals=False, progress=False), "mae_units", ())["mae_units"]
    assert float(evaluate(forecast, "crps_units", ())["crps_units"]) < 0.75 * float(other)


@pytest.mark.parametrize("name", ["forecast.nc", "forecast.zarr"])
def test_samples_survive_files_and_repeat(tmp_path, normal, name):
    forecast = normal.predict(samples=50)
    assert forecast["samples"].dims == ("series", "cutoff", "horizon", "variate", "sample")
    write_series(forecast, tmp_path / name)
    xr.testing.assert_identical(read_series(tmp_path / name), forecast)
    xr.testing.assert_identical(normal.predict(samples=50), forecast)
    many = normal.predict(samples=4000)
    for statistic, of_draws in (("mean", many["samples"].mean("sample")), ("scale", many["samples"].std("sample"))):
        np.testing.assert_allclose(of_draws, many[statistic], atol=0.1 * float(many["scale"].max()))


def test_saved_and_loaded(tmp_path, normal, counts):
    for model, kind in ((normal, "normal"), (counts, "counts")):
        again = Forecaster.load(model.save(tmp_path / kind))
        xr.testing.assert_identical(again.predict(series(kind), samples=3), model.predict(samples=3))
        assert again.distribution == model.distribution
        with pytest.raises(ValueError, match="forecasts quantiles"):
            again.calibrate(series(kind))


def test_logarithms_bend_the_distribution_and_keep_its_quantiles():
    model = Forecaster("rlinear", 48, 6, distribution="normal", scaler="log1p")
    model.fit(np.exp(series() / 60), max_epochs=2, progress=False)
    forecast = model.predict(samples=2001)
    assert "scale" not in forecast
    np.testing.assert_allclose(forecast["mean"], forecast["quantiles"].sel(quantile=0.5), rtol=1e-5)
    empirical = forecast["samples"].quantile(0.9, "sample")
    np.testing.assert_allclose(empirical, forecast["quantiles"].sel(quantile=0.9), rtol=0.05)
    backtest = model.backtest(np.exp(series(seed=1) / 60), samples=30, stride=20, progress=False)
    assert np.isfinite(float(evaluate(backtest, "crps", ())["crps"]))


def test_longer_horizons_have_no_distribution(normal):
    forecast = normal.predict(horizon=9)
    assert "scale" not in forecast
    assert forecast.attrs["distribution"] == "none"
    with pytest.raises(ValueError, match="one for 6 steps, not 9"):
        normal.predict(horizon=9, samples=5)


def test_refits_and_long_frames(normal):
    quick = Forecaster("rlinear", 48, 6, distribution="normal").fit(series(), max_epochs=1, progress=False)
    forecast = quick.backtest(start=470, refit=13, samples=4, progress=False)
    assert forecast["samples"].sizes == {"series": 1, "cutoff": 25, "horizon": 6, "variate": 2, "sample": 4}
    frame = series().to_pandas().rename_axis("ds").reset_index().melt("ds", var_name="unique_id", value_name="y")
    long = normal.predict(frame, samples=3)
    assert [name for name in long if name.startswith("rlinear")] == ["rlinear"] + [
        f"rlinear-q{100 * q:g}" for q in DEFAULT_LEVELS
    ]


def test_a_loaded_forecaster_is_not_refitted(normal, tmp_path):
    loaded = Forecaster.load(normal.save(tmp_path / "model"))
    with pytest.raises(ValueError, match="holds no training options; call fit, or leave refit out"):
        loaded.backtest(series(), start=470, refit=13, progress=False)


@pytest.mark.parametrize("distribution", sorted(DISTRIBUTIONS))
@pytest.mark.parametrize("name", ABLE)
def test_every_model(name, distribution):
    """Parameters in the units of the window: shifted and scaled with it where the model normalises."""
    from omnissm.timeseries.windows import WindowBatch

    args = {"lookback": 48, "horizon": 5, "n_variates": 2, "distribution": distribution}
    family = find_distribution(distribution)
    if family.counts and name in ("dlinear", "spacetime"):
        with pytest.raises(ValueError, match="counts"):
            create_model(name, **args)
        return
    torch.manual_seed(0)
    net = create_model(name, **args).eval()
    x = torch.randn(3, 2, 48).abs() * 4
    seen, number = torch.ones_like(x, dtype=torch.bool), torch.zeros(3, dtype=torch.long)
    batch = WindowBatch(x, seen, x[..., :5], seen[..., :5], None, None, None, None, number, number)
    y = net(batch)
    assert y.shape == (3, 2, 5, len(family.parameters))
    assert (y[..., 1:] > 0).all()
    loss = -family.log_prob(y, batch.y.round()).mean()
    loss.backward()
    assert torch.isfinite(loss)
    if family.counts or name == "dlinear":
        return
    moved = net(batch._replace(x=7 * x - 3))
    torch.testing.assert_close(moved[..., 0], 7 * y[..., 0] - 3, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved[..., 1], 7 * y[..., 1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved[..., 2:], y[..., 2:], rtol=1e-3, atol=1e-3)


def test_refusals():
    with pytest.raises(ValueError, match="did you mean normal"):
        Forecaster("rlinear", distribution="norml")
    with pytest.raises(ValueError, match="pass scaler='none'"):
        Forecaster("rlinear", distribution="negative_binomial")
    with pytest.raises(ValueError, match="the data hold 2"):
        Forecaster("rlinear", 48, 6, distribution="negative_binomial", scaler="none").fit(series(), progress=False)
    with pytest.raises(ValueError, match=r"last_value forecasts points only; .* rlinear"):
        Forecaster("last_value", 48, 6, distribution="normal").fit(series(), progress=False)
    with pytest.raises(ValueError, match="has no distribution"):
        Forecaster("last_value", 48, 6).fit(series(), progress=False).predict(samples=3)
    with pytest.raises(ValueError, match="a distribution with the loss 'nll' and only there"):
        check_loss("mae", None, "normal")
    with pytest.raises(ValueError, match="a distribution with the loss 'nll' and only there"):
        check_loss("nll", None)
    with pytest.raises(ValueError, match="not both"):
        create_model("rlinear", lookback=4, horizon=2, n_variates=1, distribution="normal", quantiles=(0.5,))
    assert "chimera_tiny" in list_models()
