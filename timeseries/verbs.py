"""Files in and out of the verbs, and the errors they print."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
import xarray as xr

from .files import atomic_path, read_series, write_series
from .forecast import evaluate, run_data
from .inputs import forecast_to_long
from .tables import print_table

if TYPE_CHECKING:
    from .forecaster import Forecaster

__all__ = ["error_frame", "print_errors", "read", "read_file", "read_forecast", "read_future", "write"]

Ids = Literal["variates", "series"]


def read_file(
    path: Path,
    time: str | None = None,
    ids: Ids | None = None,
    id_column: str = "unique_id",
    values: Sequence[str] | None = None,
    freq: str | None = None,
    covariates: dict[str, list[str]] | None = None,
) -> xr.Dataset:
    """`read_series` with the words of the command line: an integer frequency as text, one value column in a list.

    `covariates` names the columns "past" and "future" of a long table of series.
    """
    step = int(freq) if freq is not None and freq.isdigit() else freq
    columns = values[0] if ids and values and len(values) == 1 else values
    named = covariates or {} if ids == "series" else {}
    return read_series(path, time=time, ids=ids, id_column=id_column, values=columns, freq=step, **named)  # type: ignore[arg-type]


def read(
    model: Forecaster,
    checkpoint: Path,
    data: Path | None,
    time: str | None,
    ids: Ids | None,
    id_column: str,
    values: Sequence[str] | None,
    freq: str | None,
) -> tuple[xr.Dataset, range | None]:
    """The series of a file with the covariates that the model reads, or those of the run's own data module with the
    steps of its test part.
    """
    if data is not None:
        covariates = {"past": model.reads("past"), "future": model.reads("future")}
        return read_file(data, time, ids, id_column, values, freq, covariates), None
    return run_data(checkpoint)


def read_future(
    path: Path, model: Forecaster, time: str | None, ids: Ids | None, id_column: str, freq: str | None
) -> xr.Dataset:
    """Covariates known in advance as variable `future`, from a file that has it or from the columns of a table.

    Raises:
        ValueError: if the model reads none, or the table lacks a column.
    """
    names = model.needs_future()
    if path.suffix.lower() in (".nc", ".zarr"):
        return read_file(path)
    ds = read_file(path, time, "series" if ids == "series" else None, id_column, names, freq)
    return ds[["target"]].rename(target="future", variate="future_feature")


def read_forecast(path: Path) -> xr.Dataset:
    """A forecast file."""
    ds = read_file(path)
    if "cutoff" not in ds.dims:
        raise ValueError(f"{str(path)!r} holds no forecast (no dimension 'cutoff'); give a file of backtest")
    return ds


def write(result: xr.Dataset, out: str, ids: Ids | None) -> None:
    """Write a forecast by the suffix of `out`, and say where it is."""
    if out == "-":
        forecast_to_long(result, ids or "variates").to_csv(sys.stdout, index=False)
        return
    if Path(out).suffix in (".nc", ".zarr"):
        write_series(result, out)
    else:
        frame = forecast_to_long(result, ids or "variates")
        with atomic_path(out) as temporary:
            frame.to_csv(temporary, index=False) if out.endswith(".csv") else frame.to_parquet(temporary, index=False)
    sys.stdout.write(f"{out}\n")


def print_errors(result: xr.Dataset) -> None:
    """Errors per variate and overall, for the terminal."""
    names = ["mse", "mae", "mae_units"]
    each, whole = error_frame(evaluate(result, names, ("variate",))), error_frame(evaluate(result, names, ()))
    cutoffs, series = result.sizes["cutoff"], result.sizes["series"]
    title = f"{result.attrs['model']}: {cutoffs} cutoffs x {series} series x {result.sizes['horizon']} steps"
    print_table(pd.concat([each, whole.assign(variate="all", mae_units=float("nan"))]), title)


def error_frame(result: xr.Dataset) -> pd.DataFrame:
    """A result of `evaluate` as a table, one column per metric."""
    if not result.dims:
        return pd.DataFrame([{name: float(result[name]) for name in result.data_vars}])
    return result.drop_vars("units", errors="ignore").to_dataframe().reset_index()
