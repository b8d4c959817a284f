"""Scaling per series and variate, fitted on observed values, with an exact inverse and a JSON state.

z = (g(x) - center) / scale,    g = sign(x) log(1 + |x|) for "log1p", otherwise the identity
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from .schema import COVARIATES, read_block

Array = TypeVar("Array", np.ndarray, Tensor)
Statistic = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def _standard(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.nanmean(values, axis=0), np.nanstd(values, axis=0)


def _robust(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, middle, high = np.nanpercentile(values, [25, 50, 75], axis=0)
    return middle, high - low


def _minmax(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.nanmin(values, axis=0), np.nanmax(values, axis=0)
    return low, high - low


def _unit(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(values.shape[1]), np.ones(values.shape[1])


STATISTICS: dict[str, Statistic] = {
    "standard": _standard,
    "robust": _robust,
    "minmax": _minmax,
    "log1p": _unit,
    "none": _unit,
}


class Scaler:
    """One kind of scaling with its fitted numbers.

    Args:
        kind: "standard" (mean and population standard deviation), "robust" (median and interquartile range),
            "minmax" (to [0, 1]), "log1p" (signed logarithm, nothing fitted) or "none".
        shared: One set of numbers for all series of a panel, so that series not seen in training can be scaled too.

    Attributes:
        center, scale: (series, variate) float64, or (1, variate) when shared; None before `fit`.
        series, variates: Names that the rows and columns belong to.
    """

    def __init__(self, kind: str = "standard", *, shared: bool = False) -> None:
        if kind not in STATISTICS:
            close = difflib.get_close_matches(str(kind), STATISTICS, n=1)
            hint = f" Did you mean '{close[0]}'?" if close else ""
            raise ValueError(f"Unknown scaler {kind!r}; expected one of {', '.join(STATISTICS)}.{hint}")
        self.kind = kind
        self.shared = shared
        self.center: np.ndarray | None = None
        self.scale: np.ndarray | None = None
        self.series: list[str] = []
        self.variates: list[str] = []

    def fit(self, ds: xr.Dataset, variable: str = "target") -> Scaler:
        """Take center and scale from the observed values of a Dataset; pass the training part only.

        A scale of zero, or a variate without any value in one series, becomes center 0 or its value and scale 1.
        """
        self.series, self.variates = _series_names(ds), _names(ds, variable)
        pieces = [read_block(ds, variable, series) for series in range(len(self.series))]
        pieces = [np.concatenate(pieces)] if self.shared else pieces
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=RuntimeWarning)  # a series may lack a variate altogether
            fitted = [STATISTICS[self.kind](piece.astype(np.float64)) for piece in pieces]
        center = np.nan_to_num(np.stack([center for center, _ in fitted]))
        scale = np.nan_to_num(np.stack([scale for _, scale in fitted]))
        self.center, self.scale = center, np.where(scale > 0, scale, 1.0)
        return self

    def transform(
        self, values: Array, series: np.ndarray | Tensor | Sequence[int] | None = None, *, axis: int = -1
    ) -> Array:
        """Scale `values`, whose first dimension is the series and whose dimension `axis` is the variate.

        Args:
            values: numpy array or tensor, for example (series, time, variate); NaN stays NaN.
            series: For a first dimension that is a batch: the series number of each entry.
            axis: Position of the variate dimension.
        """
        center, scale = self._numbers(values, series, axis)
        return _like(values, (self._curve(values) - center) / scale)

    def inverse(
        self, values: Array, series: np.ndarray | Tensor | Sequence[int] | None = None, *, axis: int = -1
    ) -> Array:
        """Undo `transform`, with the same meaning of the arguments."""
        center, scale = self._numbers(values, series, axis)
        out = values * scale + center
        return _like(values, _odd("expm1", out) if self.kind == "log1p" else out)

    def _curve(self, values: Array) -> Array:
        return _odd("log1p", values) if self.kind == "log1p" else values

    def _numbers(self, values: Any, series: Any, axis: int) -> tuple[Any, Any]:
        """Center and scale in the layout of `values`, numpy float64 or a tensor like it."""
        if self.center is None or self.scale is None:
            raise ValueError(f"This {self.kind!r} scaler is not fitted; call fit(ds) with the training part first.")
        axis %= values.ndim
        if values.shape[axis] != self.center.shape[1]:
            raise ValueError(
                f"`values` has {values.shape[axis]} variates at axis {axis}, the scaler was fitted on "
                f"{self.center.shape[1]}: {', '.join(self.variates[:8])}."
            )
        if self.shared:
            rows = np.zeros(1, dtype=np.int64)
        elif series is None:
            rows = np.arange(len(self.center))
            if len(rows) > 1 and values.shape[0] != len(rows):
                raise ValueError(
                    f"`values` has {values.shape[0]} series, the scaler was fitted on {len(rows)}; pass series= "
                    "or fit with shared=True."
                )
        else:
            rows = np.asarray(series)
        shape = [1] * values.ndim
        shape[0], shape[axis] = len(rows), values.shape[axis]
        numbers = [np.asarray(number)[rows].reshape(shape) for number in (self.center, self.scale)]
        if isinstance(values, np.ndarray):
            return numbers[0], numbers[1]
        center, scale = (torch.as_tensor(number, dtype=values.dtype, device=values.device) for number in numbers)
        return center, scale

    def rows(self, ds: xr.Dataset, variable: str = "target") -> np.ndarray:
        """Row of this scaler for each series of `ds`, found by name; zeros when shared.

        Raises:
            ValueError: for variates in another order and for series that the scaler has not seen.
        """
        variates, names = _names(ds, variable), _series_names(ds)
        if variates != self.variates:
            raise ValueError(
                f"The data has variates {', '.join(variates[:8])}; the scaler was fitted on "
                f"{', '.join(self.variates[:8])}. Select and order them with ds.sel(variate=[...])."
            )
        if self.shared:
            return np.zeros(len(names), dtype=np.int64)
        unknown = [name for name in names if name not in self.series]
        if unknown:
            raise ValueError(
                f"Series {unknown[0]!r} was not in the training data, known are {', '.join(self.series[:8])}; for new "
                "series train with one scale for all, `scaler_shared: true` in the data section of a configuration."
            )
        return np.array([self.series.index(name) for name in names], dtype=np.int64)

    def to_dict(self) -> dict[str, Any]:
        """State as plain JSON values; floats survive exactly."""
        return {
            "kind": self.kind,
            "shared": self.shared,
            "series": self.series,
            "variates": self.variates,
            "center": None if self.center is None else self.center.tolist(),
            "scale": None if self.scale is None else self.scale.tolist(),
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Scaler:
        """Rebuild a scaler from `to_dict`."""
        scaler = cls(state["kind"], shared=state["shared"])
        scaler.series, scaler.variates = list(state["series"]), list(state["variates"])
        if state["center"] is not None:
            scaler.center, scaler.scale = np.array(state["center"], float), np.array(state["scale"], float)
        return scaler


def create_scaler(kind: str = "standard", *, shared: bool = False) -> Scaler:
    """A scaler by name: "standard", "robust", "minmax", "log1p" or "none"; see `Scaler`."""
    return Scaler(kind, shared=shared)


def _odd(name: str, values: Any) -> Any:
    """log1p or expm1 continued to negative numbers as an odd function; its gradient at 0 is 1."""
    if isinstance(values, Tensor):
        function = getattr(torch, name)
        below = values < 0
        size = function(torch.where(below, -values, values))  # abs() has gradient 0 at 0
        return torch.where(below, -size, size)
    return np.copysign(getattr(np, name)(np.abs(values)), values)


def _like(values: Array, out: Any) -> Array:
    """numpy computes in float64 here and goes back to the given dtype; tensors keep theirs."""
    return out.astype(values.dtype, copy=False) if isinstance(values, np.ndarray) else out


def _names(ds: xr.Dataset, variable: str) -> list[str]:
    return [str(name) for name in ds[COVARIATES.get(variable, "variate")].to_numpy()]


def _series_names(ds: xr.Dataset) -> list[str]:
    return [str(name) for name in ds["series"].to_numpy()] if "series" in ds.dims else ["0"]
