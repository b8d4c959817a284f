"""Hydra's product for short rows in Triton, without gradients: no states, only four vectors between two kernels.

    y_t = sum_{s<t} (C^f_{t-1}.B^f_s) 2^{r^f_t + c^f_s} x_s + sum_{s>t} (C^b_{t+1}.B^b_s) 2^{r^b_t + c^b_s} x_s
        + diag_t x_t
    r^f_t = u_{t-1},  c^f_s = log2(dt_s) - u_s,  u the sum of log2-decays from the left up to and with a position
    r^b_t = -v_t,     c^b_s = log2(dt_s) + v_{s-1},  v the same sum of the other side's decays

One kernel makes the vectors from raw steps; the other one works like attention, on the rows of a block and a few heads
that share the products of C and B.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transforms import operator
from ..triton_utils import INTERPRETED, cdiv, next_power_of_2, on_device, quick

LONGEST = 256


class Tile(NamedTuple):
    """Compile-time choices of the second kernel."""

    rows: int
    columns: int  # a divisor of `rows`
    heads: int  # at most, a divisor of the heads of a group is taken
    warps: int
    stages: int


TILE = Tile(64, 32, 2, 4, 3)


@triton.jit
def _softplus(x):
    z = tl.exp(tl.minimum(x, 20.0))
    one_more = 1.0 + z
    rounded = one_more - 1.0
    # log(1 + z) loses the digits of a small z; what rounding took from it comes back as a factor.
    small = tl.where(rounded == 0.0, z, tl.log(one_more) * (z / tl.where(rounded == 0.0, 1.0, rounded)))
    return tl.where(x > 20.0, x, small)


@triton.jit
def _vectors(dt_ptr, bias, rate, t, h, ok, stride):
    """Log2-decays, their inclusive sums, and log2 of the steps, (positions, heads)."""
    dt = _softplus(
        tl.load(dt_ptr + t[:, None] * stride + h[None, :], mask=ok, other=0.0).to(tl.float32) + bias[None, :]
    )
    decay = tl.where(ok, dt * rate[None, :], 0.0)
    # 2 to this is zero; stronger decays would leave no digits for the others, or infinite sums without a difference.
    decay = tl.where(decay < -256.0, -256.0, decay)
    return decay, tl.cumsum(decay, 0), tl.log2(dt)


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads"])
def _vectors_kernel(
    dt_f_ptr,
    dt_b_ptr,
    bias_ptr,
    A_log_ptr,
    out_ptr,
    batch,
    length,
    heads,
    stride_b,
    stride_t,
    LONGEST: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """(4, b, h, LONGEST): r and c of both sides; beyond the row r is 0 and c the logarithm of 0."""
    blocks = tl.cdiv(heads, BLOCK_H)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    h = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    t = tl.arange(0, LONGEST)
    h_ok = h < heads
    ok = (t < length)[:, None] & h_ok[None, :]
    bias = tl.load(bias_ptr + h, mask=h_ok, other=0.0).to(tl.float32)
    rate = -1.4426950408889634 * tl.exp(tl.load(A_log_ptr + h, mask=h_ok, other=0.0).to(tl.float32))
    decay_f, sum_f, step_f = _vectors(dt_f_ptr + row * stride_b, bias, rate, t, h, ok, stride_t)
    decay_b, sum_b, step_b = _vectors(dt_b_ptr + row * stride_b, bias, rate, t, h, ok, stride_t)
    out = out_ptr + row * heads * LONGEST + h[None, :] * LONGEST + t[:, None]
    one = tl.cast(batch, tl.int64) * heads * LONGEST
    h_ok = h_ok[None, :] & (t >= 0)[:, None]
    tl.store(out, tl.where(ok, sum_f - decay_f, 0.0), mask=h_ok)
    tl.store(out + one, tl.where(ok, step_f - sum_f, float("-inf")), mask=h_ok)
    tl.store(out + 2 * one, tl.where(ok, -sum_b, 0.0), mask=h_ok)
    tl.store(out + 3 * one, tl.where(ok, step_b + (sum_b - decay_b), float("-inf")), mask=h_ok)


@triton.jit
def _rows(ptr, position, ok, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """[positions, BLOCK], zero beyond the row and the width."""
    column = tl.arange(0, BLOCK)
    mask = ok[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(ptr + position[:, None] * stride + column[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _add(total, scores, row, column, x, linked, DOT: tl.constexpr, MASKED: tl.constexpr):
    exponent = row[:, None] + column[None, :]
    if MASKED:
        exponent = tl.where(linked, exponent, float("-inf"))
    return tl.dot((scores * tl.exp2(exponent)).to(DOT), x, total)


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads", "repeats"])
def _mix_kernel(
    x_ptr,
    B_f_ptr,
    C_f_ptr,
    B_b_ptr,
    C_b_ptr,
    vectors_ptr,
    diag_ptr,
    D_ptr,
    y_ptr,
    batch,
    length,
    heads,
    repeats,
    x_stride_b,
    x_stride_t,
    map_stride_b,
    map_stride_t,
    P: tl.constexpr,
    N: tl.constexpr,
    LONGEST: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    head_blocks = heads // HEADS
    row_blocks = tl.cdiv(length, ROWS)
    head = tl.program_id(0) % head_blocks * HEADS
    first = tl.program_id(0) // head_blocks % row_blocks * ROWS
    row = (tl.program_id(0) // head_blocks // row_blocks).to(tl.int64)
    t = first + tl.arange(0, ROWS)
    maps = row * map_stride_b + (head // repeats) * N
    C_f = _rows(C_f_ptr + maps, t - 1, (t > 0) & (t <= length), map_stride_t, N, BLOCK_N, DOT)
    C_b = _rows(C_b_ptr + maps, t + 1, t + 1 < length, map_stride_t, N, BLOCK_N, DOT)
    one = tl.cast(batch, tl.int64) * heads * LONGEST
    vectors = vectors_ptr + (row * heads + head) * LONGEST
    x_ptr += row * x_stride_b + head * P
    totals = ()
    rows_f = ()
    rows_b = ()
    for i in tl.static_range(HEADS):
        totals = totals + (tl.zeros([ROWS, BLOCK_P], tl.float32),)
        rows_f = rows_f + (tl.load(vectors + i * LONGEST + t),)
        rows_b = rows_b + (tl.load(vectors + i * LONGEST + 2 * one + t),)
    for start in tl.range(0, first, COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        scores = tl.dot(C_f, tl.trans(_rows(B_f_ptr + maps, s, ok, map_stride_t, N, BLOCK_N, DOT)))
        found = ()
        for i in tl.static_range(HEADS):
            x = _rows(x_ptr + i * P, s, ok, x_stride_t, P, BLOCK_P, DOT)
            column = tl.load(vectors + i * LONGEST + one + s)
            found = found + (_add(totals[i], scores, rows_f[i], column, x, ok, DOT, False),)
        totals = found
    for start in tl.range(first, tl.minimum(first + ROWS, length), COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        before = s[None, :] < t[:, None]
        linked = before | (s[None, :] > t[:, None])
        scores_f = tl.dot(C_f, tl.trans(_rows(B_f_ptr + maps, s, ok, map_stride_t, N, BLOCK_N, DOT)))
        scores_b = tl.dot(C_b, tl.trans(_rows(B_b_ptr + maps, s, ok, map_stride_t, N, BLOCK_N, DOT)))
        scores = tl.where(before, scores_f, scores_b)
        found = ()
        for i in tl.static_range(HEADS):
            x = _rows(x_ptr + i * P, s, ok, x_stride_t, P, BLOCK_P, DOT)
            column_f = tl.load(vectors + i * LONGEST + one + s)
            column_b = tl.load(vectors + i * LONGEST + 3 * one + s)
            exponent_f = rows_f[i][:, None] + column_f[None, :]
            exponent_b = rows_b[i][:, None] + column_b[None, :]
            exponent = tl.where(linked, tl.where(before, exponent_f, exponent_b), float("-inf"))
            found = found + (tl.dot((scores * tl.exp2(exponent)).to(DOT), x, totals[i]),)
        totals = found
    for start in tl.range(first + ROWS, length, COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        scores = tl.dot(C_b, tl.trans(_rows(B_b_ptr + maps, s, ok, map_stride_t, N, BLOCK_N, DOT)))
        found = ()
        for i in tl.static_range(HEADS):
            x = _rows(x_ptr + i * P, s, ok, x_stride_t, P, BLOCK_P, DOT)
            column = tl.load(vectors + i * LONGEST + 3 * one + s)
            found = found + (_add(totals[i], scores, rows_b[i], column, x, ok, DOT, False),)
        totals = found
    t_ok = t < length
    p = tl.arange(0, BLOCK_P)
    y_ok = t_ok[:, None] & (p < P)[None, :]
    place = row * length * heads + t.to(tl.int64) * heads + head
    for i in tl.static_range(HEADS):
        x = _rows(x_ptr + i * P, t, t_ok, x_stride_t, P, BLOCK_P, tl.float32)
        diagonal = tl.load(diag_ptr + place + i, mask=t_ok, other=0.0).to(tl.float32) + tl.load(D_ptr + head + i)
        y = totals[i] + diagonal[:, None] * x
        tl.store(y_ptr + (place + i)[:, None] * P + p[None, :], y, mask=y_ok)


@operator("quasiseparable_short_triton")
def quasiseparable_short(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    B_f: Tensor,
    C_f: Tensor,
    B_b: Tensor,
    C_b: Tensor,
    diag: Tensor,
    D: Tensor,
) -> Tensor:
    """See `quasiseparable_from_steps`; x and maps of one 16-bit dtype, at most `LONGEST` positions."""
    return mix(x, dt_f, dt_b, dt_bias, A_log, (B_f, C_f, B_b, C_b), diag, D, TILE)


@torch.library.register_fake("ssm::quasiseparable_short_triton")
def _(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def mix(
    x: Tensor,
    dt_f: Tensor,
    dt_b: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    maps: tuple[Tensor, ...],
    diag: Tensor,
    D: Tensor,
    tile: Tile,
) -> Tensor:
    """`quasiseparable_short` with a tile."""
    (batch, length, nheads, headdim), (groups, n) = x.shape, maps[0].shape[2:]
    # Offsets in a row have 31 bits.
    if x.stride()[2:] != (headdim, 1) or x.stride(1) >= 2**23:
        x = x.contiguous()
    if len({one.stride() for one in maps}) > 1 or maps[0].stride()[2:] != (n, 1) or maps[0].stride(1) >= 2**23:
        maps = tuple(one.contiguous() for one in maps)
    if dt_f.stride() != dt_b.stride() or dt_f.stride(2) != 1 or dt_f.stride(1) >= 2**23:
        dt_f, dt_b = dt_f.contiguous(), dt_b.contiguous()
    repeats = nheads // groups
    heads = next(one for one in range(tile.heads, 0, -1) if repeats % one == 0)
    vectors = torch.empty(4, batch, nheads, LONGEST, dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    kind = tl.float32 if INTERPRETED else tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16
    block_h = 4
    with on_device(x):
        _vectors_kernel[(batch * cdiv(nheads, block_h),)](
            dt_f, dt_b, dt_bias.contiguous(), A_log.contiguous(), vectors, batch, length, nheads, *dt_f.stride()[:2],
            LONGEST=LONGEST, BLOCK_H=block_h,
        )  # fmt: skip
        _mix_kernel[(batch * cdiv(length, tile.rows) * (nheads // heads),)](
            x, *maps, vectors, diag.contiguous(), D.contiguous(), y, batch, length, nheads, repeats, *x.stride()[:2],
            *maps[0].stride()[:2], P=headdim, N=n, LONGEST=LONGEST, HEADS=heads, ROWS=tile.rows, COLUMNS=tile.columns,
            BLOCK_P=max(16, next_power_of_2(headdim)), BLOCK_N=max(16, next_power_of_2(n)), DOT=kind,
            STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
    return y
