"""One position of `selective_scan` in one kernel that reads each state once and writes it once, in place."""

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
def _selective_step_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, index_ptr, state_ptr, y_ptr,
    channels, channels_per_group, states, u_stride_b, dt_stride_b, z_stride_b, B_stride_b, C_stride_b,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, INDEXED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    n = tl.arange(0, BLOCK_N)
    slot = row
    if INDEXED:
        slot = tl.load(index_ptr + row).to(tl.int64)
    real = slot >= 0  # else the row is padding
    d_ok = d < channels
    ok = d_ok[:, None] & (n < states)[None, :]
    of_channel = d[:, None] * states + n[None, :]
    at = state_ptr + slot * channels * states + of_channel
    h = tl.load(at, mask=ok & real, other=0.0).to(ACC)
    A = tl.load(A_ptr + of_channel, mask=ok, other=0.0).to(ACC)
    maps = (d // channels_per_group * states)[:, None] + n[None, :]
    B = tl.load(B_ptr + row * B_stride_b + maps, mask=ok, other=0.0).to(ACC)
    C = tl.load(C_ptr + row * C_stride_b + maps, mask=ok, other=0.0).to(ACC)
    u = tl.load(u_ptr + row * u_stride_b + d, mask=d_ok, other=0.0).to(ACC)
    dt = tl.load(dt_ptr + row * dt_stride_b + d, mask=d_ok, other=0.0).to(ACC)
    h = tl.exp(dt[:, None] * A) * h + (dt * u)[:, None] * B
    tl.store(at, h, mask=ok & real)
    y = tl.sum(h * C, axis=1)
    if HAS_D:
        y += tl.load(D_ptr + d, mask=d_ok, other=0.0).to(ACC) * u
    if HAS_Z:
        z = tl.load(z_ptr + row * z_stride_b + d, mask=d_ok, other=0.0).to(ACC)
        y = y * z / (1.0 + tl.exp(-z))
    tl.store(y_ptr + row * channels + d, tl.where(real, y, 0.0), mask=d_ok)


@operator("selective_step_triton", mutates=("state",))
@replayed
def selective_step_triton(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state_index: Tensor | None,
    double: bool,
) -> Tensor:
    """See `selective_step_`; B and C are (b, g, n), the state is contiguous. `double`: sums in float64."""
    batch, channels = u.shape
    groups, states = B.shape[1:]
    u, dt, B, C = (t if t[0].is_contiguous() else t.contiguous() for t in (u, dt, B, C))
    z = z if z is None or z[0].is_contiguous() else z.contiguous()
    A, D = A.contiguous(), None if D is None else D.contiguous()
    state_index = None if state_index is None else state_index.contiguous()
    y = u.new_empty(batch, channels)
    block_n = next_power_of_2(states)
    block_d = min(next_power_of_2(channels), max(1, 1024 // block_n))
    with on_device(u):
        _selective_step_kernel[(batch, cdiv(channels, block_d))](
            u, dt, A, B, C, D, z, state_index, state, y,
            channels, channels // groups, states, u.stride(0), dt.stride(0), 0 if z is None else z.stride(0),
            B.stride(0), C.stride(0), HAS_D=D is not None, HAS_Z=z is not None, INDEXED=state_index is not None,
            ACC=tl.float64 if double else tl.float32, BLOCK_D=block_d, BLOCK_N=block_n,
        )  # fmt: skip
    return y


@torch.library.register_fake("ssm::selective_step_triton")
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state_index: Tensor | None,
    double: bool,
) -> Tensor:
    return u.new_empty(u.shape)
