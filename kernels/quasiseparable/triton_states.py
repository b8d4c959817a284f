"""States that enter the pieces of rows from both sides, where rows are few: what pieces add, then sums over pieces.

from the left   S_{k+1} = 2^{u_k} S_k + sum_s 2^{u_k + c^f_s} x_s B^f_s^T,  u_k the sum of a piece's log2-decays
from the right  R_{k-1} = 2^{v_k} R_k + sum_s 2^{c^b_s} x_s B^b_s^T,        v_k the same of the other side
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_utils import next_power_of_2, quick
from .triton_short import _rows, dot_type, piece_of, warps_of


class StateTile(NamedTuple):
    """Compile-time choices of `_states_kernel`."""

    columns: int  # a divisor of a piece
    warps: int
    stages: int


STATE_TILE = StateTile(64, 4, 3)
CARRIED = 2048  # numbers of a state that a program of `_carry_kernel` takes


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads", "repeats"])
def _states_kernel(
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
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What a piece adds to the states of a head that leave it on the right and on the left, (b, h, pieces, p, n)."""
    pieces = tl.cdiv(length, PIECE)
    head = tl.program_id(0) % heads
    piece = tl.program_id(0) // heads % pieces
    row = (tl.program_id(0) // heads // pieces).to(tl.int64)
    begin = piece * PIECE
    one = tl.cast(batch, tl.int64) * pieces * heads * PIECE
    maps = row * map_stride_b + (head // repeats) * N
    x_ptr += row * x_stride_b + head * P
    B_f_ptr += maps
    B_b_ptr += maps
    place = (row * pieces + piece) * heads + head
    vectors_ptr += place * PIECE
    end_f = tl.load(ends_ptr + place)
    left = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    right = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + PIECE, length), COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        x = tl.trans(_rows(x_ptr, s, ok, x_stride_t, P, BLOCK_P, DOT))
        B_f = _rows(B_f_ptr, s, ok, map_stride_t, N, BLOCK_N, DOT)
        B_b = _rows(B_b_ptr, s, ok, map_stride_t, N, BLOCK_N, DOT)
        factor_f = tl.exp2(tl.load(vectors_ptr + one + (s - begin)) + end_f)
        factor_b = tl.exp2(tl.load(vectors_ptr + 3 * one + (s - begin)))
        left = tl.dot(x, (B_f * factor_f[:, None]).to(DOT), left)
        right = tl.dot(x, (B_b * factor_b[:, None]).to(DOT), right)
    p = tl.arange(0, BLOCK_P)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    state = ((row * heads + head) * pieces + piece) * (P * N) + p * N + n
    ok = (p < P) & (n < N)
    tl.store(left_ptr + state, left, mask=ok)
    tl.store(right_ptr + state, right, mask=ok)


@quick
@triton.jit(do_not_specialize=["length", "heads"])
def _carry_kernel(left_ptr, right_ptr, ends_ptr, batch, length, heads, size, PIECE: tl.constexpr, BLOCK: tl.constexpr):
    """Replace what pieces add to states by the states that enter them, from the left and from the right."""
    pieces = tl.cdiv(length, PIECE)
    blocks = tl.cdiv(size, BLOCK)
    head = tl.program_id(0) // blocks % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    backwards = row >= batch
    row = tl.where(backwards, row - batch, row)
    entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = entry < size
    states = tl.where(backwards, right_ptr, left_ptr) + (row * heads + head) * pieces * size
    ends = ends_ptr + tl.where(backwards, tl.cast(batch, tl.int64) * pieces * heads, 0) + row * pieces * heads + head
    step = tl.where(backwards, -1, 1)
    piece = tl.where(backwards, pieces - 1, 0)
    state = tl.zeros([BLOCK], tl.float32)
    added = tl.load(states + piece * size + entry, mask=ok, other=0.0)
    for k in range(pieces):
        following = piece + step
        more = k + 1 < pieces
        ahead = tl.load(states + following * size + entry, mask=ok & more, other=0.0)
        factor = tl.exp2(tl.load(ends + piece * heads))
        tl.store(states + piece * size + entry, state, mask=ok)
        state = state * factor + added.to(tl.float32)
        added = ahead
        piece = following


@functools.cache
def state_options(dtype: torch.dtype, headdim: int, n: int, length: int, tile: StateTile) -> dict[str, Any]:
    """Compile-time arguments of `_states_kernel`."""
    block_p, block_n = max(16, next_power_of_2(headdim)), max(16, next_power_of_2(n))
    return {
        "P": headdim,
        "N": n,
        "PIECE": piece_of(length),
        "COLUMNS": tile.columns,
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "DOT": dot_type(dtype),
        "STAGES": tile.stages,
        "num_warps": warps_of(tile.warps, block_p, block_n),
    }
