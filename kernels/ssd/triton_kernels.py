"""The Triton kernels of `ssd`, shared with `quasiseparable`: outputs, sweeps over states, gradients.

Notation as in `chunked.py`: u is the sum of log-decays from the start of a chunk, S the state that enters a chunk, R
the gradient of the state that leaves it. Kernels count steps: step s is position s, or l - 1 - s with REVERSE, so that
a recurrence from the right is the same code. Tiles are [chunk of Q steps, p] or [Q, n], states [p, n]. Every dot takes
operands as they were loaded, or rounded results that keep their orientation: a transposed result of a dot is never
the operand of another one, which some versions of Triton compile wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a sweep does, as bits of its MODE.
DESCENDING = 1  # from the last chunk to the first
ADJOINT = 2  # the gradient of a recurrence: R <- e^{u_last} R + sum_t e^{u_t} value_t key_t^T
REVERSE = 4  # steps count positions from the right
SHIFT = 8  # the value of step s is that of step s + 1, zero where a sequence ends


@triton.jit
def _log2_sums(log_decay, ACC: tl.constexpr, EXACT: tl.constexpr):
    """Inclusive sums of log-decays, base 2, and the log-decays, each as two parts to be added.

    With EXACT the high parts are multiples of 2^-9 and small enough that their sums and differences are exact, so that
    the difference of two sums has the digits of the terms between, also next to strong decays.
    """
    log_decay = log_decay * tl.full([], 1.4426950408889634, ACC)
    lowest: tl.constexpr = -256.0 if tl.float32 == ACC else -2048.0  # 2 to this is zero; keeps the sums small
    log_decay = tl.where(log_decay < lowest, lowest, log_decay)
    if EXACT:
        high = tl.floor(log_decay * 512.0) * 0.001953125
        low = log_decay - high
        return tl.cumsum(high, 0), tl.cumsum(low, 0), high, low
    sums = tl.cumsum(log_decay, 0)
    return sums, sums, log_decay, log_decay


@triton.jit
def _less(high, low, high_2, low_2, EXACT: tl.constexpr):
    """First minus second sum."""
    difference = high - high_2
    if EXACT:
        difference = difference + (low - low_2)
    return difference


@triton.jit
def _whole(high, low, EXACT: tl.constexpr):
    return high + low if EXACT else high


@triton.jit
def _last(x, Q: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, Q) == Q - 1, x, 0.0), 0)


@triton.jit
def _vector(ptr, position, ahead, ok, stride, ACC: tl.constexpr):
    """One number per step, zero beyond the row."""
    return tl.load(ptr + (position + ahead) * stride, mask=ok, other=0.0).to(ACC)


@triton.jit
def _tile(ptr, position, ahead, ok, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """[Q, BLOCK] rows of a tensor with contiguous last dimension, zero beyond the row and the width."""
    columns = tl.arange(0, BLOCK)
    mask = ok[:, None]
    if WIDTH < BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(ptr + position * stride + (ahead[:, None] * stride + columns[None, :]), mask=mask, other=0.0).to(DOT)


@triton.jit
def _state_tile(ptr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """Addresses and mask of a state, [BLOCK_P, BLOCK_N]."""
    rows, columns = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
    return ptr + (rows * N + columns), (rows < P) & (columns < N)


@triton.jit
def _position(begin, length, BACKWARDS: tl.constexpr):
    return length - 1 - begin if BACKWARDS else begin


@triton.jit(do_not_specialize=["length", "nheads", "repeats", "parts", "part_length"])
def _ssd_fwd_kernel(
    x_ptr,
    log_decay_ptr,
    B_ptr,
    C_ptr,
    weight_ptr,
    D_ptr,
    seq_ptr,
    state_ptr,
    y_ptr,
    final_ptr,
    length,
    nheads,
    repeats,
    parts,
    part_length,
    x_stride_b,
    x_stride_t,
    B_stride_b,
    B_stride_t,
    C_stride_b,
    C_stride_t,
    D_stride_b,
    D_stride_t,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_STATE: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Outputs of one head in one part of a row, chunk after chunk, the transposed state [n, p] in registers."""
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    group = head // repeats
    place = (row * nheads + head) * parts + part
    rows, columns = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_P)[None, :]
    state_ok = (rows < N) & (columns < P)
    state_offset = columns * N + rows
    state = tl.zeros([BLOCK_N, BLOCK_P], ACC)
    if HAS_STATE:
        state = tl.load(state_ptr + place * (P * N) + state_offset, mask=state_ok, other=0.0).to(ACC)
    x_row = x_ptr + row * x_stride_b + head * P
    B_row = B_ptr + row * B_stride_b + group * N
    C_row = C_ptr + row * C_stride_b + group * N
    y_row = y_ptr + row * length * nheads * P + head * P
    vectors = row * length * nheads + head
    steps = tl.arange(0, Q)
    p_columns = tl.arange(0, BLOCK_P)
    past = steps[:, None] >= steps[None, :]
    begin_part = part.to(tl.int64) * part_length
    for begin in tl.range(begin_part, tl.minimum(begin_part + part_length, length), Q, num_stages=STAGES):
        ok = steps < length - begin
        log_decay = _vector(log_decay_ptr + vectors, begin, steps, ok, nheads, ACC)
        high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
        high_last, low_last = _last(high, Q), _last(low, Q)
        decay_in = tl.exp2(_whole(high, low, EXACT))
        decay_out = tl.exp2(_less(high_last, low_last, high, low, EXACT))
        factor = tl.exp2(_whole(high_last, low_last, EXACT))
        linked = past
        if PACKED:
            seq_row = seq_ptr + row * length
            index = tl.load(seq_row + begin + steps, mask=ok, other=-1)
            before = tl.load(seq_row + tl.maximum(begin - 1, 0))
            last = tl.load(seq_row + tl.minimum(begin + Q, length) - 1)
            linked = linked & (index[:, None] == index[None, :])
            decay_in = tl.where(index == before, decay_in, 0.0)
            decay_out = tl.where(index == last, decay_out, 0.0)
            factor = tl.where(before == last, factor, 0.0)
        between = _less(high[:, None], low[:, None], high[None, :], low[None, :], EXACT)
        decays = tl.exp2(tl.where(linked, between, float("-inf")))  # [t, s]
        if HAS_WEIGHT:
            weight = _vector(weight_ptr + vectors, begin, steps, ok, nheads, ACC)
            decays = decays * weight[None, :]
            decay_out = decay_out * weight
        x = _tile(x_row, begin, steps, ok, x_stride_t, P, BLOCK_P, DOT)
        B = _tile(B_row, begin, steps, ok, B_stride_t, N, BLOCK_N, DOT)
        C = _tile(C_row, begin, steps, ok, C_stride_t, N, BLOCK_N, DOT)
        scores = tl.dot(C, tl.trans(B), input_precision=PRECISION, out_dtype=ACC) * decays
        y = tl.dot(C, state.to(DOT), input_precision=PRECISION, out_dtype=ACC) * decay_in[:, None]
        y += tl.dot(scores.to(DOT), x, input_precision=PRECISION, out_dtype=ACC)
        wide = x.to(ACC)
        if HAS_D:
            D = tl.load(D_ptr + row * D_stride_b + (begin + steps) * D_stride_t + head, mask=ok, other=0.0)
            y += D[:, None] * wide
        y_offset = steps[:, None] * (nheads * P) + p_columns[None, :]
        y_tile = y_row + begin * (nheads * P)
        tl.store(y_tile + y_offset, y, mask=ok[:, None] & (p_columns < P)[None, :])
        late = (wide * decay_out[:, None]).to(DOT)
        state = state * factor + tl.dot(tl.trans(B), late, input_precision=PRECISION, out_dtype=ACC)
    if part == parts - 1:
        tl.store(final_ptr + (row * nheads + head) * (P * N) + state_offset, state, mask=state_ok)


@triton.jit
def _sweep(
    value_ptr,
    key_ptr,
    log_decay_ptr,
    weight_ptr,
    seq_ptr,
    state_ptr,
    borders_ptr,
    ends_ptr,
    factors_ptr,
    final_ptr,
    row,
    head,
    part,
    length,
    nheads,
    repeats,
    parts,
    part_borders,
    value_stride_b,
    value_stride_t,
    key_stride_b,
    key_stride_t,
    MODE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    PACKED: tl.constexpr,
    STORE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # The numbers of the modes are those at the top of the file; kernels read no module variables.
    group = head // repeats
    borders = tl.cdiv(length, Q * SUBS)
    place = (row * nheads + head) * parts + part
    state_offset, state_ok = _state_tile(0, P, N, BLOCK_P, BLOCK_N)
    state = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if HAS_STATE:
        state = tl.load(state_ptr + place * (P * N) + state_offset, mask=state_ok, other=0.0).to(ACC)
    value_row = value_ptr + row * value_stride_b + head * P
    key_row = key_ptr + row * key_stride_b + group * N
    vectors = row * length * nheads + head
    border_row = borders_ptr + (row * nheads + head) * borders * (P * N)
    steps = tl.arange(0, Q)
    ahead = -steps if MODE & 4 else steps
    first_border = part.to(tl.int64) * part_borders
    count = tl.minimum(first_border + part_borders, borders) - first_border
    through = tl.full([], 1.0, ACC)
    for k in tl.range(0, count, num_stages=STAGES):
        border = first_border + count - 1 - k if MODE & 1 else first_border + k
        if STORE:
            tl.store(border_row + border * (P * N) + state_offset, state, mask=state_ok)
        for sub in tl.static_range(SUBS):
            begin = (border * SUBS + (SUBS - 1 - sub if MODE & 1 else sub)) * Q
            position = _position(begin, length, MODE & 4)
            ok = steps < length - begin
            log_decay = _vector(log_decay_ptr + vectors, position, ahead, ok, nheads, ACC)
            high, low, own_high, own_low = _log2_sums(log_decay, ACC, EXACT)
            high_last, low_last = _last(high, Q), _last(low, Q)
            factor = tl.exp2(_whole(high_last, low_last, EXACT))
            if MODE & 2:
                scale = tl.exp2(_whole(high, low, EXACT))
            elif MODE & 1:
                scale = tl.exp2(_less(high, low, own_high, own_low, EXACT))
            else:
                scale = tl.exp2(_less(high_last, low_last, high, low, EXACT))
            value_ok = ok
            value_position = position
            if MODE & 8:
                value_ok = steps + 1 < length - begin
                value_position = position - 1 if MODE & 4 else position + 1
            if PACKED:
                seq_row = seq_ptr + row * length
                index = tl.load(seq_row + position + ahead, mask=ok, other=-1)
                if MODE & 2:
                    # The gradient of the state that enters: what reads it is of the sequence of the step before.
                    edge = tl.maximum(tl.minimum(begin, length) - 1, 0)
                    far = tl.minimum(begin + Q, length) - 1
                elif MODE & 1:
                    edge = tl.minimum(begin, length - 1)
                    far = tl.minimum(begin + Q, length - 1)
                else:
                    edge = tl.minimum(begin + Q, length) - 1
                    far = tl.maximum(tl.minimum(begin, length) - 1, 0)
                edge_index = tl.load(seq_row + _position(edge, length, MODE & 4))
                far_index = tl.load(seq_row + _position(far, length, MODE & 4))
                scale = tl.where(index == edge_index, scale, 0.0)
                factor = tl.where(far_index == edge_index, factor, 0.0)
                if MODE & 8:
                    beside = tl.load(seq_row + value_position + ahead, mask=value_ok, other=-1)
                    value_ok = value_ok & (beside == index)
            if HAS_WEIGHT:
                scale = scale * _vector(weight_ptr + vectors, position, ahead, ok, nheads, ACC)
            value = _tile(value_row, value_position, ahead, value_ok, value_stride_t, P, BLOCK_P, DOT)
            key = _tile(key_row, position, ahead, ok, key_stride_t, N, BLOCK_N, DOT)
            scaled = tl.trans((value.to(ACC) * scale[:, None]).to(DOT))
            state = state * factor + tl.dot(scaled, key, input_precision=PRECISION, out_dtype=ACC)
            through = through * factor
    if STORE:
        if part == (0 if MODE & 1 else parts - 1):
            tl.store(final_ptr + (row * nheads + head) * (P * N) + state_offset, state, mask=state_ok)
    else:
        tl.store(ends_ptr + place * (P * N) + state_offset, state, mask=state_ok)
        tl.store(factors_ptr + place, through)


@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats", "parts", "part_borders", "of_second"])
def _ssd_sweep_kernel(
    value_ptr,
    key_ptr,
    log_decay_ptr,
    weight_ptr,
    state_ptr,
    value_2_ptr,
    key_2_ptr,
    log_decay_2_ptr,
    weight_2_ptr,
    state_2_ptr,
    seq_ptr,
    borders_ptr,
    ends_ptr,
    factors_ptr,
    final_ptr,
    rows,
    length,
    nheads,
    repeats,
    parts,
    part_borders,
    value_stride_b,
    value_stride_t,
    key_stride_b,
    key_stride_t,
    value_2_stride_b,
    value_2_stride_t,
    key_2_stride_b,
    key_2_stride_t,
    MODE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    MODE_2: tl.constexpr,
    HAS_WEIGHT_2: tl.constexpr,
    HAS_STATE_2: tl.constexpr,
    PACKED: tl.constexpr,
    STORE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One or two recurrences of states, without outputs: the state at each border, or what a part adds to its state.

    A border stands before every SUBS chunks, in the direction of the sweep. The second sweep, if there is one (MODE_2
    at least 0), takes the second half of the programs and of the results.
    """
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    if row < rows:
        _sweep(
            value_ptr, key_ptr, log_decay_ptr, weight_ptr, seq_ptr, state_ptr, borders_ptr, ends_ptr, factors_ptr,
            final_ptr, row, head, part, length, nheads, repeats, parts, part_borders, value_stride_b, value_stride_t,
            key_stride_b, key_stride_t, MODE, HAS_WEIGHT, HAS_STATE, PACKED, STORE, P, N, Q, SUBS, BLOCK_P, BLOCK_N,
            EXACT, DOT, ACC, PRECISION, STAGES,
        )  # fmt: skip
    elif MODE_2 >= 0:
        states = rows.to(tl.int64) * nheads * (P * N)
        _sweep(
            value_2_ptr, key_2_ptr, log_decay_2_ptr, weight_2_ptr, seq_ptr, state_2_ptr,
            borders_ptr + states * tl.cdiv(length, Q * SUBS), ends_ptr + states * parts,
            factors_ptr + rows * nheads * parts, final_ptr + states, row - rows, head, part, length, nheads, repeats,
            parts, part_borders, value_2_stride_b, value_2_stride_t, key_2_stride_b, key_2_stride_t, MODE_2,
            HAS_WEIGHT_2, HAS_STATE_2, PACKED, STORE, P, N, Q, SUBS, BLOCK_P, BLOCK_N, EXACT, DOT, ACC, PRECISION,
            STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["heads", "parts", "size"])
def _ssd_carry_kernel(
    state_ptr,
    state_2_ptr,
    ends_ptr,
    factors_ptr,
    heads,
    parts,
    size,
    DESCENDS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    DESCENDS_2: tl.constexpr,
    HAS_STATE_2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Replace what each part adds to its state by the state that enters it, in order; `heads` counts rows and heads."""
    blocks = tl.cdiv(size, BLOCK)
    of = (tl.program_id(0) // blocks).to(tl.int64)
    entry = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = entry < size
    state = tl.zeros([BLOCK], ends_ptr.dtype.element_ty)
    if of < heads:
        descends = tl.full([], DESCENDS, tl.int1)
        if HAS_STATE:
            state = tl.load(state_ptr + of * size + entry, mask=ok, other=0.0)
    else:
        descends = tl.full([], DESCENDS_2, tl.int1)
        if HAS_STATE_2:
            state = tl.load(state_2_ptr + (of - heads) * size + entry, mask=ok, other=0.0)
    for k in range(parts):
        part = of * parts + tl.where(descends, parts - 1 - k, k)
        added = tl.load(ends_ptr + part * size + entry, mask=ok, other=0.0)
        factor = tl.load(factors_ptr + part)
        tl.store(ends_ptr + part * size + entry, state, mask=ok)
        state = state * factor + added


@triton.jit
def _chunk_gradients(
    x_ptr,
    log_decay_ptr,
    B_ptr,
    C_ptr,
    weight_ptr,
    D_ptr,
    seq_ptr,
    entering_ptr,
    leaving_ptr,
    dy_ptr,
    dx_ptr,
    dlog_decay_ptr,
    dB_ptr,
    dC_ptr,
    dweight_ptr,
    dD_ptr,
    row,
    chunk,
    group,
    block,
    rows,
    length,
    nheads,
    repeats,
    block_heads,
    x_stride_b,
    x_stride_t,
    B_stride_b,
    B_stride_t,
    C_stride_b,
    C_stride_t,
    D_stride_b,
    D_stride_t,
    MIDDLE: tl.constexpr,
    MODE: tl.constexpr,
    ADD: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    LINKS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """MIDDLE 1: the first chunk after a border, 2: the second one, 0: every chunk has a border."""
    steps = tl.arange(0, Q)
    ahead = -steps if MODE & 4 else steps
    begin = chunk.to(tl.int64) * Q
    position = _position(begin, length, MODE & 4)
    ok = steps < length - begin
    dy_position = position
    dy_ok = ok
    if MODE & 8:
        dy_position = position - 1 if MODE & 4 else position + 1
        dy_ok = steps + 1 < length - begin
    B_row = B_ptr + row * B_stride_b + group * N
    C_row = C_ptr + row * C_stride_b + group * N
    B = _tile(B_row, position, ahead, ok, B_stride_t, N, BLOCK_N, DOT)
    C = _tile(C_row, position, ahead, ok, C_stride_t, N, BLOCK_N, DOT)
    scores = tl.dot(C, tl.trans(B), input_precision=PRECISION, out_dtype=ACC)  # [t, s]
    linked = steps[:, None] >= steps[None, :]
    earlier = steps[:, None] > steps[None, :]
    upper = (steps[:, None] <= steps[None, :]).to(LINKS)

    # The chunk beside this one, from which the state between the two is computed.
    beside = begin
    if MIDDLE == 1:
        beside = begin + Q
    if MIDDLE == 2:
        beside = begin - Q
    beside_position = _position(beside, length, MODE & 4)
    beside_ok = steps < length - beside
    beside_dy_ok = beside_ok
    beside_dy_position = beside_position
    if MODE & 8:
        beside_dy_position = beside_position - 1 if MODE & 4 else beside_position + 1
        beside_dy_ok = steps + 1 < length - beside
    if MIDDLE == 1:
        key = _tile(C_row, beside_position, ahead, beside_ok, C_stride_t, N, BLOCK_N, DOT)
    if MIDDLE == 2:
        key = _tile(B_row, beside_position, ahead, beside_ok, B_stride_t, N, BLOCK_N, DOT)

    if PACKED:
        seq_row = seq_ptr + row * length
        index = tl.load(seq_row + position + ahead, mask=ok, other=-1)
        before = tl.load(seq_row + _position(tl.maximum(begin - 1, 0), length, MODE & 4))
        last = tl.load(seq_row + _position(tl.minimum(begin + Q, length) - 1, length, MODE & 4))
        linked = linked & (index[:, None] == index[None, :])
        if MODE & 8:
            other = tl.load(seq_row + dy_position + ahead, mask=dy_ok, other=-1)
            dy_ok = dy_ok & (other == index)
        if MIDDLE > 0:
            beside_index = tl.load(seq_row + beside_position + ahead, mask=beside_ok, other=-1)
            if MIDDLE == 1:
                beside_alive = beside_index == last
                far = tl.minimum(beside + Q, length) - 1
                beside_through = tl.load(seq_row + _position(far, length, MODE & 4)) == last
            else:
                beside_alive = beside_index == before
                far = tl.maximum(beside - 1, 0)
                beside_through = tl.load(seq_row + _position(far, length, MODE & 4)) == before
            if MODE & 8:
                other = tl.load(seq_row + beside_dy_position + ahead, mask=beside_dy_ok, other=-1)
                beside_dy_ok = beside_dy_ok & (other == beside_index)

    dB = tl.zeros([Q, BLOCK_N], ACC)
    dC = tl.zeros([Q, BLOCK_N], ACC)
    kernel = tl.zeros([Q, Q], ACC)  # sum over heads of (dy v^T) E
    borders = tl.cdiv(length, Q * SUBS)
    border = chunk // SUBS
    p_columns = tl.arange(0, BLOCK_P)
    dx_offset = ahead[None, :] * (nheads * P) + p_columns[:, None]
    dx_ok = (p_columns < P)[:, None] & ok[None, :]
    state_offset, state_ok = _state_tile(0, P, N, BLOCK_P, BLOCK_N)
    first = group * repeats + block * block_heads
    for head in tl.range(first, tl.minimum(first + block_heads, (group + 1) * repeats), num_stages=STAGES):
        vectors = row * length * nheads + head
        log_decay = _vector(log_decay_ptr + vectors, position, ahead, ok, nheads, ACC)
        high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
        high_last, low_last = _last(high, Q), _last(low, Q)
        decay_in = tl.exp2(_whole(high, low, EXACT))
        decay_out = tl.exp2(_less(high_last, low_last, high, low, EXACT))
        factor = tl.exp2(_whole(high_last, low_last, EXACT))
        if PACKED:
            decay_in = tl.where(index == before, decay_in, 0.0)
            decay_out = tl.where(index == last, decay_out, 0.0)
            factor = tl.where(before == last, factor, 0.0)
        between = _less(high[:, None], low[:, None], high[None, :], low[None, :], EXACT)
        decays = tl.exp2(tl.where(linked, between, float("-inf")))  # [t, s]

        place = ((row * nheads + head) * borders + border) * (P * N)
        entering = tl.load(entering_ptr + place + state_offset, mask=state_ok, other=0.0).to(DOT)
        leaving = tl.load(leaving_ptr + place + state_offset, mask=state_ok, other=0.0).to(DOT)
        x_row = x_ptr + row * x_stride_b + head * P
        dy_row = dy_ptr + vectors * P
        x = _tile(x_row, position, ahead, ok, x_stride_t, P, BLOCK_P, DOT)
        dy = _tile(dy_row, dy_position, ahead, dy_ok, nheads * P, P, BLOCK_P, DOT)
        if MIDDLE > 0:
            beside_decay = _vector(log_decay_ptr + vectors, beside_position, ahead, beside_ok, nheads, ACC)
            b_high, b_low, _, _ = _log2_sums(beside_decay, ACC, EXACT)
            b_high_last, b_low_last = _last(b_high, Q), _last(b_low, Q)
            b_factor = tl.exp2(_whole(b_high_last, b_low_last, EXACT))
            if MIDDLE == 1:
                scale = tl.exp2(_whole(b_high, b_low, EXACT))
                value = _tile(dy_row, beside_dy_position, ahead, beside_dy_ok, nheads * P, P, BLOCK_P, DOT)
            else:
                scale = tl.exp2(_less(b_high_last, b_low_last, b_high, b_low, EXACT))
                if HAS_WEIGHT:
                    scale = scale * _vector(weight_ptr + vectors, beside_position, ahead, beside_ok, nheads, ACC)
                value = _tile(x_row, beside_position, ahead, beside_ok, x_stride_t, P, BLOCK_P, DOT)
            if PACKED:
                scale = tl.where(beside_alive, scale, 0.0)
                b_factor = tl.where(beside_through, b_factor, 0.0)
            scaled = tl.trans((value.to(ACC) * scale[:, None]).to(DOT))
            added = tl.dot(scaled, key, input_precision=PRECISION, out_dtype=ACC)
            if MIDDLE == 1:
                leaving = (leaving.to(ACC) * b_factor + added).to(DOT)
            else:
                entering = (entering.to(ACC) * b_factor + added).to(DOT)

        products = tl.dot(dy, tl.trans(x), input_precision=PRECISION, out_dtype=ACC) * decays  # dy_t.x_s e^{u_t - u_s}
        linking = products * scores
        mixing = scores * decays
        read = tl.dot(dy, entering, input_precision=PRECISION, out_dtype=ACC) * decay_in[:, None]
        written = tl.dot(x, leaving, input_precision=PRECISION, out_dtype=ACC) * decay_out[:, None]
        reads = tl.sum(read * C.to(ACC), 1)
        writes = tl.sum(written * B.to(ACC), 1)
        dC += read
        if HAS_WEIGHT:
            weight = _vector(weight_ptr + vectors, position, ahead, ok, nheads, ACC)
            dweight = tl.sum(linking, 0) + writes
            tl.store(dweight_ptr + vectors + (position + ahead) * nheads, dweight, mask=ok)
            linking = linking * weight[None, :]
            products = products * weight[None, :]
            mixing = mixing * weight[None, :]
            written = written * weight[:, None]
            writes = writes * weight
            decay_out = decay_out * weight
        dB += written
        kernel += products
        dx = tl.dot(leaving, tl.trans(B), input_precision=PRECISION, out_dtype=ACC) * decay_out[None, :]  # [p, s]
        dx += tl.dot(tl.trans(dy), mixing.to(DOT), input_precision=PRECISION, out_dtype=ACC)
        if HAS_D:
            direct = dy
            if MODE & 8:
                direct = _tile(dy_row, position, ahead, ok, nheads * P, P, BLOCK_P, DOT)
            D_row = D_ptr + row * D_stride_b + head
            D = tl.load(D_row + (position + ahead) * D_stride_t, mask=ok, other=0.0)
            dx += tl.trans(direct.to(ACC) * D[:, None])
            dD = tl.sum(x.to(ACC) * direct.to(ACC), 1)
            tl.store(dD_ptr + vectors + (position + ahead) * nheads, dD, mask=ok)
        dx_tile = dx_ptr + vectors * P + position * (nheads * P)
        if ADD:
            dx += tl.load(dx_tile + dx_offset, mask=dx_ok, other=0.0).to(ACC)
        tl.store(dx_tile + dx_offset, dx, mask=dx_ok)

        # At [t, j]: what the links from j < t to i >= t pass on, j's share of the state that leaves, and for i >= t the
        # share of the state that entered.
        links = tl.dot(upper, linking.to(LINKS), input_precision=PRECISION, out_dtype=ACC) + writes[None, :]
        passed = tl.sum(entering.to(ACC) * leaving.to(ACC)) * factor
        dlog_decay = tl.sum(tl.where(earlier, links, reads[None, :]), 1) + passed
        tl.store(dlog_decay_ptr + vectors + (position + ahead) * nheads, dlog_decay, mask=ok)

    dC += tl.dot(kernel.to(DOT), B, input_precision=PRECISION, out_dtype=ACC)
    dB += tl.trans(tl.dot(tl.trans(C), kernel.to(DOT), input_precision=PRECISION, out_dtype=ACC))
    n_columns = tl.arange(0, BLOCK_N)
    width = nheads // repeats * N
    out = ((block * rows + row) * length + position) * width + group * N
    offset = ahead[:, None] * width + n_columns[None, :]
    out_ok = ok[:, None] & (n_columns < N)[None, :]
    tl.store(dB_ptr + out + offset, dB, mask=out_ok)
    tl.store(dC_ptr + out + offset, dC, mask=out_ok)


@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats", "blocks", "block_heads"])
def _ssd_bwd_kernel(
    x_ptr,
    log_decay_ptr,
    B_ptr,
    C_ptr,
    weight_ptr,
    D_ptr,
    seq_ptr,
    entering_ptr,
    leaving_ptr,
    dy_ptr,
    dx_ptr,
    dlog_decay_ptr,
    dB_ptr,
    dC_ptr,
    dweight_ptr,
    dD_ptr,
    rows,
    length,
    nheads,
    repeats,
    blocks,
    block_heads,
    x_stride_b,
    x_stride_t,
    B_stride_b,
    B_stride_t,
    C_stride_b,
    C_stride_t,
    D_stride_b,
    D_stride_t,
    MODE: tl.constexpr,
    ADD: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    SUBS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_D: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    LINKS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """All gradients of one chunk, for one head after another of a block of a group's heads.

    dB and dC are summed over the heads in registers, so that they are written once (once per block of heads). States
    are read at borders; where a border serves two chunks, the state between the two is computed here.
    """
    block = tl.program_id(0) % blocks
    groups = nheads // repeats
    group = tl.program_id(0) // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // blocks // groups % chunks
    row = (tl.program_id(0) // blocks // groups // chunks).to(tl.int64)
    if SUBS == 1:
        _chunk_gradients(
            x_ptr, log_decay_ptr, B_ptr, C_ptr, weight_ptr, D_ptr, seq_ptr, entering_ptr, leaving_ptr, dy_ptr, dx_ptr,
            dlog_decay_ptr, dB_ptr, dC_ptr, dweight_ptr, dD_ptr, row, chunk, group, block, rows, length, nheads,
            repeats, block_heads, x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t, D_stride_b,
            D_stride_t, 0, MODE, ADD, P, N, Q, SUBS, BLOCK_P, BLOCK_N, HAS_WEIGHT, HAS_D, PACKED, EXACT, DOT, LINKS,
            ACC, PRECISION, STAGES,
        )  # fmt: skip
    elif chunk % 2 == 0:
        _chunk_gradients(
            x_ptr, log_decay_ptr, B_ptr, C_ptr, weight_ptr, D_ptr, seq_ptr, entering_ptr, leaving_ptr, dy_ptr, dx_ptr,
            dlog_decay_ptr, dB_ptr, dC_ptr, dweight_ptr, dD_ptr, row, chunk, group, block, rows, length, nheads,
            repeats, block_heads, x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t, D_stride_b,
            D_stride_t, 1, MODE, ADD, P, N, Q, SUBS, BLOCK_P, BLOCK_N, HAS_WEIGHT, HAS_D, PACKED, EXACT, DOT, LINKS,
            ACC, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _chunk_gradients(
            x_ptr, log_decay_ptr, B_ptr, C_ptr, weight_ptr, D_ptr, seq_ptr, entering_ptr, leaving_ptr, dy_ptr, dx_ptr,
            dlog_decay_ptr, dB_ptr, dC_ptr, dweight_ptr, dD_ptr, row, chunk, group, block, rows, length, nheads,
            repeats, block_heads, x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t, D_stride_b,
            D_stride_t, 2, MODE, ADD, P, N, Q, SUBS, BLOCK_P, BLOCK_N, HAS_WEIGHT, HAS_D, PACKED, EXACT, DOT, LINKS,
            ACC, PRECISION, STAGES,
        )  # fmt: skip
