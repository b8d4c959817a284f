"""One position of `ssd` in one kernel that reads each state once and writes it once, in place."""

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
def _ssd_step_kernel(
    x_ptr, log_decay_ptr, B_ptr, C_ptr, weight_ptr, D_ptr, index_ptr, state_ptr, y_ptr,
    heads, heads_per_group, headdim, states, x_stride_b, B_stride_b, C_stride_b, D_stride_b,
    WEIGHTED: tl.constexpr, HAS_D: tl.constexpr, INDEXED: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // heads).to(tl.int64), tl.program_id(0) % heads
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    n = tl.arange(0, BLOCK_N)
    slot = row
    if INDEXED:
        slot = tl.load(index_ptr + row).to(tl.int64)
    real = slot >= 0  # else the row is padding
    p_ok, n_ok = p < headdim, n < states
    ok = p_ok[:, None] & n_ok[None, :]
    at = state_ptr + ((slot * heads + head) * headdim + p[:, None]) * states + n[None, :]
    h = tl.load(at, mask=ok & real, other=0.0).to(ACC)
    maps = head // heads_per_group * states + n
    B = tl.load(B_ptr + row * B_stride_b + maps, mask=n_ok, other=0.0).to(ACC)
    C = tl.load(C_ptr + row * C_stride_b + maps, mask=n_ok, other=0.0).to(ACC)
    x = tl.load(x_ptr + row * x_stride_b + head * headdim + p, mask=p_ok, other=0.0).to(ACC)
    decay = tl.exp(tl.load(log_decay_ptr + row * heads + head).to(ACC))
    v = x
    if WEIGHTED:
        v = x * tl.load(weight_ptr + row * heads + head).to(ACC)
    h = decay * h + v[:, None] * B[None, :]
    tl.store(at, h, mask=ok & real)
    y = tl.sum(h * C[None, :], axis=1)
    if HAS_D:
        y += tl.load(D_ptr + row * D_stride_b + head).to(ACC) * x
    tl.store(y_ptr + (row * heads + head) * headdim + p, tl.where(real, y, 0.0), mask=p_ok)


@operator("ssd_step_triton", mutates=("state",))
@replayed
def ssd_step_triton(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    state_index: Tensor | None,
    double: bool,
) -> Tensor:
    """See `ssd_step_`; the state is contiguous. `double`: sums in float64."""
    batch, heads, headdim = x.shape
    groups, states = B.shape[1:]
    x, B, C = (t if t[0].is_contiguous() else t.contiguous() for t in (x, B, C))
    log_decay = log_decay.contiguous()
    weight, D, state_index = (None if t is None else t.contiguous() for t in (weight, D, state_index))
    y = x.new_empty(batch, heads, headdim)
    block_n = next_power_of_2(states)
    block_p = min(next_power_of_2(headdim), max(1, 2048 // block_n))
    with on_device(x):
        _ssd_step_kernel[(batch * heads, cdiv(headdim, block_p))](
            x, log_decay, B, C, weight, D, state_index, state, y,
            heads, heads // groups, headdim, states, x.stride(0), B.stride(0), C.stride(0),
            0 if D is None or D.dim() == 1 else heads,
            WEIGHTED=weight is not None, HAS_D=D is not None, INDEXED=state_index is not None,
            ACC=tl.float64 if double else tl.float32, BLOCK_P=block_p, BLOCK_N=block_n,
        )  # fmt: skip
    return y


@torch.library.register_fake("ssm::ssd_step_triton")
def _(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    state_index: Tensor | None,
    double: bool,
) -> Tensor:
    return x.new_empty(x.shape)


@quick
@triton.jit
def _ssd_rates_kernel(
    raw_ptr, bias_ptr, A_log_ptr, dt_ptr, log_decay_ptr, heads, raw_stride,
    LIMITED: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    ok = h < heads
    raw = tl.load(raw_ptr + row * raw_stride + h, mask=ok, other=0.0).to(tl.float32)
    raw += tl.load(bias_ptr + h, mask=ok, other=0.0).to(tl.float32)
    # 1 + e rounds e; what its logarithm lost comes back by the ratio of e to its rounded value.
    e = tl.exp(tl.where(raw > 20.0, 20.0, raw))
    rounded = (1.0 + e) - 1.0
    log1p = tl.where(rounded == 0.0, e, tl.log(1.0 + e) * (e / rounded))
    dt = tl.where(raw > 20.0, raw, log1p)
    # A comparison with NaN is false, so that one stays in its place.
    if LIMITED:
        dt = tl.where(dt < LOW, LOW, tl.where(dt > HIGH, HIGH, dt))
    A = tl.exp(tl.load(A_log_ptr + h, mask=ok, other=0.0).to(tl.float32))
    tl.store(dt_ptr + row * heads + h, dt, mask=ok)
    tl.store(log_decay_ptr + row * heads + h, -dt * A, mask=ok)


@operator("ssd_rates_triton")
@replayed
def ssd_rates_triton(raw: Tensor, bias: Tensor, A_log: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """See `ssd_rates`, in float32."""
    flat = raw.reshape(-1, raw.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    bias, A_log = bias.contiguous(), A_log.contiguous()
    rows, heads = flat.shape
    dt, log_decay = (torch.empty(raw.shape, dtype=torch.float32, device=raw.device) for _ in range(2))
    with on_device(raw):
        _ssd_rates_kernel[(rows,)](
            flat, bias, A_log, dt, log_decay, heads, flat.stride(0),
            LIMITED=low > 0 or high < float("inf"), LOW=low, HIGH=high,
            BLOCK=next_power_of_2(heads),
        )  # fmt: skip
    return dt, log_decay


@torch.library.register_fake("ssm::ssd_rates_triton")
def _(raw: Tensor, bias: Tensor, A_log: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    return raw.new_empty(raw.shape, dtype=torch.float32), raw.new_empty(raw.shape, dtype=torch.float32)
