"""The Triton kernels of `trapezoid_ssd` for one rank: what it adds to `ssd`, before its kernels and after them.

Notation as in `chunked.py`. Here angles run through a whole row, so that states need not be turned between chunks: one
kernel sums them over chunks, and their sum up to each chunk is reduced to one turn. They count half turns. Tiles of
keys, queries and states hold the two entries of a pair side by side, in columns 2i and 2i + 1, wherever they lie in
memory; pairs that do not turn have angle 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import _dot_add, _halves, _vector


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
def _rotated(tile, cos, sin, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Every pair of a tile [rows, n] turned: cos and sin [rows, n / 2]."""
    a, b = tl.split(tl.reshape(tile, [ROWS, BLOCK_N // 2, 2]))
    return tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), [ROWS, BLOCK_N])


@triton.jit
def _spin(gradient, tile, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Derivative by the angles of the pairs of a tile, [rows, n / 2]."""
    a, b = tl.split(tl.reshape(tile, [ROWS, BLOCK_N // 2, 2]))
    da, db = tl.split(tl.reshape(gradient, [ROWS, BLOCK_N // 2, 2]))
    return db * a - da * b


@triton.jit
def _biased(ptr, bias_ptr, begin, ok, stride, columns, columns_ok, Q: tl.constexpr, ACC: tl.constexpr):
    """Keys or queries of one head with their bias, not turned."""
    bias = tl.load(bias_ptr + columns, mask=columns_ok, other=0.0).to(ACC)
    return _rows(ptr, begin, tl.arange(0, Q), ok, stride, columns, columns_ok, ACC) + bias[None, :]


@triton.jit
def _weights(
    gamma_ptr, beta_ptr, seq_ptr, vectors, begin, length, nheads, PACKED: tl.constexpr, Q: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """gamma, gamma + beta of the next position, that beta, and dt of a chunk [Q]."""
    steps = tl.arange(0, Q)
    ok = steps < length - begin
    gamma = _vector(gamma_ptr + vectors, begin, steps, ok, nheads, ACC)
    beta = _vector(beta_ptr + vectors, begin, steps, ok, nheads, ACC)
    more = steps + 1 < length - begin
    if PACKED:
        index = tl.load(seq_ptr + begin + steps, mask=ok, other=-1)
        more = more & (tl.load(seq_ptr + begin + 1 + steps, mask=more, other=-2) == index)
    following = _vector(beta_ptr + vectors, begin + 1, steps, more, nheads, ACC)
    return gamma, gamma + following, following, gamma + beta


@triton.jit
def _directions(
    phases_ptr, rate, dt, of_head, chunk, chunks, S: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr
):
    """cos and sin of the angles of a chunk, [Q, n / 2]; rate [Q, n / 2], dt [Q]."""
    pairs = tl.arange(0, BLOCK_S)
    start = tl.load(phases_ptr + (of_head * S + pairs) * (chunks + 1) + chunk, mask=pairs < S, other=0.0).to(ACC)
    return _turn(tl.cumsum(rate * dt[:, None], 0) + start[None, :], ACC)


@triton.jit(do_not_specialize=["length", "nheads"])
def _trapezoid_angle_kernel(
    gamma_ptr, beta_ptr, rate_ptr, phi_ptr, totals_ptr, length, nheads, HAS_PHI: tl.constexpr,
    S: tl.constexpr, Q: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """By how much one head turns in each chunk, after phi, (b, h, s, 1 + chunks), in half turns from 0 to 2."""
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
    total = tl.sum(rate * dt[:, None], 0)
    out = totals_ptr + ((row * nheads + head) * S + pairs) * (chunks + 1)
    tl.store(out + 1 + chunk, total - 2.0 * tl.floor(0.5 * total), mask=pairs < S)
    if chunk == 0:
        start = tl.zeros([BLOCK_S], ACC)
        if HAS_PHI:
            phi = tl.load(phi_ptr + (row * nheads + head) * S + pairs, mask=pairs < S, other=0.0).to(ACC)
            start = phi * 0.3183098861837907
        tl.store(out, start, mask=pairs < S)


@triton.jit(do_not_specialize=["length", "nheads", "repeats"])
def _trapezoid_turn_kernel(
    gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr, seq_ptr, k_ptr, q_ptr,
    weight_ptr, skip_ptr, length, nheads, repeats, B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Turned keys and queries of one head in one chunk, (b, l, h, n), weights of the inputs, and skips.

    In `ssd` an input has the weight gamma + beta of the next position already where it is read for the first time; the
    skip takes off the second part, times the product of key and query, which turning them leaves as it is.
    """
    chunks = tl.cdiv(length, Q)
    head = tl.program_id(0) % nheads
    chunk = (tl.program_id(0) // nheads) % chunks
    row = (tl.program_id(0) // nheads // chunks).to(tl.int64)
    group = head // repeats
    columns, columns_ok = _columns(N, BLOCK_N, HALF)
    pairs = tl.arange(0, BLOCK_N // 2)
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    ok = steps < length - begin
    vectors = row * length * nheads + head
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * length
    _, weight, next_beta, dt = _weights(gamma_ptr, beta_ptr, seq_row, vectors, begin, length, nheads, PACKED, Q, ACC)
    rate = _rows(rate_ptr + row * length * S, begin, steps, ok, S, pairs, pairs < S, ACC)
    cos, sin = _directions(phases_ptr, rate, dt, row * nheads + head, chunk, chunks, S, BLOCK_N // 2, ACC)
    k = _biased(B_ptr + row * B_stride_b + group * N, B_bias_ptr + head * N, begin, ok, B_stride_t, columns, columns_ok,
                Q, ACC)  # fmt: skip
    q = _biased(C_ptr + row * C_stride_b + group * N, C_bias_ptr + head * N, begin, ok, C_stride_t, columns, columns_ok,
                Q, ACC)  # fmt: skip
    out = vectors + (begin + steps) * nheads
    tl.store(weight_ptr + out, weight, mask=ok)
    tl.store(skip_ptr + out, tl.load(D_ptr + head).to(ACC) - next_beta * tl.sum(k * q, 1), mask=ok)
    tile = (vectors + begin * nheads) * N + steps[:, None] * (nheads * N) + columns[None, :]
    tile_ok = ok[:, None] & columns_ok[None, :]
    tl.store(k_ptr + tile, _rotated(k, cos, sin, Q, BLOCK_N), mask=tile_ok)
    tl.store(q_ptr + tile, _rotated(q, cos, sin, Q, BLOCK_N), mask=tile_ok)


@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats", "blocks", "block_heads"])
def _trapezoid_unturn_kernel(
    gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, seq_ptr, entering_ptr,
    leaving_ptr, dphase_ptr, dphi_end_ptr, dk_ptr, dq_ptr, dweight_ptr, dskip_ptr, dgamma_ptr, ddt_ptr, dlater_ptr,
    drate_ptr, dB_ptr, dC_ptr, dB_bias_ptr, dC_bias_ptr, dphi_ptr, rows, length, nheads, repeats, blocks, block_heads,
    B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    HALF: tl.constexpr, PACKED: tl.constexpr, HAS_DPHASE: tl.constexpr, HAS_DPHI: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """From the gradients of turned keys, queries, weights and skips those of what they are made of, in one chunk.

    One head after another of a block of a group's heads. Those of B, C and the rates are summed over the heads in
    registers, and written once per block of heads.
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
    if PACKED:
        seq_row = seq_ptr + row * length
    p_rows = tl.arange(0, BLOCK_P)[:, None]
    state_ok = columns_ok[None, :] & (p_rows < P)
    state_offset = p_rows * N + columns[None, :]
    dB = tl.zeros([Q, BLOCK_N], ACC)
    dC = tl.zeros([Q, BLOCK_N], ACC)
    drate = tl.zeros([Q, BLOCK_N // 2], ACC)
    rate = _rows(rate_ptr + row * length * S, begin, steps, ok, S, pairs, pairs < S, ACC)
    tile_ok = ok[:, None] & columns_ok[None, :]
    upper, below = _halves((steps[:, None] <= steps[None, :]).to(ACC), PRECISION)
    first_head = group * repeats + block * block_heads
    for head in tl.range(first_head, tl.minimum(first_head + block_heads, (group + 1) * repeats), num_stages=STAGES):
        vectors = row * length * nheads + head
        heads = row * nheads + head
        of_chunk = (row * chunks + chunk) * nheads + head
        _, _, next_beta, dt = _weights(gamma_ptr, beta_ptr, seq_row, vectors, begin, length, nheads, PACKED, Q, ACC)
        cos, sin = _directions(phases_ptr, rate, dt, heads, chunk, chunks, S, BLOCK_N // 2, ACC)
        k = _biased(B_ptr + row * B_stride_b + group * N, B_bias_ptr + head * N, begin, ok, B_stride_t, columns,
                    columns_ok, Q, ACC)  # fmt: skip
        q = _biased(C_ptr + row * C_stride_b + group * N, C_bias_ptr + head * N, begin, ok, C_stride_t, columns,
                    columns_ok, Q, ACC)  # fmt: skip
        tile = (vectors + begin * nheads) * N + steps[:, None] * (nheads * N) + columns[None, :]
        dk = _rotated(tl.load(dk_ptr + tile, mask=tile_ok, other=0.0).to(ACC), cos, -sin, Q, BLOCK_N)
        dq = _rotated(tl.load(dq_ptr + tile, mask=tile_ok, other=0.0).to(ACC), cos, -sin, Q, BLOCK_N)
        dangle = _spin(dk, k, Q, BLOCK_N) + _spin(dq, q, Q, BLOCK_N)

        # Skips: D - beta (k.q).
        out = vectors + (begin + steps) * nheads
        dskip = tl.load(dskip_ptr + out, mask=ok, other=0.0)
        dweight = tl.load(dweight_ptr + out, mask=ok, other=0.0)
        tl.store(dlater_ptr + out, dweight - dskip * tl.sum(k * q, 1), mask=ok)
        of_product = -next_beta * dskip
        dk += of_product[:, None] * q
        dq += of_product[:, None] * k
        dB += dk
        dC += dq
        tl.store(dB_bias_ptr + of_chunk * N + columns, tl.sum(dk, 0), mask=columns_ok)
        tl.store(dC_bias_ptr + of_chunk * N + columns, tl.sum(dq, 0), mask=columns_ok)

        # Angles. What all later chunks make of them is the turn of the state between, but for the turn of the last one.
        later = tl.zeros([BLOCK_N // 2], ACC)
        if chunk < chunks - 1:
            border = (heads * chunks + chunk) * (P * N) + state_offset
            entering = tl.load(entering_ptr + border + P * N, mask=state_ok, other=0.0).to(ACC)
            leaving = tl.load(leaving_ptr + border, mask=state_ok, other=0.0).to(ACC)
            later -= tl.sum(_spin(leaving, entering, BLOCK_P, BLOCK_N), 0)
            if HAS_DPHASE:
                later += tl.load(dphase_ptr + heads * S + pairs, mask=pairs < S, other=0.0).to(ACC)
        elif HAS_DPHI:
            later += tl.load(dphi_end_ptr + heads * S + pairs, mask=pairs < S, other=0.0).to(ACC)
        high, low = _halves(dangle, PRECISION)
        ddelta = _dot_add(upper, below, high, low, tl.zeros([Q, BLOCK_N // 2], ACC) + later[None, :], ACC, PRECISION)
        if chunk == 0:
            at_first = tl.sum(tl.where((steps == 0)[:, None], ddelta, 0.0), 0)
            tl.store(dphi_ptr + heads * S + pairs, at_first, mask=pairs < S)
        ddelta = ddelta * 3.141592653589793
        drate += ddelta * dt[:, None]
        ddt = tl.sum(ddelta * rate, 1)
        tl.store(ddt_ptr + out, ddt, mask=ok)
        tl.store(dgamma_ptr + out, ddt + dweight, mask=ok)

    width = groups * N
    out = ((block * rows + row) * length + begin) * width + group * N
    offset = steps[:, None] * width + columns[None, :]
    tl.store(dB_ptr + out + offset, dB, mask=tile_ok)
    tl.store(dC_ptr + out + offset, dC, mask=tile_ok)
    out = (((block * groups + group) * rows + row) * length + begin) * S
    tl.store(drate_ptr + out + steps[:, None] * S + pairs[None, :], drate, mask=ok[:, None] & (pairs < S)[None, :])
