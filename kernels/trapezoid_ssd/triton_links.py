"""The kernel of `trapezoid_ssd` for all gradients of one head in one chunk but those of keys, queries and angles.

Notation as in `triton_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import _dot_add, _dot_nt, _halves, _last, _less, _load_state, _log2_sums, _tile, _whole
from ..triton_utils import quick
from .triton_kernels import _bias, _get, _sum_of_positions, _weights
from .triton_turned import _decays


@triton.jit
def _sum_of_ranks(x, Q: tl.constexpr, RANKS: tl.constexpr):
    """[Q] summed over the ranks of each position, [Q / ranks]."""
    return x if RANKS == 1 else tl.sum(tl.reshape(x, [Q // RANKS, RANKS]), 1)


@triton.jit
def _product(a, a_2, b, b_2, SPLIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T, whose columns are in two tiles each with SPLIT."""
    high, low = _halves(a, PRECISION)
    b_high, b_low = _halves(b, PRECISION)
    total = _dot_nt(high, low, b_high, b_low, ACC, PRECISION)
    if SPLIT:
        high, low = _halves(a_2, PRECISION)
        b_high, b_low = _halves(b_2, PRECISION)
        total = _dot_add(high, low, tl.trans(b_high), tl.trans(b_low), total, ACC, PRECISION)
    return total


@quick
@triton.jit(do_not_specialize=["length", "nheads", "repeats"])
def _trapezoid_links_kernel(
    x_ptr, v_ptr, log_decay_ptr, gamma_ptr, beta_ptr, k_ptr, q_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr,
    x_rank_ptr, seq_ptr, entering_ptr, leaving_ptr, dy_ptr, dx_ptr, dlog_decay_ptr, direct_ptr, dweight_ptr, dD_ptr,
    dx_rank_ptr, kernel_ptr, length, nheads, repeats, x_stride_b, x_stride_t, v_stride_b, v_stride_t, B_stride_b,
    B_stride_t, C_stride_b, C_stride_t, k_stride_h, k_stride_t, HALF: tl.constexpr, WIDTH: tl.constexpr,
    HAS_RANK: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """From the state that enters and the gradient of the one that leaves.

    Matrices over a chunk are [s, t], from the row that writes to the one that reads. Rows of one position all read each
    other, with gamma; others with the weight gamma + beta of the next position. Leaves K^T, the gradient of products of
    keys and queries, and for each position the gradients of its weight, and of gamma without dt. WIDTH: see
    `_trapezoid_turn_kernel`.
    """
    head = tl.program_id(0) % nheads
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // nheads % chunks
    row = (tl.program_id(0) // nheads // chunks).to(tl.int64)
    positions = length // RANKS
    steps = tl.arange(0, Q)
    at, ranks = steps // RANKS, steps % RANKS
    begin = chunk.to(tl.int64) * Q
    first = begin // RANKS
    ok = steps < length - begin
    of_head = row * positions * nheads + head
    place = (row * chunks + chunk) * nheads + head
    border = ((row * nheads + head) * chunks + chunk) * (P * N)
    rows = (row * length * nheads + head).to(tl.int64)
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * positions
    # With few columns that turn, the others are a tile of their own, of what they are made from.
    columns: tl.constexpr = WIDTH if WIDTH < N else BLOCK_N
    of_keys = row * length * nheads * WIDTH + tl.cast(head, tl.int64) * k_stride_h
    k = _tile(k_ptr + of_keys, begin, steps, ok, k_stride_t, WIDTH, columns, DOT)
    q = _tile(q_ptr + of_keys, begin, steps, ok, k_stride_t, WIDTH, columns, DOT)
    k_2, q_2 = k, q
    if WIDTH < N:
        B_tile = B_ptr + row * B_stride_b + begin * B_stride_t + head // repeats * N
        C_tile = C_ptr + row * C_stride_b + begin * C_stride_t + head // repeats * N
        k_2 = _get(B_tile, steps[:, None] * B_stride_t, ok[:, None], WIDTH, N, columns, HALF, ACC)
        k_2 = (k_2 + _bias(B_bias_ptr, head, WIDTH, Q, N, columns, HALF, ACC, RANKS)).to(DOT)
        q_2 = _get(C_tile, steps[:, None] * C_stride_t, ok[:, None], WIDTH, N, columns, HALF, ACC)
        q_2 = (q_2 + _bias(C_bias_ptr, head, WIDTH, Q, N, columns, HALF, ACC, RANKS)).to(DOT)
    x = _tile(v_ptr + row * v_stride_b + head * P, begin, steps, ok, v_stride_t, P, BLOCK_P, DOT)
    gradient = _tile(dy_ptr + rows * P, begin, steps, ok, nheads * P, P, BLOCK_P, DOT)
    p_rows = tl.arange(0, BLOCK_P)[:, None]
    if WIDTH < N:
        entering = _get(entering_ptr + border, p_rows * N, p_rows < P, 0, N, columns, False, DOT)
        leaving = _get(leaving_ptr + border, p_rows * N, p_rows < P, 0, N, columns, False, DOT)
        entering_2 = _get(entering_ptr + border, p_rows * N, p_rows < P, WIDTH, N, columns, False, DOT)
        leaving_2 = _get(leaving_ptr + border, p_rows * N, p_rows < P, WIDTH, N, columns, False, DOT)
    else:
        entering = _load_state(entering_ptr + border, P, N, BLOCK_P, BLOCK_N).to(DOT)
        leaving = _load_state(leaving_ptr + border, P, N, BLOCK_P, BLOCK_N).to(DOT)
        entering_2, leaving_2 = entering, leaving
    gamma, _, following = _weights(
        gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
    )
    log_decay = _decays(log_decay_ptr, of_head, first, at, ok, ranks, nheads, ACC, RANKS)
    high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
    high_last, low_last = _last(high, Q), _last(low, Q)
    decay_in = tl.exp2(_whole(high, low, EXACT))
    decay_out = tl.exp2(_less(high_last, low_last, high, low, EXACT))
    factor = tl.exp2(_whole(high_last, low_last, EXACT))
    linked = at[:, None] <= at[None, :]
    if PACKED:
        index = tl.load(seq_row + first + at, mask=ok, other=-1)
        before = tl.load(seq_row + tl.maximum(first - 1, 0))
        last = tl.load(seq_row + tl.minimum(begin + Q, length) // RANKS - 1)
        decay_in = tl.where(index == before, decay_in, 0.0)
        decay_out = tl.where(index == last, decay_out, 0.0)
        factor = tl.where(before == last, factor, 0.0)
        linked = linked & (index[:, None] == index[None, :])
    weight = gamma + following
    same = at[:, None] == at[None, :]
    between = _less(high[None, :], low[None, :], high[:, None], low[:, None], EXACT)
    decays = tl.exp2(tl.where(linked, between, float("-inf")))
    weights = decays * tl.where(same, gamma[:, None], weight[:, None])
    v, v_low = _halves(x, PRECISION)
    dy, dy_low = _halves(gradient, PRECISION)
    products = _dot_nt(v, v_low, dy, dy_low, ACC, PRECISION)
    tl.store(kernel_ptr + place * (Q * Q) + (steps[:, None] * Q + steps[None, :]), products * weights)
    split: tl.constexpr = WIDTH < N
    scores = _product(k, k_2, q, q_2, split, ACC, PRECISION)
    mixing, mixing_low = _halves((scores * weights).to(DOT), PRECISION)
    linking = products * (scores * decays)
    direct = tl.sum(tl.where(same, linking, 0.0), 1)
    linking = tl.where(same, 0.0, linking)
    dweight = tl.sum(linking, 1)
    columns = tl.sum(linking * weight[:, None], 0)

    p_columns = tl.arange(0, BLOCK_P)
    if BLOCK_P >= 64 and BLOCK_N >= 64:
        # The trace of this one is their product; tensor cores have the time.
        both = _product(entering, entering_2, leaving, leaving_2, split, ACC, PRECISION)
        passed = tl.sum(tl.sum(tl.where(p_columns[:, None] == p_columns[None, :], both, 0.0), 1), 0)
    else:
        passed = tl.sum(tl.sum(entering.to(ACC) * leaving.to(ACC), 1), 0)
        if split:
            passed += tl.sum(tl.sum(entering_2.to(ACC) * leaving_2.to(ACC), 1), 0)
    wide = gradient.to(ACC)
    reads = tl.sum(_product(q, q_2, entering, entering_2, split, ACC, PRECISION) * wide, 1) * decay_in
    dv = _product(k, k_2, leaving, leaving_2, split, ACC, PRECISION)  # [s, p]
    dweight += tl.sum(dv * x.to(ACC), 1) * decay_out
    dv = dv * (decay_out * weight)[:, None] + wide * tl.load(D_ptr + head).to(ACC)
    dv = _dot_add(mixing, mixing_low, dy, dy_low, dv, ACC, PRECISION)
    tl.store(dD_ptr + place, tl.sum(tl.sum(wide * x.to(ACC), 1), 0))

    change = dweight * weight - reads - columns
    found = passed * factor + tl.sum(reads, 0) + (tl.cumsum(change, 0) - change)
    tl.store(dlog_decay_ptr + of_head + (first + at) * nheads, found, mask=ok & (ranks == 0))
    at_few = tl.arange(0, Q // RANKS)
    ok_few = at_few < positions - first
    few = of_head + (first + at_few) * nheads
    tl.store(dweight_ptr + few, _sum_of_ranks(dweight, Q, RANKS), mask=ok_few)
    tl.store(direct_ptr + few, _sum_of_ranks(direct + dweight, Q, RANKS), mask=ok_few)
    p_ok = (p_columns < P)[None, :]
    dx = dv
    if HAS_RANK:
        of_rank = (head * RANKS + ranks[:, None]) * P + p_columns[None, :]
        dx = tl.reshape(dv * tl.load(x_rank_ptr + of_rank, mask=p_ok, other=0.0), [Q // RANKS, RANKS, BLOCK_P])
        dx = tl.sum(dx, 1)
        plain = _tile(x_ptr + row * x_stride_b + head * P, first, at, ok, x_stride_t, P, BLOCK_P, ACC)
        out = place * (RANKS * P) + tl.arange(0, RANKS)[:, None] * P + p_columns[None, :]
        tl.store(dx_rank_ptr + out, _sum_of_positions(dv * plain, Q, BLOCK_P, RANKS), mask=p_ok)
    tl.store(dx_ptr + few[:, None] * P + p_columns[None, :], dx, mask=ok_few[:, None] & p_ok)
