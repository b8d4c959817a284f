"""The norm in plain PyTorch; torch.compile makes one kernel of it.

For the gradient only the inputs are kept, a quarter of what the single operations would keep.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..transforms import apply


def gated_norm_chunked(
    x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    """See `gated_norm`; x, z (r, d), weight (d,) in the dtype to compute in."""
    if torch.compiler.is_compiling():
        return _norm(x, z, weight, eps, group_size, norm_before_gate)
    return apply(_Norm, x, z, weight, eps, group_size, norm_before_gate)


def _norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    gate = F.silu(z.to(weight.dtype))
    u = x.to(weight.dtype)
    if not norm_before_gate:
        u = u * gate
    groups = u.unflatten(-1, (-1, group_size))
    u = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2) * weight
    if norm_before_gate:
        u = u * gate
    return u.to(x.dtype)


class _Norm(torch.autograd.Function):
    """The norm, computed again for its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, z: Tensor, weight: Tensor, *options: Any) -> Tensor:
        return _norm(x, z, weight, *options)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.eps, ctx.group_size, ctx.norm_before_gate = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        options = {name: getattr(ctx, name) for name in ("eps", "group_size", "norm_before_gate")}
        return *torch.func.vjp(functools.partial(_norm, **options), *ctx.saved_tensors)[1](dy), None, None, None
