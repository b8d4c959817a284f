"""`grid_scan` as a loop over cells, and row by row in plain PyTorch.

With the row above known, a row is a linear recurrence along j: h[j] = a[j] h[j-1] + b[j], where b has what comes from
above, and a call of `linear_scan`. Rows are taken in blocks whose states are formed again in the backward pass, so that
memory is one row in every eight; under `torch.func`, which knows no such blocks, all states are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..linear_scan.op import linear_scan
from ..transforms import transforming

_ROWS = 8


def grid_scan_reference(
    x: Tensor,
    dt1: Tensor,
    A1: Tensor,
    B1: Tensor,
    C: Tensor,
    dt2: Tensor | None,
    A2: Tensor | None,
    B2: Tensor | None,
    mean: bool,
) -> Tensor:
    """y without the skip, (b, i, j, d); all tensors of one dtype."""
    rows, columns = x.shape[1:3]
    zero = x.new_zeros(x.shape[0], *A1.shape)
    line = [zero] * columns  # states of the row above
    found = []
    for i in range(rows):
        left = zero
        for j in range(columns):
            along = torch.exp(dt1[:, i, j, :, None] * A1)
            first = along * left + (dt1[:, i, j] * x[:, i, j])[..., None] * B1[:, i, j, None]
            if mean:
                assert dt2 is not None
                assert A2 is not None
                assert B2 is not None
                down = torch.exp(dt2[:, i, j, :, None] * A2)
                second = down * line[j] + (dt2[:, i, j] * x[:, i, j])[..., None] * B2[:, i, j, None]
                left = first if i == 0 else second if j == 0 else (first + second) / 2
                line[j] = left
            else:
                left = first
                line[j] = along * line[j] + first
            found.append((C[:, i, j, None] * line[j]).sum(-1))
    return torch.stack(found, dim=1).unflatten(1, (rows, columns))


def grid_scan_chunked(
    x: Tensor,
    dt1: Tensor,
    A1: Tensor,
    B1: Tensor,
    C: Tensor,
    dt2: Tensor | None,
    A2: Tensor | None,
    B2: Tensor | None,
    mean: bool,
) -> Tensor:
    """y without the skip, (b, i, j, d); all tensors of one dtype."""
    rows, columns = x.shape[1:3]
    above = x.new_zeros(x.shape[0], columns, *A1.shape)
    found = []
    training = torch.is_grad_enabled() and (torch.compiler.is_compiling() or not transforming())
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        cut = [None if t is None else t[:, part] for t in (x, dt1, B1, C, dt2, B2)]
        arguments: tuple[Any, ...] = (above, start == 0, mean, A1, A2, *cut)
        y, above = checkpoint(_rows, *arguments, use_reentrant=False) if training else _rows(*arguments)
        found.append(y)
    return torch.cat(found, dim=1)


def _rows(
    above: Tensor,
    at_top: bool,
    mean: bool,
    A1: Tensor,
    A2: Tensor | None,
    x: Tensor,
    dt1: Tensor,
    B1: Tensor,
    C: Tensor,
    dt2: Tensor | None,
    B2: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Outputs of some rows and the states (b, j, d, n) of the last one, from those of the row above."""
    found = []
    for i in range(x.shape[1]):
        along = torch.exp(dt1[:, i, ..., None] * A1)
        inputs = (dt1[:, i] * x[:, i])[..., None] * B1[:, i, :, None]
        if not mean:
            above = along * above + _along_row(along, inputs)
        elif at_top and i == 0:
            above = _along_row(along, inputs)
        else:
            assert dt2 is not None
            assert A2 is not None
            assert B2 is not None
            down = torch.exp(dt2[:, i, ..., None] * A2)
            second = down * above + (dt2[:, i] * x[:, i])[..., None] * B2[:, i, :, None]
            half = x.new_full((x.shape[2], 1, 1), 0.5)
            half[0] = 0  # the first column has no left neighbour
            above = _along_row(half * along, half * inputs + (1 - half) * second)
        found.append((C[:, i, :, None] * above).sum(-1))
    return torch.stack(found, dim=1), above


def _along_row(a: Tensor, b: Tensor) -> Tensor:
    """h[j] = a[j] h[j-1] + b[j] along dim 1, from zero."""
    return linear_scan(a.flatten(2), b.flatten(2), backend="chunked")[0].view(b.shape)
