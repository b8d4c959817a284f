"""Hydra's product of rows in pieces, for many heads: states carried along rows, then a piece's heads in turn.

`_prepare_kernel` makes vectors and the diagonal. `_sweep_kernel` walks along a row with the state of a head, from one
side, and writes the states that enter each piece. `_heads_kernel` takes a block of rows: the products of C and B, which
all heads of a group share, are made once; then each head needs its x, two states, vectors and its gate, which are
fetched while the head before is computed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_utils import cdiv, multiprocessors, next_power_of_2, quick
from .triton_short import _rows, _write_vectors, dot_type, piece_of, warps_of
from .triton_states import CARRIED, STATE_TILE, _carry_kernel, _states_kernel, state_options


class PrepareTile(NamedTuple):
    """Compile-time choices of `_prepare_kernel`."""

    rows: int  # of a program that makes diagonals, a divisor of a piece
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


PREPARE_TILE = PrepareTile(64, 4, 64, 4, 4)
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
    steps_ptr,
    batch,
    length,
    heads,
    channels,
    u_stride,
    dt_stride,
    PIECE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    ALL_H: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    STEPS: tl.constexpr,
):
    """What `_vectors_kernel` makes, and a fifth vector, the diagonal u W_D^T + D.

    The first programs make the diagonals of ROWS rows, the last rows first: they were written last. The others, which
    need no memory for tiles, make vectors of BLOCK_H heads of a piece.
    """
    program = tl.program_id(0)
    pieces = tl.cdiv(length, PIECE)
    products = batch * pieces * (PIECE // ROWS)
    if program >= products:
        blocks = tl.cdiv(heads, BLOCK_H)
        own_h = (program - products) % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
        _write_vectors(
            dt_f_ptr, dt_b_ptr, bias_ptr, A_log_ptr, vectors_ptr, ends_ptr, steps_ptr,
            ((program - products) // blocks).to(tl.int64), own_h, batch, length, heads, length * dt_stride, dt_stride,
            PIECE, True, STEPS,
        )  # fmt: skip
    else:
        number = products - 1 - program
        place = (number // (PIECE // ROWS)).to(tl.int64)
        first = number % (PIECE // ROWS) * ROWS
        begin = (place % pieces * PIECE).to(tl.int32) + first
        r = tl.arange(0, ROWS)
        h = tl.arange(0, ALL_H)
        k = tl.arange(0, BLOCK_K)
        r_ok = r < length - begin
        u_ptr += (place // pieces * length + begin) * u_stride
        diagonal = tl.zeros([ROWS, ALL_H], tl.float32)
        for start in tl.range(0, channels, BLOCK_K, num_stages=STAGES):
            ok = start + k < channels
            u_at = u_ptr + r[:, None] * u_stride + (start + k)[None, :]
            u = tl.load(u_at, mask=r_ok[:, None] & ok[None, :], other=0.0)
            weight_at = from_x_ptr + h[:, None] * channels + (start + k)[None, :]
            weight = tl.load(weight_at, mask=(h < heads)[:, None] & ok[None, :], other=0.0)
            diagonal = tl.dot(u.to(DOT), tl.trans(weight.to(DOT)), diagonal)
        diagonal += tl.load(D_ptr + h, mask=h < heads, other=0.0)[None, :]
        out = vectors_ptr + (4 * tl.cast(batch, tl.int64) * pieces + place) * heads * PIECE + first
        tl.store(out + h[None, :] * PIECE + r[:, None], diagonal, mask=(h < heads)[None, :] & (r >= 0)[:, None])


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
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
    GATED: tl.constexpr,
):
    """Outputs of ROWS rows of a piece for HEADS heads; GATED: times weight and silu(z), and the sums of their squares.

    Strides are constants, and offsets are taken from the first row of a tile: the compiler then keeps no address for
    each row of each tile in a register.
    """
    head_blocks: tl.constexpr = heads // HEADS
    row_blocks = tl.cdiv(length, ROWS)
    head = tl.program_id(0) % head_blocks * HEADS
    first = tl.program_id(0) // head_blocks % row_blocks * ROWS
    row = (tl.program_id(0) // head_blocks // row_blocks).to(tl.int64)
    piece = first // PIECE
    pieces = tl.cdiv(length, PIECE)
    begin = piece * PIECE
    one = tl.cast(batch, tl.int64) * pieces * heads * PIECE
    place = row * length
    maps = place * stride + (head // repeats) * N
    x_ptr += place * stride + head * P
    B_f_ptr += maps
    C_f_ptr += maps - stride
    B_b_ptr += maps
    C_b_ptr += maps + stride
    vectors_ptr += ((row * pieces + piece) * heads + head) * PIECE
    state = ((row * heads + head) * pieces + piece) * (P * N)
    left_ptr += state
    right_ptr += state
    y_ptr += (place * heads + head) * P + first * (heads * P)
    if GATED:
        z_ptr += (place + first) * z_stride + head * P
        weight_ptr += head * P
        squares_ptr += place * head_blocks + head // HEADS
    r = tl.arange(0, ROWS)
    t = first + r
    t_ok = t < length
    p = tl.arange(0, BLOCK_P)
    # All tiles of the maps are asked for before the first of them is waited for.
    C_f = _rows(C_f_ptr, t, (t > 0) & (t <= length), stride, N, BLOCK_N, DOT)
    C_b = _rows(C_b_ptr, t, t + 1 < length, stride, N, BLOCK_N, DOT)
    tiles = ()
    for j in tl.static_range(ROWS // COLUMNS):
        s = first + j * COLUMNS + tl.arange(0, COLUMNS)
        B_f = _rows(B_f_ptr, s, s < length, stride, N, BLOCK_N, DOT)
        tiles = tiles + ((B_f, _rows(B_b_ptr, s, s < length, stride, N, BLOCK_N, DOT)),)
    others = ()
    for j in tl.static_range(PIECE // ROWS - 1):
        start = begin + (first - begin + (j + 1) * ROWS) % PIECE
        before = start < first
        C_ok = tl.where(before, t <= length, t + 1 < length)
        C = _rows(tl.where(before, C_f_ptr, C_b_ptr), t, C_ok, stride, N, BLOCK_N, DOT)
        B = _rows(tl.where(before, B_f_ptr, B_b_ptr), start + r, start + r < length, stride, N, BLOCK_N, DOT)
        others = others + ((start, C, B),)
    within = ()
    for j in tl.static_range(ROWS // COLUMNS):
        s = first + j * COLUMNS + tl.arange(0, COLUMNS)
        product_f = tl.dot(C_f, tl.trans(tiles[j][0]))
        product_b = tl.dot(C_b, tl.trans(tiles[j][1]))
        within = within + (tl.where(s[None, :] < t[:, None], product_f, product_b),)
    beyond = ()
    for j in tl.static_range(PIECE // ROWS - 1):
        beyond = beyond + (tl.dot(others[j][1], tl.trans(others[j][2])),)
    squares = tl.zeros([ROWS], tl.float32)
    for i in tl.range(0, HEADS, num_stages=STAGES):
        if GATED:
            z = _rows(z_ptr + i * P, r, t_ok, z_stride, P, BLOCK_P, DOT)
        vectors = vectors_ptr + i * PIECE
        rows_f = tl.load(vectors + (first - begin) + r)
        rows_b = tl.load(vectors + 2 * one + (first - begin) + r)
        diagonal = tl.load(vectors + 4 * one + (first - begin) + r)
        left = _rows(left_ptr + i * pieces * (P * N), p, p < P, N, N, BLOCK_N, DOT)
        right = _rows(right_ptr + i * pieces * (P * N), p, p < P, N, N, BLOCK_N, DOT)
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
        for j in tl.static_range(PIECE // ROWS - 1):
            start = others[j][0]
            before = start < first
            x = _rows(x_ptr + start * stride + i * P, r, start + r < length, stride, P, BLOCK_P, DOT)
            edge = tl.load(vectors + tl.where(before, first - begin, 2 * one + (first - begin + ROWS - 1)))
            column = tl.exp2(tl.load(vectors + tl.where(before, one, 3 * one) + (start - begin) + r) + edge)
            factor = tl.exp2(tl.where(before, rows_f, rows_b) - edge)
            y = tl.dot((beyond[j] * (factor[:, None] * column[None, :])).to(DOT), x, y)
        if GATED:
            squares += tl.sum(y * y, axis=1)
            weight = tl.load(weight_ptr + i * P + p, mask=p < P, other=0.0).to(tl.float32)
            gate = z.to(tl.float32)
            # The square root of a sigmoid: a root takes a third of the instructions of a division.
            root = tl.rsqrt(1.0 + tl.exp2(gate * -1.4426950408889634))
            y = (y * root) * (gate * root) * weight[None, :]
        y_ok = t_ok[:, None] & (p < P)[None, :]
        tl.store(y_ptr + i * P + r[:, None] * (heads * P) + p[None, :], y, mask=y_ok)
    if GATED:
        tl.store(squares_ptr + t * head_blocks, squares, mask=t_ok)


@functools.cache
def prepare_options(dtype: torch.dtype, nheads: int, length: int, tile: PrepareTile) -> dict[str, Any]:
    """Compile-time arguments of `_prepare_kernel` but STEPS."""
    return {
        "PIECE": piece_of(length),
        "ROWS": tile.rows,
        "BLOCK_H": tile.heads,
        "ALL_H": max(16, next_power_of_2(nheads)),
        "BLOCK_K": tile.channels,
        "DOT": dot_type(dtype),
        "STAGES": tile.stages,
        "num_warps": tile.warps,
    }


def prepare_programs(nheads: int, length: int, tile: PrepareTile) -> int:
    """Programs of `_prepare_kernel` for a row."""
    piece = piece_of(length)
    return cdiv(length, piece) * (piece // tile.rows + cdiv(nheads, tile.heads))


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
        "STAGES": tile.stages if block_p <= 64 else 2,  # tiles of all stages are in shared memory
        "num_warps": warps_of(tile.warps, block_p, max(16, next_power_of_2(n))),
    }


def heads_tile(repeats: int) -> HeadsTile:
    """The tile with as many heads as share maps and divide `repeats`, the heads of a group."""
    return HEADS_TILE._replace(heads=next(one for one in range(HEADS_TILE.heads, 0, -1) if repeats % one == 0))


@functools.cache
def heads_options(dtype: torch.dtype, headdim: int, n: int, length: int, tile: HeadsTile) -> dict[str, Any]:
    """Compile-time arguments of `_heads_kernel` but GATED."""
    block_p, block_n = max(16, next_power_of_2(headdim)), max(16, next_power_of_2(n))
    return {
        "P": headdim,
        "N": n,
        "PIECE": piece_of(length),
        "HEADS": tile.heads,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "DOT": dot_type(dtype),
        "STAGES": tile.stages if block_p * block_n <= 64 * 64 else 1,  # see `sweep_options`
        "num_warps": warps_of(tile.warps, block_p, block_n),
    }


def walked(batch: int, nheads: int, device: torch.device) -> bool:
    """Whether one program carries a state along a row: a step for each piece, but few would leave the device idle."""
    return 2 * batch * nheads >= multiprocessors(device)


def entering(x: Tensor, B_f: Tensor, B_b: Tensor, vectors: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """States that enter each piece from the left and from the right, (b, h, pieces, p, n), in the dtype of x.

    Args:
        x: Input, (b, l, h, p), dense in its last two dimensions.
        B_f: Input map forward, (b, l, g, n), dense likewise.
        B_b: Backward, of the same strides.
        vectors: See `_prepare_kernel`.
        ends: See there.
    """
    (batch, length, nheads, headdim), n = x.shape, B_f.shape[3]
    pieces = vectors.shape[2]
    left, right = x.new_empty(2, batch, nheads, pieces, headdim, n).unbind(0)
    pointers = x, B_f, B_b, vectors, ends, left, right
    numbers = batch, length, nheads, nheads // B_f.shape[2], *x.stride()[:2], *B_f.stride()[:2]
    if walked(batch, nheads, x.device):
        _sweep_kernel[(2 * batch * nheads * sweep_blocks(n, SWEEP_TILE),)](
            *pointers, *numbers, **sweep_options(x.dtype, headdim, n, length, SWEEP_TILE)
        )
        return left, right
    _states_kernel[(batch * pieces * nheads,)](
        *pointers, *numbers, **state_options(x.dtype, headdim, n, length, STATE_TILE)
    )
    _carry_kernel[(2 * batch * nheads * cdiv(headdim * n, CARRIED),)](
        left, right, ends, batch, length, nheads, headdim * n, PIECE=piece_of(length), BLOCK=CARRIED
    )
    return left, right
