"""Data modules of this domain; importing this package loads Lightning."""

from .base import ForecastingData as ForecastingData
from .ett import ETT as ETT
from .nyc_weather import NYCWeather as NYCWeather

__all__ = ["ETT", "ForecastingData", "NYCWeather"]
