"""What `Forecaster` refuses, in one line that names the way out, and how it reads `val`."""

from __future__ import annotations

from numbers import Real
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from .distributions import find_distribution
from .files import SUFFIXES
from .inputs import as_dataset
from .models import MODELS, create_model
from .splits import cut_step, is_date

__all__ = ["check_future", "check_intervals", "check_recent", "check_samples", "check_settings", "validation_part"]


def check_settings(model: str, scaler: str, distribution: str | None, threads: int | None) -> None:
    """Refuse names that are not known, scaled counts, and fewer than one thread.

    Raises:
        ValueError: naming what was expected; for unknown names with close ones.
    """
    if model not in MODELS:
        create_model(model)  # answers with close names
    if threads is not None and threads < 1:
        raise ValueError(f"expected at least 1 thread, or None for torch's setting, got threads={threads}")
    family = find_distribution(distribution)
    if family is not None and family.counts and scaler != "none":
        raise ValueError(f"{family.name} is a distribution of counts, which are not scaled; pass scaler='none'")


def validation_part(
    val: Any, ds: xr.Dataset, ids: Literal["variates", "series"]
) -> tuple[xr.Dataset | None, int | float, int | float | None]:
    """Validation data of their own, the part of `ds` to keep for validation, and the part that a refit keeps.

    Args:
        val: As in `Forecaster.fit`.
        ds: The data to train on, in the schema.
        ids: What the `unique_id`s of a long frame are.

    Raises:
        ValueError: if the part would begin behind the data, or `val` is data that violate the schema.
        TypeError: if `val` is none of what `fit` takes.
    """
    if val is None:
        return None, 0, None
    if isinstance(val, Real) and not isinstance(val, bool):
        part = cut_step("val", val, ds["time"].to_numpy())  # type: ignore[arg-type]
        return None, part, val  # type: ignore[return-value]
    if is_date(val) and not (isinstance(val, str) and Path(val).suffix in SUFFIXES):
        part = ds.sizes["time"] - cut_step("val", val, ds["time"].to_numpy())
        if part == 0:
            raise ValueError(f"validation would begin at {val}, behind the data, which end at {ds['time'].values[-1]}")
        return None, part, part / ds.sizes["time"]
    return as_dataset(val, ids).dataset, 0, 0.2


def check_future(future: xr.Dataset | xr.DataArray | None) -> None:
    """Refuse a Dataset of covariates without the variable `future`.

    Raises:
        ValueError: naming the variables that it has.
    """
    if isinstance(future, xr.Dataset) and "future" not in future:
        raise ValueError(f"`future` has no variable 'future', only {', '.join(map(str, future.data_vars))}; rename")


def check_recent(ds: xr.Dataset, last: int, lookback: int) -> None:
    """Refuse series of which nothing was seen in the `lookback` steps up to step `last`.

    Raises:
        ValueError: naming the first such series.
    """
    recent = ds["observed"].isel(time=slice(last + 1 - lookback, last + 1)).any(("time", "variate")).values
    if not recent.all():
        name = ds["series"].values[int(np.argmin(recent))]
        raise ValueError(
            f"series {name!s} has no observed value in the last {lookback} steps (the lookback) before the "
            "common end of the series; forecast it by itself, cut where it ends, or leave it out"
        )


def check_samples(distribution: str | None, trained: int, horizon: int) -> None:
    """Refuse draws from a forecaster without a distribution, or beyond the `trained` horizon, in steps.

    Raises:
        ValueError: saying which.
    """
    if distribution is None or horizon > trained:
        reason = "no distribution" if distribution is None else f"one for {trained} steps, not {horizon}"
        raise ValueError(f"samples were asked for and this forecaster has {reason}; train with distribution='normal'")


def check_intervals(found: bool, trained: int, horizon: int) -> None:
    """Refuse intervals where none were `found`, or beyond the `trained` horizon, in steps.

    Raises:
        ValueError: saying which.
    """
    if not found or horizon > trained:
        reason = "has none" if not found else f"has them for {trained} steps, not {horizon}"
        raise ValueError(f"intervals were asked for and this forecaster {reason}; fit with val, or call calibrate")
