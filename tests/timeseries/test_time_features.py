import numpy as np
import pandas as pd
import pytest

from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.freq import normalize_freq
from omnissm.timeseries.schema import canonical
from omnissm.timeseries.time_features import add_time_features, calendar_features, fourier_features


@pytest.mark.parametrize(
    ("freq", "count"), [("15min", 6), ("s", 6), ("h", 5), ("H", 5), ("D", 4), ("W", 3), ("ME", 1), ("QE", 1), (None, 6)]
)
def test_features_follow_the_frequency_and_lie_in_half_a_unit(freq, count):
    times = pd.date_range("2019-12-31", periods=300, freq=normalize_freq(freq or "7h")).to_numpy()
    values, names = calendar_features(times, freq)
    assert values.shape == (len(times), count)
    assert len(names) == count
    assert values.dtype == np.float32
    assert values.min() >= -0.5
    assert values.max() <= 0.5


def test_ends_of_each_range():
    values, names = calendar_features(np.array(["2020-12-31T23:59"], "M8[ns]"))
    by_name = dict(zip(names, values[0]))
    assert by_name["minute_of_hour"] == by_name["hour_of_day"] == by_name["month"] == by_name["day_of_month"] == 0.5
    assert by_name["day_of_year"] == 0.5  # day 366
    assert by_name["day_of_week"] == 0.0  # a Thursday, 3 / 6 - 1 / 2
    first, _ = calendar_features(np.array(["2021-01-01T00:00"], "M8[ns]"))
    assert first.min() == -0.5


def test_local_time_at_daylight_saving_changes():
    spring = pd.date_range("2013-03-10 05:00", periods=4, freq="h").to_numpy()  # 2 o'clock is skipped in New York
    hours = 23 * (calendar_features(spring, "h", "America/New_York")[0][:, 0] + 0.5)
    np.testing.assert_allclose(hours, [0, 1, 3, 4], atol=1e-4)
    autumn = pd.date_range("2013-11-03 05:00", periods=3, freq="h").to_numpy()  # 1 o'clock comes twice
    hours = 23 * (calendar_features(autumn, "h", "America/New_York")[0][:, 0] + 0.5)
    np.testing.assert_allclose(hours, [1, 1, 2], atol=1e-4)


def test_fourier_pairs_have_their_period_and_agree_between_cuts():
    times = pd.date_range("2020-01-01", periods=400, freq="h").to_numpy()
    values, names = fourier_features(times, [24, 168])
    assert names == ["sin_24", "cos_24", "sin_168", "cos_168"]
    np.testing.assert_allclose(values[:-24, :2], values[24:, :2], atol=1e-4)
    np.testing.assert_allclose(values[:, 0] ** 2 + values[:, 1] ** 2, 1.0, atol=1e-5)
    np.testing.assert_allclose(fourier_features(times[100:], [24, 168])[0], values[100:], atol=1e-5)


def test_wrong_use_is_named():
    hours = pd.date_range("2020", periods=3, freq="h").to_numpy()
    with pytest.raises(ValueError, match="Unknown time zone 'Mars/Olympus'"):
        calendar_features(hours, "h", "Mars/Olympus")
    with pytest.raises(ValueError, match="need datetime64 times"):
        calendar_features(np.arange(5))
    with pytest.raises(ValueError, match="positive"):
        fourier_features(hours, [0])


def test_added_features_are_known_in_advance_and_join_given_ones():
    ds = canonical(from_numpy(np.zeros((2, 48, 3)), start="2020-01-01", freq="h"))
    out = add_time_features(ds, calendar=True, fourier=[24])
    assert out["future"].dims == ("series", "time", "future_feature")
    assert out.sizes["future_feature"] == 7
    given = ds.assign(future=(("series", "time", "future_feature"), np.ones((2, 48, 1), "f4"))).assign_coords(
        future_feature=["x"]
    )
    both = add_time_features(given, calendar=True, fourier=[24])
    assert both["future_feature"].to_numpy()[0] == "x"
    np.testing.assert_array_equal(both["future"].to_numpy()[..., 1:], out["future"].to_numpy())
    nameless = canonical(given.drop_vars("future_feature"))
    assert add_time_features(nameless)["future_feature"].to_numpy()[:2].tolist() == ["0", "time:hour_of_day"]


@pytest.mark.parametrize(
    ("freq", "period"), [("ME", 12), ("2MS", 6), ("QE", 4), ("B", 5), ("bh", 8), ("SME", 24), ("W-TUE", 52), ("h", 24)]
)
def test_fourier_counts_steps_of_the_frequency_whatever_the_cut(freq, period):
    times = pd.date_range("1969-06-01", periods=300, freq=freq).to_numpy()
    values, _ = fourier_features(times, [period], freq)
    steps = np.arange(len(times)) + np.arctan2(*values[0]) * period / (2 * np.pi)
    np.testing.assert_allclose(values[:, 0], np.sin(2 * np.pi * steps / period), atol=1e-4)
    np.testing.assert_array_equal(fourier_features(times[40:43], [period], freq)[0], values[40:43])


def test_fourier_of_irregular_times_counts_the_given_step():
    times = np.array([0, 1, 2, 3, 10, 20])
    values, _ = fourier_features(times, [4], base_step=2.0)
    np.testing.assert_allclose(values[:, 0], np.sin(2 * np.pi * times / 8), atol=1e-6)
    np.testing.assert_array_equal(fourier_features(times[3:], [4], base_step=2.0)[0], values[3:])
