"""The kernel of `trapezoid_ssd` that finds the gradients of keys and queries and of what turned them, chunk by chunk.

Notation as in `triton_kernels.py`. A program holds some columns of one chunk's keys, or queries, and takes one head
after another of a block of a group's heads: gradients of turned ones are products, which it turns back and sums over
heads before anything is written. Key and query of one position turn together: what the same rounded numbers in both
products add to the gradient of their angle cancels.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import _dot_add, _halves, _tile, keep_addresses_in_loops
from ..triton_utils import quick
from .triton_kernels import _bias, _get, _put, _rotated, _rows, _spin, _sum_of_positions, _sums_onward


@keep_addresses_in_loops
@triton.jit
def _gradients_of_maps(
    value_ptr, decay_ptr, gamma_ptr, beta_ptr, rate_ptr, turns_ptr, key_ptr, own_ptr, raw_ptr, raw_bias_ptr, state_ptr,
    after_ptr, kernel_ptr, dphase_ptr, dphi_end_ptr, out_ptr, bias_ptr, ddt_ptr, drate_ptr, dphi_ptr, of_slice, block,
    group, chunk, row, rows, length, nheads, repeats, block_heads, value_stride_b, value_stride_t, raw_stride_b,
    raw_stride_t, k_stride_h, k_stride_t, OF_B: tl.constexpr, TURNS: tl.constexpr, HAS_DPHASE: tl.constexpr,
    HAS_DPHI: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    TERMS: tl.constexpr, STAGES: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of queries, or with OF_B of keys, in one slice of columns; TURNS unless all its pairs stand still.

    `key` is what they are multiplied by, turned queries with OF_B, and `own` they themselves, turned. Only the first
    WIDTH columns of them are there; others, those of `raw`, stand still. With fewer than N the entries of a pair lie
    side by side in them, and in states.
    """
    groups = nheads // repeats
    chunks = tl.cdiv(length, Q)
    start = of_slice * BLOCK_N
    pairs = of_slice * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    ok = steps < length - begin
    positions, first, at, ranks = length // RANKS, begin // RANKS, steps // RANKS, steps % RANKS
    rows_ok = ok[:, None]
    p_rows = tl.arange(0, BLOCK_P)[:, None]
    total = tl.zeros([Q, BLOCK_N], ACC)
    in_halves: tl.constexpr = HALF and WIDTH == N
    if WIDTH < N and not TURNS:
        raw_tile = raw_ptr + row * raw_stride_b + begin * raw_stride_t + group * N
        raw = _get(raw_tile, steps[:, None] * raw_stride_t, rows_ok, start, N, BLOCK_N, HALF, ACC)
    if TURNS:
        drate = tl.zeros([Q, BLOCK_N // 2], ACC)
    first_head = group * repeats + block * block_heads
    last_head = tl.minimum(first_head + block_heads, (group + 1) * repeats)
    for head in tl.range(first_head, last_head, num_stages=STAGES, disable_licm=True):
        # The steps again, but not as constants: masks that are kept over the loop would fill the registers.
        own = steps + tl.minimum(head, 0)
        vectors = (row * length + begin) * nheads + head
        heads = row * nheads + head
        of_chunk = (row * chunks + chunk) * nheads + head
        border = (heads * chunks + chunk) * (P * N)
        of_keys = row * length * nheads * WIDTH + tl.cast(head, tl.int64) * k_stride_h + begin * k_stride_t
        rows_of_head = steps[:, None] * k_stride_t
        if TURNS or WIDTH == N:
            key = _get(key_ptr + of_keys, rows_of_head, rows_ok, start, WIDTH, BLOCK_N, in_halves, DOT)
        else:
            key = (raw + _bias(raw_bias_ptr, head, start, Q, N, BLOCK_N, HALF, ACC, RANKS)).to(DOT)
        state = _get(state_ptr + border, p_rows * N, p_rows < P, start, N, BLOCK_N, in_halves, DOT)
        value_row = value_ptr + row * value_stride_b + head * P
        value = _tile(value_row, begin, steps, ok, value_stride_t, P, BLOCK_P, DOT)
        kernel_tile = kernel_ptr + of_chunk * (Q * Q)
        if OF_B:
            kernel = tl.load(kernel_tile + (steps[:, None] * Q + steps[None, :])).to(DOT)
        else:
            kernel = tl.load(kernel_tile + (steps[None, :] * Q + steps[:, None])).to(DOT)
        decay = tl.load(decay_ptr + vectors + steps * nheads, mask=ok, other=0.0)
        value, value_low = _halves(value, PRECISION)
        state_high, state_low = _halves(state, PRECISION)
        zeros = tl.zeros([Q, BLOCK_N], ACC)
        found = _dot_add(value, value_low, state_high, state_low, zeros, ACC, PRECISION) * decay[:, None]
        kernel, kernel_low = _halves(kernel, PRECISION)
        key, key_low = _halves(key, PRECISION)
        found = _dot_add(kernel, kernel_low, key, key_low, found, ACC, PRECISION)
        if TURNS:
            turned = _get(own_ptr + of_keys, rows_of_head, rows_ok, start, WIDTH, BLOCK_N, in_halves, ACC)
            dangle = _spin(found, turned, Q, BLOCK_N)
            of_position = (row * positions + first) * nheads + head
            both = start + tl.arange(0, BLOCK_N)
            turns = tl.load(
                turns_ptr + (heads * positions + first) * (2 * S) + (at[:, None] * (2 * S) + both[None, :]),
                mask=rows_ok & (both < 2 * S)[None, :], other=0.0,
            )  # fmt: skip
            cos, sin = tl.split(tl.reshape(turns.to(ACC), [Q, BLOCK_N // 2, 2]))
            if 2 * S % BLOCK_N:  # pairs that stand still have angle 0
                cos = tl.where((pairs < S)[None, :], cos, 1.0)
            found = _rotated(found, cos, -sin, Q, BLOCK_N)
            later = tl.zeros([BLOCK_N // 2], ACC)
            if OF_B:
                # What later chunks make of the angles, which is what they make of the turn of the state between.
                onward = chunk < chunks - 1
                p_ok = (p_rows < P) & onward
                after = _get(after_ptr + border + P * N, p_rows * N, p_ok, start, N, BLOCK_N, in_halves, ACC)
                later -= tl.sum(_spin(state.to(ACC), after, BLOCK_P, BLOCK_N), 0)
                of_pairs = heads * S + pairs
                if HAS_DPHASE:
                    later += tl.load(dphase_ptr + of_pairs, mask=(pairs < S) & onward, other=0.0).to(ACC)
                if HAS_DPHI:
                    later += tl.load(dphi_end_ptr + of_pairs, mask=(pairs < S) & (chunk == chunks - 1), other=0.0).to(
                        ACC
                    )
            ddelta = _sums_onward(dangle, own, Q, BLOCK_N // 2, ACC, TERMS) + later[None, :]
            at_first = ((steps == 0) & (chunk == 0))[:, None] & (pairs < S)[None, :]
            tl.store(dphi_ptr + heads * S + (steps[:, None] * S + pairs[None, :]), ddelta, mask=at_first)
            of_gamma = of_position + at * nheads
            dt = tl.load(gamma_ptr + of_gamma, mask=ok, other=0.0) + tl.load(beta_ptr + of_gamma, mask=ok, other=0.0)
            drate += ddelta * dt[:, None]
            rate = _rows(rate_ptr + row * positions * S, first, at, ok, S, pairs, pairs < S, ACC)
            ddt_slice = ddt_ptr + of_slice.to(tl.int64) * (rows * positions * nheads)
            tl.store(ddt_slice + of_gamma, tl.sum(ddelta * rate, 1), mask=ok & (ranks == 0))
        total += found
        of_bias = tl.arange(0, RANKS)[:, None] * N
        sums = _sum_of_positions(found, Q, BLOCK_N, RANKS)
        _put(bias_ptr + of_chunk * (RANKS * N), of_bias, of_bias >= 0, start, sums, N, BLOCK_N, HALF)

    width = groups * N
    out = ((block * rows + row) * length + begin) * width + group * N
    _put(out_ptr + out, steps[:, None] * width, rows_ok, start, total, N, BLOCK_N, HALF)
    if TURNS:
        out = (((block * groups + group) * rows + row) * positions + first) * S
        tile_ok = (ok & (ranks == 0))[:, None] & (pairs < S)[None, :]
        tl.store(drate_ptr + out + at[:, None] * S + pairs[None, :], drate, mask=tile_ok)


@triton.jit
def _gradients_of_slice(
    value_ptr, decay_ptr, gamma_ptr, beta_ptr, rate_ptr, turns_ptr, key_ptr, own_ptr, raw_ptr, raw_bias_ptr, state_ptr,
    after_ptr, kernel_ptr, dphase_ptr, dphi_end_ptr, out_ptr, bias_ptr, ddt_ptr, drate_ptr, dphi_ptr, of_slice, block,
    group, chunk, row, rows, length, nheads, repeats, block_heads, value_stride_b, value_stride_t, raw_stride_b,
    raw_stride_t, k_stride_h, k_stride_t, OF_B: tl.constexpr, TURNING: tl.constexpr, HAS_DPHASE: tl.constexpr,
    HAS_DPHI: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    TERMS: tl.constexpr, STAGES: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """`_gradients_of_maps` of a slice, of which the first TURNING ones turn."""
    if of_slice < TURNING:
        _gradients_of_maps(
            value_ptr, decay_ptr, gamma_ptr, beta_ptr, rate_ptr, turns_ptr, key_ptr, own_ptr, raw_ptr, raw_bias_ptr,
            state_ptr, after_ptr, kernel_ptr, dphase_ptr, dphi_end_ptr, out_ptr, bias_ptr, ddt_ptr, drate_ptr, dphi_ptr,
            of_slice, block, group, chunk, row, rows, length, nheads, repeats, block_heads, value_stride_b,
            value_stride_t, raw_stride_b, raw_stride_t, k_stride_h, k_stride_t, OF_B, True, HAS_DPHASE, HAS_DPHI, P, N,
            S, Q, BLOCK_P, BLOCK_N, HALF, DOT, ACC, PRECISION, TERMS, STAGES, RANKS, WIDTH,
        )  # fmt: skip
    elif TURNING * BLOCK_N < N:
        _gradients_of_maps(
            value_ptr, decay_ptr, gamma_ptr, beta_ptr, rate_ptr, turns_ptr, key_ptr, own_ptr, raw_ptr, raw_bias_ptr,
            state_ptr, after_ptr, kernel_ptr, dphase_ptr, dphi_end_ptr, out_ptr, bias_ptr, ddt_ptr, drate_ptr, dphi_ptr,
            of_slice, block, group, chunk, row, rows, length, nheads, repeats, block_heads, value_stride_b,
            value_stride_t, raw_stride_b, raw_stride_t, k_stride_h, k_stride_t, OF_B, False, HAS_DPHASE, HAS_DPHI, P, N,
            S, Q, BLOCK_P, BLOCK_N, HALF, DOT, ACC, PRECISION, TERMS, STAGES, RANKS, WIDTH,
        )  # fmt: skip


@quick
@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats", "blocks", "block_heads"])
def _trapezoid_maps_kernel(
    x_ptr, dy_ptr, gamma_ptr, beta_ptr, rate_ptr, turns_ptr, in_ptr, left_ptr, k_ptr, q_ptr, B_ptr, C_ptr, B_bias_ptr,
    C_bias_ptr, entering_ptr, leaving_ptr, kernel_ptr, dphase_ptr, dphi_end_ptr, dB_ptr, dC_ptr, dB_bias_ptr,
    dC_bias_ptr, ddt_ptr, drate_ptr, dphi_ptr, rows, length, nheads, repeats, blocks, block_heads, x_stride_b,
    x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t, k_stride_h, k_stride_t, HAS_DPHASE: tl.constexpr,
    HAS_DPHI: tl.constexpr, P: tl.constexpr, N: tl.constexpr, S: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, HALF: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    TERMS: tl.constexpr, STAGES: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dC in even programs, dB in odd ones, those of biases for each chunk and head, and of the angles both halves.

    Those of B, C and the rates are sums over the heads of a block; those of dt are (2, slices, b, l, h), those of the
    first angles (2, b, h, s). Rates and dt are without pi. Neighbours read the same matrices over a chunk.
    """
    slices: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    turning: tl.constexpr = (2 * S + BLOCK_N - 1) // BLOCK_N
    of_slice = tl.program_id(0) // 2 % slices
    block = tl.program_id(0) // (2 * slices) % blocks
    groups = nheads // repeats
    group = tl.program_id(0) // (2 * slices) // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // (2 * slices) // blocks // groups % chunks
    row = (tl.program_id(0) // (2 * slices) // blocks // groups // chunks).to(tl.int64)
    if tl.program_id(0) % 2 == 1:
        _gradients_of_slice(
            x_ptr, left_ptr, gamma_ptr, beta_ptr, rate_ptr, turns_ptr, q_ptr, k_ptr, C_ptr, C_bias_ptr, leaving_ptr,
            entering_ptr, kernel_ptr, dphase_ptr, dphi_end_ptr, dB_ptr, dB_bias_ptr, ddt_ptr, drate_ptr, dphi_ptr,
            of_slice, block, group, chunk, row, rows, length, nheads, repeats, block_heads, x_stride_b, x_stride_t,
            C_stride_b, C_stride_t, k_stride_h, k_stride_t, True, turning, HAS_DPHASE, HAS_DPHI, P, N, S, Q, BLOCK_P,
            BLOCK_N, HALF, DOT, ACC, PRECISION, TERMS, STAGES, RANKS, WIDTH,
        )  # fmt: skip
    else:
        positions = rows.to(tl.int64) * (length // RANKS)
        _gradients_of_slice(
            dy_ptr, in_ptr, gamma_ptr, beta_ptr, rate_ptr, turns_ptr, k_ptr, q_ptr, B_ptr, B_bias_ptr, entering_ptr,
            entering_ptr, kernel_ptr, dphase_ptr, dphi_end_ptr, dC_ptr, dC_bias_ptr,
            ddt_ptr + positions * nheads * turning, drate_ptr + positions * S * blocks * groups,
            dphi_ptr + rows * nheads * S, of_slice, block, group, chunk, row, rows, length, nheads, repeats,
            block_heads, length.to(tl.int64) * nheads * P, nheads * P, B_stride_b, B_stride_t, k_stride_h, k_stride_t,
            False, turning, HAS_DPHASE, HAS_DPHI, P, N, S, Q, BLOCK_P, BLOCK_N, HALF, DOT, ACC, PRECISION, TERMS,
            STAGES, RANKS, WIDTH,
        )  # fmt: skip


@triton.jit
def _total(parts_ptr, out_ptr, block, count, parts, FACTOR: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """A block of the sum of `parts` tensors of so many numbers, times a factor."""
    of = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    ok = of < count
    total = tl.zeros([BLOCK], ACC)
    for begin in range(0, parts, 4):
        some = begin + tl.arange(0, 4)
        place = some[:, None].to(tl.int64) * count + of[None, :]
        total += tl.sum(tl.load(parts_ptr + place, mask=(some < parts)[:, None] & ok[None, :], other=0.0).to(ACC), 0)
    tl.store(out_ptr + of, total * FACTOR, mask=ok)


@quick
@triton.jit(do_not_specialize=["count", "rates", "parts", "rate_parts", "blocks"])
def _trapezoid_totals_kernel(
    dB_parts_ptr, dC_parts_ptr, drate_parts_ptr, dB_ptr, dC_ptr, drate_ptr, count, rates, parts, rate_parts, blocks,
    BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Sums over blocks of heads, of dB and dC by `blocks` programs each, of rates, times pi, by the others."""
    program = tl.program_id(0)
    if program < blocks:
        _total(dB_parts_ptr, dB_ptr, program, count, parts, 1.0, BLOCK, ACC)
    elif program < 2 * blocks:
        _total(dC_parts_ptr, dC_ptr, program - blocks, count, parts, 1.0, BLOCK, ACC)
    else:
        _total(drate_parts_ptr, drate_ptr, program - 2 * blocks, rates, rate_parts, 3.141592653589793, BLOCK, ACC)
