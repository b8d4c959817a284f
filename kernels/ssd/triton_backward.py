"""The Triton kernels of the gradient of `ssd`: what is per head, and the maps. Notation as in `triton_kernels.py`."""

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
    _load_state,
    _log2_sums,
    _position,
    _tile,
    _vector,
    _whole,
    keep_addresses_in_loops,
)


@triton.jit
def _chunk(
    seq_row,
    begin,
    length,
    MODE: tl.constexpr,
    PACKED: tl.constexpr,
    Q: tl.constexpr,
):
    """Where a chunk lies: position, steps in it, those of the gradients of its outputs, and its sequences.

    The last three are the index of each step, of the step before the chunk and of its last one (zeros unless PACKED).
    """
    steps = tl.arange(0, Q)
    ahead = -steps if MODE & 4 else steps
    position = _position(begin, length, MODE & 4)
    ok = steps < length - begin
    dy_position = position
    dy_ok = ok
    if MODE & 8:
        dy_position = position - 1 if MODE & 4 else position + 1
        dy_ok = steps + 1 < length - begin
    index = steps * 0
    before = 0
    last = 0
    if PACKED:
        index = tl.load(seq_row + position + ahead, mask=ok, other=-1)
        before = tl.load(seq_row + _position(tl.maximum(tl.minimum(begin, length) - 1, 0), length, MODE & 4))
        last = tl.load(seq_row + _position(tl.minimum(begin + Q, length) - 1, length, MODE & 4))
        if MODE & 8:
            dy_ok = dy_ok & (tl.load(seq_row + dy_position + ahead, mask=dy_ok, other=-1) == index)
    return position, ahead, ok, dy_position, dy_ok, index, before, last


@quick
@keep_addresses_in_loops
@triton.jit(do_not_specialize=["length", "nheads", "repeats", "blocks", "block_heads"])
def _ssd_bwd_links_kernel(
    x_ptr,
    log_decay_ptr,
    B_ptr,
    C_ptr,
    weight_ptr,
    D_ptr,
    seq_ptr,
    leaving_ptr,
    dy_ptr,
    dx_ptr,
    dlog_decay_ptr,
    dweight_ptr,
    dD_ptr,
    kernel_ptr,
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
    HAS_WEIGHT: tl.constexpr,
    HAS_D: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of a chunk but for dB and dC, for one head after another of a block of a group's heads.

    Matrices over a chunk are [s, t]: from the step that writes to the one that reads. What their entries L pass through
    step i is the sum over s < i <= t, which is that of the rows before i less that of the columns before i, of the same
    numbers. Leaves K^T, the sum over the heads of (v dy^T) E^T, for the next kernel, which adds what is read of the
    state that enters to dlog_decay.
    """
    block = tl.program_id(0) % blocks
    groups = nheads // repeats
    group = tl.program_id(0) // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = tl.program_id(0) // blocks // groups % chunks
    row = (tl.program_id(0) // blocks // groups // chunks).to(tl.int64)
    first_head = group * repeats + block * block_heads
    last_head = tl.minimum(first_head + block_heads, (group + 1) * repeats)
    steps = tl.arange(0, Q)
    begin = chunk.to(tl.int64) * Q
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * length
    position, ahead, ok, dy_position, dy_ok, index, _before, last = _chunk(seq_row, begin, length, MODE, PACKED, Q)
    B = _tile(B_ptr + row * B_stride_b + group * N, position, ahead, ok, B_stride_t, N, BLOCK_N, DOT)
    C = _tile(C_ptr + row * C_stride_b + group * N, position, ahead, ok, C_stride_t, N, BLOCK_N, DOT)
    B, B_low = _halves(B, PRECISION)
    C, C_low = _halves(C, PRECISION)
    kernel = tl.zeros([Q, Q], ACC)  # sum over heads of (v dy^T) E^T
    p_columns = tl.arange(0, BLOCK_P)
    width = nheads * P
    offset = ahead[:, None] * width + p_columns[None, :]
    offset_ok = ok[:, None]
    if P < BLOCK_P:
        offset_ok = offset_ok & (p_columns < P)[None, :]
    for head in tl.range(first_head, last_head, num_stages=STAGES, disable_licm=True):
        # The steps again, but not as constants: masks that are kept over the loop would fill the registers.
        own = steps + tl.minimum(head, 0)
        vectors = row * length * nheads + head
        out = vectors + position * nheads
        border = ((row * nheads + head) * chunks + chunk) * (P * N)
        high, low, _, _ = _log2_sums(_vector(log_decay_ptr + vectors, position, ahead, ok, nheads, ACC), ACC, EXACT)
        high_last, low_last = _last(high, Q), _last(low, Q)
        decay_out = tl.exp2(_less(high_last, low_last, high, low, EXACT))
        linked = own[:, None] <= own[None, :]
        if PACKED:
            decay_out = tl.where(index == last, decay_out, 0.0)
            of = index + (own - steps)
            linked = linked & (of[:, None] == of[None, :])
        x = _tile(x_ptr + row * x_stride_b + head * P, position, ahead, ok, x_stride_t, P, BLOCK_P, DOT)
        gradient = _tile(dy_ptr + vectors * P, dy_position, ahead, dy_ok, width, P, BLOCK_P, DOT)
        v, v_low = _halves(x, PRECISION)
        dy, dy_low = _halves(gradient, PRECISION)

        between = _less(high[None, :], low[None, :], high[:, None], low[:, None], EXACT)
        decays = tl.exp2(tl.where(linked, between, float("-inf")))  # [s, t]
        products = _dot_nt(v, v_low, dy, dy_low, ACC, PRECISION)
        if HAS_D and not MODE & 8:
            if EXACT:
                own_products = tl.sum(gradient.to(ACC) * x.to(ACC), 1)
            else:
                own_products = tl.sum(tl.where(own[:, None] == own[None, :], products, 0.0), 1)
            tl.store(dD_ptr + out + ahead * nheads, own_products, mask=ok)
        scores = _dot_nt(B, B_low, C, C_low, ACC, PRECISION)
        if EXACT:
            # In another order, which keeps fewer matrices: operands in parts fill the registers.
            link = products * decays
            linking = link * scores
            scores = scores * decays
        else:
            scores = scores * decays
            linking = products * scores
        dweight = tl.sum(linking, 1)
        if HAS_WEIGHT:
            weight = _vector(weight_ptr + vectors, position, ahead, ok, nheads, ACC)
            linking = linking * weight[:, None]
            if EXACT:
                link = link * weight[:, None]
            else:
                decays = decays * weight[:, None]
            scores = scores * weight[:, None]
        if not EXACT:
            link = products * decays
        kernel += link
        columns = tl.sum(linking, 0)
        mixing, mixing_low = _halves(scores.to(DOT), PRECISION)

        leaving = _load_state(leaving_ptr + border, P, N, BLOCK_P, BLOCK_N).to(DOT)
        leaving, leaving_low = _halves(leaving, PRECISION)
        dx = _dot_nt(B, B_low, leaving, leaving_low, ACC, PRECISION)  # [s, p]
        dweight += tl.sum(dx * x.to(ACC), 1) * decay_out
        change = dweight
        if HAS_WEIGHT:
            tl.store(dweight_ptr + out + ahead * nheads, dweight, mask=ok)
            change = change * weight
            decay_out = decay_out * weight
        dx = dx * decay_out[:, None]
        if HAS_D:
            D = _vector(D_ptr + row * D_stride_b + head, position, ahead, ok, D_stride_t, ACC)
            if MODE & 8:
                # The skip reads the gradient of its own position, not of the next one.
                direct = tl.load(dy_ptr + vectors * P + position * width + offset, mask=offset_ok, other=0.0).to(ACC)
                tl.store(dD_ptr + out + ahead * nheads, tl.sum(direct * x.to(ACC), 1), mask=ok)
                dx += direct * D[:, None]
            else:
                dx += gradient.to(ACC) * D[:, None]
        dx = _dot_add(mixing, mixing_low, dy, dy_low, dx, ACC, PRECISION)
        change = change - columns
        tl.store(dlog_decay_ptr + out + ahead * nheads, tl.cumsum(change, 0) - change, mask=ok)
        dx_tile = dx_ptr + vectors * P + position * width + offset
        if ADD:
            dx += tl.load(dx_tile, mask=offset_ok, other=0.0).to(ACC)
        tl.store(dx_tile, dx, mask=offset_ok)
    place = tl.program_id(0).to(tl.int64)
    tl.store(kernel_ptr + place * (Q * Q) + (steps[:, None] * Q + steps[None, :]), kernel)


@triton.jit
def _map_gradients(
    value_ptr,
    log_decay_ptr,
    key_ptr,
    weight_ptr,
    seq_ptr,
    borders_ptr,
    leaving_ptr,
    own_ptr,
    kernel_ptr,
    out_ptr,
    dlog_decay_ptr,
    row,
    chunk,
    group,
    block,
    place,
    rows,
    groups,
    length,
    nheads,
    first_head,
    last_head,
    value_stride_b,
    value_stride_t,
    key_stride_b,
    key_stride_t,
    own_stride_b,
    own_stride_t,
    OF_B: tl.constexpr,
    MODE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dC = K B + sum_h e^u (dy S), or with OF_B dB = K^T C + sum_h e^{u_last - u} (v R); `key` is B, or C, `own` C.

    With the states at hand, dC's programs also add to dlog_decay what passes the whole chunk, e^{u_last} <S, R>, and
    what the steps from each one on read of S.
    """
    steps = tl.arange(0, Q)
    p = tl.arange(0, BLOCK_P)
    begin = chunk.to(tl.int64) * Q
    chunks = tl.cdiv(length, Q)
    seq_row = seq_ptr
    if PACKED:
        seq_row = seq_ptr + row * length
    position, ahead, ok, dy_position, dy_ok, index, before, last = _chunk(seq_row, begin, length, MODE, PACKED, Q)
    key_ptr += row * key_stride_b + group * N
    own_ptr += row * own_stride_b + group * N
    kernel_tile = kernel_ptr + place * (Q * Q)
    if OF_B:
        kernel = tl.load(kernel_tile + (steps[:, None] * Q + steps[None, :])).to(DOT)
    else:
        kernel = tl.load(kernel_tile + (steps[None, :] * Q + steps[:, None])).to(DOT)
    kernel, kernel_low = _halves(kernel, PRECISION)
    columns = tl.arange(0, COLUMNS)
    out_ptr += ((block * rows + row) * length + position) * (groups * N) + group * N
    for start in tl.range(0, N, COLUMNS):
        key = _tile(key_ptr + start, position, ahead, ok, key_stride_t, N, COLUMNS, DOT)
        key, key_low = _halves(key, PRECISION)
        own = key
        if not OF_B and not EXACT:
            own = _tile(own_ptr + start, position, ahead, ok, own_stride_t, N, COLUMNS, DOT)
        found = _dot_add(kernel, kernel_low, key, key_low, tl.zeros([Q, COLUMNS], ACC), ACC, PRECISION)
        for head in tl.range(first_head, last_head, num_stages=STAGES):
            vectors = row * length * nheads + head
            high, low, _, _ = _log2_sums(_vector(log_decay_ptr + vectors, position, ahead, ok, nheads, ACC), ACC, EXACT)
            if OF_B:
                decay = tl.exp2(_less(_last(high, Q), _last(low, Q), high, low, EXACT))
                if HAS_WEIGHT:
                    decay = decay * _vector(weight_ptr + vectors, position, ahead, ok, nheads, ACC)
                if PACKED:
                    decay = tl.where(index == last, decay, 0.0)
                value = _tile(
                    value_ptr + row * value_stride_b + head * P, position, ahead, ok, value_stride_t, P, BLOCK_P, DOT
                )
            else:
                decay = tl.exp2(_whole(high, low, EXACT))
                if PACKED:
                    decay = tl.where(index == before, decay, 0.0)
                value = _tile(value_ptr + vectors * P, dy_position, ahead, dy_ok, nheads * P, P, BLOCK_P, DOT)
            border = ((row * nheads + head) * chunks + chunk) * (P * N) + start
            whole = _load_state(borders_ptr + border, P, N, BLOCK_P, COLUMNS).to(DOT)
            scaled, scaled_low = _halves((value.to(ACC) * decay[:, None]).to(DOT), PRECISION)
            state, state_low = _halves(whole, PRECISION)
            if EXACT and not OF_B:
                read = _dot_add(scaled, scaled_low, state, state_low, tl.zeros([Q, COLUMNS], ACC), ACC, PRECISION)
                found += read
                # Once more for each head, since it would fill the registers.
                again = ahead + tl.minimum(head, 0)
                once = _tile(own_ptr + start, position, again, ok, own_stride_t, N, COLUMNS, DOT)
                reads = tl.sum(read * once.to(ACC), 1)
            else:
                found = _dot_add(scaled, scaled_low, state, state_low, found, ACC, PRECISION)
            if not OF_B:
                if not EXACT:
                    reads = tl.sum(_dot_nt(own, own, state, state_low, ACC, PRECISION) * value.to(ACC), 1) * decay
                factor = tl.exp2(_whole(_last(high, Q), _last(low, Q), EXACT))
                if PACKED:
                    factor = tl.where(before == last, factor, 0.0)
                leaving = _load_state(leaving_ptr + border, P, N, BLOCK_P, COLUMNS).to(DOT)
                if not EXACT and BLOCK_P >= 64 and COLUMNS >= 64:
                    # The trace of this one is their product; tensor cores have the time.
                    both = _dot_nt(state, state_low, leaving, leaving, ACC, PRECISION)
                    passed = tl.sum(tl.sum(tl.where(p[:, None] == p[None, :], both, 0.0), 1) * factor, 0)
                else:
                    passed = tl.sum(whole.to(ACC) * leaving.to(ACC)) * factor
                change = dlog_decay_ptr + vectors + position * nheads + ahead * nheads
                following = tl.sum(reads, 0) - (tl.cumsum(reads, 0) - reads)
                tl.store(change, tl.load(change, mask=ok, other=0.0) + passed + following, mask=ok)
        offset = ahead[:, None] * (groups * N) + columns[None, :]
        tl.store(out_ptr + start + offset, found, mask=ok[:, None] & (columns < N)[None, :])


@quick
@triton.jit(do_not_specialize=["rows", "length", "nheads", "repeats", "blocks", "block_heads"])
def _ssd_bwd_maps_kernel(
    x_ptr,
    log_decay_ptr,
    B_ptr,
    C_ptr,
    weight_ptr,
    seq_ptr,
    entering_ptr,
    leaving_ptr,
    dy_ptr,
    kernel_ptr,
    dB_ptr,
    dC_ptr,
    dlog_decay_ptr,
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
    MODE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    COLUMNS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    Q: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PACKED: tl.constexpr,
    EXACT: tl.constexpr,
    DOT: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dC and dB by turns, which share states in the cache, each summed over the heads of a block in registers."""
    of_B = tl.program_id(0) % 2 == 1
    program = tl.program_id(0) // 2
    block = program % blocks
    groups = nheads // repeats
    group = program // blocks % groups
    chunks = tl.cdiv(length, Q)
    chunk = program // blocks // groups % chunks
    row = (program // blocks // groups // chunks).to(tl.int64)
    first = group * repeats + block * block_heads
    last = tl.minimum(first + block_heads, (group + 1) * repeats)
    place = program.to(tl.int64)
    if of_B:
        _map_gradients(
            x_ptr, log_decay_ptr, C_ptr, weight_ptr, seq_ptr, leaving_ptr, leaving_ptr, C_ptr, kernel_ptr, dB_ptr,
            dlog_decay_ptr, row, chunk, group, block, place, rows, groups, length, nheads, first, last, x_stride_b,
            x_stride_t, C_stride_b, C_stride_t, C_stride_b, C_stride_t, True, MODE, HAS_WEIGHT, BLOCK_N, P, N, Q,
            BLOCK_P, BLOCK_N, PACKED, EXACT, DOT, ACC, PRECISION, STAGES,
        )  # fmt: skip
    else:
        _map_gradients(
            dy_ptr, log_decay_ptr, B_ptr, weight_ptr, seq_ptr, entering_ptr, leaving_ptr, C_ptr, kernel_ptr, dC_ptr,
            dlog_decay_ptr, row, chunk, group, block, place, rows, groups, length, nheads, first, last, x_stride_b,
            x_stride_t, B_stride_b, B_stride_t, C_stride_b, C_stride_t, False, MODE, HAS_WEIGHT, COLUMNS, P, N, Q,
            BLOCK_P, BLOCK_N, PACKED, EXACT, DOT, ACC, PRECISION, STAGES,
        )  # fmt: skip
