"""From a trained network and series to a forecast Dataset: windows at the wanted cutoffs, one batched run, units back.

Dimensions series, cutoff, horizon, variate[, quantile]; `cutoff` is the last time that was seen and horizon 1 is one
step later.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import xarray as xr
from torch import Tensor, nn

from .conformal import interval_levels
from .distributions import Distribution
from .freq import infer_freq, normalize_freq, same_freq
from .models.layers import middle_quantile
from .scaling import Scaler
from .schema import canonical, check_future, extend, validate
from .splits import Cut, cut_step
from .time_features import add_time_features
from .windows import WindowBatch, Windows

Array = npt.NDArray[Any]

__all__ = [
    "create_windows",
    "forecast_dataset",
    "prepare",
    "progress_bar",
    "roll_out",
    "run_windows",
    "target_end",
    "yardstick",
]


@contextmanager
def progress_bar(total: int, label: str, enabled: bool = True) -> Iterator[Callable[..., None]]:
    """A bar on stderr, drawn only where stderr is a terminal; yields `advance(steps, text)`."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not (enabled and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total)

        def advance(steps: int = 1, text: str | None = None) -> None:
            bar.update(task, advance=steps, description=text)

        yield advance


def roll_out(net: nn.Module, batch: WindowBatch, trained: int, horizon: int, middle: int | None = None) -> Tensor:
    """Forecast further than the model was trained for by feeding its own forecasts back as if observed.

    A model with a closed loop goes on by itself.

    Args:
        net: Maps a WindowBatch to (b, i, trained) or (b, i, trained, q).
        batch: Its future covariates, if any, must reach to the end of the last block of `trained` steps.
        trained: Horizon of the model.
        horizon: Horizon wanted.
        middle: Position of the quantile that is fed back.

    Returns:
        (b, i, horizon[, q]).

    Raises:
        ValueError: if the model reads covariates of the past, which nobody knows inside the horizon.
    """
    if horizon > trained and closes_loop(net):
        return net.forward_ahead(batch, horizon)  # type: ignore[operator]
    if horizon > trained and batch.past is not None:
        raise ValueError(
            f"the model forecasts {trained} steps and reads past-only covariates, so it cannot be rolled on to "
            f"{horizon}; ask for a horizon of at most {trained}"
        )
    lookback = batch.x.shape[-1]
    pieces: list[Tensor] = []
    for begin in range(0, horizon, trained):
        future = None if batch.future is None else batch.future[..., begin : begin + lookback + trained]
        y = net(batch._replace(future=future))
        pieces.append(y)
        point = y if middle is None else y[..., middle]
        gap = batch.time_gap
        batch = batch._replace(
            x=torch.cat([batch.x, point], dim=-1)[..., -lookback:],
            x_mask=torch.cat([batch.x_mask, torch.ones_like(point, dtype=torch.bool)], dim=-1)[..., -lookback:],
            time_gap=None
            if gap is None
            else torch.cat([gap, gap.new_ones(gap.shape[0], trained)], -1)[..., -lookback:],
        )
    return torch.cat(pieces, dim=2)[:, :, :horizon]


def closes_loop(net: nn.Module) -> bool:
    """Whether a model forecasts any horizon by itself."""
    return bool(getattr(net, "closed_loop", False))


@torch.no_grad()
def run_windows(
    net: nn.Module,
    windows: Windows,
    trained: int,
    horizon: int,
    middle: int | None = None,
    *,
    batch_size: int = 256,
    advance: Callable[..., None] | None = None,
) -> Array:
    """Forecasts of all windows in scaled units, (windows, i, horizon[, q]) float32."""
    device = next((t.device for t in net.state_dict().values()), torch.device("cpu"))
    was_training = net.training
    net.eval()
    pieces = []
    for batch in windows.batches(batch_size):
        pieces.append(roll_out(net, batch.to(device), trained, horizon, middle).float().cpu().numpy())
        if advance:
            advance(len(batch.x))
    net.train(was_training)
    return np.concatenate(pieces)


def prepare(data: xr.Dataset, state: dict[str, Any]) -> xr.Dataset:
    """Check new data against what the model was trained on, and bring its variates into the model's order.

    Args:
        data: Dataset in the schema.
        state: `ForecastingData.state()` of the training data.

    Raises:
        ValueError: naming the first variate that is missing, another frequency, or too short a series.
    """
    validate(data)
    ds = canonical(data)
    names, wanted = [str(v) for v in ds["variate"].values], list(state["variates"])
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(
            f"the model was trained on the variate {missing[0]!r}, which the data lacks; it has {', '.join(names[:8])}"
        )
    if names != wanted:
        ds = canonical(ds.sel(variate=wanted))
    freq, found = state["freq"], ds.attrs.get("freq")
    if freq is not None:
        found = infer_freq(ds["time"].to_numpy()) if found is None else found
        if found is None or not same_freq(found, freq):
            got = "irregular times" if found is None else repr(found)
            raise ValueError(
                f"the model was trained on data of freq {freq!r}, got {got}; "
                f"bring the series to it with regularize(ds, {freq!r}) or by resampling"
            )
        ds.attrs["freq"] = normalize_freq(freq)
    if target_end(ds) < state["lookback"]:
        raise ValueError(
            f"the model looks back {state['lookback']} steps, the series has {target_end(ds)}; supply a longer series"
        )
    return ds


def target_end(ds: xr.Dataset) -> int:
    """Number of steps up to the last target; steps behind it are there for known-in-advance covariates only."""
    if "future" not in ds:
        return ds.sizes["time"]
    seen = ds["observed"].any(("series", "variate")).to_numpy()
    return len(seen) - int(seen[::-1].argmax())


def create_windows(
    ds: xr.Dataset, state: dict[str, Any], targets: range, width: int, stride: int = 1
) -> tuple[Windows, Scaler]:
    """Windows of prepared data in the units and with the features of the training data, and their scaler.

    Args:
        ds: Prepared data, see `prepare`.
        state: `ForecastingData.state()` of the training data.
        targets: Steps that are targets.
        width: Steps of the target part of a window.
        stride: Steps from window to window.
    """
    features, base_step = state["time_features"], state.get("base_step")
    scaler, covariate_scalers = _scalers(ds, state)
    ds = ds.assign_attrs(freq=state["freq"])  # features and gaps as in training, however regular these times are
    if features["calendar"] or features["fourier"]:
        ds = add_time_features(ds, **features, base_step=base_step)
    windows = Windows(
        ds,
        state["lookback"],
        width,
        targets=targets,
        stride=stride,
        fill=state["fill"],
        base_step=base_step,
        scaler=scaler,
        covariate_scalers=covariate_scalers,
    )
    return windows, scaler


def _scalers(ds: xr.Dataset, state: dict[str, Any]) -> tuple[Scaler, dict[str, Scaler]]:
    """The fitted scalers, their rows in the order of the series of `ds`."""
    rows = Scaler.from_dict(state["scaler"]).rows(ds)

    def reorder(saved: dict[str, Any]) -> Scaler:
        if saved["shared"]:
            return Scaler.from_dict(saved)
        pick = {key: [saved[key][row] for row in rows] for key in ("series", "center", "scale")}
        return Scaler.from_dict({**saved, **pick})

    saved = state["covariate_scalers"].items()
    return reorder(state["scaler"]), {name: reorder(each) for name, each in saved if name in ds}


def yardstick(ds: xr.Dataset, state: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """What errors are measured by: coordinates with the seasonal errors of the training part; the scaler as JSON."""
    series = [str(name) for name in ds["series"].to_numpy()]
    unknown = np.full(ds.sizes["variate"], np.nan)
    coords: dict[str, Any] = {}
    for name, table in (state.get("seasonal_errors") or {}).items():
        rows = dict(zip(state["series"], np.array(table, float)))
        coords[name] = (("series", "variate"), np.stack([rows.get(each, unknown) for each in series]))
    return coords, json.dumps(_scalers(ds, state)[0].to_dict())


def forecast_dataset(
    net: nn.Module,
    ds: xr.Dataset,
    state: dict[str, Any],
    origins: range,
    horizon: int,
    *,
    future: xr.Dataset | xr.DataArray | None = None,
    quantiles: Sequence[float] = (),
    intervals: dict[str, Any] | None = None,
    distribution: Distribution | None = None,
    samples: int = 0,
    seed: int = 0,
    attrs: dict[str, Any] | None = None,
    advance: Callable[..., None] | None = None,
) -> xr.Dataset:
    """Forecast from several cutoffs at once.

    Args:
        net: Trained network.
        ds: Prepared data, see `prepare`, with the covariates that the network reads.
        state: `ForecastingData.state()` of the training data.
        origins: Steps on the time axis of `ds` that are the last ones seen.
        horizon: Steps to forecast.
        future: Future-known covariates behind the end of `ds`.
        quantiles: Levels of a probabilistic network, or of the distribution; written up to its own horizon only, since
            behind it the network sees a median as if it were observed.
        intervals: {"coverages": [...], "radius": (coverage, i, h)} in scaled units, for a point network.
        distribution: Family whose parameters the network forecasts; written up to its own horizon only.
        samples: Number of draws from it.
        seed: Of these draws.
        attrs: Attributes of the result.
        advance: Called with the number of windows done.
    """
    trained = state["horizon"]
    if horizon < 1:
        raise ValueError(f"expected a horizon of at least 1 step, got {horizon}")
    width = -(-horizon // trained) * trained
    series, steps, end = ds.sizes["series"], ds.sizes["time"], target_end(ds)
    extra = max(0, origins[-1] + width + 1 - steps)  # whole blocks, though only `horizon` steps are asked for
    longer = ds if not extra and future is None else canonical(extend(ds, extra, future, check=False))
    if "future" in longer:
        check_future(longer, slice(end, origins[-1] + 1 + horizon))
    targets = range(origins[0] + 1, origins[-1] + width + 1)
    windows, scaler = create_windows(longer, state, targets, width, origins.step)
    middle = 0 if distribution else middle_quantile(quantiles) if quantiles else None
    values = run_windows(net, windows, trained, horizon, middle, advance=advance)  # (series * cutoff, i, horizon[, q])
    mean = values if middle is None else values[..., middle]
    levels: tuple[float, ...] = tuple(quantiles)
    spread = values if quantiles and horizon <= trained else None
    if spread is not None and distribution:
        spread = distribution.quantiles(values, levels).astype(np.float32)
    if intervals and not quantiles:
        levels, spread = interval_levels(intervals["coverages"]), _with_intervals(mean, intervals)
    rows = np.repeat(np.arange(series), len(origins))

    def laid_out(flat: Array) -> Array:
        return np.moveaxis(flat.reshape(series, len(origins), *flat.shape[1:]), 2, 3)  # series, cutoff, horizon, i[, q]

    def in_units(scaled: Array) -> Array:
        return laid_out(scaler.inverse(scaled, rows, axis=1))

    dims = ("series", "cutoff", "horizon", "variate")
    index = np.array(origins)[:, None] + np.arange(1, horizon + 1)  # (cutoff, horizon)
    times = longer["time"].to_numpy()
    known = longer["target"].to_numpy()[:, index]
    variables: dict[str, Any] = {"mean": (dims, in_units(mean))}
    if spread is not None:
        variables["quantiles"] = ((*dims, "quantile"), in_units(spread))
    if spread is not None and distribution:
        moved = _parameters(distribution, values, scaler, rows)
        variables |= {name: (dims, laid_out(part)) for name, part in moved.items()}
        if samples:
            drawn = distribution.sample(values, samples, np.random.default_rng(seed)).astype(np.float32)
            variables["samples"] = ((*dims, "sample"), in_units(drawn))
    if origins[-1] + horizon < end:  # a look back, whether or not all of it was observed
        variables["target"] = (dims, known)
        variables["observed"] = (dims, np.isfinite(known))
    coords: dict[str, Any] = {
        "series": _names(ds["series"]),
        "cutoff": times[np.array(origins)],
        "horizon": np.arange(1, horizon + 1),
        "variate": _names(ds["variate"]),
        "valid_time": (("cutoff", "horizon"), times[index]),
    }
    if spread is not None:
        coords["quantile"] = np.array(levels)
    if "samples" in variables:
        coords["sample"] = np.arange(samples)
    if "units" in ds.coords:
        coords["units"] = ("variate", _names(ds["units"]))
    seasonal, units = yardstick(ds, state)
    coords |= seasonal
    about = {
        "lookback": state["lookback"],
        "trained_horizon": trained,
        "rollout": "direct"
        if horizon <= trained
        else "closed loop"
        if closes_loop(net)
        else f"own forecasts fed back in blocks of {trained} steps",
        "intervals": "none" if spread is None else "quantiles of the model" if quantiles else "split conformal",
        "distribution": "none" if spread is None or distribution is None else distribution.name,
        "season": state["season"],
        "scaler": units,
    }
    if state["freq"] is not None:
        about["freq"] = state["freq"]
    return xr.Dataset(variables, coords, {**(attrs or {}), **about})


def _parameters(distribution: Distribution, values: Array, scaler: Scaler, rows: Array) -> dict[str, Array]:
    """Parameters beside the mean in data units, (n, i, horizon) float32; none where a logarithm bends the units."""
    if scaler.kind == "log1p":
        return {}
    one = np.ones((*values.shape[:2], 1))
    center = scaler.inverse(0 * one, rows, axis=1)
    moved = distribution.in_units(values, center, scaler.inverse(one, rows, axis=1) - center).astype(np.float32)
    return {name: moved[..., k] for k, name in enumerate(distribution.parameters) if k}


def _with_intervals(mean: Array, intervals: dict[str, Any]) -> Array:
    """Quantiles (n, i, horizon, q) around a point forecast, from the radii of its central intervals."""
    radius = np.asarray(intervals["radius"], np.float32)  # (coverage, i, trained), coverages as stored
    order = np.argsort(intervals["coverages"])
    inner = radius[order][:, :, : mean.shape[2]]
    offsets = np.concatenate([-inner[::-1], np.zeros_like(inner[:1]), inner])  # (q, i, horizon)
    return mean[..., None] + np.moveaxis(offsets, 0, -1)


def _names(labels: xr.DataArray) -> Array:
    """Labels as plain text, whatever kind of string they were."""
    return np.array([str(label) for label in labels.to_numpy()])


def backtest_origins(ds: xr.Dataset, lookback: int, horizon: int, start: Cut | None, stride: int) -> range:
    """Cutoffs of a backtest as steps of the time axis.

    Raises:
        ValueError: if there is none, or the arguments are out of range.
    """
    length = ds.sizes["time"]
    if stride < 1 or horizon < 1:
        raise ValueError(f"expected a stride and a horizon of at least 1 step, got {stride} and {horizon}")
    first = lookback if start is None else cut_step("start", start, ds["time"].to_numpy())
    origins = range(max(first, lookback) - 1, length - horizon, stride)
    if not origins:
        raise ValueError(
            f"no cutoff has {lookback} steps before and {horizon} behind it from start {start} on, in a series of "
            f"{length} steps; start earlier, or use a shorter horizon or a longer series"
        )
    return origins
