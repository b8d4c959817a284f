"""The one schema of a time series: an xarray Dataset, its checks, and the only function that repairs one.

Dimensions `series` (optional), `time`, `variate`. Variables: `target` (series, time, variate) with NaN = missing,
and optionally `observed` (bool, same shape), `past` (series, time, past_feature), `future` (series, time,
future_feature; known in advance, its times may run past the last target), `static` (series or variate,
static_feature) and `label`. Times are datetime64 (UTC) or integers; `freq` is a pandas alias or an integer step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr

from .freq import base_step, check_freq, check_times, nanoseconds, normalize_freq, stamp, step_times

SCHEMA_VERSION = "1"
DIMS = ("series", "time", "variate")
COVARIATES = {"past": "past_feature", "future": "future_feature"}
_BLOCK = 1 << 22  # entries looked at together, so that a check of a large array needs little memory


def validate(ds: xr.Dataset) -> None:
    """Check `ds` against the schema; nothing is repaired.

    Raises:
        TypeError: if `ds` is not an xarray Dataset.
        ValueError: naming the first violation and the way out, in one line.
    """
    if not isinstance(ds, xr.Dataset):
        raise TypeError(
            f"Expected an xarray Dataset, got {type(ds).__name__}; frames and arrays enter by from_long, "
            "from_wide or from_numpy."
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
            f"The Dataset has no variable 'target', only {sorted(map(str, ds.data_vars))}; rename the values to "
            "'target'."
        )
    allowed = {"target": DIMS, "observed": DIMS, **{name: ("series", "time", dim) for name, dim in COVARIATES.items()}}
    for name, dims in allowed.items():
        if name not in ds:
            continue
        found = ds[name].dims
        needed = {dim for dim in dims if dim != "series"} if name != "observed" else set(ds["target"].dims)
        if not needed <= set(found) or not set(found) <= set(dims):
            raise ValueError(
                f"Variable '{name}' has dimensions {found}, expected {dims} ('series' optional); rename or "
                "transpose it."
            )
        if name == "observed":
            if ds[name].dtype != bool:
                raise ValueError(
                    f"Variable 'observed' has dtype {ds[name].dtype}, expected bool; convert it with .astype(bool)."
                )
        elif ds[name].dtype.kind not in "fiu":
            raise ValueError(
                f"Variable '{name}' has dtype {ds[name].dtype}, expected numbers; convert text with "
                "pandas.to_numeric or drop those columns."
            )
    empty = next((dim for dim in ("series", "variate") if ds.sizes.get(dim) == 0), None)
    if empty:
        raise ValueError(f"The Dataset has no {empty}: dimension '{empty}' has length 0; expected at least one.")
    if "static" in ds:
        static, kind = set(ds["static"].dims), ds["static"].dtype.kind
        if kind not in "fiub" or not {"static_feature"} <= static <= {"series", "variate", "static_feature"}:
            raise ValueError(
                f"Variable 'static' is {ds['static'].dtype} with dimensions {ds['static'].dims}, expected numbers "
                "over (series or variate, static_feature)."
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
                raise ValueError(f"Coordinate '{dim}' holds {str(names[repeated][0])!r} twice; names must differ.")


def _check_finite(array: xr.DataArray) -> None:
    if array.dtype.kind != "f":
        return
    feature = next(dim for dim in array.dims[::-1] if dim not in ("series", "time"))
    axis = array.dims.index(feature)
    for offset, values in _blocks(array):
        bad = np.argwhere(np.abs(values) > np.finfo(np.float32).max)
        if len(bad):
            at = dict(zip(array.dims, bad[0].tolist()))
            name = array[feature].to_numpy()[bad[0][axis]]
            where = f" at {stamp(array['time'].to_numpy()[offset + at['time']])}" if "time" in at else ""
            raise ValueError(
                f"Variable '{array.name}' is infinite (beyond float32) in {feature} {name!s}{where}; replace "
                "such values by NaN or correct them."
            )


def _check_observed(ds: xr.Dataset) -> None:
    target = ds["target"]
    seen = np.zeros(target.sizes["variate"], dtype=bool)
    for offset, values in _blocks(target):
        present = ~np.isnan(values) if values.dtype.kind == "f" else np.ones(values.shape, dtype=bool)
        if "observed" in ds:
            steps = slice(offset, offset + values.shape[target.dims.index("time")])
            present &= ds["observed"].isel(time=steps).transpose(*target.dims).to_numpy()
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
        yield 0, _loaded(array)
        return
    length = array.sizes["time"]
    rows = max(1, _BLOCK // max(1, array.size // max(1, length)))
    for offset in range(0, length, rows):
        yield offset, _loaded(array.isel(time=slice(offset, offset + rows)))


def _loaded(array: xr.DataArray) -> np.ndarray:
    """Values that may still be in a file."""
    try:
        return array.to_numpy()
    except RuntimeError as error:  # what unpacks a damaged piece says
        raise ValueError(f"Variable {array.name!r} cannot be read: {error}; is its file complete?") from error


def canonical(ds: xr.Dataset) -> xr.Dataset:
    """The same data with all of (series, time, variate) present, in this order.

    `target` and covariates are float32; `target` is NaN exactly where `observed` is False; `observed` is always there,
    costs no memory when nothing is missing, and is read only. Names default to "0", "1", ...; times are in
    nanoseconds or int64. Arrays that already fit are not copied.
    """
    ds = ds if "series" in ds.dims else ds.expand_dims("series").assign_coords(series=["0"])
    named = (*DIMS[::2], *COVARIATES.values())
    names: dict[str, Any] = {
        dim: [str(k) for k in range(ds.sizes[dim])] for dim in named if dim in ds.dims and dim not in ds.coords
    }
    times = ds["time"].to_numpy()
    wanted = nanoseconds(times) if times.dtype.kind == "M" else times.astype(np.int64)
    if times.dtype != wanted.dtype:
        names["time"] = wanted
    ds = ds.assign_coords(names)
    target = _ordered(ds, "target", DIMS, np.float32)
    observed = _observed(target)
    if "observed" in ds:
        stated = _ordered(ds, "observed", DIMS, np.bool_)
        if (observed & ~stated).any():
            observed = observed & stated
            target = np.where(observed, target, np.float32("nan"))
        if np.array_equal(observed, stated):
            observed = stated  # keep the mask that is there, so that parts of a Dataset share it
    variables: dict[str, Any] = {"target": (DIMS, target, ds["target"].attrs), "observed": (DIMS, observed)}
    for name, dim in COVARIATES.items():
        if name in ds:
            dims = ("series", "time", dim)
            variables[name] = (dims, _ordered(ds, name, dims, np.float32), ds[name].attrs)
    out = ds.assign(variables)
    out.attrs = {**ds.attrs, "schema_version": SCHEMA_VERSION}
    if ds.attrs.get("freq") is not None:
        out.attrs["freq"] = normalize_freq(ds.attrs["freq"])
    return out


def _ordered(ds: xr.Dataset, name: str, dims: tuple[str, ...], dtype: type) -> np.ndarray:
    """A variable with exactly these dimensions, contiguous; repeated for every series if it has no `series`."""
    array = ds[name] if "series" in ds[name].dims else ds[name].expand_dims(series=ds["series"])
    return np.ascontiguousarray(array.transpose(*dims).to_numpy(), dtype=dtype)


def observed_target(ds: xr.Dataset) -> xr.DataArray:
    """The target with NaN where `observed` says that nothing was."""
    return ds["target"].where(ds["observed"]) if "observed" in ds else ds["target"]


def read_block(ds: xr.Dataset, name: str, series: int, steps: slice = slice(None)) -> np.ndarray:
    """Some steps of one series as (time, feature) float32, NaN where not observed; reads only these from a file."""
    part = ds[[key for key in ((name, "observed") if name == "target" else (name,)) if key in ds]].isel(time=steps)
    part = part.isel(series=series) if "series" in part.dims else part
    values = _loaded(part[name].transpose("time", ...)).astype(np.float32)
    if "observed" in part:
        values[~part["observed"].transpose("time", ...).to_numpy()] = np.nan
    return values


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
        duplicates: What to do with equal times: refuse, keep the first, or average observed values; then flags
            are set where any was, and whole numbers and text that are no series keep the first.
        gaps: "nan" inserts missing rows, "error" refuses gaps.

    Returns:
        The repaired Dataset and what was changed: {"sorted": 0 or 1, "duplicates": rows removed, "inserted": rows}.

    Raises:
        ValueError: for duplicates or gaps that were not allowed, and for times that lie between two grid steps.
    """
    freq = normalize_freq(freq)
    if isinstance(freq, int) != (ds["time"].dtype.kind in "iu"):
        raise ValueError(f"freq {freq!r} does not fit times of {ds['time'].dtype}; aliases go with datetime64.")
    for option, value, known in (
        ("duplicates", duplicates, ("error", "first", "mean")),
        ("gaps", gaps, ("nan", "error")),
    ):
        if value not in known:
            raise ValueError(f"{option}={value!r} is unknown; expected one of {known}.")
    ds = ds.assign(target=observed_target(ds)).drop_vars("observed", errors="ignore")
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
                f"{len(repeated)} duplicate times, the first {stamp(times[repeated[0]])}; pass duplicates='first' "
                "or 'mean'."
            )
        report["duplicates"] = len(repeated)
        if duplicates == "mean":
            merged = _merge(ds)
        ds = ds.isel(time=np.setdiff1d(np.arange(len(times)), repeated))
        if duplicates == "mean":
            ds = ds.assign(merged)
        times = ds["time"].to_numpy()
    check_times(times)
    grid = _grid(times, freq)
    off_grid = ~np.isin(times, grid)
    if off_grid.any():
        raise ValueError(
            f"{stamp(times[off_grid.argmax()])} does not lie on the grid of freq {freq!r} from {stamp(times[0])}; "
            "resample first or choose a finer freq."
        )
    report["inserted"] = len(grid) - len(times)
    if report["inserted"]:
        if gaps == "error":
            row = int((grid[: len(times)] != times).argmax())
            raise ValueError(
                f"{report['inserted']} steps are missing, the first {stamp(grid[row])}; pass gaps='nan' to insert "
                "them as missing."
            )
        ds = _reindex(ds, grid)
    return ds.assign_attrs(freq=freq), report


def _merge(ds: xr.Dataset) -> dict[str, xr.Variable]:
    """One row for each time: the mean of covariates, targets and other fractions, and of flags whether any is set."""
    merged = {}
    for name, array in ds.data_vars.items():
        if "time" not in array.dims:
            continue
        groups = array.groupby("time")
        if array.dtype == bool:
            merged[str(name)] = groups.any(keep_attrs=True).transpose(*array.dims).variable
        elif array.dtype.kind == "f" or name in ("target", *COVARIATES):
            merged[str(name)] = groups.mean(skipna=True, keep_attrs=True).transpose(*array.dims).variable
    return merged


def _reindex(ds: xr.Dataset, times: np.ndarray) -> xr.Dataset:
    """Missing rows are NaN in numbers and False in flags."""
    flags = {name: False for name, array in ds.variables.items() if array.dtype == bool}
    return ds.reindex(time=times, fill_value=flags)


def _grid(times: np.ndarray, freq: str | int) -> np.ndarray:
    step = freq if isinstance(freq, int) else np.diff(step_times(times[0], 3, freq).astype(np.int64))[-1]
    steps = int(times[-1] - times[0]) // int(step)
    if steps > 1e7 and steps > 1000 * len(times):  # a mistyped freq must not fill the memory
        raise ValueError(f"freq {freq!r} would make {steps:,} steps of {len(times):,} rows; choose a coarser freq.")
    if isinstance(freq, int):
        return np.arange(times[0], times[-1] + 1, freq)
    return pd.date_range(times[0], times[-1], freq=freq).to_numpy().astype("datetime64[ns]")


def extend(
    ds: xr.Dataset, steps: int, future: xr.Dataset | xr.DataArray | None = None, *, check: bool = True
) -> xr.Dataset:
    """Append `steps` times with missing targets, the place where forecasts go.

    Args:
        ds: Dataset with attribute `freq`; without it the median step is used.
        steps: Number of steps to append.
        future: Values of the future-known covariates for the appended times, where `ds` has a variable `future`.
        check: Require these values at all appended times.

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
    longer = _reindex(ds, np.concatenate([times, new]))
    if "future" in ds:
        if future is not None:
            given = future["future"] if isinstance(future, xr.Dataset) else future
            longer["future"] = longer["future"].fillna(given.reindex(time=longer["time"]))
        if check:
            check_future(longer, slice(len(times), None))
    return longer


def check_future(ds: xr.Dataset, steps: slice = slice(None), *, only_observed: bool = False) -> None:
    """Future-known covariates must be there at each of these steps.

    Args:
        ds: Dataset with a variable `future`.
        steps: Steps to look at.
        only_observed: Look only where the series has an observed target; series of a panel may differ in length.

    Raises:
        ValueError: listing the stamps that lack them.
    """
    part = ds["future"].isel(time=steps)
    absent = part.isnull().any("future_feature")
    if only_observed:
        absent = absent & ds["target"].isel(time=steps).notnull().any("variate")
    missing = absent.any([dim for dim in absent.dims if dim != "time"]).to_numpy()
    if missing.any():
        stamps = part["time"].to_numpy()[missing]
        listed = ", ".join(stamp(time) for time in stamps[:5]) + (", ..." if len(stamps) > 5 else "")
        raise ValueError(
            f"Future-known covariates are missing at {len(stamps)} times: {listed}; supply them or drop the "
            "variable 'future'."
        )
