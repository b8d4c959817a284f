"""Time series: 2-D state-space forecasting on xarray data."""

from __future__ import annotations

from .models import create_model as create_model
from .models import list_models as list_models

__all__ = ["create_model", "list_models"]
