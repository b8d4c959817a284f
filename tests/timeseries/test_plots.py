"""Plots draw what the data say; their looks are judged by eye."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

matplotlib = pytest.importorskip("matplotlib")
from matplotlib import pyplot as plt  # noqa: E402

from omnissm.timeseries import evaluate, plots  # noqa: E402


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def history():
    rng = np.random.default_rng(0)
    target = rng.normal(size=(1, 60, 3)).astype(np.float32)
    target[0, 10:20, 1] = np.nan
    coords = {"series": ["s"], "time": pd.date_range("2024", periods=60, freq="h"), "variate": ["a", "b", "c"]}
    return xr.Dataset({"target": (("series", "time", "variate"), target)}, coords, {"freq": "h"})


@pytest.fixture(scope="module")
def forecast(history):
    rng = np.random.default_rng(1)
    cutoffs, horizon = np.arange(20, 50), np.arange(1, 7)
    times = history["time"].values
    target = history["target"].values[:, cutoffs[:, None] + horizon]  # (series, cutoff, horizon, variate)
    mean = np.nan_to_num(target) + 0.1 * rng.normal(size=target.shape) * horizon[:, None]
    dims = ("series", "cutoff", "horizon", "variate")
    quantiles = mean[..., None] + np.array([-1.0, -0.5, 0.0, 0.5, 1.0])
    return xr.Dataset(
        {"mean": (dims, mean), "target": (dims, target), "quantiles": ((*dims, "quantile"), quantiles)},
        {
            "series": ["s"],
            "cutoff": times[cutoffs],
            "horizon": horizon,
            "variate": ["a", "b", "c"],
            "units": ("variate", ["m", "kg", ""]),
            "quantile": [0.1, 0.25, 0.5, 0.75, 0.9],
            "valid_time": (("cutoff", "horizon"), times[cutoffs[:, None] + horizon]),
        },
        {"model": "tiny"},
    )


def line(ax, label):
    return next(entry for entry in ax.get_lines() if entry.get_label() == label)


def test_forecast_draws_a_panel_per_variate(forecast, history):
    axes = plots.plot_forecast(forecast, history)
    assert [ax.get_title(loc="left") for ax in axes] == ["a (m)", "b (kg)", "c"]
    mean = forecast["mean"].isel(series=0, cutoff=-1)
    for k, ax in enumerate(axes):
        np.testing.assert_allclose(line(ax, "forecast").get_ydata(), mean[:, k])
        past = line(ax, "observed").get_ydata()
        np.testing.assert_array_equal(past, history["target"].values[0, 32:50, k])
        assert len(ax.collections) == 2  # the 50 and 80 % intervals


def test_forecast_on_given_axes(forecast):
    _, ax = plt.subplots()
    assert plots.plot_forecast(forecast, variate="b", cutoff=0, ax=ax) is ax
    np.testing.assert_allclose(line(ax, "forecast").get_ydata(), forecast["mean"].isel(series=0, cutoff=0, variate=1))
    with pytest.raises(ValueError, match="no variate named 'z'; available: a, b, c"):
        plots.plot_forecast(forecast, variate="z")


def test_backtest_chooses_cutoffs_that_do_not_overlap(forecast):
    ax = plots.plot_backtest(forecast, variate="a")
    paths = [entry for entry in ax.get_lines() if len(entry.get_xdata()) == 6]
    assert len(paths) == 5  # 30 hourly cutoffs, 6 hours each
    np.testing.assert_allclose(paths[-1].get_ydata(), forecast["mean"].isel(series=0, cutoff=-1, variate=0))
    observed = line(ax, "observed")
    assert (np.diff(observed.get_xdata().astype("int64")) > 0).all()


def test_errors_by_horizon_are_those_of_evaluate(forecast):
    ax = plots.plot_error_by_horizon({"one": forecast, "two": forecast.assign(mean=forecast["mean"] + 1)}, metric="mse")
    expected = evaluate(forecast, ("mse",), ("horizon",))["mse"]
    np.testing.assert_allclose(line(ax, "one").get_ydata(), expected)
    assert (line(ax, "two").get_ydata() > line(ax, "one").get_ydata()).all()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    assert plots.plot_error_by_horizon(forecast).get_legend() is None


def test_error_map_is_variate_by_horizon(forecast):
    ax = plots.plot_error_map(forecast)
    expected = evaluate(forecast, ("mae",), ("variate", "horizon"))["mae"].transpose("variate", "horizon")
    np.testing.assert_allclose(ax.images[0].get_array(), expected)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a", "b", "c"]


def test_calibration_counts_targets_below(forecast):
    ax = plots.plot_calibration(forecast)
    known = np.isfinite(forecast["target"].values)
    below = [((forecast["target"] <= forecast["quantiles"].sel(quantile=q)).values & known).sum() for q in (0.1, 0.9)]
    observed = line(ax, "tiny").get_ydata()
    assert observed[[0, -1]].tolist() == pytest.approx([count / known.sum() for count in below])
    with pytest.raises(ValueError, match="has no quantiles"):
        plots.plot_calibration(forecast.drop_vars("quantiles"))


def test_residuals_and_their_autocorrelation():
    alternating = np.where(np.arange(40) % 2, 1.0, -1.0)
    dims = ("series", "cutoff", "horizon", "variate")
    ds = xr.Dataset(
        {"mean": (dims, np.zeros((1, 40, 1, 1))), "target": (dims, alternating[None, :, None, None])},
        {"series": ["s"], "variate": ["v"], "cutoff": range(40), "horizon": [1]},
    )
    left, right = plots.plot_residuals(ds)
    assert sum(bar.get_height() for bar in left.patches) == 40
    heights = [segment[1, 1] for segment in right.collections[0].get_segments()] or None
    if heights is None:
        pytest.fail("no stems drawn")
    assert heights[:2] == pytest.approx([-1.0, 1.0], abs=1e-6)


def test_missing_map_shows_the_share(history):
    ax = plots.plot_missing(history, bins=6)
    np.testing.assert_allclose(np.asarray(ax.images[0].get_array())[1], [0, 1, 0, 0, 0, 0])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["a  0.0 %", "b  16.7 %", "c  0.0 %"]
    unseen = history.assign(observed=history["target"].notnull() & (history["variate"] != "a"))
    assert plots.plot_missing(unseen).get_yticklabels()[0].get_text() == "a  100.0 %"


def test_time_scales_mark_the_median():
    class Model(torch.nn.Module):
        def dt_ranges(self):
            return {"trend": torch.tensor([0.01, 0.02, 0.03]), "seasonal": torch.tensor([0.5, 0.1, 0.9])}

    ax = plots.plot_dt_ranges(Model())
    assert [text.get_text() for text in ax.texts] == ["0.02", "0.5"]
    assert ax.get_xscale() == "log"
    with pytest.raises(ValueError, match="no learned time steps"):
        plots.plot_dt_ranges(torch.nn.Linear(1, 1))


def test_save_writes_a_whole_picture(tmp_path, forecast):
    plots.save(plots.plot_error_map(forecast), str(tmp_path / "map.png"))
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"
    assert [path.name for path in tmp_path.iterdir()] == ["map.png"]
    assert not plt.get_fignums()


def test_global_style_is_left_alone(forecast):
    before = json.dumps({key: str(value) for key, value in matplotlib.rcParams.items()})
    plots.plot_error_by_horizon(forecast)
    assert json.dumps({key: str(value) for key, value in matplotlib.rcParams.items()}) == before


def test_without_matplotlib_the_extra_is_named():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from omnissm.timeseries import plots\n"
        "try:\n    plots.plot_dt_ranges(type('M', (), {'dt_ranges': lambda self: {}})())\n"
        "except ImportError as error:\n    sys.exit('omnissm[plot]' not in str(error))\n"
        "sys.exit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
