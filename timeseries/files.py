"""Series in files: CSV, Parquet, NetCDF-4 (.nc) and Zarr (.zarr); written atomically, read back identically.

Times are stored as int64 counts since 1970-01-01 by explicit encoding, so that no reader has to guess. NetCDF goes
through h5netcdf only: the NetCDF-3 writer that xarray may fall back to loses bools, int64 and strings.
"""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from ..ssmcore.training.checkpoints import owner, sweep
from .frames import from_long, from_wide, require_columns, to_long, to_wide
from .freq import nanoseconds

SUFFIXES = (".csv", ".parquet", ".nc", ".zarr")
# What counts as missing in a column of numbers: pandas's own list.
_MISSING = [
    "", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA",
    "NULL", "NaN", "None", "n/a", "nan", "null",
]  # fmt: skip
_NEEDS = {".parquet": ("pyarrow",), ".nc": ("h5netcdf", "h5py"), ".zarr": ("zarr",)}


def read_series(
    path: str | Path,
    *,
    time: str | None = None,
    ids: Literal["variates", "series"] | None = None,
    id_column: str = "unique_id",
    values: str | Sequence[str] | None = None,
    past: Sequence[str] = (),
    future: Sequence[str] = (),
    static: Sequence[str] = (),
    freq: str | int | None = None,
    time_format: str | None = None,
    lazy: bool | None = None,
) -> xr.Dataset:
    """Read a file; its name tells the format.

    Args:
        path: A .csv, .parquet, .nc file or a .zarr directory.
        time: Column with the times of a table; required for .csv and .parquet.
        ids: None reads a wide table (one column for each variate); "variates" or "series" a long one, see
            `frames.from_long`.
        id_column: Column with the ids of a long table.
        values: Columns with the values. Wide: None takes all but `time`. Long: "y" by default.
        past: Columns of a long table with covariates that are known up to the cutoff.
        future: Columns of a long table with covariates that are known over the horizon too.
        static: Columns of a long table that are constant for each series.
        freq: Frequency; None takes the one that the times follow exactly, if any.
        time_format: strptime format of times written as text; None expects ISO 8601.
        lazy: Leave the values of .nc or .zarr in the file until they are used; by default for .zarr only.

    Raises:
        FileNotFoundError: if there is no such file.
        ImportError: if a package for this format is not installed.
        ValueError: in one line, if the file is truncated, unreadable, or not what the arguments say.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give the path of a {', '.join(SUFFIXES)} file.")
    _require_package(suffix)
    if suffix in (".nc", ".zarr"):
        return _read_dataset(path, suffix, lazy if lazy is not None else suffix == ".zarr")
    if time is None:
        raise ValueError(f"{path.name} is a table; name its column of times: time=COLUMN, or --time COLUMN.")
    frame = _read_table(path, suffix, id_column if ids is not None else None)
    require_columns(frame, [time])
    frame = frame.assign(**{time: _times(frame[time], time_format)})
    if ids is None:
        if past or future or static:
            raise ValueError(
                "past, future and static columns belong to long tables; give ids='series', or values=[...]."
            )
        columns = [values] if isinstance(values, str) else values
        return from_wide(frame, time=time, variates=columns, freq=freq)
    return from_long(
        frame,
        ids=ids,
        id_column=id_column,
        time=time,
        values="y" if values is None else values,
        past=past,
        future=future,
        static=static,
        freq=freq,
    )


def write_series(ds: xr.Dataset, path: str | Path, *, layout: Literal["long", "wide"] = "long") -> Path:
    """Write a Dataset; the name tells the format, and an existing file is replaced only by a complete one.

    Works for series in the schema and, as .nc or .zarr, for any other Dataset such as forecasts.

    Args:
        ds: What to write.
        path: A path ending in .csv, .parquet, .nc or .zarr.
        layout: Table layout of .csv and .parquet.

    Returns:
        The path.

    Raises:
        ImportError: if a package for this format is not installed.
        OSError: if the disk is full or the folder is not writable; nothing is left behind.
        ValueError: for attributes that files cannot hold.
    """
    path = Path(path)
    suffix = _suffix(path)
    _require_package(suffix)
    if suffix in (".nc", ".zarr"):
        _check_attributes(ds)
        ds, encoding = ds.drop_encoding(), time_encoding(ds)
        with atomic_path(path) as temporary:
            if suffix == ".nc":
                ds.to_netcdf(temporary, engine="h5netcdf", encoding=encoding)
            else:
                ds.to_zarr(temporary, mode="w", zarr_format=2, consolidated=True, encoding=encoding)
        return path
    if "target" not in ds or "time" not in ds.dims:
        raise ValueError(
            f"A {suffix} table holds series in the schema (target over time); write other Datasets as .nc or .zarr."
        )
    frame = to_wide(ds, time="time") if layout == "wide" else to_long(ds)
    with atomic_path(path) as temporary:
        if suffix == ".csv":
            frame.to_csv(temporary, index=False)
        else:
            frame.to_parquet(temporary, index=False)
    return path


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path in the same folder that takes the place of `path` on success and vanishes on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.stem)
    temporary = path.with_name(f".{path.stem}.{owner()}.tmp{path.suffix}")
    try:
        yield temporary
        if temporary.is_dir() and path.exists():  # a directory cannot be replaced in one step
            old = path.with_name(f".{path.stem}.{owner()}.old{path.suffix}")
            os.replace(path, old)
            os.replace(temporary, path)
            _remove(old)
        else:
            os.replace(temporary, path)
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)  # a full disk names no file by itself
        raise
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def time_encoding(ds: xr.Dataset) -> dict[str, dict[str, Any]]:
    """int64 seconds since 1970-01-01 for every time variable, nanoseconds where seconds would lose something."""
    encoding = {}
    for name, array in ds.variables.items():
        if array.dtype.kind != "M":
            continue
        times = nanoseconds(array.to_numpy())
        whole = (times == times.astype("datetime64[s]")) | np.isnat(times)
        unit = "seconds" if whole.all() else "nanoseconds"
        how: dict[str, Any] = {"units": f"{unit} since 1970-01-01", "calendar": "proleptic_gregorian", "dtype": "int64"}
        if np.isnat(times).any():
            how["_FillValue"] = np.iinfo(np.int64).min
        encoding[str(name)] = how
    return encoding


def _check_attributes(ds: xr.Dataset) -> None:
    owners: dict[str, Any] = {"the Dataset": ds, **{repr(name): array for name, array in ds.variables.items()}}
    for place, held in owners.items():
        for key, value in held.attrs.items():
            if value is None or isinstance(value, (dict, bool, np.bool_)):
                raise ValueError(
                    f"Attribute {key!r} of {place} is {type(value).__name__}, which files cannot hold; drop it or "
                    "store it as text."
                )
            if key == "units" and isinstance(held, xr.Variable) and held.dtype.kind == "M":
                raise ValueError(
                    f"Attribute 'units' of the times {place} is kept for their encoding; put physical units into "
                    "a coordinate."
                )


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path.name} has no known ending; expected one of {', '.join(SUFFIXES)}.")
    return suffix


def _require_package(suffix: str) -> None:
    for package in _NEEDS.get(suffix, ()):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f'{suffix} files need {package}, which is not installed: pip install "omnissm[io]"')


@contextlib.contextmanager
def _reading(path: Path, kind: str) -> Iterator[None]:
    """Turn whatever a reader says about a broken file into one line."""
    try:
        yield
    except (ImportError, MemoryError, PermissionError):
        raise
    except Exception as error:  # readers raise anything from OSError to struct.error on damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path} cannot be read as {kind}: {reason}; is it complete and of this format?") from error


def _read_dataset(path: Path, suffix: str, lazy: bool) -> xr.Dataset:
    kind, engine = ("NetCDF-4", "h5netcdf") if suffix == ".nc" else ("Zarr", "zarr")
    with _reading(path, kind), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*consolidated.*")
        ds = xr.open_dataset(path, engine=engine, cache=False)
        if not lazy:
            ds.load()
            ds.close()
        ds.encoding = {}
        for array in ds.variables.values():  # in place: some versions of drop_encoding load the values
            array.encoding = {}
        for index in ds.indexes.values():
            index.to_numpy()  # only here texts that are no UTF-8 show
        return ds


def _read_table(path: Path, suffix: str, id_column: str | None) -> pd.DataFrame:
    if suffix == ".parquet":
        with _reading(path, "Parquet"):
            frame = pd.read_parquet(path).pipe(_index_to_columns)
            for _, column in frame.items():
                if pd.api.types.is_string_dtype(column.dtype):
                    column.to_numpy()  # only here texts that are no UTF-8 show
            return frame
    with _reading(path, "CSV"), path.open(newline="", encoding="utf-8-sig") as file:
        names = next(csv.reader(file), [])
    if len(set(names)) < len(names):  # pandas would rename the second one
        twice = next(name for k, name in enumerate(names) if name in names[:k])
        raise ValueError(f"{path} has two columns {twice!r}; rename one.")
    # Newer pandas reads numbers exactly, and says so of the option that asks for it.
    version = tuple(int(part) for part in pd.__version__.split(".")[:2])
    options: dict[str, Any] = {} if version >= (3, 1) else {"float_precision": "round_trip"}
    if id_column in names:  # an id is text: "007" is not 7, and "NA" may be a country
        missing = {name: [""] if name == id_column else _MISSING for name in names}
        options |= {"dtype": {id_column: str}, "keep_default_na": False, "na_values": missing}
    with _reading(path, "CSV"), warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)  # rows longer than the header lose their end
        frame = pd.read_csv(path, index_col=False, **options)
    if len(frame.columns):
        _check_last_line(path, len(frame.columns))
        if frame.iloc[:, -1].isna().any():
            _check_rows(path, len(frame.columns))
    if id_column in names and frame[id_column].astype(str).str.fullmatch("0|-?[1-9][0-9]{0,17}").all():
        frame[id_column] = frame[id_column].astype(np.int64)
    return frame


def _index_to_columns(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.reset_index() if any(name is not None for name in frame.index.names) else frame


def _check_last_line(path: Path, columns: int) -> None:
    """pandas fills a row that was cut off with NaN; a file that ends like this is truncated."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        tail = file.read().decode("utf-8", errors="replace").strip().splitlines()
    found = len(next(csv.reader(tail[-1:]), []))
    if found < columns:
        raise ValueError(
            f"{path} is truncated: its last line has {found} of {columns} fields; fetch the file again or remove "
            "that line."
        )


def _check_rows(path: Path, columns: int) -> None:
    """pandas fills any short row with NaN; it has lost a field, and who knows which."""
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.reader(file)
        try:
            short = next((row for row in rows if row and len(row) != columns), None)
        except csv.Error as error:
            raise ValueError(f"{path}, line {rows.line_num}: {error}; is it a table in text?") from error
        if short is not None:
            raise ValueError(f"{path}, line {rows.line_num}: {len(short)} fields, expected {columns}; correct it.")


def _times(column: pd.Series, time_format: str | None) -> pd.Series:
    """Text becomes UTC times; numbers and datetimes stay."""
    if pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_datetime64_any_dtype(column.dtype):
        return column
    try:
        return pd.to_datetime(column, format=time_format or "ISO8601", utc=True)
    except (ValueError, TypeError):
        bad = pd.to_datetime(column, format=time_format or "ISO8601", utc=True, errors="coerce").isna().to_numpy()
        row = int(bad.argmax())
        expected = f"format {time_format!r}" if time_format else "ISO 8601 such as 2013-02-03 04:00"
        raise ValueError(
            f"Column {column.name!r} holds {column.iloc[row]!r} in row {row}, expected times in {expected}; "
            "correct it or give time_format."
        ) from None
