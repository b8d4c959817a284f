import numpy as np
import pandas as pd
import pytest
import xarray as xr

from omnissm.timeseries.frames import from_numpy
from omnissm.timeseries.schema import canonical, check_future, extend, read_block, regularize, validate


@pytest.fixture
def ds() -> xr.Dataset:
    values = np.random.default_rng(0).normal(size=(30, 3))
    return from_numpy(values, start="2020-01-01", freq="h", variates=["a", "b", "c"])


def _with(ds: xr.Dataset, row: int, column: int, value: float) -> xr.Dataset:
    values = ds["target"].to_numpy().copy()
    values[row, column] = value
    return ds.assign(target=ds["target"].copy(data=values))


def test_a_good_dataset_passes(ds):
    validate(ds)
    validate(canonical(ds))


def test_something_else_is_a_type_error():
    with pytest.raises(TypeError, match="from_long, from_wide or from_numpy"):
        validate(pd.DataFrame())


def test_each_violation_is_named_in_one_line(ds):
    hours = ds["time"].to_numpy()
    cases = {
        "no variable 'target'": ds.rename(target="y"),
        "has dimensions": ds.rename(variate="channel"),
        "has no variate: dimension 'variate' has length 0": ds.isel(variate=slice(0)),
        "dtype object, expected numbers": ds.assign(target=ds["target"].astype(object)),
        "dtype <U.*, expected numbers": ds.assign(target=ds["target"].astype(str)),
        "no coordinate 'time'": ds.drop_vars("time"),
        "not sorted: row 2": ds.isel(time=[0, 5, 3, 6]),
        "Duplicate time 2020-01-01 03:00 at row 2.*regularize": ds.isel(time=[0, 3, 3, 6]),
        r"after 2020-01-01 03:00 \(row 3\) comes 2020-01-01 05:00": ds.drop_isel(time=4),
        "infinite.* in variate b at 2020-01-01 07:00": _with(ds, 7, 1, np.inf),
        "Variate c has no observed value": ds.assign(target=ds["target"].where(ds["variate"] != "c")),
        "holds 'a' twice": ds.assign_coords(variate=["a", "b", "a"]),
        "expected strings": ds.assign_coords(variate=[1, 2, 3]),
        "'observed' has dtype float": ds.assign(observed=ds["target"]),
        "'past' has dimensions": ds.assign(past=ds["target"]),
        "Unknown freq 'nonsense'": ds.assign_attrs(freq="nonsense"),
        "expected datetime64 or integers": ds.assign_coords(time=hours.astype(str)),
    }
    for message, bad in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            validate(bad)
        assert "\n" not in str(caught.value)


def test_all_missing_by_the_mask_counts_as_missing(ds):
    hidden = xr.DataArray(np.tile([True, True, False], (30, 1)), dims=("time", "variate"))
    with pytest.raises(ValueError, match="Variate c"):
        validate(ds.assign(observed=hidden))


def test_value_beyond_float32_is_refused(ds):
    wide = ds.assign(target=ds["target"].astype(float))
    with pytest.raises(ValueError, match="beyond float32"):
        validate(_with(wide, 2, 0, 1e300))


def test_canonical_adds_dims_mask_and_order(ds):
    out = canonical(ds.transpose("variate", "time"))
    assert out["target"].dims == ("series", "time", "variate")
    assert out["target"].dtype == np.float32
    assert out["observed"].to_numpy().all()
    assert out["series"].to_numpy().tolist() == ["0"]
    np.testing.assert_array_equal(out["target"].to_numpy()[0], ds["target"].to_numpy())
    xr.testing.assert_identical(canonical(out), out)


def test_canonical_target_is_nan_exactly_where_not_observed(ds):
    observed = xr.ones_like(ds["target"], dtype=bool)
    observed[3, 1] = False
    out = canonical(_with(ds, 5, 2, np.nan).assign(observed=observed))
    np.testing.assert_array_equal(np.isnan(out["target"].to_numpy()), ~out["observed"].to_numpy())
    assert np.argwhere(~out["observed"].to_numpy()[0]).tolist() == [[3, 1], [5, 2]]


def test_canonical_does_not_copy_what_fits(ds):
    base = canonical(ds)
    assert np.shares_memory(base["target"].to_numpy(), ds["target"].to_numpy())
    assert base["observed"].to_numpy().strides == (0, 0, 0)  # a complete mask costs nothing


def test_read_block_is_nan_where_not_observed(ds):
    observed = xr.ones_like(ds["target"], dtype=bool)
    observed[3, 1] = False
    block = read_block(ds.assign(observed=observed), "target", 0, slice(2, 5))
    assert block.shape == (3, 3)
    assert np.argwhere(np.isnan(block)).tolist() == [[1, 1]]


def test_regularize_fills_gaps_and_reports(ds):
    gappy = ds.drop_isel(time=[4, 5, 20])
    out, report = regularize(gappy, "H")
    assert report == {"sorted": 0, "duplicates": 0, "inserted": 3}
    validate(out)
    assert np.flatnonzero(np.isnan(out["target"].to_numpy()[:, 0])).tolist() == [4, 5, 20]
    with pytest.raises(ValueError, match="3 steps are missing, the first 2020-01-01 04:00"):
        regularize(gappy, "h", gaps="error")


def test_regularize_sorts_and_resolves_duplicates_only_when_asked(ds):
    twice = xr.concat([ds.isel(time=[3, 0, 1, 2]), ds.isel(time=[2]) + 2.0], dim="time")
    with pytest.raises(ValueError, match="1 duplicate times, the first 2020-01-01 02:00"):
        regularize(twice, "h")
    first, report = regularize(twice, "h", duplicates="first")
    assert report == {"sorted": 1, "duplicates": 1, "inserted": 0}
    np.testing.assert_array_equal(first["target"].to_numpy(), ds["target"].to_numpy()[:4])
    mean, _ = regularize(twice, "h", duplicates="mean")
    np.testing.assert_allclose(mean["target"].to_numpy()[2], ds["target"].to_numpy()[2] + 1.0, rtol=1e-6)
    validate(mean)


def test_regularize_of_a_regular_series_changes_nothing(ds):
    out, report = regularize(ds, "h")
    xr.testing.assert_identical(out, ds)
    assert not any(report.values())


def test_regularize_keeps_flags_as_flags(ds):
    flags = xr.DataArray(np.ones((30, 3), bool), dims=("time", "variate"))
    out, _ = regularize(ds.assign(observed=flags, label=flags).drop_isel(time=4), "h")
    assert out["label"].dtype == bool
    assert not out["label"].to_numpy()[4].any()
    assert np.isnan(out["target"].to_numpy()[4]).all()


def test_regularize_refuses_times_between_steps_and_mistyped_frequencies(ds):
    off = ds.assign_coords(time=ds["time"].to_numpy() + np.where(np.arange(30) == 7, 60, 0).astype("timedelta64[s]"))
    with pytest.raises(ValueError, match="2020-01-01 07:01 does not lie on the grid"):
        regularize(off, "h")
    with pytest.raises(ValueError, match=r"would make .* steps"):
        regularize(ds, "us")
    with pytest.raises(ValueError, match="does not fit"):
        regularize(ds, 1)
    with pytest.raises(ValueError, match="duplicates='last' is unknown"):
        regularize(ds, "h", duplicates="last")


@pytest.mark.parametrize("freq", ["h", "ME"])
def test_extend_continues_the_time_axis(freq):
    ds = from_numpy(np.ones((12, 2)), start="2020-01-31", freq=freq)
    longer = extend(ds, 5)
    validate(longer)
    assert longer.sizes["time"] == 17
    assert longer["target"].to_numpy()[12:].size == 10
    assert np.isnan(longer["target"].to_numpy()[12:]).all()


def test_extend_asks_for_future_covariates_and_lists_missing_stamps(ds):
    ds = ds.assign(future=(("time", "future_feature"), np.ones((30, 1)))).assign_coords(future_feature=["holiday"])
    with pytest.raises(ValueError, match="missing at 2 times: 2020-01-02 06:00, 2020-01-02 07:00"):
        extend(ds, 2)
    times = pd.date_range("2020-01-02 06:00", periods=2, freq="h")
    future = xr.DataArray(
        [[2.0], [3.0]], dims=("time", "future_feature"), coords={"time": times, "future_feature": ["holiday"]}
    )
    longer = extend(ds, 2, future)
    assert longer["future"].to_numpy()[-3:, 0].tolist() == [1.0, 2.0, 3.0]
    check_future(longer)


def test_canonical_names_features_and_counts_unsigned_times_in_int64(ds):
    plain = ds.assign(future=(("time", "future_feature"), np.ones((30, 2))))
    assert canonical(plain)["future_feature"].to_numpy().tolist() == ["0", "1"]
    counted = canonical(from_numpy(np.ones((4, 1)), times=np.arange(4, dtype=np.uint64)))
    assert extend(counted, 2)["time"].dtype == np.int64
    with pytest.raises(ValueError, match="beyond int64"):
        validate(from_numpy(np.ones((2, 1)), times=np.array([0, 2**63], np.uint64)))


def test_regularize_averages_only_what_runs_over_time(ds):
    flags = xr.DataArray(np.arange(30) == 5, dims="time")
    whole = ds.assign(
        label=flags,
        kind=("time", np.arange(30)),
        static=(("variate", "static_feature"), np.ones((3, 1))),
    )
    twice = xr.concat(
        [whole, whole.assign(target=ds["target"] + 2, label=~flags).isel(time=[4, 5])], "time", data_vars="minimal"
    )
    out, report = regularize(twice, "h", duplicates="mean")
    validate(out)
    assert report["duplicates"] == 2
    assert out["static"].dims == ("variate", "static_feature")
    assert out["label"].dtype == bool
    assert np.flatnonzero(out["label"]).tolist() == [4, 5]
    assert out["kind"].to_numpy().tolist() == list(range(30))
    assert out["target"].dims == ("time", "variate")
    np.testing.assert_allclose(
        out["target"][4:7] - ds["target"][4:7], np.array([[1.0], [1], [0]]) * np.ones(3), atol=1e-6
    )


def test_static_must_not_change_over_time(ds):
    with pytest.raises(ValueError, match=r"over \(series or variate, static_feature\)"):
        validate(ds.assign(static=(("time", "static_feature"), np.ones((30, 1)))))
