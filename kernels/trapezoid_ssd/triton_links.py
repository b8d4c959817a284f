"""The kernel of `trapezoid_ssd` for all gradients of one head in one chunk but those of keys, queries and angles.

Notation as in `triton_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import _dot_add, _dot_nt, _halves, _last, _less, _load_state, _log2_sums, _tile, _whole
from ..triton_utils import quick
from .triton_kernels import _sum_of_positions, _weights
from .triton_turned import _decays


@triton.jit
def _sum_of_ranks(x, Q: tl.constexpr, RANKS: tl.constexpr):
    """[Q] summed over the ranks of each position, [Q / ranks]."""
    return x if RANKS == 1 else tl.sum(tl.reshape(x, [Q // RANKS, RANKS]), 1)


@quick
@triton.jit(do_not_specialize=["length", "nheads"])
def _trapezoid_links_kernel(
    x_ptr, v_ptr, log_decay_ptr, gamma_ptr, beta_ptr, k_ptr, q_ptr, D_ptr, x_rank_ptr, seq_ptr, entering_ptr,
    leaving_ptr, dy_ptr, dx_ptr, dlog_decay_ptr, direct_ptr, dweight_ptr, dD_ptr, dx_rank_ptr, kernel_ptr,
    length, nheads, x_stride_b, x_stride_t, v_stride_b, v_stride_t, HAS_RANK: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    RANKS: tl.constexpr,
):  # fmt: skip
    """From the state that enters and the gradient of the one that leaves.

    Matrices over a chunk are [s, t], from the row that writes to the one that reads. Rows of one position all read each
    other, with gamma; others with the weight gamma + beta of the next position. Leaves K^T, the gradient of products of
    keys and queries, and for each position the gradients of its weight, and of gamma without dt.
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
    k = _tile(k_ptr + rows * N, begin, steps, ok, nheads * N, N, BLOCK_N, DOT)
    q = _tile(q_ptr + rows * N, begin, steps, ok, nheads * N, N, BLOCK_N, DOT)
    x = _tile(v_ptr + row * v_stride_b + head * P, begin, steps, ok, v_stride_t, P, BLOCK_P, DOT)
    gradient = _tile(dy_ptr + rows * P, begin, steps, ok, nheads * P, P, BLOCK_P, DOT)
    entering = _load_state(entering_ptr + border, P, N, BLOCK_P, BLOCK_N).to(DOT)
    leaving = _load_state(leaving_ptr + border, P, N, BLOCK_P, BLOCK_N).to(DOT)
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
    k, k_low = _halves(k, PRECISION)
    q, q_low = _halves(q, PRECISION)
    v, v_low = _halves(x, PRECISION)
    dy, dy_low = _halves(gradient, PRECISION)
    products = _dot_nt(v, v_low, dy, dy_low, ACC, PRECISION)
    tl.store(kernel_ptr + place * (Q * Q) + (steps[:, None] * Q + steps[None, :]), products * weights)
    scores = _dot_nt(k, k_low, q, q_low, ACC, PRECISION)
    mixing, mixing_low = _halves((scores * weights).to(DOT), PRECISION)
    linking = products * (scores * decays)
    direct = tl.sum(tl.where(same, linking, 0.0), 1)
    linking = tl.where(same, 0.0, linking)
    dweight = tl.sum(linking, 1)
    columns = tl.sum(linking * weight[:, None], 0)

    if BLOCK_P < 64 or BLOCK_N < 64:
        passed = tl.sum(tl.sum(entering.to(ACC) * leaving.to(ACC), 1), 0)
    enter, enter_low = _halves(entering, PRECISION)
    leave, leave_low = _halves(leaving, PRECISION)
    p_columns = tl.arange(0, BLOCK_P)
    if BLOCK_P >= 64 and BLOCK_N >= 64:
        # The trace of this one is their product; tensor cores have the time.
        both = _dot_nt(enter, enter_low, leave, leave_low, ACC, PRECISION)
        passed = tl.sum(tl.sum(tl.where(p_columns[:, None] == p_columns[None, :], both, 0.0), 1), 0)
    wide = gradient.to(ACC)
    reads = tl.sum(_dot_nt(q, q_low, enter, enter_low, ACC, PRECISION) * wide, 1) * decay_in
    dv = _dot_nt(k, k_low, leave, leave_low, ACC, PRECISION)  # [s, p]
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
