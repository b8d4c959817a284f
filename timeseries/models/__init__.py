"""Forecasting models by name. A model maps a `WindowBatch` in scaled units to (b, i, horizon[, q])."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from .chimera import ChimeraForecaster, chimera_base, chimera_small, chimera_tiny
from .linear import DLinear, Ridge, RLinear
from .naive import LastValue, SeasonalNaive, WindowMean

__all__ = [
    "MODELS",
    "ChimeraForecaster",
    "DLinear",
    "LastValue",
    "RLinear",
    "Ridge",
    "SeasonalNaive",
    "WindowMean",
    "chimera_base",
    "chimera_small",
    "chimera_tiny",
    "create_model",
    "list_models",
    "model_options",
]

MODELS: dict[str, Callable[..., nn.Module]] = {
    "last_value": LastValue,
    "seasonal_naive": SeasonalNaive,
    "window_mean": WindowMean,
    "rlinear": RLinear,
    "dlinear": DLinear,
    "ridge": Ridge,
    "chimera_tiny": chimera_tiny,
    "chimera_small": chimera_small,
    "chimera_base": chimera_base,
}


def list_models(pattern: str = "*") -> list[str]:
    """Names of the models that match a shell pattern, e.g. "chimera_*"."""
    return sorted(fnmatch.filter(MODELS, pattern))


def create_model(name: str, **args: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: One of `list_models()`.
        args: `lookback`, `horizon`, `n_variates` (steps, steps, count) and the model's own options.

    Raises:
        ValueError: for an unknown model; the message names close ones.
        TypeError: for an option that the model does not have; the message names close ones.
    """
    if name not in MODELS:
        close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"available: {', '.join(list_models())}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    known = model_options(name)
    for option in args:
        if known and option not in known:
            close = difflib.get_close_matches(option, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(known)}"
            raise TypeError(f"model {name!r} has no option {option!r}; {hint}")
    return MODELS[name](**args)


def model_options(name: str) -> list[str]:
    """Names of all arguments of a model; those of the class for an entry function that passes **overrides on to it."""
    entry = MODELS[name]
    parameters = inspect.signature(entry).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
    if len(names) == len(parameters):
        return names
    built = inspect.get_annotations(entry, eval_str=True).get("return")
    return [*names, *inspect.signature(built).parameters] if inspect.isclass(built) and built is not nn.Module else []
