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

from ..ssd.triton_kernels import _halves, _last, _less, _log2_sums, _vector, _whole, keep_addresses_in_loops
from ..triton_utils import quick


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
def _halves_of_pairs(start, N: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where both entries of the pairs of a tile lie, half a row apart, which exist; the last of an odd N is alone."""
    second = start // 2 + tl.arange(0, BLOCK_N // 2)
    first, first_ok = second, second < N // 2
    if N % 2:
        first_ok = second <= N // 2
        first = tl.where(second == N // 2, N - 1, second)
    return first, first_ok, second + N // 2, second < N // 2


@triton.jit
def _get(ptr, rows, ok, start, N: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, TYPE: tl.constexpr):
    """BLOCK_N columns from `start` on, two entries of a pair side by side; rows [rows, 1] lie at `ptr`, if `ok`.

    Halves of pairs are loaded apart, so that neighbours lie side by side in memory.
    """
    if HALF:
        first, first_ok, second, second_ok = _halves_of_pairs(start, N, BLOCK_N)
        a = tl.load(ptr + (rows + first[None, :]), mask=ok & first_ok[None, :], other=0.0)
        b = tl.load(ptr + (rows + second[None, :]), mask=ok & second_ok[None, :], other=0.0)
        tile = tl.reshape(tl.join(a, b), [rows.shape[0], BLOCK_N])
    else:
        columns = start + tl.arange(0, BLOCK_N)
        tile = tl.load(ptr + (rows + columns[None, :]), mask=ok & (columns < N)[None, :], other=0.0)
    return tile.to(TYPE)


@triton.jit
def _put(ptr, rows, ok, start, tile, N: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr):
    """Store what `_get` loads."""
    if HALF:
        first, first_ok, second, second_ok = _halves_of_pairs(start, N, BLOCK_N)
        a, b = tl.split(tl.reshape(tile, [rows.shape[0], BLOCK_N // 2, 2]))
        tl.store(ptr + (rows + first[None, :]), a, mask=ok & first_ok[None, :])
        tl.store(ptr + (rows + second[None, :]), b, mask=ok & second_ok[None, :])
    else:
        columns = start + tl.arange(0, BLOCK_N)
        tl.store(ptr + (rows + columns[None, :]), tile, mask=ok & (columns < N)[None, :])


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
def _of_positions(tile, ROWS: tl.constexpr):
    """What is [ranks, width] for each position, [positions * ranks, width], or [1, width] with one rank."""
    if tile.shape[0] > 1:
        every = tl.broadcast_to(tile[None, :, :], [ROWS // tile.shape[0], tile.shape[0], tile.shape[1]])
        tile = tl.reshape(every, [ROWS, tile.shape[1]])
    return tile


@triton.jit
def _bias(
    ptr, head, start, ROWS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr,
    ACC: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """What is added to the keys or queries of one head, [1, n], or with several ranks [rows, n]."""
    ranks = tl.arange(0, RANKS)[:, None]
    return _of_positions(_get(ptr + head * (RANKS * N), ranks * N, ranks >= 0, start, N, BLOCK_N, HALF, ACC), ROWS)


@triton.jit
def _sum_of_positions(tile, Q: tl.constexpr, WIDTH: tl.constexpr, RANKS: tl.constexpr):
    """[Q, width] summed over positions, [ranks, width]."""
    return tl.sum(tile, 0)[None, :] if RANKS == 1 else tl.sum(tl.reshape(tile, [Q // RANKS, RANKS, WIDTH]), 0)


@triton.jit
def _sums_onward(x, own, Q: tl.constexpr, WIDTH: tl.constexpr, ACC: tl.constexpr, TERMS: tl.constexpr):
    """Sums of the rows of x [Q, width] from each one on; tensor cores take x as a sum of `TERMS` bfloat16 numbers.

    Two of them stand side by side in one operand, which is wide enough for wgmma then. `own` are the rows' numbers.
    """
    upper = own[:, None] <= own[None, :]
    if TERMS == 0:
        total = tl.dot(upper.to(ACC), x, input_precision="ieee", out_dtype=ACC)
    else:
        upper = upper.to(tl.bfloat16)
        high, low = _halves(x, "bf16x3")
        both = tl.reshape(tl.join(high, low), [Q, 2 * WIDTH])
        of_high, of_low = tl.split(tl.reshape(tl.dot(upper, both, out_dtype=ACC), [Q, WIDTH, 2]))
        if TERMS == 3:
            rest = x - high.to(tl.float32) - low.to(tl.float32)
            of_low = tl.dot(upper, rest.to(tl.bfloat16), of_low, out_dtype=ACC)
        total = of_high + of_low
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
def _directions(
    gamma_ptr, beta_ptr, rate_ptr, phases_ptr, first, positions, nheads, of_head, chunk, chunks, pairs,
    S: tl.constexpr, Q: tl.constexpr, ACC: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """cos and sin of the angles of a chunk of Q positions and ranks, [Q, pairs]; the ranks of a position share them."""
    at = tl.arange(0, Q // RANKS)
    ok = at < positions - first
    dt = _vector(gamma_ptr, first, at, ok, nheads, ACC) + _vector(beta_ptr, first, at, ok, nheads, ACC)
    rate = _rows(rate_ptr, first, at, ok, S, pairs, pairs < S, ACC)
    start = tl.load(phases_ptr + (of_head * (chunks + 1) + chunk) * S + pairs, mask=pairs < S, other=0.0).to(ACC)
    cos, sin = _turn(tl.cumsum(rate * dt[:, None], 0) + start[None, :])
    return _of_ranks(cos, RANKS), _of_ranks(sin, RANKS)


@triton.jit
def _of_ranks(tile, RANKS: tl.constexpr):
    """What is [positions, width] for each rank of a position, [positions * ranks, width]."""
    if RANKS > 1:
        every = tl.broadcast_to(tile[:, None, :], [tile.shape[0], RANKS, tile.shape[1]])
        tile = tl.reshape(every, [tile.shape[0] * RANKS, tile.shape[1]])
    return tile


@quick
@triton.jit(do_not_specialize=["length", "nheads"])
def _trapezoid_angle_kernel(
    gamma_ptr, beta_ptr, rate_ptr, phi_ptr, totals_ptr, length, nheads, block_heads, HAS_PHI: tl.constexpr,
    S: tl.constexpr, Q: tl.constexpr, BLOCK_S: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """By how much a block of heads turns in each chunk of Q positions, after phi, (b, h, 1 + chunks, s), below 2."""
    chunks, blocks = tl.cdiv(length, Q), tl.cdiv(nheads, block_heads)
    block = tl.program_id(0) % blocks
    chunk = (tl.program_id(0) // blocks) % chunks
    row = (tl.program_id(0) // blocks // chunks).to(tl.int64)
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    ok = steps < length - begin
    pairs = tl.arange(0, BLOCK_S)
    rate = _rows(rate_ptr + row * length * S, begin, steps, ok, S, pairs, pairs < S, ACC)
    for head in range(block * block_heads, tl.minimum((block + 1) * block_heads, nheads)):
        vectors = row * length * nheads + head
        dt = _vector(gamma_ptr + vectors, begin, steps, ok, nheads, ACC)
        dt += _vector(beta_ptr + vectors, begin, steps, ok, nheads, ACC)
        total = tl.sum(rate * dt[:, None], 0)
        out = totals_ptr + (row * nheads + head) * (chunks + 1) * S + pairs
        tl.store(out + (1 + chunk) * S, total - 2.0 * tl.floor(0.5 * total), mask=pairs < S)
        if chunk == 0:
            start = tl.zeros([BLOCK_S], ACC)
            if HAS_PHI:
                phi = tl.load(phi_ptr + (row * nheads + head) * S + pairs, mask=pairs < S, other=0.0).to(ACC)
                start = phi * 0.3183098861837907
            tl.store(out, start, mask=pairs < S)


@quick
@triton.jit(do_not_specialize=["count"])
def _trapezoid_phases_kernel(totals_ptr, count, S: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr):
    """Sums of totals (b, h, count, s) up to each one, in their place, from 0 to 2.

    Whole turns are taken off each term; float64 keeps the digits of the sum.
    """
    blocks: tl.constexpr = (S + PAIRS - 1) // PAIRS
    pairs = tl.program_id(0) % blocks * PAIRS + tl.arange(0, PAIRS)
    row = totals_ptr + (tl.program_id(0) // blocks).to(tl.int64) * count * S
    total = tl.zeros([PAIRS], tl.float64)
    for begin in range(0, count, COUNT):
        at = begin + tl.arange(0, COUNT)
        ok = (at < count)[:, None] & (pairs < S)[None, :]
        place = row + at[:, None] * S + pairs[None, :]
        terms = tl.load(place, mask=ok, other=0.0).to(tl.float64)
        sums = tl.cumsum(terms, 0) + total[None, :]
        tl.store(place, sums - 2.0 * tl.floor(0.5 * sums), mask=ok)
        total += tl.sum(terms, 0)
        total -= 2.0 * tl.floor(0.5 * total)


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "blocks", "block_heads"])
def _trapezoid_turn_fwd_kernel(
    gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, D_ptr, seq_ptr,
    k_ptr, q_ptr, weight_ptr, skip_ptr, length, nheads, repeats, blocks, block_heads,
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
    positions, first = length // RANKS, begin // RANKS
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * positions
    B_tile = B_ptr + row * B_stride_b + begin * B_stride_t + group * N
    C_tile = C_ptr + row * C_stride_b + begin * C_stride_t + group * N
    first_head = group * repeats + block * block_heads
    last_head = tl.minimum(first_head + block_heads, (group + 1) * repeats)
    for head in tl.range(first_head, last_head, num_stages=1, disable_licm=True):
        vectors = row * length * nheads + head
        of_head = row * positions * nheads + head
        gamma, _, following = _weights(
            gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
        )
        product = tl.zeros([Q], ACC)
        for of_slice in tl.static_range(slices):
            start = of_slice * BLOCK_N
            k = _get(B_tile, steps[:, None] * B_stride_t, ok[:, None], start, N, BLOCK_N, HALF, ACC)
            q = _get(C_tile, steps[:, None] * C_stride_t, ok[:, None], start, N, BLOCK_N, HALF, ACC)
            k += _bias(B_bias_ptr, head, start, Q, N, BLOCK_N, HALF, ACC, RANKS)
            q += _bias(C_bias_ptr, head, start, Q, N, BLOCK_N, HALF, ACC, RANKS)
            if RANKS == 1:
                product += tl.sum(k * q, 1)
            if of_slice * (BLOCK_N // 2) < S:  # else all its pairs stand still
                pairs = of_slice * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
                cos, sin = _directions(
                    gamma_ptr + of_head, beta_ptr + of_head, rate_ptr + row * positions * S, phases_ptr, first,
                    positions, nheads, row * nheads + head, chunk, chunks, pairs, S, Q, ACC, RANKS,
                )  # fmt: skip
                k = _rotated(k, cos, sin, Q, BLOCK_N)
                q = _rotated(q, cos, sin, Q, BLOCK_N)
            tile = (vectors + begin * nheads) * N
            _put(k_ptr + tile, steps[:, None] * (nheads * N), ok[:, None], start, k, N, BLOCK_N, HALF)
            _put(q_ptr + tile, steps[:, None] * (nheads * N), ok[:, None], start, q, N, BLOCK_N, HALF)
        out = vectors + (begin + steps) * nheads
        tl.store(weight_ptr + out, gamma + following, mask=ok)
        if RANKS == 1:
            tl.store(skip_ptr + out, tl.load(D_ptr + head).to(ACC) - following * product, mask=ok)


@triton.jit
def _turn_columns(
    log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_tile, C_tile, B_bias_ptr, C_bias_ptr, seq_row,
    k_ptr, q_ptr, weight_ptr, turns_ptr, in_ptr, out_ptr, of_slice, first_head, last_head, chunk, row, begin,
    length, nheads, B_stride_t, C_stride_t, k_stride_h, k_stride_t, TURNS: tl.constexpr,
    N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr,
    EXACT: tl.constexpr, ACC: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One slice of columns, of which pairs turn with TURNS; the last one finds what there is once, too."""
    steps = tl.arange(0, Q)
    ok = steps < length - begin
    positions, first = length // RANKS, begin // RANKS
    start = of_slice * BLOCK_N
    keys = _get(B_tile, steps[:, None] * B_stride_t, ok[:, None], start, N, BLOCK_N, HALF, ACC)
    queries = _get(C_tile, steps[:, None] * C_stride_t, ok[:, None], start, N, BLOCK_N, HALF, ACC)
    at = tl.arange(0, Q // RANKS)
    at_ok = at < positions - first
    pairs = of_slice * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    if TURNS:
        rate = _rows(rate_ptr + row * positions * S, first, at, at_ok, S, pairs, pairs < S, ACC)
    for head in tl.range(first_head, last_head, num_stages=1, disable_licm=True):
        vectors = row * length * nheads + head
        of_head = row * positions * nheads + head
        k = keys + _bias(B_bias_ptr, head, start, Q, N, BLOCK_N, HALF, ACC, RANKS)
        q = queries + _bias(C_bias_ptr, head, start, Q, N, BLOCK_N, HALF, ACC, RANKS)
        if TURNS:
            dt = _vector(gamma_ptr + of_head, first, at, at_ok, nheads, ACC)
            dt += _vector(beta_ptr + of_head, first, at, at_ok, nheads, ACC)
            phase = phases_ptr + ((row * nheads + head) * (tl.cdiv(length, Q) + 1) + chunk) * S + pairs
            angle = tl.load(phase, mask=pairs < S, other=0.0).to(ACC)
            cos, sin = _turn(tl.cumsum(rate * dt[:, None], 0) + angle[None, :])
            turns = tl.reshape(tl.join(cos, sin), [Q // RANKS, BLOCK_N])
            both = start + tl.arange(0, BLOCK_N)
            turns_tile = turns_ptr + ((row * nheads + head) * positions + first) * (2 * S) + both[None, :]
            turns_ok = at_ok[:, None] & (both < 2 * S)[None, :]
            tl.store(turns_tile + at[:, None] * (2 * S), turns, mask=turns_ok)
            cos, sin = _of_ranks(cos, RANKS), _of_ranks(sin, RANKS)
            k = _rotated(k, cos, sin, Q, BLOCK_N)
            q = _rotated(q, cos, sin, Q, BLOCK_N)
        tile = row * length * nheads * WIDTH + tl.cast(head, tl.int64) * k_stride_h + begin * k_stride_t
        in_halves: tl.constexpr = HALF and WIDTH == N
        _put(k_ptr + tile, steps[:, None] * k_stride_t, ok[:, None], start, k, WIDTH, BLOCK_N, in_halves)
        _put(q_ptr + tile, steps[:, None] * k_stride_t, ok[:, None], start, q, WIDTH, BLOCK_N, in_halves)
        if of_slice == (WIDTH + BLOCK_N - 1) // BLOCK_N - 1:
            out = vectors + (begin + steps) * nheads
            gamma, _, following = _weights(
                gamma_ptr, beta_ptr, seq_row, of_head, first, positions, nheads, PACKED, Q, ACC, RANKS
            )
            log_decay = _vector(log_decay_ptr + vectors, begin, steps, ok, nheads, ACC)
            high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
            decay_in = tl.exp2(_whole(high, low, EXACT))
            left = tl.exp2(_less(_last(high, Q), _last(low, Q), high, low, EXACT)) * (gamma + following)
            if PACKED:
                index = tl.load(seq_row + first + steps // RANKS, mask=ok, other=-1)
                decay_in = tl.where(index == tl.load(seq_row + tl.maximum(first - 1, 0)), decay_in, 0.0)
                last = tl.load(seq_row + tl.minimum(begin + Q, length) // RANKS - 1)
                left = tl.where(index == last, left, 0.0)
            tl.store(weight_ptr + out, gamma + following, mask=ok)
            tl.store(in_ptr + out, decay_in, mask=ok)
            tl.store(out_ptr + out, left, mask=ok)


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "blocks", "block_heads"])
def _trapezoid_turn_kernel(
    log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, seq_ptr,
    k_ptr, q_ptr, weight_ptr, turns_ptr, in_ptr, out_ptr, length, nheads, repeats, blocks, block_heads,
    B_stride_b, B_stride_t, C_stride_b, C_stride_t, k_stride_h, k_stride_t,
    N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_N: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr,
    EXACT: tl.constexpr, ACC: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What gradients need of a block of a group's heads in one chunk, one slice of BLOCK_N columns per program.

    Turned keys and queries, (b, l, h, n), or only their first WIDTH columns, the others standing still, and then with
    the entries of a pair side by side; cos and sin side by side, (b, h, positions, 2 s), weights of inputs, what each
    step still reads of the state before the chunk, and how much of its input is left at the chunk's end, (b, l, h).
    """
    slices: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    turning: tl.constexpr = (2 * S + BLOCK_N - 1) // BLOCK_N
    of_slice = tl.program_id(0) % slices
    block = tl.program_id(0) // slices % blocks
    groups = nheads // repeats
    group = tl.program_id(0) // slices // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // slices // blocks // groups % chunks
    row = (tl.program_id(0) // slices // blocks // groups // chunks).to(tl.int64)
    begin = chunk.to(tl.int64) * Q
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * (length // RANKS)
    B_tile = B_ptr + row * B_stride_b + begin * B_stride_t + group * N
    C_tile = C_ptr + row * C_stride_b + begin * C_stride_t + group * N
    first_head = group * repeats + block * block_heads
    last_head = tl.minimum(first_head + block_heads, (group + 1) * repeats)
    if of_slice < turning:
        _turn_columns(
            log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_tile, C_tile, B_bias_ptr, C_bias_ptr, seq_row,
            k_ptr, q_ptr, weight_ptr, turns_ptr, in_ptr, out_ptr, of_slice, first_head, last_head, chunk, row, begin,
            length, nheads, B_stride_t, C_stride_t, k_stride_h, k_stride_t, True, N, S, Q, BLOCK_N, HALF, PACKED, EXACT,
            ACC, RANKS, WIDTH,
        )  # fmt: skip
    elif turning < slices:
        _turn_columns(
            log_decay_ptr, gamma_ptr, beta_ptr, rate_ptr, phases_ptr, B_tile, C_tile, B_bias_ptr, C_bias_ptr, seq_row,
            k_ptr, q_ptr, weight_ptr, turns_ptr, in_ptr, out_ptr, of_slice, first_head, last_head, chunk, row, begin,
            length, nheads, B_stride_t, C_stride_t, k_stride_h, k_stride_t, False, N, S, Q, BLOCK_N, HALF, PACKED,
            EXACT, ACC, RANKS, WIDTH,
        )  # fmt: skip


@quick
@triton.jit(do_not_specialize=["total", "length", "nheads"])
def _trapezoid_weights_kernel(
    ddt_ptr, direct_ptr, dweight_ptr, seq_ptr, dgamma_ptr, dbeta_ptr, total, length, nheads,
    SLICES: tl.constexpr, PACKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of gamma and beta from that of dt without pi, in slices to be added, and from those of weights.

    `direct` is what gamma gets besides dt; beta gets what the weight of the position before does.
    """
    of = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = of < total
    ddt = tl.load(ddt_ptr + of, mask=ok, other=0.0)
    for k in tl.static_range(1, SLICES):
        ddt += tl.load(ddt_ptr + total.to(tl.int64) * k + of, mask=ok, other=0.0)
    ddt *= 3.141592653589793
    place = of // nheads  # row and position
    linked = ok & (place % length > 0)
    if PACKED:
        own = tl.load(seq_ptr + place, mask=ok, other=-1)
        linked = linked & (tl.load(seq_ptr + place - 1, mask=linked, other=-2) == own)
    tl.store(dgamma_ptr + of, ddt + tl.load(direct_ptr + of, mask=ok, other=0.0), mask=ok)
    tl.store(dbeta_ptr + of, ddt + tl.load(dweight_ptr + of - nheads, mask=linked, other=0.0), mask=ok)
