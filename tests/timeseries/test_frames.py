import numpy as np
import pandas as pd
import pytest
import xarray as xr

from omnissm.timeseries.files import write_series
from omnissm.timeseries.frames import from_long, from_numpy, from_wide, to_long, to_pandas, to_wide
from omnissm.timeseries.schema import validate


def long_frame(seed: int = 0) -> pd.DataFrame:
    """Two series of different length with holes, rows shuffled, one row without a value."""
    rng = np.random.default_rng(seed)
    rows = pd.DataFrame(
        {
            "unique_id": ["b"] * 8 + ["a"] * 5,
            "ds": [
                *pd.date_range("2020-01-01", periods=8, freq="D"),
                *pd.date_range("2020-01-03", periods=5, freq="D"),
            ],
            "y": rng.normal(size=13),
            "load": rng.normal(size=13),
            "holiday": rng.integers(0, 2, 13),
            "height": [3.5] * 8 + [7.0] * 5,
        }
    ).drop(index=[2, 10])
    rows.loc[4, "y"] = np.nan
    return rows.sample(frac=1, random_state=seed).reset_index(drop=True)


def assert_same_table(one: pd.DataFrame, other: pd.DataFrame) -> None:
    keys = ["unique_id", "ds"]
    one, other = (f.sort_values(keys).reset_index(drop=True)[sorted(f.columns)] for f in (one, other))
    one, other = (f.astype({name: "float32" for name in f.columns if name not in keys}) for f in (one, other))
    pd.testing.assert_frame_equal(one, other, check_dtype=False)


def test_long_series_with_covariates_round_trip():
    frame = long_frame()
    ds = from_long(frame, ids="series", past=["load"], future=["holiday"], static=["height"])
    validate(ds)
    assert ds["target"].dims == ("series", "time", "variate")
    assert ds.attrs["freq"] == "D"
    assert ds.sizes["time"] == 8
    assert_same_table(to_long(ds), frame)


def test_long_variates_round_trip():
    frame = long_frame()[["unique_id", "ds", "y"]]
    ds = from_long(frame, ids="variates")
    assert ds["target"].dims == ("time", "variate")
    assert_same_table(to_long(ds), frame)
    again = from_long(to_long(ds), ids="variates")
    xr.testing.assert_equal(again.sortby("variate"), ds.sortby("variate"))


def test_several_value_columns_are_variates_of_each_series():
    frame = long_frame()[["unique_id", "ds", "y", "load"]]
    ds = from_long(frame, ids="series", values=["y", "load"])
    assert ds["variate"].to_numpy().tolist() == ["y", "load"]
    assert_same_table(to_long(ds), frame)


def test_integer_ids_and_zones_come_back():
    times = pd.date_range("2013-03-10", periods=30, freq="h", tz="America/New_York")  # a day with 23 hours
    frame = pd.DataFrame({"sensor": [7] * 30, "when": times, "value": np.arange(30.0)})
    ds = from_long(frame, ids="series", id_column="sensor", time="when", values="value")
    assert ds["time"].to_numpy()[0] == np.datetime64("2013-03-10T05:00")
    assert ds.attrs["freq"] == "h"
    back = to_long(ds)
    assert back["sensor"].tolist() == [7] * 30
    assert (back["when"] == times).all()
    assert str(back["when"].dtype.tz) == "America/New_York"


def test_wide_frames_and_their_way_back():
    frame = pd.DataFrame(
        {"when": pd.date_range("2020", periods=5, freq="h"), "a": np.arange(5), "b": [1.5, None, 2, 3, 4]}
    )
    ds = from_wide(frame, time="when")
    validate(ds)
    assert ds.attrs["freq"] == "h"
    assert ds["variate"].to_numpy().tolist() == ["a", "b"]
    pd.testing.assert_frame_equal(to_wide(ds, time="when"), frame, check_dtype=False)
    indexed = from_wide(frame.set_index("when"), variates=["b"])
    np.testing.assert_array_equal(indexed["target"].to_numpy()[:, 0], ds["target"].to_numpy()[:, 1])
    with pytest.raises(ValueError, match="holds one series, the data has 2"):
        to_wide(from_numpy(np.zeros((2, 5, 1))))


def test_numpy_with_start_and_frequency():
    ds = from_numpy(np.zeros((3, 2)), start="2020-01-31", freq="M")
    assert ds["time"].to_numpy().astype("M8[D]").astype(str).tolist() == ["2020-01-31", "2020-02-29", "2020-03-31"]
    assert ds.attrs["freq"] == "ME"
    assert from_numpy(np.zeros(4), start=10, freq=5)["time"].to_numpy().tolist() == [10, 15, 20, 25]
    assert from_numpy(np.zeros((2, 4, 3))).sizes == {"series": 2, "time": 4, "variate": 3}


def test_irregular_times_have_no_frequency():
    times = pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-05", "2020-01-06"])
    assert "freq" not in from_numpy(np.zeros((4, 1)), times=times).attrs
    with pytest.raises(ValueError, match=r"first|after 2020-01-02 00:00"):
        from_numpy(np.zeros((4, 1)), times=times, freq="D")


def test_frames_of_another_library_come_through_arrow():
    pytest.importorskip("pyarrow")
    import pyarrow as pa

    class DataFrame:
        """What is used of a polars frame."""

        def to_arrow(self) -> pa.Table:
            return pa.table({"unique_id": ["a", "a"], "ds": [1, 2], "y": [0.5, None]})

    DataFrame.__module__ = "polars.dataframe.frame"
    assert_same_table(to_long(from_long(DataFrame(), ids="series")), to_pandas(DataFrame()))
    with pytest.raises(TypeError, match="pandas or polars"):
        to_pandas([1, 2])


def test_bad_tables_say_what_is_wrong():
    frame = long_frame()
    plain = frame[["unique_id", "ds", "y"]]
    columns = {"past": ["load"], "future": ["holiday"], "static": ["height"]}
    cases = [
        ("Columns load, holiday, height have no role", lambda: from_long(frame, ids="series")),
        ("no column 'value'", lambda: from_long(plain, ids="series", values="value")),
        ("b has two rows at", lambda: from_long(pd.concat([plain, plain[plain["unique_id"] == "b"]]), ids="series")),
        (
            "Static column 'load' varies within",
            lambda: from_long(frame, ids="series", **{**columns, "past": [], "static": ["load", "height"]}),
        ),
        ("one value column and no past", lambda: from_long(frame, ids="variates", past=["load"])),
        ("ids='columns' is unknown", lambda: from_long(plain, ids="columns")),
        ("holds 'x' in row 0, expected numbers", lambda: from_long(plain.assign(y=["x"] * len(plain)), ids="series")),
        ("two columns 'y'", lambda: from_long(pd.concat([plain, plain["y"]], axis=1), ids="series")),
        ("two columns 'a'", lambda: from_wide(pd.DataFrame([[1.0, 2.0]], columns=["a", "a"], index=[3]))),
        ("infinite", lambda: validate(from_wide(pd.DataFrame({"a": [1.0, 1e300]})))),
        ("Times have dtype", lambda: from_long(plain.assign(ds="soon"), ids="series")),
        ("'unique_id' is empty in row 0", lambda: from_long(plain.assign(unique_id=None), ids="series")),
        ("3 times were given for 4 rows", lambda: from_numpy(np.zeros((4, 1)), times=np.arange(3))),
        ("no column of values", lambda: from_wide(pd.DataFrame({"time": [1, 2]}), time="time")),
        ("1 variate names were given for 2", lambda: from_numpy(np.zeros((4, 2)), variates=["a"])),
        ("give start as a date", lambda: from_numpy(np.zeros((4, 2)), freq="h")),
        ("give freq as a pandas alias", lambda: from_numpy(np.zeros((4, 2)), start="2020-01-01")),
        ("expected numbers", lambda: from_numpy(np.array([["a"]]))),
    ]
    for message, call in cases:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_tables_hold_only_what_was_observed(tmp_path):
    ds = from_numpy(np.array([[1.0, 2], [3, 4], [5, 6]]), start="2020-01-01", freq="D", variates=["a", "b"])
    ds = ds.assign(observed=(("time", "variate"), np.array([[True, True], [False, True], [False, True]])))
    assert to_long(ds)["unique_id"].tolist() == ["a", "b", "b", "b"]
    np.testing.assert_array_equal(to_wide(ds)["a"], [1, np.nan, np.nan])
    written = pd.read_csv(write_series(ds, tmp_path / "s.csv", layout="wide"))
    np.testing.assert_array_equal(written["a"], [1, np.nan, np.nan])
    panel = to_long(ds.expand_dims(series=["s"]), ids="series")
    np.testing.assert_array_equal(panel["a"], [1, np.nan, np.nan])
