"""The Triton kernel of the gradient of `trapezoid_ssd`: one head in one chunk. Notation as in `triton_kernels.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import _dot_add, _dot_nt, _halves, _last, _less, _log2_sums, _whole
from ..triton_utils import quick
from .triton_kernels import _increments, _put, _rotated, _spin, _weights
from .triton_turned import _angles_of_rows, _apart, _decays, _inputs, _turned


@triton.jit
def _sum_of_ranks(x, Q: tl.constexpr, RANKS: tl.constexpr):
    """[Q] summed over the ranks of each position, [Q / ranks]."""
    return tl.sum(tl.reshape(x, [Q // RANKS, RANKS]), 1)


@triton.jit
def _sum_of_positions(tile, Q: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr):
    """[Q, width] summed over positions, [ranks, width]."""
    return tl.sum(tile, 0)[None, :] if RANKS == 1 else tl.sum(tl.reshape(tile, [Q // RANKS, RANKS, WIDTH]), 0)


@triton.jit
def _spin_of_turning(gradient, tile, Q: tl.constexpr, BLOCK_N: tl.constexpr, TURNING: tl.constexpr):
    """`_spin` of the columns that may turn."""
    if TURNING < BLOCK_N:
        gradient, _ = _apart(gradient, Q, BLOCK_N)
        tile, _ = _apart(tile, Q, BLOCK_N)
    return _spin(gradient, tile, Q, TURNING)


@triton.jit
def _put_back(
    gradient, cos, sin, out_ptr, rows, ok, N: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr,
    TURNING: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Store the gradient of keys or queries before they were turned."""
    if TURNING < BLOCK_N:
        gradient, rest = _apart(gradient, Q, BLOCK_N)
        _put(out_ptr, rows, ok, TURNING, rest, N, TURNING, HALF)
    _put(out_ptr, rows, ok, 0, _rotated(gradient, cos, -sin, Q, TURNING), N, TURNING, HALF)


@quick
@triton.jit(do_not_specialize=["length", "nheads", "repeats"])
def _trapezoid_heads_kernel(
    dk_ptr, dq_ptr, dB_ptr, dC_ptr, dB_bias_ptr, dC_bias_ptr, length, nheads, repeats, N: tl.constexpr,
    BLOCK_N: tl.constexpr, T: tl.constexpr, RANKS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over a group's heads, and for each head over T rows: gradients of B and its bias, or of C and its bias.

    The latter are (b, blocks of T rows, h, r, n).
    """
    groups = nheads // repeats
    group = tl.program_id(0) % groups
    blocks = tl.cdiv(length, T)
    block = (tl.program_id(0) // groups % blocks).to(tl.int64)
    row = (tl.program_id(0) // groups // blocks).to(tl.int64)
    steps, columns, ranks = tl.arange(0, T), tl.arange(0, BLOCK_N), tl.arange(0, RANKS)
    begin = block * T
    columns_ok = (columns < N)[None, :]
    ok = (steps < length - begin)[:, None] & columns_ok
    of_head_ptr, out_ptr, bias_ptr = dk_ptr, dB_ptr, dB_bias_ptr
    if tl.program_id(1) == 1:
        of_head_ptr, out_ptr, bias_ptr = dq_ptr, dC_ptr, dC_bias_ptr
    offset = steps[:, None] * (nheads * N) + columns[None, :]
    total = tl.zeros([T, BLOCK_N], ACC)
    for head in range(group * repeats, (group + 1) * repeats):
        tile = tl.load(of_head_ptr + ((row * length + begin) * nheads + head) * N + offset, mask=ok, other=0.0).to(ACC)
        total += tile
        place = ((row * blocks + block) * nheads + head) * (RANKS * N)
        sums = _sum_of_positions(tile, T, BLOCK_N, RANKS)
        tl.store(bias_ptr + place + (ranks[:, None] * N + columns[None, :]), sums, mask=columns_ok)
    out = out_ptr + (row * length + begin) * (groups * N) + group * N
    tl.store(out + (steps[:, None] * (groups * N) + columns[None, :]), total, mask=ok)


@quick
@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats"])
def _trapezoid_bwd_kernel(
    x_ptr, log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr,
    x_rank_ptr, seq_ptr, borders_ptr, dphase_ptr, dphi_end_ptr, dy_ptr, dx_ptr, dlog_decay_ptr, dgamma_ptr, ddt_ptr,
    dweight_ptr, drate_ptr, dphi_ptr, dk_ptr, dq_ptr, dD_ptr, dx_rank_ptr,
    rows, length, nheads, repeats, x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    HAS_DPHASE: tl.constexpr, HAS_DPHI: tl.constexpr,
    HAS_RANK: tl.constexpr, S: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr, RANKS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of one head in one chunk, from the state that enters it and the gradient of the one that leaves.

    Matrices over a chunk are [s, t], from the row that writes to the one that reads, or the other way round where their
    transpose is an operand. Turning key and query of one position together changes nothing: with the same rounded
    numbers in both products, what the two add to the gradient of their angle cancels to the last digits.
    """
    head = tl.program_id(0) % nheads
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // nheads % chunks
    row = (tl.program_id(0) // nheads // chunks).to(tl.int64)
    group = head // repeats
    positions = length // RANKS
    steps = tl.arange(0, Q)
    at, ranks = steps // RANKS, steps % RANKS
    begin = chunk.to(tl.int64) * Q
    first = begin // RANKS
    ok = steps < length - begin
    of_head = row * positions * nheads + head
    heads = row * nheads + head
    place = (row * chunks + chunk) * nheads + head
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * positions
    border = borders_ptr + (heads * chunks + chunk) * (BLOCK_P * BLOCK_N)
    border_offset = tl.arange(0, BLOCK_P)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    leaving = tl.load(border + rows.to(tl.int64) * nheads * chunks * (BLOCK_P * BLOCK_N) + border_offset)
    # What later chunks make of the angles, which is what they make of the turn of the state between.
    pairs = tl.arange(0, TURNING // 2)
    later = tl.zeros([TURNING // 2], ACC)
    if chunk < chunks - 1:
        after = tl.load(border + BLOCK_P * BLOCK_N + border_offset).to(ACC)
        later -= tl.sum(_spin_of_turning(leaving.to(ACC), after, BLOCK_P, BLOCK_N, TURNING), 0)
        if HAS_DPHASE:
            later += tl.load(dphase_ptr + heads * S + pairs, mask=pairs < S, other=0.0).to(ACC)
    elif HAS_DPHI:
        later += tl.load(dphi_end_ptr + heads * S + pairs, mask=pairs < S, other=0.0).to(ACC)
    entering = tl.load(border + border_offset)
    passed = tl.sum(tl.sum(entering.to(ACC) * leaving.to(ACC), 1), 0)
    gamma, beta, following = _weights(
        gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
    )
    dt = _increments(gamma, beta, Q, RANKS)
    rate_row = rate_ptr + row * positions * S
    cos, sin = _angles_of_rows(rate_row, phases_ptr, dt, first, at, ok, heads, chunk, chunks, S, TURNING // 2, ACC)
    B_tile = B_ptr + row * B_stride_b + begin * B_stride_t + group * N
    C_tile = C_ptr + row * C_stride_b + begin * C_stride_t + group * N
    key = _turned(
        B_tile, steps[:, None] * B_stride_t, ok[:, None], B_bias_ptr, head, ranks, cos, sin, N, Q, BLOCK_N, TURNING,
        HALF, DOT, ACC, RANKS,
    )  # fmt: skip
    query = _turned(
        C_tile, steps[:, None] * C_stride_t, ok[:, None], C_bias_ptr, head, ranks, cos, sin, N, Q, BLOCK_N, TURNING,
        HALF, DOT, ACC, RANKS,
    )  # fmt: skip
    x_tile = x_ptr + row * x_stride_b + first * x_stride_t + head * P
    x = _inputs(x_tile, at, ok, ranks, x_rank_ptr, head, x_stride_t, P, BLOCK_P, DOT, ACC, RANKS, HAS_RANK)
    dy_tile = dy_ptr + (row * length + begin) * (nheads * P) + head * P
    gradient = _inputs(dy_tile, steps, ok, ranks, x_rank_ptr, head, nheads * P, P, BLOCK_P, DOT, ACC, RANKS, False)

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
    k, k_low = _halves(key, PRECISION)
    q, q_low = _halves(query, PRECISION)
    v, v_low = _halves(x, PRECISION)
    dy, dy_low = _halves(gradient, PRECISION)

    # What rows of the chunk write for each other, [s, t].
    decays = tl.exp2(
        tl.where(linked, _less(high[None, :], low[None, :], high[:, None], low[:, None], EXACT), float("-inf"))
    )
    weights = tl.where(same, gamma[:, None], weight[:, None])
    products = _dot_nt(v, v_low, dy, dy_low, ACC, PRECISION)
    scores = _dot_nt(k, k_low, q, q_low, ACC, PRECISION) * decays
    linking = products * scores
    own = tl.sum(tl.where(same, linking, 0.0), 1)
    linking = tl.where(same, 0.0, linking)
    dweight = tl.sum(linking, 1)
    columns = tl.sum(linking * weight[:, None], 0)
    mixing, mixing_low = _halves((scores * weights).to(DOT), PRECISION)
    kernel, kernel_low = _halves((products * (decays * weights)).to(DOT), PRECISION)

    # Inputs.
    enter, enter_low = _halves(entering.to(DOT), PRECISION)
    leave, leave_low = _halves(leaving.to(DOT), PRECISION)
    dv = _dot_nt(k, k_low, leave, leave_low, ACC, PRECISION)  # [s, p]
    dweight += tl.sum(dv * x.to(ACC), 1) * decay_out
    late = decay_out * weight
    dv = _dot_add(mixing, mixing_low, dy, dy_low, dv * late[:, None], ACC, PRECISION)
    dv += gradient.to(ACC) * tl.load(D_ptr + head).to(ACC)
    tl.store(dD_ptr + place, tl.sum(tl.sum(gradient.to(ACC) * x.to(ACC), 1), 0))
    p_columns = tl.arange(0, BLOCK_P)
    at_few = tl.arange(0, Q // RANKS)
    ok_few = at_few < positions - first
    if HAS_RANK:
        factors = tl.load(
            x_rank_ptr + (head * RANKS + ranks[:, None]) * P + p_columns[None, :],
            mask=(p_columns < P)[None, :],
            other=0.0,
        )
        dx = tl.sum(tl.reshape(dv * factors, [Q // RANKS, RANKS, BLOCK_P]), 1)
        plain = _inputs(x_tile, at, ok, ranks, x_rank_ptr, head, x_stride_t, P, BLOCK_P, DOT, ACC, RANKS, False)
        of_rank = tl.arange(0, RANKS)[:, None] * P + p_columns[None, :]
        dx_rank = _sum_of_positions(dv * plain.to(ACC), Q, BLOCK_P, RANKS)
        tl.store(dx_rank_ptr + place * (RANKS * P) + of_rank, dx_rank, mask=(p_columns < P)[None, :])
    else:
        dx = dv
    dx_tile = dx_ptr + (of_head + first * nheads) * P + (at_few[:, None] * (nheads * P) + p_columns[None, :])
    tl.store(dx_tile, dx, mask=ok_few[:, None] & (p_columns < P)[None, :])

    # Keys.
    scaled, scaled_low = _halves((x.to(ACC) * late[:, None]).to(DOT), PRECISION)
    dk = _dot_add(scaled, scaled_low, leave, leave_low, tl.zeros([Q, BLOCK_N], ACC), ACC, PRECISION)
    dk = _dot_add(kernel, kernel_low, q, q_low, dk, ACC, PRECISION)
    dangle = _spin_of_turning(dk, key.to(ACC), Q, BLOCK_N, TURNING)
    out = (row * length + begin) * (nheads * N) + head * N
    _put_back(dk, cos, sin, dk_ptr + out, steps[:, None] * (nheads * N), ok[:, None], N, Q, BLOCK_N, TURNING, HALF)

    # Queries: the kernel again, [t, s].
    linked = at[:, None] >= at[None, :]
    if PACKED:
        linked = linked & (index[:, None] == index[None, :])
    decays = tl.exp2(
        tl.where(linked, _less(high[:, None], low[:, None], high[None, :], low[None, :], EXACT), float("-inf"))
    )
    products = _dot_nt(dy, dy_low, v, v_low, ACC, PRECISION)
    weights = tl.where(same, gamma[None, :], weight[None, :])
    kernel, kernel_low = _halves((products * (decays * weights)).to(DOT), PRECISION)
    scaled, scaled_low = _halves((gradient.to(ACC) * decay_in[:, None]).to(DOT), PRECISION)
    dq = _dot_add(scaled, scaled_low, enter, enter_low, tl.zeros([Q, BLOCK_N], ACC), ACC, PRECISION)
    wide = query.to(ACC)
    reads = tl.sum(dq * wide, 1)
    dq = _dot_add(kernel, kernel_low, k, k_low, dq, ACC, PRECISION)
    dangle += _spin_of_turning(dq, wide, Q, BLOCK_N, TURNING)
    _put_back(dq, cos, sin, dq_ptr + out, steps[:, None] * (nheads * N), ok[:, None], N, Q, BLOCK_N, TURNING, HALF)

    # Decays and weights.
    change = dweight * weight - reads - columns
    found = passed * factor + tl.sum(reads, 0) + (tl.cumsum(change, 0) - change)
    vectors = of_head + (first + at) * nheads
    tl.store(dlog_decay_ptr + vectors, found, mask=ok & (ranks == 0))
    few = of_head + (first + at_few) * nheads
    direct = own + dweight
    if RANKS > 1:
        dweight, direct = _sum_of_ranks(dweight, Q, RANKS), _sum_of_ranks(direct, Q, RANKS)
    tl.store(dweight_ptr + few, dweight, mask=ok_few)

    # Angles: what comes at or after a row.
    through = later + tl.sum(dangle, 0)
    ddelta = through[None, :] - (tl.cumsum(dangle, 0) - dangle)
    if RANKS > 1:
        # The increment is at the first rank.
        ddelta = tl.sum(tl.reshape(tl.where((ranks == 0)[:, None], ddelta, 0.0), [Q // RANKS, RANKS, TURNING // 2]), 1)
        dt = _sum_of_ranks(dt, Q, RANKS)
    if chunk == 0:
        at_first = tl.sum(tl.where((at_few == 0)[:, None], ddelta, 0.0), 0)
        tl.store(dphi_ptr + heads * S + pairs, at_first, mask=pairs < S)
    ddelta = ddelta * 3.141592653589793
    offset = (first + at_few)[:, None] * S + pairs[None, :]
    tile_ok = ok_few[:, None] & (pairs < S)[None, :]
    rate = tl.load(rate_row + offset, mask=tile_ok, other=0.0).to(ACC)
    ddt = tl.sum(ddelta * rate, 1)
    tl.store(ddt_ptr + few, ddt, mask=ok_few)
    tl.store(dgamma_ptr + few, ddt + direct, mask=ok_few)
    drate_tile = drate_ptr + (of_head + first * nheads) * S + (at_few[:, None] * (nheads * S) + pairs[None, :])
    tl.store(drate_tile, ddelta * dt[:, None], mask=tile_ok)
