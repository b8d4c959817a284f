"""`cross_scan` in plain PyTorch: one selective scan after the other, each added to the sum.

No more than one order's inputs are laid out in its order at a time, and the skips are one product with the sum of D.
Small grids are scanned along all orders in one call instead, as groups of channels: the number of steps counts there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..selective_scan.op import selective_scan

_SMALL = 1 << 20  # numbers in x


def cross_scan_chunked(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """See `cross_scan`; A in the dtype of the states, which is that of the sum."""
    rows, columns = x.shape[1:3]
    total = torch.zeros_like(x, dtype=A.dtype) if D is None else x.to(A.dtype) * D.to(A.dtype).sum(0)
    if x.numel() <= _SMALL:
        laid = [
            [_in_order(t, direction) for t in (x, dt[:, direction], B[:, direction], C[:, direction])]
            for direction in range(4)
        ]
        u, steps, into, out = (torch.stack(parts, dim=2) for parts in zip(*laid))  # (b, l, 4, ...)
        y, _ = selective_scan(u.flatten(2), steps.flatten(2), A.flatten(0, 1), into, out, backend="chunked")
        for direction, part in enumerate(y.unflatten(2, (4, -1)).unbind(2)):
            total = total + _at_cells(part, rows, columns, direction)
        return total
    for direction in range(4):
        u, steps, into, out = (_in_order(t, direction) for t in (x, dt[:, direction], B[:, direction], C[:, direction]))
        y, _ = selective_scan(u, steps, A[direction], into, out, backend="chunked")
        total = total + _at_cells(y, rows, columns, direction)
    return total


def _in_order(t: Tensor, direction: int) -> Tensor:
    """(b, i, j, ...) -> (b, l, ...)."""
    if direction % 2:
        t = t.transpose(1, 2)
    t = t.flatten(1, 2)
    return t.flip(1) if direction >= 2 else t


def _at_cells(y: Tensor, rows: int, columns: int, direction: int) -> Tensor:
    """Undo `_in_order`."""
    if direction >= 2:
        y = y.flip(1)
    if direction % 2:
        return y.unflatten(1, (columns, rows)).transpose(1, 2)
    return y.unflatten(1, (rows, columns))
