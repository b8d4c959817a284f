"""A NetCDF-4 file or a Zarr directory in the schema as forecasting data; Zarr larger than memory by `lazy`."""

from __future__ import annotations

from typing import Any

import xarray as xr

from ..files import read_series
from .base import ForecastingData


class NetCDF(ForecastingData):
    """Series from a .nc file or .zarr directory that holds a Dataset in the schema.

    Args:
        path: The file or directory.
        lazy: Read each window from the file instead of holding the series in memory. Slower, and for files that do
            not fit; time features need the series in memory.
        options: Arguments of `ForecastingData`.
    """

    def __init__(self, path: str, lazy: bool = False, **options: Any) -> None:
        super().__init__(**options)
        if lazy and (self.calendar or self.fourier):
            raise ValueError(
                "lazy=True cannot add calendar or fourier features; store them as `future`, or use lazy=False."
            )
        self.path, self.lazy = path, lazy

    def read(self) -> xr.Dataset:
        """The Dataset, its values still in the file when `lazy`."""
        return read_series(self.path, lazy=self.lazy)
