import numpy as np
import pandas as pd
import pytest

from omnissm.timeseries.freq import (
    check_freq,
    check_times,
    infer_freq,
    normalize_freq,
    same_freq,
    season_length,
    stamp,
    step_times,
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("H", "h"),
        ("h", "h"),
        ("15T", "15min"),
        ("M", "ME"),
        ("ME", "ME"),
        ("Q", "QE-DEC"),
        ("A", "YE-DEC"),
        ("2S", "2s"),
    ],
)
def test_both_spellings_of_an_alias_mean_the_same(old, new):
    assert normalize_freq(old) == new
    assert normalize_freq(normalize_freq(old)) == new


@pytest.mark.parametrize("freq", ["fortnight", "", 0, -2, 1.5, True])
def test_unknown_frequencies_are_refused(freq):
    with pytest.raises(ValueError, match="freq"):
        normalize_freq(freq)


@pytest.mark.parametrize(
    ("freq", "season"),
    [
        *[("h", 24), ("H", 24), ("2h", 12), ("15min", 96), ("min", 1440), ("D", 7), ("B", 5), ("W", 52)],
        *[("ME", 12), ("MS", 12), ("QE", 4), ("7h", 1), ("YE", 1), (1, 1), (None, 1)],
    ],
)
def test_season_length(freq, season):
    assert season_length(freq) == season


@pytest.mark.parametrize("freq", ["h", "15min", "D", "W-SUN", "ME", "MS", "QE-DEC", 3])
def test_step_times_follow_their_own_frequency(freq):
    start = 5 if isinstance(freq, int) else pd.date_range("2020-01-01", periods=1, freq=freq)[0].to_numpy()
    times = step_times(start, 30, freq)
    check_times(times)
    check_freq(times, freq)
    assert infer_freq(times) == normalize_freq(freq)


def test_first_gap_is_shown_with_its_place():
    times = np.delete(pd.date_range("2013-02-03", periods=10, freq="h").to_numpy(), 4)
    with pytest.raises(
        ValueError, match=r"after 2013-02-03 03:00 \(row 3\) comes 2013-02-03 05:00, expected 2013-02-03 04:00"
    ):
        check_freq(times, "h")
    assert infer_freq(times) is None


def test_first_time_off_an_anchored_frequency():
    with pytest.raises(ValueError, match="the first, 2020-01-01 00:00, is not on it"):
        check_freq(pd.date_range("2020-01-01", periods=5, freq="MS").to_numpy(), "ME")


def test_alias_needs_dates_and_step_needs_integers():
    with pytest.raises(ValueError, match="does not fit"):
        check_freq(np.arange(5), "h")
    with pytest.raises(ValueError, match="does not fit"):
        check_freq(pd.date_range("2020", periods=5, freq="h").to_numpy(), 1)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 1, 1, 2], "Duplicate time 1 at row 2"),
        ([0, 2, 1, 3], "not sorted: row 2 is 1, after 2"),
        ([], "no time steps"),
        (["a", "b"], "expected datetime64 or integers"),
        ([0.0, 1.0], "expected datetime64 or integers"),
    ],
)
def test_bad_time_axes(times, message):
    with pytest.raises(ValueError, match=message):
        check_times(np.array(times, dtype=np.int64 if not times else None))


def test_nat_is_no_time():
    with pytest.raises(ValueError, match="no valid time at row 1"):
        check_times(np.array(["2020-01-01", "NaT"], dtype="datetime64[ns]"))


def test_stamp_is_short_and_exact():
    assert stamp(np.datetime64("2013-02-03T04:00")) == "2013-02-03 04:00"
    assert stamp(np.datetime64("2013-02-03T04:00:07")) == "2013-02-03 04:00:07"
    assert stamp(np.int64(7)) == "7"


def test_spellings_of_the_same_steps():
    for one, other in (("60min", "h"), ("H", "h"), ("24h", "D"), (2, 2), ("ME", "M")):
        assert same_freq(one, other)
    for one, other in (("30min", "h"), ("ME", "MS"), ("W-SUN", "W-MON"), (1, 2), (1, "h")):
        assert not same_freq(one, other)
