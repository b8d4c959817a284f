"""Batches of whole series with a label each, scaled by the training series."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["LabelledSeries", "SeriesBatch", "labels_of", "series_scaling"]


class SeriesBatch(NamedTuple):
    """One batch of whole series, shorter ones filled up at the end.

    `x` (b, i, l) float32 in scaled units, 0 where missing; `x_mask` (b, i, l) bool, True where observed; `steps` (b, l)
    bool, True up to the end of each series; `label` (b,) int64, or (b, classes) float32 in {0, 1} where a series may
    belong to several, -1 where unknown; `number` (b,) int64, place in the data.
    """

    x: Tensor
    x_mask: Tensor
    steps: Tensor
    label: Tensor
    number: Tensor

    def to(self, device: torch.device | str) -> SeriesBatch:
        """The same batch on another device."""
        return SeriesBatch._make(part.to(device, non_blocking=True) for part in self)


class LabelledSeries(Dataset[SeriesBatch]):
    """Series of a Dataset in batches.

    Args:
        ds: `target` (series, time, variate), optionally `length` (series,).
        scaling: Mean and scale of each variate, (2, variate); see `series_scaling`.
        label: Of each series: (series,) numbers of classes or (series, classes) flags; None: unknown.
    """

    def __init__(self, ds: xr.Dataset, scaling: np.ndarray, label: np.ndarray | None = None) -> None:
        self.values, self.lengths = series_values(ds)
        if self.values.shape[1] != scaling.shape[1]:
            raise ValueError(f"expected {scaling.shape[1]} variates as in training, got {self.values.shape[1]}")
        self.values = ((self.values - scaling[0][:, None]) / scaling[1][:, None]).astype(np.float32)
        self.label = np.full(len(self.values), -1) if label is None else label

    def __len__(self) -> int:
        return len(self.values)

    def __getitems__(self, indices: Sequence[int]) -> SeriesBatch:
        """A whole batch at once, as long as its longest series."""
        rows = np.asarray(indices, dtype=np.int64)
        length = int(self.lengths[rows].max())
        x = self.values[rows, :, :length]
        observed = np.isfinite(x)
        label = torch.from_numpy(self.label[rows])
        return SeriesBatch(
            x=torch.from_numpy(np.where(observed, x, np.float32(0))),
            x_mask=torch.from_numpy(observed),
            steps=torch.from_numpy(np.arange(length) < self.lengths[rows][:, None]),
            label=label.float() if label.dim() == 2 else label.long(),
            number=torch.from_numpy(rows),
        )

    def __getitem__(self, index: int) -> SeriesBatch:
        """One series without the batch dimension."""
        return SeriesBatch._make(part[0] for part in self.__getitems__([index]))


def series_values(ds: xr.Dataset) -> tuple[np.ndarray, np.ndarray]:
    """(series, variate, time) with NaN where missing, and the length of each series."""
    target = ds["target"] if "series" in ds["target"].dims else ds["target"].expand_dims("series")
    values = target.transpose("series", "variate", "time").to_numpy().astype(np.float32)
    if "length" in ds.coords:
        return values, np.atleast_1d(ds["length"].to_numpy()).astype(np.int64)
    seen: np.ndarray = np.any(np.isfinite(values), axis=1)
    last = values.shape[2] - seen[:, ::-1].argmax(axis=1)
    return values, np.where(seen.any(axis=1), last, 1).astype(np.int64)


def series_scaling(ds: xr.Dataset) -> np.ndarray:
    """Mean and population standard deviation of each variate over all series, (2, variate); 0 becomes 1."""
    values = ds["target"].transpose(..., "variate").to_numpy().reshape(-1, ds.sizes["variate"]).astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean, scale = np.nanmean(values, axis=0), np.nanstd(values, axis=0)
    return np.stack([np.nan_to_num(mean), np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)])


def labels_of(ds: xr.Dataset, classes: Sequence[str]) -> np.ndarray:
    """Numbers of the classes (series,), or for a `label` over (series, class) its flags.

    Raises:
        ValueError: if there are no labels, or one is not among the classes.
    """
    if "label" not in ds or "series" not in ds["label"].dims:
        raise ValueError("the data have no variable 'label' over series; classification needs one label per series")
    label: Any = ds["label"]
    if "class" in label.dims:
        return label.transpose("series", "class").to_numpy().astype(np.float32)
    place = {name: number for number, name in enumerate(classes)}
    found = [str(name) for name in label.to_numpy()]
    unknown = [name for name in found if name not in place]
    if unknown:
        raise ValueError(f"label {unknown[0]!r} is not among the classes {', '.join(classes)}")
    return np.array([place[name] for name in found])
