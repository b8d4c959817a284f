"""The Triton kernels of `trapezoid_ssd` for one rank: angles, outputs, sweeps over states, gradients.

Notation as in `chunked.py`. Here angles run through a whole row, so that states need not be turned between chunks: one
kernel sums them within chunks, and their sum up to each chunk is reduced to one turn. They count half turns. Tiles of
keys, queries and states hold the two entries of a pair side by side, in columns 2i and 2i + 1, wherever they lie in
memory; pairs that do not turn have angle 0. A transposed result of a dot is never the operand of another one, which
some versions of Triton compile wrongly.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import _last, _less, _log2_sums, _vector, _whole


@triton.jit
def _turn(x, ACC: tl.constexpr):
    """cos and sin of pi x. The part of x beyond quarter turns is taken off exactly, and no branch is needed."""
    if tl.float64 == ACC:
        return tl.cos(x * 3.141592653589793), tl.sin(x * 3.141592653589793)
    quarters = tl.floor(2.0 * x + 0.5)
    x = x - 0.5 * quarters
    z = x * x
    sin = 0.08100174110623341 * z - 0.5992020950473558
    sin = ((sin * z + 2.550162647773372) * z - 5.167712769181267) * z + 3.1415926535762146
    sin = sin * x
    cos = 0.23132925031547685 * z - 1.3350445061804126
    cos = ((cos * z + 4.058707260753775) * z - 4.9348021625610485) * z + 1.0
    quarter = quarters.to(tl.int32)
    odd = (quarter & 1) != 0
    turned_cos = tl.where(odd, sin, cos)
    turned_sin = tl.where(odd, cos, sin)
    turned_cos = tl.where(((quarter + 1) & 2) != 0, -turned_cos, turned_cos)
    turned_sin = tl.where((quarter & 2) != 0, -turned_sin, turned_sin)
    return turned_cos, turned_sin


@triton.jit
def _columns(N: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr):
    """Where the columns of a tile lie in memory, and which of them exist."""
    tile = tl.arange(0, BLOCK_N)
    if HALF:
        columns = tile // 2 + (tile % 2) * (N // 2)
        if N % 2:
            columns = tl.where(tile == N - 1, N - 1, columns)
        return columns, tile < N
    return tile, tile < N


@triton.jit
def _rows(ptr, begin, steps, ok, stride, columns, columns_ok, TYPE: tl.constexpr):
    offset = steps[:, None] * stride + columns[None, :]
    return tl.load(ptr + begin * stride + offset, mask=ok[:, None] & columns_ok[None, :], other=0.0).to(TYPE)


@triton.jit
def _tile(ptr, begin, steps, ok, stride, P: tl.constexpr, BLOCK_P: tl.constexpr, DOT: tl.constexpr):
    columns = tl.arange(0, BLOCK_P)
    return _rows(ptr, begin, steps, ok, stride, columns, columns < P, DOT)


@triton.jit
def _rotated(tile, cos, sin, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Every pair of a tile [rows, n] turned: cos and sin [rows, n / 2]."""
    a, b = tl.split(tl.reshape(tile, [ROWS, BLOCK_N // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [ROWS, BLOCK_N])


@triton.jit
def _turned_rows(
    ptr, bias_ptr, begin, steps, ok, stride, columns, columns_ok, cos, sin,
    Q: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Keys or queries of one head with their bias, turned."""
    bias = tl.load(bias_ptr + columns, mask=columns_ok, other=0.0).to(ACC)
    tile = _rows(ptr, begin, steps, ok, stride, columns, columns_ok, ACC) + bias[None, :]
    return _rotated(tile, cos, sin, Q, BLOCK_N).to(DOT)


@triton.jit
def _packing(seq_ptr, begin, length, Q: tl.constexpr):
    """Numbers of the sequences of a chunk [Q], of the position before it and of its last one."""
    steps = tl.arange(0, Q)
    index = tl.load(seq_ptr + begin + steps, mask=steps < length - begin, other=-1)
    before = tl.load(seq_ptr + tl.maximum(begin - 1, 0))
    last = tl.load(seq_ptr + tl.minimum(begin + Q, length) - 1)
    return index, before, last


@triton.jit
def _weights(
    gamma_ptr, beta_ptr, seq_ptr, vectors, begin, length, nheads, PACKED: tl.constexpr, Q: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """gamma, w and dt of a chunk [Q]."""
    steps = tl.arange(0, Q)
    ok = steps < length - begin
    gamma = _vector(gamma_ptr + vectors, begin, steps, ok, nheads, ACC)
    beta = _vector(beta_ptr + vectors, begin, steps, ok, nheads, ACC)
    more = steps + 1 < length - begin
    if PACKED:
        index = tl.load(seq_ptr + begin + steps, mask=ok, other=-1)
        more = more & (tl.load(seq_ptr + begin + 1 + steps, mask=more, other=-2) == index)
    return gamma, gamma + _vector(beta_ptr + vectors, begin + 1, steps, more, nheads, ACC), gamma + beta


@triton.jit
def _directions(
    angles_ptr, phases_ptr, row, head, begin, ok, length, nheads, S: tl.constexpr, Q: tl.constexpr,
    BLOCK_N: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """cos and sin of the angles of a chunk, [Q, n / 2]."""
    pairs = tl.arange(0, BLOCK_N // 2)
    chunks = tl.cdiv(length, Q)
    place = ((row * nheads + head) * S + pairs) * (chunks + 1) + begin // Q
    start = tl.load(phases_ptr + place, mask=pairs < S, other=0.0).to(ACC)
    angles_row = angles_ptr + (row * length * nheads + head) * S
    angle = _rows(angles_row, begin, tl.arange(0, Q), ok, nheads * S, pairs, pairs < S, ACC)
    return _turn(angle + start[None, :], ACC)


@triton.jit(do_not_specialize=["length", "nheads"])
def _trapezoid_angle_kernel(
    gamma_ptr, beta_ptr, rate_ptr, phi_ptr, angles_ptr, totals_ptr, length, nheads, HAS_PHI: tl.constexpr,
    S: tl.constexpr, Q: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Angles of one head in one chunk, from its start, (b, l, h, s), and their totals, (b, h, s, 1 + chunks).

    Before the totals comes phi. All are in half turns, and whole turns are taken off.
    """
    chunks = tl.cdiv(length, Q)
    head = tl.program_id(0) % nheads
    chunk = (tl.program_id(0) // nheads) % chunks
    row = (tl.program_id(0) // nheads // chunks).to(tl.int64)
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    ok = steps < length - begin
    vectors = row * length * nheads + head
    dt = _vector(gamma_ptr + vectors, begin, steps, ok, nheads, ACC)
    dt += _vector(beta_ptr + vectors, begin, steps, ok, nheads, ACC)
    pairs = tl.arange(0, BLOCK_S)
    rate = _rows(rate_ptr + row * length * S, begin, steps, ok, S, pairs, pairs < S, ACC)
    angle = tl.cumsum(rate * dt[:, None], 0)
    angle = angle - 2.0 * tl.floor(0.5 * angle)
    angle_offset = steps[:, None] * (nheads * S) + pairs[None, :]
    tl.store(angles_ptr + (vectors + begin * nheads) * S + angle_offset, angle, mask=ok[:, None] & (pairs < S)[None, :])
    total = tl.sum(tl.where((steps == Q - 1)[:, None], angle, 0.0), 0)
    out = totals_ptr + ((row * nheads + head) * S + pairs) * (chunks + 1)
    tl.store(out + 1 + chunk, total, mask=pairs < S)
    if chunk == 0:
        start = tl.zeros([BLOCK_S], ACC)
        if HAS_PHI:
            phi = tl.load(phi_ptr + (row * nheads + head) * S + pairs, mask=pairs < S, other=0.0).to(ACC)
            start = phi * 0.3183098861837907
        tl.store(out, start, mask=pairs < S)


@triton.jit(do_not_specialize=["length", "nheads", "repeats", "parts", "part_length"])
def _trapezoid_fwd_kernel(
    x_ptr, log_decay_ptr, gamma_ptr, beta_ptr, angles_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr,
    seq_ptr, state_ptr, y_ptr, final_ptr, length, nheads, repeats, parts, part_length, x_stride_b, x_stride_t,
    B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HALF: tl.constexpr, PACKED: tl.constexpr, HAS_STATE: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Outputs of one head in one part of a row, chunk after chunk, the transposed state [n, p] in registers."""
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    group = head // repeats
    heads = row * nheads + head
    columns, columns_ok = _columns(N, BLOCK_N, HALF)
    steps = tl.arange(0, Q)
    p_columns = tl.arange(0, BLOCK_P)
    p_ok = p_columns < P
    state_offset = p_columns[None, :] * N + columns[:, None]
    state_ok = columns_ok[:, None] & p_ok[None, :]
    state = tl.zeros([BLOCK_N, BLOCK_P], ACC)
    if HAS_STATE:
        state = tl.load(state_ptr + (heads * parts + part) * (P * N) + state_offset, mask=state_ok, other=0.0).to(ACC)
    x_row = x_ptr + row * x_stride_b + head * P
    B_row = B_ptr + row * B_stride_b + group * N
    C_row = C_ptr + row * C_stride_b + group * N
    y_row = y_ptr + row * length * nheads * P + head * P
    vectors = row * length * nheads + head
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * length
    D = tl.load(D_ptr + head).to(ACC)
    itself = steps[:, None] == steps[None, :]
    begin_part = part.to(tl.int64) * part_length
    for begin in tl.range(begin_part, tl.minimum(begin_part + part_length, length), Q, num_stages=STAGES):
        ok = steps < length - begin
        gamma, weight, _ = _weights(gamma_ptr, beta_ptr, seq_row, vectors, begin, length, nheads, PACKED, Q, ACC)
        cos, sin = _directions(angles_ptr, phases_ptr, row, head, begin, ok, length, nheads, S, Q, BLOCK_N, ACC)
        log_decay = _vector(log_decay_ptr + vectors, begin, steps, ok, nheads, ACC)
        high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
        high_last, low_last = _last(high, Q), _last(low, Q)
        decay_in = tl.exp2(_whole(high, low, EXACT))
        decay_out = tl.exp2(_less(high_last, low_last, high, low, EXACT))
        factor = tl.exp2(_whole(high_last, low_last, EXACT))
        linked = steps[:, None] > steps[None, :]
        if PACKED:
            index, before, last = _packing(seq_row, begin, length, Q)
            linked = linked & (index[:, None] == index[None, :])
            decay_in = tl.where(index == before, decay_in, 0.0)
            decay_out = tl.where(index == last, decay_out, 0.0)
            factor = tl.where(before == last, factor, 0.0)
        between = _less(high[:, None], low[:, None], high[None, :], low[None, :], EXACT)
        links = tl.exp2(tl.where(linked, between, float("-inf"))) * weight[None, :]  # [t, s]
        links = tl.where(itself, gamma[None, :], links)
        k = _turned_rows(
            B_row, B_bias_ptr + head * N, begin, steps, ok, B_stride_t, columns, columns_ok, cos, sin, Q, BLOCK_N,
            DOT, ACC,
        )  # fmt: skip
        q = _turned_rows(
            C_row, C_bias_ptr + head * N, begin, steps, ok, C_stride_t, columns, columns_ok, cos, sin, Q, BLOCK_N,
            DOT, ACC,
        )  # fmt: skip
        x = _tile(x_row, begin, steps, ok, x_stride_t, P, BLOCK_P, DOT)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC) * links
        y = tl.dot(q, state.to(DOT), input_precision=PRECISION, out_dtype=ACC) * decay_in[:, None]
        y += tl.dot(scores.to(DOT), x, input_precision=PRECISION, out_dtype=ACC)
        wide = x.to(ACC)
        y += D * wide
        y_tile = y_row + begin * (nheads * P)
        tl.store(y_tile + steps[:, None] * (nheads * P) + p_columns[None, :], y, mask=ok[:, None] & p_ok[None, :])
        late = (wide * (decay_out * weight)[:, None]).to(DOT)
        state = state * factor + tl.dot(tl.trans(k), late, input_precision=PRECISION, out_dtype=ACC)
    if part == parts - 1:
        tl.store(final_ptr + heads * (P * N) + state_offset, state, mask=state_ok)


@triton.jit
def _sweep(
    value_ptr, key_ptr, bias_ptr, log_decay_ptr, gamma_ptr, beta_ptr, angles_ptr, phases_ptr, seq_ptr, state_ptr,
    borders_ptr, ends_ptr, factors_ptr, final_ptr, row, head, part, length, nheads, repeats, parts, part_chunks,
    value_stride_b, value_stride_t, key_stride_b, key_stride_t,
    ADJOINT: tl.constexpr, HAS_STATE: tl.constexpr, STORE: tl.constexpr, P: tl.constexpr, N: tl.constexpr,
    S: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
    PACKED: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    group = head // repeats
    heads = row * nheads + head
    chunks = tl.cdiv(length, Q)
    columns, columns_ok = _columns(N, BLOCK_N, HALF)
    steps = tl.arange(0, Q)
    p_rows = tl.arange(0, BLOCK_P)[:, None]
    state_ok = columns_ok[None, :] & (p_rows < P)
    state_offset = p_rows * N + columns[None, :]
    border_offset = p_rows * N + tl.arange(0, BLOCK_N)[None, :]  # columns as in the tile
    state = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if HAS_STATE:
        state = tl.load(state_ptr + (heads * parts + part) * (P * N) + state_offset, mask=state_ok, other=0.0).to(ACC)
    value_row = value_ptr + row * value_stride_b + head * P
    key_row = key_ptr + row * key_stride_b + group * N
    vectors = row * length * nheads + head
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * length
    border_row = borders_ptr + heads * (chunks + 1) * (P * N)
    first_chunk = part.to(tl.int64) * part_chunks
    count = tl.minimum(first_chunk + part_chunks, chunks) - first_chunk
    through = tl.full([], 1.0, ACC)
    for step in tl.range(0, count, num_stages=STAGES):
        chunk = first_chunk + step
        border = chunk
        if ADJOINT:
            chunk = first_chunk + count - 1 - step
            border = chunk + 1
        if STORE:
            tl.store(border_row + border * (P * N) + border_offset, state, mask=state_ok)
        begin = chunk * Q
        ok = steps < length - begin
        _, weight, _ = _weights(gamma_ptr, beta_ptr, seq_row, vectors, begin, length, nheads, PACKED, Q, ACC)
        cos, sin = _directions(angles_ptr, phases_ptr, row, head, begin, ok, length, nheads, S, Q, BLOCK_N, ACC)
        log_decay = _vector(log_decay_ptr + vectors, begin, steps, ok, nheads, ACC)
        high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
        high_last, low_last = _last(high, Q), _last(low, Q)
        factor = tl.exp2(_whole(high_last, low_last, EXACT))
        if ADJOINT:
            scale = tl.exp2(_whole(high, low, EXACT))
        else:
            scale = tl.exp2(_less(high_last, low_last, high, low, EXACT)) * weight
        if PACKED:
            index, before, last = _packing(seq_row, begin, length, Q)
            factor = tl.where(before == last, factor, 0.0)
            if ADJOINT:
                scale = tl.where(index == before, scale, 0.0)
            else:
                scale = tl.where(index == last, scale, 0.0)
        key = _turned_rows(
            key_row, bias_ptr + head * N, begin, steps, ok, key_stride_t, columns, columns_ok, cos, sin, Q, BLOCK_N,
            DOT, ACC,
        )  # fmt: skip
        value = _tile(value_row, begin, steps, ok, value_stride_t, P, BLOCK_P, DOT)
        scaled = tl.trans((value.to(ACC) * scale[:, None]).to(DOT))
        state = state * factor + tl.dot(scaled, key, input_precision=PRECISION, out_dtype=ACC)
        through = through * factor
    if STORE:
        if ADJOINT:
            if part == 0:
                tl.store(final_ptr + heads * (P * N) + state_offset, state, mask=state_ok)
        elif part == parts - 1:
            tl.store(border_row + chunks * (P * N) + border_offset, state, mask=state_ok)
    else:
        of_part = heads * parts + part
        tl.store(ends_ptr + of_part * (P * N) + state_offset, state, mask=state_ok)
        tl.store(factors_ptr + of_part, through)


@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats", "parts", "part_chunks"])
def _trapezoid_sweep_kernel(
    x_ptr, B_ptr, B_bias_ptr, state_ptr, dy_ptr, C_ptr, C_bias_ptr, dfinal_ptr, log_decay_ptr, gamma_ptr, beta_ptr,
    angles_ptr, phases_ptr, seq_ptr, borders_ptr, ends_ptr, factors_ptr, dstate_ptr, rows, length, nheads, repeats,
    parts, part_chunks, x_stride_b, x_stride_t, B_stride_b, B_stride_t, dy_stride_b, dy_stride_t, C_stride_b,
    C_stride_t,
    BACKWARD: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DFINAL: tl.constexpr, STORE: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HALF: tl.constexpr, PACKED: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States without outputs: those between chunks, or what a part adds to its state.

    With BACKWARD a second half of the programs and of the results has the gradients of the states, from the right.
    """
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    if row < rows:
        _sweep(
            x_ptr, B_ptr, B_bias_ptr, log_decay_ptr, gamma_ptr, beta_ptr, angles_ptr, phases_ptr, seq_ptr, state_ptr,
            borders_ptr, ends_ptr, factors_ptr, dstate_ptr, row, head, part, length, nheads, repeats, parts,
            part_chunks, x_stride_b, x_stride_t, B_stride_b, B_stride_t, False, HAS_STATE, STORE, P, N, S, Q, BLOCK_P,
            BLOCK_N, HALF, PACKED, EXACT, DOT, ACC, PRECISION, STAGES,
        )  # fmt: skip
    elif BACKWARD:
        heads = rows.to(tl.int64) * nheads
        _sweep(
            dy_ptr, C_ptr, C_bias_ptr, log_decay_ptr, gamma_ptr, beta_ptr, angles_ptr, phases_ptr, seq_ptr, dfinal_ptr,
            borders_ptr + heads * (tl.cdiv(length, Q) + 1) * (P * N), ends_ptr + heads * parts * (P * N),
            factors_ptr + heads * parts, dstate_ptr, row - rows, head, part, length, nheads, repeats, parts,
            part_chunks, dy_stride_b, dy_stride_t, C_stride_b, C_stride_t, True, HAS_DFINAL, STORE, P, N, S, Q,
            BLOCK_P, BLOCK_N, HALF, PACKED, EXACT, DOT, ACC, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats", "blocks", "block_heads"])
def _trapezoid_bwd_kernel(
    x_ptr, log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, angles_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr,
    D_ptr, seq_ptr, borders_ptr, dphase_ptr, dy_ptr, dx_ptr, dlog_decay_ptr, dgamma_ptr, ddt_ptr, dweight_ptr,
    drate_ptr, dB_ptr, dC_ptr, dB_bias_ptr, dC_bias_ptr, dD_ptr, dphi_ptr, rows, length, nheads, repeats, blocks,
    block_heads, x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HALF: tl.constexpr, PACKED: tl.constexpr, HAS_DPHASE: tl.constexpr, EXACT: tl.constexpr, DOT: tl.constexpr,
    LINKS: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk, for one head after another of a block of a group's heads.

    Those of B, C and the rates are summed over the heads in registers, and written once per block of heads.
    """
    block = tl.program_id(0) % blocks
    groups = nheads // repeats
    group = tl.program_id(0) // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // blocks // groups % chunks
    row = (tl.program_id(0) // blocks // groups // chunks).to(tl.int64)
    columns, columns_ok = _columns(N, BLOCK_N, HALF)
    pairs = tl.arange(0, BLOCK_N // 2)
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    ok = steps < length - begin
    seq_row = seq_ptr
    before_it = steps[:, None] > steps[None, :]
    linked = before_it
    itself = steps[:, None] == steps[None, :]
    upper = steps[:, None] <= steps[None, :]
    if PACKED:
        seq_row = seq_ptr + row * length
        index, before, last = _packing(seq_row, begin, length, Q)
        linked = linked & (index[:, None] == index[None, :])
    p_columns = tl.arange(0, BLOCK_P)
    p_ok = p_columns < P
    state_ok = p_ok[:, None] & columns_ok[None, :]
    state_offset = p_columns[:, None] * N + tl.arange(0, BLOCK_N)[None, :]
    dB = tl.zeros([Q, BLOCK_N], ACC)
    dC = tl.zeros([Q, BLOCK_N], ACC)
    drate = tl.zeros([Q, BLOCK_N // 2], ACC)
    B_row = B_ptr + row * B_stride_b + group * N
    C_row = C_ptr + row * C_stride_b + group * N
    half_borders = rows.to(tl.int64) * nheads * (chunks + 1) * (P * N)
    dx_offset = steps[None, :] * (nheads * P) + p_columns[:, None]
    dx_ok = p_ok[:, None] & ok[None, :]
    first_head = group * repeats + block * block_heads
    for head in tl.range(first_head, tl.minimum(first_head + block_heads, (group + 1) * repeats), num_stages=STAGES):
        vectors = row * length * nheads + head
        heads = row * nheads + head
        gamma, weight, dt = _weights(gamma_ptr, beta_ptr, seq_row, vectors, begin, length, nheads, PACKED, Q, ACC)
        cos, sin = _directions(angles_ptr, phases_ptr, row, head, begin, ok, length, nheads, S, Q, BLOCK_N, ACC)
        k = _turned_rows(
            B_row, B_bias_ptr + head * N, begin, steps, ok, B_stride_t, columns, columns_ok, cos, sin, Q, BLOCK_N,
            DOT, ACC,
        )  # fmt: skip
        q = _turned_rows(
            C_row, C_bias_ptr + head * N, begin, steps, ok, C_stride_t, columns, columns_ok, cos, sin, Q, BLOCK_N,
            DOT, ACC,
        )  # fmt: skip
        log_decay = _vector(log_decay_ptr + vectors, begin, steps, ok, nheads, ACC)
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
        decays = tl.exp2(tl.where(linked, between, float("-inf")))  # [t, s], zero on the diagonal
        links = tl.where(itself, gamma[None, :], decays * weight[None, :])
        x = _tile(x_ptr + row * x_stride_b + head * P, begin, steps, ok, x_stride_t, P, BLOCK_P, DOT)
        dy = _tile(dy_ptr + vectors * P, begin, steps, ok, nheads * P, P, BLOCK_P, DOT)
        wide = dy.to(ACC)
        of_chunk = (row * chunks + chunk) * nheads + head
        tl.store(dD_ptr + of_chunk, tl.sum(tl.sum(wide * x.to(ACC), 1), 0))

        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        products = tl.dot(dy, tl.trans(x), input_precision=PRECISION, out_dtype=ACC)  # dy_t . x_s
        mixing = (scores * links).to(DOT)
        kernel = (products * links).to(DOT)
        both = products * scores
        diagonal = tl.sum(tl.where(itself, both, 0.0), 0)
        both = both * decays
        late = decay_out * weight

        # Queries, [t, n].
        place = borders_ptr + (heads * (chunks + 1) + chunk) * (P * N) + state_offset
        entering = tl.load(place, mask=state_ok, other=0.0).to(DOT)
        dq = tl.dot(dy, entering, input_precision=PRECISION, out_dtype=ACC) * decay_in[:, None]
        reads = tl.sum(dq * q.to(ACC), 1)
        dq += tl.dot(kernel, k, input_precision=PRECISION, out_dtype=ACC)
        da, db = tl.split(tl.reshape(dq, [Q, BLOCK_N // 2, 2]))
        a, b = tl.split(tl.reshape(q.to(ACC), [Q, BLOCK_N // 2, 2]))
        dangle = db * a - da * b
        back = tl.reshape(tl.join(da * cos + db * sin, db * cos - da * sin), [Q, BLOCK_N])
        dC += back
        tl.store(dC_bias_ptr + of_chunk * N + columns, tl.sum(back, 0), mask=columns_ok)

        # Keys, [n, s] from the dots and turned over.
        after = place + P * N
        leaving = tl.load(half_borders + after, mask=state_ok, other=0.0).to(DOT)
        dkt = tl.dot(tl.trans(leaving), tl.trans(x), input_precision=PRECISION, out_dtype=ACC) * late[None, :]
        dkt += tl.dot(tl.trans(q), kernel, input_precision=PRECISION, out_dtype=ACC)
        da, db = tl.split(tl.reshape(tl.trans(dkt), [Q, BLOCK_N // 2, 2]))
        a, b = tl.split(tl.reshape(k.to(ACC), [Q, BLOCK_N // 2, 2]))
        dangle += db * a - da * b
        back = tl.reshape(tl.join(da * cos + db * sin, db * cos - da * sin), [Q, BLOCK_N])
        dB += back
        tl.store(dB_bias_ptr + of_chunk * N + columns, tl.sum(back, 0), mask=columns_ok)

        # Values, [p, s].
        dx = tl.dot(leaving, tl.trans(k), input_precision=PRECISION, out_dtype=ACC)
        written = tl.sum(dx * tl.trans(x).to(ACC), 0) * decay_out
        dx = dx * late[None, :]
        dx += tl.dot(tl.trans(dy), mixing, input_precision=PRECISION, out_dtype=ACC)
        D = tl.load(D_ptr + head).to(ACC)
        dx += tl.trans(wide) * D
        tl.store(dx_ptr + vectors * P + begin * (nheads * P) + dx_offset, dx, mask=dx_ok)

        # Angles. What all later chunks make of them is the turn of the state between.
        following = tl.load(after, mask=state_ok, other=0.0).to(ACC)
        a, b = tl.split(tl.reshape(following, [BLOCK_P, BLOCK_N // 2, 2]))
        da, db = tl.split(tl.reshape(leaving.to(ACC), [BLOCK_P, BLOCK_N // 2, 2]))
        later = tl.sum(da * b - db * a, 0)
        if HAS_DPHASE:
            later += tl.load(dphase_ptr + heads * S + pairs, mask=pairs < S, other=0.0).to(ACC)
        ddelta = tl.dot(upper.to(ACC), dangle, input_precision=PRECISION, out_dtype=ACC) + later[None, :]
        if chunk == 0:
            at_first = tl.sum(tl.where((steps == 0)[:, None], ddelta, 0.0), 0)
            tl.store(dphi_ptr + heads * S + pairs, at_first, mask=pairs < S)
        ddelta = ddelta * 3.141592653589793
        drate += ddelta * dt[:, None]
        rate = _rows(rate_ptr + row * length * S, begin, steps, ok, S, pairs, pairs < S, ACC)
        ddt = tl.sum(ddelta * rate, 1)

        # Steps and weights.
        dweight = tl.sum(both, 0) + written
        out = vectors + (begin + steps) * nheads
        tl.store(ddt_ptr + out, ddt, mask=ok)
        tl.store(dweight_ptr + out, dweight, mask=ok)
        tl.store(dgamma_ptr + out, ddt + dweight + diagonal, mask=ok)

        # At [t, j]: what the links from j < t to i >= t pass on, j's share of the state that leaves, and for i >= t the
        # share of the state that entered.
        passing = tl.dot(upper.to(LINKS), (both * weight[None, :]).to(LINKS), input_precision=PRECISION, out_dtype=ACC)
        passing += (written * weight)[None, :]
        passed = tl.sum(tl.sum(entering.to(ACC) * leaving.to(ACC), 1), 0) * factor
        dlog_decay = tl.sum(tl.where(before_it, passing, reads[None, :]), 1) + passed
        tl.store(dlog_decay_ptr + out, dlog_decay, mask=ok)

    width = groups * N
    out = ((block * rows + row) * length + begin) * width + group * N
    offset = steps[:, None] * width + columns[None, :]
    out_ok = ok[:, None] & columns_ok[None, :]
    tl.store(dB_ptr + out + offset, dB, mask=out_ok)
    tl.store(dC_ptr + out + offset, dC, mask=out_ok)
    out = (((block * groups + group) * rows + row) * length + begin) * S
    tl.store(drate_ptr + out + steps[:, None] * S + pairs[None, :], drate, mask=ok[:, None] & (pairs < S)[None, :])
