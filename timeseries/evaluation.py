"""Errors of a forecast Dataset by series, cutoff, horizon and variate."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from . import metrics as m
from .distributions import DISTRIBUTIONS, Distribution
from .scaling import Scaler

__all__ = ["METRICS", "compute_errors"]

DIMS = ("series", "cutoff", "horizon", "variate")


class _Arrays:
    """The arrays of a forecast in original and in scaled units, (series, cutoff, horizon, variate) each."""

    def __init__(self, ds: xr.Dataset) -> None:
        self.ds = ds
        self.target = ds["target"].transpose(*DIMS).to_numpy().astype(np.float64)
        self.mean = ds["mean"].transpose(*DIMS).to_numpy().astype(np.float64)
        self.mask = np.isfinite(self.target)
        if "observed" in ds:
            self.mask &= ds["observed"].transpose(*DIMS).to_numpy()
        self.scaler = _select(json.loads(ds.attrs["scaler"]), ds) if "scaler" in ds.attrs else None

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """In the units of the model's scaler, where the forecast has one."""
        if self.scaler is None:
            return values
        rows = self.scaler.rows(self.ds)
        return self.scaler.transform(values, rows, axis=3)

    @property
    def levels(self) -> list[float]:
        if "quantiles" not in self.ds:
            raise ValueError("this metric needs quantiles, the forecast has none; make it with intervals or quantiles")
        return [float(q) for q in self.ds["quantile"].to_numpy()]

    @property
    def quantiles(self) -> np.ndarray:
        self.levels  # noqa: B018  refuses a forecast without quantiles
        return self.ds["quantiles"].transpose(*DIMS, "quantile").to_numpy().astype(np.float64)

    def interval(self, coverage: float | None) -> tuple[np.ndarray, np.ndarray, float]:
        """Ends of the central interval of this nominal coverage, of the widest one if None, and its alpha."""
        levels = self.levels
        if len(levels) < 2:
            raise ValueError("an interval needs two quantile levels, the forecast has one")
        if coverage is None:
            return self.quantiles[..., 0], self.quantiles[..., -1], 1 - (levels[-1] - levels[0])
        ends = [round((1 + sign * coverage) / 2, 6) for sign in (-1, 1)]
        rounded = [round(q, 6) for q in levels]
        if not set(ends) <= set(rounded):
            there = [f"{1 - 2 * q:g}" for q in rounded if q < 0.5 and round(1 - q, 6) in rounded]
            raise ValueError(f"the forecast has no interval of coverage {coverage:g}, only of {', '.join(there)}")
        low, high = (rounded.index(end) for end in ends)
        return self.quantiles[..., low], self.quantiles[..., high], 1 - coverage

    def distribution(self) -> tuple[Distribution, np.ndarray] | None:
        """Family and parameters (series, cutoff, horizon, variate, p) in data units, of a forecast that has them."""
        family = DISTRIBUTIONS.get(str(self.ds.attrs.get("distribution")))
        if family is None or any(name not in self.ds for name in family.parameters):
            return None
        parts = [self.ds[name].transpose(*DIMS).to_numpy().astype(np.float64) for name in family.parameters]
        return family, np.stack(parts, axis=-1)

    def seasonal(self, name: str) -> np.ndarray:
        """Seasonal error of the training part, (series, 1, 1, variate)."""
        if name not in self.ds.coords:
            raise ValueError(
                f"mase, rmsse and msis need the coordinate {name!r} (series, variate), the error of the "
                "seasonal naive on the training part; forecasts of this package carry it"
            )
        return self.ds[name].transpose("series", "variate").to_numpy()[:, None, None, :]


def _select(saved: dict[str, Any], ds: xr.Dataset) -> Scaler:
    """The scaler of the variates that are left in `ds`, in their order."""
    names = [str(name) for name in ds["variate"].to_numpy()]
    if set(names) <= set(saved["variates"]):  # otherwise the scaler says what is wrong
        columns = [saved["variates"].index(name) for name in names]
        picked = {key: [[row[k] for k in columns] for row in saved[key]] for key in ("center", "scale")}
        saved = {**saved, **picked, "variates": names}
    return Scaler.from_dict(saved)


Metric = Callable[..., Any]


def _pair(function: Callable[..., Any], scale: bool) -> Metric:
    def compute(a: _Arrays, axis: Any) -> Any:
        change = a.scaled if scale else (lambda values: values)
        return function(change(a.target), change(a.mean), a.mask, axis=axis)

    return compute


def _crps(scale: bool) -> Metric:
    """The score of the distribution if the forecast has one, of its samples, or of its quantiles."""

    def compute(a: _Arrays, axis: Any) -> Any:
        found, target = a.distribution(), np.where(a.mask, a.target, a.mean)
        if found is not None:
            values = found[0].crps(found[1], target)
            unit = a.scaled(np.ones_like(a.mean)) - a.scaled(np.zeros_like(a.mean)) if scale else 1.0
            return m.masked_mean(values * unit, a.mask, axis=axis)
        change = a.scaled if scale else (lambda values: values)
        if "samples" in a.ds:
            samples = a.ds["samples"].transpose(*DIMS, "sample").to_numpy().astype(np.float64)
            return m.crps_samples(change(a.target), change(samples), a.mask, axis=axis)
        return m.crps_quantiles(change(a.target), change(a.quantiles), a.levels, a.mask, axis=axis)

    return compute


def _nll(a: _Arrays, axis: Any) -> Any:
    found = a.distribution()
    if found is None:
        raise ValueError("nll needs the parameters of a distribution; train with distribution='normal' or another one")
    family, y = found
    target = torch.from_numpy(np.where(a.mask, a.target, a.mean.round()))
    return m.masked_mean(-family.log_prob(torch.from_numpy(y), target).numpy(), a.mask, axis=axis)


def _coverage(a: _Arrays, axis: Any, level: float | None = None) -> Any:
    return m.coverage(a.target, *a.interval(level)[:2], a.mask, axis=axis)


def _width(a: _Arrays, axis: Any, level: float | None = None) -> Any:
    return m.interval_width(*a.interval(level)[:2], a.mask, axis=axis)


def _msis(a: _Arrays, axis: Any, level: float | None = None) -> Any:
    return m.msis(a.target, *a.interval(level), a.seasonal("seasonal_mae"), a.mask, axis=axis)


# Errors of one scale for all variates are in the scaler's units, with `_units` in those of the data; the others, which
# are relative, are always taken in the units of the data.
METRICS: dict[str, Metric] = {
    "mse": _pair(m.mse, True),
    "rmse": _pair(m.rmse, True),
    "mae": _pair(m.mae, True),
    "mse_units": _pair(m.mse, False),
    "rmse_units": _pair(m.rmse, False),
    "mae_units": _pair(m.mae, False),
    "mape": _pair(m.mape, False),
    "smape": _pair(m.smape, False),
    "nd": _pair(m.nd, False),
    "mase": lambda a, axis: m.mase(a.target, a.mean, a.seasonal("seasonal_mae"), a.mask, axis=axis),
    "rmsse": lambda a, axis: m.rmsse(a.target, a.mean, a.seasonal("seasonal_mse"), a.mask, axis=axis),
    "wql": lambda a, axis: m.wql(a.target, a.quantiles, a.levels, a.mask, axis=axis),
    "crps": _crps(True),
    "crps_units": _crps(False),
    "nll": _nll,
    "coverage": _coverage,
    "interval_width": _width,
    "msis": _msis,
}
INTERVALS = ("coverage", "interval_width", "msis")  # of one interval, which "@0.9" behind the name chooses


def compute_errors(
    forecast: xr.Dataset,
    metrics: str | Sequence[str] = ("mse", "mae"),
    by: str | Sequence[str] = ("variate", "horizon"),
) -> xr.Dataset:
    """As `omnissm.timeseries.evaluate`, which documents it."""
    metrics, by = ((given,) if isinstance(given, str) else given for given in (metrics, by))
    if not isinstance(forecast, xr.Dataset) or "mean" not in forecast:
        raise ValueError("expected a forecast Dataset with a variable 'mean', as predict and backtest return it")
    if "target" not in forecast:
        raise ValueError("the forecast has no variable 'target' to compare with; use backtest, or add what came")
    named = {name: _at_level(name) for name in metrics}
    for name, known in [*((name, METRICS) for name, _ in named.values()), *((name, DIMS) for name in by)]:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"
            raise ValueError(f"unknown {'dimension' if known is DIMS else 'metric'} {name!r}; {hint}")
    keep = [dim for dim in DIMS if dim in by]
    axis = tuple(k for k, dim in enumerate(DIMS) if dim not in keep)
    arrays = _Arrays(forecast)
    variables: dict[str, Any] = {
        label: (keep, np.asarray(METRICS[name](arrays, axis, *level), np.float64))
        for label, (name, level) in named.items()
    }
    coords: dict[str, Any] = {dim: forecast[dim].to_numpy() for dim in keep}
    if "variate" in keep and "units" in forecast.coords:
        coords["units"] = ("variate", forecast["units"].to_numpy())
    return xr.Dataset(variables, coords, {"model": str(forecast.attrs.get("model", "forecast"))})


def _at_level(name: str) -> tuple[str, tuple[float, ...]]:
    """Metric and level of "coverage@0.9"; no level where none is named."""
    metric, at, level = name.partition("@")
    if not at:
        return name, ()
    try:
        coverage = float(level)
    except ValueError:
        coverage = float("nan")
    if metric not in INTERVALS or not 0 < coverage < 1:
        raise ValueError(f"expected {', '.join(INTERVALS)} before @ and a coverage in (0, 1) behind it, got {name!r}")
    return metric, (coverage,)
