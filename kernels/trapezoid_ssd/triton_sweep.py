"""The kernel that finds the states around all chunks for gradients of `trapezoid_ssd`, where rows need not be cut.

Columns of a state do not depend on each other: a program carries some of them, few enough that several programs fit on
a multiprocessor. Notation as in `triton_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..ssd.triton_kernels import _dot_add, _halves, _tile, keep_addresses_in_loops
from ..triton_utils import quick
from .triton_kernels import _bias, _get, _put


@triton.jit
def _columns(
    value_ptr, key_ptr, raw_ptr, bias_ptr, scale_ptr, factor_ptr, state_ptr, borders_ptr, final_ptr, row, head, start,
    length, nheads, repeats, value_stride_b, value_stride_t, raw_stride_b, raw_stride_t, k_stride_h, k_stride_t,
    RAW: tl.constexpr, HALF: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr, DESCENDS: tl.constexpr,
    HAS_STATE: tl.constexpr, FINAL: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Columns of the states before all chunks, or with DESCENDS of the gradients of those after them.

    Keys are turned ones, or with RAW those that stand still.
    """
    chunks = tl.cdiv(length, Q)
    steps = tl.arange(0, Q)
    columns = start + tl.arange(0, BLOCK_N)
    p_rows = tl.arange(0, BLOCK_P)
    place = p_rows[:, None] * N + columns[None, :]
    place_ok = (p_rows < P)[:, None] & (columns < N)[None, :]
    heads = row * nheads + head
    state = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if HAS_STATE:
        state = _get(
            state_ptr + heads * (P * N), p_rows[:, None] * N, p_rows[:, None] < P, start, N, BLOCK_N, HALF, ACC
        )
    vectors = row * length * nheads + head
    borders = borders_ptr + heads * chunks * (P * N)
    value_row = value_ptr + row * value_stride_b + head * P
    for k in tl.range(0, chunks, num_stages=STAGES, disable_licm=True):
        chunk = tl.full([], 0, tl.int64) + (chunks - 1 - k if DESCENDS else k)
        tl.store(borders + chunk * (P * N) + place, state, mask=place_ok)
        begin = chunk * Q
        ok = steps < length - begin
        scale = tl.load(scale_ptr + vectors + (begin + steps) * nheads, mask=ok, other=0.0)
        # What the last step reads of the state before the chunk is what goes on.
        factor = tl.load(factor_ptr + vectors + (tl.minimum(begin + Q, length) - 1) * nheads)
        value = _tile(value_row, begin, steps, ok, value_stride_t, P, BLOCK_P, DOT)
        if RAW:
            raw_tile = raw_ptr + row * raw_stride_b + begin * raw_stride_t + head // repeats * N
            key = _get(raw_tile, steps[:, None] * raw_stride_t, ok[:, None], start, N, BLOCK_N, HALF, ACC)
            key = (key + _bias(bias_ptr, head, start, Q, N, BLOCK_N, HALF, ACC, RANKS)).to(DOT)
        else:
            of_keys = row * length * nheads * WIDTH + tl.cast(head, tl.int64) * k_stride_h + begin * k_stride_t
            key = _get(key_ptr + of_keys, steps[:, None] * k_stride_t, ok[:, None], start, WIDTH, BLOCK_N, False, DOT)
        scaled, scaled_low = _halves((value.to(ACC) * scale[:, None]).to(DOT), PRECISION)
        key, key_low = _halves(key, PRECISION)
        state = _dot_add(tl.trans(scaled), tl.trans(scaled_low), key, key_low, state * factor, ACC, PRECISION)
    if FINAL:
        _put(final_ptr + heads * (P * N), p_rows[:, None] * N, p_rows[:, None] < P, start, state, N, BLOCK_N, HALF)


@triton.jit
def _both(
    x_ptr, dy_ptr, k_ptr, q_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, left_ptr, in_ptr, state_ptr, dfinal_ptr,
    borders_ptr, dstate_ptr, row, head, start, second, rows, length, nheads, repeats, x_stride_b, x_stride_t,
    B_stride_b, B_stride_t, C_stride_b, C_stride_t, k_stride_h, k_stride_t, RAW: tl.constexpr, HAS_STATE: tl.constexpr,
    HAS_DFINAL: tl.constexpr, HALF: tl.constexpr, RANKS: tl.constexpr, WIDTH: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Both directions, in one slice of columns."""
    if second:
        of_second = rows.to(tl.int64) * nheads * tl.cdiv(length, Q) * (P * N)
        _columns(
            dy_ptr, q_ptr, C_ptr, C_bias_ptr, in_ptr, in_ptr, dfinal_ptr, borders_ptr + of_second, dstate_ptr, row,
            head, start, length, nheads, repeats, length.to(tl.int64) * nheads * P, nheads * P, C_stride_b, C_stride_t,
            k_stride_h, k_stride_t, RAW, HALF, RANKS, WIDTH, True, HAS_DFINAL, True, P, N, Q, BLOCK_P, BLOCK_N, DOT,
            ACC, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _columns(
            x_ptr, k_ptr, B_ptr, B_bias_ptr, left_ptr, in_ptr, state_ptr, borders_ptr, dstate_ptr, row, head, start,
            length, nheads, repeats, x_stride_b, x_stride_t, B_stride_b, B_stride_t, k_stride_h, k_stride_t, RAW, HALF,
            RANKS, WIDTH, False, HAS_STATE, False, P, N, Q, BLOCK_P, BLOCK_N, DOT, ACC, PRECISION, STAGES,
        )  # fmt: skip


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats"])
def _trapezoid_sweep_kernel(
    x_ptr, dy_ptr, k_ptr, q_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, left_ptr, in_ptr, state_ptr, dfinal_ptr,
    borders_ptr, dstate_ptr, rows, length, nheads, repeats, x_stride_b, x_stride_t, B_stride_b, B_stride_t, C_stride_b,
    C_stride_t, k_stride_h, k_stride_t, HAS_STATE: tl.constexpr, HAS_DFINAL: tl.constexpr, HALF: tl.constexpr,
    RANKS: tl.constexpr, WIDTH: tl.constexpr, P: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """States that enter all chunks, gradients of those that leave them, (2, b, h, chunks, p, n), and of the first one.

    Of turned keys and queries WIDTH columns are there; others stand still. HALF is for all else than them and the
    states between chunks, which have the entries of pairs side by side where it is set or WIDTH below N.
    """
    slices: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    of_slice = tl.program_id(0) % slices
    start = of_slice * BLOCK_N
    head = tl.program_id(0) // slices % nheads
    row = (tl.program_id(0) // slices // nheads % rows).to(tl.int64)
    second = tl.program_id(0) // slices // nheads // rows == 1
    if start < WIDTH:
        _both(
            x_ptr, dy_ptr, k_ptr, q_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, left_ptr, in_ptr, state_ptr, dfinal_ptr,
            borders_ptr, dstate_ptr, row, head, start, second, rows, length, nheads, repeats, x_stride_b, x_stride_t,
            B_stride_b, B_stride_t, C_stride_b, C_stride_t, k_stride_h, k_stride_t, False, HAS_STATE, HAS_DFINAL, HALF,
            RANKS, WIDTH, P, N, Q, BLOCK_P, BLOCK_N, DOT, ACC, PRECISION, STAGES,
        )  # fmt: skip
    elif WIDTH < N:
        _both(
            x_ptr, dy_ptr, k_ptr, q_ptr, B_ptr, C_ptr, B_bias_ptr, C_bias_ptr, left_ptr, in_ptr, state_ptr, dfinal_ptr,
            borders_ptr, dstate_ptr, row, head, start, second, rows, length, nheads, repeats, x_stride_b, x_stride_t,
            B_stride_b, B_stride_t, C_stride_b, C_stride_t, k_stride_h, k_stride_t, True, HAS_STATE, HAS_DFINAL, HALF,
            RANKS, WIDTH, P, N, Q, BLOCK_P, BLOCK_N, DOT, ACC, PRECISION, STAGES,
        )  # fmt: skip
