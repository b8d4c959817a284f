"""Kernels of the gradients of the selective scan in Triton; see `triton_impl` for the equations.

Chunks are walked from the last to the first: a sweep through a chunk leaves the state before each stretch in a scratch
buffer, then each stretch forms its states again, in registers, and goes back over them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick
from .triton_kernels import (
    _LOG2_E,
    _advance,
    _columns,
    _fetch,
    _fold,
    _gate,
    _load_states,
    _over_states,
    _place,
    _rates,
    _sigmoid,
    _states_of,
    _store_states,
    _times_gate,
    _zeros,
)


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
def _fetch_own(row, start, end, sub, ok, CHANNELS: tl.constexpr, TIME: tl.constexpr):
    """Of TIME positions of rows of channels that of number `sub` for each lane; zero behind the end."""
    mask = ok & (sub < TIME) & (start + sub < end)
    return tl.load(row + (start + sub) * CHANNELS, mask=mask, other=0.0)


@triton.jit
def _spread(own, SUB: tl.constexpr, TIME: tl.constexpr, ACC: tl.constexpr):
    """What `_fetch_own` found, of TIME positions, for all lanes of a channel."""
    width: tl.constexpr = min(own.shape[0], 32)
    rows: tl.constexpr = own.shape[0] // width
    own = tl.reshape(own.to(ACC), [rows, width])
    found = ()
    for i in tl.static_range(TIME):
        place = tl.broadcast_to((tl.arange(0, width) // SUB * SUB + i)[None, :], [rows, width])
        found = found + (tl.reshape(tl.gather(own, place, 1), [rows * width]),)
    return found


@triton.jit
def _load_lanes(scratch, stretch, LANES: tl.constexpr, K: tl.constexpr):
    h = ()
    for k in tl.static_range(K):
        h = h + (tl.load(scratch + (stretch * K + k) * LANES),)
    return h


@triton.jit
def _fetch_ahead(
    u_row, dt_row, dy_row, B_row, C_row, scratch, stretch, first, end, sub, ok,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """What a stretch of a chunk needs on the way backwards, in few registers."""
    start = first + stretch * TIME
    u = _fetch_own(u_row, start, end, sub, ok, CHANNELS, TIME)
    dt = _fetch_own(dt_row, start, end, sub, ok, CHANNELS, TIME)
    dy = _fetch_own(dy_row, start, end, sub, ok, CHANNELS, TIME)
    Bs = _fetch_maps(B_row, start, end, sub, GROUPS, N, K, TIME)
    Cs = _fetch_maps(C_row, start, end, sub, GROUPS, N, K, TIME)
    return u, dt, dy, Bs, Cs, _load_lanes(scratch, stretch, LANES, K)


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


@quick
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
def _store_lanes(scratch, stretch, h, LANES: tl.constexpr, K: tl.constexpr):
    for k in tl.static_range(K):
        tl.store(scratch + (stretch * K + k) * LANES, h[k])


@triton.jit
def _from_other_lane(x, MASK: tl.constexpr, WIDTH: tl.constexpr):
    """For each lane what the one has whose place among WIDTH lanes of a warp differs in the bits of MASK."""
    rows: tl.constexpr = x.shape[0] // WIDTH
    place = tl.broadcast_to((tl.arange(0, WIDTH) ^ MASK)[None, :], [rows, WIDTH])
    return tl.reshape(tl.gather(tl.reshape(x, [rows, WIDTH]), place, 1), [rows * WIDTH])


@triton.jit
def _shared_sums(vectors, turn, DISTANCE: tl.constexpr, WIDTH: tl.constexpr):
    """Sums of 2^k vectors over the channels of WIDTH lanes: channel c, whose lanes have `turn` c, gets number c % 2^k.

    Neighbours, DISTANCE lanes apart, each give away half of the vectors, then those twice as far apart half of what is
    left, and so on: half as many numbers change lanes as if every channel got every sum, or fewer.
    """
    if len(vectors) > 1:
        odd = turn % 2 == 1
        half = ()
        for j in tl.static_range(len(vectors) // 2):
            kept = tl.where(odd, vectors[2 * j + 1], vectors[2 * j])
            given = tl.where(odd, vectors[2 * j], vectors[2 * j + 1])
            half = half + (kept + _from_other_lane(given, DISTANCE, WIDTH),)
        return _shared_sums(half, turn // 2, 2 * DISTANCE, WIDTH)
    elif DISTANCE < WIDTH:
        both = vectors[0] + _from_other_lane(vectors[0], DISTANCE, WIDTH)
        return _shared_sums((both,), turn, 2 * DISTANCE, WIDTH)
    else:
        return vectors[0]


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


@quick
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
    # Whether the way backwards fetches each stretch during the one before.
    AHEAD: tl.constexpr = SUB >= TIME and SUB <= 32
    # Sums over channels: first over the SHARE channels of a warp; of 2 K sums a channel gets one of every SHARE.
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
        following = _fetch(
            u_row, dt_row, B_row, B_row, seq_row, first, stretches > 1, sub, ok,
            CHANNELS, GROUPS, N, K, TIME, False, PACKED,
        )  # fmt: skip
        for stretch in range(stretches - 1):
            us, dts, Bs, _Cs, links = following
            following = _fetch(
                u_row, dt_row, B_row, B_row, seq_row, first + (stretch + 1) * TIME, stretch + 2 < stretches, sub, ok,
                CHANNELS, GROUPS, N, K, TIME, False, PACKED,
            )  # fmt: skip
            _store_lanes(scratch, stretch, h, LANES, K)
            for i in tl.static_range(TIME):
                h, _gates = _advance(h, A, us[i], dts[i], Bs[i], links[i], K, PRECISE, PACKED, ACC)
        _store_lanes(scratch, stretches - 1, h, LANES, K)
        tl.debug_barrier()
        if AHEAD:
            ahead = _fetch_ahead(
                u_row, dt_row, dy_row, B_row, C_row, scratch, stretches - 1, first, end, sub, ok,
                CHANNELS, GROUPS, N, K, TIME, LANES,
            )  # fmt: skip
        for stretch_back in range(stretches):
            stretch = stretches - 1 - stretch_back
            start = first + stretch * TIME
            if AHEAD:
                own_u, own_dt, own_dy, Bs, Cs, h = ahead
                ahead = _fetch_ahead(
                    u_row, dt_row, dy_row, B_row, C_row, scratch, tl.maximum(stretch - 1, 0), first, end, sub, ok,
                    CHANNELS, GROUPS, N, K, TIME, LANES,
                )  # fmt: skip
                us, dts = _spread(own_u, SUB, TIME, ACC), _spread(own_dt, SUB, TIME, ACC)
                dys = _spread(own_dy, SUB, TIME, ACC)
            else:
                us = _fetch_masked(u_row, start, end, ok, CHANNELS, TIME)
                dts = _fetch_masked(dt_row, start, end, ok, CHANNELS, TIME)
                dys = _fetch_masked(dy_row, start, end, ok, CHANNELS, TIME)
                Bs = _fetch_maps(B_row, start, end, sub, GROUPS, N, K, TIME)
                Cs = _fetch_maps(C_row, start, end, sub, GROUPS, N, K, TIME)
                h = _load_lanes(scratch, stretch, LANES, K)
            zs = _fetch_gates(z_row, start, end, z_stride_t, ok, TIME, HAS_Z)
            links = _fetch_links(seq_row, start, end, TIME, PACKED)
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
                    vectors = ()
                    for j in tl.static_range(min(SHARE, 2 * K - v * SHARE)):
                        vectors = vectors + (tl.where(ok, sums[v * SHARE + j], 0.0),)
                    at_i = at_i + (_shared_sums(vectors, turn, SUB, SHARE * SUB),)
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


@quick
@triton.jit(do_not_specialize=["blocks", "rows"])
def _selective_scan_sums_kernel(
    dmaps_ptr, dparameters_ptr, dB_ptr, dC_ptr, dA_ptr, dD_ptr, maps_size, blocks, parameters_size, rows,
    N: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dB and dC, sums over blocks of channels, and dA and dD, sums over rows and parts, all in order."""
    tiles = tl.cdiv(maps_size, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    entry = tl.arange(0, BLOCK).to(tl.int64)
    if program < 2 * tiles:
        which = program // tiles
        entry += program % tiles * BLOCK
        ok = entry < maps_size
        terms, apart = dmaps_ptr + which * maps_size + entry, tl.full([], 2, tl.int64) * maps_size
        total = tl.load(terms, mask=ok, other=0.0)
        for _block in range(1, blocks):
            terms += apart
            total += tl.load(terms, mask=ok, other=0.0)
        if which == 0:
            tl.store(dB_ptr + entry, total, mask=ok)
        else:
            tl.store(dC_ptr + entry, total, mask=ok)
    else:
        entry += (program - 2 * tiles) * BLOCK
        ok = entry < parameters_size
        terms = dparameters_ptr + entry
        total = tl.load(terms, mask=ok, other=0.0)
        for _row in range(1, rows):
            terms += parameters_size
            total += tl.load(terms, mask=ok, other=0.0)
        channel, n = entry // (N + 1), entry % (N + 1)
        tl.store(dA_ptr + channel * N + n, total, mask=ok & (n < N))
        tl.store(dD_ptr + channel, total, mask=ok & (n == N))
