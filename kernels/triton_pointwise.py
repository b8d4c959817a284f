"""`swiglu` and `rotate_heads`: read once, write once; float32 inside."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .replay import replayed
from .transforms import operator
from .triton_utils import on_device, quick


@quick
@triton.jit
def _swiglu_kernel(x_ptr, y_ptr, width, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = c < width
    value = tl.load(x_ptr + row * x_stride + c, mask=ok, other=0.0).to(tl.float32)
    gate = tl.load(x_ptr + row * x_stride + width + c, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * width + c, value * gate * tl.sigmoid(gate), mask=ok)


@operator("swiglu_triton")
@replayed
def swiglu_triton(x: Tensor) -> Tensor:
    """See `swiglu`; no float64."""
    flat = x.reshape(-1, x.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    width = x.shape[-1] // 2
    y = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    block = min(1024, triton.next_power_of_2(width))
    with on_device(x):
        _swiglu_kernel[(flat.shape[0], triton.cdiv(width, block))](flat, y, width, flat.stride(0), BLOCK=block)
    return y


@torch.library.register_fake("ssm::swiglu_triton")
def _(x: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@quick
@triton.jit(do_not_specialize=["length"])
def _rotate_heads_kernel(
    x_ptr, cos_ptr, sin_ptr, y_ptr, length, heads, x_stride_b, x_stride_t, angle_stride_b,
    P: tl.constexpr, R: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_REST: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0)
    row, t = (place // length).to(tl.int64), (place % length).to(tl.int64)
    x_ptr += row * x_stride_b + t * x_stride_t
    y_ptr += (row * length + t) * heads * P
    angle = row * angle_stride_b + t * R
    h, r = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_R)[None, :]
    ok = (h < heads) & (r < R)
    cos = tl.load(cos_ptr + angle + r, mask=r < R, other=0.0)
    sin = tl.load(sin_ptr + angle + r, mask=r < R, other=0.0)
    first = h * P + (2 * r if INTERLEAVED else r)
    second = first + (1 if INTERLEAVED else R)
    a = tl.load(x_ptr + first, mask=ok, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + second, mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + first, a * cos - b * sin, mask=ok)
    tl.store(y_ptr + second, a * sin + b * cos, mask=ok)
    if BLOCK_REST > 0:
        rest = 2 * R + tl.arange(0, BLOCK_REST)[None, :]
        ok = (h < heads) & (rest < P)
        tl.store(y_ptr + h * P + rest, tl.load(x_ptr + h * P + rest, mask=ok, other=0.0), mask=ok)


@operator("rotate_heads_triton")
@replayed
def rotate_heads_triton(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """See `rotate_heads`; float32 angles."""
    batch, length, heads, width = x.shape
    dense = x.stride(3) == 1 and x.stride(2) == width
    x = x if dense else x.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    half = cos.shape[2]
    rest = width - 2 * half
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device(x):
        _rotate_heads_kernel[(batch * length,)](
            x, cos, sin, y, length, heads, x.stride(0), x.stride(1), cos.stride(0) if cos.shape[0] > 1 else 0,
            P=width, R=half, INTERLEAVED=interleaved, BLOCK_H=triton.next_power_of_2(heads),
            BLOCK_R=triton.next_power_of_2(half), BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        )  # fmt: skip
    return y


@torch.library.register_fake("ssm::rotate_heads_triton")
def _(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
