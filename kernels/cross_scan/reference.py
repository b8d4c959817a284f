"""The four scans as loops over the cells, the definition for the other paths."""

from __future__ import annotations

import torch
from torch import Tensor


def cells_in_order(rows: int, columns: int, direction: int) -> list[tuple[int, int]]:
    """The cells of a grid in one of the four orders."""
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    if direction % 2:
        cells = [(i, j) for j in range(columns) for i in range(rows)]
    return cells[::-1] if direction >= 2 else cells


def cross_scan_reference(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> Tensor:
    """See `cross_scan`; all tensors but D of one dtype."""
    rows, columns = x.shape[1:3]
    total = torch.zeros_like(x)
    for direction in range(4):
        h = x.new_zeros(x.shape[0], *A.shape[1:])
        found = {}
        for i, j in cells_in_order(rows, columns, direction):
            step = dt[:, direction, i, j, :, None]
            h = torch.exp(step * A[direction]) * h + step * x[:, i, j, :, None] * B[:, direction, i, j, None]
            found[i, j] = (C[:, direction, i, j, None] * h).sum(-1)
        grid = [found[i, j] for i in range(rows) for j in range(columns)]
        if grid:
            total = total + torch.stack(grid, dim=1).view_as(x)
        if D is not None:
            total = total + D[direction].to(x.dtype) * x
    return total
