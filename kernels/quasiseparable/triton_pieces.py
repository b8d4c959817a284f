"""Hydra's product of rows in pieces, for many heads: states carried along rows, then a piece's heads in turn.

`_sweep_kernel` walks along a row with the state of a head, from one side, and writes the states that enter each piece.
`_heads_kernel` takes a block of rows: the products of C and B, which all heads of a group share, are made once; then
each head needs its x, two states, four vectors and its gate, which are fetched while the head before is computed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_utils import cdiv, next_power_of_2, quick
from .triton_short import LONGEST, _rows, _write_vectors, dot_type, piece_of, warps_of


class PrepareTile(NamedTuple):
    """Compile-time choices of `_prepare_kernel`."""

    heads: int  # of a program that makes vectors
    channels: int  # of a step
    warps: int
    stages: int


class SweepTile(NamedTuple):
    """Compile-time choices of `_sweep_kernel`."""

    states: int  # of a head that a program carries, at most
    warps: int
    stages: int


class HeadsTile(NamedTuple):
    """Compile-time choices of `_heads_kernel`."""

    rows: int  # a divisor of a piece
    columns: int  # of a step where both sides meet, a divisor of `rows`
    heads: int  # at most, a divisor of the heads of a group is taken
    warps: int
    stages: int
    registers: int | None = None  # of a thread, at most


PREPARE_TILE = PrepareTile(1, 64, 4, 4)
SWEEP_TILE = SweepTile(64, 4, 3)
HEADS_TILE = HeadsTile(64, 64, 6, 4, 2)


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads"])
def _prepare_kernel(
    u_ptr,
    from_x_ptr,
    D_ptr,
    dt_f_ptr,
    dt_b_ptr,
    bias_ptr,
    A_log_ptr,
    vectors_ptr,
    ends_ptr,
    batch,
    length,
    heads,
    channels,
    u_stride,
    dt_stride,
    PIECE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ALL_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    ENDS: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """Vectors of `_vectors_kernel`, (4, b, pieces, h, PIECE), and a fifth, the diagonal u W_D^T + D.

    One program of each piece makes its diagonal, the others vectors of BLOCK_H heads.
    """
    each = 1 + tl.cdiv(heads, BLOCK_H)
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    place = (program // each).to(tl.int64)
    kind = program % each
    if kind > 0:
        own_h = (kind - 1) * BLOCK_H + tl.arange(0, BLOCK_H)
        _write_vectors(
            dt_f_ptr, dt_b_ptr, bias_ptr, A_log_ptr, vectors_ptr, ends_ptr, None, place, own_h, batch, length, heads,
            length * dt_stride, dt_stride, PIECE, ENDS, False,
        )  # fmt: skip
    else:
        pieces = tl.cdiv(length, PIECE)
        row = place // pieces
        begin = (place % pieces * PIECE).to(tl.int32)
        t = tl.arange(0, PIECE)
        h = tl.arange(0, ALL_H)
        k = tl.arange(0, BLOCK_K)
        t_ok = t < length - begin
        u_ptr += (row * length + begin) * u_stride
        diagonal = tl.zeros([PIECE, ALL_H], tl.float32)
        for start in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
            ok = start + k < channels
            u = tl.load(
                u_ptr + t[:, None] * u_stride + (start + k)[None, :], mask=t_ok[:, None] & ok[None, :], other=0.0
            )
            weight = tl.load(
                from_x_ptr + h[:, None] * channels + (start + k)[None, :],
                mask=(h < heads)[:, None] & ok[None, :],
                other=0.0,
            )
            diagonal = tl.dot(u.to(DOT), tl.trans(weight.to(DOT)), diagonal)
        diagonal += tl.load(D_ptr + h, mask=h < heads, other=0.0)[None, :]
        out = vectors_ptr + 4 * tl.cast(batch, tl.int64) * pieces * heads * PIECE + place * heads * PIECE
        tl.store(out + h[None, :] * PIECE + t[:, None], diagonal, mask=(h < heads)[None, :] & (t >= 0)[:, None])


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads", "repeats"])
def _sweep_kernel(
    x_ptr,
    B_f_ptr,
    B_b_ptr,
    vectors_ptr,
    ends_ptr,
    left_ptr,
    right_ptr,
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
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """States that enter pieces from the left and from the right, (b, h, pieces, p, n)."""
    blocks = tl.cdiv(N, BLOCK_N)
    pieces = tl.cdiv(length, PIECE)
    program = tl.program_id(0)
    n = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    head = program // blocks % heads
    backwards = program // blocks // heads % 2 == 1
    row = (program // blocks // heads // 2).to(tl.int64)
    one = tl.cast(batch, tl.int64) * pieces * heads
    x_ptr += row * x_stride_b + head * P
    maps = tl.where(backwards, B_b_ptr, B_f_ptr) + row * map_stride_b + (head // repeats) * N
    place = row * pieces * heads + head
    columns = vectors_ptr + tl.where(backwards, 3 * one, one) * PIECE + place * PIECE
    ends = ends_ptr + tl.where(backwards, one, 0) + place
    p = tl.arange(0, BLOCK_P)[:, None]
    n_ok = n < N
    ok = (p < P) & n_ok[None, :]
    states = tl.where(backwards, right_ptr, left_ptr) + (row * heads + head) * pieces * (P * N) + p * N + n[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in tl.range(0, pieces, num_stages=STAGES):
        piece = tl.where(backwards, pieces - 1 - k, k)
        t = piece * PIECE + tl.arange(0, PIECE)
        t_ok = t < length
        x = _rows(x_ptr, t, t_ok, x_stride_t, P, BLOCK_P, DOT)
        B = tl.load(maps + t[:, None] * map_stride_t + n[None, :], mask=t_ok[:, None] & n_ok[None, :], other=0.0)
        end = tl.load(ends + piece * heads)
        column = tl.load(columns + piece * heads * PIECE + tl.arange(0, PIECE))
        factor = tl.exp2(column + tl.where(backwards, 0.0, end))
        tl.store(states + piece * (P * N), state, mask=ok)
        state = tl.dot(tl.trans(x), (B * factor[:, None]).to(DOT), state * tl.exp2(end))


@triton.jit
def _turn(
    x_ptr,
    B_f_ptr,
    C_f_ptr,
    B_b_ptr,
    C_b_ptr,
    vectors_ptr,
    left_ptr,
    right_ptr,
    z_ptr,
    weight_ptr,
    y_ptr,
    squares_ptr,
    first,
    begin,
    length,
    one,
    state_stride,
    stride: tl.constexpr,
    z_stride: tl.constexpr,
    y_stride: tl.constexpr,
    squares_stride: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDE: tl.constexpr,
    FULL: tl.constexpr,
    OTHERS: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    STATES: tl.constexpr,
    GATED: tl.constexpr,
):
    """Outputs of ROWS rows from `first` on, of HEADS heads of a piece; pointers are of the row and the first head.

    A piece has FULL blocks of WIDE columns and, if not 0, TAIL more. OTHERS of the full blocks do not hold these rows.
    """
    # Offsets from the first row of a tile are known to the compiler, which need not keep an address for each.
    r = tl.arange(0, ROWS)
    t = first + r
    t_ok = t < length
    p = tl.arange(0, BLOCK_P)
    C_f = _rows(C_f_ptr - stride, t, (t > 0) & (t <= length), stride, N, BLOCK_N, DOT)
    C_b = _rows(C_b_ptr + stride, t, t + 1 < length, stride, N, BLOCK_N, DOT)
    within = ()
    for j in tl.static_range(ROWS // COLUMNS):
        s = first + j * COLUMNS + tl.arange(0, COLUMNS)
        product_f = tl.dot(C_f, tl.trans(_rows(B_f_ptr, s, s < length, stride, N, BLOCK_N, DOT)))
        product_b = tl.dot(C_b, tl.trans(_rows(B_b_ptr, s, s < length, stride, N, BLOCK_N, DOT)))
        within = within + (tl.where(s[None, :] < t[:, None], product_f, product_b),)
    starts = ()
    beyond = ()
    for j in tl.static_range(OTHERS + (1 if TAIL > 0 else 0)):
        start = begin + FULL * WIDE
        if j < OTHERS:
            start = begin + (first - begin + (j + 1) * WIDE) % (FULL * WIDE)
        before = start < first
        starts = starts + (start,)
        s = start + tl.arange(0, WIDE if j < OTHERS else TAIL)
        C = _rows(
            tl.where(before, C_f_ptr - stride, C_b_ptr + stride), t, tl.where(before, t <= length, t + 1 < length),
            stride, N, BLOCK_N, DOT,
        )  # fmt: skip
        B = _rows(tl.where(before, B_f_ptr, B_b_ptr), s, s < length, stride, N, BLOCK_N, DOT)
        beyond = beyond + (tl.dot(C, tl.trans(B)),)
    own = vectors_ptr + (first - begin) + r
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.range(0, HEADS, num_stages=STAGES):
        if GATED:
            z = _rows(z_ptr + first * z_stride + i * P, r, t_ok, z_stride, P, BLOCK_P, DOT)
        vectors = vectors_ptr + i * PIECE
        rows_f = tl.load(own + i * PIECE)
        rows_b = tl.load(own + i * PIECE + 2 * one)
        diagonal = tl.load(own + i * PIECE + 4 * one)
        y = tl.zeros([ROWS, BLOCK_P], tl.float32)
        if STATES:
            left = _rows(left_ptr + i * state_stride, p, p < P, N, N, BLOCK_N, DOT)
            right = _rows(right_ptr + i * state_stride, p, p < P, N, N, BLOCK_N, DOT)
            # Beyond a row the sums stay what they are at its end.
            last = tl.load(vectors + 2 * one + (PIECE - 1))
            y = tl.dot(C_f, tl.trans(left)) * tl.exp2(rows_f)[:, None]
            y += tl.dot(C_b, tl.trans(right)) * tl.exp2(rows_b - last)[:, None]
        for j in tl.static_range(ROWS // COLUMNS):
            start = first + j * COLUMNS
            c = tl.arange(0, COLUMNS)
            s = start + c
            x = _rows(x_ptr + start * stride + i * P, c, s < length, stride, P, BLOCK_P, DOT)
            forward = rows_f[:, None] + tl.load(vectors + one + (start - begin) + c)[None, :]
            backward = rows_b[:, None] + tl.load(vectors + 3 * one + (start - begin) + c)[None, :]
            matrix = within[j] * tl.exp2(tl.where(s[None, :] < t[:, None], forward, backward))
            matrix = tl.where(s[None, :] == t[:, None], diagonal[:, None], matrix)
            y = tl.dot(matrix.to(DOT), x, y)
        # Where all columns lie on one side, factors of rows and columns are 1 and a step at most.
        for j in tl.static_range(OTHERS + (1 if TAIL > 0 else 0)):
            before = starts[j] < first
            c = tl.arange(0, WIDE if j < OTHERS else TAIL)
            s = starts[j] + c
            x = _rows(x_ptr + starts[j] * stride + i * P, c, s < length, stride, P, BLOCK_P, DOT)
            edge = tl.load(vectors + tl.where(before, first - begin, 2 * one + (first - begin + ROWS - 1)))
            column = tl.exp2(tl.load(vectors + tl.where(before, one, 3 * one) + (starts[j] - begin) + c) + edge)
            factor = tl.exp2(tl.where(before, rows_f, rows_b) - edge)
            y = tl.dot((beyond[j] * (factor[:, None] * column[None, :])).to(DOT), x, y)
        if GATED:
            squares += tl.sum(y * y, axis=1)
            weight = tl.load(weight_ptr + i * P + p, mask=p < P, other=0.0).to(tl.float32)
            gate = z.to(tl.float32)
            # The square root of a sigmoid: a root takes a third of the instructions of a division.
            root = tl.rsqrt(1.0 + tl.exp2(gate * -1.4426950408889634))
            y = (y * root) * (gate * root) * weight[None, :]
        tl.store(
            y_ptr + first * y_stride + i * P + r[:, None] * y_stride + p[None, :],
            y,
            mask=t_ok[:, None] & (p < P)[None, :],
        )
    if GATED:
        tl.store(squares_ptr + t * squares_stride, squares, mask=t_ok)


@quick
@triton.jit(do_not_specialize=["batch", "length"])
def _heads_kernel(
    x_ptr,
    B_f_ptr,
    C_f_ptr,
    B_b_ptr,
    C_b_ptr,
    vectors_ptr,
    left_ptr,
    right_ptr,
    z_ptr,
    weight_ptr,
    y_ptr,
    squares_ptr,
    batch,
    length,
    heads: tl.constexpr,
    repeats: tl.constexpr,
    stride: tl.constexpr,
    z_stride: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FULL: tl.constexpr,
    TAIL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    STATES: tl.constexpr,
    GATED: tl.constexpr,
    REVERSED: tl.constexpr,
):
    """Outputs of a block of rows; GATED: times weight and silu(z), and the sums of their squares before that.

    A piece has FULL blocks of ROWS rows; a row in one piece TAIL more, if not 0.
    """
    head_blocks: tl.constexpr = heads // HEADS
    row_blocks = tl.cdiv(length, ROWS)
    program = tl.program_id(0)
    if REVERSED:
        program = tl.num_programs(0) - 1 - program
    head = program % head_blocks * HEADS
    first = program // head_blocks % row_blocks * ROWS
    row = (program // head_blocks // row_blocks).to(tl.int64)
    piece = 0
    pieces = 1
    if STATES:
        piece = first // PIECE
        pieces = tl.cdiv(length, PIECE)
    begin = piece * PIECE
    one = tl.cast(batch, tl.int64) * pieces * heads * PIECE
    place = row * length
    maps = place * stride + (head // repeats) * N
    x_ptr += place * stride + head * P
    B_f_ptr += maps
    C_f_ptr += maps
    B_b_ptr += maps
    C_b_ptr += maps
    vectors_ptr += ((row * pieces + piece) * heads + head) * PIECE
    y_ptr += (place * heads + head) * P
    if STATES:
        state = ((row * heads + head) * pieces + piece) * (P * N)
        left_ptr += state
        right_ptr += state
    if GATED:
        z_ptr += place * z_stride + head * P
        weight_ptr += head * P
        squares_ptr += place * head_blocks + head // HEADS
    if TAIL == 0 or first < FULL * ROWS:
        _turn(
            x_ptr, B_f_ptr, C_f_ptr, B_b_ptr, C_b_ptr, vectors_ptr, left_ptr, right_ptr, z_ptr, weight_ptr, y_ptr,
            squares_ptr, first, begin, length, one, pieces * (P * N), stride, z_stride, heads * P, head_blocks, P, N,
            PIECE, HEADS, ROWS, COLUMNS, ROWS, FULL, FULL - 1, TAIL, BLOCK_P, BLOCK_N, DOT, STAGES, STATES, GATED,
        )  # fmt: skip
    else:
        _turn(
            x_ptr, B_f_ptr, C_f_ptr, B_b_ptr, C_b_ptr, vectors_ptr, left_ptr, right_ptr, z_ptr, weight_ptr, y_ptr,
            squares_ptr, first, begin, length, one, pieces * (P * N), stride, z_stride, heads * P, head_blocks, P, N,
            PIECE, HEADS, TAIL, TAIL, ROWS, FULL, FULL, 0, BLOCK_P, BLOCK_N, DOT, STAGES, STATES, GATED,
        )  # fmt: skip


@functools.cache
def prepare_options(dtype: torch.dtype, nheads: int, length: int, tile: PrepareTile) -> dict[str, Any]:
    """Compile-time arguments of `_prepare_kernel`."""
    return {
        "PIECE": piece_of(length),
        "BLOCK_H": tile.heads,
        "ALL_H": max(16, next_power_of_2(nheads)),
        "BLOCK_K": tile.channels,
        "DOT": dot_type(dtype),
        "STAGES": tile.stages,
        "ENDS": length > LONGEST,
        "num_warps": tile.warps,
    }


def sweep_blocks(n: int, tile: SweepTile) -> int:
    """Programs that share the states of a head."""
    return cdiv(n, max(16, min(tile.states, next_power_of_2(n))))


@functools.cache
def sweep_options(dtype: torch.dtype, headdim: int, n: int, length: int, tile: SweepTile) -> dict[str, Any]:
    """Compile-time arguments of `_sweep_kernel`."""
    block_p, block_n = max(16, next_power_of_2(headdim)), max(16, min(tile.states, next_power_of_2(n)))
    return {
        "P": headdim,
        "N": n,
        "PIECE": piece_of(length),
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "DOT": dot_type(dtype),
        "STAGES": tile.stages,
        "num_warps": warps_of(tile.warps, block_p, max(16, next_power_of_2(n))),
    }


def heads_tile(repeats: int) -> HeadsTile:
    """The tile with as many heads as share maps and divide `repeats`, the heads of a group."""
    return HEADS_TILE._replace(heads=next(one for one in range(HEADS_TILE.heads, 0, -1) if repeats % one == 0))


@functools.cache
def heads_options(dtype: torch.dtype, headdim: int, n: int, length: int, tile: HeadsTile) -> dict[str, Any]:
    """Compile-time arguments of `_heads_kernel` but GATED."""
    block_p, block_n = max(16, next_power_of_2(headdim)), max(16, next_power_of_2(n))
    piece, states = piece_of(length), length > LONGEST
    full, rest = divmod(piece if states else length, tile.rows)
    tail = max(16, next_power_of_2(rest)) if rest else 0
    if tail == tile.rows:
        full, tail = full + 1, 0
    return {
        "P": headdim,
        "N": n,
        "PIECE": piece,
        "HEADS": tile.heads,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "FULL": full,
        "TAIL": tail,
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "DOT": dot_type(dtype),
        "STAGES": tile.stages,
        "STATES": states,
        "num_warps": warps_of(tile.warps, block_p, block_n),
        "maxnreg": tile.registers,
    }
