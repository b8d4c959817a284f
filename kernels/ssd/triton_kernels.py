"""The Triton kernels of `ssd`, shared with `quasiseparable`: outputs and sweeps over states.

Those of the gradient are in `triton_backward.py`.

Notation as in `chunked.py`: u is the sum of log-decays from the start of a chunk, S the state that enters a chunk, R
the gradient of the state that leaves it. Kernels count steps: step s is position s, or l - 1 - s with REVERSE, so that
a recurrence from the right is the same code. Tiles are [chunk of Q steps, p] or [Q, n], states [p, n]. Every dot takes
operands as they were loaded, or rounded results that keep their orientation: a transposed result of a dot is never
the operand of another one, which some versions of Triton compile wrongly.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import triton
import triton.language as tl

from ..triton_utils import quick

# Whether kernels may hold instructions of NVIDIA.
_PAIRS: tl.constexpr = tl.constexpr(torch.version.hip is None)

_KNOWS_DISABLE_LICM = "disable_licm" in inspect.signature(tl.range.__init__).parameters


def keep_addresses_in_loops(function: Any) -> Any:
    """For kernels whose loops say `disable_licm=True`: addresses kept over the loop would fill the registers.

    Triton 3.4 does not know the option; it compiles the kernel without.
    """
    if not _KNOWS_DISABLE_LICM and hasattr(function, "_unsafe_update_src"):
        function._unsafe_update_src(function.src.replace(", disable_licm=True", ""))
    return function


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
    return tl.load(ptr + position * stride + ahead * stride, mask=ok, other=0.0).to(ACC)


@triton.jit
def _tile(ptr, position, ahead, ok, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):
    """[Q, BLOCK] rows of a tensor with contiguous last dimension, zero beyond the row and the width."""
    columns = tl.arange(0, BLOCK)
    mask = ok[:, None]
    if WIDTH < BLOCK:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(ptr + position * stride + (ahead[:, None] * stride + columns[None, :]), mask=mask, other=0.0).to(DOT)


@triton.jit
def _load_state(ptr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    """A state, [BLOCK_P, BLOCK_N]. Without a mask where nothing is padded: masks of whole tiles cost registers."""
    rows, columns = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
    if P == BLOCK_P and N == BLOCK_N:
        state = tl.load(ptr + (rows * N + columns))
    else:
        state = tl.load(ptr + (rows * N + columns), mask=(rows < P) & (columns < N), other=0.0)
    return state


@triton.jit
def _store_state(ptr, state, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    rows, columns = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
    if P == BLOCK_P and N == BLOCK_N:
        tl.store(ptr + (rows * N + columns), state)
    else:
        tl.store(ptr + (rows * N + columns), state, mask=(rows < P) & (columns < N))


@triton.jit
def _halves(x, PRECISION: tl.constexpr):
    """A dot's operand in two parts: with "bf16x3" float32 as a sum of bfloat16, up to 2^-17; else twice itself.

    With "bf16x6" the second part is still float32, all that the first one lacks.
    """
    if PRECISION == "bf16x3" and _PAIRS:
        # Two numbers at a time: the instruction that converts one alone is slow.
        first, second = tl.inline_asm_elementwise(
            """{
            .reg .b32 high, one, two;
            cvt.rn.bf16x2.f32 high, $3, $2;
            shl.b32 one, high, 16;
            and.b32 two, high, 0xffff0000;
            sub.f32 one, $2, one;
            sub.f32 two, $3, two;
            cvt.rn.bf16x2.f32 $1, two, one;
            mov.b32 $0, high;
            }""",
            "=r,=r,r,r",
            [x],
            dtype=(tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    elif PRECISION == "bf16x3" or PRECISION == "bf16x6":
        # Rounded as an integer: the instruction that converts one number at a time is slow.
        high = ((x.to(tl.int32, bitcast=True) + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
        first, second = high.to(tl.bfloat16), x - high
        if PRECISION == "bf16x3":
            second = second.to(tl.bfloat16)
    else:
        first, second = x, x
    return first, second


@triton.jit
def _dot_add(a, a_low, b, b_low, total, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """total + a b of operands in two parts."""
    if PRECISION == "bf16x6":
        a_mid, a_end = _halves(a_low, "bf16x3")
        b_mid, b_end = _halves(b_low, "bf16x3")
        total = _dot_parts(a, a_mid, a_end, b, b_mid, b_end, total, ACC)
    elif PRECISION == "bf16x3":
        total = tl.dot(a_low, b, total, out_dtype=ACC)
        total = tl.dot(a, b_low, total, out_dtype=ACC)
        total = tl.dot(a, b, total, out_dtype=ACC)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION, out_dtype=ACC)
    return total


@triton.jit
def _dot_parts(a, a_mid, a_end, b, b_mid, b_end, total, ACC: tl.constexpr):
    """total + a b of operands in three parts, up to 2^-24."""
    total = tl.dot(a_end, b, total, out_dtype=ACC)
    total = tl.dot(a, b_end, total, out_dtype=ACC)
    total = tl.dot(a_mid, b_mid, total, out_dtype=ACC)
    total = tl.dot(a_mid, b, total, out_dtype=ACC)
    total = tl.dot(a, b_mid, total, out_dtype=ACC)
    return tl.dot(a, b, total, out_dtype=ACC)


@triton.jit
def _dot_nt(a, a_low, b, b_low, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T of operands in two parts."""
    total = tl.zeros([a.shape[0], b.shape[0]], ACC)
    if PRECISION == "bf16x6":
        # In parts before they are transposed, so that a dot with b itself can share them.
        a_mid, a_end = _halves(a_low, "bf16x3")
        b_mid, b_end = _halves(b_low, "bf16x3")
        total = _dot_parts(a, a_mid, a_end, tl.trans(b), tl.trans(b_mid), tl.trans(b_end), total, ACC)
    else:
        total = _dot_add(a, a_low, tl.trans(b), tl.trans(b_low), total, ACC, PRECISION)
    return total


@triton.jit
def _position(begin, length, BACKWARDS: tl.constexpr):
    return length - 1 - begin if BACKWARDS else begin


@quick
@keep_addresses_in_loops
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
    state = tl.zeros([BLOCK_N, BLOCK_P], ACC)
    if HAS_STATE:
        state = tl.trans(_load_state(state_ptr + place * (P * N), P, N, BLOCK_P, BLOCK_N).to(ACC))
    x_row = x_ptr + row * x_stride_b + head * P
    B_row = B_ptr + row * B_stride_b + group * N
    C_row = C_ptr + row * C_stride_b + group * N
    y_row = y_ptr + row * length * nheads * P + head * P
    vectors = row * length * nheads + head
    steps = tl.arange(0, Q)
    p_columns = tl.arange(0, BLOCK_P)
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
        linked = own[:, None] >= own[None, :]
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
        B, B_low = _halves(B, PRECISION)
        C, C_low = _halves(C, PRECISION)
        scores = _dot_nt(C, C_low, B, B_low, ACC, PRECISION) * decays
        entered, entered_low = _halves(state.to(DOT), PRECISION)
        y = _dot_add(C, C_low, entered, entered_low, tl.zeros([Q, BLOCK_P], ACC), ACC, PRECISION) * decay_in[:, None]
        mixing, mixing_low = _halves(scores.to(DOT), PRECISION)
        v, v_low = _halves(x, PRECISION)
        y = _dot_add(mixing, mixing_low, v, v_low, y, ACC, PRECISION)
        wide = x.to(ACC)
        if HAS_D:
            D = _vector(D_ptr + row * D_stride_b + head, begin, steps, ok, D_stride_t, ACC)
            y += D[:, None] * wide
        y_offset = steps[:, None] * (nheads * P) + p_columns[None, :]
        y_tile = y_row + begin * (nheads * P)
        y_ok = ok[:, None]
        if P < BLOCK_P:
            y_ok = y_ok & (p_columns < P)[None, :]
        tl.store(y_tile + y_offset, y, mask=y_ok)
        late, late_low = _halves((wide * decay_out[:, None]).to(DOT), PRECISION)
        state = _dot_add(tl.trans(B), tl.trans(B_low), late, late_low, state * factor, ACC, PRECISION)
    if part == parts - 1:
        _store_state(final_ptr + (row * nheads + head) * (P * N), tl.trans(state), P, N, BLOCK_P, BLOCK_N)


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
    SKIP: tl.constexpr,
    FINAL: tl.constexpr,
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
    state = tl.zeros([BLOCK_P, BLOCK_N], ACC)
    if HAS_STATE:
        state = _load_state(state_ptr + place * (P * N), P, N, BLOCK_P, BLOCK_N).to(ACC)
    value_row = value_ptr + row * value_stride_b + head * P
    key_row = key_ptr + row * key_stride_b + group * N
    vectors = row * length * nheads + head
    border_row = borders_ptr + (row * nheads + head) * borders * (P * N)
    rows, columns = tl.arange(0, BLOCK_P)[:, None], tl.arange(0, BLOCK_N)[None, :]
    steps = tl.arange(0, Q)
    ahead = -steps if MODE & 4 else steps
    first_border = part.to(tl.int64) * part_borders
    count = tl.minimum(first_border + part_borders, borders) - first_border
    through = tl.full([], 1.0, ACC)
    for k in tl.range(0, count, num_stages=STAGES):
        border = first_border + count - 1 - k if MODE & 1 else first_border + k
        if STORE:
            stored = border_row + border * (P * N)
            if SKIP and not HAS_STATE:
                begins = (k == 0) & (part == (parts - 1 if MODE & 1 else 0))
                tl.store(stored + (rows * N + columns), state, mask=(rows < P) & (columns < N) & ~begins)
            else:
                _store_state(stored, state, P, N, BLOCK_P, BLOCK_N)
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
            scaled, scaled_low = _halves((value.to(ACC) * scale[:, None]).to(DOT), PRECISION)
            key, key_low = _halves(key, PRECISION)
            state = _dot_add(tl.trans(scaled), tl.trans(scaled_low), key, key_low, state * factor, ACC, PRECISION)
            through = through * factor
    if STORE:
        if FINAL and part == (0 if MODE & 1 else parts - 1):
            _store_state(final_ptr + (row * nheads + head) * (P * N), state, P, N, BLOCK_P, BLOCK_N)
    else:
        _store_state(ends_ptr + place * (P * N), state, P, N, BLOCK_P, BLOCK_N)
        tl.store(factors_ptr + place, through)


@quick
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
    SKIP: tl.constexpr,
    FINALS: tl.constexpr,
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
    at least 0), takes the second half of the programs and of the results. The last FINALS sweeps write where they end.
    With SKIP the zeros that a row without a state begins with are not written.
    """
    head = tl.program_id(0) % nheads
    part = (tl.program_id(0) // nheads) % parts
    row = (tl.program_id(0) // nheads // parts).to(tl.int64)
    if row < rows:
        _sweep(
            value_ptr, key_ptr, log_decay_ptr, weight_ptr, seq_ptr, state_ptr, borders_ptr, ends_ptr, factors_ptr,
            final_ptr, row, head, part, length, nheads, repeats, parts, part_borders, value_stride_b, value_stride_t,
            key_stride_b, key_stride_t, MODE, HAS_WEIGHT, HAS_STATE, PACKED, STORE, SKIP,
            FINALS == 2 or (MODE_2 < 0 and FINALS == 1), P, N, Q, SUBS, BLOCK_P, BLOCK_N, EXACT, DOT, ACC, PRECISION,
            STAGES,
        )  # fmt: skip
    elif MODE_2 >= 0:
        states = rows.to(tl.int64) * nheads * (P * N)
        final_2_ptr = final_ptr + states if FINALS == 2 else final_ptr
        _sweep(
            value_2_ptr, key_2_ptr, log_decay_2_ptr, weight_2_ptr, seq_ptr, state_2_ptr,
            borders_ptr + states * tl.cdiv(length, Q * SUBS), ends_ptr + states * parts,
            factors_ptr + rows * nheads * parts, final_2_ptr, row - rows, head, part, length, nheads,
            repeats, parts, part_borders, value_2_stride_b, value_2_stride_t, key_2_stride_b, key_2_stride_t, MODE_2,
            HAS_WEIGHT_2, HAS_STATE_2, PACKED, STORE, SKIP, FINALS > 0, P, N, Q, SUBS, BLOCK_P, BLOCK_N, EXACT, DOT,
            ACC, PRECISION, STAGES,
        )  # fmt: skip


@quick
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
