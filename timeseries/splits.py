"""Cuts by time: training, validation and test parts that share no target."""

from __future__ import annotations

import datetime as dt
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from .freq import stamp

Cut = int | float | str | np.datetime64 | dt.date

ETT_BORDERS = (
    8640,
    2880,
    2880,
)  # hours in 12, 4 and 4 months of 30 days; the quarter-hourly files have four times that


class Part(NamedTuple):
    """A part of a split: the Dataset up to its last step (nothing later is in it), and the steps that may be targets.

    Step numbers are those of the uncut Dataset.
    """

    dataset: xr.Dataset
    targets: range


def split(
    ds: xr.Dataset,
    train: Cut | None = 0.7,
    val: Cut | None = None,
    test: Cut | None = 0.2,
    *,
    lookback: int = 0,
) -> dict[str, Part]:
    """Cut a Dataset by time into the parts "train", "val" and "test".

    Args:
        ds: Dataset in the schema.
        train, val, test: Size of each part as a count of steps (int) or a fraction of all steps (float, rounded down),
            or the time at which it ends, exclusive (string or datetime). One of them may be None and takes the rest;
            0 leaves a part out.
        lookback: Steps before a part that its inputs may read; targets never lie before the part.

    Returns:
        Part name to (Dataset, range of admissible target steps). Parts are views, not copies.

    Raises:
        ValueError: if the sizes do not fit the series, or a part is shorter than it can be.
    """
    length = ds.sizes["time"]
    cuts = {"train": train, "val": val, "test": test}
    if sum(cut is None for cut in cuts.values()) > 1:
        raise ValueError("Only one of train, val and test may be None; give the others a count, a fraction or a date.")
    ends = _ends(ds["time"].to_numpy(), cuts)
    parts, begin = {}, 0
    for name, end in ends.items():
        if end < begin or end > length:
            raise ValueError(
                f"The {name} part would end at step {end}, outside {begin}..{length}; make the parts smaller or "
                "supply more data."
            )
        if end > begin:
            if end <= lookback:
                raise ValueError(
                    f"The {name} part ends at {stamp(ds['time'].to_numpy()[end - 1])} after {end} steps, fewer "
                    f"than lookback {lookback} plus one; shorten lookback or enlarge the part."
                )
            parts[name] = Part(ds.isel(time=slice(0, end)), range(max(begin, lookback), end))
        begin = end
    return parts


def _ends(times: np.ndarray, cuts: dict[str, Cut | None]) -> dict[str, int]:
    """End step, exclusive, of every part in order."""
    length = len(times)
    if all(isinstance(cut, float) for cut in cuts.values()) and abs(sum(cuts.values()) - 1.0) < 1e-9:  # type: ignore[arg-type]
        cuts = {**cuts, "val": None}  # fractions of a whole: what rounding down leaves goes to the middle part
    sizes: dict[str, int | None] = {}
    begin: int | None = 0  # unknown behind a part that takes the rest
    for name, cut in cuts.items():
        if cut is None:
            sizes[name], begin = None, None
        elif is_date(cut):
            end = cut_step(name, cut, times)
            if begin is None:  # the rest lies between the part before and this one, whose size then says nothing
                raise ValueError(f"{name}={cut!r} is a date behind a part without a size; give that part a date too.")
            sizes[name] = end - begin
            begin = end
        else:
            sizes[name] = cut_step(name, cut, times)
            begin = None if begin is None else begin + sizes[name]  # type: ignore[operator]
    known = sum(size for size in sizes.values() if size is not None)
    if known > length:
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items() if size is not None)
        raise ValueError(f"The parts ({listed}) need {known} steps, the series has {length}; make them smaller.")
    ends, begin = {}, 0
    for name, size in sizes.items():
        begin += length - known if size is None else size
        ends[name] = begin
    return ends


def is_date(cut: Any) -> bool:
    """Whether a cut is a point in time rather than a number of steps."""
    return isinstance(cut, (str, np.datetime64, dt.date))


def cut_step(name: str, cut: Cut, times: np.ndarray) -> int:
    """Steps that a cut counts: those before a date, a fraction of all rounded down, or the number itself.

    Raises:
        TypeError: for what is neither a date nor a number.
        ValueError: for a date on integer times, a fraction outside [0, 1] and a negative count.
    """
    if is_date(cut):
        if times.dtype.kind != "M":
            raise ValueError(f"{name}={cut!r} is a date, the series counts integer steps; give a count or a fraction.")
        return int(np.searchsorted(times, pd.Timestamp(cut).to_datetime64()))  # type: ignore[arg-type]
    if isinstance(cut, bool) or not isinstance(cut, Real):
        raise TypeError(f"{name} is {type(cut).__name__}, expected a count of steps, a fraction of them or a date.")
    if isinstance(cut, Integral):
        if cut < 0:
            raise ValueError(f"{name}={cut} must not be negative.")
        return int(cut)
    if not 0.0 <= cut <= 1.0:
        raise ValueError(f"{name}={cut} is a fraction and must lie in [0, 1]; for a count of steps write an integer.")
    return int(float(cut) * len(times) + 1e-9)  # 0.29 * 100 is 28.999...
