"""The Triton kernels of `trapezoid_ssd`: what it adds to `ssd`, before its kernels and after them.

Notation as in `chunked.py`. Here angles run through a whole row, so that states need not be turned between chunks: one
kernel sums them over chunks, and their sum up to each chunk is reduced to one turn. They count half turns. Tiles of
keys, queries and states hold the two entries of a pair side by side, in columns 2i and 2i + 1, wherever they lie in
memory; pairs that do not turn have angle 0. With several ranks the rows of tiles, counted by `length`, are (position,
rank) pairs; angles advance at the first one of a position.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import _halves, _vector, keep_addresses_in_loops


@triton.jit
def _turn(x):
    """cos and sin of pi x. The part of x beyond quarter turns is taken off exactly, and no branch is needed."""
    if x.dtype == tl.float64:
        turned_cos, turned_sin = tl.cos(x * 3.141592653589793), tl.sin(x * 3.141592653589793)
    else:
        shifted = 2.0 * x + 12582912.0  # 3 * 2^22: rounds to whole numbers, which are then the last bits
        x = x - 0.5 * (shifted - 12582912.0)
        z = x * x
        sin = 0.08100174110623341 * z - 0.5992020950473558
        sin = ((sin * z + 2.550162647773372) * z - 5.167712769181267) * z + 3.1415926535762146
        sin = sin * x
        cos = 0.23132925031547685 * z - 1.3350445061804126
        cos = ((cos * z + 4.058707260753775) * z - 4.9348021625610485) * z + 1.0
        quarter = shifted.to(tl.int32, bitcast=True)
        odd = (quarter & 1) != 0
        turned_cos = tl.where(odd, sin, cos)
        turned_sin = tl.where(odd, cos, sin)
        turned_cos = tl.where(((quarter + 1) & 2) != 0, -turned_cos, turned_cos)
        turned_sin = tl.where((quarter & 2) != 0, -turned_sin, turned_sin)
    return turned_cos, turned_sin


@triton.jit
def _columns(start, N: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr):
    """Where the columns of a tile lie in memory, and which of them exist; the first one is column `start` of all."""
    tile = start + tl.arange(0, BLOCK_N)
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
def _bias(ptr, head, ranks, columns, columns_ok, N: tl.constexpr, ACC: tl.constexpr, RANKS: tl.constexpr):
    """What is added to the keys or queries of one head, [1, n], or with several ranks [rows, n]."""
    if RANKS == 1:
        bias = tl.load(ptr + head * N + columns, mask=columns_ok, other=0.0).to(ACC)[None, :]
    else:
        of_rank = (head * RANKS + ranks[:, None]) * N
        bias = tl.load(ptr + of_rank + columns[None, :], mask=columns_ok[None, :], other=0.0).to(ACC)
    return bias


@triton.jit
def _sums_onward(upper, x, total, ACC: tl.constexpr, TERMS: tl.constexpr):
    """total + upper x, with zeros and ones in `upper`: x goes to tensor cores as a sum of `TERMS` bfloat16 numbers."""
    if TERMS == 0:
        total = tl.dot(upper, x, total, input_precision="ieee", out_dtype=ACC)
    else:
        high, low = _halves(x, "bf16x3")
        if TERMS == 3:
            rest = x - high.to(tl.float32) - low.to(tl.float32)
            total = tl.dot(upper, rest.to(tl.bfloat16), total, out_dtype=ACC)
        total = tl.dot(upper, low, total, out_dtype=ACC)
        total = tl.dot(upper, high, total, out_dtype=ACC)
    return total


@triton.jit
def _weights(
    gamma_ptr, beta_ptr, seq_ptr, vectors, begin, length, nheads, PACKED: tl.constexpr, Q: tl.constexpr,
    ACC: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """gamma, beta and the beta of the next position of the same sequence, of a chunk of positions and ranks [Q].

    `begin` and `length` count positions.
    """
    steps = tl.arange(0, Q) // RANKS
    ok = steps < length - begin
    gamma = _vector(gamma_ptr + vectors, begin, steps, ok, nheads, ACC)
    beta = _vector(beta_ptr + vectors, begin, steps, ok, nheads, ACC)
    more = steps + 1 < length - begin
    if PACKED:
        index = tl.load(seq_ptr + begin + steps, mask=ok, other=-1)
        more = more & (tl.load(seq_ptr + begin + 1 + steps, mask=more, other=-2) == index)
    return gamma, beta, _vector(beta_ptr + vectors, begin + 1, steps, more, nheads, ACC)


@triton.jit
def _increments(gamma, beta, Q: tl.constexpr, RANKS: tl.constexpr):
    """By how much time goes on at each row of a chunk: at the first rank of a position."""
    dt = gamma + beta
    if RANKS > 1:
        dt = tl.where(tl.arange(0, Q) % RANKS == 0, dt, 0.0)
    return dt


@triton.jit
def _directions(
    phases_ptr, rate, dt, of_head, chunk, chunks, pairs, S: tl.constexpr, ACC: tl.constexpr
):  # fmt: skip
    """cos and sin of the angles of a chunk, [Q, pairs]; rate [Q, pairs], dt [Q]."""
    start = tl.load(phases_ptr + (of_head * S + pairs) * (chunks + 1) + chunk, mask=pairs < S, other=0.0).to(ACC)
    return _turn(tl.cumsum(rate * dt[:, None], 0) + start[None, :])


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


@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "blocks", "block_heads"])
def _trapezoid_turn_kernel(
    gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr, seq_ptr, k_ptr, q_ptr,
    weight_ptr, skip_ptr, product_ptr, length, nheads, repeats, blocks, block_heads,
    B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Turned keys and queries of a block of a group's heads in one chunk, (b, l, h, n), weights of inputs, and skips.

    In `ssd` an input has the weight gamma + beta of the next position already where it is read for the first time; the
    skip takes off the second part, times the product of key and query, which turning them leaves as it is. Skips of
    several ranks are the matter of `triton_ranks.py`.
    """
    block = tl.program_id(0) % blocks
    groups = nheads // repeats
    group = tl.program_id(0) // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // blocks // groups % chunks
    row = (tl.program_id(0) // blocks // groups // chunks).to(tl.int64)
    slices: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    ok = steps < length - begin
    positions, first, ranks = length // RANKS, begin // RANKS, steps % RANKS
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * positions
    B_tile = B_ptr + row * B_stride_b + group * N
    C_tile = C_ptr + row * C_stride_b + group * N
    first_head = group * repeats + block * block_heads
    last_head = tl.minimum(first_head + block_heads, (group + 1) * repeats)
    for head in tl.range(first_head, last_head, num_stages=1, disable_licm=True):
        vectors = row * length * nheads + head
        of_head = row * positions * nheads + head
        gamma, beta, following = _weights(
            gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
        )
        product = tl.zeros([Q], ACC)
        for of_slice in tl.static_range(slices):
            columns, columns_ok = _columns(of_slice * BLOCK_N, N, BLOCK_N, HALF)
            k = _rows(B_tile, begin, steps, ok, B_stride_t, columns, columns_ok, ACC)
            q = _rows(C_tile, begin, steps, ok, C_stride_t, columns, columns_ok, ACC)
            k += _bias(B_bias_ptr, head, ranks, columns, columns_ok, N, ACC, RANKS)
            q += _bias(C_bias_ptr, head, ranks, columns, columns_ok, N, ACC, RANKS)
            if RANKS == 1:
                product += tl.sum(k * q, 1)
            if of_slice * (BLOCK_N // 2) < S:  # else all its pairs stand still
                pairs = of_slice * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
                rate_row = rate_ptr + row * positions * S
                rate = _rows(rate_row, first, steps // RANKS, ok, S, pairs, pairs < S, ACC)
                dt = _increments(gamma, beta, Q, RANKS)
                cos, sin = _directions(phases_ptr, rate, dt, row * nheads + head, chunk, chunks, pairs, S, ACC)
                k = _rotated(k, cos, sin, Q, BLOCK_N)
                q = _rotated(q, cos, sin, Q, BLOCK_N)
            tile = (vectors + begin * nheads) * N + (steps[:, None] * (nheads * N) + columns[None, :])
            tile_ok = ok[:, None] & columns_ok[None, :]
            tl.store(k_ptr + tile, k, mask=tile_ok)
            tl.store(q_ptr + tile, q, mask=tile_ok)
        out = vectors + (begin + steps) * nheads
        tl.store(weight_ptr + out, gamma + following, mask=ok)
        if RANKS == 1:
            tl.store(product_ptr + out, product, mask=ok)
            tl.store(skip_ptr + out, tl.load(D_ptr + head).to(ACC) - following * product, mask=ok)


@triton.jit(do_not_specialize=["chunks"])
def _trapezoid_later_kernel(
    entering_ptr, leaving_ptr, dphase_ptr, dphi_end_ptr, later_ptr, chunks,
    P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
    HAS_DPHASE: tl.constexpr, HAS_DPHI: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradient of the angles after a chunk, (b, h, chunks, s): what all that comes later makes of them.

    That is the turn of the state between, but for the turn of the last one.
    """
    chunk = tl.program_id(0) % chunks
    of = (tl.program_id(0) // chunks).to(tl.int64)  # row and head
    pairs = tl.arange(0, BLOCK_N // 2)
    later = tl.zeros([BLOCK_N // 2], ACC)
    if chunk < chunks - 1:
        columns, columns_ok = _columns(0, N, BLOCK_N, HALF)
        p_rows = tl.arange(0, BLOCK_P)[:, None]
        ok = columns_ok[None, :] & (p_rows < P)
        border = (of * chunks + chunk) * (P * N) + (p_rows * N + columns[None, :])
        entering = tl.load(entering_ptr + border + P * N, mask=ok, other=0.0).to(ACC)
        leaving = tl.load(leaving_ptr + border, mask=ok, other=0.0).to(ACC)
        later -= tl.sum(_spin(leaving, entering, BLOCK_P, BLOCK_N), 0)
        if HAS_DPHASE:
            later += tl.load(dphase_ptr + of * S + pairs, mask=pairs < S, other=0.0).to(ACC)
    elif HAS_DPHI:
        later += tl.load(dphi_end_ptr + of * S + pairs, mask=pairs < S, other=0.0).to(ACC)
    tl.store(later_ptr + (of * chunks + chunk) * S + pairs, later, mask=pairs < S)


@keep_addresses_in_loops
@triton.jit
def _unturn_slice(
    gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, seq_ptr, later_ptr, dk_ptr, dq_ptr,
    dskip_ptr, links_ptr, ddt_ptr, drate_ptr, dB_ptr, dC_ptr, dB_bias_ptr, dC_bias_ptr, dphi_ptr, of_slice, block,
    group, chunk, row, rows, length, nheads, repeats, block_heads, B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    TURNS: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, TERMS: tl.constexpr, STAGES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """One slice of columns; TURNS unless all its pairs stand still."""
    groups = nheads // repeats
    chunks = tl.cdiv(length, Q)
    columns, columns_ok = _columns(of_slice * BLOCK_N, N, BLOCK_N, HALF)
    pairs = of_slice * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    ok = steps < length - begin
    positions, first, ranks = length // RANKS, begin // RANKS, steps % RANKS
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * positions
    dB = tl.zeros([Q, BLOCK_N], ACC)
    dC = tl.zeros([Q, BLOCK_N], ACC)
    if TURNS:
        drate = tl.zeros([Q, BLOCK_N // 2], ACC)
        rate = _rows(rate_ptr + row * positions * S, first, steps // RANKS, ok, S, pairs, pairs < S, ACC)
        upper = steps[:, None] <= steps[None, :]
        if TERMS == 0:
            upper = upper.to(ACC)
        else:
            upper = upper.to(tl.bfloat16)
    tile_ok = ok[:, None] & columns_ok[None, :]
    first_head = group * repeats + block * block_heads
    last_head = tl.minimum(first_head + block_heads, (group + 1) * repeats)
    for head in tl.range(first_head, last_head, num_stages=STAGES, disable_licm=True):
        vectors = row * length * nheads + head
        heads = row * nheads + head
        of_chunk = (row * chunks + chunk) * nheads + head
        of_head = row * positions * nheads + head
        gamma, beta, following = _weights(
            gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
        )
        dt = _increments(gamma, beta, Q, RANKS)
        tile = (vectors + begin * nheads) * N + (steps[:, None] * (nheads * N) + columns[None, :])
        dk = tl.load(dk_ptr + tile, mask=tile_ok, other=0.0).to(ACC)
        dq = tl.load(dq_ptr + tile, mask=tile_ok, other=0.0).to(ACC)
        if TURNS:
            cos, sin = _directions(phases_ptr, rate, dt, heads, chunk, chunks, pairs, S, ACC)
            dk = _rotated(dk, cos, -sin, Q, BLOCK_N)
            dq = _rotated(dq, cos, -sin, Q, BLOCK_N)
        k = _rows(B_ptr + row * B_stride_b + group * N, begin, steps, ok, B_stride_t, columns, columns_ok, ACC)
        k += _bias(B_bias_ptr, head, ranks, columns, columns_ok, N, ACC, RANKS)
        q = _rows(C_ptr + row * C_stride_b + group * N, begin, steps, ok, C_stride_t, columns, columns_ok, ACC)
        q += _bias(C_bias_ptr, head, ranks, columns, columns_ok, N, ACC, RANKS)
        if TURNS:
            dangle = _spin(dk, k, Q, BLOCK_N) + _spin(dq, q, Q, BLOCK_N)

        if RANKS == 1:
            # Skips: D - beta (k.q).
            out = vectors + (begin + steps) * nheads
            of_product = -following * tl.load(dskip_ptr + out, mask=ok, other=0.0)
            dk += of_product[:, None] * q
            dq += of_product[:, None] * k
        else:
            # Each rank with all ranks of its position.
            for d in range(RANKS):
                other = (ranks + d) % RANKS
                beside = steps - ranks + other
                k = _rows(B_ptr + row * B_stride_b + group * N, begin, beside, ok, B_stride_t, columns, columns_ok, ACC)
                k += _bias(B_bias_ptr, head, other, columns, columns_ok, N, ACC, RANKS)
                q = _rows(C_ptr + row * C_stride_b + group * N, begin, beside, ok, C_stride_t, columns, columns_ok, ACC)
                q += _bias(C_bias_ptr, head, other, columns, columns_ok, N, ACC, RANKS)
                of_rows = links_ptr + (vectors + begin * nheads) * RANKS
                read = tl.load(of_rows + steps * (nheads * RANKS) + other, mask=ok, other=0.0)
                written = tl.load(of_rows + beside * (nheads * RANKS) + ranks, mask=ok, other=0.0)
                dk += read[:, None] * q
                dq += written[:, None] * k
        dB += dk
        dC += dq
        if RANKS == 1:
            tl.store(dB_bias_ptr + of_chunk * N + columns, tl.sum(dk, 0), mask=columns_ok)
            tl.store(dC_bias_ptr + of_chunk * N + columns, tl.sum(dq, 0), mask=columns_ok)
        else:
            each = (of_chunk * RANKS + tl.arange(0, RANKS)[:, None]) * N + columns[None, :]
            of_ranks = tl.sum(tl.reshape(dk, [Q // RANKS, RANKS, BLOCK_N]), 0)
            tl.store(dB_bias_ptr + each, of_ranks, mask=columns_ok[None, :])
            of_ranks = tl.sum(tl.reshape(dq, [Q // RANKS, RANKS, BLOCK_N]), 0)
            tl.store(dC_bias_ptr + each, of_ranks, mask=columns_ok[None, :])

        if TURNS:
            later = tl.load(later_ptr + (heads * chunks + chunk) * S + pairs, mask=pairs < S, other=0.0)
            ddelta = _sums_onward(upper, dangle, tl.zeros([Q, BLOCK_N // 2], ACC) + later[None, :], ACC, TERMS)
            if chunk == 0:
                at_first = tl.sum(tl.where((steps == 0)[:, None], ddelta, 0.0), 0)
                tl.store(dphi_ptr + heads * S + pairs, at_first, mask=pairs < S)
            ddelta = ddelta * 3.141592653589793
            drate += ddelta * dt[:, None]
            ddt_slice = ddt_ptr + of_slice.to(tl.int64) * (rows * positions * nheads)
            out = (row * positions + first + steps // RANKS) * nheads + head
            tl.store(ddt_slice + out, tl.sum(ddelta * rate, 1), mask=ok & (ranks == 0))

    width = groups * N
    out = ((block * rows + row) * length + begin) * width + group * N
    offset = steps[:, None] * width + columns[None, :]
    tl.store(dB_ptr + out + offset, dB, mask=tile_ok)
    tl.store(dC_ptr + out + offset, dC, mask=tile_ok)
    if TURNS:
        out = (((block * groups + group) * rows + row) * positions + first) * S
        tile_ok = (ok & (ranks == 0))[:, None] & (pairs < S)[None, :]
        tl.store(drate_ptr + out + steps[:, None] // RANKS * S + pairs[None, :], drate, mask=tile_ok)


@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats", "blocks", "block_heads"])
def _trapezoid_unturn_kernel(
    gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, seq_ptr, later_ptr, dk_ptr, dq_ptr,
    dskip_ptr, links_ptr, ddt_ptr, drate_ptr, dB_ptr, dC_ptr, dB_bias_ptr, dC_bias_ptr, dphi_ptr,
    rows, length, nheads, repeats, blocks, block_heads, B_stride_b, B_stride_t, C_stride_b, C_stride_t,
    N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr,
    ACC: tl.constexpr, TERMS: tl.constexpr, STAGES: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """From the gradients of turned keys and queries and of skips those of what they are made of, in one chunk.

    One head after another of a block of a group's heads, for some columns: narrow tiles stay in registers. Those of B,
    C and the rates are summed over the heads there, and written once per block of heads; those of dt once per block of
    columns.
    """
    slices: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    of_slice = tl.program_id(0) % slices
    block = tl.program_id(0) // slices % blocks
    groups = nheads // repeats
    group = tl.program_id(0) // slices // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // slices // blocks // groups % chunks
    row = (tl.program_id(0) // slices // blocks // groups // chunks).to(tl.int64)
    if of_slice * (BLOCK_N // 2) < S:
        _unturn_slice(
            gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, seq_ptr, later_ptr, dk_ptr,
            dq_ptr, dskip_ptr, links_ptr, ddt_ptr, drate_ptr, dB_ptr, dC_ptr, dB_bias_ptr, dC_bias_ptr, dphi_ptr,
            of_slice, block, group, chunk, row, rows, length, nheads, repeats, block_heads, B_stride_b, B_stride_t,
            C_stride_b, C_stride_t, True, N, S, Q, BLOCK_N, HALF, PACKED, ACC, TERMS, STAGES, RANKS,
        )  # fmt: skip
    else:
        _unturn_slice(
            gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, seq_ptr, later_ptr, dk_ptr,
            dq_ptr, dskip_ptr, links_ptr, ddt_ptr, drate_ptr, dB_ptr, dC_ptr, dB_bias_ptr, dC_bias_ptr, dphi_ptr,
            of_slice, block, group, chunk, row, rows, length, nheads, repeats, block_heads, B_stride_b, B_stride_t,
            C_stride_b, C_stride_t, False, N, S, Q, BLOCK_N, HALF, PACKED, ACC, TERMS, STAGES, RANKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["total", "length", "nheads"])
def _trapezoid_weights_kernel(
    ddt_ptr, dweight_ptr, dskip_ptr, product_ptr, above_ptr, seq_ptr, dgamma_ptr, dbeta_ptr, total, length, nheads,
    SLICES: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Gradients of gamma and beta from that of dt, in slices to be added, and from those of weights and skips.

    An input weighs what it had when it came and, one position later, what beta adds to it. With several ranks
    `product` is what beta loses of the weights' gradients, and `above` what gamma gets besides them.
    """
    of = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = of < total
    ddt = tl.load(ddt_ptr + of, mask=ok, other=0.0)
    for k in tl.static_range(1, SLICES):
        ddt += tl.load(ddt_ptr + total.to(tl.int64) * k + of, mask=ok, other=0.0)
    place = of // nheads  # row and position
    linked = ok & (place % length > 0)
    if PACKED:
        own = tl.load(seq_ptr + place, mask=ok, other=-1)
        linked = linked & (tl.load(seq_ptr + place - 1, mask=linked, other=-2) == own)
    before = of - nheads
    lost = tl.load(product_ptr + before, mask=linked, other=0.0)
    if RANKS == 1:
        now = tl.load(dweight_ptr + of, mask=ok, other=0.0)
        added = tl.load(dweight_ptr + before, mask=linked, other=0.0)
        lost *= tl.load(dskip_ptr + before, mask=linked, other=0.0)
    else:
        now = tl.load(above_ptr + of, mask=ok, other=0.0)
        added = tl.zeros_like(now)
        first = place * (RANKS * nheads) + of % nheads
        for i in range(RANKS):
            now += tl.load(dweight_ptr + first + i * nheads, mask=ok, other=0.0)
            added += tl.load(dweight_ptr + first + (i - RANKS) * nheads, mask=linked, other=0.0)
    tl.store(dgamma_ptr + of, ddt + now, mask=ok)
    tl.store(dbeta_ptr + of, ddt + (added - lost), mask=ok)
