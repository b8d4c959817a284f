"""The norm row by row and group by group."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_norm_reference(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """See `gated_norm`; x, z (r, d), weight (d,) in the dtype to compute in."""
    rows = []
    for x_row, z_row in zip(x.to(weight.dtype), z.to(weight.dtype)):
        gate = z_row / (1 + torch.exp(-z_row))
        groups = []
        for start in range(0, x_row.shape[0], group_size):
            group = slice(start, start + group_size)
            u = x_row[group] if norm_before_gate else x_row[group] * gate[group]
            u = u / torch.sqrt((u * u).mean() + eps) * weight[group]
            groups.append(u * gate[group] if norm_before_gate else u)
        rows.append(torch.cat(groups))
    return torch.stack(rows).to(x.dtype)
