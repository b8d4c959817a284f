"""Sums of log-probabilities over ranges of bases, taken on the host while the device goes on."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]


class RangeSum(NamedTuple):
    """What a range of bases adds up to.

    Attributes:
        nats: Sum of the log-probabilities; not finite where the model gives such ones.
        scored: Bases that were counted.
    """

    nats: float
    scored: int


class Arriving:
    """A tensor whose copy for the host is made behind the work that the device has so far, not behind later work."""

    def __init__(self, tensor: Tensor) -> None:
        self._ready: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._ready = torch.cuda.Event()
            self._ready.record(torch.cuda.current_stream(tensor.device))

    def numpy(self) -> npt.NDArray[np.float32]:
        """The values, after they have arrived."""
        if self._ready is not None:
            self._ready.synchronize()
        return self._host.cpu().numpy()


class RunningSums:
    """Running sums over the rows of a batch.

    Args:
        values: (n, k), of the last k positions of `scored`.
        scored: (n, l) bool, which positions are counted; the first l - k are not, whatever it says.
    """

    def __init__(self, values: npt.NDArray[np.floating], scored: npt.NDArray[np.bool_]) -> None:
        rows, length = scored.shape
        first = length - values.shape[1]
        self.nats, self.scored = np.zeros((rows, length + 1)), np.zeros((rows, length + 1), np.int64)
        self._counted, self._first = np.where(scored[:, first:], values, 0.0), first
        with np.errstate(invalid="ignore"):
            np.cumsum(self._counted, axis=1, dtype=np.float64, out=self.nats[:, first + 1 :])
        np.cumsum(scored[:, first:], axis=1, out=self.scored[:, first + 1 :])

    def between(self, row: int, start: int, end: int) -> RangeSum:
        """Of positions [start, end) of a row."""
        nats, scored = self.nats[row], self.scored[row]
        count = int(scored[end] - scored[start])
        if np.isfinite(nats[end]):
            return RangeSum(float(nats[end] - nats[start]), count)
        # What is not finite may stand before the range.
        own = self._counted[row, max(start - self._first, 0) : max(end - self._first, 0)]
        return RangeSum(float(own.sum(dtype=np.float64)), count)
