"""Data modules of this domain; importing this package loads Lightning."""

from .base import ForecastingData as ForecastingData
from .ett import ETT as ETT
from .netcdf import NetCDF as NetCDF
from .nyc_weather import NYCWeather as NYCWeather
from .synthetic import Synthetic as Synthetic
from .table import Table as Table

__all__ = ["ETT", "ForecastingData", "NYCWeather", "NetCDF", "Synthetic", "Table"]
