"""describe: facts by hand."""

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from omnissm.timeseries.describe import describe_series


def make(values, times=None, **attrs):
    values = np.asarray(values, np.float32)
    times = pd.date_range("2024-01-01", periods=len(values), freq="h") if times is None else times
    coords = {"time": times, "variate": [f"v{k}" for k in range(values.shape[1])]}
    return xr.Dataset({"target": (("time", "variate"), values)}, coords, attrs)


def test_missing_gaps_and_outliers():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(300, 2))
    values[50, 0] = 100.0
    values[60:64] = np.nan
    values[100:110, 1] = np.nan
    facts, table = describe_series(make(values, freq="h"))
    assert facts["steps"] == 300
    assert facts["freq"] == "h"
    assert facts["gaps"] == "1 empty stretches, first at 2024-01-03 12:00"
    first, second = table.to_dict("records")
    assert first["outliers"] == 1
    assert first["first_outlier"] == "100 at 2024-01-03 02:00"
    assert first["missing"] == pytest.approx(4 / 300)
    assert second["longest_gap"] == 10
    assert second["max"] == pytest.approx(np.nanmax(values[:, 1]))


def test_irregular_times_show_their_jumps():
    times = pd.date_range("2024-01-01", periods=50, freq="D").delete([10, 11, 30])
    facts, _ = describe_series(make(np.arange(47.0)[:, None], times))
    assert facts["freq"] == "irregular"
    assert facts["gaps"] == "2 jumps, first at 2024-01-13 00:00, 2024-02-01 00:00"


@pytest.mark.parametrize(
    ("period", "freq", "season"),
    [(24, "h", 24), (7, "D", 7), (10, "D", 10), (12, "h", 24)],
)
def test_season_is_that_of_the_data(period, freq, season):
    rng = np.random.default_rng(0)
    steps = np.arange(400)
    wave = np.where(steps % period < 2, 3.0, 0.0) + 0.1 * rng.normal(size=400)  # a pulse has one period only
    times = pd.date_range("2024-01-01", periods=400, freq=freq)
    facts, _ = describe_series(make(wave[:, None], times, freq=freq))
    assert facts["suggested season"] == season  # of hours a whole day, which two periods of 12 are
    assert facts["suggested lookback"] == min(3 * season, 50)


def test_noise_has_no_season():
    noise = np.random.default_rng(0).normal(size=(500, 1))
    facts, _ = describe_series(make(np.cumsum(noise, axis=0), freq="h"))
    assert facts["suggested season"] == 1


def test_constant_series_and_short_ones():
    facts, table = describe_series(make(np.ones((5, 1))))
    assert table.loc[0, "outliers"] == 0
    assert facts["suggested season"] == 1
