"""The norm in plain PyTorch; torch.compile makes one kernel of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def gated_norm_chunked(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """See `gated_norm`; x, z (r, d), weight (d,) in the dtype to compute in."""
    gate = F.silu(z.to(weight.dtype))
    u = x.to(weight.dtype)
    if not norm_before_gate:
        u = u * gate
    groups = u.unflatten(-1, (-1, group_size))
    u = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    if norm_before_gate:
        u = u * gate
    return u.to(x.dtype)
