"""The kernels of `cross_scan` for any number of states; what they compute and how is in triton_impl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.triton_backward import _side_by_side
from ..selective_scan.triton_kernels import _LOG2_E, _columns, _gate, _over_states, _times_gate
from ..triton_utils import quick


@triton.jit
def _load_lanes(ptr, stride, ok, COUNT: tl.constexpr):
    """COUNT vectors, `stride` apart."""
    found = ()
    for v in tl.static_range(COUNT):
        found = found + (tl.load(ptr + v * stride, mask=ok, other=0.0),)
    return found


@triton.jit
def _store_lanes(ptr, values, stride, ok, COUNT: tl.constexpr):
    for v in tl.static_range(COUNT):
        tl.store(ptr + v * stride, values[v], mask=ok)


@triton.jit
def _zeros(like, COUNT: tl.constexpr, ACC: tl.constexpr):
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros(like.shape, ACC),)
    return found


@triton.jit
def _added(total, values, COUNT: tl.constexpr):
    found = ()
    for v in tl.static_range(COUNT):
        found = found + (total[v] + values[v],)
    return found


@triton.jit
def _place(CHANNELS: tl.constexpr, BD: tl.constexpr, SUB: tl.constexpr):
    """Batch index, order and block of channels of the program; state group and channel of lanes; batch."""
    blocks: tl.constexpr = (CHANNELS + BD - 1) // BD
    row = (tl.program_id(0) // (4 * blocks)).to(tl.int64)
    order = tl.program_id(0) // blocks % 4
    block = tl.program_id(0) % blocks
    lane = tl.arange(0, BD * SUB)
    channel = block * BD + lane // SUB
    # Where blocks fill the channels the comparison is with a constant, and the compiler drops the mask.
    bound: tl.constexpr = CHANNELS if CHANNELS % BD else blocks * BD + BD
    return row, order, block, lane, lane % SUB, channel, channel < bound, tl.num_programs(0) // (4 * blocks)


@triton.jit
def _path(order, rows, columns):
    """Cells of a line of the order, and the first cell and the strides between cells and lines."""
    by_columns = order % 2 == 1
    sign = tl.where(order >= 2, -1, 1)
    inner = tl.where(by_columns, rows, columns)
    first = tl.where(order >= 2, rows * columns - 1, 0)
    return inner, first, sign * tl.where(by_columns, columns, 1), sign * tl.where(by_columns, 1, columns)


@triton.jit
def _cells(start, inner, first, stride, stride_of_lines, TIME: tl.constexpr):
    """The cells of TIME positions."""
    line, at = start // inner, start % inner
    found = ()
    for _ in tl.static_range(TIME):
        found = found + ((first + line * stride_of_lines + at * stride).to(tl.int64),)
        wraps = at + 1 == inner
        line, at = tl.where(wraps, line + 1, line), tl.where(wraps, 0, at + 1)
    return found


@triton.jit
def _maps_of(ptr, sub, ok, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """K neighbouring numbers of one row of N for each lane."""
    if K == 1:
        return (tl.load(ptr + sub, mask=ok & (sub < N), other=0.0).to(ACC),)
    n = sub[:, None] * K + tl.arange(0, K)[None, :]
    found = tl.load(ptr + n, mask=ok & (n < N), other=0.0)
    return _columns(found.to(ACC), K)


@triton.jit
def _rates(A_ptr, at, sub, ok, N: tl.constexpr, K: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr):
    """What `_gate` multiplies steps with."""
    n = sub[:, None] * K + tl.arange(0, K)[None, :]
    found = tl.load(A_ptr + at[:, None] + n, mask=ok[:, None] & (n < N), other=0.0).to(ACC)
    return _columns(found if PRECISE else found * _LOG2_E, K)


@triton.jit
def _fetch(
    x_row, dt_row, B_row, C_row, cells, start, length, sub, ok,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr, WITH_C: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """x, dt, B (and C) of TIME positions; zeros behind the end, which change nothing."""
    found = ()
    for i in tl.static_range(TIME):
        here = start + i < length
        x = tl.load(x_row + cells[i] * CHANNELS, mask=ok & here, other=0.0).to(ACC)
        dt = tl.load(dt_row + cells[i] * CHANNELS, mask=ok & here, other=0.0).to(ACC)
        B = _maps_of(B_row + cells[i] * N, sub, here, N, K, ACC)
        C = B
        if WITH_C:
            C = _maps_of(C_row + cells[i] * N, sub, here, N, K, ACC)
        found = found + ((x, dt, B, C),)
    return found


@triton.jit
def _advance(h, A, at, K: tl.constexpr, PRECISE: tl.constexpr):
    """The states after a position, and its decays as `_times_gate` takes them."""
    x, dt, B, _C = at
    u = dt * x
    new, gates = (), ()
    for k in tl.static_range(K):
        gate = _gate(dt, A[k], PRECISE)
        new = new + (_times_gate(gate, h[k], u * B[k], PRECISE),)
        gates = gates + (gate,)
    return new, gates


@quick
@triton.jit(do_not_specialize=["rows", "columns"])
def _cross_scan_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, saved_ptr, rows, columns,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr, BD: tl.constexpr, TIME: tl.constexpr,
    SAVED: tl.constexpr, SAVE: tl.constexpr, HAS_D: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of each order."""
    LANES: tl.constexpr = BD * SUB
    row, order, _block, lane, sub, channel, ok, batch = _place(CHANNELS, BD, SUB)
    length = rows * columns
    inner, first, stride, stride_of_lines = _path(order, rows, columns)
    cells_before = (row * 4 + order) * length
    x_row, dt_row = x_ptr + row * length * CHANNELS + channel, dt_ptr + cells_before * CHANNELS + channel
    B_row, C_row = B_ptr + cells_before * N, C_ptr + cells_before * N
    y_row = y_ptr + (order * batch + row) * length * CHANNELS
    A = _rates(A_ptr, (order * CHANNELS + channel) * N, sub, ok, N, K, PRECISE, ACC)
    skip = tl.zeros([LANES], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + order * CHANNELS + channel, mask=ok, other=0.0).to(ACC)
    h = _zeros(lane, K, ACC)
    chunks = tl.cdiv(length, SAVED)
    saved = saved_ptr + tl.program_id(0).to(tl.int64) * chunks * (K * LANES) + lane
    for start in range(0, length, TIME):
        if SAVE and start % SAVED == 0:
            _store_lanes(saved + start // SAVED * (K * LANES), h, LANES, lane >= 0, K)
        cells = _cells(start, inner, first, stride, stride_of_lines, TIME)
        line = _fetch(
            x_row, dt_row, B_row, C_row, cells, start, length, sub, ok, CHANNELS, N, K, TIME, True, ACC
        )  # fmt: skip
        own = tl.zeros([LANES], ACC)
        own_cell = tl.zeros([LANES], tl.int64)
        for i in tl.static_range(TIME):
            h, _gates = _advance(h, A, line[i], K, PRECISE)
            C = line[i][3]
            y = C[0] * h[0]
            for k in tl.static_range(1, K):
                y += C[k] * h[k]
            y = _over_states(y, SUB)
            if HAS_D:
                y += skip * line[i][0]
            own = tl.where(sub == i % SUB, y, own)
            own_cell = tl.where(sub == i % SUB, cells[i], own_cell)
            if i % SUB == SUB - 1 or i == TIME - 1:
                begin = i // SUB * SUB
                mine = ok & (begin + sub <= i) & (start + begin + sub < length)
                tl.store(y_row + own_cell * CHANNELS + channel, own, mask=mine)


@triton.jit
def _over_channels(x, SUB: tl.constexpr, SHARE: tl.constexpr):
    """Sum over each SHARE neighbouring channels, known to all of their lanes."""
    if SHARE == 1:
        return x
    else:
        parts = tl.reshape(x, [x.shape[0] // (SHARE * SUB), SHARE, SUB])
        total = tl.sum(parts, axis=1)
        return tl.reshape(tl.broadcast_to(total[:, None, :], parts.shape), [x.shape[0]])


@quick
@triton.jit(do_not_specialize=["rows", "columns"])
def _cross_scan_bwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, saved_ptr, scratch_ptr,
    dx_ptr, ddt_ptr, dmaps_ptr, dA_ptr, dD_ptr, rows, columns,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SUB: tl.constexpr, BD: tl.constexpr, TIME: tl.constexpr,
    LEVELS: tl.constexpr, SAVED: tl.constexpr, HAS_D: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """TIME is 2^LEVELS."""
    LANES: tl.constexpr = BD * SUB
    SLOTS: tl.constexpr = SAVED // TIME
    # Sums over channels: first over the SHARE channels of a warp; of 2 K sums a channel then keeps one of every SHARE.
    SHARE: tl.constexpr = min(BD, max(1, 32 // SUB))
    KEPT: tl.constexpr = (2 * K + SHARE - 1) // SHARE
    row, order, block, lane, sub, channel, ok, batch = _place(CHANNELS, BD, SUB)
    turn = lane // SUB % SHARE
    length = rows * columns
    inner, first, stride, stride_of_lines = _path(order, rows, columns)
    cells_before = (row * 4 + order) * length
    x_row, dt_row = x_ptr + row * length * CHANNELS + channel, dt_ptr + cells_before * CHANNELS + channel
    dy_row = dy_ptr + row * length * CHANNELS + channel
    B_row, C_row = B_ptr + cells_before * N, C_ptr + cells_before * N
    dx_row = dx_ptr + (order * batch + row) * length * CHANNELS
    ddt_row = ddt_ptr + cells_before * CHANNELS
    map_size = batch.to(tl.int64) * 4 * length * N
    dmaps_row = dmaps_ptr + block * 2 * map_size + cells_before * N
    A = _rates(A_ptr, (order * CHANNELS + channel) * N, sub, ok, N, K, PRECISE, ACC)
    skip = tl.zeros([LANES], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + order * CHANNELS + channel, mask=ok, other=0.0).to(ACC)
    chunks = tl.cdiv(length, SAVED)
    program = tl.program_id(0).to(tl.int64)
    saved = saved_ptr + program * chunks * (K * LANES) + lane
    scratch = scratch_ptr + program * (SLOTS * K * LANES) + lane
    carry, dA, dD = _zeros(lane, K, ACC), _zeros(lane, K, ACC), tl.zeros([LANES], ACC)
    for chunk_back in range(chunks):
        chunk = chunks - 1 - chunk_back
        begin = chunk * SAVED
        stretches = tl.cdiv(tl.minimum(length - begin, SAVED), TIME)
        h = _load_lanes(saved + chunk * (K * LANES), LANES, lane >= 0, K)
        for stretch in range(stretches):
            _store_lanes(scratch + stretch * (K * LANES), h, LANES, lane >= 0, K)
            if stretch < stretches - 1:
                start = begin + stretch * TIME
                cells = _cells(start, inner, first, stride, stride_of_lines, TIME)
                line = _fetch(
                    x_row, dt_row, B_row, B_row, cells, start, length, sub, ok, CHANNELS, N, K, TIME, False, ACC
                )  # fmt: skip
                for i in tl.static_range(TIME):
                    h, _gates = _advance(h, A, line[i], K, PRECISE)
        tl.debug_barrier()
        for stretch_back in range(stretches):
            stretch = stretches - 1 - stretch_back
            start = begin + stretch * TIME
            cells = _cells(start, inner, first, stride, stride_of_lines, TIME)
            line = _fetch(
                x_row, dt_row, B_row, C_row, cells, start, length, sub, ok, CHANNELS, N, K, TIME, True, ACC
            )  # fmt: skip
            dys = ()
            for i in tl.static_range(TIME):
                dys = dys + (tl.load(dy_row + cells[i] * CHANNELS, mask=ok & (start + i < length), other=0.0).to(ACC),)
            now = _load_lanes(scratch + stretch * (K * LANES), LANES, lane >= 0, K)
            states, gates = (now,), ()
            for i in tl.static_range(TIME):
                now, gate = _advance(now, A, line[i], K, PRECISE)
                states, gates = states + (now,), gates + (gate,)
            own_dx, own_ddt = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
            own_cell = tl.zeros([LANES], tl.int64)
            kept = ()
            for i in tl.static_range(TIME - 1, -1, -1):
                x, dt, B, C = line[i]
                dy = dys[i]
                u = dt * x
                before, after = states[i], states[i + 1]
                into, out, new, of_A = (), (), (), ()
                p, q = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
                for k in tl.static_range(K):
                    G = carry[k] + C[k] * dy
                    into = into + (G * u,)
                    out = out + (after[k] * dy,)
                    p += G * B[k]
                    G = _times_gate(gates[i][k], G, 0.0, PRECISE)
                    e = G * before[k]
                    q += e * A[k]
                    of_A = of_A + (e * dt,)
                    new = new + (G,)
                carry = new
                if not PRECISE:
                    q = q * (1.0 / _LOG2_E)
                dA = _added(dA, of_A, K)
                dD += dy * x
                mine = sub == i % SUB
                own_dx = tl.where(mine, _over_states(dt * p, SUB) + skip * dy, own_dx)
                own_ddt = tl.where(mine, _over_states(q + x * p, SUB), own_ddt)
                own_cell = tl.where(mine, cells[i], own_cell)
                sums = into + out
                at_i = ()
                for v in tl.static_range(KEPT):
                    mixed = tl.zeros([LANES], ACC)
                    for j in tl.static_range(min(SHARE, 2 * K - v * SHARE)):
                        over = _over_channels(tl.where(ok, sums[v * SHARE + j], 0.0), SUB, SHARE)
                        mixed = tl.where(turn == j, over, mixed)
                    at_i = at_i + (mixed,)
                kept = (at_i,) + kept
                if i % SUB == 0:
                    stored = ok & (i + sub < min(i + SUB, TIME)) & (start + i + sub < length)
                    at = own_cell * CHANNELS + channel
                    tl.store(dx_row + at, own_dx, mask=stored)
                    tl.store(ddt_row + at, own_ddt, mask=stored)
            t = start + tl.arange(0, TIME)[None, :]
            cell = first + t // inner * stride_of_lines + t % inner * stride
            for v in tl.static_range(KEPT):
                positions = ()
                for i in tl.static_range(TIME):
                    positions = positions + (kept[i][v],)
                tile = tl.reshape(_side_by_side(positions, LEVELS), [LANES // (SHARE * SUB), SHARE * SUB, TIME])
                tile = tl.sum(tile, axis=0)  # over the warps
                index = tl.arange(0, SHARE * SUB)[:, None]
                which = v * SHARE + index // SUB  # of the 2 K sums
                n = index % SUB * K + which % K
                at = (which // K) * map_size + cell.to(tl.int64) * N + n
                tl.store(dmaps_row + at, tile, mask=(which < 2 * K) & (n < N) & (t < length))
        tl.debug_barrier()
    out = ((row * 4 + order) * CHANNELS + channel) * N + sub * K
    for k in tl.static_range(K):
        tl.store(dA_ptr + out + k, dA[k], mask=ok & (sub * K + k < N))
    tl.store(dD_ptr + (row * 4 + order) * CHANNELS + channel, dD, mask=ok & (sub == 0))
