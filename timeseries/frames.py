"""Tables and arrays in and out of the schema: long frames, wide frames, numpy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from .freq import check_freq, infer_freq, nanoseconds, normalize_freq, stamp, step_times
from .schema import COVARIATES, SCHEMA_VERSION, observed_target


def from_wide(
    frame: Any,
    *,
    time: str | None = None,
    variates: Sequence[str] | None = None,
    freq: str | int | None = None,
) -> xr.Dataset:
    """A table with one row for each time and one column for each variate.

    Args:
        frame: pandas or polars frame.
        time: Column with the times; None takes the index.
        variates: Columns to use, in this order; None takes all but `time`.
        freq: Frequency of the times; None takes the one they follow exactly, if any.

    Returns:
        Dataset with `target` (time, variate) float32.

    Raises:
        ValueError: for missing or text columns, and for times that do not follow `freq`.
    """
    frame = to_pandas(frame)
    if time is not None:
        require_columns(frame, [time])
        frame = frame.set_index(time)
    names = list(frame.columns) if variates is None else list(variates)
    require_columns(frame, names)
    values = np.empty((len(frame), len(names)), dtype=np.float32)
    for column, name in enumerate(names):
        values[:, column] = numbers(frame[name])
    return from_numpy(values, times=plain_times(frame.index), variates=[str(name) for name in names], freq=freq)


def to_wide(ds: xr.Dataset, *, time: str | None = None) -> pd.DataFrame:
    """One series as a table: one row for each time, one column for each variate; NaN where not observed.

    Args:
        ds: Dataset in the schema with a single series.
        time: Name for a column of times; None makes them the index.
    """
    series = ds.sizes.get("series", 1)
    if series != 1:
        raise ValueError(
            f"A wide table holds one series, the data has {series}; select one with ds.isel(series=[k]) or use to_long."
        )
    target = observed_target(ds).transpose(..., "time", "variate").to_numpy().reshape(ds.sizes["time"], -1)
    frame = pd.DataFrame(
        target, index=pd.Index(ds["time"].to_numpy(), name=time or "time"), columns=_labels(ds, "variate")
    )
    return frame.reset_index() if time is not None else frame


def from_long(
    frame: Any,
    *,
    ids: Literal["variates", "series"],
    id_column: str = "unique_id",
    time: str = "ds",
    values: str | Sequence[str] = "y",
    past: Sequence[str] = (),
    future: Sequence[str] = (),
    static: Sequence[str] = (),
    freq: str | int | None = None,
) -> xr.Dataset:
    """A table with one row for each id and time.

    Args:
        frame: pandas or polars frame; row order does not matter.
        ids: What an id is: a variate of one system ("variates", one value column), or a separate series ("series",
            whose value columns are the variates).
        id_column: Column with the ids.
        time: Column with the times.
        values: Column or columns with the values.
        past: Columns with covariates that are known up to the cutoff (ids="series" only).
        future: Columns with covariates that are known over the horizon too (ids="series" only).
        static: Columns that are constant for each id.
        freq: Frequency; None takes the one that the times follow exactly, if any.

    Returns:
        Dataset over the sorted union of all times. Absent rows are missing; `row` marks the rows of the table where
        it has rows without any value, so that `to_long` gives back the table.

    Raises:
        ValueError: for absent, text or left-over columns, and for an id with two rows of one time.
    """
    frame = to_pandas(frame)
    columns = [values] if isinstance(values, str) else list(values)
    if ids not in ("variates", "series"):
        raise ValueError(f"ids={ids!r} is unknown; expected 'variates' or 'series'.")
    if ids == "variates" and (len(columns) != 1 or past or future):
        raise ValueError("ids='variates' takes one value column and no past or future covariates; use ids='series'.")
    require_columns(frame, [id_column, time, *columns, *past, *future, *static])
    rest = [str(name) for name in frame.columns if name not in {id_column, time, *columns, *past, *future, *static}]
    if rest:
        raise ValueError(
            f"Columns {', '.join(rest)} have no role; name them in values, past, future or static, or drop them."
        )
    if frame[id_column].isna().any():
        raise ValueError(
            f"Column {id_column!r} is empty in row {int(frame[id_column].isna().argmax())}; fill it or drop the row."
        )
    id_code, id_values = pd.factorize(frame[id_column])
    times, time_code = np.unique(plain_times(pd.Index(frame[time])), return_inverse=True)
    cell = id_code.astype(np.int64) * len(times) + time_code
    order = np.sort(cell)
    if (order[1:] == order[:-1]).any():
        twice = int(order[1:][order[1:] == order[:-1]][0])
        raise ValueError(
            f"{id_values[twice // len(times)]!s} has two rows at {stamp(times[twice % len(times)])}; drop "
            f"duplicates first, frame.drop_duplicates([{id_column!r}, {time!r}])."
        )

    def grid(names: Sequence[str]) -> np.ndarray:
        """(id, time, column) float32 with NaN where the table has no row."""
        out = np.full((len(id_values) * len(times), len(names)), np.nan, dtype=np.float32)
        for column, name in enumerate(names):
            out[cell, column] = numbers(frame[name])
        return out.reshape(len(id_values), len(times), len(names))

    target, labels = grid(columns), [str(value) for value in id_values]
    if ids == "variates":
        ds = from_numpy(target[..., 0].T, times=times, variates=labels, freq=freq)
    else:
        ds = from_numpy(target, times=times, variates=columns, series=labels, freq=freq)
    for name, names in (("past", past), ("future", future)):
        if names:
            dims = ("series", "time", COVARIATES[name])
            ds = ds.assign({name: (dims, grid(names))}).assign_coords({COVARIATES[name]: list(names)})
    row_dim = "series" if ids == "series" else "variate"
    if static:
        ds = ds.assign(static=((row_dim, "static_feature"), _constants(frame, static, id_code, id_values)))
        ds = ds.assign_coords(static_feature=list(static))
    present = np.zeros(len(id_values) * len(times), dtype=bool)
    present[cell] = True
    if (present.reshape(len(id_values), -1) & np.isnan(target).all(axis=-1)).any():
        ds["row"] = ((row_dim, "time"), present.reshape(len(id_values), -1))
    zone = getattr(frame[time].dtype, "tz", None)
    noted = {
        "ids": ids,
        "id_column": id_column,
        "time": time,
        "value": columns[0],
        "zone": None if zone is None else str(zone),
        "integer_ids": bool(pd.api.types.is_integer_dtype(frame[id_column].dtype)),
    }
    return ds.assign_attrs(long=json.dumps(noted))


def _constants(frame: pd.DataFrame, names: Sequence[str], code: np.ndarray, ids: pd.Index) -> np.ndarray:
    """(id, column) of columns that must not vary within an id."""
    out = np.empty((len(ids), len(names)), dtype=np.float32)
    for column, name in enumerate(names):
        values = pd.Series(numbers(frame[name]))
        groups = values.groupby(code)
        varies = (groups.nunique(dropna=False) > 1).to_numpy()
        if varies.any():
            raise ValueError(
                f"Static column {name!r} varies within {ids[int(varies.argmax())]!s}; make it a past or future column."
            )
        out[:, column] = groups.first().to_numpy()
    return out


def to_long(
    ds: xr.Dataset,
    *,
    ids: Literal["variates", "series"] | None = None,
    id_column: str | None = None,
    time: str | None = None,
    value: str | None = None,
) -> pd.DataFrame:
    """The table of a Dataset, one row for each id and time with an observed value; the inverse of `from_long`.

    Args:
        ds: Dataset in the schema.
        ids: What becomes the id; None takes what `from_long` noted, otherwise "series" where there is such a
            dimension and "variates" where not.
        id_column, time, value: Column names; None takes those of `from_long`, otherwise "unique_id", "ds" and "y".
            `value` applies to ids="variates".
    """
    noted = json.loads(ds.attrs.get("long", "{}"))
    ids = ids or noted.get("ids") or ("series" if "series" in ds.dims else "variates")
    id_column, time = id_column or noted.get("id_column", "unique_id"), time or noted.get("time", "ds")
    if ids == "variates":
        if ds.sizes.get("series", 1) != 1:
            raise ValueError(
                f"ids='variates' needs a single series, the data has {ds.sizes['series']}; use ids='series'."
            )
        ds = ds.isel(series=0) if "series" in ds.dims else ds
        labels, columns = _labels(ds, "variate"), [value or noted.get("value", "y")]
        target = observed_target(ds).transpose("variate", "time").to_numpy()[..., None]
    else:
        ds = ds if "series" in ds.dims else ds.expand_dims("series").assign_coords(series=["0"])
        labels, columns = _labels(ds, "series"), _labels(ds, "variate")
        target = observed_target(ds).transpose("series", "time", "variate").to_numpy()
    row_dim = "series" if ids == "series" else "variate"
    present = ds["row"].transpose(row_dim, "time").to_numpy() if "row" in ds else ~np.isnan(target).all(axis=-1)
    which, when = np.nonzero(present)
    out: dict[str, Any] = {
        id_column: noted_ids(pd.Series(np.array(labels, dtype=object)[which]), noted),
        time: noted_times(pd.Series(ds["time"].to_numpy()[when]), noted),
    }
    out |= {name: target[which, when, column] for column, name in enumerate(columns)}
    for name, dim in COVARIATES.items():
        if name in ds and ids == "series":
            block = ds[name].transpose("series", "time", dim).to_numpy()
            out |= {label: block[which, when, column] for column, label in enumerate(_labels(ds, dim))}
    if "static" in ds and row_dim in ds["static"].dims:
        block = ds["static"].transpose(row_dim, "static_feature").to_numpy()
        out |= {label: block[which, column] for column, label in enumerate(_labels(ds, "static_feature"))}
    return pd.DataFrame(out)


def noted_ids(labels: pd.Series, noted: dict[str, Any]) -> pd.Series:
    """Ids as they were in the long table, whose attribute `long` is `noted`: integers, where text stands for them."""
    return pd.to_numeric(labels) if noted.get("integer_ids") else labels


def noted_times(times: pd.Series, noted: dict[str, Any]) -> pd.Series:
    """Times, in UTC, as they were in the long table, whose attribute `long` is `noted`: in its zone."""
    zone = noted.get("zone")
    return times.dt.tz_localize("UTC").dt.tz_convert(zone) if zone else times


def _labels(ds: xr.Dataset, dim: str) -> list[str]:
    return [str(label) for label in ds[dim].to_numpy()]


def from_numpy(
    values: np.ndarray,
    *,
    times: np.ndarray | None = None,
    start: str | int | None = None,
    freq: str | int | None = None,
    variates: Sequence[str] | None = None,
    series: Sequence[str] | None = None,
) -> xr.Dataset:
    """An array (time, variate) or (series, time, variate) with its times, or with a start and a frequency.

    Args:
        values: Numbers, NaN = missing.
        times: One time for each row.
        start: First time, where `times` is not given; 0 by default, then `freq` is an integer step.
        freq: Frequency.
        variates, series: Names; "0", "1", ... by default.

    Raises:
        ValueError: if shapes or times do not fit.
    """
    values = np.asarray(values)
    if values.dtype.kind not in "fiub":
        raise ValueError(f"Values have dtype {values.dtype}, expected numbers.")
    if values.ndim == 1:
        values = values[:, None]
    if values.ndim not in (2, 3):
        raise ValueError(f"Values have shape {values.shape}, expected (time, variate) or (series, time, variate).")
    length, width = values.shape[-2:]
    if not width:
        raise ValueError("There is no column of values; expected at least one beside the times.")
    if times is None:
        times = _steps_from(start, length, freq)
    times = np.asarray(times)
    if len(times) != length:
        raise ValueError(f"{len(times)} times were given for {length} rows.")
    dims = ("time", "variate") if values.ndim == 2 else ("series", "time", "variate")
    names = [str(k) for k in range(width)] if variates is None else [str(name) for name in variates]
    if len(names) != width:
        raise ValueError(f"{len(names)} variate names were given for {width} columns.")
    coords: dict[str, Any] = {
        "time": nanoseconds(times) if times.dtype.kind == "M" else times,
        "variate": names,
    }
    if values.ndim == 3:
        coords["series"] = [str(k) for k in range(len(values))] if series is None else [str(name) for name in series]
    with np.errstate(over="ignore"):
        target = values.astype(np.float32, copy=False)
    ds = xr.Dataset({"target": (dims, target)}, coords, {"schema_version": SCHEMA_VERSION})
    found = infer_freq(times) if freq is None and sorted_unique(times) else freq
    if found is not None:
        ds.attrs["freq"] = normalize_freq(found)
        if freq is not None and sorted_unique(times):
            check_freq(times, found)
    return ds


def _steps_from(start: str | int | None, length: int, freq: str | int | None) -> np.ndarray:
    if isinstance(freq, str):
        if not isinstance(start, str):
            raise ValueError(
                f"freq {freq!r} is a calendar frequency; give start as a date such as '2020-01-01', or times."
            )
        return step_times(np.datetime64(start), length, freq)
    if isinstance(start, str):
        raise ValueError(f"start={start!r} is a date; give freq as a pandas alias such as 'h'.")
    return (start or 0) + (freq or 1) * np.arange(length, dtype=np.int64)


def sorted_unique(times: np.ndarray) -> bool:
    """Whether times increase strictly."""
    return bool((times[1:] > times[:-1]).all())


def plain_times(index: pd.Index) -> np.ndarray:
    """Times of an index as datetime64[ns] in UTC without a zone, or as int64.

    Raises:
        ValueError: for text and other things that are not times; nothing is parsed silently.
    """
    if isinstance(index, pd.PeriodIndex):
        index = index.to_timestamp()
    if isinstance(index, pd.DatetimeIndex):
        index = index.tz_convert("UTC").tz_localize(None) if index.tz is not None else index
        return nanoseconds(index.to_numpy())
    if pd.api.types.is_integer_dtype(index.dtype):
        return index.to_numpy().astype(np.int64)
    raise ValueError(
        f"Times have dtype {index.dtype}, expected datetimes or integers; convert them with "
        "pandas.to_datetime(..., utc=True)."
    )


def numbers(column: pd.Series) -> np.ndarray:
    """A column as float32, missing entries NaN; what float32 cannot hold becomes infinite, which `validate` names.

    Raises:
        ValueError: naming a column that holds text.
    """
    if not pd.api.types.is_numeric_dtype(column.dtype):  # bool counts as numeric
        text = (pd.to_numeric(column, errors="coerce").isna() & column.notna()).to_numpy()
        found = (
            f"{str(column.to_numpy()[text][0])!r} in row {int(text.argmax())}"
            if text.any()
            else f"dtype {column.dtype}"
        )
        raise ValueError(
            f"Column {str(column.name)!r} holds {found}, expected numbers; correct it, convert it with "
            "pandas.to_numeric or leave it out."
        )
    with np.errstate(over="ignore"):
        return column.to_numpy(dtype=np.float64, na_value=np.nan).astype(np.float32)


def require_columns(frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Raise a ValueError naming the first column that is not there, or that is there twice."""
    if not frame.columns.is_unique:
        raise ValueError(f"The table has two columns {frame.columns[frame.columns.duplicated()][0]!r}; rename one.")
    for name in names:
        if name not in frame.columns:
            raise ValueError(
                f"The table has no column {name!r}; its columns are {', '.join(map(str, frame.columns[:12]))}."
            )


def to_pandas(frame: Any) -> pd.DataFrame:
    """A pandas frame as it is, a polars frame through Arrow.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(frame, pd.DataFrame):
        return frame
    if type(frame).__module__.split(".")[0] == "polars":
        return frame.to_arrow().to_pandas()
    raise TypeError(f"Expected a pandas or polars frame, got {type(frame).__name__}; arrays enter by from_numpy.")
