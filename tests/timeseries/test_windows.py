import pickle
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from omnissm.timeseries.files import read_series, write_series
from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.scaling import create_scaler
from omnissm.timeseries.schema import canonical
from omnissm.timeseries.windows import WindowBatch, Windows, forward_fill


def counting(series: int = 2, length: int = 20, variates: int = 3) -> xr.Dataset:
    """Entry (s, t, v) is 1000 s + 10 t + v, so that every number says where it comes from."""
    s, t, v = np.ogrid[:series, :length, :variates]
    return from_numpy(1000 * s + 10 * t + v, start="2020-01-01", freq="h")


def assert_equal(one: WindowBatch, other: WindowBatch) -> None:
    for name, a, b in zip(WindowBatch._fields, one, other):
        assert (a is None) == (b is None), name
        if a is not None:
            assert torch.equal(a, b), name


@pytest.mark.parametrize("stride", [1, 3])
def test_windows_are_the_slices_they_say_they_are(stride):
    ds = counting()
    windows = Windows(ds, lookback=5, horizon=2, stride=stride)
    per_series = (20 - 7) // stride + 1
    assert len(windows) == 2 * per_series
    values = ds["target"].to_numpy()
    for k in range(len(windows)):
        one = windows[k]
        series, first = k // per_series, (k % per_series) * stride
        assert one.series == series
        assert one.origin == first + 4
        np.testing.assert_array_equal(one.x.T, values[series, first : first + 5])
        np.testing.assert_array_equal(one.y.T, values[series, first + 5 : first + 7])
        assert one.x_mask.all()
        assert one.y_mask.all()
        assert one.past is one.future is one.static is one.time_gap is None


def test_a_batch_is_its_windows_in_the_order_asked_for():
    windows = Windows(counting(), 5, 2)
    numbers = [27, 0, 3, 13, 14, 3, -1]
    batch = windows.get_batch(numbers)
    assert batch.x.shape == (7, 3, 5)
    assert batch.y.shape == (7, 3, 2)
    assert batch.x.is_contiguous()
    singles = [windows[k] for k in numbers]
    assert torch.equal(batch.x, torch.stack([one.x for one in singles]))
    assert torch.equal(batch.origin, torch.stack([one.origin for one in singles]))
    assert_equal(windows.__getitems__(numbers), batch)
    with pytest.raises(IndexError, match="Window 28 does not exist; there are 28"):
        windows.get_batch([28])


def test_batches_pass_over_every_window_once():
    windows = Windows(counting(), 5, 2)
    batches = list(windows.batches(8))
    assert [len(batch.series) for batch in batches] == [8, 8, 8, 4]
    assert torch.equal(torch.cat([batch.y for batch in batches]), windows.get_batch(range(28)).y)


def test_targets_stay_in_their_range_and_inputs_may_reach_back():
    windows = Windows(counting(1), 5, 2, targets=range(10, 14))
    batch = windows.get_batch(range(len(windows)))
    assert batch.origin.tolist() == [9, 10, 11]
    assert batch.y[:, 0].tolist() == [[100, 110], [110, 120], [120, 130]]
    assert Windows(counting(1), 5, 2, targets=range(8)).get_batch([0]).origin.item() == 4
    with pytest.raises(ValueError, match=r"within 0\.\.20"):
        Windows(counting(1), 5, 2, targets=range(10, 21))


def test_several_datasets_of_different_length():
    short, long = counting(1, 9), counting(2, 20)
    windows = Windows([short, long], 5, 2)
    assert len(windows) == 3 + 2 * 14
    assert windows.series_names == ["0", "0", "1"]
    batch = windows.get_batch([30, 0, 3, 17, 2])
    assert batch.series.tolist() == [2, 0, 1, 2, 0]
    assert batch.x[:, 0, 0].tolist() == [1130, 0, 0, 1000, 20]
    assert len(windows.times(0)) == 9
    assert len(windows.times(2)) == 20
    with pytest.raises(ValueError, match="share their variates"):
        Windows([short, counting(1, 20, 2)], 5, 2)


def test_missing_values_are_masked_and_never_leak():
    ds = counting(1, 12, 2)
    values = ds["target"].to_numpy().copy()
    values[0, [0, 3, 4, 8], 1] = np.nan
    ds = ds.assign(target=ds["target"].copy(data=values))
    zero = Windows(ds, 6, 3).get_batch(range(4))
    forward = Windows(ds, 6, 3, fill="forward").get_batch(range(4))
    for batch in (zero, forward):
        assert torch.isfinite(batch.x).all()
        assert torch.isfinite(batch.y).all()
        assert batch.x_mask[0, 1].tolist() == [False, True, True, False, False, True]
        assert batch.y_mask[0, 1].tolist() == [True, True, False]
        assert batch.y[0, 1].tolist() == [61, 71, 0]
    assert zero.x[0, 1].tolist() == [0, 11, 21, 0, 0, 51]
    assert forward.x[0, 1].tolist() == [0, 11, 21, 21, 21, 51]
    assert torch.equal(zero.x[:, 0], forward.x[:, 0])


def test_missing_inputs_are_zero_after_scaling():
    values = np.array([[5.0], [np.nan], [7.0], [9.0]])
    ds = canonical(from_numpy(values))
    scaler = create_scaler().fit(ds)
    batch = Windows(ds, 3, 1, scaler=scaler).get_batch([0])
    expected = (np.array([5.0, 7.0, 7.0]) - 7.0) / np.std([5.0, 7.0, 9.0])  # the gap becomes 0, the mean
    np.testing.assert_allclose(batch.x[0, 0], expected, rtol=1e-6)
    forward = Windows(ds, 3, 1, scaler=scaler, fill="forward").get_batch([0])
    np.testing.assert_allclose(forward.x[0, 0], expected[[0, 0, 2]], rtol=1e-6)


def test_an_explicit_mask_hides_values():
    ds = counting(1, 10, 1)
    observed = np.ones((1, 10, 1), bool)
    observed[0, 4] = False
    batch = Windows(ds.assign(observed=(ds["target"].dims, observed)), 5, 2).get_batch([0])
    assert batch.x_mask[0, 0].tolist() == [True] * 4 + [False]
    assert batch.x[0, 0, 4] == 0


def test_forward_fill_against_pandas():
    rng = np.random.default_rng(0)
    values = rng.normal(size=(40, 17)).astype(np.float32)
    values[rng.random(values.shape) < 0.4] = np.nan
    expected = pd.DataFrame(values).ffill(axis=1).fillna(0).to_numpy()
    np.testing.assert_array_equal(forward_fill(np.nan_to_num(values), ~np.isnan(values)), expected)


def test_scaled_windows_are_scaled_slices_for_each_series():
    ds = canonical(counting())
    scaler = create_scaler().fit(ds)
    scaled = scaler.transform(ds["target"].to_numpy())
    batch = Windows(ds, 5, 2, scaler=scaler).get_batch([0, 27])
    np.testing.assert_allclose(batch.x[0].T, scaled[0, :5], rtol=1e-6)
    np.testing.assert_allclose(batch.y[1].T, scaled[1, 18:], rtol=1e-6)
    one = Windows(ds.isel(series=[1]), 5, 2, scaler=scaler).get_batch([13])  # found by name, not by position
    torch.testing.assert_close(one.y[0], batch.y[1])


def test_filters_keep_exactly_the_windows_that_qualify():
    rng = np.random.default_rng(1)
    ds = counting(2, 40, 2)
    ds = ds.assign(target=ds["target"].where(rng.random(ds["target"].shape) > 0.08))
    everything = Windows(ds, 4, 3)
    batch = everything.get_batch(range(len(everything)))
    complete = (batch.x_mask.all(dim=(1, 2)) & batch.y_mask.all(dim=(1, 2))).nonzero()[:, 0]
    enough = (batch.y_mask.float().mean(dim=(1, 2)) >= 5 / 6 - 1e-6).nonzero()[:, 0]
    assert 0 < len(complete) < len(enough) < len(everything)
    assert_equal(next(Windows(ds, 4, 3, drop_incomplete=True).batches(1000)), everything.get_batch(complete))
    assert_equal(next(Windows(ds, 4, 3, min_observed=5 / 6).batches(1000)), everything.get_batch(enough))


def test_covariates_and_static_features_come_along():
    ds = counting(2, 12, 2)
    past = np.arange(2 * 12 * 1.0).reshape(2, 12, 1)
    ds = ds.assign(
        past=(("series", "time", "past_feature"), past),
        future=(("time", "future_feature"), np.arange(24.0).reshape(12, 2)),
        static=(("series", "static_feature"), [[1.0], [2.0]]),
    )
    batch = Windows(ds, 4, 2).get_batch([0, 7 + 3])
    assert batch.past.shape == (2, 1, 4)
    assert batch.past[1, 0].tolist() == [15, 16, 17, 18]
    assert batch.future.shape == (2, 2, 6)
    assert batch.future[1, 1].tolist() == [7, 9, 11, 13, 15, 17]
    assert batch.static.shape == (2, 2, 1)
    assert batch.static[:, 0, 0].tolist() == [1, 2]
    assert Windows(ds, 4, 2)[0].future.shape == (2, 6)


def test_a_missing_future_covariate_is_an_error_only_where_the_target_is_known():
    ds = counting(1, 10, 1)
    future = np.ones((10, 1))
    future[7] = np.nan
    with_gap = ds.assign(future=(("time", "future_feature"), future))
    with pytest.raises(ValueError, match="missing at 1 times: 2020-01-01 07:00"):
        Windows(with_gap, 4, 2)
    unknown = with_gap.assign(target=with_gap["target"].where(np.arange(10)[:, None] != 7))
    assert torch.isfinite(Windows(unknown, 4, 2).get_batch([0, 1, 2]).future).all()


def test_time_gap_counts_base_steps_between_irregular_times():
    minutes = np.array([0, 10, 20, 50, 60, 65, 75])
    times = np.datetime64("2020-01-01", "ns") + minutes.astype("timedelta64[m]")
    batch = Windows(from_numpy(np.zeros((7, 1)), times=times), 4, 1).get_batch([0, 2])
    assert batch.time_gap.tolist() == [[1, 1, 1, 3], [1, 3, 1, 0.5]]  # the first entry has no predecessor
    assert Windows(counting(), 4, 1)[0].time_gap is None


def test_time_gap_counts_a_given_step_even_between_regular_times():
    regular = from_numpy(np.zeros((7, 1)), start="2020-01-01", freq="6h")
    assert Windows(regular, 4, 1, base_step=3600e9)[0].time_gap.tolist() == [1, 6, 6, 6]


def test_lazy_windows_equal_those_in_memory(tmp_path):
    ds = canonical(counting(2, 50, 3))
    holes = np.random.default_rng(0).random(ds["target"].shape) < 0.2
    ds = ds.assign(target=ds["target"].where(~holes)).drop_vars("observed")
    ds["past"] = (("series", "time", "past_feature"), np.ones((2, 50, 1), "f4"))
    write_series(ds, tmp_path / "s.zarr")
    scaler = create_scaler().fit(canonical(ds))
    for target in (ds, ds.isel(series=0, drop=True)):
        path = write_series(target, tmp_path / "one.zarr")
        lazy = Windows(read_series(path), 6, 2, lazy=True, min_observed=0.5)
        eager = Windows(target, 6, 2, min_observed=0.5)
        assert len(lazy) == len(eager)
        assert_equal(lazy.get_batch([5, 1, 9]), eager.get_batch([5, 1, 9]))
    np.testing.assert_array_equal(create_scaler().fit(read_series(tmp_path / "s.zarr")).scale, scaler.scale)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"lookback": 19, "horizon": 2},
            "19 past and 2 future steps; the longest series has 20 steps, of which 1 may be targets",
        ),
        ({"lookback": 0, "horizon": 2}, "lookback must be at least 1, got 0"),
        ({"lookback": 4, "horizon": 2, "stride": 0}, "stride must be at least 1"),
        ({"lookback": 4, "horizon": 2, "fill": "back"}, "expected 'zero' or 'forward'"),
        ({"lookback": 4, "horizon": 2, "min_observed": 2}, "share"),
    ],
)
def test_impossible_windows_say_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        Windows(counting(), **arguments)


def test_pickling_carries_the_array_once():
    ds = counting(1, 5000, 4)
    windows = Windows(ds, 96, 96)
    windows.get_batch([0, 1])
    size = len(pickle.dumps(windows))
    assert size < 2 * ds["target"].nbytes + 100_000 + ds["time"].nbytes


MEMORY = """
import resource, sys
import numpy as np
from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.windows import Windows

Windows(from_numpy(np.zeros((300, 2), "f4")), 96, 96).get_batch(range(32))  # code is loaded before counting
rss = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
before = rss()
values = np.zeros((2_500, 5_000, 2), "f4")  # 100 MB
values[:] = 1
windows = Windows(from_numpy(values), 96, 96)
for start in range(0, len(windows), len(windows) // 100):
    windows.get_batch(range(start, min(start + 32, len(windows))))
sys.stdout.write(f"{len(windows)} {rss() - before}")
"""


@pytest.mark.slow
def test_ten_million_windows_need_hardly_more_than_their_array():
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout.split()
    assert int(out[0]) >= 10_000_000
    assert float(out[1]) < 120 * 1e6 / 2**20


@pytest.mark.slow
def test_ten_thousand_batches_in_seconds():
    windows = Windows(from_numpy(np.random.default_rng(0).normal(size=(17_420, 7))), 96, 96)
    numbers = np.random.default_rng(0).integers(0, len(windows), (10_000, 32))
    begin = time.process_time()
    for row in numbers:
        windows.get_batch(row)
    assert time.process_time() - begin < 5.0
