"""The selective scan in Triton: time-serial, channel-parallel. The states live in registers and nothing is scanned.

    forward    h_t = a_t h_{t-1} + dt_t u_t B_t,    a_t = exp(dt_t A),    y_t = sum_n C_tn h_tn
    backward   G_t = C_t dy_t + a_{t+1} G_{t+1},    X_t = a_t G_t h_{t-1}
               dC = sum_d dy h,  dB = sum_d dt u G,  du = dt sum_n B G,  dA = sum_t dt X,  ddt = u sum_n B G + sum_n A X

A lane holds K neighbouring states of one channel, SUB lanes hold all n of them, and a program BLOCK_D channels: vectors
have BLOCK_D * SUB entries, channel after channel. The rows of TIME positions are fetched together, one stretch ahead of
their use, then used one after the other. For 16-bit inputs the decay is one exp2; for float32 it is held as a - 1, by a
polynomial where it is small, so that slow decays lose nothing over thousands of steps.

Every 64th state is kept for the backward pass, which walks these chunks from the last to the first: a sweep through the
chunk leaves the state before each stretch in a scratch buffer, then each stretch forms its states again, in registers,
and goes back over them. Where rows and channels give too few programs, the sequence is cut into parts: a first kernel
finds (decay, end state) of each part, the second folds those before its own, in order. Sums over programs go through
buffers that are added in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..transforms import FirstDerivative, apply, one_by_one, operator
from ..triton_utils import INTERPRETED, last_contiguous, multiprocessors, on_device
from .chunked import _segments

_SAVED = 64  # every 64th state is saved
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _place(length, part_length, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_D: tl.constexpr, SUB: tl.constexpr):
    """Row, group, first channel of the block, channel and first state of each lane, lane in use, [begin, end)."""
    WIDTH: tl.constexpr = CHANNELS // GROUPS
    blocks: tl.constexpr = (WIDTH + BLOCK_D - 1) // BLOCK_D
    row = (tl.program_id(0) // (blocks * GROUPS)).to(tl.int64)
    group = tl.program_id(0) // blocks % GROUPS
    block = tl.program_id(0) % blocks
    lane = tl.arange(0, BLOCK_D * SUB)
    inside = block * BLOCK_D + lane // SUB
    begin = tl.program_id(1).to(tl.int64) * part_length
    end = tl.minimum(begin + part_length, length)
    # Where blocks fill a group the comparison is with a constant, and the compiler drops the mask.
    bound: tl.constexpr = WIDTH if WIDTH % BLOCK_D else blocks * BLOCK_D + BLOCK_D
    return row, group, block, group * WIDTH + inside, lane % SUB, inside < bound, begin, end


@triton.jit
def _columns(x, K: tl.constexpr):
    """The K columns of x [lanes, K] as a tuple of vectors."""
    lanes: tl.constexpr = x.shape[0]
    if K == 1:
        return (tl.reshape(x, [lanes]),)
    elif K == 2:
        x0, x1 = tl.split(x)
        return (x0, x1)
    else:
        even, odd = tl.split(tl.reshape(x, [lanes, 2, 2]))
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return (x0, x1, x2, x3)


@triton.jit
def _states_of(ptr, sub, ok, N: tl.constexpr, K: tl.constexpr):
    """K neighbouring numbers for each lane, from vectors of pointers to rows of N; 0 beyond N."""
    n = sub[:, None] * K + tl.arange(0, K)[None, :]
    if N % K == 0 and N & (N - 1) == 0:
        return tl.load(ptr + n, mask=ok, other=0.0)
    else:
        return tl.load(ptr + n, mask=ok & (n < N), other=0.0)


@triton.jit
def _over_states(x, SUB: tl.constexpr):
    """Sum over the lanes of a channel, known to all of them."""
    if SUB == 1:
        return x
    else:
        pairs = tl.reshape(x, [x.shape[0] // SUB, SUB])
        total = tl.sum(pairs, axis=1)
        return tl.reshape(tl.broadcast_to(total[:, None], pairs.shape), [x.shape[0]])


@triton.jit
def _gate(dt, A, PRECISE: tl.constexpr):
    """exp(dt A) with A in units of ln 2; PRECISE: exp(dt A) - 1 with A itself."""
    x = dt * A
    if PRECISE:
        if x.dtype == tl.float64:
            small = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
            return tl.where(tl.abs(x) < 1e-3, small, tl.exp(x) - 1.0)
        else:
            small = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
            return tl.where(tl.abs(x) < 0.25, small, tl.exp2(x * _LOG2_E) - 1.0)
    else:
        return tl.exp2(x)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * _LOG2_E))


@triton.jit
def _times_gate(gate, x, add, PRECISE: tl.constexpr):
    """exp(dt A) x + add."""
    if PRECISE:
        return x + (gate * x + add)
    else:
        return gate * x + add


@triton.jit
def _rates(A_ptr, channel, sub, ok, N: tl.constexpr, K: tl.constexpr, PRECISE: tl.constexpr):
    A = _states_of(A_ptr + channel[:, None] * N, sub, ok[:, None], N, K)
    return _columns(A if PRECISE else A * _LOG2_E, K)


@triton.jit
def _load_states(ptr, sub, ok, N: tl.constexpr, K: tl.constexpr):
    """K vectors of states; `ptr` is a vector of pointers to the n states of each lane's channel."""
    found = ()
    for k in tl.static_range(K):
        n = sub * K + k
        found = found + (tl.load(ptr + n, mask=ok & (n < N), other=0.0),)
    return found


@triton.jit
def _store_states(ptr, states, sub, ok, N: tl.constexpr, K: tl.constexpr):
    for k in tl.static_range(K):
        n = sub * K + k
        tl.store(ptr + n, states[k], mask=ok & (n < N))


@triton.jit
def _zeros(like, K: tl.constexpr, ACC: tl.constexpr):
    found = ()
    for _ in tl.static_range(K):
        found = found + (tl.zeros(like.shape, ACC),)
    return found


@triton.jit
def _fold(
    products_ptr, ends_ptr, states, first, last, step, channel, sub, ok,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """Fold the pairs of the parts first, first + step, .. before `last` into the states."""
    for i in range((last - first) * step):
        at = (first + i * step) * CHANNELS * N + channel * N
        products, ends = _load_states(products_ptr + at, sub, ok, N, K), _load_states(ends_ptr + at, sub, ok, N, K)
        new = ()
        for k in tl.static_range(K):
            new = new + (products[k] * states[k] + ends[k],)
        states = new
    return states


@triton.jit
def _fetch(
    u_row, dt_row, B_row, C_row, seq_row, start, here, sub, ok,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr,
    WITH_C: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """u, dt, B, C of TIME positions as they are in memory, and whether each goes on with the sequence before it.

    Nothing is read unless `here`.
    """
    us, dts, Bs, Cs, links = (), (), (), (), ()
    ok = ok & here
    u_row, dt_row = u_row + start * CHANNELS, dt_row + start * CHANNELS
    B_row, C_row = B_row + start * GROUPS * N, C_row + start * GROUPS * N
    for i in tl.static_range(TIME):
        us = us + (tl.load(u_row + i * CHANNELS, mask=ok, other=0.0),)
        dts = dts + (tl.load(dt_row + i * CHANNELS, mask=ok, other=0.0),)
        Bs = Bs + (_states_of(B_row + i * GROUPS * N, sub, here, N, K),)
        if WITH_C:
            Cs = Cs + (_states_of(C_row + i * GROUPS * N, sub, here, N, K),)
        linked = here
        if PACKED:
            inner = here & (start + i > 0)
            linked = tl.load(seq_row + start + i, mask=inner, other=0) == tl.load(
                seq_row + start + i - 1, mask=inner, other=0
            )
        links = links + (linked,)
    return us, dts, Bs, Cs, links


@triton.jit
def _advance(
    states, A, u, dt, B, linked, K: tl.constexpr, PRECISE: tl.constexpr, PACKED: tl.constexpr, ACC: tl.constexpr
):
    """The states after a position, and its decays."""
    dt = dt.to(ACC)
    weighted = dt * u.to(ACC)
    B = _columns(B.to(ACC), K)
    new, gates = (), ()
    for k in tl.static_range(K):
        gate = _gate(dt, A[k], PRECISE)
        before = tl.where(linked, states[k], 0.0) if PACKED else states[k]
        new = new + (_times_gate(gate, before, weighted * B[k], PRECISE),)
        gates = gates + (gate,)
    return new, gates


@triton.jit(do_not_specialize=["length", "part_length"])
def _selective_scan_part_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, seq_ptr, products_ptr, ends_ptr, length, part_length,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr,
    BLOCK_D: tl.constexpr, TIME: tl.constexpr,
    PACKED: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Product of decays and end state from zero of one part."""
    row, group, _block, channel, sub, ok, begin, end = _place(length, part_length, CHANNELS, GROUPS, BLOCK_D, SUB)
    u_row, dt_row = u_ptr + row * length * CHANNELS + channel, dt_ptr + row * length * CHANNELS + channel
    B_row = B_ptr + (row * length * GROUPS + group) * N
    seq_row = seq_ptr + row * length
    A = _rates(A_ptr, channel, sub, ok, N, K, PRECISE)
    h = _zeros(channel, K, ACC)
    total = tl.zeros(channel.shape, ACC)
    whole = end > begin
    full = begin + (end - begin) // TIME * TIME
    stretch = _fetch(
        u_row, dt_row, B_row, B_row, seq_row, begin, begin < full, sub, ok,
            CHANNELS, GROUPS, N, K, TIME, False, PACKED,
    )  # fmt: skip
    for start in range(begin, full, TIME):
        us, dts, Bs, _Cs, links = stretch
        stretch = _fetch(
            u_row, dt_row, B_row, B_row, seq_row, start + TIME, start + TIME < full, sub, ok,
            CHANNELS, GROUPS, N, K, TIME, False, PACKED,
        )  # fmt: skip
        for i in tl.static_range(TIME):
            h, _gates = _advance(h, A, us[i], dts[i], Bs[i], links[i], K, PRECISE, PACKED, ACC)
            total += dts[i].to(ACC)
            if PACKED:
                whole = whole & links[i]
    for t in range(full, end):
        us, dts, Bs, _Cs, links = _fetch(
            u_row, dt_row, B_row, B_row, seq_row, t, t < end, sub, ok,
            CHANNELS, GROUPS, N, K, 1, False, PACKED,
        )  # fmt: skip
        h, _gates = _advance(h, A, us[0], dts[0], Bs[0], links[0], K, PRECISE, PACKED, ACC)
        total += dts[0].to(ACC)
        if PACKED:
            whole = whole & links[0]
    products = ()
    for k in tl.static_range(K):
        gate = _gate(total, A[k], PRECISE)
        product = gate + 1.0 if PRECISE else gate
        products = products + (tl.where(whole, product, 0.0),)
    at = ((row * tl.num_programs(1) + tl.program_id(1)) * CHANNELS + channel) * N
    _store_states(ends_ptr + at, h, sub, ok, N, K)
    _store_states(products_ptr + at, products, sub, ok, N, K)


@triton.jit
def _own_rows(row, start, stride, sub, ok, STEPS: tl.constexpr, TIME: tl.constexpr, WANTED: tl.constexpr):
    """TIME positions of a vector of rows in the order of outputs: lane `sub` has position sub of each STEPS."""
    found = ()
    row = row + (start + sub) * stride
    for i in tl.static_range(TIME // STEPS if WANTED else 0):
        found = found + (tl.load(row + i * STEPS * stride, mask=ok & (sub < STEPS), other=0.0),)
    return found


@triton.jit
def _forward_stretch(
    stretch, own_us, own_zs, h, A, skip, y_row, sub, ok, CHANNELS: tl.constexpr,
    K: tl.constexpr, SUB: tl.constexpr, TIME: tl.constexpr, STEPS: tl.constexpr, HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Outputs of TIME positions, and the states after them."""
    us, dts, Bs, Cs, links = stretch
    own = tl.zeros(sub.shape, ACC)
    for i in tl.static_range(TIME):
        h, _gates = _advance(h, A, us[i], dts[i], Bs[i], links[i], K, PRECISE, PACKED, ACC)
        C = _columns(Cs[i].to(ACC), K)
        y = C[0] * h[0]
        for k in tl.static_range(1, K):
            y += C[k] * h[k]
        own = tl.where(sub == i % STEPS, _over_states(y, SUB), own)
        if i % STEPS == STEPS - 1:
            if HAS_D:
                own += skip * own_us[i // STEPS].to(ACC)
            if HAS_Z:
                z = own_zs[i // STEPS].to(ACC)
                own = own * z * _sigmoid(z)
            tl.store(y_row + (i // STEPS * STEPS) * CHANNELS, own, mask=ok & (sub < STEPS))
    return h


@triton.jit(do_not_specialize=["length", "part_length"])
def _selective_scan_fwd_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, initial_ptr, seq_ptr, products_ptr, ends_ptr,
    y_ptr, final_ptr, saved_ptr, length, part_length,
    z_stride_b, z_stride_t,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr,
    BLOCK_D: tl.constexpr, TIME: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_INITIAL: tl.constexpr, SAVE: tl.constexpr,
    PACKED: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    STEPS: tl.constexpr = min(SUB, TIME)
    row, group, _block, channel, sub, ok, begin, end = _place(length, part_length, CHANNELS, GROUPS, BLOCK_D, SUB)
    u_row, dt_row = u_ptr + row * length * CHANNELS + channel, dt_ptr + row * length * CHANNELS + channel
    B_row, C_row = B_ptr + (row * length * GROUPS + group) * N, C_ptr + (row * length * GROUPS + group) * N
    z_row, y_row = z_ptr + row * z_stride_b + channel, y_ptr + row * length * CHANNELS + channel
    seq_row = seq_ptr + row * length
    A = _rates(A_ptr, channel, sub, ok, N, K, PRECISE)
    skip = tl.zeros(channel.shape, ACC)
    if HAS_D:
        skip = tl.load(D_ptr + channel, mask=ok, other=0.0).to(ACC)
    h = _zeros(channel, K, ACC)
    of_row = (row * CHANNELS + channel) * N
    if HAS_INITIAL:
        h = _load_states(initial_ptr + of_row, sub, ok, N, K)
    first = row * tl.num_programs(1)
    h = _fold(products_ptr, ends_ptr, h, first, first + tl.program_id(1), 1, channel, sub, ok, CHANNELS, N, K)
    chunks = tl.cdiv(length, SAVED)
    full = begin + (end - begin) // TIME * TIME
    stretch = _fetch(
        u_row, dt_row, B_row, C_row, seq_row, begin, begin < full, sub, ok,
            CHANNELS, GROUPS, N, K, TIME, True, PACKED,
    )  # fmt: skip
    for start in range(begin, full, TIME):
        following = _fetch(
            u_row, dt_row, B_row, C_row, seq_row, start + TIME, start + TIME < full, sub, ok,
            CHANNELS, GROUPS, N, K, TIME, True, PACKED,
        )  # fmt: skip
        own_us = _own_rows(u_row, start, CHANNELS, sub, ok, STEPS, TIME, HAS_D)
        own_zs = _own_rows(z_row, start, z_stride_t, sub, ok, STEPS, TIME, HAS_Z)
        if SAVE and start % SAVED == 0:
            at = ((row * chunks + start // SAVED) * CHANNELS + channel) * N
            _store_states(saved_ptr + at, h, sub, ok, N, K)
        h = _forward_stretch(
            stretch, own_us, own_zs, h, A, skip, y_row + (start + sub) * CHANNELS, sub, ok, CHANNELS,
            K, SUB, TIME, STEPS, HAS_D, HAS_Z, PACKED, PRECISE, ACC,
        )  # fmt: skip
        stretch = following
    for t in range(full, end):
        own_u = _own_rows(u_row, t, CHANNELS, sub, ok, 1, 1, HAS_D)
        own_z = _own_rows(z_row, t, z_stride_t, sub, ok, 1, 1, HAS_Z)
        if SAVE and t % SAVED == 0:
            at = ((row * chunks + t // SAVED) * CHANNELS + channel) * N
            _store_states(saved_ptr + at, h, sub, ok, N, K)
        single = _fetch(
            u_row, dt_row, B_row, C_row, seq_row, t, t < end, sub, ok,
            CHANNELS, GROUPS, N, K, 1, True, PACKED,
        )  # fmt: skip
        h = _forward_stretch(
            single, own_u, own_z, h, A, skip, y_row + (t + sub) * CHANNELS, sub, ok, CHANNELS,
            K, SUB, 1, 1, HAS_D, HAS_Z, PACKED, PRECISE, ACC,
        )  # fmt: skip
    if tl.program_id(1) == tl.num_programs(1) - 1:
        _store_states(final_ptr + of_row, h, sub, ok, N, K)


@triton.jit
def _fetch_masked(row, start, end, ok, CHANNELS: tl.constexpr, TIME: tl.constexpr):
    """TIME positions of rows of channels; zero behind the end, which changes nothing."""
    found = ()
    row = row + start * CHANNELS
    for i in tl.static_range(TIME):
        found = found + (tl.load(row + i * CHANNELS, mask=ok & (start + i < end), other=0.0),)
    return found


@triton.jit
def _fetch_maps(row, start, end, sub, GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr):
    found = ()
    row = row + start * GROUPS * N
    for i in tl.static_range(TIME):
        found = found + (_states_of(row + i * GROUPS * N, sub, start + i < end, N, K),)
    return found


@triton.jit
def _fetch_links(seq_row, start, end, TIME: tl.constexpr, PACKED: tl.constexpr):
    found = ()
    for i in tl.static_range(TIME):
        linked = start + i < end
        if PACKED:
            inner = linked & (start + i > 0)
            linked = tl.load(seq_row + start + i, mask=inner, other=0) == tl.load(
                seq_row + start + i - 1, mask=inner, other=0
            )
        found = found + (linked,)
    return found


@triton.jit
def _fetch_gates(z_row, start, end, stride, ok, TIME: tl.constexpr, HAS_Z: tl.constexpr):
    found = ()
    row = z_row + start * stride
    for i in tl.static_range(TIME if HAS_Z else 0):
        found = found + (tl.load(row + i * stride, mask=ok & (start + i < end), other=0.0),)
    return found


@triton.jit(do_not_specialize=["length", "part_length"])
def _selective_scan_bwd_part_kernel(
    dt_ptr, A_ptr, C_ptr, z_ptr, seq_ptr, dy_ptr, products_ptr, ends_ptr, length, part_length, z_stride_b, z_stride_t,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr,
    BLOCK_D: tl.constexpr, TIME: tl.constexpr, HAS_Z: tl.constexpr, PACKED: tl.constexpr, PRECISE: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """Product of decays of one part, and the gradient that leaves it at its start if none enters at its end."""
    row, group, _block, channel, sub, ok, begin, end = _place(length, part_length, CHANNELS, GROUPS, BLOCK_D, SUB)
    dt_row, dy_row = dt_ptr + row * length * CHANNELS + channel, dy_ptr + row * length * CHANNELS + channel
    C_row = C_ptr + (row * length * GROUPS + group) * N
    z_row = z_ptr + row * z_stride_b + channel
    seq_row = seq_ptr + row * length
    A = _rates(A_ptr, channel, sub, ok, N, K, PRECISE)
    carry = _zeros(channel, K, ACC)
    total = tl.zeros(channel.shape, ACC)
    whole = end > begin
    stretches = tl.cdiv(end - begin, TIME)
    for stretch in range(stretches):
        start = begin + (stretches - 1 - stretch) * TIME
        dts = _fetch_masked(dt_row, start, end, ok, CHANNELS, TIME)
        dys = _fetch_masked(dy_row, start, end, ok, CHANNELS, TIME)
        Cs = _fetch_maps(C_row, start, end, sub, GROUPS, N, K, TIME)
        zs = _fetch_gates(z_row, start, end, z_stride_t, ok, TIME, HAS_Z)
        links = _fetch_links(seq_row, start, end, TIME, PACKED)
        for i in tl.static_range(TIME - 1, -1, -1):
            dt, dy = dts[i].to(ACC), dys[i].to(ACC)
            if HAS_Z:
                z = zs[i].to(ACC)
                dy = dy * z * _sigmoid(z)
            C = _columns(Cs[i].to(ACC), K)
            new = ()
            for k in tl.static_range(K):
                G = carry[k] + C[k] * dy
                G = _times_gate(_gate(dt, A[k], PRECISE), G, 0.0, PRECISE)
                new = new + (tl.where(links[i], G, 0.0) if PACKED else G,)
            carry = new
            total += dt
            if PACKED:
                whole = whole & (links[i] | (start + i >= end))
    products = ()
    for k in tl.static_range(K):
        gate = _gate(total, A[k], PRECISE)
        product = gate + 1.0 if PRECISE else gate
        products = products + (tl.where(whole, product, 0.0),)
    at = ((row * tl.num_programs(1) + tl.program_id(1)) * CHANNELS + channel) * N
    _store_states(ends_ptr + at, carry, sub, ok, N, K)
    _store_states(products_ptr + at, products, sub, ok, N, K)


@triton.jit
def _over_channels(x, SUB: tl.constexpr, SHARE: tl.constexpr):
    """Sum over each SHARE neighbouring channels, known to all of their lanes."""
    if SHARE == 1:
        return x
    else:
        parts = tl.reshape(x, [x.shape[0] // (SHARE * SUB), SHARE, SUB])
        total = tl.sum(parts, axis=1)
        return tl.reshape(tl.broadcast_to(total[:, None, :], parts.shape), [x.shape[0]])


@triton.jit
def _side_by_side(x, LEVELS: tl.constexpr):
    """A tuple of 2^LEVELS vectors as the columns of a tile."""
    if LEVELS == 0:
        return x[0][:, None]
    else:
        for level in tl.static_range(LEVELS):
            joined = ()
            for v in tl.static_range((1 << LEVELS) >> (level + 1)):
                pair = tl.join(x[v], x[v + ((1 << LEVELS) >> (level + 1))])
                joined = joined + (tl.reshape(pair, [x[0].shape[0], 2 << level]),)
            x = joined
        return x[0]


@triton.jit(do_not_specialize=["length", "part_length"])
def _selective_scan_bwd_kernel(
    u_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, z_ptr, seq_ptr, saved_ptr, dy_ptr, dfinal_ptr, products_ptr, ends_ptr,
    scratch_ptr, du_ptr, ddt_ptr, dz_ptr, dparameters_ptr, dmaps_ptr, dinitial_ptr, length, part_length,
    z_stride_b, z_stride_t,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr,
    BLOCK_D: tl.constexpr, TIME: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_FINAL: tl.constexpr,
    PACKED: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr, SAVED: tl.constexpr, LEVELS: tl.constexpr,
):  # fmt: skip
    """TIME is 2^LEVELS."""
    LANES: tl.constexpr = BLOCK_D * SUB
    STEPS: tl.constexpr = min(SUB, TIME)
    SLOTS: tl.constexpr = SAVED // TIME
    # Sums over channels: first over the SHARE channels of a warp; of 2 K sums a channel then keeps one of every SHARE.
    SHARE: tl.constexpr = min(BLOCK_D, max(1, 32 // SUB))
    KEPT: tl.constexpr = (2 * K + SHARE - 1) // SHARE
    row, group, block, channel, sub, ok, begin, end = _place(length, part_length, CHANNELS, GROUPS, BLOCK_D, SUB)
    lane = tl.arange(0, LANES)
    turn = lane // SUB % SHARE
    of_row = row * length * CHANNELS + channel
    u_row, dt_row, dy_row = u_ptr + of_row, dt_ptr + of_row, dy_ptr + of_row
    B_row, C_row = B_ptr + (row * length * GROUPS + group) * N, C_ptr + (row * length * GROUPS + group) * N
    z_row = z_ptr + row * z_stride_b + channel
    seq_row = seq_ptr + row * length
    parts = tl.num_programs(1)
    scratch = scratch_ptr + (tl.program_id(0).to(tl.int64) * parts + tl.program_id(1)) * SLOTS * K * LANES + lane
    blocks: tl.constexpr = (CHANNELS // GROUPS + BLOCK_D - 1) // BLOCK_D
    batch = tl.num_programs(0) // (GROUPS * blocks)
    maps_size = batch.to(tl.int64) * length * GROUPS * N  # of a gradient of B or C
    maps = dmaps_ptr + block * 2 * maps_size + (row * length * GROUPS + group) * N
    A = _rates(A_ptr, channel, sub, ok, N, K, PRECISE)
    skip = tl.zeros([LANES], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + channel, mask=ok, other=0.0).to(ACC)
    of_states = (row * CHANNELS + channel) * N
    carry = _zeros(channel, K, ACC)
    if HAS_FINAL:
        carry = _load_states(dfinal_ptr + of_states, sub, ok, N, K)
    last = row * parts + parts - 1
    carry = _fold(
        products_ptr, ends_ptr, carry, last, row * parts + tl.program_id(1), -1, channel, sub, ok, CHANNELS, N, K
    )
    dA, dD = _zeros(channel, K, ACC), tl.zeros([LANES], ACC)
    chunks = tl.cdiv(length, SAVED)
    for chunk_back in range(tl.cdiv(end - begin, SAVED)):
        chunk = tl.cdiv(end, SAVED) - 1 - chunk_back
        first = chunk * SAVED
        stretches = tl.cdiv(tl.minimum(end - first, SAVED), TIME)
        h = _load_states(saved_ptr + ((row * chunks + chunk) * CHANNELS + channel) * N, sub, ok, N, K)
        for stretch in range(stretches):
            for k in tl.static_range(K):
                tl.store(scratch + (stretch * K + k) * LANES, h[k])
            if stretch < stretches - 1:
                us, dts, Bs, _Cs, links = _fetch(
                    u_row, dt_row, B_row, B_row, seq_row, first + stretch * TIME, stretch >= 0, sub, ok,
                    CHANNELS, GROUPS, N, K, TIME, False, PACKED,
                )  # fmt: skip
                for i in tl.static_range(TIME):
                    h, _gates = _advance(h, A, us[i], dts[i], Bs[i], links[i], K, PRECISE, PACKED, ACC)
        tl.debug_barrier()
        for stretch_back in range(stretches):
            stretch = stretches - 1 - stretch_back
            start = first + stretch * TIME
            us = _fetch_masked(u_row, start, end, ok, CHANNELS, TIME)
            dts = _fetch_masked(dt_row, start, end, ok, CHANNELS, TIME)
            dys = _fetch_masked(dy_row, start, end, ok, CHANNELS, TIME)
            Bs = _fetch_maps(B_row, start, end, sub, GROUPS, N, K, TIME)
            Cs = _fetch_maps(C_row, start, end, sub, GROUPS, N, K, TIME)
            zs = _fetch_gates(z_row, start, end, z_stride_t, ok, TIME, HAS_Z)
            links = _fetch_links(seq_row, start, end, TIME, PACKED)
            h = ()
            for k in tl.static_range(K):
                h = h + (tl.load(scratch + (stretch * K + k) * LANES),)
            states, gates = (h,), ()
            for i in tl.static_range(TIME):
                h, gate = _advance(h, A, us[i], dts[i], Bs[i], links[i], K, PRECISE, PACKED, ACC)
                states, gates = states + (h,), gates + (gate,)
            own_du, own_ddt = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
            own_dz = tl.zeros([LANES], ACC)
            kept = ()
            for i in tl.static_range(TIME - 1, -1, -1):
                dt, u, dy = dts[i].to(ACC), us[i].to(ACC), dys[i].to(ACC)
                B, C = _columns(Bs[i].to(ACC), K), _columns(Cs[i].to(ACC), K)
                after, before = states[i + 1], states[i]
                mine = sub == i % STEPS
                if HAS_Z:
                    z = zs[i].to(ACC)
                    y = C[0] * after[0]
                    for k in tl.static_range(1, K):
                        y += C[k] * after[k]
                    y = _over_states(y, SUB) + skip * u
                    gate_z = _sigmoid(z)
                    own_dz = tl.where(mine, dy * y * gate_z * (1.0 + z * (1.0 - gate_z)), own_dz)
                    dy = dy * z * gate_z
                weighted = dt * u
                new, new_dA, dBs, dCs = (), (), (), ()
                dweighted, dexponent = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
                for k in tl.static_range(K):
                    G = carry[k] + C[k] * dy
                    dBs, dCs = dBs + (G * weighted,), dCs + (after[k] * dy,)
                    dweighted += G * B[k]
                    G = _times_gate(gates[i][k], G, 0.0, PRECISE)
                    if PACKED:
                        G = tl.where(links[i], G, 0.0)
                    X = G * before[k]
                    if PACKED:  # a state of another sequence, be it infinite, has no part in it
                        X = tl.where(links[i], X, 0.0)
                    dexponent += X * A[k]
                    new_dA = new_dA + (dA[k] + X * dt,)
                    new = new + (G,)
                carry, dA = new, new_dA
                if not PRECISE:
                    dexponent = dexponent * (1.0 / _LOG2_E)
                dweighted, dexponent = _over_states(dweighted, SUB), _over_states(dexponent, SUB)
                own_du = tl.where(mine, dt * dweighted + skip * dy, own_du)
                own_ddt = tl.where(mine, u * dweighted + dexponent, own_ddt)
                dD += u * dy
                sums = dBs + dCs
                at_i = ()
                for v in tl.static_range(KEPT):
                    mixed = tl.zeros([LANES], ACC)
                    for j in tl.static_range(min(SHARE, 2 * K - v * SHARE)):
                        total = _over_channels(tl.where(ok, sums[v * SHARE + j], 0.0), SUB, SHARE)
                        mixed = tl.where(turn == j, total, mixed)
                    at_i = at_i + (mixed,)
                kept = (at_i,) + kept
                if i % STEPS == 0:
                    t = start + i + sub
                    here = ok & (t < end) & (sub < STEPS)
                    at = of_row + (start + i + sub) * CHANNELS
                    tl.store(du_ptr + at, own_du, mask=here)
                    tl.store(ddt_ptr + at, own_ddt, mask=here)
                    if HAS_Z:
                        tl.store(dz_ptr + at, own_dz, mask=here)
            for v in tl.static_range(KEPT):
                rows = ()
                for i in tl.static_range(TIME):
                    rows = rows + (kept[i][v],)
                tile = tl.reshape(_side_by_side(rows, LEVELS), [LANES // (SHARE * SUB), SHARE * SUB, TIME])
                tile = tl.sum(tile, axis=0)  # over the warps
                index = tl.arange(0, SHARE * SUB)[:, None]
                time = start + tl.arange(0, TIME)[None, :]
                which = v * SHARE + index // SUB  # of the 2 K sums
                n = index % SUB * K + which % K
                out = maps + (which // K) * maps_size + time * (GROUPS * N) + n
                tl.store(out, tile, mask=(which < 2 * K) & (n < N) & (time < end))
        tl.debug_barrier()
    if tl.program_id(1) == 0:
        _store_states(dinitial_ptr + of_states, carry, sub, ok, N, K)
    out = dparameters_ptr + ((row * parts + tl.program_id(1)) * CHANNELS + channel) * (N + 1)
    _store_states(out, dA, sub, ok, N, K)
    tl.store(out + N, dD, mask=ok & (sub == 0))


def selective_scan_triton(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan_reference`; real tensors only."""
    save = torch.is_grad_enabled()
    if window is None or window <= 1:
        y, final, _ = apply(_Scan, u, dt, A, B, C, D, z, initial_state, seq_idx, save, False)
        return y, final
    y, final, _ = apply(_Scan, u, dt, A, B, C, D, None, initial_state, seq_idx, save, True)
    segments = _segments(u, seq_idx, window).flip(1)
    turned = (x.flip(1) for x in (u, dt, B, C))
    later = apply(_Scan, *_with(A, *turned), None, None, None, segments, save, True)[0].flip(1)
    once = (B.to(A.dtype) * C.to(A.dtype)).sum(-1)  # (b, l, g): both scans have the position itself
    own = (dt.to(y.dtype) * u.to(y.dtype)).unflatten(2, (B.shape[2], -1)) * once[..., None]
    y = y + (later - own.flatten(2))
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(y.dtype))
    return y.to(u.dtype), final


def _with(A: Tensor, u: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, ...]:
    return u, dt, A, B, C


@operator("selective_scan_triton_fwd")
def _forward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    save: bool,
    wide: bool,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, in the dtype of the states if `wide`; the final state; with `save` every 64th state.

    `parts` is the number of parts to cut the sequence into, 0 to choose.
    """
    u, dt, A, B, C = (x.contiguous() for x in (u, dt, A, B, C))
    D, initial_state, seq_idx = (None if x is None else x.contiguous() for x in (D, initial_state, seq_idx))
    z = u if z is None else last_contiguous(z)
    y, final, saved = _empty_outputs(u, A, save, wide)
    options = _options(u, A, B, seq_idx, backward=False)
    grid, part_length = _grid(u, B, options, parts, 8)
    length = u.shape[1]
    with on_device(u):
        products, ends = A, A  # not read with a single part
        if grid[1] > 1:
            products, ends = (A.new_empty(u.shape[0], grid[1], *A.shape) for _ in range(2))
            _selective_scan_part_kernel[grid](
                u, dt, A, B, _or(seq_idx, u), products, ends, length, part_length, **options
            )
        _selective_scan_fwd_kernel[grid](
            u, dt, A, B, C, _or(D, u), z, _or(initial_state, A), _or(seq_idx, u), products, ends, y, final, saved,
            length, part_length, z.stride(0), z.stride(1),
            HAS_D=D is not None, HAS_Z=z is not u, HAS_INITIAL=initial_state is not None, SAVE=save,
            SAVED=_SAVED, **options,
        )  # fmt: skip
    return y, final, saved


def _empty_outputs(u: Tensor, A: Tensor, save: bool, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, channels = u.shape
    # One more than is used: torch.export would build a size of 1 in.
    chunks = (length + _SAVED - 1) // _SAVED + 1 if save else 0
    return (
        u.new_empty(u.shape, dtype=A.dtype if wide else u.dtype),
        A.new_empty(batch, *A.shape),
        A.new_empty(batch * chunks, channels, A.shape[1]),
    )


@torch.library.register_fake("ssm::selective_scan_triton_fwd")
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    save: bool,
    wide: bool,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_outputs(u, A, save, wide)


@operator("selective_scan_triton_bwd")
def _backward(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    seq_idx: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C, D, z (empty without z) and the initial state."""
    u, dt, A, B, C, dy = (x.contiguous() for x in (u, dt, A, B, C, dy))
    D, dfinal, seq_idx = (None if x is None else x.contiguous() for x in (D, dfinal, seq_idx))
    z = u if z is None else last_contiguous(z)
    (batch, length, channels), n, groups = u.shape, A.shape[1], B.shape[2]
    options = _options(u, A, B, seq_idx, backward=True)
    grid, part_length = _grid(u, B, options, parts, 9)
    lanes, blocks = options["BLOCK_D"] * options["SUB"], grid[0] // (batch * groups)
    du, ddt = torch.empty_like(u), torch.empty_like(dt)
    dz = z.new_empty(z.shape if z is not u else (0,))
    dinitial = A.new_empty(batch, *A.shape)
    dparameters = A.new_empty(batch * grid[1], channels, n + 1)
    dmaps = A.new_empty(blocks, 2, *B.shape)
    scratch = A.new_empty(grid[0] * grid[1], _SAVED // options["TIME"] * options["K"] * lanes)
    with on_device(u):
        products, ends = A, A  # not read with a single part
        has_z = z is not u
        if grid[1] > 1:
            products, ends = (A.new_empty(batch, grid[1], *A.shape) for _ in range(2))
            _selective_scan_bwd_part_kernel[grid](
                dt, A, C, z, _or(seq_idx, u), dy, products, ends, length, part_length, z.stride(0), z.stride(1),
                HAS_Z=has_z, **options,
            )  # fmt: skip
        _selective_scan_bwd_kernel[grid](
            u, dt, A, B, C, _or(D, u), z, _or(seq_idx, u), saved, dy, _or(dfinal, A), products, ends, scratch,
            du, ddt, dz, dparameters, dmaps, dinitial, length, part_length, z.stride(0), z.stride(1),
            HAS_D=D is not None, HAS_Z=has_z, HAS_FINAL=dfinal is not None, SAVED=_SAVED,
            **options, **_backward_options(options),
        )  # fmt: skip
    dparameters, (dB, dC) = dparameters.sum(0), dmaps.sum(0).to(B.dtype)
    return du, ddt, dparameters[:, :n].clone(), dB, dC.clone(), dparameters[:, n].clone(), dz, dinitial


@torch.library.register_fake("ssm::selective_scan_triton_bwd")
def _(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    seq_idx: Tensor | None,
    saved: Tensor,
    dy: Tensor,
    dfinal: Tensor | None,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    du, ddt, dA, dB, dC = (x.new_empty(x.shape) for x in (u, dt, A, B, C))
    dz = u.new_empty(0) if z is None else z.new_empty(z.shape)
    return du, ddt, dA, dB, dC, A.new_empty(A.shape[0]), dz, A.new_empty(u.shape[0], *A.shape)


class _Scan(torch.autograd.Function):
    """The forward op with its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        initial_state: Tensor | None,
        seq_idx: Tensor | None,
        save: bool,
        wide: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _forward(u, dt, A, B, C, D, z, initial_state, seq_idx, save, wide, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *scanned, initial_state, seq_idx, _, _ = inputs
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)
        ctx.has_initial = initial_state is not None
        ctx.save_for_backward(*scanned, seq_idx, output[2])

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        *scanned, seq_idx, saved = ctx.saved_tensors
        u, _, _, _, _, D, z = scanned
        if dy is None:
            dy = u.new_zeros(u.shape)
        gradients = list(apply(_Gradient, *scanned, seq_idx, saved, dy, dfinal))
        for place, absent in ((5, D is None), (6, z is None), (7, not ctx.has_initial)):
            if absent:
                gradients[place] = None
        if D is not None:
            gradients[5] = gradients[5].to(D.dtype)
        return *gradients, None, None, None


class _Gradient(FirstDerivative):
    name = "selective_scan"

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return _backward(*arguments, 0)


# Each mapped instance has its own A and its own gradient of it, hence its own launches.
@torch.library.register_vmap("ssm::selective_scan_triton_fwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return one_by_one(_forward, info.batch_size, in_dims, arguments)


@torch.library.register_vmap("ssm::selective_scan_triton_bwd")
def _(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    return one_by_one(_backward, info.batch_size, in_dims, arguments)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor to pass in the place of an absent one, which is not read."""
    return other if tensor is None else tensor


def _options(u: Tensor, A: Tensor, B: Tensor, seq_idx: Tensor | None, backward: bool) -> dict[str, Any]:
    """Compile-time sizes: four states a lane; four warps, or two where their programs fill the device forwards."""
    n, groups = B.shape[3], B.shape[2]
    padded = triton.next_power_of_2(n)
    k = 1 if INTERPRETED and padded < 16 else min(4, padded)  # the interpreter pays per operation
    sub = padded // k
    width = u.shape[2] // groups
    lanes = 512 if INTERPRETED else 128
    if not (INTERPRETED or backward) and _fills(u.shape[0] * groups * triton.cdiv(width * sub, lanes), u):
        lanes = 64
    block_d = max(1, min(triton.next_power_of_2(width), lanes // sub))
    narrow = u.element_size() < 4
    options: dict[str, Any] = {
        "CHANNELS": u.shape[2],
        "GROUPS": groups,
        "N": n,
        "K": k,
        "SUB": sub,
        "BLOCK_D": block_d,
        "TIME": 8 if narrow and not backward else 4,
        "PACKED": seq_idx is not None,
        "PRECISE": not narrow,
        "ACC": tl.float64 if A.dtype == torch.float64 else tl.float32,
    }
    return options if INTERPRETED else options | {"num_warps": max(1, min(4, block_d * sub // 32))}


def _fills(programs: int, u: Tensor) -> bool:
    """Whether so many programs keep a device busy, so that no sequence is cut."""
    return programs >= 2 * multiprocessors(u.device)


def _backward_options(options: dict[str, Any]) -> dict[str, Any]:
    """What the backward kernel needs beside `_options`.

    168 registers a thread let three programs of four warps share a multiprocessor, and suffice without spilling.
    """
    found = {"LEVELS": options["TIME"].bit_length() - 1}
    return found if INTERPRETED else found | {"maxnreg": 168, "num_stages": 1}


def _grid(u: Tensor, B: Tensor, options: dict[str, Any], parts: int, wanted: int) -> tuple[tuple[int, int], int]:
    """Grid (rows x groups x channel blocks, parts), and positions of a part, a multiple of 64.

    Parts double the exponentials, so that a sequence is cut only where whole ones would leave most of the device idle:
    then into `wanted` programs for each multiprocessor.
    """
    batch, length, channels = u.shape
    groups = B.shape[2]
    programs = batch * groups * triton.cdiv(channels // groups, options["BLOCK_D"])
    if not parts:
        parts = 1 if _fills(programs, u) else min(256, max(1, wanted * multiprocessors(u.device) // programs))
    part_length = triton.cdiv(triton.cdiv(length, parts), _SAVED) * _SAVED
    return (programs, triton.cdiv(length, part_length)), part_length
