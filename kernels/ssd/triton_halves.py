"""The kernel of the outputs of `ssd` for float32 and large states. Notation as in `triton_kernels.py`."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick
from .triton_kernels import (
    _dot_add,
    _dot_nt,
    _halves,
    _last,
    _less,
    _log2_sums,
    _tile,
    _vector,
    _whole,
    keep_addresses_in_loops,
)


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "parts", "part_length"])
def _ssd_fwd_halves_kernel(
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
    """`_ssd_fwd_kernel` for whole tiles, with the state in halves, [p, n / 2] each, which are read in registers."""
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    group = head // repeats
    place = (row * nheads + head) * parts + part
    HALF: tl.constexpr = N // 2
    state = tl.zeros([P, HALF], ACC)
    state_2 = tl.zeros([P, HALF], ACC)
    rows, columns = tl.arange(0, P)[:, None], tl.arange(0, HALF)[None, :]
    if HAS_STATE:
        entering = state_ptr + place * (P * N) + (rows * N + columns)
        state, state_2 = tl.load(entering).to(ACC), tl.load(entering + HALF).to(ACC)
    x_row = x_ptr + row * x_stride_b + head * P
    B_row = B_ptr + row * B_stride_b + group * N
    C_row = C_ptr + row * C_stride_b + group * N
    y_row = y_ptr + row * length * nheads * P + head * P
    vectors = row * length * nheads + head
    steps = tl.arange(0, Q)
    p_columns = tl.arange(0, P)
    begin_part = part.to(tl.int64) * part_length
    end_part = tl.minimum(begin_part + part_length, length)
    for begin in tl.range(begin_part, end_part, Q, num_stages=STAGES, disable_licm=True):
        ok = steps < tl.minimum(length - begin, Q).to(tl.int32)  # 64-bit numbers take two registers and instructions
        log_decay = _vector(log_decay_ptr + vectors, begin, steps, ok, nheads, ACC)
        high, low, _, _ = _log2_sums(log_decay, ACC, EXACT)
        high_last, low_last = _last(high, Q), _last(low, Q)
        decay_in = tl.exp2(_whole(high, low, EXACT))
        decay_out = tl.exp2(_less(high_last, low_last, high, low, EXACT))
        factor = tl.exp2(_whole(high_last, low_last, EXACT))
        # The steps again, but not as constants: a mask that is kept over the loop would fill the registers.
        own = steps + tl.minimum(begin, 0).to(tl.int32)
        linked = own[:, None] <= own[None, :]
        if PACKED:
            seq_row = seq_ptr + row * length
            index = tl.load(seq_row + begin + steps, mask=ok, other=-1)
            before = tl.load(seq_row + tl.maximum(begin - 1, 0))
            last = tl.load(seq_row + tl.minimum(begin + Q, length) - 1)
            linked = linked & (index[:, None] == index[None, :])
            decay_in = tl.where(index == before, decay_in, 0.0)
            decay_out = tl.where(index == last, decay_out, 0.0)
            factor = tl.where(before == last, factor, 0.0)
        between = _less(high[None, :], low[None, :], high[:, None], low[:, None], EXACT)
        decays = tl.exp2(tl.where(linked, between, float("-inf")))  # [s, t]
        if HAS_WEIGHT:
            weight = _vector(weight_ptr + vectors, begin, steps, ok, nheads, ACC)
            decays = decays * weight[:, None]
            decay_out = decay_out * weight
        x = _tile(x_row, begin, steps, ok, x_stride_t, P, P, DOT)
        B = _tile(B_row, begin, steps, ok, B_stride_t, HALF, HALF, DOT)
        C = _tile(C_row, begin, steps, ok, C_stride_t, HALF, HALF, DOT)
        B_2 = _tile(B_row + HALF, begin, steps, ok, B_stride_t, HALF, HALF, DOT)
        C_2 = _tile(C_row + HALF, begin, steps, ok, C_stride_t, HALF, HALF, DOT)
        B, B_low = _halves(B, PRECISION)
        C, C_low = _halves(C, PRECISION)
        B_2, B_2_low = _halves(B_2, PRECISION)
        C_2, C_2_low = _halves(C_2, PRECISION)
        scores = _dot_nt(B, B_low, C, C_low, ACC, PRECISION)
        scores = _dot_add(B_2, B_2_low, tl.trans(C_2), tl.trans(C_2_low), scores, ACC, PRECISION) * decays
        entered, entered_low = _halves(state.to(DOT), PRECISION)
        y = _dot_nt(entered, entered_low, C, C_low, ACC, PRECISION)
        entered_2, entered_2_low = _halves(state_2.to(DOT), PRECISION)
        y = _dot_add(entered_2, entered_2_low, tl.trans(C_2), tl.trans(C_2_low), y, ACC, PRECISION) * decay_in[None, :]
        mixing, mixing_low = _halves(scores.to(DOT), PRECISION)
        v, v_low = _halves(x, PRECISION)
        y = tl.trans(_dot_add(tl.trans(v), tl.trans(v_low), mixing, mixing_low, y, ACC, PRECISION))
        wide = x.to(ACC)
        if HAS_D:
            D = _vector(D_ptr + row * D_stride_b + head, begin, steps, ok, D_stride_t, ACC)
            y += D[:, None] * wide
        y_offset = steps[:, None] * (nheads * P) + p_columns[None, :]
        y_tile = y_row + begin * (nheads * P)
        tl.store(y_tile + y_offset, y, mask=ok[:, None])
        late, late_low = _halves((wide * decay_out[:, None]).to(DOT), PRECISION)
        state = _dot_add(tl.trans(late), tl.trans(late_low), B, B_low, state * factor, ACC, PRECISION)
        state_2 = _dot_add(tl.trans(late), tl.trans(late_low), B_2, B_2_low, state_2 * factor, ACC, PRECISION)
    if part == parts - 1:
        out = final_ptr + (row * nheads + head) * (P * N) + (rows * N + columns)
        tl.store(out, state)
        tl.store(out + HALF, state_2)
