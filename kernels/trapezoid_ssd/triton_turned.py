"""Kernels of `trapezoid_ssd` that turn keys and queries where they use them, and never write them, for outputs.

Rows of tiles, counted by `length`, are (position, rank) pairs, as in `triton_kernels.py`. An input has the weight gamma
+ beta of the next position where a later position reads it, and gamma where its own one does, whose ranks all read each
other. Of BLOCK_N columns the first TURNING may turn, all or half of them; the angles of missing pairs are 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import (
    _dot_add,
    _dot_nt,
    _halves,
    _last,
    _less,
    _log2_sums,
    _vector,
    _whole,
    keep_addresses_in_loops,
)
from ..triton_utils import quick
from .triton_kernels import _bias, _directions, _get, _of_positions, _rotated, _weights


@triton.jit
def _places(start, N: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr):
    """Where BLOCK_N columns of tiles from `start` on lie in memory, and which exist."""
    columns = start + tl.arange(0, BLOCK_N)
    places, ok = columns, columns < N
    if HALF:
        pair, second = columns // 2, columns % 2
        places, ok = pair + second * (N // 2), pair < N // 2
        if N % 2:
            single = (pair == N // 2) & (second == 0)
            places, ok = tl.where(single, N - 1, places), ok | single
    return places, ok


@triton.jit
def _beside(first, second, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """[rows, n] of the tiles of its first and of its last columns."""
    return tl.reshape(tl.permute(tl.join(first, second), (0, 2, 1)), [ROWS, BLOCK_N])


@triton.jit
def _biased(
    ptr, rows, ok, bias_ptr, head, start, N: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
    ACC: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Keys or queries of one head, BLOCK_N columns from `start` on, with what is added to them."""
    tile = _get(ptr, rows, ok, start, N, BLOCK_N, HALF, ACC)
    return tile + _bias(bias_ptr, head, start, tile.shape[0], N, BLOCK_N, HALF, ACC, RANKS)


@triton.jit
def _turned(
    ptr, rows, ok, bias_ptr, head, cos, sin, N: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr,
    TURNING: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Turned keys or queries of one head, [Q, n], as operands of products."""
    tile = _biased(ptr, rows, ok, bias_ptr, head, 0, N, TURNING, HALF, ACC, RANKS)
    tile = _rotated(tile, cos, sin, Q, TURNING).to(DOT)
    if TURNING < BLOCK_N:
        rest = _biased(ptr, rows, ok, bias_ptr, head, TURNING, N, TURNING, HALF, ACC, RANKS)
        tile = _beside(tile, rest.to(DOT), Q, BLOCK_N)
    return tile


@triton.jit
def _inputs(
    ptr, at, ok, x_rank_ptr, head, stride, P: tl.constexpr, BLOCK_P: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, RANKS: tl.constexpr, HAS_RANK: tl.constexpr,
):  # fmt: skip
    """Inputs of positions `at` and ranks, [Q, p]."""
    columns = tl.arange(0, BLOCK_P)
    mask = ok[:, None]
    if P < BLOCK_P:
        mask = mask & (columns < P)[None, :]
    x = tl.load(ptr + (at[:, None] * stride + columns[None, :]), mask=mask, other=0.0)
    if HAS_RANK:
        of_rank = (head * RANKS + tl.arange(0, RANKS))[:, None] * P + columns[None, :]
        factors = tl.load(x_rank_ptr + of_rank, mask=(columns < P)[None, :], other=0.0)
        x = x.to(ACC) * _of_positions(factors, at.shape[0])
    return x.to(DOT)


@triton.jit
def _decays(log_decay_ptr, vectors, first, at, ok, ranks, nheads, ACC: tl.constexpr, RANKS: tl.constexpr):
    """Log-decays of a chunk's rows: 0 but for the first rank of a position."""
    log_decay = _vector(log_decay_ptr + vectors, first, at, ok, nheads, ACC)
    if RANKS > 1:
        log_decay = tl.where(ranks == 0, log_decay, 0.0)
    return log_decay


@triton.jit
def _chunk(
    log_decay_ptr, seq_row, of_head, begin, length, steps, nheads, PACKED: tl.constexpr, EXACT: tl.constexpr,
    Q: tl.constexpr, ACC: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Of the rows of a chunk: sums of log-decays in two parts, decays from its start and to its end, the factor of the
    state, positions, and which of them the sequence links."""
    at, first, ok = steps // RANKS, begin // RANKS, steps < length - begin
    log_decay = _decays(log_decay_ptr, of_head, first, at, ok, steps % RANKS, nheads, ACC, RANKS)
    high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
    high_last, low_last = _last(high, Q), _last(low, Q)
    decay_in = tl.exp2(_whole(high, low, EXACT))
    decay_out = tl.exp2(_less(high_last, low_last, high, low, EXACT))
    factor = tl.exp2(_whole(high_last, low_last, EXACT))
    # The steps again, but not as constants: masks that are kept over the loop would fill the registers.
    own = at + tl.minimum(begin, 0).to(tl.int32)
    linked = own[:, None] >= own[None, :]
    if PACKED:
        index = tl.load(seq_row + first + at, mask=ok, other=-1)
        before = tl.load(seq_row + tl.maximum(first - 1, 0))
        last = tl.load(seq_row + tl.minimum(begin + Q, length) // RANKS - 1)
        linked = linked & (index[:, None] == index[None, :])
        decay_in = tl.where(index == before, decay_in, 0.0)
        decay_out = tl.where(index == last, decay_out, 0.0)
        factor = tl.where(before == last, factor, 0.0)
    return high, low, decay_in, decay_out, factor, own, linked


@triton.jit
def _store_rows(ptr, rows, steps, ok, stride, P: tl.constexpr, BLOCK_P: tl.constexpr):
    """Store [Q, p], rows `stride` apart."""
    columns = tl.arange(0, BLOCK_P)
    mask = ok[:, None]
    if P < BLOCK_P:
        mask = mask & (columns < P)[None, :]
    tl.store(ptr + (steps[:, None] * stride + columns[None, :]), rows, mask=mask)


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "parts", "part_length"])
def _trapezoid_fwd_kernel(
    x_ptr, log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr,
    x_rank_ptr, seq_ptr, state_ptr, y_ptr, final_ptr, length, nheads, repeats, parts, part_length,
    x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t, HAS_STATE: tl.constexpr,
    HAS_RANK: tl.constexpr, S: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr, RANKS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs of one head in one part of a row, chunk after chunk, the transposed state [n, p] in registers."""
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    group = head // repeats
    positions, chunks = length // RANKS, tl.cdiv(length, Q)
    place = (row * nheads + head) * parts + part
    n_places, n_ok = _places(0, N, BLOCK_N, HALF)
    p_columns = tl.arange(0, BLOCK_P)
    state_offset = p_columns[None, :] * N + n_places[:, None]
    state_ok = (p_columns < P)[None, :] & n_ok[:, None]
    state = tl.zeros([BLOCK_N, BLOCK_P], ACC)
    if HAS_STATE:
        state = tl.load(state_ptr + place * (P * N) + state_offset, mask=state_ok, other=0.0).to(ACC)
    steps = tl.arange(0, Q)
    at = steps // RANKS
    of_head = row * positions * nheads + head
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * positions
    begin_part = part.to(tl.int64) * part_length
    for begin in tl.range(
        begin_part, tl.minimum(begin_part + part_length, length), Q, num_stages=STAGES, disable_licm=True
    ):
        ok = steps < length - begin
        first, chunk = begin // RANKS, begin // Q
        gamma, _, following = _weights(
            gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
        )
        cos, sin = _directions(
            gamma_ptr + of_head, beta_ptr + of_head, rate_ptr + row * positions * S, phases_ptr, first, positions,
            nheads, row * nheads + head, chunk, chunks, tl.arange(0, TURNING // 2), S, Q, ACC, RANKS,
        )  # fmt: skip
        B_tile = B_ptr + row * B_stride_b + begin * B_stride_t + group * N
        C_tile = C_ptr + row * C_stride_b + begin * C_stride_t + group * N
        k = _turned(
            B_tile, steps[:, None] * B_stride_t, ok[:, None], B_bias_ptr, head, cos, sin, N, Q, BLOCK_N, TURNING,
            HALF, DOT, ACC, RANKS,
        )  # fmt: skip
        q = _turned(
            C_tile, steps[:, None] * C_stride_t, ok[:, None], C_bias_ptr, head, cos, sin, N, Q, BLOCK_N, TURNING,
            HALF, DOT, ACC, RANKS,
        )  # fmt: skip
        high, low, decay_in, decay_out, factor, own, linked = _chunk(
            log_decay_ptr, seq_row, of_head, begin, length, steps, nheads, PACKED, EXACT, Q, ACC, RANKS
        )
        between = _less(high[:, None], low[:, None], high[None, :], low[None, :], EXACT)
        weight = gamma + following
        # [t, s]; all ranks of one position read each other.
        links = tl.exp2(tl.where(linked, between, float("-inf")))
        links *= tl.where(own[:, None] == own[None, :], gamma[None, :], weight[None, :])
        k, k_low = _halves(k, PRECISION)
        q, q_low = _halves(q, PRECISION)
        scores = _dot_nt(q, q_low, k, k_low, ACC, PRECISION) * links
        entered, entered_low = _halves(state.to(DOT), PRECISION)
        y = _dot_add(q, q_low, entered, entered_low, tl.zeros([Q, BLOCK_P], ACC), ACC, PRECISION) * decay_in[:, None]
        x_tile = x_ptr + row * x_stride_b + first * x_stride_t + head * P
        x = _inputs(x_tile, at, ok, x_rank_ptr, head, x_stride_t, P, BLOCK_P, DOT, ACC, RANKS, HAS_RANK)
        mixing, mixing_low = _halves(scores.to(DOT), PRECISION)
        v, v_low = _halves(x, PRECISION)
        y = _dot_add(mixing, mixing_low, v, v_low, y, ACC, PRECISION)
        wide = x.to(ACC)
        y += tl.load(D_ptr + head).to(ACC) * wide
        y_tile = y_ptr + (row * length + begin) * (nheads * P) + head * P
        _store_rows(y_tile, y, steps, ok, nheads * P, P, BLOCK_P)
        late, late_low = _halves((wide * (decay_out * weight)[:, None]).to(DOT), PRECISION)
        state = _dot_add(tl.trans(k), tl.trans(k_low), late, late_low, state * factor, ACC, PRECISION)
    if part == parts - 1:
        tl.store(final_ptr + (row * nheads + head) * (P * N) + state_offset, state, mask=state_ok)


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "parts", "part_length"])
def _trapezoid_parts_kernel(
    x_ptr, log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, B_bias_ptr, x_rank_ptr, seq_ptr, ends_ptr,
    factors_ptr, length, nheads, repeats, parts, part_length, x_stride_b, x_stride_t, B_stride_b, B_stride_t,
    HAS_RANK: tl.constexpr, S: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr, RANKS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """What one part of a row adds to the state of a head, (b, h, parts, p, n), and the factor of what enters it."""
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    group = head // repeats
    positions, chunks = length // RANKS, tl.cdiv(length, Q)
    place = (row * nheads + head) * parts + part
    n_places, n_ok = _places(0, N, BLOCK_N, HALF)
    p_rows = tl.arange(0, BLOCK_P)
    state = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    steps = tl.arange(0, Q)
    at, ranks = steps // RANKS, steps % RANKS
    of_head = row * positions * nheads + head
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * positions
    begin_part = part.to(tl.int64) * part_length
    through = tl.full([], 1.0, ACC)
    for begin in tl.range(
        begin_part, tl.minimum(begin_part + part_length, length), Q, num_stages=STAGES, disable_licm=True
    ):
        ok = steps < length - begin
        first, chunk = begin // RANKS, begin // Q
        gamma, _, following = _weights(
            gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
        )
        cos, sin = _directions(
            gamma_ptr + of_head, beta_ptr + of_head, rate_ptr + row * positions * S, phases_ptr, first, positions,
            nheads, row * nheads + head, chunk, chunks, tl.arange(0, TURNING // 2), S, Q, ACC, RANKS,
        )  # fmt: skip
        B_tile = B_ptr + row * B_stride_b + begin * B_stride_t + group * N
        k = _turned(
            B_tile, steps[:, None] * B_stride_t, ok[:, None], B_bias_ptr, head, cos, sin, N, Q, BLOCK_N, TURNING,
            HALF, DOT, ACC, RANKS,
        )  # fmt: skip
        log_decay = _decays(log_decay_ptr, of_head, first, at, ok, ranks, nheads, ACC, RANKS)
        high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
        high_last, low_last = _last(high, Q), _last(low, Q)
        factor = tl.exp2(_whole(high_last, low_last, EXACT))
        scale = tl.exp2(_less(high_last, low_last, high, low, EXACT)) * (gamma + following)
        if PACKED:
            index = tl.load(seq_row + first + at, mask=ok, other=-1)
            before = tl.load(seq_row + tl.maximum(first - 1, 0))
            last = tl.load(seq_row + tl.minimum(begin + Q, length) // RANKS - 1)
            scale = tl.where(index == last, scale, 0.0)
            factor = tl.where(before == last, factor, 0.0)
        x_tile = x_ptr + row * x_stride_b + first * x_stride_t + head * P
        x = _inputs(x_tile, at, ok, x_rank_ptr, head, x_stride_t, P, BLOCK_P, DOT, ACC, RANKS, HAS_RANK)
        late, late_low = _halves((x.to(ACC) * scale[:, None]).to(DOT), PRECISION)
        k, k_low = _halves(k, PRECISION)
        state = _dot_add(tl.trans(late), tl.trans(late_low), k, k_low, state * factor, ACC, PRECISION)
        through = through * factor
    ends = ends_ptr + place * (P * N) + (p_rows[:, None] * N + n_places[None, :])
    tl.store(ends, state, mask=(p_rows < P)[:, None] & n_ok[None, :])
    tl.store(factors_ptr + place, through)


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "parts", "part_length"])
def _trapezoid_ranks_fwd_kernel(
    x_ptr, log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr,
    x_rank_ptr, seq_ptr, state_ptr, y_ptr, final_ptr, length, nheads, repeats, parts, part_length,
    x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t, HAS_STATE: tl.constexpr,
    HAS_RANK: tl.constexpr, S: tl.constexpr, TURNING: tl.constexpr, HALF: tl.constexpr, RANKS: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """`_trapezoid_fwd_kernel` for several ranks, with the state [p, n] in registers.

    It goes on to the next chunk before outputs are made: then less is held at a time.
    """
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    group = head // repeats
    positions, chunks = length // RANKS, tl.cdiv(length, Q)
    place = (row * nheads + head) * parts + part
    of_head = row * positions * nheads + head
    n_places, n_ok = _places(0, N, BLOCK_N, HALF)
    p_columns = tl.arange(0, BLOCK_P)
    state_offset = p_columns[:, None] * N + n_places[None, :]
    state_ok = (p_columns < P)[:, None] & n_ok[None, :]
    state = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if HAS_STATE:
        state = tl.load(state_ptr + place * (P * N) + state_offset, mask=state_ok, other=0.0).to(ACC)
    steps = tl.arange(0, Q)
    at = steps // RANKS
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * positions
    begin_part = part.to(tl.int64) * part_length
    for begin in tl.range(
        begin_part, tl.minimum(begin_part + part_length, length), Q, num_stages=STAGES, disable_licm=True
    ):
        ok = steps < length - begin
        first, chunk = begin // RANKS, begin // Q
        gamma, _, following = _weights(
            gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
        )
        high, low, decay_in, decay_out, factor, own, linked = _chunk(
            log_decay_ptr, seq_row, of_head, begin, length, steps, nheads, PACKED, EXACT, Q, ACC, RANKS
        )
        weight = gamma + following
        cos, sin = _directions(
            gamma_ptr + of_head, beta_ptr + of_head, rate_ptr + row * positions * S, phases_ptr, first, positions,
            nheads, row * nheads + head, chunk, chunks, tl.arange(0, TURNING // 2), S, Q, ACC, RANKS,
        )  # fmt: skip
        entered, entered_low = _halves(state.to(DOT), PRECISION)
        B_tile = B_ptr + row * B_stride_b + begin * B_stride_t + group * N
        k = _turned(
            B_tile, steps[:, None] * B_stride_t, ok[:, None], B_bias_ptr, head, cos, sin, N, Q, BLOCK_N, TURNING,
            HALF, DOT, ACC, RANKS,
        )  # fmt: skip
        x_tile = x_ptr + row * x_stride_b + first * x_stride_t + head * P
        x = _inputs(x_tile, at, ok, x_rank_ptr, head, x_stride_t, P, BLOCK_P, DOT, ACC, RANKS, HAS_RANK)
        k, k_low = _halves(k, PRECISION)
        late, late_low = _halves((x.to(ACC) * (decay_out * weight)[:, None]).to(DOT), PRECISION)
        state = _dot_add(tl.trans(late), tl.trans(late_low), k, k_low, state * factor, ACC, PRECISION)
        between = _less(high[:, None], low[:, None], high[None, :], low[None, :], EXACT)
        # [t, s]; all ranks of one position read each other.
        links = tl.exp2(tl.where(linked, between, float("-inf")))
        links *= tl.where(own[:, None] == own[None, :], gamma[None, :], weight[None, :])
        C_tile = C_ptr + row * C_stride_b + begin * C_stride_t + group * N
        q = _turned(
            C_tile, steps[:, None] * C_stride_t, ok[:, None], C_bias_ptr, head, cos, sin, N, Q, BLOCK_N, TURNING,
            HALF, DOT, ACC, RANKS,
        )  # fmt: skip
        q, q_low = _halves(q, PRECISION)
        y = _dot_nt(q, q_low, entered, entered_low, ACC, PRECISION) * decay_in[:, None]
        scores = _dot_nt(q, q_low, k, k_low, ACC, PRECISION) * links
        mixing, mixing_low = _halves(scores.to(DOT), PRECISION)
        v, v_low = _halves(x, PRECISION)
        y = _dot_add(mixing, mixing_low, v, v_low, y, ACC, PRECISION)
        y += tl.load(D_ptr + head).to(ACC) * x.to(ACC)
        y_tile = y_ptr + (row * length + begin) * (nheads * P) + head * P
        _store_rows(y_tile, y, steps, ok, nheads * P, P, BLOCK_P)
    if part == parts - 1:
        tl.store(final_ptr + (row * nheads + head) * (P * N) + state_offset, state, mask=state_ok)
