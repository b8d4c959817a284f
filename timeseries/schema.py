"""The one schema of a time series: an xarray Dataset, its checks, and the only function that repairs one.

Dimensions `series` (optional), `time`, `variate`. Variables: `target` (series, time, variate) with NaN = missing,
and optionally `observed` (bool, same shape), `past` (series, time, past_feature), `future` (series, time,
future_feature; known in advance, its times may run past the last target), `static` (series or variate,
static_feature) and `label`. Times are datetime64 (UTC) or integers; `freq` is a pandas alias or an integer step.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal

import numpy as np
import pandas as pd
import xarray as xr

SCHEMA_VERSION = "1"
DIMS = ("series", "time", "variate")
COVARIATES = {"past": "past_feature", "future": "future_feature"}
_BLOCK = 1 << 22  # entries looked at together, so that a check of a large array needs little memory

_RENAMED = {
    "H": "h", "T": "min", "S": "s", "L": "ms", "U": "us", "N": "ns", "M": "ME", "BM": "BME", "CBM": "CBME", "SM": "SME",
    "Q": "QE", "BQ": "BQE", "Y": "YE", "A": "YE", "BY": "BYE", "BA": "BYE", "AS": "YS", "BAS": "BYS", "BH": "bh",
    "CBH": "cbh",
}  # fmt: skip
_SEASONS = {"s": 60, "min": 1440, "h": 24, "D": 7, "B": 5, "W": 52, "SME": 24, "SMS": 24}


def normalize_freq(freq: str | int) -> str | int:
    """The spelling of a frequency that current pandas accepts: "H" becomes "h", "15T" "15min", "M" "ME".

    Raises:
        ValueError: if `freq` is neither an integer step of at least 1 nor a pandas alias.
    """
    if isinstance(freq, (int, np.integer)) and not isinstance(freq, bool):
        if freq < 1:
            raise ValueError(f"freq must be a positive step, got {freq}.")
        return int(freq)
    match = re.fullmatch(r"(\d*)([A-Za-z]+)(-[A-Za-z]{3})?", freq) if isinstance(freq, str) else None
    if match:
        number, unit, anchor = match.groups()
        freq = f"{number}{_RENAMED.get(unit, unit)}{anchor or ''}"
    try:
        return pd.tseries.frequencies.to_offset(freq).freqstr
    except (ValueError, TypeError, AttributeError):
        raise ValueError(
            f"Unknown freq {freq!r}; expected a pandas alias such as 'h', '15min', 'D', 'ME', or an integer step."
        ) from None


def season_length(freq: str | int | None) -> int:
    """The usual season in steps: 24 for hours, 7 for days, 12 for months; 1 where none is customary.

    A multiple divides it ("15min" has 96 steps a day); multiples that do not divide the day or season give 1.
    """
    if freq is None or isinstance(freq, int):
        return 1
    offset = pd.tseries.frequencies.to_offset(normalize_freq(freq))
    unit = offset.rule_code.split("-")[0]
    if unit == "min":
        base = 1440 if offset.n > 1 else 60
    elif unit[0] == "M" or unit in ("BME", "BMS", "CBME", "CBMS"):
        base = 12
    elif unit[0] == "Q" or unit in ("BQE", "BQS"):
        base = 4
    else:
        base = _SEASONS.get(unit, 1)
    return base // offset.n if base % offset.n == 0 else 1


def step_times(start: np.datetime64 | int, periods: int, freq: str | int) -> np.ndarray:
    """`periods` times from `start` on, the first being `start` itself if it lies on `freq`."""
    freq = normalize_freq(freq)
    if isinstance(freq, int):
        return int(start) + freq * np.arange(periods, dtype=np.int64)
    return pd.date_range(pd.Timestamp(start), periods=periods, freq=freq).to_numpy().astype("datetime64[ns]")


def infer_freq(times: np.ndarray) -> str | int | None:
    """The frequency that these sorted times follow exactly, or None when they are irregular or fewer than three."""
    if len(times) < 3:
        return None
    if np.issubdtype(times.dtype, np.integer):
        steps = np.diff(times)
        return int(steps[0]) if steps[0] > 0 and (steps == steps[0]).all() else None
    freq = pd.infer_freq(pd.DatetimeIndex(times))
    return None if freq is None else normalize_freq(freq)


def base_step(times: np.ndarray, freq: str | int | None = None) -> float:
    """Length of one step in units of the time coordinate (nanoseconds or integers): that of `freq`, else the median."""
    steps = np.diff(times).astype(np.float64)
    return float(np.median(steps)) if steps.size else 1.0


def validate(ds: xr.Dataset) -> None:
    """Check `ds` against the schema; nothing is repaired.

    Raises:
        TypeError: if `ds` is not an xarray Dataset.
        ValueError: naming the first violation and the way out, in one line.
    """
    if not isinstance(ds, xr.Dataset):
        raise TypeError(
            f"Expected an xarray Dataset, got {type(ds).__name__}; frames and arrays enter by from_long, from_wide or from_numpy."
        )
    _check_layout(ds)
    times = ds["time"].to_numpy()
    check_times(times)
    if ds.attrs.get("freq") is not None:
        check_freq(times, ds.attrs["freq"])
    for name in ("target", *COVARIATES, "static"):
        if name in ds:
            _check_finite(ds[name])
    _check_observed(ds)


def _check_layout(ds: xr.Dataset) -> None:
    if "target" not in ds:
        raise ValueError(
            f"The Dataset has no variable 'target', only {sorted(map(str, ds.data_vars))}; rename the values to 'target'."
        )
    allowed = {"target": DIMS, "observed": DIMS, **{name: ("series", "time", dim) for name, dim in COVARIATES.items()}}
    for name, dims in allowed.items():
        if name not in ds:
            continue
        found = ds[name].dims
        needed = {dim for dim in dims if dim != "series"} if name != "observed" else set(ds["target"].dims)
        if not needed <= set(found) or not set(found) <= set(dims):
            raise ValueError(
                f"Variable '{name}' has dimensions {found}, expected {dims} ('series' optional); rename or transpose it."
            )
        if name == "observed":
            if ds[name].dtype != bool:
                raise ValueError(
                    f"Variable 'observed' has dtype {ds[name].dtype}, expected bool; convert it with .astype(bool)."
                )
        elif ds[name].dtype.kind not in "fiu":
            raise ValueError(
                f"Variable '{name}' has dtype {ds[name].dtype}, expected numbers; convert text with pandas.to_numeric or drop those columns."
            )
    if "static" in ds and (ds["static"].dtype.kind not in "fiub" or "static_feature" not in ds["static"].dims):
        raise ValueError(
            f"Variable 'static' is {ds['static'].dtype} with dimensions {ds['static'].dims}, expected numbers over (series or variate, static_feature)."
        )
    if "time" not in ds.coords:
        raise ValueError("The Dataset has no coordinate 'time'; assign datetime64 stamps or integer steps to it.")
    for dim in ("series", "variate"):
        if dim in ds.coords and ds[dim].ndim == 1:
            names = ds[dim].to_numpy()
            if not all(isinstance(name, str) for name in names.tolist()):
                raise ValueError(
                    f"Coordinate '{dim}' has dtype {names.dtype}, expected strings; convert it with .astype(str)."
                )
            repeated = pd.Index(names).duplicated()
            if repeated.any():
                raise ValueError(f"Coordinate '{dim}' holds {names[repeated][0]!r} twice; names must differ.")


def check_times(times: np.ndarray) -> None:
    """Times must be datetime64 or integers, present, increasing and without duplicates.

    Raises:
        ValueError: naming the first offending place.
    """
    if times.dtype.kind not in "Miu":
        raise ValueError(
            f"Coordinate 'time' has dtype {times.dtype}, expected datetime64 or integers; convert it with pandas.to_datetime(..., utc=True)."
        )
    if times.size == 0:
        raise ValueError("The series has no time steps; expected at least one row.")
    if times.dtype.kind == "M" and np.isnat(times).any():
        raise ValueError(
            f"Coordinate 'time' has no valid time at row {int(np.isnat(times).argmax())}; drop the row or correct it."
        )
    back = times[1:] <= times[:-1]
    if not back.any():
        return
    row = int(back.argmax()) + 1
    if times[row] == times[row - 1]:
        raise ValueError(
            f"Duplicate time {_stamp(times[row])} at row {row}; use regularize(ds, freq, duplicates='first' or 'mean')."
        )
    raise ValueError(
        f"Times are not sorted: row {row} is {_stamp(times[row])}, after {_stamp(times[row - 1])}; use ds.sortby('time')."
    )


def check_freq(times: np.ndarray, freq: str | int) -> None:
    """Sorted times must follow `freq` without a gap.

    Raises:
        ValueError: showing the first gap and its place.
    """
    freq = normalize_freq(freq)
    if isinstance(freq, int) != (times.dtype.kind in "iu"):
        raise ValueError(
            f"freq {freq!r} does not fit a time coordinate of {times.dtype}; integer steps go with integer times, aliases with datetime64."
        )
    expected = step_times(times[0], len(times), freq)
    wrong = expected != times
    if not wrong.any():
        return
    row = int(wrong.argmax())
    if row == 0:
        raise ValueError(
            f"Times do not follow freq {freq!r}: the first, {_stamp(times[0])}, is not on it; use regularize(ds, freq) or correct freq."
        )
    raise ValueError(
        f"Times do not follow freq {freq!r}: after {_stamp(times[row - 1])} (row {row - 1}) comes {_stamp(times[row])}, "
        f"expected {_stamp(expected[row])}; use regularize(ds, {freq!r}) to fill gaps with NaN, or remove the attribute 'freq'."
    )


def _check_finite(array: xr.DataArray) -> None:
    if array.dtype.kind != "f":
        return
    feature = next(dim for dim in array.dims[::-1] if dim not in ("series", "time"))
    axis = array.dims.index(feature)
    for offset, values in _blocks(array):
        bad = np.argwhere(np.isinf(values))
        if len(bad):
            at = dict(zip(array.dims, bad[0].tolist()))
            name = array[feature].to_numpy()[bad[0][axis]]
            where = f" at {_stamp(array['time'].to_numpy()[offset + at['time']])}" if "time" in at else ""
            raise ValueError(
                f"Variable '{array.name}' is infinite in {feature} {name!s}{where}; replace infinite values by NaN or correct them."
            )


def _check_observed(ds: xr.Dataset) -> None:
    target = ds["target"]
    seen = np.zeros(target.sizes["variate"], dtype=bool)
    for offset, values in _blocks(target):
        present = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, dtype=bool)
        if "observed" in ds:
            part = (
                ds["observed"]
                .transpose(*target.dims)
                .isel(time=slice(offset, offset + values.shape[target.dims.index("time")]))
            )
            present &= part.to_numpy()
        seen |= present.any(axis=tuple(axis for axis, dim in enumerate(target.dims) if dim != "variate"))
        if seen.all():
            return
    name = target["variate"].to_numpy()[int((~seen).argmax())]
    raise ValueError(
        f"Variate {name!s} has no observed value at all; drop it with ds.drop_sel(variate=...) or supply data."
    )


def _blocks(array: xr.DataArray) -> Iterator[tuple[int, np.ndarray]]:
    """Pieces of `array` along time with their offset, so that lazily opened files are never loaded whole."""
    if "time" not in array.dims:
        yield 0, array.to_numpy()
        return
    length = array.sizes["time"]
    rows = max(1, _BLOCK // max(1, array.size // max(1, length)))
    for offset in range(0, length, rows):
        yield offset, array.isel(time=slice(offset, offset + rows)).to_numpy()


def _stamp(time: np.datetime64 | np.integer) -> str:
    """A time as people write it: 2013-02-03 04:00."""
    if not np.issubdtype(np.asarray(time).dtype, np.datetime64):
        return str(int(time))
    text = pd.Timestamp(time).isoformat(sep=" ")
    return text.removesuffix(":00") if text.count(":") == 2 else text


def canonical(ds: xr.Dataset) -> xr.Dataset:
    """The same data with all of (series, time, variate) present, in this order.

    `target` is float32 and NaN exactly where `observed` is False; `observed` is always there, costs no memory when
    nothing is missing, and is read only. Names default to "0", "1", ...; arrays that already fit are not copied.
    """
    ds = ds if "series" in ds.dims else ds.expand_dims("series").assign_coords(series=["0"])
    names = {dim: [str(k) for k in range(ds.sizes[dim])] for dim in ("series", "variate") if dim not in ds.coords}
    ds = ds.assign_coords(names)
    spread = ds["target"] if "series" in ds["target"].dims else ds["target"].expand_dims(series=ds["series"])
    target = np.ascontiguousarray(spread.transpose(*DIMS).to_numpy(), dtype=np.float32)
    observed = _observed(target)
    if "observed" in ds:
        given = ds["observed"] if "series" in ds["observed"].dims else ds["observed"].expand_dims(series=ds["series"])
        stated = given.transpose(*DIMS).to_numpy()
        if (observed & ~stated).any():
            observed = observed & stated
            target = np.where(observed, target, np.float32("nan"))
    variables: dict[str, tuple] = {
        "target": (DIMS, target, ds["target"].attrs),
        "observed": (DIMS, observed),
    }
    for name, dim in COVARIATES.items():
        if name in ds:
            array = ds[name] if "series" in ds[name].dims else ds[name].expand_dims(series=ds["series"])
            dims = ("series", "time", dim)
            variables[name] = (
                dims,
                np.ascontiguousarray(array.transpose(*dims).to_numpy(), dtype=np.float32),
                ds[name].attrs,
            )
    out = ds.assign(variables)
    out.attrs = {**ds.attrs, "schema_version": SCHEMA_VERSION}
    if ds.attrs.get("freq") is not None:
        out.attrs["freq"] = normalize_freq(ds.attrs["freq"])
    return out


def _observed(target: np.ndarray) -> np.ndarray:
    """Which entries are finite; a broadcast True when all are, so that complete data pay nothing for the mask."""
    flat = target.reshape(-1)
    if any(np.isnan(flat[k : k + _BLOCK]).any() for k in range(0, flat.size, _BLOCK)):
        return ~np.isnan(target)
    return np.broadcast_to(np.True_, target.shape)


def regularize(
    ds: xr.Dataset,
    freq: str | int,
    duplicates: Literal["error", "first", "mean"] = "error",
    gaps: Literal["nan", "error"] = "nan",
) -> tuple[xr.Dataset, dict[str, int]]:
    """Sort by time, resolve duplicate times and put the series on a regular grid; missing rows become NaN.

    Args:
        ds: Dataset with a `time` coordinate.
        freq: pandas alias or integer step of the grid, which starts at the first time.
        duplicates: What to do with equal times: refuse, keep the first, or average observed values.
        gaps: "nan" inserts missing rows, "error" refuses gaps.

    Returns:
        The repaired Dataset and what was changed: {"sorted": 0 or 1, "duplicates": rows removed, "inserted": rows}.

    Raises:
        ValueError: for duplicates or gaps that were not allowed, and for times that lie between two grid steps.
    """
    freq = normalize_freq(freq)
    for option, value, known in (
        ("duplicates", duplicates, ("error", "first", "mean")),
        ("gaps", gaps, ("nan", "error")),
    ):
        if value not in known:
            raise ValueError(f"{option}={value!r} is unknown; expected one of {known}.")
    if "observed" in ds:
        ds = ds.assign(target=ds["target"].where(ds["observed"])).drop_vars("observed")
    times = ds["time"].to_numpy()
    report = {"sorted": 0, "duplicates": 0, "inserted": 0}
    if (times[1:] < times[:-1]).any():
        ds = ds.sortby("time")
        report["sorted"] = 1
        times = ds["time"].to_numpy()
    repeated = np.flatnonzero(times[1:] == times[:-1]) + 1
    if len(repeated):
        if duplicates == "error":
            raise ValueError(
                f"{len(repeated)} duplicate times, the first {_stamp(times[repeated[0]])}; pass duplicates='first' or 'mean'."
            )
        report["duplicates"] = len(repeated)
        ds = ds.groupby("time").mean(skipna=True) if duplicates == "mean" else ds.drop_isel(time=repeated)
        times = ds["time"].to_numpy()
    check_times(times)
    grid = _grid(times, freq)
    off_grid = ~np.isin(times, grid)
    if off_grid.any():
        raise ValueError(
            f"{_stamp(times[off_grid.argmax()])} does not lie on the grid of freq {freq!r} from {_stamp(times[0])}; resample first or choose a finer freq."
        )
    report["inserted"] = len(grid) - len(times)
    if report["inserted"]:
        if gaps == "error":
            row = int((grid[: len(times)] != times).argmax())
            raise ValueError(
                f"{report['inserted']} steps are missing, the first {_stamp(grid[row])}; pass gaps='nan' to insert them as missing."
            )
        ds = ds.reindex(time=grid)
    ds.attrs["freq"] = freq
    return ds, report


def _grid(times: np.ndarray, freq: str | int) -> np.ndarray:
    if isinstance(freq, int):
        return np.arange(times[0], times[-1] + 1, freq)
    return pd.date_range(times[0], times[-1], freq=freq).to_numpy().astype("datetime64[ns]")


def extend(ds: xr.Dataset, steps: int, future: xr.Dataset | xr.DataArray | None = None) -> xr.Dataset:
    """Append `steps` times with missing targets, the place where forecasts go.

    Args:
        ds: Dataset with attribute `freq`; without it the median step is used.
        steps: Number of steps to append.
        future: Values of the future-known covariates for the appended times, where `ds` has a variable `future`.

    Raises:
        ValueError: listing the stamps for which a future-known covariate is missing.
    """
    times = ds["time"].to_numpy()
    freq = ds.attrs.get("freq")
    if freq is not None:
        new = step_times(times[-1], steps + 1, freq)[1:]
    else:
        step = base_step(times)
        new = times[-1] + (np.arange(1, steps + 1) * int(step)).astype(
            "timedelta64[ns]" if times.dtype.kind == "M" else np.int64
        )
    longer = ds.drop_vars("observed", errors="ignore").reindex(time=np.concatenate([times, new]))
    if "observed" in ds:
        longer["observed"] = ds["observed"].reindex(time=longer["time"], fill_value=False)
    if "future" in ds:
        if future is not None:
            given = future["future"] if isinstance(future, xr.Dataset) else future
            longer["future"] = longer["future"].fillna(given.reindex(time=longer["time"]))
        check_future(longer, slice(len(times), None))
    longer.attrs = dict(ds.attrs)
    return longer


def check_future(ds: xr.Dataset, steps: slice = slice(None)) -> None:
    """Future-known covariates must be there at every step.

    Raises:
        ValueError: listing the stamps that lack them.
    """
    part = ds["future"].isel(time=steps)
    missing = part.isnull().any([dim for dim in part.dims if dim != "time"]).to_numpy()
    if missing.any():
        stamps = part["time"].to_numpy()[missing]
        listed = ", ".join(_stamp(stamp) for stamp in stamps[:5]) + (", ..." if len(stamps) > 5 else "")
        raise ValueError(
            f"Future-known covariates are missing at {len(stamps)} times: {listed}; supply them or drop the variable 'future'."
        )
