"""Input as it comes: clocks that change, leap days, old spellings, NaN in any place, models from later versions."""

import json
import time

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from omnissm.timeseries import Forecaster, create_model
from omnissm.timeseries.files import read_series
from omnissm.timeseries.frames import from_long, from_wide
from omnissm.timeseries.rollout import create_windows, prepare
from omnissm.timeseries.schema import regularize, validate


def hourly(times, seed=0):
    values = np.random.default_rng(seed).normal(size=(len(times), 2)) + np.array([10.0, -3.0])
    return pd.DataFrame(values, index=times, columns=["a", "b"])


@pytest.mark.parametrize("start", ["2024-03-28", "2024-10-24"], ids=["spring", "autumn"])
def test_clocks_that_change(start):
    """Aware local times are kept in UTC: no hour is lost or doubled, and forecasts run through the change."""
    local = pd.date_range(start, periods=60, freq="h", tz="Europe/Berlin")
    ds = from_wide(hourly(local))
    validate(ds)
    assert (np.diff(ds["time"].values) == np.timedelta64(1, "h")).all()
    model = Forecaster("rlinear", 24, 36).fit(ds, max_epochs=1, val=None, progress=False)
    stamps = pd.DatetimeIndex(model.predict()["valid_time"].values[0]).tz_localize("UTC").tz_convert("Europe/Berlin")
    expected = pd.date_range(local[-1], periods=37, freq="h")[1:]
    assert (stamps == expected).all()
    assert len({stamp.utcoffset() for stamp in [*local, *stamps]}) == 2


def test_naive_local_times_of_a_repeated_hour_are_refused_with_the_way_out():
    local = pd.date_range("2024-10-27", periods=6, freq="h", tz="Europe/Berlin").tz_localize(None)
    with pytest.raises(ValueError, match=r"[Dd]uplicate time 2024-10-27 02:00"):
        validate(from_wide(hourly(local)))
    frame = hourly(local).rename_axis("ds").reset_index().melt("ds", var_name="unique_id", value_name="y")
    with pytest.raises(ValueError, match=r"2024-10-27"):
        validate(from_long(frame, ids="variates"))


def test_a_skipped_hour_of_naive_local_times_is_a_gap_that_can_be_filled():
    local = pd.date_range("2024-03-31", periods=6, freq="h", tz="Europe/Berlin").tz_localize(None)
    ds = from_wide(hourly(local))
    with pytest.raises(ValueError, match="after 2024-03-31 01:00"):
        validate(ds.assign_attrs(freq="h"))
    filled, report = regularize(ds, "h")
    assert report["inserted"] == 1
    assert np.isnan(filled["target"].sel(time="2024-03-31 02:00")).all()


def test_calendar_follows_the_local_clock_through_the_change():
    """What happens at 8 in the morning is found before and after the change, in a zone and only there."""
    times = pd.date_range("2024-01-01", "2024-06-01", freq="h", inclusive="left")
    eight = (times.tz_localize("UTC").tz_convert("Europe/Berlin").hour == 8).astype(float)
    from omnissm.timeseries.time_features import calendar_features

    local, names = calendar_features(times.to_numpy(), "h", "Europe/Berlin")
    hour = local[:, names.index("hour_of_day")]
    assert len(np.unique(hour[eight == 1])) == 1
    utc, _ = calendar_features(times.to_numpy(), "h")
    assert len(np.unique(utc[eight == 1, names.index("hour_of_day")])) == 2


@pytest.mark.parametrize(
    ("start", "freq", "expected"),
    [
        ("2023-12-22", "D", "2024-02-29"),
        ("2018-12-31", "ME", "2024-02-29"),
        ("2023-12-31 21:00", "h", "2024-01-03 10:00"),
    ],
)
def test_leap_days_and_ends_of_years(start, freq, expected):
    count = {"D": 68, "ME": 60, "h": 60}[freq]
    model = Forecaster("window_mean", 24, 4).fit(from_wide(hourly(pd.date_range(start, periods=count, freq=freq))))
    stamps = pd.DatetimeIndex(model.predict()["valid_time"].values[0])
    assert pd.Timestamp(expected) in stamps
    assert (stamps == pd.date_range(stamps[0], periods=4, freq=freq)).all()


@pytest.mark.parametrize(
    ("old", "new"), [("H", "h"), ("15T", "15min"), ("M", "ME"), ("Q", "QE"), ("A", "YE"), ("S", "s")]
)
def test_old_and_new_names_of_a_frequency_go_together(old, new):
    ds = from_wide(hourly(pd.date_range("2000-01-31", periods=40, freq=new)))
    one, two = ds.assign_attrs(freq=old), ds.assign_attrs(freq=new)
    model = Forecaster("last_value", 6, 3).fit(one, coverages=None)
    assert model.predict(two).attrs["freq"] == model.predict(one).attrs["freq"]
    xr.testing.assert_identical(model.predict(two), model.predict(one))


@pytest.fixture(scope="module")
def gappy():
    """Gaps at both ends, a silent day, a variate that stays away half the time, covariates with holes."""
    rng = np.random.default_rng(0)
    times = pd.date_range("2024-01-01", periods=260, freq="h")
    target = rng.normal(size=(260, 3)) + np.sin(2 * np.pi * np.arange(260) / 24)[:, None]
    target[:5] = target[-4:] = target[100:124] = np.nan
    target[rng.random(260) < 0.5, 1] = np.nan
    past = np.where(rng.random((260, 1)) < 0.2, np.nan, rng.normal(size=(260, 1)))
    future = rng.normal(size=(260, 2))
    static = np.array([[1.0], [np.nan], [2.0]])
    return xr.Dataset(
        {
            "target": (("time", "variate"), target),
            "past": (("time", "past_feature"), past),
            "future": (("time", "future_feature"), future),
            "static": (("variate", "static_feature"), static),
        },
        {"time": times, "variate": ["a", "b", "c"], "past_feature": ["p"], "future_feature": ["u", "v"]},
        {"freq": "h"},
    )


FORMS = [
    {},
    {"mask_input": True, "instance_norm": False},
    {"head": "closed_loop"},
    {"mixer": {"coupling": "pooled"}},
    {"mixer": {"selective": False, "structure": "companion"}},
    {"seasons": [12, 24]},
]


@pytest.mark.parametrize("args", FORMS, ids=str)
@pytest.mark.parametrize("distribution", [None, "normal"])
def test_missing_values_anywhere_leave_finite_losses_and_forecasts(gappy, args, distribution):
    model = Forecaster(
        "chimera_tiny",
        24,
        6,
        distribution=distribution,
        model_args={"patch_len": 6, "stride": 6, "d_model": 8, **args},
        max_steps=3,
    )
    model.fit(gappy, max_epochs=1, batch_size=64, val=0.3, progress=False, coverages=None)
    assert np.isfinite(model.history[["train_loss", "val_loss"]]).all(axis=None)
    forecast = model.backtest(gappy, start=150, stride=7, progress=False)
    assert np.isfinite(forecast["mean"]).all()
    assert all(torch.isfinite(p).all() for p in model.net.parameters())


def test_a_hole_in_known_covariates_is_listed(gappy):
    model = Forecaster("chimera_tiny", 24, 6, model_args={"patch_len": 6, "stride": 6, "d_model": 8}, max_steps=1)
    model.fit(gappy, max_epochs=1, val=None, progress=False)
    with pytest.raises(ValueError, match=r"missing at 2 times: 2024-01-11 20:00, 2024-01-11 21:00;"):
        model.predict()  # from the last target, four steps before the end of the covariates
    holed = gappy.copy(deep=True)
    holed["future"][150, 0] = np.nan
    with pytest.raises(ValueError, match="missing at 1 times: 2024-01-07 06:00"):
        Forecaster("chimera_tiny", 24, 6).fit(holed, max_epochs=1, progress=False)


def test_infinite_values_and_text_are_refused(tmp_path):
    ds = from_wide(hourly(pd.date_range("2024", periods=50, freq="h")))
    ds["target"][7, 1] = np.inf
    with pytest.raises(ValueError, match=r"[Ii]nfinite"):
        Forecaster("last_value", 6, 2).fit(ds)
    (tmp_path / "words.csv").write_text("time,a\n2024-01-01,1\n2024-01-02,many\n")
    with pytest.raises(ValueError, match="many"):
        read_series(tmp_path / "words.csv", time="time")


def test_a_model_of_a_later_version_is_refused_with_a_sentence(tmp_path):
    ds = from_wide(hourly(pd.date_range("2024", periods=50, freq="h")))
    path = Forecaster("last_value", 6, 2).fit(ds, coverages=None).save(tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"omnissm": "99.1.0"}))
    with pytest.raises(ValueError, match=r"written by omnissm 99\.1\.0, this is .* Update with: pip install"):
        Forecaster.load(path)


def test_tiny_steps_do_not_vanish():
    """1 - a by expm1: a layer with steps of 1e-7 still passes its input on, in proportion."""
    net = create_model("chimera_tiny", lookback=24, horizon=2, n_variates=2, patch_len=6, stride=6).eval()
    mixer = next(part for part in net.modules() if hasattr(part, "dt1_bias"))
    x = torch.randn(1, 2, 5, 32)
    found = []
    for step in (1e-7, 2e-7):
        with torch.no_grad():
            mixer.dt1_bias.fill_(np.log(np.expm1(step)))
            mixer.dt2_bias.fill_(np.log(np.expm1(step)))
            mixer.dt_proj.zero_()
            mixer.D.zero_()
        found.append(mixer(x).detach())
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[1], 2 * found[0], rtol=1e-3, atol=0)


def test_two_thousand_origins_in_one_go():
    """Batched over origins: 30 s are allowed on a quiet core, and no single forecasts are made."""
    times = pd.date_range("2024-01-01", periods=2200, freq="h")
    data = from_wide(hourly(times))
    model = Forecaster("chimera_tiny", 96, 24, max_steps=2)
    model.fit(data, max_epochs=1, progress=False, coverages=None)
    calls, forward = [], model.net.forward
    model.net.forward = lambda batch: calls.append(len(batch.x)) or forward(batch)
    begin = time.process_time()
    forecast = model.backtest(data, progress=False)
    assert forecast.sizes["cutoff"] > 2000
    assert time.process_time() - begin < 30
    assert max(calls) == 256
    assert len(calls) == -(-forecast.sizes["cutoff"] // 256)
    windows, _ = create_windows(prepare(data, model.state), model.state, range(96, 2200), 24)
    assert len(windows) == forecast.sizes["cutoff"]
