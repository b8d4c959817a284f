"""Rotary positions: pairs of channels of each head turned by angles that grow with the position."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_devices, check_floating, check_shapes
from .dispatch import choose
from .transforms import plain_call


def rotate_heads(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False) -> Tensor:
    """Turn pairs of the first 2 r channels of every head: (a, b) -> (a cos - b sin, a sin + b cos).

    Args:
        x: (b, l, h, p).
        cos: Of the angles, (b, l, r) or (1, l, r); float32, or float64 where `x` is.
        sin: Of the angles, likewise.
        interleaved: Pairs are channels 2i and 2i + 1; otherwise i and i + r.

    Returns:
        (b, l, h, p) in the dtype of `x`; channels from 2 r on are left as they are.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree, or heads are narrower than 2 r.

    Differentiable in `x`. Source: Su et al. (2021), section 3.2.
    """
    check_floating(x=x, cos=cos, sin=sin)
    sizes = check_shapes(x=(x, "b l h p"), cos=(cos, "b? l r"), sin=(sin, "b? l r"))
    check_devices(x=x, cos=cos, sin=sin)
    half = sizes["r"]
    if 2 * half > x.shape[3]:
        raise ValueError(f"heads of {x.shape[3]} channels have no {half} pairs to turn.")
    fused = not torch.compiler.is_compiling() and x.numel() > 0 and half > 0 and cos.dtype == torch.float32
    if fused and plain_call(x, cos, sin) and choose("auto", x, op="rotate_heads") == "triton":
        from .triton_pointwise import rotate_heads_triton

        return rotate_heads_triton(x, cos, sin, interleaved)
    turned, rest = x[..., : 2 * half].to(cos.dtype), x[..., 2 * half :]
    cos, sin = cos[:, :, None], sin[:, :, None]
    if interleaved:
        a, b = turned.unflatten(-1, (half, 2)).unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)
    else:
        # [a, b] cos + [b, a] [-sin, sin]: fewer and larger operations than on the halves apart
        turned = turned * torch.cat([cos, cos], dim=-1) + turned.roll(half, -1) * torch.cat([-sin, sin], dim=-1)
    return torch.cat([turned.to(x.dtype), rest], dim=-1)
