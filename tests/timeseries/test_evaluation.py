"""evaluate: equal to the metrics themselves, in scaled and original units, along any dimensions."""

import json

import numpy as np
import pytest
import xarray as xr

from omnissm.timeseries import evaluate, metrics
from omnissm.timeseries.evaluation import METRICS
from omnissm.timeseries.scaling import Scaler


@pytest.fixture
def forecast():
    rng = np.random.default_rng(0)
    shape, dims = (2, 5, 4, 3), ("series", "cutoff", "horizon", "variate")
    target = 50 + 10 * rng.normal(size=shape)
    mean = target + rng.normal(size=shape) * np.array([1.0, 5.0, 20.0])
    target[rng.random(shape) < 0.2] = np.nan
    quantiles = mean[..., None] + np.array([-8.0, 0.0, 8.0])
    scaler = Scaler("standard")
    scaler.series, scaler.variates = ["a", "b"], ["x", "y", "z"]
    scaler.center, scaler.scale = rng.normal(size=(2, 3)), rng.uniform(1, 9, size=(2, 3))
    return xr.Dataset(
        {
            "target": (dims, target.astype(np.float32)),
            "mean": (dims, mean.astype(np.float32)),
            "quantiles": ((*dims, "quantile"), quantiles.astype(np.float32)),
            "scale": (dims, rng.uniform(2, 9, shape).astype(np.float32)),
        },
        {
            "series": ["a", "b"],
            "variate": ["x", "y", "z"],
            "horizon": [1, 2, 3, 4],
            "quantile": [0.1, 0.5, 0.9],
            "cutoff": range(5),
            "seasonal_mae": (("series", "variate"), rng.uniform(1, 2, (2, 3))),
            "seasonal_mse": (("series", "variate"), rng.uniform(1, 2, (2, 3))),
        },
        {"scaler": json.dumps(scaler.to_dict()), "model": "m", "distribution": "normal"},
    )


def test_every_metric_gives_a_number_per_place(forecast):
    result = evaluate(forecast, list(METRICS), by=("variate", "horizon"))
    assert set(result.data_vars) == set(METRICS)
    for name, values in result.items():
        assert values.shape == (4, 3), name  # horizon before variate, as in the forecast
        assert values.dtype == np.float64
        assert np.isfinite(values).all(), name


def test_scaled_and_original_units(forecast):
    scale = np.array(json.loads(forecast.attrs["scaler"])["scale"])[:, None, None, :]
    y, f = forecast["target"].values, forecast["mean"].values
    result = evaluate(forecast, ("mse", "mse_units", "mae", "mae_units"), by=())
    assert float(result["mse_units"]) == pytest.approx(metrics.mse(y, f), rel=1e-6)
    assert float(result["mse"]) == pytest.approx(metrics.mse(y / scale, f / scale), rel=1e-5)
    assert float(result["mae"]) == pytest.approx(metrics.mae(y / scale, f / scale), rel=1e-5)
    bare = forecast.copy()
    del bare.attrs["scaler"]
    assert float(evaluate(bare, ("mse",), ())["mse"]) == pytest.approx(float(result["mse_units"]))


def test_order_of_dimensions_does_not_matter(forecast):
    turned = forecast.transpose("variate", "horizon", "quantile", "cutoff", "series")
    xr.testing.assert_identical(evaluate(turned, list(METRICS)), evaluate(forecast, list(METRICS)))


def test_by_hand_along_one_dimension(forecast):
    result = evaluate(forecast, ("mae_units", "mase", "coverage"), by=("variate",))
    y, f = forecast["target"].values[..., 1], forecast["mean"].values[..., 1]
    keep = np.isfinite(y)
    scale = np.broadcast_to(forecast["seasonal_mae"].values[:, 1][:, None, None], y.shape)
    assert float(result["mae_units"].sel(variate="y")) == pytest.approx(np.abs(y - f)[keep].mean(), rel=1e-6)
    assert float(result["mase"].sel(variate="y")) == pytest.approx((np.abs(y - f) / scale)[keep].mean(), rel=1e-6)
    assert float(result["coverage"].sel(variate="y")) == pytest.approx((np.abs(y - f) <= 8)[keep].mean(), abs=1e-6)


def test_crps_of_the_distribution_else_of_samples_else_of_quantiles(forecast):
    y, f, s = (forecast[name].values.astype(float) for name in ("target", "mean", "scale"))
    keep = np.isfinite(y)
    unit = np.array(json.loads(forecast.attrs["scaler"])["scale"])[:, None, None, :] + 0 * y
    result = evaluate(forecast, ("crps", "crps_units", "nll"), ())
    assert float(result["crps_units"]) == pytest.approx(metrics.crps_normal(y, f, s))
    assert float(result["crps"]) == pytest.approx(metrics.crps_normal(y / unit, f / unit, s / unit))
    density = -0.5 * ((y - f) / s) ** 2 - np.log(s) - 0.5 * np.log(2 * np.pi)
    assert float(result["nll"]) == pytest.approx(-density[keep].mean())
    bare = forecast.drop_vars("scale")
    levels = forecast["quantile"].values
    quantiles = metrics.crps_quantiles(y, forecast["quantiles"].values, levels)
    assert float(evaluate(bare, "crps_units", ())["crps_units"]) == pytest.approx(quantiles)
    drawn = f[..., None] + s[..., None] * np.random.default_rng(0).normal(size=(*f.shape, 200))
    sampled = bare.assign(samples=((*forecast["mean"].dims, "sample"), drawn))
    assert float(evaluate(sampled, "crps_units", ())["crps_units"]) == pytest.approx(metrics.crps_samples(y, drawn))
    assert float(evaluate(sampled, "crps_units", ())["crps_units"]) == pytest.approx(
        float(result["crps_units"]), rel=0.05
    )


def test_observed_overrules_the_target(forecast):
    masked = forecast.assign(observed=(forecast["target"].dims, np.zeros(forecast["target"].shape, bool)))
    assert np.isnan(evaluate(masked, ("mae",), ())["mae"])


def test_refusals_name_the_way_out(forecast):
    with pytest.raises(ValueError, match="unknown metric 'maes'; did you mean ma"):
        evaluate(forecast, ("maes",))
    with pytest.raises(ValueError, match="unknown dimension 'varriate'; did you mean variate"):
        evaluate(forecast, by=("varriate",))
    with pytest.raises(ValueError, match="no variable 'target'"):
        evaluate(forecast.drop_vars("target"))
    with pytest.raises(ValueError, match="needs quantiles"):
        evaluate(forecast.drop_vars(["quantiles", "scale"]), ("crps",))
    with pytest.raises(ValueError, match="nll needs the parameters of a distribution"):
        evaluate(forecast.drop_vars("scale"), ("nll",))
    with pytest.raises(ValueError, match="'seasonal_mae'"):
        evaluate(forecast.drop_vars("seasonal_mae"), ("mase",))


@pytest.mark.parametrize("names", [["y"], ["z", "x"]])
def test_some_variates_of_a_forecast(forecast, names):
    whole = evaluate(forecast, ("mse", "mase"), ("variate",)).sel(variate=names)
    xr.testing.assert_allclose(evaluate(forecast.sel(variate=names), ("mse", "mase"), ("variate",)), whole)
    with pytest.raises(ValueError, match="The data has variates new"):
        evaluate(forecast.isel(variate=[0]).assign_coords(variate=["new"]), ("mse",))


def test_one_metric_and_one_dimension_as_text(forecast):
    xr.testing.assert_identical(evaluate(forecast, "mse", "variate"), evaluate(forecast, ("mse",), ("variate",)))


def test_one_interval_of_several(forecast):
    levels = [0.05, 0.25, 0.5, 0.75, 0.95]
    spread = np.array([-3.0, -1.0, 0.0, 1.0, 3.0])
    values = forecast["mean"].to_numpy()[..., None] + spread
    several = forecast.drop_dims("quantile").assign_coords(quantile=levels)
    several["quantiles"] = ((*forecast["mean"].dims, "quantile"), values)
    found = evaluate(several, ("coverage", "coverage@0.9", "coverage@0.5", "interval_width@0.5"), ())
    error = np.abs(several["target"] - several["mean"]).where(several["target"].notnull())
    inside = [float((error <= radius).where(error.notnull()).mean()) for radius in (3, 1)]
    assert [float(found["coverage@0.9"]), float(found["coverage@0.5"])] == pytest.approx(inside)
    assert float(found["coverage"]) == float(found["coverage@0.9"])
    assert float(found["interval_width@0.5"]) == pytest.approx(2.0)
    with pytest.raises(ValueError, match=r"no interval of coverage 0\.8, only of 0\.9, 0\.5"):
        evaluate(several, ("coverage@0.8",))
    with pytest.raises(ValueError, match="coverage, interval_width, msis before @"):
        evaluate(several, ("mae@0.8",))
    with pytest.raises(ValueError, match="coverage in"):
        evaluate(several, ("coverage@90",))
