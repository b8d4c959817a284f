import importlib.util

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from omnissm.timeseries import files
from omnissm.timeseries.files import atomic_path, read_series, time_encoding, write_series
from omnissm.timeseries.frames import from_long, from_numpy
from omnissm.timeseries.schema import canonical, validate

BINARY = [".nc", ".zarr"]


@pytest.fixture
def ds() -> xr.Dataset:
    values = np.random.default_rng(0).normal(size=(2, 40, 3))
    values[1, 5:9, 2] = np.nan
    ds = canonical(
        from_numpy(values, start="2020-01-01", freq="h", series=["Zürich", "Bern"], variates=["t", "p", "q"])
    )
    return ds.assign_coords(units=("variate", ["degC", "hPa", ""])).assign_attrs(source="test")


@pytest.fixture
def forecast() -> xr.Dataset:
    rng = np.random.default_rng(1)
    cutoff = pd.date_range("2020-01-01", periods=4, freq="6h").to_numpy().astype("M8[ns]")
    steps = np.arange(1, 4) * np.timedelta64(1, "h")
    return xr.Dataset(
        {
            "mean": (("series", "cutoff", "horizon", "variate"), rng.normal(size=(2, 4, 3, 2)).astype("f4")),
            "quantiles": (("series", "cutoff", "horizon", "variate", "quantile"), rng.normal(size=(2, 4, 3, 2, 3))),
            "observed": (("series", "cutoff", "horizon", "variate"), rng.random((2, 4, 3, 2)) > 0.5),
        },
        coords={
            "series": ["a", "bb"],
            "cutoff": cutoff,
            "horizon": np.arange(1, 4),
            "variate": ["t", "p"],
            "quantile": [0.1, 0.5, 0.9],
            "units": ("variate", ["K", "hPa"]),
            "valid_time": (("cutoff", "horizon"), cutoff[:, None] + steps),
        },
        attrs={"model": "chimera_tiny", "model_args": "{}", "seed": 0, "freq": "h"},
    )


@pytest.mark.parametrize("suffix", BINARY)
@pytest.mark.parametrize("which", ["ds", "forecast"])
def test_reading_back_is_identical(tmp_path, request, suffix, which):
    original = request.getfixturevalue(which)
    path = write_series(original, tmp_path / f"file{suffix}")
    back = read_series(path)
    xr.testing.assert_identical(back, original)
    assert {name: array.dtype.kind for name, array in back.variables.items()} == {
        name: array.dtype.kind for name, array in original.variables.items()
    }
    write_series(back, path)  # over itself, and with what the first reading brought along
    xr.testing.assert_identical(read_series(path), original)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", BINARY)
def test_times_are_stored_as_int64_seconds(tmp_path, ds, suffix):
    path = write_series(ds, tmp_path / f"file{suffix}")
    raw = xr.open_dataset(path, engine="h5netcdf" if suffix == ".nc" else "zarr", decode_times=False)
    assert raw["time"].dtype == np.int64
    assert raw["time"].attrs["units"] == "seconds since 1970-01-01"
    assert raw["time"].to_numpy()[0] == 1577836800
    raw.close()


@pytest.mark.parametrize("suffix", BINARY)
def test_fractions_of_a_second_and_missing_times_survive(tmp_path, suffix):
    times = np.array(["2020-01-01T00:00:00.123456789", "2020-01-01T00:00:01"], "M8[ns]")
    ds = xr.Dataset({"end": ("k", np.array(["2020-01-01", "NaT"], "M8[ns]"))}, coords={"time": times, "k": [0, 1]})
    assert time_encoding(ds)["time"]["units"].startswith("nanoseconds")
    xr.testing.assert_identical(read_series(write_series(ds, tmp_path / f"f{suffix}")), ds)


def test_integer_times_stay_integers(tmp_path):
    ds = from_numpy(np.zeros((5, 1)), start=3, freq=2)
    for suffix in BINARY:
        back = read_series(write_series(ds, tmp_path / f"f{suffix}"))
        xr.testing.assert_identical(back, ds)
        validate(back)


def test_zarr_stays_in_the_file_until_used(tmp_path, ds):
    path = write_series(ds, tmp_path / "f.zarr")
    lazy = read_series(path)
    for chunk in (path / "target").glob("[0-9]*"):
        chunk.unlink()  # a missing chunk reads as fill value
    assert not np.nan_to_num(lazy["target"].to_numpy()).any()
    assert not lazy["target"].variable._in_memory


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_long_tables(tmp_path, ds, suffix):
    path = write_series(ds.drop_vars("units"), tmp_path / f"f{suffix}")
    back = read_series(path, time="ds", ids="series", values=["t", "p", "q"])
    xr.testing.assert_allclose(canonical(back)["target"], ds["target"].drop_vars("units"))
    assert back.attrs["freq"] == "h"


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_wide_tables(tmp_path, ds, suffix):
    path = write_series(ds.isel(series=[1]), tmp_path / f"f{suffix}", layout="wide")
    back = read_series(path, time="time", freq="H")
    np.testing.assert_array_equal(back["target"].to_numpy(), ds["target"].to_numpy()[1])
    assert read_series(path, time="time", values=["p"]).sizes["variate"] == 1


def test_parquet_keeps_an_index_of_times(tmp_path):
    frame = pd.DataFrame({"a": [1.0, 2.0, 3.0]}, index=pd.date_range("2020", periods=3, freq="D", name="when"))
    frame.to_parquet(tmp_path / "f.parquet")
    assert read_series(tmp_path / "f.parquet", time="when").attrs["freq"] == "D"


def test_times_as_text(tmp_path):
    path = tmp_path / "f.csv"
    path.write_text("when,y\n2020-01-01T00:00+02:00,1\n2020-01-01T01:00+02:00,2\n2020-01-01T02:00+02:00,NA\n")
    ds = read_series(path, time="when")
    assert ds["time"].to_numpy()[0] == np.datetime64("2019-12-31T22:00")
    assert np.isnan(ds["target"].to_numpy()[2, 0])
    path.write_text("when,y\n03.02.2020,1\n04.02.2020,2\n")
    with pytest.raises(ValueError, match=r"'03\.02.2020' in row 0, expected times in ISO 8601"):
        read_series(path, time="when")
    assert read_series(path, time="when", time_format="%d.%m.%Y")["time"].to_numpy()[0] == np.datetime64("2020-02-03")


def test_broken_files_are_one_line(tmp_path, ds):
    forms = {}
    for suffix in (".nc", ".parquet"):
        path = write_series(ds.drop_vars("units") if suffix == ".parquet" else ds, tmp_path / f"cut{suffix}")
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        forms[path] = "cannot be read as"
    (tmp_path / "text.nc").write_text("not a file of this format")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "binary.csv").write_bytes(bytes(range(128, 256)))
    (tmp_path / "cut.csv").write_text("ds,a,b\n2020-01-01,1,2\n2020-01-02,3")
    (tmp_path / "text.csv").write_text("ds,a\n2020-01-01,1\n2020-01-02,broken\n")
    write_series(ds, tmp_path / "cut.zarr")
    for name in (".zmetadata", ".zgroup", "time/.zarray"):
        (tmp_path / "cut.zarr" / name).write_text('{"zarr_')
    forms |= {
        tmp_path / "text.nc": "cannot be read as NetCDF-4",
        tmp_path / "empty.csv": "cannot be read as CSV",
        tmp_path / "binary.csv": "cannot be read as CSV",
        tmp_path / "cut.csv": "truncated: its last line has 2 of 3 fields",
        tmp_path / "text.csv": "holds 'broken' in row 1, expected numbers",
        tmp_path / "cut.zarr": "cannot be read as Zarr",
    }
    for path, message in forms.items():
        with pytest.raises(ValueError, match=message) as caught:
            read_series(path, time="ds")
        assert "\n" not in str(caught.value)


def test_wrong_use_is_named(tmp_path, ds):
    table = write_series(ds.drop_vars("units"), tmp_path / "f.csv")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_series(tmp_path / "absent.nc")
    with pytest.raises(ValueError, match="no known ending"):
        read_series(tmp_path / "series.xlsx")
    with pytest.raises(ValueError, match="name its column of times"):
        read_series(table)
    with pytest.raises(ValueError, match="no column 'when'"):
        read_series(table, time="when")
    with pytest.raises(ValueError, match="belong to long tables"):
        read_series(table, time="ds", past=["t"])
    with pytest.raises(ValueError, match="write other Datasets as"):
        write_series(xr.Dataset({"mean": ("cutoff", [1.0])}), tmp_path / "f.csv")
    for bad in (None, {"a": 1}, True):
        with pytest.raises(ValueError, match="Attribute 'note' of the Dataset"):
            write_series(ds.assign_attrs(note=bad), tmp_path / "f.nc")
    timed = ds.assign_coords(time=ds["time"].assign_attrs(units="h"))
    with pytest.raises(ValueError, match="kept for their encoding"):
        write_series(timed, tmp_path / "f.nc")


@pytest.mark.parametrize(
    ("suffix", "package"), [(".nc", "h5netcdf"), (".nc", "h5py"), (".zarr", "zarr"), (".parquet", "pyarrow")]
)
def test_a_missing_package_is_named_with_its_install_line(tmp_path, ds, monkeypatch, suffix, package):
    find = importlib.util.find_spec
    monkeypatch.setattr(files.importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    with pytest.raises(ImportError, match=rf'{package}.*pip install "omnissm\[io\]"'):
        write_series(ds, tmp_path / f"f{suffix}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".nc", ".zarr", ".csv"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, ds, monkeypatch, suffix):
    ds = ds.drop_vars("units")
    path = write_series(ds, tmp_path / f"f{suffix}")
    before = path.read_bytes() if path.is_file() else read_series(path).load()

    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_series(ds + 1, path)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    if path.is_file():
        assert path.read_bytes() == before
    else:
        xr.testing.assert_identical(read_series(path).load(), before)


def test_atomic_path_removes_what_was_half_written(tmp_path):
    def half() -> None:
        with atomic_path(tmp_path / "f.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        half()
    assert not list(tmp_path.iterdir())
    with atomic_path(tmp_path / "new" / "f.txt") as temporary:
        temporary.write_text("whole")
    assert (tmp_path / "new" / "f.txt").read_text() == "whole"


def test_what_from_long_notes_survives_a_file(tmp_path):
    frame = pd.DataFrame(
        {"unique_id": [2, 2, 5], "ds": pd.date_range("2020", periods=3, freq="D"), "y": [1.0, 2.0, 3.0]}
    )
    ds = from_long(frame, ids="series")
    xr.testing.assert_identical(read_series(write_series(ds, tmp_path / "f.nc")), ds)
