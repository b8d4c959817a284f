"""One position of `causal_conv1d` in one kernel that reads each state once and writes it once, in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import operator
from ..triton_utils import cdiv, next_power_of_2, on_device, quick


@quick
@triton.jit
def _conv_step_kernel(
    x_ptr, weight_ptr, bias_ptr, index_ptr, state_ptr, y_ptr, channels, x_stride_b,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, INDEXED: tl.constexpr, SILU: tl.constexpr, ACC: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot = row
    if INDEXED:
        slot = tl.load(index_ptr + row).to(tl.int64)
    real = slot >= 0  # else the row is padding
    ok = c < channels
    x = tl.load(x_ptr + row * x_stride_b + c, mask=ok, other=0.0)
    at = state_ptr + (slot * channels + c) * (K - 1)
    before = ()
    for i in tl.static_range(K - 1):
        before = before + (tl.load(at + i, mask=ok & real, other=0.0),)
    y = tl.load(weight_ptr + c * K + K - 1, mask=ok, other=0.0).to(ACC) * x.to(ACC)
    for i in tl.static_range(K - 1):
        w = tl.load(weight_ptr + c * K + i, mask=ok, other=0.0).to(ACC)
        y += w * before[i].to(x.dtype).to(ACC)
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=ok, other=0.0).to(ACC)
    if SILU:
        y = y / (1.0 + tl.exp(-y))
    tl.store(y_ptr + row * channels + c, tl.where(real, y, 0.0), mask=ok)
    tl.debug_barrier()  # all that is read has been read
    for i in tl.static_range(K - 1):
        if i < K - 2:
            tl.store(at + i, before[i + 1].to(x.dtype), mask=ok & real)
        else:
            tl.store(at + i, x, mask=ok & real)


@operator("conv_step_triton", mutates=("state",))
@replayed
def conv_step_triton(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state_index: Tensor | None,
    double: bool,
) -> Tensor:
    """See `conv_step_`; the state is contiguous. `double`: sums in float64."""
    batch, channels = x.shape
    x = x if x[0].is_contiguous() else x.contiguous()
    weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
    state_index = None if state_index is None else state_index.contiguous()
    y = x.new_empty(batch, channels)
    block_c = min(next_power_of_2(channels), 128)
    with on_device(x):
        _conv_step_kernel[(batch, cdiv(channels, block_c))](
            x, weight, bias, state_index, state, y, channels, x.stride(0),
            K=weight.shape[1], HAS_BIAS=bias is not None, INDEXED=state_index is not None, SILU=silu,
            ACC=tl.float64 if double else tl.float32, BLOCK_C=block_c,
        )  # fmt: skip
    return y


@torch.library.register_fake("ssm::conv_step_triton")
def _(
    x: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    silu: bool,
    state_index: Tensor | None,
    double: bool,
) -> Tensor:
    return x.new_empty(x.shape)
