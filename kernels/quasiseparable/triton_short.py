"""Hydra's product for short 16-bit rows in Triton: four vectors, and a kernel that works like attention.

    y_t = sum_{s<t} (C^f_{t-1}.B^f_s) 2^{r^f_t + c^f_s} x_s + sum_{s>t} (C^b_{t+1}.B^b_s) 2^{r^b_t + c^b_s} x_s
        + diag_t x_t
    r^f_t = u_{t-1},  c^f_s = log2(dt_s) - u_s,  u the sum of log2-decays from the left up to and with a position
    r^b_t = -v_t,     c^b_s = log2(dt_s) + v_{s-1},  v the same sum of the other side's decays

One kernel makes the vectors from raw steps; `_mix_kernel` takes the rows of a block and a few heads that share the
products of C and B. Rows that are longer are cut into pieces: see `triton_pieces`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..replay import replayed
from ..transforms import operator
from ..triton_utils import INTERPRETED, cdiv, next_power_of_2, on_device, quick

LONGEST = 256
_PIECE = 128  # positions of a piece of a row that is longer
BLOCK_H = 1  # heads of a program that makes vectors


class Tile(NamedTuple):
    """Compile-time choices of `_mix_kernel`."""

    rows: int
    columns: int  # a divisor of `rows`
    heads: int  # at most, a divisor of the heads of a group is taken
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


TILE = Tile(64, 32, 2, 4, 2, 168)
# Whether a hyperbolic tangent is one instruction: on all NVIDIA devices that Triton serves.
TANH = not INTERPRETED and torch.version.hip is None


def piece_of(length: int) -> int:
    """Positions of the pieces that a row is cut into; `LONGEST`, if there is one."""
    return LONGEST if length <= LONGEST else _PIECE


@triton.jit
def _silu(x, TANH: tl.constexpr):
    """x / (1 + e^-x); TANH: by one instruction, to within 2^-12 |x|. Rounding x to bfloat16 takes up to 2^-9 |x|."""
    if TANH:
        half = 0.5 * x
        asm: tl.constexpr = "tanh.approx.f32 $0, $1;"
        return half * tl.inline_asm_elementwise(asm, "=f,f", [half], tl.float32, is_pure=True, pack=1) + half
    # The square root of a sigmoid: a root takes a third of the instructions of a division.
    root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
    return (x * root) * root


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


@triton.jit
def _write_vectors(
    dt_f_ptr,
    dt_b_ptr,
    bias_ptr,
    A_log_ptr,
    out_ptr,
    ends_ptr,
    steps_ptr,
    place,
    h,
    batch,
    length,
    heads,
    stride_b,
    stride_t,
    PIECE: tl.constexpr,
    ENDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """See `_vectors_kernel`: for heads h of the piece that has number `place` among those of all rows."""
    pieces = tl.cdiv(length, PIECE)
    row = place // pieces
    t = tl.arange(0, PIECE)
    begin = (place % pieces * PIECE).to(tl.int32)
    h_ok = h < heads
    ok = (t < length - begin)[:, None] & h_ok[None, :]
    bias = tl.load(bias_ptr + h, mask=h_ok, other=0.0).to(tl.float32)
    rate = -1.4426950408889634 * tl.exp(tl.load(A_log_ptr + h, mask=h_ok, other=0.0).to(tl.float32))
    start = row * stride_b + begin.to(tl.int64) * stride_t
    decay_f, sum_f, step_f = _vectors(dt_f_ptr + start, bias, rate, t, h, ok, stride_t)
    decay_b, sum_b, step_b = _vectors(dt_b_ptr + start, bias, rate, t, h, ok, stride_t)
    out = out_ptr + place * heads * PIECE + h[None, :] * PIECE + t[:, None]
    one = tl.cast(batch, tl.int64) * pieces * heads
    all_ok = h_ok[None, :] & (t >= 0)[:, None]
    tl.store(out, sum_f - decay_f, mask=all_ok)
    tl.store(out + one * PIECE, tl.where(ok, tl.log2(step_f) - sum_f, float("-inf")), mask=all_ok)
    tl.store(out + 2 * one * PIECE, -sum_b, mask=all_ok)
    tl.store(out + 3 * one * PIECE, tl.where(ok, tl.log2(step_b) + (sum_b - decay_b), float("-inf")), mask=all_ok)
    if ENDS:
        ends = ends_ptr + place * heads + h
        last = (t == PIECE - 1)[:, None]
        tl.store(ends, tl.sum(tl.where(last, sum_f, 0.0), axis=0), mask=h_ok)
        tl.store(ends + one, tl.sum(tl.where(last, sum_b, 0.0), axis=0), mask=h_ok)
    if STEPS:
        steps = steps_ptr + (row * length + begin) * heads + h[None, :] + t[:, None] * heads
        each = tl.cast(batch, tl.int64) * length * heads
        tl.store(steps, decay_f * 0.6931471805599453, mask=ok)
        tl.store(steps + each, decay_b * 0.6931471805599453, mask=ok)
        tl.store(steps + 2 * each, step_f, mask=ok)
        tl.store(steps + 3 * each, step_b, mask=ok)


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads"])
def _vectors_kernel(
    dt_f_ptr,
    dt_b_ptr,
    bias_ptr,
    A_log_ptr,
    out_ptr,
    ends_ptr,
    steps_ptr,
    batch,
    length,
    heads,
    stride_b,
    stride_t,
    PIECE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ENDS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """(4, b, pieces, h, PIECE): r and c of both sides in each piece; beyond the row c is the logarithm of 0.

    With ENDS also the sums of log2-decays of pieces, forward and backward, (2, b, pieces, h); with STEPS natural decays
    and steps, each forward and backward, (4, b, l, h).
    """
    blocks = tl.cdiv(heads, BLOCK_H)
    place = (tl.program_id(0) // blocks).to(tl.int64)  # of the piece among those of all rows
    h = tl.program_id(0) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    _write_vectors(
        dt_f_ptr, dt_b_ptr, bias_ptr, A_log_ptr, out_ptr, ends_ptr, steps_ptr, place, h, batch, length, heads,
        stride_b, stride_t, PIECE, ENDS, STEPS,
    )  # fmt: skip


@triton.jit
def _rows(ptr, position, ok, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """[positions, BLOCK], zero beyond the row and the width."""
    column = tl.arange(0, BLOCK)
    mask = ok[:, None]
    if WIDTH < BLOCK:
        mask = mask & (column < WIDTH)[None, :]
    return tl.load(ptr + position[:, None] * stride + column[None, :], mask=mask, other=0.0).to(DOT)


@triton.jit
def _mix_rows(
    x_ptr,
    B_f_ptr,
    C_f_ptr,
    B_b_ptr,
    C_b_ptr,
    vectors,
    diag_ptr,
    D_ptr,
    z_ptr,
    weight_ptr,
    y_ptr,
    squares_ptr,
    first,
    length,
    one,
    x_stride,
    map_stride,
    diag_stride,
    z_stride,
    y_stride,
    squares_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    DIAGONAL: tl.constexpr,
    TANH: tl.constexpr,
    GATED: tl.constexpr,
):
    """Outputs of ROWS rows from `first` on and HEADS heads; pointers are of the row.

    DIAGONAL are the columns of a step where both sides meet, a divisor of ROWS as COLUMNS are elsewhere.
    """
    t = first + tl.arange(0, ROWS)
    t_ok = t < length
    p = tl.arange(0, BLOCK_P)
    C_f = _rows(C_f_ptr - map_stride, t, (t > 0) & (t <= length), map_stride, N, BLOCK_N, DOT)
    C_b = _rows(C_b_ptr + map_stride, t, t + 1 < length, map_stride, N, BLOCK_N, DOT)
    totals = ()
    rows_f = ()
    rows_b = ()
    diagonals = ()
    for i in tl.static_range(HEADS):
        row = vectors + i * PIECE + t
        rows_f = rows_f + (tl.load(row),)
        rows_b = rows_b + (tl.load(row + 2 * one),)
        diagonal = tl.load(diag_ptr + t * diag_stride + i, mask=t_ok, other=0.0).to(tl.float32)
        diagonals = diagonals + (diagonal + tl.load(D_ptr + i),)
        totals = totals + (tl.zeros([ROWS, BLOCK_P], tl.float32),)
    for start in tl.range(first, first + ROWS, DIAGONAL, num_stages=STAGES):
        s = start + tl.arange(0, DIAGONAL)
        ok = s < length
        before = s[None, :] < t[:, None]
        same = s[None, :] == t[:, None]
        scores_f = tl.dot(C_f, tl.trans(_rows(B_f_ptr, s, ok, map_stride, N, BLOCK_N, DOT)))
        scores_b = tl.dot(C_b, tl.trans(_rows(B_b_ptr, s, ok, map_stride, N, BLOCK_N, DOT)))
        scores = tl.where(before, scores_f, scores_b)
        found = ()
        for i in tl.static_range(HEADS):
            x = _rows(x_ptr + i * P, s, ok, x_stride, P, BLOCK_P, DOT)
            column = vectors + i * PIECE + s
            forward = rows_f[i][:, None] + tl.load(column + one)[None, :]
            backward = rows_b[i][:, None] + tl.load(column + 3 * one)[None, :]
            matrix = scores * tl.exp2(tl.where(before, forward, backward))
            matrix = tl.where(same, diagonals[i][:, None], matrix)
            found = found + (tl.dot(matrix.to(DOT), x, totals[i]),)
        totals = found
    # Where all columns lie on one side, factors of rows and columns are 1 and a step at most.
    edges = ()
    factors = ()
    for i in tl.static_range(HEADS):
        edge = tl.load(vectors + i * PIECE + first)
        edges = edges + (edge,)
        factors = factors + (tl.exp2(rows_f[i] - edge),)
    for start in tl.range(0, first, COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        scores = tl.dot(C_f, tl.trans(_rows(B_f_ptr, s, ok, map_stride, N, BLOCK_N, DOT)))
        found = ()
        for i in tl.static_range(HEADS):
            x = _rows(x_ptr + i * P, s, ok, x_stride, P, BLOCK_P, DOT)
            column = tl.exp2(tl.load(vectors + i * PIECE + one + s) + edges[i])
            found = found + (tl.dot((scores * (factors[i][:, None] * column[None, :])).to(DOT), x, totals[i]),)
        totals = found
    edges = ()
    factors = ()
    for i in tl.static_range(HEADS):
        edge = tl.load(vectors + i * PIECE + 2 * one + (first + ROWS - 1))
        edges = edges + (edge,)
        factors = factors + (tl.exp2(rows_b[i] - edge),)
    for start in tl.range(first + ROWS, length, COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        scores = tl.dot(C_b, tl.trans(_rows(B_b_ptr, s, ok, map_stride, N, BLOCK_N, DOT)))
        found = ()
        for i in tl.static_range(HEADS):
            x = _rows(x_ptr + i * P, s, ok, x_stride, P, BLOCK_P, DOT)
            column = tl.exp2(tl.load(vectors + i * PIECE + 3 * one + s) + edges[i])
            found = found + (tl.dot((scores * (factors[i][:, None] * column[None, :])).to(DOT), x, totals[i]),)
        totals = found
    y_ok = t_ok[:, None] & (p < P)[None, :]
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.static_range(HEADS):
        y = totals[i]
        if GATED:
            squares += tl.sum(y * y, axis=1)
            z = _rows(z_ptr + i * P, t, t_ok, z_stride, P, BLOCK_P, tl.float32)
            weight = tl.load(weight_ptr + i * P + p, mask=p < P, other=0.0).to(tl.float32)
            y = y * _silu(z, TANH) * weight[None, :]
        tl.store(y_ptr + i * P + t[:, None] * y_stride + p[None, :], y, mask=y_ok)
    if GATED:
        tl.store(squares_ptr + t * squares_stride, squares, mask=t_ok)


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
    z_ptr,
    weight_ptr,
    y_ptr,
    squares_ptr,
    batch,
    length,
    heads,
    repeats,
    x_stride_b,
    x_stride_t,
    map_stride_b,
    map_stride_t,
    diag_stride,
    z_stride,
    P: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    TAIL: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    TANH: tl.constexpr,
    GATED: tl.constexpr,
):
    """Outputs of a block of rows; GATED: times weight and silu(z), and the sums of their squares before that.

    TAIL, if not 0, are the rows that the last block of a row is computed as.
    """
    head_blocks = heads // HEADS
    row_blocks = tl.cdiv(length, ROWS)
    head_block = tl.program_id(0) % head_blocks
    head = head_block * HEADS
    first = tl.program_id(0) // head_blocks % row_blocks * ROWS
    row = (tl.program_id(0) // head_blocks // row_blocks).to(tl.int64)
    one = tl.cast(batch, tl.int64) * heads * PIECE
    maps = row * map_stride_b + (head // repeats) * N
    place = row * length
    x_ptr += row * x_stride_b + head * P
    B_f_ptr += maps
    C_f_ptr += maps
    B_b_ptr += maps
    C_b_ptr += maps
    vectors_ptr += (row * heads + head) * PIECE
    diag_ptr += place * diag_stride + head
    D_ptr += head
    y_ptr += (place * heads + head) * P
    if GATED:
        z_ptr += place * z_stride + head * P
        weight_ptr += head * P
        squares_ptr += place * head_blocks + head_block
    if TAIL == 0 or length - first > TAIL:
        _mix_rows(
            x_ptr, B_f_ptr, C_f_ptr, B_b_ptr, C_b_ptr, vectors_ptr, diag_ptr, D_ptr, z_ptr, weight_ptr, y_ptr,
            squares_ptr, first, length, one, x_stride_t, map_stride_t, diag_stride, z_stride, heads * P, head_blocks, P,
            N, PIECE, HEADS, ROWS, COLUMNS, BLOCK_P, BLOCK_N, DOT, STAGES, COLUMNS, TANH, GATED,
        )  # fmt: skip
    else:
        _mix_rows(
            x_ptr, B_f_ptr, C_f_ptr, B_b_ptr, C_b_ptr, vectors_ptr, diag_ptr, D_ptr, z_ptr, weight_ptr, y_ptr,
            squares_ptr, first, length, one, x_stride_t, map_stride_t, diag_stride, z_stride, heads * P, head_blocks, P,
            N, PIECE, HEADS, TAIL, COLUMNS, BLOCK_P, BLOCK_N, DOT, STAGES, 16, TANH, GATED,
        )  # fmt: skip


@operator("quasiseparable_short_triton")
@replayed
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
    maps: tuple[Tensor, ...] = B_f, C_f, B_b, C_b
    (batch, length, nheads, headdim), (groups, n) = x.shape, maps[0].shape[2:]
    # Offsets in a row have 31 bits.
    if x.stride()[2:] != (headdim, 1) or x.stride(1) >= 2**23:
        x = x.contiguous()
    if len({one.stride() for one in maps}) > 1 or maps[0].stride()[2:] != (n, 1) or maps[0].stride(1) >= 2**23:
        maps = tuple(one.contiguous() for one in maps)
    if dt_f.stride() != dt_b.stride() or dt_f.stride(2) != 1 or dt_f.stride(1) >= 2**23:
        dt_f, dt_b = dt_f.contiguous(), dt_b.contiguous()
    repeats = nheads // groups
    tile = tile_of(repeats)
    vectors = torch.empty(4, batch, nheads, LONGEST, dtype=torch.float32, device=x.device)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on_device(x):
        _vectors_kernel[(batch * cdiv(nheads, BLOCK_H),)](
            dt_f, dt_b, dt_bias.contiguous(), A_log.contiguous(), vectors, None, None, batch, length, nheads,
            *dt_f.stride()[:2], PIECE=LONGEST, BLOCK_H=BLOCK_H, ENDS=False, STEPS=False,
        )  # fmt: skip
        _mix_kernel[(batch * cdiv(length, tile.rows) * (nheads // tile.heads),)](
            x, *maps, vectors, diag.contiguous(), D.contiguous(), None, None, y, None, batch, length,
            nheads, repeats, *x.stride()[:2], *maps[0].stride()[:2], nheads, 0,
            **mix_options(x.dtype, headdim, n, length, tile), GATED=False,
        )  # fmt: skip
    return y


@torch.library.register_fake("ssm::quasiseparable_short_triton")
def _(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def tile_of(repeats: int) -> Tile:
    """The tile with so many heads that they share maps, `repeats` heads of which are of a group."""
    return TILE._replace(heads=next(one for one in range(TILE.heads, 0, -1) if repeats % one == 0))


@functools.cache
def mix_options(dtype: torch.dtype, headdim: int, n: int, length: int, tile: Tile) -> dict[str, Any]:
    """Compile-time arguments of `_mix_kernel` but GATED; the heads of the tile are those that a program takes."""
    block_p, block_n = max(16, next_power_of_2(headdim)), max(16, next_power_of_2(n))
    tail = max(16, next_power_of_2(length % tile.rows or tile.rows))
    return {
        "P": headdim,
        "N": n,
        "PIECE": piece_of(length),
        "HEADS": tile.heads,
        "ROWS": tile.rows,
        "TAIL": tail if tail < tile.rows else 0,
        "COLUMNS": tile.columns,
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "DOT": dot_type(dtype),
        "STAGES": tile.stages,
        "TANH": TANH,
        "num_warps": warps_of(tile.warps, block_p, block_n),
        "maxnreg": tile.registers,
    }


def dot_type(dtype: torch.dtype) -> Any:
    """Of the operands of products."""
    return tl.float32 if INTERPRETED else tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def warps_of(warps: int, block_p: int, block_n: int) -> int:
    """See `omnissm.kernels.ssd.triton_tiles.narrow`."""
    return min(warps, 2) if min(block_p, block_n) < 64 else warps
