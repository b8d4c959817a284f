"""States that enter the pieces of rows from both sides, and shares of the diagonal.

from the left   S_{k+1} = 2^{u_k} S_k + sum_s 2^{u_k + c^f_s} x_s B^f_s^T,  u_k the sum of a piece's log2-decays
from the right  R_{k-1} = 2^{v_k} R_k + sum_s 2^{c^b_s} x_s B^b_s^T,        v_k the same of the other side

Where rows are many, `_sweep_kernel` walks along a row with the state of a head, from one side. Where they are few,
`_states_kernel` writes what pieces add and `_carry_kernel` sums from piece to piece. While they have x of a head they
write its share of the diagonals of all heads, x W^T with the head's columns of W, and D in its own.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..triton_utils import cdiv, next_power_of_2, quick
from .triton_short import _rows, dot_type, piece_of, warps_of


class StateTile(NamedTuple):
    """Compile-time choices of `_states_kernel`."""

    columns: int  # a divisor of a piece
    warps: int
    stages: int


class SweepTile(NamedTuple):
    """Compile-time choices of `_sweep_kernel`."""

    states: int  # of a head that a program carries, at most
    warps: int
    stages: int


STATE_TILE = StateTile(64, 4, 3)
SWEEP_TILE = SweepTile(64, 4, 3)
CARRIED = 2048  # numbers of a state that a program of `_carry_kernel` takes


@triton.jit
def _of_share(
    from_x_ptr, D_ptr, head, heads, P: tl.constexpr, BLOCK_P: tl.constexpr, ALL_H: tl.constexpr, DOT: tl.constexpr
):
    """What x of a head is multiplied by and what is added, [BLOCK_P, ALL_H] and [ALL_H]."""
    p = tl.arange(0, BLOCK_P)[:, None]
    h = tl.arange(0, ALL_H)
    weight_at = from_x_ptr + h[None, :] * (heads * P) + head * P + p
    weight = tl.load(weight_at, mask=(h < heads)[None, :] & (p < P), other=0.0).to(DOT)
    return weight, tl.where(h == head, tl.load(D_ptr + head), 0.0)


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads", "repeats"])
def _states_kernel(
    x_ptr,
    B_f_ptr,
    B_b_ptr,
    from_x_ptr,
    D_ptr,
    vectors_ptr,
    ends_ptr,
    shares_ptr,
    left_ptr,
    right_ptr,
    batch,
    length,
    heads,
    repeats,
    stride: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALL_H: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """What a piece adds to the states of a head that leave it on the right and on the left, (b, h, pieces, p, n).

    And shares, (b, pieces, h, h, PIECE): of the first h, in the diagonal of the second one.
    """
    pieces = tl.cdiv(length, PIECE)
    head = tl.program_id(0) % heads
    piece = tl.program_id(0) // heads % pieces
    row = (tl.program_id(0) // heads // pieces).to(tl.int64)
    begin = piece * PIECE
    one = tl.cast(batch, tl.int64) * pieces * heads * PIECE
    maps = row * length * stride + (head // repeats) * N
    x_ptr += row * length * stride + head * P
    B_f_ptr += maps
    B_b_ptr += maps
    place = (row * pieces + piece) * heads + head
    vectors_ptr += place * PIECE
    shares_ptr += place * heads * PIECE
    h = tl.arange(0, ALL_H)[None, :]
    weight, own = _of_share(from_x_ptr, D_ptr, head, heads, P, BLOCK_P, ALL_H, DOT)
    end_f = tl.load(ends_ptr + place)
    left = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    right = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in tl.range(begin, tl.minimum(begin + PIECE, length), COLUMNS, num_stages=STAGES):
        s = start + tl.arange(0, COLUMNS)
        ok = s < length
        x = _rows(x_ptr, s, ok, stride, P, BLOCK_P, DOT)
        B_f = _rows(B_f_ptr, s, ok, stride, N, BLOCK_N, DOT)
        B_b = _rows(B_b_ptr, s, ok, stride, N, BLOCK_N, DOT)
        factor_f = tl.exp2(tl.load(vectors_ptr + one + (s - begin)) + end_f)
        factor_b = tl.exp2(tl.load(vectors_ptr + 3 * one + (s - begin)))
        left = tl.dot(tl.trans(x), (B_f * factor_f[:, None]).to(DOT), left)
        right = tl.dot(tl.trans(x), (B_b * factor_b[:, None]).to(DOT), right)
        share = tl.dot(x, weight) + own[None, :]
        tl.store(shares_ptr + h * PIECE + (s - begin)[:, None], share, mask=(h < heads) & (s >= 0)[:, None])
    p = tl.arange(0, BLOCK_P)[:, None]
    n = tl.arange(0, BLOCK_N)[None, :]
    state = ((row * heads + head) * pieces + piece) * (P * N) + p * N + n
    ok = (p < P) & (n < N)
    tl.store(left_ptr + state, left, mask=ok)
    tl.store(right_ptr + state, right, mask=ok)


@quick
@triton.jit(do_not_specialize=["batch", "length", "heads", "repeats"])
def _sweep_kernel(
    x_ptr,
    B_f_ptr,
    B_b_ptr,
    from_x_ptr,
    D_ptr,
    vectors_ptr,
    ends_ptr,
    shares_ptr,
    left_ptr,
    right_ptr,
    batch,
    length,
    heads,
    repeats,
    stride: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ALL_H: tl.constexpr,
    DOT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """States that enter pieces from the left and the right, (b, h, pieces, p, n), and shares as of `_states_kernel`."""
    blocks = tl.cdiv(N, BLOCK_N)
    pieces = tl.cdiv(length, PIECE)
    program = tl.program_id(0)
    n = program % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    head = program // blocks % heads
    backwards = program // blocks // heads % 2 == 1
    row = (program // blocks // heads // 2).to(tl.int64)
    one = tl.cast(batch, tl.int64) * pieces * heads
    x_ptr += row * length * stride + head * P
    maps = tl.where(backwards, B_b_ptr, B_f_ptr) + row * length * stride + (head // repeats) * N
    place = row * pieces * heads + head
    columns = vectors_ptr + tl.where(backwards, 3 * one, one) * PIECE + place * PIECE
    ends = ends_ptr + tl.where(backwards, one, 0) + place
    shares_ptr += place * heads * PIECE
    r = tl.arange(0, PIECE)
    h = tl.arange(0, ALL_H)
    weight, own = _of_share(from_x_ptr, D_ptr, head, heads, P, BLOCK_P, ALL_H, DOT)
    p = tl.arange(0, BLOCK_P)[:, None]
    n_ok = n < N
    ok = (p < P) & n_ok[None, :]
    states = tl.where(backwards, right_ptr, left_ptr) + (row * heads + head) * pieces * (P * N) + p * N + n[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in tl.range(0, pieces, num_stages=STAGES):
        piece = tl.where(backwards, pieces - 1 - k, k)
        begin = piece * PIECE
        t_ok = r < length - begin
        x = _rows(x_ptr + begin * stride, r, t_ok, stride, P, BLOCK_P, DOT)
        B_at = maps + begin * stride + r[:, None] * stride + n[None, :]
        B = tl.load(B_at, mask=t_ok[:, None] & n_ok[None, :], other=0.0)
        end = tl.load(ends + piece * heads)
        factor = tl.exp2(tl.load(columns + piece * heads * PIECE + r) + tl.where(backwards, 0.0, end))
        tl.store(states + piece * (P * N), state, mask=ok)
        state = tl.dot(tl.trans(x), (B * factor[:, None]).to(DOT), state * tl.exp2(end))
        share = tl.dot(x, weight) + own[None, :]
        # Several programs see a piece, one of them writes.
        writes = (h < heads) & ((piece % 2 == 1) == backwards) & (program % blocks == 0)
        share_at = shares_ptr + piece * heads * heads * PIECE + h[None, :] * PIECE + r[:, None]
        tl.store(share_at, share, mask=writes[None, :] & (r >= 0)[:, None])


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
def state_options(
    dtype: torch.dtype, nheads: int, headdim: int, n: int, length: int, tile: StateTile
) -> dict[str, Any]:
    """Compile-time arguments of `_states_kernel` from P on."""
    block_p, block_n = max(16, next_power_of_2(headdim)), max(16, next_power_of_2(n))
    return {
        "P": headdim,
        "N": n,
        "PIECE": piece_of(length),
        "COLUMNS": tile.columns,
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "ALL_H": max(16, next_power_of_2(nheads)),
        "DOT": dot_type(dtype),
        "STAGES": tile.stages,
        "num_warps": warps_of(tile.warps, block_p, block_n),
    }


def sweep_blocks(n: int, tile: SweepTile) -> int:
    """Programs that share the states of a head."""
    return cdiv(n, max(16, min(tile.states, next_power_of_2(n))))


@functools.cache
def sweep_options(
    dtype: torch.dtype, nheads: int, headdim: int, n: int, length: int, tile: SweepTile
) -> dict[str, Any]:
    """Compile-time arguments of `_sweep_kernel` from P on."""
    block_p, block_n = max(16, next_power_of_2(headdim)), max(16, min(tile.states, next_power_of_2(n)))
    return {
        "P": headdim,
        "N": n,
        "PIECE": piece_of(length),
        "BLOCK_P": block_p,
        "BLOCK_N": block_n,
        "ALL_H": max(16, next_power_of_2(nheads)),
        "DOT": dot_type(dtype),
        "STAGES": tile.stages if block_p <= 64 else 2,  # tiles of all stages are in shared memory
        "num_warps": warps_of(tile.warps, block_p, max(16, next_power_of_2(n))),
    }
