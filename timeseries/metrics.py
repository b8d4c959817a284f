"""Forecast errors: masked, summed in float64, NaN where nothing is observed.

Every function takes arrays that broadcast against each other, ignores the entries whose mask is False (default: the
target is finite) and reduces over `axis` (default: all axes, one mean over windows, horizon and variates). Means are
one sum divided by one count, never means of batch means; `ErrorSums` carries the same sums across batches.

Sources: Hyndman & Koehler (2006) for MASE; Makridakis et al. (2020), M4, for OWA and MSIS; Gneiting & Raftery (2007)
for the continuous ranked probability score (CRPS) and the interval score.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor

from .schema import read_block

Array = npt.NDArray[Any]
Axis = int | tuple[int, ...] | None

__all__ = [
    "ErrorSums",
    "coverage",
    "crps_normal",
    "crps_quantiles",
    "crps_samples",
    "interval_width",
    "mae",
    "mape",
    "mase",
    "masked_mean",
    "mse",
    "msis",
    "nd",
    "owa",
    "pinball",
    "rmse",
    "rmsse",
    "seasonal_errors",
    "seasonal_scale",
    "smape",
    "wql",
]


def _prepare(target: Any, mask: Any | None) -> tuple[Array, Array]:
    """Target in float64 with 0 where masked out, and the mask as bool of the target's shape."""
    target = np.asarray(target, dtype=np.float64)
    keep = np.isfinite(target) if mask is None else np.broadcast_to(np.asarray(mask, dtype=bool), target.shape)
    return np.where(keep, target, 0.0), keep


def _sum(values: Array, keep: Array, axis: Axis) -> Array:
    keep = np.broadcast_to(keep, np.broadcast_shapes(keep.shape, values.shape))
    return np.where(keep, values, 0.0).sum(axis=axis, dtype=np.float64)


def _ratio(numerator: Array, denominator: Array) -> Any:
    """numerator / denominator, NaN where the denominator is 0; a float64 number or array."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(denominator == 0, np.nan, numerator / denominator)[()]


def masked_mean(values: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Mean of the entries whose mask is True (default: the finite ones), NaN when there is none.

    Args:
        values: Any shape.
        mask: Bool, broadcasting to `values`.
        axis: Axes to reduce; None reduces all.

    Returns:
        A float64 number, or an array of the remaining axes.
    """
    values = np.asarray(values, dtype=np.float64)
    keep = np.isfinite(values) if mask is None else np.broadcast_to(np.asarray(mask, dtype=bool), values.shape)
    return _ratio(_sum(values, keep, axis), keep.sum(axis=axis))


def mse(target: Any, forecast: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Mean squared error, in squared units of the target."""
    target, keep = _prepare(target, mask)
    return masked_mean(np.square(target - np.asarray(forecast, np.float64)), keep, axis=axis)


def rmse(target: Any, forecast: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Root of the mean squared error, in units of the target."""
    return np.sqrt(mse(target, forecast, mask, axis=axis))


def mae(target: Any, forecast: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Mean absolute error, in units of the target."""
    target, keep = _prepare(target, mask)
    return masked_mean(np.abs(target - np.asarray(forecast, np.float64)), keep, axis=axis)


def mape(target: Any, forecast: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Mean absolute percentage error, 100 |y - f| / |y|; NaN with a warning where an observed target is 0."""
    target, keep = _prepare(target, mask)
    if np.any(keep & (target == 0)):
        warnings.warn("mape is undefined where the target is 0 and NaN there; use smape or nd", stacklevel=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        percent = 100 * np.abs(target - np.asarray(forecast, np.float64)) / np.abs(target)
    return masked_mean(np.where(target == 0, np.nan, percent), keep, axis=axis)


def smape(target: Any, forecast: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Symmetric percentage error, 200 |y - f| / (|y| + |f|) in [0, 200]; 0 / 0 counts as 0."""
    target, keep = _prepare(target, mask)
    forecast = np.asarray(forecast, np.float64)
    size = np.abs(target) + np.abs(forecast)
    percent = 200 * np.abs(target - forecast) / np.where(size == 0, 1.0, size)
    return masked_mean(percent, keep, axis=axis)


def seasonal_scale(train: Any, season: int = 1, mask: Any | None = None, *, axis: int = 0, power: int = 1) -> Any:
    """Mean of |y_t - y_{t-season}|^power over the training part, the yardstick of `mase` (1) and `rmsse` (2).

    Args:
        train: Training values, time along `axis`; NaN is missing.
        season: Season length in steps, at least 1.
        mask: Bool of the shape of `train`, True where observed.
        axis: The time axis.
        power: 1 or 2.

    Returns:
        float64, `train` without its time axis; NaN where no pair of values one season apart was observed.

    Raises:
        ValueError: if `season` is below 1.
    """
    if season < 1:
        raise ValueError(f"expected a season of at least 1 step, got {season}; use 1 for data without a season")
    values, keep = _prepare(train, mask)
    values, keep = np.moveaxis(values, axis, 0), np.moveaxis(keep, axis, 0)
    steps = np.abs(values[season:] - values[:-season]) ** power
    return masked_mean(steps, keep[season:] & keep[:-season], axis=0)


def seasonal_errors(ds: xr.Dataset, season: int) -> dict[str, list[list[float | None]]]:
    """`seasonal_scale` of a training part per series and variate, as a saved model carries it for `mase` and `rmsse`.

    Returns:
        {"seasonal_mae": ..., "seasonal_mse": ...}, tables of series by variate in target units; None where undefined.
    """
    tables: dict[str, list[list[float | None]]] = {"seasonal_mae": [], "seasonal_mse": []}
    for series in range(ds.sizes.get("series", 1)):  # one at a time, so that a lazily opened file is never held whole
        values = read_block(ds, "target", series)
        for table, power in zip(tables.values(), (1, 2)):
            scales = seasonal_scale(values, season, power=power)
            table.append([float(scale) if np.isfinite(scale) else None for scale in scales])
    return tables


def _positive(scale: Any, name: str) -> Array:
    """Scale in float64, NaN with a warning where it is 0 (a constant training part)."""
    scale = np.asarray(scale, np.float64)
    if np.any(scale == 0):
        warnings.warn(f"{name} is undefined for a series constant over its season and NaN there", stacklevel=3)
    return np.where(scale == 0, np.nan, scale)


def mase(target: Any, forecast: Any, scale: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Mean absolute scaled error: |y - f| over `scale = seasonal_scale(train, season)` of the same series."""
    target, keep = _prepare(target, mask)
    error = np.abs(target - np.asarray(forecast, np.float64))
    return masked_mean(error / _positive(scale, "mase"), keep, axis=axis)


def rmsse(target: Any, forecast: Any, scale: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Root mean squared scaled error; `scale = seasonal_scale(train, season, power=2)` of the same series."""
    target, keep = _prepare(target, mask)
    error = np.square(target - np.asarray(forecast, np.float64))
    return np.sqrt(masked_mean(error / _positive(scale, "rmsse"), keep, axis=axis))


def owa(smape: Any, mase: Any, naive_smape: Any, naive_mase: Any) -> Any:
    """Overall weighted average of M4: mean of the two errors relative to those of the seasonally adjusted naive."""
    return 0.5 * (_ratio(np.asarray(smape), np.asarray(naive_smape)) + _ratio(np.asarray(mase), np.asarray(naive_mase)))


def nd(target: Any, forecast: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Normalised deviation, sum |y - f| / sum |y|."""
    target, keep = _prepare(target, mask)
    return _ratio(_sum(np.abs(target - np.asarray(forecast, np.float64)), keep, axis), _sum(np.abs(target), keep, axis))


def _pinball(target: Array, forecast: Any, level: Any) -> Array:
    error = target - np.asarray(forecast, np.float64)
    return np.maximum(np.asarray(level) * error, (np.asarray(level) - 1) * error)


def pinball(target: Any, forecast: Any, level: float, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Quantile loss of one level q in (0, 1): max(q e, (q - 1) e) with e = y - f, in units of the target."""
    target, keep = _prepare(target, mask)
    return masked_mean(_pinball(target, forecast, level), keep, axis=axis)


def _mean_pinball(target: Array, quantiles: Any, levels: Any) -> Array:
    """Mean quantile loss over the levels, shape of the target; quantiles have the levels as their last axis."""
    quantiles, levels = np.asarray(quantiles, np.float64), np.asarray(levels, np.float64)
    if quantiles.shape[-1:] != levels.shape:
        raise ValueError(
            f"expected quantiles with a last axis of {levels.size} levels, got shape {quantiles.shape}; "
            "pass the levels the forecast was made with"
        )
    return _pinball(target[..., None], quantiles, levels).mean(axis=-1)


def wql(target: Any, quantiles: Any, levels: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Weighted quantile loss: 2 sum_t mean_q pinball_q / sum_t |y_t|; `quantiles` has the levels on its last axis."""
    target, keep = _prepare(target, mask)
    return _ratio(2 * _sum(_mean_pinball(target, quantiles, levels), keep, axis), _sum(np.abs(target), keep, axis))


def crps_quantiles(target: Any, quantiles: Any, levels: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """CRPS approximated from quantiles, 2 mean_q pinball_q, in units of the target; levels on the last axis."""
    target, keep = _prepare(target, mask)
    return masked_mean(2 * _mean_pinball(target, quantiles, levels), keep, axis=axis)


def crps_samples(target: Any, samples: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """CRPS of an ensemble, mean |s - y| - 0.5 mean |s - s'|, in units of the target; members on the last axis."""
    target, keep = _prepare(target, mask)
    ordered = np.sort(np.asarray(samples, np.float64), axis=-1)
    n = ordered.shape[-1]
    # sum over all pairs |s - s'| = 2 sum_k (2k - n + 1) s_(k) for the sorted members k = 0 .. n-1
    spread = (ordered * (2 * np.arange(n) - n + 1)).sum(axis=-1) / n**2
    return masked_mean(np.abs(ordered - target[..., None]).mean(axis=-1) - spread, keep, axis=axis)


def crps_normal(target: Any, mean: Any, std: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """CRPS of a normal distribution, std [z (2 Phi(z) - 1) + 2 phi(z) - 1 / sqrt(pi)] with z = (y - mean) / std."""
    target, keep = _prepare(target, mask)
    std = np.asarray(std, np.float64)
    z = (target - np.asarray(mean, np.float64)) / std
    erf = torch.erf(torch.from_numpy(np.ascontiguousarray(z / math.sqrt(2)))).numpy()  # 2 Phi(z) - 1
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    return masked_mean(std * (z * erf + 2 * density - 1 / math.sqrt(math.pi)), keep, axis=axis)


def coverage(target: Any, lower: Any, upper: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Share of targets inside [lower, upper], in [0, 1]."""
    target, keep = _prepare(target, mask)
    inside = (target >= np.asarray(lower)) & (target <= np.asarray(upper))
    return masked_mean(inside, keep, axis=axis)


def interval_width(lower: Any, upper: Any, mask: Any | None = None, *, axis: Axis = None) -> Any:
    """Mean of upper - lower, in units of the target."""
    return masked_mean(np.asarray(upper, np.float64) - np.asarray(lower, np.float64), mask, axis=axis)


def msis(
    target: Any, lower: Any, upper: Any, alpha: float, scale: Any, mask: Any | None = None, *, axis: Axis = None
) -> Any:
    """Mean scaled interval score of the central 1 - alpha interval.

    Width plus 2 / alpha times the distance by which the target falls outside, over `scale = seasonal_scale(train, m)`.
    """
    target, keep = _prepare(target, mask)
    lower, upper = np.asarray(lower, np.float64), np.asarray(upper, np.float64)
    outside = np.maximum(lower - target, 0) + np.maximum(target - upper, 0)
    return masked_mean((upper - lower + 2 / alpha * outside) / _positive(scale, "msis"), keep, axis=axis)


class ErrorSums:
    """Sums of squared and absolute errors and their count, exact over any batching.

    `values` is one float64 tensor (squared, absolute, count), so that processes can add theirs in one reduction.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.values = torch.zeros(3, dtype=torch.float64, device=device)

    def update(self, target: Tensor, forecast: Tensor, mask: Tensor) -> None:
        """Add one batch; all three of one shape, `mask` bool (True = observed)."""
        error = torch.where(mask, target - forecast, 0.0).detach().double()
        sums = torch.stack([error.square().sum(), error.abs().sum(), mask.sum().double()])
        self.values = self.values.to(sums.device) + sums

    def compute(self) -> dict[str, float]:
        """`mse` and `mae` over everything added so far, NaN when nothing was observed."""
        squared, absolute, count = self.values.tolist()
        return {"mse": squared / count, "mae": absolute / count} if count else {"mse": math.nan, "mae": math.nan}
