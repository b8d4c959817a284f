"""Data modules of this domain; importing this package loads Lightning."""

from .base import ForecastingData as ForecastingData
from .ett import ETT as ETT
from .netcdf import NetCDF as NetCDF
from .nyc_weather import NYCWeather as NYCWeather
from .nyc_weather import read_nyc_weather as read_nyc_weather
from .synthetic import Synthetic as Synthetic
from .synthetic import create_synthetic as create_synthetic
from .table import Table as Table

__all__ = [
    "ETT",
    "ForecastingData",
    "NYCWeather",
    "NetCDF",
    "Synthetic",
    "Table",
    "create_synthetic",
    "read_nyc_weather",
]
