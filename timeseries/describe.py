"""What a set of series looks like before anything is trained on it."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
import xarray as xr

from .freq import infer_freq, season_length, stamp
from .schema import canonical, validate

Array = npt.NDArray[Any]

__all__ = ["Description", "describe_series"]


class Description(NamedTuple):
    """Facts of the whole as name to value, and one row per series and variate."""

    facts: dict[str, Any]
    variates: pd.DataFrame


def describe_series(ds: xr.Dataset) -> Description:
    """Length, frequency, gaps, missing values, outliers, and a lookback and season to begin with.

    The season is that of the frequency, if the autocorrelation at it is above 0.3 for some variate, else the first peak
    of the autocorrelation above 0.3, else 1. Outliers are observed values further than 8 robust standard deviations
    (1.4826 times the median absolute deviation) from the median.

    Args:
        ds: Dataset in the schema.

    Returns:
        Facts of the whole, and a frame with columns series, variate, [units,] missing (share), longest_gap (steps),
        min, mean, max, outliers, first_outlier.

    Raises:
        ValueError: for data that violate the schema.
    """
    validate(ds)
    freq = ds.attrs.get("freq")
    ds = canonical(ds)
    times, values = ds["time"].to_numpy(), ds["target"].to_numpy()
    freq = infer_freq(times) if freq is None else freq
    season = _season(values, freq)
    lookback = int(min(3 * season if season > 1 else 32, max(1, len(times) // 8)))
    empty = np.isnan(values).all(axis=(0, 2))
    facts: dict[str, Any] = {
        "steps": len(times),
        "first": stamp(times[0]),
        "last": stamp(times[-1]),
        "freq": freq if freq is not None else "irregular",
        "series": ds.sizes["series"],
        "variates": ds.sizes["variate"],
        "missing": f"{100 * np.isnan(values).mean():.2f} %",
        "gaps": _gaps(times, empty, freq),
        "suggested season": season,
        "suggested lookback": lookback,
    }
    rows = []
    for s, series in enumerate(ds["series"].to_numpy()):
        for i, variate in enumerate(ds["variate"].to_numpy()):
            row: dict[str, Any] = {"series": str(series), "variate": str(variate)}
            if "units" in ds.coords:
                row["units"] = str(ds["units"].to_numpy()[i])
            rows.append(row | _summary(values[s, :, i].astype(np.float64), times))
    return Description(facts, pd.DataFrame(rows))


def _summary(x: Array, times: Array) -> dict[str, Any]:
    """Numbers of one series of one variate."""
    known = np.isfinite(x)
    row: dict[str, Any] = {"missing": float(1 - known.mean()), "longest_gap": _longest(~known)}
    if not known.any():
        return row | {"min": np.nan, "mean": np.nan, "max": np.nan, "outliers": 0, "first_outlier": ""}
    median = np.median(x[known])
    spread = 1.4826 * np.median(np.abs(x[known] - median))
    far = known & (np.abs(x - median) > 8 * spread) if spread > 0 else np.zeros(len(x), bool)
    first = f"{x[far.argmax()]:g} at {stamp(times[far.argmax()])}" if far.any() else ""
    numbers = {"min": np.nanmin(x), "mean": np.nanmean(x), "max": np.nanmax(x)}
    return row | {k: float(v) for k, v in numbers.items()} | {"outliers": int(far.sum()), "first_outlier": first}


def _longest(flags: Array) -> int:
    """Length of the longest run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flags.astype(np.int8), [0]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _gaps(times: Array, empty: Array, freq: str | int | None) -> str:
    """Steps without any observation, and for irregular times the jumps, the first three with their place."""
    if freq is None and len(times) > 2:
        steps = np.diff(times).astype(np.int64)
        at = np.flatnonzero(steps > np.median(steps)) + 1
        kind = "jumps"
    else:
        at = np.flatnonzero(empty & ~np.concatenate([[False], empty[:-1]]))
        kind = "empty stretches"
    if not len(at):
        return "none"
    places = ", ".join(stamp(times[k]) for k in at[:3])
    return f"{len(at)} {kind}, first at {places}{', ...' if len(at) > 3 else ''}"


def _season(values: Array, freq: str | int | None) -> int:
    """Season length in steps that the data show."""
    correlation = _autocorrelation(values)
    usual = season_length(freq)
    if 1 < usual < len(correlation) and correlation[usual] > 0.3:
        return usual
    inner = correlation[2:-1]
    peaks = (inner > correlation[1:-2]) & (inner >= correlation[3:]) & (inner > 0.3)
    return int(peaks.argmax()) + 2 if peaks.any() else 1


def _autocorrelation(values: Array) -> Array:
    """Largest autocorrelation over series and variates at lags 0 .. a third of the length, at most 1000; 0 if unknown.

    Slow changes are taken out by first differences, or any drift would look like every season.
    """
    lags = min(1000, values.shape[1] // 3)
    best = np.zeros(lags + 1)
    for x in np.moveaxis(values, 1, -1).reshape(-1, values.shape[1]).astype(np.float64):
        steps = np.diff(x)
        known = np.isfinite(steps)
        if known.sum() < 3:
            continue
        steps = np.where(known, steps - steps[known].mean(), 0.0)
        size = 2 * len(steps)
        product = np.fft.irfft(np.abs(np.fft.rfft(steps, size)) ** 2, size)[: lags + 1]
        pairs = np.fft.irfft(np.abs(np.fft.rfft(known.astype(float), size)) ** 2, size)[: lags + 1]
        covariance = product / np.maximum(np.round(pairs), 1)
        if covariance[0] > 0:
            best = np.maximum(best, covariance / covariance[0])
    return best
