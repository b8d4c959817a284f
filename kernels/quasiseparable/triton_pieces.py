"""Hydra's product of rows in pieces, for many heads: states and shares of the diagonal, then a piece's heads in turn.

`triton_states` makes the states that enter a piece. `_heads_kernel` takes a block of rows: the products of C and B,
which all heads of a group share, are made once; then each head needs its x, two states, vectors and its gate, which are
fetched while the head before is computed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_utils import cdiv, launching, multiprocessors, next_power_of_2, quick
from .triton_short import TANH, _rows, _silu, dot_type, piece_of, warps_of
from .triton_states import (
    CARRIED,
    STATE_TILE,
    SWEEP_TILE,
    _carry_kernel,
    _states_kernel,
    _sweep_kernel,
    state_options,
    sweep_blocks,
    sweep_options,
)


class HeadsTile(NamedTuple):
    """Compile-time choices of `_heads_kernel`."""

    rows: int  # a divisor of a piece
    columns: int  # of a step where both sides meet, a divisor of `rows`
    heads: int  # at most, a divisor of the heads of a group is taken
    warps: int
    stages: int


HEADS_TILE = HeadsTile(64, 64, 6, 4, 2)


@quick
@triton.jit(do_not_specialize=["batch", "length"])
def _heads_kernel(
    x_ptr,
    B_f_ptr,
    C_f_ptr,
    B_b_ptr,
    C_b_ptr,
    vectors_ptr,
    shares_ptr,
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
    BLOCK_HEADS: tl.constexpr,
    EVEN: tl.constexpr,
    WHOLE: tl.constexpr,
    TANH: tl.constexpr,
    GATED: tl.constexpr,
):
    """Outputs of ROWS rows of a piece for HEADS heads; GATED: times weight and silu(z), and the sums of their squares.

    Shares add up to the diagonal, which becomes the fifth vector. EVEN: ROWS divides the length, WHOLE: PIECE does.
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
    in_piece = (row * pieces + piece) * heads
    vectors_ptr += (in_piece + head) * PIECE
    shares_ptr += (in_piece * heads + head) * PIECE
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
    t_ok = (t < length) | EVEN
    p = tl.arange(0, BLOCK_P)
    own = tl.arange(0, BLOCK_HEADS)[:, None]
    own_ok = (own < HEADS) & (r >= 0)[None, :]
    entry = own * PIECE + (first - begin) + r[None, :]
    sums = tl.load(shares_ptr + entry, mask=own_ok, other=0.0)
    for other in tl.static_range(1, heads):
        sums += tl.load(shares_ptr + other * (heads * PIECE) + entry, mask=own_ok, other=0.0)
    tl.store(vectors_ptr + 4 * one + entry, sums, mask=own_ok)
    # All tiles of the maps are asked for before the first of them is waited for.
    C_f = _rows(C_f_ptr, t, (t > 0) & ((t <= length) | EVEN), stride, N, BLOCK_N, DOT)
    C_b = _rows(C_b_ptr, t, t + 1 < length, stride, N, BLOCK_N, DOT)
    tiles = ()
    for j in tl.static_range(ROWS // COLUMNS):
        s = first + j * COLUMNS + tl.arange(0, COLUMNS)
        ok = (s < length) | EVEN
        B_f = _rows(B_f_ptr, s, ok, stride, N, BLOCK_N, DOT)
        tiles = tiles + ((B_f, _rows(B_b_ptr, s, ok, stride, N, BLOCK_N, DOT)),)
    others = ()
    for j in tl.static_range(PIECE // ROWS - 1):
        start = begin + (first - begin + (j + 1) * ROWS) % PIECE
        before = start < first
        C_ok = tl.where(before, (t <= length) | EVEN, t + 1 < length)
        C = _rows(tl.where(before, C_f_ptr, C_b_ptr), t, C_ok, stride, N, BLOCK_N, DOT)
        ok = (start + r < length) | WHOLE
        B = _rows(tl.where(before, B_f_ptr, B_b_ptr), start + r, ok, stride, N, BLOCK_N, DOT)
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
    tl.debug_barrier()  # of the fifth vector each thread has written a part
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
            x = _rows(x_ptr + start * stride + i * P, c, (s < length) | EVEN, stride, P, BLOCK_P, DOT)
            forward = rows_f[:, None] + tl.load(vectors + one + (start - begin) + c)[None, :]
            backward = rows_b[:, None] + tl.load(vectors + 3 * one + (start - begin) + c)[None, :]
            matrix = within[j] * tl.exp2(tl.where(s[None, :] < t[:, None], forward, backward))
            matrix = tl.where(s[None, :] == t[:, None], diagonal[:, None], matrix)
            y = tl.dot(matrix.to(DOT), x, y)
        # Where all columns lie on one side, factors of rows and columns are 1 and a step at most.
        for j in tl.static_range(PIECE // ROWS - 1):
            start = others[j][0]
            before = start < first
            x = _rows(x_ptr + start * stride + i * P, r, (start + r < length) | WHOLE, stride, P, BLOCK_P, DOT)
            edge = tl.load(vectors + tl.where(before, first - begin, 2 * one + (first - begin + ROWS - 1)))
            column = tl.exp2(tl.load(vectors + tl.where(before, one, 3 * one) + (start - begin) + r) + edge)
            factor = tl.exp2(tl.where(before, rows_f, rows_b) - edge)
            y = tl.dot((beyond[j] * (factor[:, None] * column[None, :])).to(DOT), x, y)
        if GATED:
            squares += tl.sum(y * y, axis=1)
            weight = tl.load(weight_ptr + i * P + p, mask=p < P, other=0.0).to(tl.float32)
            y = y * _silu(z.to(tl.float32), TANH) * weight[None, :]
        y_ok = t_ok[:, None] & (p < P)[None, :]
        tl.store(y_ptr + i * P + r[:, None] * (heads * P) + p[None, :], y, mask=y_ok)
    if GATED:
        tl.store(squares_ptr + t * head_blocks, squares, mask=t_ok)


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
        "BLOCK_HEADS": next_power_of_2(tile.heads),
        "EVEN": length % tile.rows == 0,
        "WHOLE": length % piece_of(length) == 0,
        "TANH": TANH,
        "num_warps": warps_of(tile.warps, block_p, block_n),
    }


class PieceBuffers(NamedTuple):
    """What lies between the kernels."""

    vectors: Any  # (5, b, pieces, h, piece), float32
    ends: Any  # (2, b, pieces, h), float32
    shares: Any  # (b, pieces, h, h, piece), float32
    left: Any  # (b, h, pieces, p, n)
    right: Any


class PieceLaunches:
    """From vectors of pieces and what the convolution gives to outputs.

    A program that carries a state along a row takes a step for each piece: few of them would leave most of the device
    idle.

    Args:
        batch: Rows.
        length: Positions.
        nheads: Heads h.
        headdim: Channels p of a head.
        n: States per channel and direction.
        groups: Groups of heads that share maps.
        width: Numbers between positions of z.
        dtype: Of what is mixed.
        device: Where.
        gated: Multiply outputs by weight and silu(z), and give the sums of their squares before that.
    """

    def __init__(
        self,
        batch: int,
        length: int,
        nheads: int,
        headdim: int,
        n: int,
        groups: int,
        width: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        gated: bool,
    ) -> None:
        repeats, stride = nheads // groups, nheads * headdim + 4 * groups * n
        piece, tile = piece_of(length), heads_tile(repeats)
        pieces = cdiv(length, piece)
        numbers = batch, length, nheads, repeats, stride
        self._many = 2 * batch * nheads >= multiprocessors(device)
        self._states = launching(
            _states_kernel, (batch * pieces * nheads,), *numbers,
            **state_options(dtype, nheads, headdim, n, length, STATE_TILE),
        )  # fmt: skip
        self._carry = launching(
            _carry_kernel, (2 * batch * nheads * cdiv(headdim * n, CARRIED),), batch, length, nheads, headdim * n,
            PIECE=piece, BLOCK=CARRIED,
        )  # fmt: skip
        self._sweep = launching(
            _sweep_kernel, (2 * batch * nheads * sweep_blocks(n, SWEEP_TILE),), *numbers,
            **sweep_options(dtype, nheads, headdim, n, length, SWEEP_TILE),
        )  # fmt: skip
        self._heads = launching(
            _heads_kernel, (batch * cdiv(length, tile.rows) * (nheads // tile.heads),), *numbers, width,
            **heads_options(dtype, headdim, n, length, tile), GATED=gated,
        )  # fmt: skip
        self._sizes = batch, pieces, nheads, piece, headdim, n
        self._like: dict[str, Any] = {"dtype": dtype, "device": device}

    def buffers(self) -> PieceBuffers:
        """Memory for one block; the next one may use it again."""
        batch, pieces, nheads, piece, headdim, n = self._sizes
        wide = self._like | {"dtype": torch.float32}
        return PieceBuffers(
            vectors=torch.empty(5, batch, pieces, nheads, piece, **wide),
            ends=torch.empty(2, batch, pieces, nheads, **wide),
            shares=torch.empty(batch, pieces, nheads, nheads, piece, **wide),
            left=torch.empty(batch, nheads, pieces, headdim, n, **self._like),
            right=torch.empty(batch, nheads, pieces, headdim, n, **self._like),
        )

    def __call__(
        self,
        x: Any,
        maps: tuple[Any, Any, Any, Any],
        from_x: Any,
        D: Any,
        between: PieceBuffers,
        outputs: tuple[Any, Any, Any, Any],
    ) -> None:
        """Launch them for one block.

        Args:
            x: What the convolution gives, its first channels, (b, l, h p).
            maps: B and C forward, B and C backward, (b, l, g n), channels of the same tensor.
            from_x: To what positions add to the diagonal, (h, h p), rounded.
            D: Diagonal of all positions, (h,).
            between: See `buffers`, with vectors and ends of pieces in it.
            outputs: z and the weight of the gate or None, the outputs (b, l, h p), and the sums of squares or None.
        """
        B_f, C_f, B_b, C_b = maps
        vectors, ends, shares, left, right = between
        sources = x, B_f, B_b, from_x, D, vectors, ends, shares, left, right
        if self._many:
            self._sweep(*sources)
        else:
            self._states(*sources)
            self._carry(left, right, ends)
        self._heads(x, B_f, C_f, B_b, C_b, vectors, shares, left, right, *outputs)
