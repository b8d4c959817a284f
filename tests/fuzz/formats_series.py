"""Files of time series."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from fuzzing import Format, Payload
from hypothesis import strategies as st

from omnissm.timeseries.data.nab import read_nab
from omnissm.timeseries.files import read_series, write_series
from omnissm.timeseries.schema import read_block, validate
from omnissm.timeseries.ts_files import read_ts

values = st.one_of(st.floats(-1e30, 1e30), st.integers(-(10**9), 10**9).map(float), st.just(float("nan")))
names = st.text('ab01 ,"é.N', min_size=1, max_size=5).filter(lambda name: name.strip() == name)
ids = st.one_of(st.sampled_from(["NA", "007", "7", "nan", "null", "1e3", "True", "a"]), names)
starts = st.datetimes(pd.Timestamp("1700-01-01").to_pydatetime(), pd.Timestamp("2200-01-01").to_pydatetime()).map(
    lambda start: start.replace(microsecond=0).isoformat(sep=" ")
)
steps = st.sampled_from(["h", "D", "15min", "s"])
tables = st.fixed_dictionaries(
    {
        "newline": st.sampled_from(["\n", "\r\n"]),
        "start": st.one_of(starts, st.integers(-(10**12), 10**12)),
        "step": steps,
        "zone": st.sampled_from(["", "+00:00", "+05:30"]),
        "names": st.lists(names, min_size=1, max_size=3, unique=True),
        "rows": st.lists(st.lists(values, min_size=3, max_size=3), min_size=1, max_size=5),
        "kind": st.sampled_from(["csv", "parquet"]),
        "lazy": st.booleans(),
    }
)


def times_of(model: Any) -> np.ndarray:
    count = len(model["rows"])
    if isinstance(model["start"], int):
        return model["start"] + 3 * np.arange(count)
    times = pd.date_range(model["start"], periods=count, freq=model["step"])
    if model["zone"] == "+05:30":
        times = times - pd.Timedelta(hours=5, minutes=30)
    return times.to_numpy().astype("datetime64[ns]")


def stamps(model: Any) -> list[Any]:
    if isinstance(model["start"], int):
        return times_of(model).tolist()
    local = pd.date_range(model["start"], periods=len(model["rows"]), freq=model["step"])
    return [f"{time.isoformat(sep=' ')}{model['zone']}" for time in local]


def matrix(model: Any) -> np.ndarray:
    return np.array([row[: len(model["names"])] for row in model["rows"]], float)


def series_table(model: Any) -> Payload:
    columns = ["when", *model["names"]]
    if model["kind"] == "parquet":
        frame = pd.DataFrame(matrix(model), columns=model["names"])
        frame.insert(0, "when", stamps(model), allow_duplicates=True)
        return table_file(frame, model)
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator=model["newline"])
    writer.writerow(columns)
    for stamp, row in zip(stamps(model), matrix(model).tolist()):
        writer.writerow([stamp, *("" if np.isnan(v) else repr(v) for v in row)])
    return {"a.csv": text.getvalue().encode()}


def table_file(frame: pd.DataFrame, model: Any) -> Payload:
    if model["kind"] == "csv":
        return {"a.csv": frame.to_csv(index=False, lineterminator=model["newline"]).encode()}
    buffer = io.BytesIO()
    frame.to_parquet(buffer)
    return {"a.parquet": buffer.getvalue()}


def plain(ds: xr.Dataset) -> dict[str, Any]:
    """What a Dataset holds, loaded."""
    return {str(name): array.to_numpy() for name, array in sorted(ds.variables.items(), key=lambda pair: str(pair[0]))}


def read_table(path: Path, model: Any) -> dict[str, Any]:
    ds = read_series(path, time="when")
    found = plain(ds)
    if np.isfinite(found["target"]).all():
        validate(ds)
    return found


def as_series(model: Any) -> dict[str, Any]:
    return {
        "target": matrix(model).astype(np.float32),
        "time": times_of(model),
        "variate": np.array(model["names"]),
    }


# Long tables: one row for each id and time

long_models = st.fixed_dictionaries(
    {
        "newline": st.sampled_from(["\n", "\r\n"]),
        "kind": st.sampled_from(["csv", "parquet"]),
        "ids": st.lists(ids, min_size=1, max_size=3, unique=True),
        "rows": st.lists(
            st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=3, max_size=3), min_size=1, max_size=4
        ),
        "start": starts,
        "step": steps,
    }
)


def long_table(model: Any) -> Payload:
    times = pd.date_range(model["start"], periods=len(model["rows"]), freq=model["step"])
    frame = pd.DataFrame(
        [(name, str(time), row[k]) for time, row in zip(times, model["rows"]) for k, name in enumerate(model["ids"])],
        columns=["unique_id", "ds", "y"],
    )
    return table_file(frame, model)


def read_long(path: Path, model: Any) -> dict[str, Any]:
    ds = read_series(path, time="ds", ids="variates")
    return {"variate": ds["variate"].to_numpy(), "target": ds["target"].to_numpy()}


def as_long(model: Any) -> dict[str, Any]:
    rows = np.array([row[: len(model["ids"])] for row in model["rows"]], np.float32)
    return {"variate": np.array(model["ids"]), "target": rows}


# NetCDF and Zarr


def dataset(model: Any) -> xr.Dataset:
    target = matrix(model).astype(np.float32)
    coords = {"time": times_of(model), "variate": model["names"]}
    attributes = {"name": "é", "freq": model["step"]}
    past = (("time", "past_feature"), np.nan_to_num(target)[:, :1])
    flags = ("time", np.isnan(target).any(1))
    return xr.Dataset({"target": (("time", "variate"), target), "past": past, "flag": flags}, coords, attributes)


def in_folder(ending: str) -> Any:
    """A writer for formats that are made in one go: the payload is what the model says, the file what is damaged."""

    def pack(payload: Mapping[str, bytes], folder: Path, model: Any) -> Path:
        return write_series(dataset(model), folder / f"a{ending}")

    return pack


def no_payload(model: Any) -> Payload:
    return {"nothing": b""}


def read_dataset(path: Path, model: Any) -> dict[str, Any]:
    ds = read_series(path, lazy=model["lazy"])
    if model["lazy"]:  # values stay in the file, and the package's own functions take them out
        found = {name: read_block(ds, name, 0) for name in ("past", "target") if name in ds}
        ds.close()
        return found
    found = plain(ds)
    if "target" in ds and found["target"].dtype.kind == "f" and np.isfinite(found["target"]).all():
        validate(ds.drop_attrs())
    ds.close()
    return found


def as_dataset(model: Any) -> dict[str, Any]:
    ds = dataset(model)
    return {name: ds[name].to_numpy() for name in ("past", "target")} if model["lazy"] else plain(ds)


# .ts files

ts_values = st.one_of(st.floats(-(2.0**90), 2.0**90, width=32), st.just(float("nan")))
ts_case = st.lists(st.lists(ts_values, min_size=1, max_size=4), min_size=2, max_size=2)
ts_models = st.fixed_dictionaries(
    {
        "newline": st.sampled_from(["\n", "\r\n"]),
        "missing": st.sampled_from(["?", "NaN"]),
        "cases": st.lists(ts_case, min_size=1, max_size=4),
        "labels": st.sampled_from(["none", "words", "numbers"]),
        "case": st.booleans(),
    }
)


def ts(model: Any) -> Payload:
    head = {"none": "@classLabel false", "words": "@classLabel true up down", "numbers": "@targetLabel true"}
    lines = ["# remark", "@problemName x", "@univariate false", head[model["labels"]], "@data"]
    if model["case"]:
        lines = [line.lower() for line in lines]
    for k, case in enumerate(model["cases"]):
        parts = [",".join(model["missing"] if np.isnan(v) else repr(v) for v in part) for part in case]
        label = {"none": [], "words": [("up", "down")[k % 2]], "numbers": [repr(k / 3)]}[model["labels"]]
        lines.append(":".join([*parts, *label]))
    return {"a.ts": model["newline"].join(lines).encode()}


def read_ts_file(path: Path, model: Any) -> dict[str, Any]:
    ds = read_ts(path)
    found = {"target": ds["target"].to_numpy(), "length": ds["length"].to_numpy()}
    return found | ({"label": ds["label"].to_numpy()} if "label" in ds else {})


def as_ts(model: Any) -> dict[str, Any]:
    cases = model["cases"]
    lengths = np.array([max(map(len, case)) for case in cases])
    target = np.full((len(cases), lengths.max(), 2), np.nan, np.float32)
    for k, case in enumerate(cases):
        for i, part in enumerate(case):
            target[k, : len(part), i] = part
    found = {"target": target, "length": lengths}
    if model["labels"] == "words":
        found["label"] = np.array([("up", "down")[k % 2] for k in range(len(cases))])
    elif model["labels"] == "numbers":
        found["label"] = np.array([k / 3 for k in range(len(cases))])
    return found


# Numenta's benchmark

recent = st.datetimes(pd.Timestamp("1980-01-01").to_pydatetime(), pd.Timestamp("2100-01-01").to_pydatetime())
nab_models = st.fixed_dictionaries(
    {
        "start": st.datetimes(
            pd.Timestamp("1980-01-01").to_pydatetime(), pd.Timestamp("2100-01-01").to_pydatetime()
        ).map(lambda start: start.replace(microsecond=0).isoformat(sep=" ")),
        "values": st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=3, max_size=9),
        "gap": st.booleans(),
        "flags": st.tuples(st.integers(0, 2), st.integers(0, 3)),
    }
)


def nab_times(model: Any) -> pd.DatetimeIndex:
    return pd.date_range(model["start"], periods=len(model["values"]) + 1, freq="5min")


def nab(model: Any) -> Payload:
    times = nab_times(model)
    # With a gap the last value comes a step later; of three values no step would be more frequent than the other.
    places = [*range(len(model["values"]) - 1), len(model["values"]) - (not model["gap"] or len(model["values"]) < 4)]
    lines = ["timestamp,value", *(f"{times[p]},{v!r}" for p, v in zip(places, model["values"]))]
    first, span = model["flags"]
    last = min(first + span, len(times) - 2)
    windows = {"folder/a.csv": [[str(times[first]), str(times[last])]], "b.csv": []}
    return {"a.csv": "\n".join(lines).encode(), "combined_windows.json": json.dumps(windows).encode()}


def read_nab_file(path: Path, model: Any) -> dict[str, Any]:
    ds = read_nab(path.parent, "a")
    return {"target": ds["target"].to_numpy()[:, 0], "label": ds["label"].to_numpy(), "time": ds["time"].to_numpy()}


def as_nab(model: Any) -> dict[str, Any]:
    target = np.array(model["values"], np.float32)
    if model["gap"] and len(target) >= 4:
        target = np.insert(target, len(target) - 1, np.nan)
    first, span = model["flags"]
    last = min(first + span, len(model["values"]) - 1)
    label = np.zeros(len(target), bool)
    label[first : last + 1] = True
    return {
        "target": target,
        "label": label,
        "time": nab_times(model)[: len(target)].to_numpy().astype("datetime64[ns]"),
    }


FORMATS = [
    Format("series-table", tables, series_table, read_table, as_series),
    Format("long-table", long_models, long_table, read_long, as_long),
    Format("netcdf", tables, no_payload, read_dataset, as_dataset, in_folder(".nc"), weight=0.3),
    Format("zarr", tables, no_payload, read_dataset, as_dataset, in_folder(".zarr"), weight=0.3),
    Format("ts", ts_models, ts, read_ts_file, as_ts),
    Format("nab", nab_models, nab, read_nab_file, as_nab),
]
