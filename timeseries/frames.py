"""Tables and arrays in and out of the schema: long frames, wide frames, numpy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from .schema import SCHEMA_VERSION, check_freq, infer_freq, normalize_freq


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
        "time": times.astype("datetime64[ns]") if times.dtype.kind == "M" else times,
        "variate": names,
    }
    if values.ndim == 3:
        coords["series"] = [str(k) for k in range(len(values))] if series is None else [str(name) for name in series]
    ds = xr.Dataset(
        {"target": (dims, values.astype(np.float32, copy=False))}, coords, {"schema_version": SCHEMA_VERSION}
    )
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
        return pd.date_range(start, periods=length, freq=normalize_freq(freq)).to_numpy()
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
        return index.to_numpy().astype("datetime64[ns]")
    if pd.api.types.is_integer_dtype(index.dtype):
        return index.to_numpy().astype(np.int64)
    raise ValueError(
        f"Times have dtype {index.dtype}, expected datetimes or integers; convert them with pandas.to_datetime(..., utc=True)."
    )


def numbers(column: pd.Series) -> np.ndarray:
    """A column as float, missing entries NaN.

    Raises:
        ValueError: naming a column that holds text.
    """
    if not (pd.api.types.is_numeric_dtype(column.dtype) or pd.api.types.is_bool_dtype(column.dtype)):
        raise ValueError(
            f"Column {str(column.name)!r} has dtype {column.dtype}, expected numbers; convert it with pandas.to_numeric or leave it out of `variates`."
        )
    return column.to_numpy(dtype=np.float64, na_value=np.nan)


def require_columns(frame: pd.DataFrame, names: Sequence[str]) -> None:
    """Raise a ValueError naming the first column that is not there."""
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


Ids = Literal["variates", "series"]
