"""Windows over long series without copies: index arithmetic over one base array, batches by fancy indexing.

Window k ends its inputs at step `origin` and its targets run from origin + 1 to origin + horizon. Memory is O(series),
never O(windows), unless windows are filtered (4 or 8 bytes for each window kept).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from numpy.lib.stride_tricks import sliding_window_view
from torch import Tensor
from torch.utils.data import Dataset

from .freq import base_step
from .scaling import Scaler
from .schema import COVARIATES, canonical, check_future, read_block

Fill = Literal["zero", "forward"]


class WindowBatch(NamedTuple):
    """One batch of windows; parts that the data lacks are None.

    `x` (b, i, lookback) and `y` (b, i, horizon) float32 in scaled units, finite everywhere; `x_mask` and `y_mask` bool
    of the same shapes, True where observed; `past` (b, past_feature, lookback); `future` (b, future_feature,
    lookback + horizon); `static` (b, i, static_feature); `time_gap` (b, lookback) base steps since the preceding entry,
    None for times of one frequency; `series` (b,) int64; `origin` (b,) int64, the last input step on the time axis.
    """

    x: Tensor
    x_mask: Tensor
    y: Tensor
    y_mask: Tensor
    past: Tensor | None
    future: Tensor | None
    static: Tensor | None
    time_gap: Tensor | None
    series: Tensor
    origin: Tensor

    def to(self, device: torch.device | str) -> WindowBatch:
        """The same batch on another device."""
        return WindowBatch._make(None if part is None else part.to(device, non_blocking=True) for part in self)


class Windows(Dataset[WindowBatch]):
    """All windows of one Dataset, or of several that share their variates.

    Args:
        data: Dataset in the schema (or several); used in place when it is canonical.
        lookback: Input steps.
        horizon: Target steps.
        targets: Steps that may be targets, as a range on the time axis (one for each Dataset); inputs may reach back
            before it. All steps by default.
        stride: Steps between the origins of neighbouring windows.
        fill: Missing inputs become 0 after scaling ("zero") or repeat the last observed value inside the window
            ("forward"; 0 before the first).
        scaler: Fitted scaler of the targets; None leaves the units.
        covariate_scalers: Fitted scalers of "past" and "future".
        drop_incomplete: Leave out windows with any missing input or target.
        min_observed: Leave out windows whose share of observed targets is smaller.
        base_step: What `time_gap` counts in, nanoseconds or integers; pass that of the training data, so that a model
            reads the same elapsed time everywhere. None takes the median step of each Dataset, and no gaps where times
            are regular.
        lazy: Read every window from an opened file instead of holding the array; for files larger than memory.

    Raises:
        ValueError: if there is no window, or an argument is out of range.
    """

    def __init__(
        self,
        data: xr.Dataset | Sequence[xr.Dataset],
        lookback: int,
        horizon: int,
        *,
        targets: range | Sequence[range] | None = None,
        stride: int = 1,
        fill: Fill = "zero",
        scaler: Scaler | None = None,
        covariate_scalers: dict[str, Scaler] | None = None,
        drop_incomplete: bool = False,
        min_observed: float = 0.0,
        base_step: float | None = None,
        lazy: bool = False,
    ) -> None:
        for name, number in (("lookback", lookback), ("horizon", horizon), ("stride", stride)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}.")
        if fill not in ("zero", "forward"):
            raise ValueError(f"fill={fill!r} is unknown; expected 'zero' or 'forward'.")
        if not 0.0 <= min_observed <= 1.0:
            raise ValueError(f"min_observed is a share and must lie in [0, 1], got {min_observed}.")
        datasets = [data] if isinstance(data, xr.Dataset) else list(data)
        if not datasets:
            raise ValueError("Expected at least one Dataset, got an empty list.")
        ranges = [targets] * len(datasets) if targets is None or isinstance(targets, range) else list(targets)
        self.lookback, self.horizon, self.stride, self.fill, self.scaler = lookback, horizon, stride, fill, scaler
        self.covariate_scalers, self.base_step = covariate_scalers or {}, base_step
        self._panels = [_Panel(ds, span, self, lazy) for ds, span in zip(datasets, ranges, strict=True)]
        self.variates = self._panels[0].variates
        for panel in self._panels[1:]:
            if panel.variates != self.variates:
                raise ValueError(f"All Datasets must share their variates; got {self.variates} and {panel.variates}.")
        self.n_variates = len(self.variates)
        self.series_names = [name for panel in self._panels for name in panel.series]
        self._series_offset = np.cumsum([0] + [len(panel.series) for panel in self._panels])
        self._cumulative = np.cumsum([panel.count * len(panel.series) for panel in self._panels])
        self._rows = {name: self._scaler_rows(name) for name in ("target", *COVARIATES)}
        self._kept = self._filter(drop_incomplete, min_observed) if drop_incomplete or min_observed > 0 else None
        if len(self) == 0:
            steps = max(panel.length for panel in self._panels)
            admissible = max(panel.admissible for panel in self._panels)
            filtered = " and be observed well enough" if self._kept is not None else ""
            raise ValueError(
                f"No window fits: it must have {lookback} past and {horizon} future steps{filtered}; the "
                f"longest series has {steps} steps, of which {admissible} may be targets. Shorten lookback or "
                "horizon, or supply more data."
            )

    def __len__(self) -> int:
        return int(self._cumulative[-1]) if self._kept is None else len(self._kept)

    def __getitem__(self, index: int) -> WindowBatch:
        """One window without the batch dimension."""
        return WindowBatch._make(None if part is None else part[0] for part in self.get_batch([index]))

    def __getitems__(self, indices: Sequence[int]) -> WindowBatch:
        """A whole batch at once; `torch.utils.data.DataLoader` calls this instead of stacking single windows."""
        return self.get_batch(indices)

    def get_batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> WindowBatch:
        """The windows with these numbers, in this order."""
        panel_of, series, start = self._locate(np.asarray(indices, dtype=np.int64).reshape(-1))
        if len(self._panels) == 1:
            return self._assemble(self._panels[0], series, series, start)
        order = np.argsort(panel_of, kind="stable")
        groups = np.split(order, np.flatnonzero(np.diff(panel_of[order])) + 1)
        pieces = []
        for group in groups:
            number = int(panel_of[group[0]])
            pieces.append(
                self._assemble(
                    self._panels[number], series[group], series[group] + self._series_offset[number], start[group]
                )
            )
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        parts = zip(*pieces)
        return WindowBatch._make(None if part[0] is None else torch.cat(part)[back] for part in parts)

    def batches(self, batch_size: int = 256) -> Iterator[WindowBatch]:
        """All windows in order, in consecutive batches; the last one may be smaller."""
        for first in range(0, len(self), batch_size):
            yield self.get_batch(np.arange(first, min(first + batch_size, len(self))))

    def times(self, series: int = 0) -> np.ndarray:
        """Time axis of a series, to which `origin` points."""
        return self._panels[int(np.searchsorted(self._series_offset, series, side="right")) - 1].times

    def sample_name(self, index: int) -> str:
        """A window as messages name it: its series and its first input time."""
        panel, series, start = (int(found[0]) for found in self._locate(np.array([index])))
        name = self.series_names[int(self._series_offset[panel]) + series]
        return f"{name} from {self._panels[panel].times[start]}"

    def _scaler_rows(self, name: str) -> np.ndarray:
        """For each series its row in the scaler, matched by name."""
        scaler = self.scaler if name == "target" else self.covariate_scalers.get(name)
        if scaler is None:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate([scaler.rows(panel.source, name) for panel in self._panels])

    def _locate(self, k: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Panel, series in the panel and first input step of window k."""
        total = len(self)
        if k.size and (k.min() < -total or k.max() >= total):
            raise IndexError(f"Window {int(k[(k < -total) | (k >= total)][0])} does not exist; there are {total}.")
        k = np.where(k < 0, k + total, k)
        if self._kept is not None:
            k = self._kept[k].astype(np.int64)
        panel = np.searchsorted(self._cumulative, k, side="right")
        within = k - np.concatenate([[0], self._cumulative[:-1]])[panel]
        counts = np.array([panel.count for panel in self._panels])[panel]
        firsts = np.array([panel.first for panel in self._panels])[panel]
        return panel, within // counts, firsts + within % counts * self.stride

    def _assemble(self, panel: _Panel, local: np.ndarray, series: np.ndarray, start: np.ndarray) -> WindowBatch:
        split = self.lookback
        values = panel.read("target", local, start, self.lookback + self.horizon)  # (b, i, lookback + horizon)
        mask = ~np.isnan(values)
        if self.scaler is not None:
            values = self.scaler.transform(values, self._rows["target"][series], axis=1)
        if not mask.all():
            values = np.where(mask, values, np.float32(0))
            if self.fill == "forward":
                values[..., :split] = forward_fill(values[..., :split], mask[..., :split])
        past = self._covariate(panel, "past", local, series, start, self.lookback)
        future = self._covariate(panel, "future", local, series, start, self.lookback + self.horizon)
        gap = panel.gaps[start[:, None] + np.arange(split)] if panel.gaps is not None else None
        if gap is not None:
            gap[:, 0] = 1.0  # the first entry of a window has no predecessor
        return WindowBatch(
            x=_tensor(values[..., :split]),
            x_mask=_tensor(mask[..., :split]),
            y=_tensor(values[..., split:]),
            y_mask=_tensor(mask[..., split:]),
            past=past,
            future=future,
            static=None if panel.static is None else _tensor(panel.static[local]),
            time_gap=None if gap is None else _tensor(gap),
            series=_tensor(series.astype(np.int64)),
            origin=_tensor(start + (split - 1)),
        )

    def _covariate(
        self, panel: _Panel, name: str, local: np.ndarray, series: np.ndarray, start: np.ndarray, width: int
    ) -> Tensor | None:
        if name not in panel.variables:
            return None
        values = panel.read(name, local, start, width)
        if name in self.covariate_scalers:
            values = self.covariate_scalers[name].transform(values, self._rows[name][series], axis=1)
        return _tensor(np.nan_to_num(values))

    def _filter(self, drop_incomplete: bool, min_observed: float) -> np.ndarray:
        """Numbers of the windows to keep, from running counts of observed entries."""
        kept = []
        for number, panel in enumerate(self._panels):
            offset = 0 if number == 0 else self._cumulative[number - 1]
            start = panel.first + np.arange(panel.count) * self.stride
            for series in range(len(panel.series)):
                seen = np.concatenate([[0], np.cumsum(panel.observed_counts(series))])
                middle, end = start + self.lookback, start + self.lookback + self.horizon
                enough = seen[end] - seen[middle] >= min_observed * self.horizon * len(panel.variates)
                if drop_incomplete:
                    enough &= seen[end] - seen[start] == (self.lookback + self.horizon) * len(panel.variates)
                kept.append(offset + series * panel.count + np.flatnonzero(enough))
        small = np.uint32 if self._cumulative[-1] < 2**32 else np.int64
        return np.concatenate(kept).astype(small)


class _Panel:
    """The arrays of one Dataset and the range of its windows."""

    def __init__(self, ds: xr.Dataset, targets: range | None, windows: Windows, lazy: bool) -> None:
        self.source = ds if lazy else canonical(ds)
        self.length = ds.sizes["time"]
        self.times = self.source["time"].to_numpy()
        self.variates = [str(name) for name in self.source["variate"].to_numpy()]
        named = "series" in self.source.dims
        self.series = [str(name) for name in self.source["series"].to_numpy()] if named else ["0"]
        self.variables = [name for name in ("target", *COVARIATES) if name in ds]
        self.arrays = None if lazy else {name: self.source[name].to_numpy() for name in self.variables}
        self.static = self._static()
        self.gaps = self._gaps(ds.attrs.get("freq"), windows.base_step)
        span = range(self.length) if targets is None else targets
        if span.step != 1 or span.start < 0 or span.stop > self.length:
            raise ValueError(f"targets must be a range of steps within 0..{self.length}, got {span}.")
        self.admissible = max(0, span.stop - max(span.start, windows.lookback))
        self.first = max(span.start, windows.lookback) - windows.lookback
        last = span.stop - windows.horizon - windows.lookback  # first input step of the last window
        self.count = max(0, (last - self.first) // windows.stride + 1)
        if not lazy and "future" in ds:
            check_future(self.source, slice(self.first, span.stop), only_observed=True)

    def read(self, name: str, series: np.ndarray, start: np.ndarray, width: int) -> np.ndarray:
        """Windows of a variable, (b, feature, width) float32, a copy."""
        if self.arrays is not None:
            return sliding_window_view(self.arrays[name], width, axis=1)[series, start]
        steps = [slice(int(first), int(first) + width) for first in start]
        return np.stack([read_block(self.source, name, int(s), span).T for s, span in zip(series, steps)])

    def observed_counts(self, series: int) -> np.ndarray:
        """Observed variates at every step of one series."""
        if self.arrays is not None:
            return self.source["observed"].to_numpy()[series].sum(axis=1)
        return (~np.isnan(read_block(self.source, "target", series))).sum(axis=1)

    def _static(self) -> np.ndarray | None:
        """(series, variate, static_feature) float32."""
        if "static" not in self.source:
            return None
        array = self.source["static"]
        shape = (len(self.series), len(self.variates), array.sizes["static_feature"])
        kept = [slice(None) if dim in array.dims else None for dim in ("series", "variate")]
        ordered = array.transpose(*(dim for dim in ("series", "variate") if dim in array.dims), "static_feature")
        return np.nan_to_num(np.broadcast_to(ordered.to_numpy().astype(np.float32)[*kept], shape))

    def _gaps(self, freq: str | int | None, unit: float | None) -> np.ndarray | None:
        """Elapsed time since the preceding step in base steps; None when no base is given and times are regular."""
        steps = np.diff(self.times).astype(np.float64)
        if unit is None:
            if freq is not None or self.length < 2 or (steps == steps[0]).all():
                return None
            unit = base_step(self.times)
        return np.concatenate([[1.0], steps / unit]).astype(np.float32)


def forward_fill(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Repeat the last observed value along the last axis; 0 before the first observation."""
    steps = np.where(mask, np.arange(values.shape[-1]), 0)
    filled = np.take_along_axis(values, np.maximum.accumulate(steps, axis=-1), axis=-1)
    return np.where(np.logical_or.accumulate(mask, axis=-1), filled, np.float32(0))


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def as_is(batch: WindowBatch) -> WindowBatch:
    """Collate function for loaders over `Windows`, whose batches are already whole."""
    return batch
