"""Calendar features in [-0.5, 0.5], chosen by the frequency, and Fourier pairs; both known in advance."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from .freq import base_step as median_step
from .freq import to_offset

PREFIX = "time:"  # marks the columns that come from here among the covariates

_FEATURES = {
    "minute_of_hour": lambda t: t.minute / 59,
    "hour_of_day": lambda t: t.hour / 23,
    "day_of_week": lambda t: t.day_of_week / 6,
    "day_of_month": lambda t: (t.day - 1) / 30,
    "day_of_year": lambda t: (t.day_of_year - 1) / 365,
    "month": lambda t: (t.month - 1) / 11,
}
_BY_UNIT = {
    **dict.fromkeys(("ns", "us", "ms", "s", "min"), tuple(_FEATURES)),
    **dict.fromkeys(("h", "bh", "cbh"), tuple(_FEATURES)[1:]),
    **dict.fromkeys(("D", "B", "C"), tuple(_FEATURES)[2:]),
    "W": ("day_of_month", "day_of_year", "month"),
}
_MONTHS = {
    **dict.fromkeys(("ME", "MS", "BME", "BMS", "CBME", "CBMS"), 1),
    **dict.fromkeys(("QE", "QS", "BQE", "BQS"), 3),
    **dict.fromkeys(("YE", "YS", "BYE", "BYS"), 12),
}


def calendar_features(
    times: np.ndarray, freq: str | None = None, zone: str | None = None
) -> tuple[np.ndarray, list[str]]:
    """Calendar position of each time.

    Args:
        times: datetime64, in UTC when `zone` is given.
        freq: pandas alias that decides which features vary; None gives all.
        zone: Time zone, such as "America/New_York", whose local time counts. Daylight-saving changes repeat or skip an
            hour of the local clock, which is what a local habit sees.

    Returns:
        Features (time, feature) float32 in [-0.5, 0.5], and their names.

    Raises:
        ValueError: if times are not datetime64, or the zone is unknown.
    """
    if times.dtype.kind != "M":
        raise ValueError(
            f"Calendar features need datetime64 times, got {times.dtype}; use fourier periods for integer steps."
        )
    stamps = pd.DatetimeIndex(times)
    if zone is not None:
        try:
            stamps = stamps.tz_localize("UTC").tz_convert(zone)
        except (KeyError, ValueError, OSError):
            raise ValueError(f"Unknown time zone {zone!r}; expected a name such as 'Europe/Berlin'.") from None
    unit = "s"
    if freq is not None:
        unit = to_offset(freq).rule_code.split("-")[0]
    names = list(_BY_UNIT.get(unit, ("month",)))
    columns = [np.asarray(_FEATURES[name](stamps), dtype=np.float32) - np.float32(0.5) for name in names]
    return np.stack(columns, axis=1), names


def fourier_features(
    times: np.ndarray, periods: Sequence[float], freq: str | int | None = None, base_step: float | None = None
) -> tuple[np.ndarray, list[str]]:
    """sin and cos of 2 pi t / period, t in steps since 1970 or since integer 0.

    With `freq` or `base_step`, any cut of a series agrees. Months, quarters, years and business days are counted, so
    that a period of 12 months is a year whatever their lengths.

    Args:
        times: datetime64 or integer times.
        periods: Periods in steps, positive.
        freq: Frequency of the times.
        base_step: Without `freq`, the length of a step in nanoseconds or integers; the median difference when None.

    Returns:
        Features (time, 2 * periods) float32 in [-1, 1], and their names.
    """
    for period in periods:
        if not period > 0:
            raise ValueError(f"Fourier periods must be positive numbers of steps, got {period}.")
    if isinstance(freq, str):
        count, step = _count(times, freq)
    else:
        count = times.astype("datetime64[ns]").astype(np.int64) if times.dtype.kind == "M" else times.astype(np.int64)
        step = freq or base_step or median_step(times)
    columns, names = [], []
    for period in periods:
        phase = 2 * np.pi * ((count % (period * step)) / (period * step))
        columns += [np.sin(phase), np.cos(phase)]
        names += [f"sin_{period:g}", f"cos_{period:g}"]
    return np.stack(columns, axis=1).astype(np.float32), names


def _count(times: np.ndarray, freq: str) -> tuple[np.ndarray, float]:
    """Integer position of each time, and how much of it a step of `freq` is."""
    offset = to_offset(freq)
    unit = offset.rule_code.split("-")[0]
    months, stamps = times.astype("datetime64[M]").astype(np.int64), pd.DatetimeIndex(times)
    if unit in _MONTHS:
        return months, _MONTHS[unit] * offset.n
    if unit in ("SMS", "SME"):  # the 1st, or the last day, and another day
        return 2 * months + np.asarray(stamps.day > 1 if unit == "SMS" else stamps.day > 27), offset.n
    if unit in ("B", "C", "bh", "cbh"):
        days = np.busday_count(np.datetime64("1970-01-01"), times.astype("datetime64[D]"))
        return (days if unit in ("B", "C") else 8 * days + np.asarray(stamps.hour) - 9), offset.n  # 9 to 17 o'clock
    grid = pd.date_range("1970-01-05", periods=241, freq=offset.base).to_numpy().astype("datetime64[ns]")
    mean = (grid[-1] - grid[0]).astype(np.int64) / 240  # exact for what has a fixed length
    return times.astype("datetime64[ns]").astype(np.int64), float(mean) * offset.n


def add_time_features(
    ds: xr.Dataset,
    *,
    calendar: bool = True,
    fourier: Sequence[float] = (),
    zone: str | None = None,
    base_step: float | None = None,
) -> xr.Dataset:
    """Append calendar and Fourier features to the variable `future` of a canonical Dataset.

    Its attribute `freq` decides which vary, and how steps are counted; without one they are counted in `base_step`.
    """
    times, freq = ds["time"].to_numpy(), ds.attrs.get("freq")
    columns, names = [], []
    if calendar:
        values, found = calendar_features(times, freq, zone)
        columns.append(values)
        names += found
    if fourier:
        values, found = fourier_features(times, fourier, freq, base_step)
        columns.append(values)
        names += found
    shape = (ds.sizes["series"], ds.sizes["time"], len(names))
    values = np.broadcast_to(np.concatenate(columns, axis=1), shape)
    added = xr.DataArray(
        values,
        dims=("series", "time", "future_feature"),
        coords={"future_feature": [PREFIX + name for name in names], "time": ds["time"], "series": ds["series"]},
    )
    if "future" not in ds:
        return ds.assign(future=added)
    both = xr.concat([ds["future"], added], dim="future_feature")
    return ds.drop_dims("future_feature").assign(future=both)
