"""Time series: 2-D state-space forecasting on xarray data.

Names are imported on first use, so that the command line answers at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

# At once, and not on first use: a function must stand before the module of the same name.
from .forecast import backtest as backtest
from .forecast import evaluate as evaluate
from .forecast import forecast as forecast

if TYPE_CHECKING:
    from .forecaster import Forecaster as Forecaster
    from .models import create_model as create_model
    from .models import list_models as list_models

__all__ = ["Forecaster", "backtest", "create_model", "evaluate", "forecast", "list_models"]

_HOME = {"Forecaster": "forecaster", "create_model": "models", "list_models": "models"}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
