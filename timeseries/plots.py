"""Pictures of series, forecasts and their errors. Needs matplotlib (`pip install "omnissm[plot]"`).

Every function draws on `ax` where one is given and returns the Axes (an array of them where it draws a panel per
variate). Forecasts are the Datasets of `Forecaster.predict` and `Forecaster.backtest`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from . import metrics
from .plot_style import BLUE, GRID, INK, MUTED, PALETTE, choose, each_variate, fan, label_of, new_axes, style, time_axis
from .plot_style import save as save
from .schema import observed_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from torch import nn

__all__ = [
    "plot_backtest",
    "plot_calibration",
    "plot_dt_ranges",
    "plot_error_by_horizon",
    "plot_error_map",
    "plot_forecast",
    "plot_missing",
    "plot_residuals",
    "save",
]


def plot_forecast(
    forecast: xr.Dataset,
    history: xr.Dataset | None = None,
    *,
    series: str | None = None,
    variate: str | None = None,
    cutoff: int = -1,
    steps: int | None = None,
    ax: Axes | None = None,
) -> Any:
    """History and forecast with its fan of intervals, one panel per variate.

    Args:
        forecast: Forecast Dataset; known targets are drawn too.
        history: Series before the cutoff, in the schema; None draws the forecast alone.
        series: Which series; default the first.
        variate: Which variate; default all of them, a panel each.
        cutoff: Position on the cutoff axis; default the last.
        steps: Length of the history drawn; default three horizons.
        ax: Draw one variate here.

    Returns:
        The Axes, or an array of them.
    """
    name = choose(forecast, "series", series)
    one = forecast.sel(series=name).isel(cutoff=cutoff)
    when: Any = one["cutoff"].values
    steps = steps or 3 * forecast.sizes["horizon"]
    past = None
    if history is not None:
        past = observed_target(history)
        past = past.sel(series=choose(history, "series", name)) if "series" in past.dims else past
        past = past.sel(time=slice(None, when)).isel(time=slice(-steps, None))
    times = one["valid_time"].values

    def draw(panel: Axes, label: str) -> None:
        mean = one["mean"].sel(variate=label).values
        if "quantiles" in one:
            fan(panel, times, one["quantiles"].sel(variate=label), BLUE)
        if past is not None:
            values = past.sel(variate=label).values if "variate" in past.dims else past.values
            panel.plot(past["time"].values, values, color=INK, linewidth=1.3, label="observed")
        if "target" in one and np.isfinite(one["target"].sel(variate=label)).any():
            first = "_" if past is not None else ""
            panel.plot(
                times, one["target"].sel(variate=label).values, color=INK, linewidth=1.3, label=f"{first}observed"
            )
        panel.plot(times, mean, color=BLUE, linewidth=1.8, label="forecast")
        panel.axvline(when, color=MUTED, linewidth=0.9, linestyle=(0, (2, 2)))
        time_axis(panel, times)

    where = name if forecast.sizes["series"] > 1 or name not in ("", "0") else ""
    title = f"{where + ', ' if where else ''}{forecast.sizes['horizon']} steps from {_when(when)}"
    return each_variate(forecast, variate, ax, title, draw)


def _when(time: Any) -> str:
    """Time to the minute, without a midnight."""
    text = (
        str(np.datetime_as_string(time, unit="m"))
        if np.issubdtype(np.asarray(time).dtype, np.datetime64)
        else str(time)
    )
    return text.replace("T00:00", "").replace("T", " ")


def plot_backtest(
    forecast: xr.Dataset,
    *,
    series: str | None = None,
    variate: str | None = None,
    every: int | None = None,
    last: int | None = 14,
    ax: Axes | None = None,
) -> Any:
    """Forecasts of successive cutoffs over what then came, one panel per variate.

    Args:
        forecast: Backtest Dataset with `target`.
        series: Which series; default the first.
        variate: Which variate; default all, a panel each.
        every: Draw every so many cutoffs; default those that do not overlap.
        last: Draw at most this many newest cutoffs; None draws all.
        ax: Draw one variate here.

    Returns:
        The Axes, or an array of them.
    """
    name = choose(forecast, "series", series)
    one = forecast.sel(series=name)
    every = every or _spacing(one)
    one = one.isel(cutoff=slice(None, None, -1)).isel(cutoff=slice(None, None, every)).isel(cutoff=slice(last))
    one = one.isel(cutoff=slice(None, None, -1))

    # what came, once for each time and in order, also where forecasts overlap or leave gaps
    stamps, first = np.unique(one["valid_time"].values.ravel(), return_index=True)

    def draw(panel: Axes, label: str) -> None:
        chosen = one.sel(variate=label)
        panel.plot(stamps, chosen["target"].values.ravel()[first], color=INK, linewidth=1.1, label="observed")
        for k in range(one.sizes["cutoff"]):
            piece = chosen.isel(cutoff=k)
            times = piece["valid_time"].values
            hide = "_" if k else ""
            if "quantiles" in piece:
                low, high = piece["quantile"].values[[0, -1]]
                lower, upper = piece["quantiles"].values[:, 0], piece["quantiles"].values[:, -1]
                text = f"{hide}{high - low:.0%} interval"
                panel.fill_between(times, lower, upper, color=BLUE, alpha=0.16, linewidth=0, label=text)
            panel.plot(times, piece["mean"].values, color=BLUE, linewidth=1.4, label=f"{hide}forecast")
            begin: Any = piece["cutoff"].values
            panel.axvline(begin, color=GRID, linewidth=0.9, zorder=0)
        panel.grid(visible=False, axis="x")
        time_axis(panel, one["valid_time"].values)

    return each_variate(forecast, variate, ax, f"{name}, backtest" if name not in ("", "0") else "backtest", draw)


def _spacing(one: xr.Dataset) -> int:
    """Cutoffs from one to the next that does not overlap with it."""
    if one.sizes["cutoff"] < 2:
        return 1
    cutoffs = one["cutoff"].values.astype(np.int64)
    length = (one["valid_time"].values.astype(np.int64)[0] - cutoffs[0])[-1]
    return max(1, math.ceil(length / max(1, int(np.median(np.diff(cutoffs))))))


def _named(forecasts: xr.Dataset | Mapping[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Forecasts by name; a single one under its model's name."""
    if isinstance(forecasts, xr.Dataset):
        return {str(forecasts.attrs.get("model", "forecast")): forecasts}
    return dict(forecasts)


def _errors(forecast: xr.Dataset, metric: str, by: tuple[str, ...]) -> xr.DataArray:
    from .forecast import evaluate

    return evaluate(forecast, metrics=(metric,), by=by)[metric]


def plot_error_by_horizon(
    forecasts: xr.Dataset | Mapping[str, xr.Dataset], *, metric: str = "mae", ax: Axes | None = None
) -> Axes:
    """Error against the step of the horizon, one line per model; the first model stands out.

    Args:
        forecasts: A forecast with targets, or several by name.
        metric: Name of an `evaluate` metric.
        ax: Draw here.
    """
    with style() as plt:
        ax = new_axes(plt, ax)
        named = _named(forecasts)
        for k, (name, forecast) in enumerate(named.items()):
            errors = _errors(forecast, metric, ("horizon",))
            color = PALETTE[k % len(PALETTE)]
            ax.plot(errors["horizon"], errors, color=color, linewidth=2.2 if k == 0 else 1.4, label=name)
        ax.set_xlabel("steps ahead")
        ax.set_ylabel(_metric_label(metric))
        ax.set_ylim(bottom=0)
        longest = max(f.sizes["horizon"] for f in named.values())
        ax.set_xlim(1, max(2, longest))
        _horizon_ticks(ax, longest)
        ax.set_title("Error by horizon")
        if len(named) > 1:
            ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
        return ax


def _horizon_ticks(ax: Axes, horizon: int) -> None:
    """Quarters of the horizon where they are whole, else round numbers."""
    from matplotlib.ticker import MaxNLocator

    if horizon % 4 == 0:
        ax.set_xticks([1, *range(horizon // 4, horizon + 1, horizon // 4)] if horizon > 4 else range(1, horizon + 1))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def _metric_label(metric: str) -> str:
    base, units = (metric.removesuffix("_units"), ", original units") if metric.endswith("_units") else (metric, "")
    names = {"mse": "mean squared error", "mae": "mean absolute error", "rmse": "root mean squared error"}
    scaled = ", scaled" if base in names and not units else ""
    return f"{names.get(base, base.upper())}{scaled or units}"


def plot_error_map(forecast: xr.Dataset, *, metric: str = "mae", ax: Axes | None = None) -> Axes:
    """Heat map of the error, variate against horizon.

    Args:
        forecast: Forecast Dataset with `target`.
        metric: Name of an `evaluate` metric.
        ax: Draw here.
    """
    with style() as plt:
        errors = _errors(forecast, metric, ("variate", "horizon")).transpose("variate", "horizon")
        rows, columns = errors.shape
        ax = new_axes(plt, ax, (7.2, 1.3 + 0.36 * rows))
        image = ax.imshow(errors, aspect="auto", cmap="YlGnBu", vmin=0, extent=(0.5, columns + 0.5, rows - 0.5, -0.5))
        ax.set_yticks(range(rows), [str(v) for v in errors["variate"].values])
        _horizon_ticks(ax, columns)
        ax.set_xlabel("steps ahead")
        ax.grid(visible=False)
        ax.tick_params(length=0)
        for side in ax.spines.values():
            side.set_visible(False)
        for row in range(1, rows):
            ax.axhline(row - 0.5, color="white", linewidth=1.5)
        bar = plt.colorbar(image, ax=ax, pad=0.015, aspect=14)
        bar.outline.set_visible(False)
        bar.set_label(_metric_label(metric))
        ax.set_title("Error by variate and horizon")
        return ax


def plot_calibration(forecasts: xr.Dataset | Mapping[str, xr.Dataset], *, ax: Axes | None = None) -> Axes:
    """Observed against nominal share of targets below each forecast quantile; the diagonal is perfect.

    Args:
        forecasts: A forecast with `quantiles` and `target`, or several by name.
        ax: Draw here.

    Raises:
        ValueError: if a forecast has no quantiles.
    """
    with style() as plt:
        ax = new_axes(plt, ax, (4.4, 4.2))
        ax.plot([0, 1], [0, 1], color=MUTED, linewidth=1.0, linestyle=(0, (4, 3)))
        named = _named(forecasts)
        for k, (name, forecast) in enumerate(named.items()):
            if "quantiles" not in forecast:
                raise ValueError(f"the forecast {name!r} has no quantiles; make it with intervals or quantiles")
            levels = forecast["quantile"].values
            below = [
                metrics.masked_mean(forecast["target"] <= forecast["quantiles"].sel(quantile=q), _observed(forecast))
                for q in levels
            ]
            ax.plot(levels, below, "o-", color=PALETTE[k % len(PALETTE)], markersize=5, linewidth=1.6, label=name)
        ax.set(xlim=(0, 1), ylim=(0, 1), xlabel="nominal level", ylabel="observed share below", aspect="equal")
        ax.set_title("Calibration of the quantiles")
        if len(named) > 1:
            ax.legend(fontsize=9, loc="upper left")
        return ax


def _observed(forecast: xr.Dataset) -> Any:
    """Mask of known targets."""
    finite = np.isfinite(forecast["target"].values)
    return finite & forecast["observed"].values if "observed" in forecast else finite


def plot_residuals(
    forecast: xr.Dataset, *, variate: str | None = None, series: str | None = None, lags: int = 48, ax: Any = None
) -> Any:
    """Histogram of the one-step residuals, and their autocorrelation over successive cutoffs.

    Args:
        forecast: Backtest Dataset with `target`; neighbouring cutoffs should be one step apart.
        variate: Which variate; default the first.
        series: Which series; default the first.
        lags: Number of lags.
        ax: A pair of Axes to draw on.

    Returns:
        Array of two Axes.
    """
    name, label = choose(forecast, "series", series), choose(forecast, "variate", variate)
    one = forecast.sel(series=name, variate=label).isel(horizon=0)
    residual = np.asarray(one["target"] - one["mean"], np.float64)
    residual[~_observed(forecast.sel(series=[name], variate=[label]).isel(horizon=[0])).reshape(-1)] = np.nan
    lags = min(lags, len(residual) // 2)
    correlation = [_autocorrelation(residual, lag) for lag in range(1, lags + 1)]
    with style() as plt:
        left, right = plt.subplots(1, 2, figsize=(8.4, 3.0), layout="constrained")[1] if ax is None else ax
        known = residual[np.isfinite(residual)]
        bins = min(40, 2 + int(2 * len(known) ** 0.5))
        left.hist(known, bins=bins, color=BLUE, alpha=0.75, edgecolor="white", linewidth=0.4)
        left.axvline(np.nanmean(residual), color=INK, linewidth=1.2)
        left.set(xlabel=f"target - forecast, {label_of(forecast, label)}", ylabel="count")
        left.grid(visible=False, axis="x")
        left.set_title("One-step residuals")
        bound = 1.96 / math.sqrt(max(1, int(np.isfinite(residual).sum())))
        right.axhspan(-bound, bound, color=MUTED, alpha=0.18, linewidth=0)
        right.vlines(range(1, lags + 1), 0, correlation, color=BLUE, linewidth=2)
        right.axhline(0, color=INK, linewidth=0.8)
        right.set(xlabel="lag (cutoffs)", ylabel="autocorrelation", xlim=(0, lags + 1))
        right.set_title("Autocorrelation; grey: 95 % of white noise")
        return np.array([left, right])


def _autocorrelation(x: Any, lag: int) -> float:
    """Correlation of x with itself `lag` steps later, over pairs where both are known; NaN if there is none."""
    x = x - np.nanmean(x)
    product = x[lag:] * x[:-lag]
    variance = np.nanmean(x**2)
    return float(np.nanmean(product) / variance) if np.isfinite(product).any() and variance > 0 else math.nan


def plot_missing(ds: xr.Dataset, *, series: str | None = None, bins: int = 400, ax: Axes | None = None) -> Axes:
    """Share of missing values over time, one row per variate (white: complete).

    Args:
        ds: Dataset in the schema.
        series: Which series; default the first.
        bins: Time is cut into at most this many columns.
        ax: Draw here.
    """
    target = observed_target(ds)
    if "series" in target.dims:
        target = target.sel(series=choose(ds, "series", series))
    if "variate" not in target.dims:
        target = target.expand_dims("variate", axis=-1)
    missing = ~np.isfinite(target.transpose("variate", "time").values)
    edges = np.linspace(0, missing.shape[1], min(bins, missing.shape[1]) + 1).astype(int)
    share = np.stack([missing[:, a:b].mean(axis=1) for a, b in pairwise(edges)], axis=1)
    times = ds["time"].values
    with style() as plt:
        from matplotlib.colors import LinearSegmentedColormap
        from matplotlib.dates import date2num

        rows = len(missing)
        shades = LinearSegmentedColormap.from_list("missing", ["white", PALETTE[1], "#8c3b12"])
        ax = new_axes(plt, ax, (7.6, 1.3 + 0.34 * rows))
        dated = np.issubdtype(times.dtype, np.datetime64)
        first, last = date2num(times[[0, -1]]) if dated else times[[0, -1]]
        extent = (float(first), float(last), rows - 0.5, -0.5)
        ax.imshow(share, aspect="auto", cmap=shades, vmin=0, vmax=1, extent=extent, interpolation="nearest")
        names = [str(v) for v in ds["variate"].values] if "variate" in ds.coords else [""]
        ax.set_yticks(range(rows), [f"{n}  {100 * m:.1f} %" for n, m in zip(names, missing.mean(axis=1))])
        if dated:
            ax.xaxis_date()
        time_axis(ax, times)
        ax.grid(visible=False)
        ax.tick_params(axis="y", length=0)
        for row in range(1, rows):
            ax.axhline(row - 0.5, color=GRID, linewidth=1)
        ax.set_title("Missing values (share per variate)")
        return ax


def plot_dt_ranges(model: nn.Module | None, *, ax: Axes | None = None) -> Axes:
    """Learned time steps of the heads of a 2-D state-space model: small steps remember long.

    Args:
        model: Has `dt_ranges() -> dict head -> steps`, e.g. the `chimera_*` models.
        ax: Draw here.

    Raises:
        ValueError: if the model has no such method.
    """
    ranges = getattr(model, "dt_ranges", None)
    if not callable(ranges):
        raise ValueError(f"{type(model).__name__} has no learned time steps; plot them for a chimera model")
    heads: dict[str, Any] = {k: np.sort(np.ravel(np.asarray(v.detach()))) for k, v in ranges().items()}
    with style() as plt:
        ax = new_axes(plt, ax, (6.4, 0.9 + 0.75 * len(heads)))
        rng = np.random.default_rng(0)
        for k, steps in enumerate(heads.values()):
            color = PALETTE[k % len(PALETTE)]
            spread = k + rng.uniform(-0.16, 0.16, len(steps))
            ax.scatter(steps, spread, s=22, color=color, alpha=0.6, linewidth=0)
            ax.plot([np.median(steps)] * 2, [k - 0.3, k + 0.3], color=color, linewidth=2.4)
            ax.annotate(f"{np.median(steps):.3g}", (np.median(steps), k - 0.34), ha="center", fontsize=9, color=INK)
        ax.set_xscale("log")
        ax.set_yticks(range(len(heads)), list(heads))
        ax.set_ylim(len(heads) - 0.5, -0.6)
        ax.set_xlabel("time step (patches), median marked; small steps keep a long memory")
        ax.grid(visible=False, axis="y")
        ax.set_title("Learned time scales")
        return ax
