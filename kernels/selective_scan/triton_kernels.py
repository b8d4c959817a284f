"""Kernels of the selective scan in Triton: what both directions share, and the forward pass; see `triton_impl`.

A lane holds K neighbouring states of one channel, SUB lanes hold all n of them, and a program BLOCK_D channels: vectors
have BLOCK_D * SUB entries, channel after channel. The rows of TIME positions are fetched together, one stretch ahead of
their use, then used one after the other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick

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


@quick
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


@quick
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
