"""Series of the Numenta Anomaly Benchmark: a table with timestamp and value, and windows in one JSON file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from pandas.tseries.frequencies import to_offset

from ..frames import from_wide
from ..schema import regularize
from ..splits import Cut
from .base import ForecastingData

LABELS = "combined_windows.json"


def read_nab(root: str | Path, name: str, freq: str | None = None) -> xr.Dataset:
    """Read one series with its flags.

    Args:
        root: Folder with the tables and combined_windows.json.
        name: Name of the table, with or without ".csv".
        freq: Step of the regular grid the series is put on, for one with gaps or times that occur twice (these are
            averaged); None takes the most frequent step.

    Returns:
        `target` (time, variate) with NaN in gaps, and `label` (time,) bool, True inside the windows, ends included.

    Raises:
        FileNotFoundError: naming the file and where the data come from.
        ValueError: if the windows do not name this series, or it has no two different times.
    """
    folder, file = Path(root), f"{name.removesuffix('.csv')}.csv"
    for path in (folder / file, folder / LABELS):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; expected {file} and {LABELS} of https://github.com/numenta/NAB in {folder}."
            )
    frame = pd.read_csv(folder / file, parse_dates=["timestamp"])
    windows = _read_windows(folder / LABELS)
    if file not in windows:
        raise ValueError(f"{LABELS} has no windows for {file}; it names {', '.join(sorted(windows)[:4])}, ...")
    ds = from_wide(frame.sort_values("timestamp", kind="stable"), time="timestamp", variates=["value"])
    if freq is None:
        steps, counts = np.unique(np.diff(ds["time"].to_numpy()), return_counts=True)
        forward = steps > np.timedelta64(0)
        if not forward.any():
            raise ValueError(f"{folder / file} has fewer than two different times; is it complete?")
        freq = to_offset(pd.Timedelta(steps[forward][counts[forward].argmax()])).freqstr
    ds, _ = regularize(_on_grid(ds, freq), freq, duplicates="mean")
    times = pd.DatetimeIndex(ds["time"].to_numpy())
    flags = np.zeros(len(times), dtype=bool)
    for start, end in windows[file]:
        flags |= (times >= start) & (times <= end)
    return ds.assign(label=("time", flags)).assign_attrs(name=name)


def _read_windows(path: Path) -> dict[str, list[tuple[pd.Timestamp, pd.Timestamp]]]:
    """First and last times of the windows of each table."""
    try:
        found = json.loads(path.read_text()).items()
        return {Path(key).name: [(pd.Timestamp(a), pd.Timestamp(b)) for a, b in value] for key, value in found}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged: expected a list of [start, end] for each file, {' '.join(str(error).split())}"
        ) from error


def _on_grid(ds: xr.Dataset, freq: str) -> xr.Dataset:
    """Times moved to the nearest step from the first one on; some recorders drifted by seconds."""
    times, step = ds["time"].to_numpy(), pd.Timedelta(to_offset(freq).nanos, unit="ns").to_timedelta64()
    moved = times[0] + np.round((times - times[0]) / step).astype(np.int64) * step
    return ds.assign_coords(time=moved.astype("datetime64[ns]"))


class NAB(ForecastingData):
    """One series of the benchmark, to train the forecaster whose residuals tell anomalies.

    Args:
        root: Folder with the tables and combined_windows.json.
        name: Name of the table.
        lookback: As in `ForecastingData`.
        horizon: As in `ForecastingData`.
        options: Further arguments of `ForecastingData`. By default the first 30 % train, 10 % validate.
    """

    def __init__(self, root: str, name: str, lookback: int = 96, horizon: int = 1, **options: Any) -> None:
        super().__init__(lookback=lookback, horizon=horizon, **options)
        self.root, self.series = root, name

    def borders(self) -> dict[str, Cut | None]:
        """Sizes of the parts where none are given: 30 %, 10 %, the rest."""
        return {"train": 0.3, "val": 0.1, "test": None}

    def read(self) -> xr.Dataset:
        """The series with its flags."""
        return read_nab(self.root, self.series)
