"""`omnissm timeseries VERB`: the verbs that need no trainer, as plain typed functions; also `python -m`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

Ids = Literal["variates", "series"]
Kind = Literal[
    "auto",
    "forecast",
    "backtest",
    "error_by_horizon",
    "error_map",
    "calibration",
    "residuals",
    "missing",
    "time_scales",
    "anomalies",
    "imputation",
    "confusion",
]


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
    samples: int = 0,
) -> None:
    """Forecast what follows the end of a file's series.

    Args:
        checkpoint: Model folder, run folder or .ckpt file.
        data: Series to continue: .nc, .zarr, .csv or .parquet. Left out, the data that the run was trained on.
        out: Where the forecast goes: .nc, .zarr, .csv or .parquet, or - for CSV on standard output.
        horizon: Steps to forecast; default as trained. Longer ones feed the model's forecasts back.
        intervals: true demands conformal intervals, false leaves them out; by default as the model has them.
        future: File with the future-known covariates of the steps to forecast, where those of `data` end before: .nc or
            .zarr with the variable `future`, or a table with a column for each, wide, or long with `ids` series.
        time: Column with the times of a table.
        ids: A long table's ids are "variates" of one system or separate "series"; left out, the table is wide. A table
            of series also gives the columns of covariates that the model reads.
        id_column: Column with the ids of a long table.
        values: Columns with the values of a table.
        freq: Frequency of the times, as a pandas alias or an integer.
        samples: Draws from the distribution of a model that has one, in .nc and .zarr.

    Raises:
        ValueError: if the file or the model cannot be used; the line says why.

    Example:
      omnissm timeseries forecast --checkpoint runs/NAME --data weather.nc --out forecast.nc
    """
    from .forecast import load
    from .verbs import read, read_future, write

    _check_out(out, (".nc", ".zarr", ".csv", ".parquet"))
    model = load(checkpoint)
    ds, _ = read(model, checkpoint, data, time, ids, id_column, values, freq)
    known = read_future(future, model, time, ids, id_column, freq) if future else None
    result = model.predict(ds, known, horizon, intervals=intervals, samples=samples)
    write(result, out, ids)


def backtest(
    checkpoint: Path,
    data: Path | None = None,
    start: int | float | str | None = None,
    stride: int = 1,
    horizon: int | None = None,
    out: str = "backtest.nc",
    intervals: bool | None = None,
    track: float | None = None,
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
        horizon: Steps to forecast; default as trained.
        out: Where the forecasts and what came go: .nc, .zarr, .csv or .parquet, or - for CSV on standard output.
        intervals: true demands conformal intervals, false leaves them out.
        track: Let the intervals follow the errors of earlier cutoffs; about the share by which a miss widens one, e.g.
            0.05.
        time: Column with the times of a table.
        ids: A long table's ids are "variates" of one system or separate "series"; left out, the table is wide. A table
            of series also gives the columns of covariates that the model reads.
        id_column: Column with the ids of a long table.
        values: Columns with the values of a table.
        freq: Frequency of the times, as a pandas alias or an integer.

    Raises:
        ValueError: if the file or the model cannot be used; the line says why.

    Example:
      omnissm timeseries backtest --checkpoint runs/NAME --data weather.nc --start 2013-11-01 --stride 24 --out bt.nc
    """
    from .conformal import track_intervals
    from .forecast import load
    from .verbs import print_errors, read, write

    _check_out(out, (".nc", ".zarr", ".csv", ".parquet"))
    model = load(checkpoint)
    ds, test = read(model, checkpoint, data, time, ids, id_column, values, freq)
    if test is not None:
        ds, start = ds.isel(time=slice(0, test.stop)), test.start if start is None else start
    result = model.backtest(ds, start, stride, horizon=horizon, intervals=intervals)
    if track is not None:
        result = track_intervals(result, track)
    write(result, out, ids)
    if out != "-":
        print_errors(result)


def evaluate(
    forecast: Path,
    metrics: list[str] = ["mse", "mae", "mae_units", "mase"],  # noqa: B006
    by: list[str] = ["variate"],  # noqa: B006
    out: str | None = None,
) -> None:
    """Errors of a forecast file that holds what came, as a table.

    Args:
        forecast: File of `backtest`: .nc or .zarr.
        metrics: Any of mse, rmse, mae, crps (in the scaler's units, with _units in those of the data), nll, mape,
            smape, nd, mase, rmsse, wql, and of the widest interval, or e.g. @0.9 of that one: coverage, interval_width,
            msis.
        by: Keep any of series, cutoff, horizon, variate; [] gives one number.
        out: Write the table here too: .csv, .md or .nc; or - for CSV alone on standard output.

    Raises:
        ValueError: for unknown names, and if the file lacks what a metric needs.

    Example:
      omnissm timeseries evaluate --forecast backtest.nc --metrics '[mae,mase,coverage]' --by '[variate]'
    """
    from .files import write_series
    from .forecast import evaluate as compute
    from .tables import print_table, write_table
    from .verbs import error_frame, read_forecast

    if out is not None:
        _check_out(out, (".csv", ".md", ".nc"))
    result = compute(read_forecast(forecast), metrics, by)
    frame = error_frame(result)
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
    from .verbs import read_file

    if out is not None:
        _check_out(out, (".csv", ".md"))
    facts, frame = describe_series(read_file(data, time, ids, id_column, values, freq))
    if out == "-":
        frame.to_csv(sys.stdout, index=False)
        return
    if out is not None:
        write_table(frame, out)
    print_facts(facts, str(data))
    shown = frame.assign(missing=[f"{100 * share:.2f} %" for share in frame["missing"]])
    print_table(shown if facts["series"] > 1 else shown.drop(columns="series"))


def plot(
    data: Path,
    kind: Kind = "auto",
    out: str = "plot.png",
    history: Path | None = None,
    series: str | None = None,
    variate: str | None = None,
    metric: str = "mae",
    time: str | None = None,
    freq: str | None = None,
) -> None:
    """Draw a forecast, a backtest, its errors, what is missing in a file, anomalies, filled gaps or confused classes.

    Args:
        data: A forecast or backtest (.nc, .zarr); for "missing" any series; for "time_scales" a trained Chimera; what
            `detect` or `impute` wrote (.nc, .zarr); for "confusion" the table of `classify` (.csv).
        kind: What to draw. "auto" draws a forecast (one cutoff), a backtest (several), anomalies, filled gaps or, of
            other series, what is missing.
        out: Picture: .png, .pdf or .svg.
        history: Series to draw before a forecast.
        series: Which series; default the first.
        variate: Which variate; default a panel for each, the first for "residuals" and "anomalies".
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
    from .verbs import read_file

    _check_out(out, (".png", ".pdf", ".svg"), stdout=False)
    if kind == "time_scales":
        from .forecast import load

        sys.stdout.write(f"{plots.save(plots.plot_dt_ranges(load(data).net), out)}\n")
        return
    if kind == "confusion":
        import pandas as pd

        from .plots_labels import plot_confusion

        sys.stdout.write(
            f"{plots.save(plot_confusion(pd.read_csv(data, dtype={'label': str, 'predicted': str})), out)}\n"
        )
        return
    ds = read_file(data, time, freq=freq)
    for name, mark in (("anomalies", "threshold"), ("imputation", "imputed")):
        if kind == name or (kind == "auto" and mark in ds):
            from . import plots_labels

            if mark not in ds:
                raise ValueError(f"{str(data)!r} has no variable {mark!r}, of which there is no plot {name!r}")
            draw = plots_labels.plot_anomalies if name == "anomalies" else plots_labels.plot_imputation
            sys.stdout.write(f"{plots.save(draw(ds, series=series, variate=variate), out)}\n")
            return
    forecasts = "cutoff" in ds.dims
    if kind == "auto":
        kind = "missing" if not forecasts else "forecast" if ds.sizes["cutoff"] == 1 else "backtest"
    if (kind == "missing") == forecasts:
        what = "forecasts" if forecasts else "series"
        raise ValueError(f"{str(data)!r} holds {what}, of which there is no plot {kind!r}; see plot --help")
    if kind == "forecast":
        past = read_file(history, time, freq=freq) if history else None
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


if __name__ == "__main__":
    from ..__main__ import main

    sys.exit(main(["timeseries", *sys.argv[1:]]))
