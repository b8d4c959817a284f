"""`omnissm timeseries VERB`: the verbs that need no trainer, as plain typed functions; also `python -m`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr


Ids = Literal["variates", "series"]


def forecast(
    checkpoint: Path,
    data: Path | None = None,
    out: str = "forecast.nc",
    horizon: int | None = None,
    intervals: bool | None = None,
    future: Path | None = None,
    time: str | None = None,
    ids: Ids | None = None,
    id_column: str = "unique_id",
    values: list[str] | None = None,
    freq: str | None = None,
) -> None:
    """Forecast what follows the end of a file's series.

    Args:
        checkpoint: Model folder, run folder or .ckpt file.
        data: Series to continue: .nc, .zarr, .csv or .parquet. Left out, the data that the run was trained on.
        out: Where the forecast goes: .nc, .zarr, .csv or .parquet, or - for CSV on standard output.
        horizon: Steps to forecast; default as trained. Longer ones feed the model's forecasts back.
        intervals: true demands conformal intervals, false leaves them out; by default as the model has them.
        future: File with the future-known covariates of the steps to forecast.
        time: Column with the times of a table.
        ids: A long table's ids are "variates" of one system or separate "series"; left out, the table is wide.
        id_column: Column with the ids of a long table.
        values: Columns with the values of a table.
        freq: Frequency of the times, as a pandas alias or an integer.

    Raises:
        ValueError: if the file or the model cannot be used; the line says why.

    Example:
      omnissm timeseries forecast --checkpoint runs/NAME --data weather.nc --out forecast.nc
    """
    from .forecast import load

    _check_out(out, (".nc", ".zarr", ".csv", ".parquet"))
    model = load(checkpoint)
    ds, _ = _read(checkpoint, data, time, ids, id_column, values, freq)
    known = _read_file(future, time, ids, id_column, values, freq) if future else None
    result = model.predict(ds, known, horizon, intervals=intervals)
    _write(result, out, ids)


def backtest(
    checkpoint: Path,
    data: Path | None = None,
    start: int | float | str | None = None,
    stride: int = 1,
    refit: int = 0,
    horizon: int | None = None,
    out: str = "backtest.nc",
    intervals: bool | None = None,
    time: str | None = None,
    ids: Ids | None = None,
    id_column: str = "unique_id",
    values: list[str] | None = None,
    freq: str | None = None,
) -> None:
    """Forecast from many past cutoffs of a file's series, and print the errors.

    Args:
        checkpoint: Model folder, run folder or .ckpt file.
        data: Series: .nc, .zarr, .csv or .parquet. Left out, the data that the run was trained on, from its test part.
        start: First step to forecast: a time, a step number, or a share of the series (with a point). Left out with a
            file, the first step that has a full lookback.
        stride: Steps from one cutoff to the next.
        refit: Train anew every so many cutoffs; 0 keeps the model.
        horizon: Steps to forecast; default as trained.
        out: Where the forecasts and what came go: .nc, .zarr, .csv or .parquet, or - for CSV on standard output.
        intervals: true demands conformal intervals, false leaves them out.
        time: Column with the times of a table.
        ids: A long table's ids are "variates" of one system or separate "series"; left out, the table is wide.
        id_column: Column with the ids of a long table.
        values: Columns with the values of a table.
        freq: Frequency of the times, as a pandas alias or an integer.

    Raises:
        ValueError: if the file or the model cannot be used; the line says why.

    Example:
      omnissm timeseries backtest --checkpoint runs/NAME --data weather.nc --start 2013-11-01 --stride 24 --out bt.nc
    """
    from .forecast import load

    _check_out(out, (".nc", ".zarr", ".csv", ".parquet"))
    model = load(checkpoint)
    ds, test = _read(checkpoint, data, time, ids, id_column, values, freq)
    result = model.backtest(
        ds, start if start is not None else test, stride, refit or False, horizon, intervals=intervals
    )
    _write(result, out, ids)
    if out != "-":
        _print_errors(result)


def evaluate(
    forecast: Path,
    metrics: list[str] = ["mse", "mae", "mae_units", "mase"],  # noqa: B006
    by: list[str] = ["variate"],  # noqa: B006
    out: str | None = None,
) -> None:
    """Errors of a forecast file that holds what came, as a table.

    Args:
        forecast: File of `backtest`: .nc or .zarr.
        metrics: Any of mse, rmse, mae, crps (in the scaler's units, with _units in those of the data), mape, smape, nd,
            mase, rmsse, wql, coverage, interval_width, msis.
        by: Keep any of series, cutoff, horizon, variate; [] gives one number.
        out: Write the table here too: .csv, .md or .nc; or - for CSV alone on standard output.

    Raises:
        ValueError: for unknown names, and if the file lacks what a metric needs.

    Example:
      omnissm timeseries evaluate --forecast backtest.nc --metrics [mae,mase,coverage] --by [variate]
    """
    from .evaluation import evaluate as compute
    from .files import write_series
    from .tables import print_table, write_table

    if out is not None:
        _check_out(out, (".csv", ".md", ".nc"))
    result = compute(_read_forecast(forecast), metrics, by)
    frame = _frame(result)
    if out == "-":
        frame.to_csv(sys.stdout, index=False)
        return
    if out is not None:
        write_series(result, out) if out.endswith(".nc") else write_table(frame, out)
    print_table(frame, str(forecast))


def describe(
    data: Path,
    out: str | None = None,
    time: str | None = None,
    ids: Ids | None = None,
    id_column: str = "unique_id",
    values: list[str] | None = None,
    freq: str | None = None,
) -> None:
    """Length, frequency, gaps, missing values and outliers of a file, with a lookback and season to begin with.

    Args:
        data: Series: .nc, .zarr, .csv or .parquet.
        out: Write the table of variates here too: .csv or .md; or - for CSV alone on standard output.
        time: Column with the times of a table.
        ids: A long table's ids are "variates" of one system or separate "series"; left out, the table is wide.
        id_column: Column with the ids of a long table.
        values: Columns with the values of a table.
        freq: Frequency of the times, as a pandas alias or an integer.

    Raises:
        ValueError: if the file violates the schema; the line names the first place.

    Example:
      omnissm timeseries describe --data ETTh1.csv --time date
    """
    from .describe import describe_series
    from .tables import print_facts, print_table, write_table

    if out is not None:
        _check_out(out, (".csv", ".md"))
    facts, frame = describe_series(_read_file(data, time, ids, id_column, values, freq))
    if out == "-":
        frame.to_csv(sys.stdout, index=False)
        return
    if out is not None:
        write_table(frame, out)
    print_facts(facts, str(data))
    print_table(frame.assign(missing=[f"{100 * share:.2f} %" for share in frame["missing"]]))


def plot(
    data: Path,
    kind: Literal[
        "auto", "forecast", "backtest", "error_by_horizon", "error_map", "calibration", "residuals", "missing"
    ] = "auto",
    out: str = "plot.png",
    history: Path | None = None,
    series: str | None = None,
    variate: str | None = None,
    metric: str = "mae",
    time: str | None = None,
    freq: str | None = None,
) -> None:
    """Draw a forecast, a backtest, its errors, or what is missing in a file.

    Args:
        data: A forecast or backtest (.nc, .zarr), or for "missing" any series.
        kind: What to draw. "auto" draws a forecast (one cutoff), a backtest (several) or, of series, what is missing.
        out: Picture: .png, .pdf or .svg.
        history: Series to draw before a forecast.
        series: Which series; default the first.
        variate: Which variate; default a panel for each, the first for "residuals".
        metric: Error of "error_by_horizon" and "error_map", see `evaluate`.
        time: Column with the times of a table.
        freq: Frequency of the times.

    Raises:
        ImportError: if matplotlib is missing.
        ValueError: if the file lacks what the picture needs.

    Example:
      omnissm timeseries plot --data backtest.nc --kind error_map --out errors.png
    """
    from . import plots

    _check_out(out, (".png", ".pdf", ".svg"), stdout=False)
    ds = _read_file(data, time, None, "unique_id", None, freq)
    if kind == "auto":
        kind = "missing" if "cutoff" not in ds.dims else "forecast" if ds.sizes["cutoff"] == 1 else "backtest"
    if (kind == "missing") == ("cutoff" in ds.dims):
        raise ValueError(
            f"{str(data)!r} holds {'forecasts' if 'cutoff' in ds.dims else 'series'}, which have no {kind} plot"
        )
    if kind == "forecast":
        past = _read_file(history, time, None, "unique_id", None, freq) if history else None
        axes: Any = plots.plot_forecast(ds, past, series=series, variate=variate)
    elif kind == "backtest":
        axes = plots.plot_backtest(ds, series=series, variate=variate)
    elif kind == "error_by_horizon":
        axes = plots.plot_error_by_horizon(ds, metric=metric)
    elif kind == "error_map":
        axes = plots.plot_error_map(ds, metric=metric)
    elif kind == "calibration":
        axes = plots.plot_calibration(ds)
    elif kind == "residuals":
        axes = plots.plot_residuals(ds, series=series, variate=variate)
    else:
        axes = plots.plot_missing(ds, series=series)
    sys.stdout.write(f"{plots.save(axes, out)}\n")


def _check_out(out: str, suffixes: Sequence[str], *, stdout: bool = True) -> None:
    """Refuse a bad name before the work, not after it."""
    if (out == "-" and stdout) or Path(out).suffix in suffixes:
        return
    raise ValueError(f"out is {out!r}, expected a name ending in {', '.join(suffixes)}{', or -' if stdout else ''}")


def _read_file(
    path: Path, time: str | None, ids: Ids | None, id_column: str, values: Sequence[str] | None, freq: str | None
) -> xr.Dataset:
    from .files import read_series

    step = int(freq) if freq is not None and freq.isdigit() else freq
    columns = values[0] if ids and values and len(values) == 1 else values
    return read_series(path, time=time, ids=ids, id_column=id_column, values=columns, freq=step)


def _read(
    checkpoint: Path,
    data: Path | None,
    time: str | None,
    ids: Ids | None,
    id_column: str,
    values: Sequence[str] | None,
    freq: str | None,
) -> tuple[xr.Dataset, int | None]:
    """The series of a file, or of the run's own data module with the first step of its test part."""
    if data is not None:
        return _read_file(data, time, ids, id_column, values, freq), None
    from .forecast import run_data

    return run_data(checkpoint)


def _read_forecast(path: Path) -> xr.Dataset:
    """A forecast file."""
    ds = _read_file(path, None, None, "unique_id", None, None)
    if "cutoff" not in ds.dims:
        raise ValueError(f"{str(path)!r} holds no forecast (no dimension 'cutoff'); give a file of backtest")
    return ds


def _write(result: xr.Dataset, out: str, ids: Ids | None) -> None:
    """Write a forecast by the suffix of `out`, and say where it is."""
    from .files import atomic_path, write_series
    from .inputs import forecast_to_long

    if out == "-":
        forecast_to_long(result, ids).to_csv(sys.stdout, index=False)
        return
    if Path(out).suffix in (".nc", ".zarr"):
        write_series(result, out)
    else:
        frame = forecast_to_long(result, ids)
        with atomic_path(out) as temporary:
            frame.to_csv(temporary, index=False) if out.endswith(".csv") else frame.to_parquet(temporary, index=False)
    sys.stdout.write(f"{out}\n")


def _print_errors(result: xr.Dataset) -> None:
    """Errors per variate and overall, for the terminal."""
    import pandas as pd

    from .evaluation import evaluate as compute
    from .tables import print_table

    names = ["mse", "mae", "mae_units"]
    each, whole = _frame(compute(result, names, ("variate",))), _frame(compute(result, names, ()))
    cutoffs, series = result.sizes["cutoff"], result.sizes["series"]
    title = f"{result.attrs['model']}: {cutoffs} cutoffs x {series} series x {result.sizes['horizon']} steps"
    print_table(pd.concat([each, whole.assign(variate="all", mae_units=float("nan"))]), title)


def _frame(result: xr.Dataset) -> pd.DataFrame:
    """A result of `evaluate` as a table, one column per metric."""
    import pandas as pd

    if not result.dims:
        return pd.DataFrame([{name: float(result[name]) for name in result.data_vars}])
    return result.drop_vars("units", errors="ignore").to_dataframe().reset_index()


if __name__ == "__main__":
    from ..__main__ import main

    sys.exit(main(["timeseries", *sys.argv[1:]]))
