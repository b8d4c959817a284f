"""Data modules of this domain; importing this package loads Lightning."""

from .base import ForecastingData as ForecastingData
from .classification import UEA as UEA
from .classification import ClassificationData as ClassificationData
from .classification import SyntheticClasses as SyntheticClasses
from .classification import create_waves as create_waves
from .ecg import SyntheticECG as SyntheticECG
from .ecg import create_ecg as create_ecg
from .ett import ETT as ETT
from .nab import NAB as NAB
from .nab import read_nab as read_nab
from .netcdf import NetCDF as NetCDF
from .nyc_weather import NYCWeather as NYCWeather
from .nyc_weather import read_nyc_weather as read_nyc_weather
from .synthetic import Synthetic as Synthetic
from .synthetic import create_synthetic as create_synthetic
from .table import Table as Table

__all__ = [
    "ETT",
    "NAB",
    "UEA",
    "ClassificationData",
    "ForecastingData",
    "NYCWeather",
    "NetCDF",
    "Synthetic",
    "SyntheticClasses",
    "SyntheticECG",
    "Table",
    "create_ecg",
    "create_synthetic",
    "create_waves",
    "read_nab",
    "read_nyc_weather",
]
