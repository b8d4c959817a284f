"""What users hand over (Dataset, DataArray, frame, path) as a Dataset, and forecasts back in the same kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import xarray as xr

from .freq import infer_freq
from .schema import validate

__all__ = ["Source", "as_dataset", "forecast_to_long", "like_source"]

Kind = Literal["dataset", "long"]


class Source(NamedTuple):
    """A Dataset in the schema, and the kind of object it came from."""

    dataset: xr.Dataset
    kind: Kind = "dataset"
    ids: str = "variates"


def as_dataset(data: Any, ids: Literal["variates", "series"] = "variates") -> Source:
    """Read what the user gave.

    Args:
        data: Dataset in the schema; DataArray with dimensions time and variate; frame with columns unique_id, ds, y;
            wide frame indexed by time; or the path of a
            .nc or .zarr file.
        ids: What the `unique_id`s are: variates of one system, or separate series.

    Raises:
        TypeError: for anything else.
        ValueError: for data that violate the schema.
    """
    kind: Kind = "dataset"
    if isinstance(data, (str, Path)):
        from .files import read_series

        if Path(data).suffix in (".csv", ".parquet"):
            raise ValueError(
                f"{str(data)!r} is a table, whose columns must be named; pass read_series(path, time=...) of "
                "omnissm.timeseries.files"
            )
        ds = read_series(data)
    elif isinstance(data, xr.DataArray):
        ds = data.to_dataset(name="target")
    elif isinstance(data, xr.Dataset):
        ds = data
    else:
        from .frames import from_long, from_wide, to_pandas

        frame = to_pandas(data)
        if {"unique_id", "ds", "y"} <= set(frame.columns):
            ds, kind = from_long(frame, ids=ids), "long"
        else:
            ds = from_wide(frame)
    validate(ds)
    if ds.attrs.get("freq") is None and (freq := infer_freq(ds["time"].to_numpy())) is not None:
        ds = ds.assign_attrs(freq=freq)
    return Source(ds, kind, ids)


def like_source(forecast: xr.Dataset, source: Source) -> Any:
    """The forecast as a Dataset or, for a long frame, as a long frame with ids and times as they were in it."""
    if source.kind != "long":
        return forecast
    from .frames import noted_ids, noted_times

    frame, noted = forecast_to_long(forecast, source.ids), json.loads(source.dataset.attrs["long"])
    times = {name: noted_times(frame[name], noted) for name in ("ds", "cutoff")}
    return frame.assign(unique_id=noted_ids(frame["unique_id"], noted), **times)


def forecast_to_long(forecast: xr.Dataset, ids: str = "variates") -> pd.DataFrame:
    """One row per series, variate, cutoff and step: unique_id, [variate,] ds, cutoff, MODEL, MODEL-q10, ..., [y].

    Args:
        forecast: Forecast Dataset.
        ids: With one series of one variate, whose name is `unique_id`: that of the "variates" or of the "series".
            Otherwise it is what there are several of; of both, the series, beside a column variate.
    """
    model = str(forecast.attrs.get("model", "forecast"))
    table = {model: forecast["mean"]}
    if "quantiles" in forecast:
        for level in forecast["quantile"].values:
            table[f"{model}-q{100 * float(level):g}"] = forecast["quantiles"].sel(quantile=level, drop=True)
    if "target" in forecast:
        table["y"] = forecast["target"]
    stacked = (
        xr.Dataset(table)
        .drop_vars("units", errors="ignore")
        .to_dataframe(dim_order=["series", "variate", "cutoff", "horizon"])
    )
    frame = stacked.reset_index().rename(columns={"valid_time": "ds"})
    single, lone = forecast.sizes["series"] == 1, forecast.sizes["variate"] == 1
    if single and (ids == "variates" or not lone):
        frame = frame.drop(columns="series").rename(columns={"variate": "unique_id"})
    elif lone:
        frame = frame.drop(columns="variate").rename(columns={"series": "unique_id"})
    else:
        frame = frame.rename(columns={"series": "unique_id"})
    order = [name for name in ("unique_id", "variate", "ds", "cutoff", *table) if name in frame]
    return frame[order]
