"""Any CSV or Parquet table as forecasting data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import xarray as xr

from ..files import read_series
from .base import ForecastingData


class Table(ForecastingData):
    """A wide or long table; 70 % training, the rest validation, 20 % test unless said otherwise.

    Args:
        path: A .csv or .parquet file.
        time: Column with the times.
        ids: None for a wide table; "variates" or "series" for a long one, see `frames.from_long`.
        id_column: Column with the ids of a long table.
        values: Columns with the values; None takes all but `time` of a wide table, "y" of a long one.
        past: Columns of a long table with covariates that are known up to the cutoff.
        future: Columns of a long table with covariates that are known over the horizon too.
        static: Columns of a long table that are constant for each series.
        freq: pandas alias or integer step; None takes the one that the times follow exactly, if any.
        time_format: strptime format of times that are not ISO 8601.
        options: Arguments of `ForecastingData`.
    """

    def __init__(
        self,
        path: str,
        time: str,
        ids: Literal["variates", "series"] | None = None,
        id_column: str = "unique_id",
        values: Sequence[str] | None = None,
        past: Sequence[str] = (),
        future: Sequence[str] = (),
        static: Sequence[str] = (),
        freq: str | int | None = None,
        time_format: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path = path
        self.columns: dict[str, Any] = {
            "time": time,
            "ids": ids,
            "id_column": id_column,
            "values": values,
            "past": past,
            "future": future,
            "static": static,
            "freq": freq,
            "time_format": time_format,
        }

    def read(self) -> xr.Dataset:
        """The table as it is; gaps and duplicates are errors."""
        return read_series(self.path, **self.columns)
