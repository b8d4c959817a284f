"""Models by name. A forecaster maps a `WindowBatch` in scaled units to (b, i, horizon[, q]), a classifier a
`SeriesBatch` to logits (b, num_classes), an imputer a `WindowBatch` to values of its inputs (b, i, lookback).
"""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Callable
from typing import Any, Literal

from torch import nn

from ...ssmcore.training.options import check_kinds
from .chimera import ChimeraForecaster, chimera_base, chimera_small, chimera_tiny
from .classifiers import ChimeraClassifier, SequenceClassifier
from .ecg_mamba import ECGMamba
from .hiss import HiSS
from .imputers import ChimeraImputer, SequenceImputer
from .linear import DLinear, Ridge, RLinear
from .naive import LastValue, SeasonalNaive, WindowMean
from .s_mamba import SMamba
from .spacetime import SpaceTime
from .transformers import ITransformer, PatchTST
from .tsm2 import TSM2

__all__ = [
    "CLASSIFIERS",
    "IMPUTERS",
    "MODELS",
    "TSM2",
    "ChimeraClassifier",
    "ChimeraForecaster",
    "ChimeraImputer",
    "DLinear",
    "ECGMamba",
    "HiSS",
    "ITransformer",
    "LastValue",
    "PatchTST",
    "RLinear",
    "Ridge",
    "SMamba",
    "SeasonalNaive",
    "SequenceClassifier",
    "SequenceImputer",
    "SpaceTime",
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
    "s_mamba": SMamba,
    "tsm2": TSM2,
    "spacetime": SpaceTime,
    "hiss": HiSS,
    "i_transformer": ITransformer,
    "patch_tst": PatchTST,
}
"""What builds each forecaster, by the name that `create_model` takes."""


CLASSIFIERS: dict[str, Callable[..., nn.Module]] = {
    "chimera_classifier": ChimeraClassifier,
    "sequence_classifier": SequenceClassifier,
    "ecg_mamba": ECGMamba,
}
"""What builds each classifier of series, by name."""

IMPUTERS: dict[str, Callable[..., nn.Module]] = {
    "chimera_imputer": ChimeraImputer,
    "sequence_imputer": SequenceImputer,
}
"""What builds each model that fills gaps, by name."""

Task = Literal["forecasting", "classification", "imputation"]
TABLES: dict[str, dict[str, Callable[..., nn.Module]]] = {
    "forecasting": MODELS,
    "classification": CLASSIFIERS,
    "imputation": IMPUTERS,
}


def list_models(pattern: str = "*", task: Task = "forecasting") -> list[str]:
    """Names of the models of a task.

    Args:
        pattern: Shell pattern, e.g. "chimera_*".
        task: "forecasting", "classification" or "imputation".
    """
    return sorted(fnmatch.filter(TABLES[task], pattern))


def create_model(name: str, task: Task = "forecasting", **args: Any) -> nn.Module:
    """Build a model by name.

    Args:
        name: One of `list_models(task=task)`.
        task: What the model is for.
        args: The model's own options; for forecasting with `lookback`, `horizon`, `n_variates` (steps, steps, count),
            for classification with `n_variates` and `num_classes`, for imputation with `n_variates` and `lookback`.

    Raises:
        ValueError: for an unknown model; the message names close ones.
        TypeError: for an option that the model does not have, with close names, or a value of another kind.
    """
    table = TABLES[task]
    if name not in table:
        other = [kind for kind, names in TABLES.items() if name in names]
        close = difflib.get_close_matches(str(name), table, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(close)}?" if close else f"available: {', '.join(list_models(task=task))}"
        raise ValueError(f"{name!r} is a model for {other[0]}; {hint}" if other else f"unknown model {name!r}; {hint}")
    known = model_options(name)
    for option in args:
        if known and option not in known:
            close = difflib.get_close_matches(option, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(close)}?" if close else f"it has: {', '.join(known)}"
            raise TypeError(f"model {name!r} has no option {option!r}; {hint}")
    check_kinds(name, _makers(name), args)
    return table[name](**args)


def model_options(name: str) -> list[str]:
    """Names of all arguments of a model; those of the class for an entry function that passes **overrides on to it."""
    entry, *built = (inspect.signature(maker).parameters.values() for maker in _makers(name))
    names = [p.name for p in entry if p.kind is not p.VAR_KEYWORD]
    if len(names) == len(entry):
        return names
    return [*names, *(p.name for p in built[0])] if built else []  # what it passes on is not known


def _makers(name: str) -> list[Any]:
    """What takes the options of a model: its entry, and the class that it builds if it says which."""
    entry = next(table[name] for table in TABLES.values() if name in table)
    built = None if inspect.isclass(entry) else inspect.get_annotations(entry, eval_str=True).get("return")
    return [entry, built] if inspect.isclass(built) and built is not nn.Module else [entry]
