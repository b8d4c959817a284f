"""Conformal intervals on top of any point forecaster: split, and tracked along a backtest.

With n absolute residuals of origins that the model has not seen, forecast +- the ceil((n + 1) (1 - alpha))-th smallest
of them covers a new target with probability at least 1 - alpha if old and new residuals are exchangeable (Vovk et al.
2005; Lei et al. 2018). Time series are exchangeable only roughly, and residuals of a validation part by which training
chose its best epoch come out a little small: check the coverage with a backtest on later data.

`track_intervals` needs no such assumption: after every target that becomes known, the logarithm of the radius grows by
rate * (1 - alpha) on a miss and falls by rate * alpha on a hit (the quantile tracker of Angelopoulos, Candes &
Tibshirani 2023, "Conformal PID Control for Time Series Prediction", here on a logarithmic scale, so that it follows
errors of any size).

Whatever the data: if no residual exceeds b, targets become known at most k forecasts later and n of them were met, the
share of misses exceeds alpha by at most (log(b / start) + (k + 1) rate) / (rate n), for start < b. It falls short by at
most (log(start / a) + (k + 1) rate) / (rate n) where all residuals exceed a, for start > a.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import xarray as xr

Array = npt.NDArray[Any]

__all__ = ["check_counts", "conformal_radius", "interval_levels", "track_intervals", "tracked_radius"]


def conformal_radius(residuals: Any, coverage: float, variates: Sequence[str] | None = None) -> Array:
    """Half width of the interval, per variate and step of the horizon.

    Args:
        residuals: target - forecast on held-out origins, (n, i, horizon); NaN where the target is missing.
        coverage: Wanted share of targets inside, 1 - alpha in (0, 1).
        variates: Names for the error message.

    Returns:
        float64 (i, horizon), in the units of the residuals.

    Raises:
        ValueError: if `coverage` is outside (0, 1), or a variate and step have fewer than 1 / alpha residuals.
    """
    scores = np.sort(np.abs(np.asarray(residuals, np.float64)), axis=0)  # NaN goes last
    count = np.isfinite(scores).sum(axis=0)  # (i, horizon)
    check_counts(count, coverage, variates)
    rank = np.ceil(np.round((count + 1) * coverage, 6)).astype(int) - 1
    return np.take_along_axis(scores, rank[None], axis=0)[0]


def check_counts(count: Array, coverage: float, variates: Sequence[str] | None = None) -> None:
    """Refuse a coverage for which there are too few residuals; `count` is that of observed ones, (i, horizon).

    Raises:
        ValueError: as in `conformal_radius`.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"expected an interval coverage inside (0, 1), got {coverage}; e.g. 0.9")
    needed = math.ceil(round(1 / (1 - coverage), 6))
    if count.min() < needed:
        variate, step = np.unravel_index(int(count.argmin()), count.shape)
        name = variates[int(variate)] if variates is not None else f"number {variate}"
        raise ValueError(
            f"a conformal interval of coverage {coverage:g} needs at least {needed} validation residuals, variate "
            f"{name} has {count.min()} at horizon {step + 1}; pass a longer validation part or a smaller coverage"
        )


def interval_levels(coverages: Sequence[float]) -> tuple[float, ...]:
    """Quantile levels of central intervals around the median, ascending: (0.8,) gives (0.1, 0.5, 0.9)."""
    lower = sorted(round((1 - c) / 2, 6) for c in coverages)
    return (*lower, 0.5, *(round(1 - q, 6) for q in reversed(lower)))


def tracked_radius(residuals: Any, known: Any, start: Any, coverage: float, rate: float = 0.05) -> Array:
    """Half widths that follow the misses, each from residuals known by then.

    Args:
        residuals: |target - forecast| of forecasts in the order of their making, (n, ...); NaN where the target is
            missing, which changes nothing.
        known: For each forecast the place of the first one by which its target is known, (n,), not descending and
            above its own place; n where there is none.
        start: First radius, (...), finite; one of 0 stays as it is.
        coverage: Wanted share of targets inside, 1 - alpha.
        rate: What a miss adds to the logarithm of the radius, and a hit takes from it, is `rate` times 1 - alpha, and
            alpha.

    Returns:
        float64 (n, ...).

    Raises:
        ValueError: if `coverage` or `rate` is out of range, or a target is known before its forecast is made.
    """
    if not 0 < coverage < 1:
        raise ValueError(f"expected an interval coverage inside (0, 1), got {coverage}; e.g. 0.9")
    if not rate > 0:
        raise ValueError(f"expected a positive rate, got {rate}; e.g. 0.05")
    residuals, known = np.asarray(residuals, np.float64), np.asarray(known)
    if (known <= np.arange(len(known))).any() or (np.diff(known) < 0).any():
        raise ValueError("expected `known` to ascend and to lie behind each forecast's own place")
    radius = np.empty_like(residuals)
    current, next_known = np.array(np.broadcast_to(start, residuals.shape[1:]), np.float64), 0
    for place in range(len(residuals)):
        while next_known < place and known[next_known] <= place:
            seen, missed = np.isfinite(residuals[next_known]), residuals[next_known] > radius[next_known]
            current = current * np.where(seen, np.exp(rate * (missed - (1 - coverage))), 1.0)
            next_known += 1
        radius[place] = current
    return radius


def track_intervals(forecast: xr.Dataset, rate: float = 0.05) -> xr.Dataset:
    """A backtest with intervals that follow its errors, see `tracked_radius`.

    The interval of a cutoff uses only targets that were observed at or before it. The first radius is half the width of
    the interval that the forecast came with, and every series, variate, step of the horizon and level goes its own way.

    Args:
        forecast: Backtest with `target` and central intervals in `quantiles`, in the units of the data.
        rate: Share by which about a miss widens an interval. Larger follows faster and wavers more.

    Returns:
        The forecast with other `quantiles`, and `intervals` and `interval_rate` in its attributes.

    Raises:
        ValueError: if there are no targets or no intervals, or cutoffs do not ascend.
    """
    if "target" not in forecast:
        raise ValueError("intervals can only follow a backtest, which has targets; this forecast has none")
    levels = [float(q) for q in forecast["quantile"].to_numpy()] if "quantiles" in forecast else []
    lower = [q for q in levels if q < 0.5]
    if not lower or any(round(1 - q, 6) not in [round(p, 6) for p in levels] for q in lower):
        raise ValueError(f"expected a forecast with central intervals, e.g. levels 0.1 and 0.9; got {levels or 'none'}")
    cutoffs = forecast["cutoff"].to_numpy()
    if (cutoffs[1:] <= cutoffs[:-1]).any():
        raise ValueError("expected cutoffs that ascend; sort the forecast by cutoff first")
    dims = ("cutoff", "series", "variate", "horizon")
    mean = forecast["mean"].transpose(*dims).to_numpy().astype(np.float64)
    old = forecast["quantiles"].transpose(*dims, "quantile").to_numpy().astype(np.float64)
    residuals = np.abs(forecast["target"].transpose(*dims).to_numpy() - mean)
    if "observed" in forecast:
        residuals = np.where(forecast["observed"].transpose(*dims).to_numpy(), residuals, np.nan)
    valid = forecast["valid_time"].transpose("cutoff", "horizon").to_numpy()
    new, widest = np.repeat(mean[..., None], len(levels), axis=-1), np.zeros_like(mean)
    for q in sorted(lower, reverse=True):  # from the narrowest interval, which the others contain
        low, high = levels.index(q), int(np.abs(np.array(levels) - (1 - q)).argmin())
        start = (old[0, ..., high] - old[0, ..., low]) / 2
        radius = np.empty_like(mean)
        for step in range(mean.shape[-1]):
            known = np.searchsorted(cutoffs, valid[:, step])
            radius[..., step] = tracked_radius(residuals[..., step], known, start[..., step], 1 - 2 * q, rate)
        widest = np.maximum(widest, radius)
        new[..., low], new[..., high] = mean - widest, mean + widest
    order = [dims.index(str(name)) for name in forecast["quantiles"].dims if name != "quantile"]
    quantiles = new.transpose(*order, 4).astype(forecast["quantiles"].dtype)
    shape = (*(dims[k] for k in order), "quantile")
    changed = forecast.assign(quantiles=(shape, quantiles))
    return changed.assign_attrs(intervals="tracked along the cutoffs", interval_rate=float(rate))
