"""`rms_norm` and `rounded_layer_norm`, each in one kernel: read, norm, round and write once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import operator
from ..triton_utils import INTERPRETED, last_contiguous, next_power_of_2, on_device, quick


@quick
@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, y_ptr, channels, x_stride, EPS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    ok = c < channels
    weight = tl.load(weight_ptr + c, mask=ok, other=0.0)
    x = tl.load(x_ptr + row * x_stride + c, mask=ok, other=0.0).to(weight.dtype).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / channels + EPS)
    tl.store(y_ptr + row * channels + c, x * scale * weight.to(tl.float32), mask=ok)


@operator("rms_norm_triton")
@replayed
def rms_norm_triton(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `rms_norm`; no float64."""
    flat, weight = x.reshape(-1, x.shape[-1]), weight.contiguous()
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    y = torch.empty(x.shape, dtype=weight.dtype, device=x.device)
    block = next_power_of_2(x.shape[-1])
    with on_device(x):
        _rms_norm_kernel[(flat.shape[0],)](
            flat, weight, y, x.shape[-1], flat.stride(0), EPS=eps, BLOCK=block, num_warps=4 if block <= 2048 else 8
        )
    return y


@torch.library.register_fake("ssm::rms_norm_triton")
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=weight.dtype, device=x.device)


@quick
@triton.jit(do_not_specialize=["rows"])
def _layer_norm_kernel(
    x_ptr,
    added_ptr,
    weight_ptr,
    bias_ptr,
    total_ptr,
    y_ptr,
    rows,
    channels,
    x_stride,
    added_stride,
    ADD: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    c = tl.arange(0, BLOCK)[None, :]
    ok = (row < rows) & (c < channels)
    x = tl.load(x_ptr + row * x_stride + c, mask=ok, other=0.0)
    if ADD:
        x += tl.load(added_ptr + row * added_stride + c, mask=ok, other=0.0).to(tl.float32)
        tl.store(total_ptr + row * channels + c, x, mask=ok)
    x = tl.where(c < channels, x - (tl.sum(x, axis=1) / channels)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / channels + EPS)
    weight = tl.load(weight_ptr + c, mask=c < channels, other=0.0)
    bias = tl.load(bias_ptr + c, mask=c < channels, other=0.0)
    tl.store(y_ptr + row * channels + c, x * scale[:, None] * weight + bias, mask=ok)


@operator("layer_norm_triton")
@replayed
def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """See `rounded_layer_norm`; float32 in."""
    y = torch.empty(x.shape, dtype=dtype, device=x.device)
    _layer_norm(x, None, weight, bias, eps, None, y)
    return y


@torch.library.register_fake("ssm::layer_norm_triton")
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


@operator("add_layer_norm_triton")
@replayed
def add_layer_norm_triton(
    x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `add_rounded_layer_norm`; `x` float32."""
    total, y = torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=dtype, device=x.device)
    _layer_norm(x, added, weight, bias, eps, total, y)
    return total, y


@torch.library.register_fake("ssm::add_layer_norm_triton")
def _(x: Tensor, added: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(x.shape, dtype=dtype, device=x.device)


def _layer_norm(
    x: Tensor, added: Tensor | None, weight: Tensor, bias: Tensor, eps: float, total: Tensor | None, y: Tensor
) -> None:
    channels = x.shape[-1]
    flat = last_contiguous(x.reshape(-1, channels))
    other = flat if added is None else last_contiguous(added.reshape(-1, channels))
    rows = flat.shape[0]
    block = next_power_of_2(channels)
    block_r = max(1, min(next_power_of_2(rows), (16384 if INTERPRETED else 2048) // block))
    with on_device(x):
        _layer_norm_kernel[(-(-rows // block_r),)](
            flat, other, weight.contiguous(), bias.contiguous(), total, y, rows, channels, flat.stride(0),
            other.stride(0), ADD=added is not None, EPS=eps, BLOCK_R=block_r, BLOCK=block,
            num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip
