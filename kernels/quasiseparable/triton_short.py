"""Hydra's product for short rows in Triton, without gradients: no states, only four vectors between two kernels.

    y_t = sum_{s<t} (C^f_{t-1}.B^f_s) 2^{r^f_t + c^f_s} x_s + sum_{s>t} (C^b_{t+1}.B^b_s) 2^{r^b_t + c^b_s} x_s
        + diag_t x_t
    r^f_t = u_{t-1},  c^f_s = log2(dt_s) - u_s,  u the sum of log2-decays from the left up to and with a position
    r^b_t = -v_t,     c^b_s = log2(dt_s) + v_{s-1},  v the same sum of the other side's decays

One kernel makes the vectors from raw steps; the other one works like attention, on the rows of a block and a few heads
that share the products of C and B. `triton_blocks` calls them for pieces of longer rows too, with the states that enter
a piece from both sides.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

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


TILE = Tile(64, 16, 4, 4, 3)


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
    """Log2-decays, their inclusive sums, and the steps, (positions, heads)."""
    dt = _softplus(
        tl.load(dt_ptr + t[:, None] * stride + h[None, :], mask=ok, other=0.0).to(tl.float32) + bias[None, :]
    )
    decay = tl.where(ok, dt * rate[None, :], 0.0)
    # 2 to this is zero; stronger decays would leave no digits for the others, or infinite sums without a difference.
    decay = tl.where(decay < -256.0, -256.0, decay)
    return decay, tl.cumsum(decay, 0), dt


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads"])
def _vectors_kernel(
    dt_f_ptr,
    dt_b_ptr,
    bias_ptr,
    A_log_ptr,
    out_ptr,
    steps_ptr,
    batch,
    length,
    heads,
    stride_b,
    stride_t,
    LONGEST: tl.constexpr,
    BLOCK_H: tl.constexpr,
    STEPS: tl.constexpr,
):
    """(4, b, pieces, h, LONGEST): r and c of both sides in each piece; beyond the row c is the logarithm of 0.

    With STEPS also natural decays and steps, each forward and backward, (4, b, l, h).
    """
    blocks = tl.cdiv(heads, BLOCK_H)
    pieces = tl.cdiv(length, LONGEST)
    place = (tl.program_id(0) // blocks).to(tl.int64)  # of the piece among those of all rows
    row = place // pieces
    h = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    t = tl.arange(0, LONGEST)
    begin = (place % pieces * LONGEST).to(tl.int32)
    h_ok = h < heads
    ok = (t < length - begin)[:, None] & h_ok[None, :]
    bias = tl.load(bias_ptr + h, mask=h_ok, other=0.0).to(tl.float32)
    rate = -1.4426950408889634 * tl.exp(tl.load(A_log_ptr + h, mask=h_ok, other=0.0).to(tl.float32))
    start = row * stride_b + begin.to(tl.int64) * stride_t
    decay_f, sum_f, step_f = _vectors(dt_f_ptr + start, bias, rate, t, h, ok, stride_t)
    decay_b, sum_b, step_b = _vectors(dt_b_ptr + start, bias, rate, t, h, ok, stride_t)
    out = out_ptr + place * heads * LONGEST + h[None, :] * LONGEST + t[:, None]
    one = tl.cast(batch, tl.int64) * pieces * heads * LONGEST
    h_ok = h_ok[None, :] & (t >= 0)[:, None]
    tl.store(out, sum_f - decay_f, mask=h_ok)
    tl.store(out + one, tl.where(ok, tl.log2(step_f) - sum_f, float("-inf")), mask=h_ok)
    tl.store(out + 2 * one, -sum_b, mask=h_ok)
    tl.store(out + 3 * one, tl.where(ok, tl.log2(step_b) + (sum_b - decay_b), float("-inf")), mask=h_ok)
    if STEPS:
        steps = steps_ptr + (row * length + begin) * heads + h[None, :] + t[:, None] * heads
        one = tl.cast(batch, tl.int64) * length * heads
        tl.store(steps, decay_f * 0.6931471805599453, mask=ok)
        tl.store(steps + one, decay_b * 0.6931471805599453, mask=ok)
        tl.store(steps + 2 * one, step_f, mask=ok)
        tl.store(steps + 3 * one, step_b, mask=ok)


@triton.jit
def _rows(ptr, position, ok, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """[positions, BLOCK], zero beyond the row and the width."""
    column = tl.arange(0, BLOCK)
    mask = ok[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(ptr + position[:, None] * stride + column[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _from_state(ptr, C, factor, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """What a state (p, n) adds to the rows that read it."""
    state = _rows(ptr, tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_P) < P, N, N, BLOCK_N, C.dtype)
    return tl.dot(C, tl.trans(state)) * factor[:, None]


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
    left_ptr,
    right_ptr,
    y_ptr,
    batch,
    length,
    heads,
    repeats,
    x_stride_b,
    x_stride_t,
    map_stride_b,
    map_stride_t,
    diag_stride,
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
    STATES: tl.constexpr,
):
    """Outputs of a block of rows.

    With STATES rows are in pieces of LONGEST, and states (b, h, pieces, p, n) enter each from the left and the right.
    """
    head_blocks = heads // HEADS
    row_blocks = tl.cdiv(length, ROWS)
    head = tl.program_id(0) % head_blocks * HEADS
    first = tl.program_id(0) // head_blocks % row_blocks * ROWS
    row = (tl.program_id(0) // head_blocks // row_blocks).to(tl.int64)
    t = first + tl.arange(0, ROWS)
    piece = 0
    pieces = 1
    if STATES:
        piece = first // LONGEST
        pieces = tl.cdiv(length, LONGEST)
    begin = piece * LONGEST
    end = tl.minimum(begin + LONGEST, length)
    maps = row * map_stride_b + (head // repeats) * N
    C_f = _rows(C_f_ptr + maps, t - 1, (t > 0) & (t <= length), map_stride_t, N, BLOCK_N, DOT)
    C_b = _rows(C_b_ptr + maps, t + 1, t + 1 < length, map_stride_t, N, BLOCK_N, DOT)
    one = tl.cast(batch, tl.int64) * pieces * heads * LONGEST
    vectors = vectors_ptr + ((row * pieces + piece) * heads + head) * LONGEST
    x_ptr += row * x_stride_b + head * P
    totals = ()
    rows_f = ()
    rows_b = ()
    edges_f = ()
    edges_b = ()
    factors_f = ()
    factors_b = ()
    for i in tl.static_range(HEADS):
        row_f = tl.load(vectors + i * LONGEST + (t - begin))
        row_b = tl.load(vectors + i * LONGEST + 2 * one + (t - begin))
        total = tl.zeros([ROWS, BLOCK_P], tl.float32)
        if STATES:
            state = ((row * heads + head + i) * pieces + piece) * (P * N)
            # Beyond a row the sums stay what they are at its end.
            all_b = tl.load(vectors + i * LONGEST + 2 * one + (LONGEST - 1))
            total += _from_state(left_ptr + state, C_f, tl.exp2(row_f), P, N, BLOCK_P, BLOCK_N)
            total += _from_state(right_ptr + state, C_b, tl.exp2(row_b - all_b), P, N, BLOCK_P, BLOCK_N)
        totals = totals + (total,)
        # Where all columns lie on one side, factors of rows and columns are 1 and a step at most.
        edge_f = tl.load(vectors + i * LONGEST + (first - begin))
        edge_b = tl.load(vectors + i * LONGEST + 2 * one + (first - begin) + (ROWS - 1))
        rows_f = rows_f + (row_f,)
        rows_b = rows_b + (row_b,)
        edges_f = edges_f + (edge_f,)
        edges_b = edges_b + (edge_b,)
        factors_f = factors_f + (tl.exp2(row_f - edge_f),)
        factors_b = factors_b + (tl.exp2(row_b - edge_b),)
    for start in tl.range(begin, first, COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        scores = tl.dot(C_f, tl.trans(_rows(B_f_ptr + maps, s, ok, map_stride_t, N, BLOCK_N, DOT)))
        found = ()
        for i in tl.static_range(HEADS):
            x = _rows(x_ptr + i * P, s, ok, x_stride_t, P, BLOCK_P, DOT)
            column = tl.load(vectors + i * LONGEST + one + (s - begin))
            factor = factors_f[i][:, None] * tl.exp2(column + edges_f[i])[None, :]
            found = found + (tl.dot((scores * factor).to(DOT), x, totals[i]),)
        totals = found
    for start in tl.range(first, tl.minimum(first + ROWS, end), COLUMNS, num_stages=STAGES):
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
            column_f = tl.load(vectors + i * LONGEST + one + (s - begin))
            column_b = tl.load(vectors + i * LONGEST + 3 * one + (s - begin))
            exponent_f = rows_f[i][:, None] + column_f[None, :]
            exponent_b = rows_b[i][:, None] + column_b[None, :]
            exponent = tl.where(linked, tl.where(before, exponent_f, exponent_b), float("-inf"))
            found = found + (tl.dot((scores * tl.exp2(exponent)).to(DOT), x, totals[i]),)
        totals = found
    for start in tl.range(first + ROWS, end, COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        scores = tl.dot(C_b, tl.trans(_rows(B_b_ptr + maps, s, ok, map_stride_t, N, BLOCK_N, DOT)))
        found = ()
        for i in tl.static_range(HEADS):
            x = _rows(x_ptr + i * P, s, ok, x_stride_t, P, BLOCK_P, DOT)
            column = tl.load(vectors + i * LONGEST + 3 * one + (s - begin))
            factor = factors_b[i][:, None] * tl.exp2(column + edges_b[i])[None, :]
            found = found + (tl.dot((scores * factor).to(DOT), x, totals[i]),)
        totals = found
    t_ok = t < length
    p = tl.arange(0, BLOCK_P)
    y_ok = t_ok[:, None] & (p < P)[None, :]
    place = row * length + t.to(tl.int64)
    for i in tl.static_range(HEADS):
        x = _rows(x_ptr + i * P, t, t_ok, x_stride_t, P, BLOCK_P, tl.float32)
        diagonal = tl.load(diag_ptr + place * diag_stride + head + i, mask=t_ok, other=0.0).to(tl.float32)
        y = totals[i] + (diagonal + tl.load(D_ptr + head + i))[:, None] * x
        tl.store(y_ptr + (place * heads + head + i)[:, None] * P + p[None, :], y, mask=y_ok)


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
    block_h = 4
    with on_device(x):
        _vectors_kernel[(batch * cdiv(nheads, block_h),)](
            dt_f, dt_b, dt_bias.contiguous(), A_log.contiguous(), vectors, None, batch, length, nheads,
            *dt_f.stride()[:2], LONGEST=LONGEST, BLOCK_H=block_h, STEPS=False,
        )  # fmt: skip
        _mix_kernel[(batch * cdiv(length, tile.rows) * (nheads // heads),)](
            x, *maps, vectors, diag.contiguous(), D.contiguous(), None, None, y, batch, length, nheads, repeats,
            *x.stride()[:2], *maps[0].stride()[:2], nheads,
            **mix_options(x.dtype, headdim, n, tile._replace(heads=heads)), STATES=False,
        )  # fmt: skip
    return y


@functools.cache
def mix_options(dtype: torch.dtype, headdim: int, n: int, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of the second kernel; the heads of the tile are those that a program takes."""
    return {
        "P": headdim,
        "N": n,
        "LONGEST": LONGEST,
        "HEADS": tile.heads,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_P": max(16, next_power_of_2(headdim)),
        "BLOCK_N": max(16, next_power_of_2(n)),
        "DOT": tl.float32 if INTERPRETED else tl.bfloat16 if dtype == torch.bfloat16 else tl.float16,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }
