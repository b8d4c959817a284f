"""Kernels of `cross_scan` for a few states a channel, where reading and writing is what takes time.

A channel has one lane for each of SEG segments of a chunk of SEG x TIME positions, so that a few programs keep enough
of the inputs on their way. A lane goes over its TIME positions from nothing; what the segments before it and the chunk
before that leave, composed across the lanes, is where it begins again, with its inputs and decays still in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.triton_kernels import _LOG2_E, _gate, _times_gate
from ..triton_utils import quick
from .triton_kernels import _zeros


@triton.jit
def _compose(a, b, a_before, b_before, c, d, c_before, d_before):
    """Two stretches as one: behind them h is c (a h + b) + d, and before the last segment of them the same `before`."""
    return c * a, c * b + d, c_before * a, c_before * b + d_before


@triton.jit
def _entering(product, end, h, SEG: tl.constexpr, BACKWARDS: tl.constexpr):
    """What enters each segment, and what leaves the last: segments make `product` h + `end` of h, vectors of lanes."""
    BD: tl.constexpr = h.shape[0] // SEG
    product, end = tl.reshape(product, [SEG, BD]), tl.reshape(end, [SEG, BD])
    begin = tl.reshape(h, [SEG, BD])
    one, none = product * 0.0 + 1.0, end * 0.0
    a, b, a_before, b_before = tl.associative_scan((product, end, one, none), 0, _compose, reverse=BACKWARDS)
    last = tl.arange(0, SEG)[:, None] == (0 if BACKWARDS else SEG - 1)
    left = tl.sum(tl.where(last, a * begin + b, 0.0), axis=0)
    entering = tl.reshape(a_before * begin + b_before, [SEG * BD])
    return entering, tl.reshape(tl.broadcast_to(left[None, :], [SEG, BD]), [SEG * BD])


@triton.jit
def _place(first_order, orders, CHANNELS: tl.constexpr, SEG: tl.constexpr, BD: tl.constexpr):
    """Segment, channel and validity of lanes; order, batch index and block of channels; slot of the output; batch."""
    blocks: tl.constexpr = (CHANNELS + BD - 1) // BD
    slot = tl.program_id(0) // blocks % orders
    row = (tl.program_id(0) // (blocks * orders)).to(tl.int64)
    block = tl.program_id(0) % blocks
    lane = tl.arange(0, SEG * BD)
    channel = block * BD + lane % BD
    order = first_order + slot
    batch = tl.num_programs(0) // (blocks * orders)
    return lane // BD, channel, channel < CHANNELS, order, row, block, slot * batch + row, batch


@triton.jit
def _path(order, rows, columns):
    """Cells of a line of the order, its first cell, the stride between cells, and what the end of a line adds to it."""
    by_columns = order % 2 == 1
    sign = tl.where(order >= 2, -1, 1)
    inner = tl.where(by_columns, rows, columns)
    first = tl.where(order >= 2, rows * columns - 1, 0)
    stride = sign * tl.where(by_columns, columns, 1)
    return inner, first, stride, sign * tl.where(by_columns, 1, columns) - inner * stride


@triton.jit
def _cells(start, path, TIME: tl.constexpr):
    """The cells of TIME positions from each lane's `start`."""
    inner, first, stride, turn = path
    at = start % inner
    cell = first + start * stride + start // inner * turn
    found = (cell,)
    for _ in tl.static_range(TIME - 1):
        wraps = at + 1 == inner
        at = tl.where(wraps, 0, at + 1)
        cell += tl.where(wraps, stride + turn, stride)
        found = found + (cell,)
    return found


@triton.jit
def _fetch(
    x_row, dt_row, B_row, C_row, cells, start, length, ok,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    """x, dt, B and C of TIME positions as they are in memory; zeros behind the end, which change nothing."""
    found = ()
    for i in tl.static_range(TIME):
        here = start + i < length
        x = tl.load(x_row + cells[i] * CHANNELS, mask=ok & here, other=0.0)
        dt = tl.load(dt_row + cells[i] * CHANNELS, mask=ok & here, other=0.0)
        B, C = (), ()
        for k in tl.static_range(K):
            B = B + (tl.load(B_row + cells[i] * N + k, mask=here & (k < N), other=0.0),)
            C = C + (tl.load(C_row + cells[i] * N + k, mask=here & (k < N), other=0.0),)
        found = found + ((x, dt, B, C),)
    return found


@triton.jit
def _rates(A_ptr, at, ok, N: tl.constexpr, K: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr):
    """What `_gate` multiplies steps with."""
    found = ()
    for k in tl.static_range(K):
        A = tl.load(A_ptr + at + k, mask=ok & (k < N), other=0.0).to(ACC)
        found = found + (A if PRECISE else A * _LOG2_E,)
    return found


@triton.jit
def _product(total, A, PRECISE: tl.constexpr):
    """The decay over steps of sum `total`."""
    gate = _gate(total, A, PRECISE)
    return gate + 1.0 if PRECISE else gate


@quick
@triton.jit(do_not_specialize=["rows", "columns"])
def _cross_scan_short_fwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, y_ptr, saved_ptr, rows, columns,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SEG: tl.constexpr, BD: tl.constexpr, TIME: tl.constexpr,
    SAVED: tl.constexpr, SAVE: tl.constexpr, HAS_D: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y of each order."""
    segment, channel, ok, order, row, _block, slot, _batch = _place(0, 4, CHANNELS, SEG, BD)
    length = rows * columns
    path = _path(order, rows, columns)
    cells_before = (row * 4 + order) * length
    x_row, dt_row = x_ptr + row * length * CHANNELS + channel, dt_ptr + cells_before * CHANNELS + channel
    B_row, C_row = B_ptr + cells_before * N, C_ptr + cells_before * N
    y_row = y_ptr + slot * length * CHANNELS + channel
    A = _rates(A_ptr, (order * CHANNELS + channel) * N, ok, N, K, PRECISE, ACC)
    skip = tl.zeros([SEG * BD], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + order * CHANNELS + channel, mask=ok, other=0.0).to(ACC)
    carry = _zeros(channel, K, ACC)
    # [batch, order, stretch, channel, k]
    stretches = tl.cdiv(length, SAVED)
    saved = saved_ptr + ((row * 4 + order) * stretches * CHANNELS + channel) * K
    mine = segment * TIME
    cells = _cells(mine, path, TIME)
    line = _fetch(x_row, dt_row, B_row, C_row, cells, mine, length, ok, CHANNELS, N, K, TIME)
    for chunk in range(0, length, SEG * TIME):
        start = chunk + mine
        next_cells = _cells(start + SEG * TIME, path, TIME)
        following = _fetch(
            x_row, dt_row, B_row, C_row, next_cells, start + SEG * TIME, length, ok, CHANNELS, N, K, TIME
        )  # fmt: skip
        xs, weighted, gates, total = (), (), (), tl.zeros([SEG * BD], ACC)
        ends = _zeros(channel, K, ACC)
        for i in tl.static_range(TIME):
            x, dt = line[i][0].to(ACC), line[i][1].to(ACC)
            xs, weighted, total = xs + (x,), weighted + (dt * x,), total + dt
            at, new = (), ()
            for k in tl.static_range(K):
                gate = _gate(dt, A[k], PRECISE)
                at = at + (gate,)
                new = new + (_times_gate(gate, ends[k], weighted[i] * line[i][2][k].to(ACC), PRECISE),)
            gates, ends = gates + (at,), new
        h, left = (), ()
        for k in tl.static_range(K):
            product = _product(total, A[k], PRECISE)
            entering, leaving = _entering(product, ends[k], carry[k], SEG, False)
            h, left = h + (entering,), left + (leaving,)
        carry = left
        for i in tl.static_range(TIME):
            if SAVE and i == 0:
                for k in tl.static_range(K):
                    at = saved + start // SAVED * (CHANNELS * K) + k
                    tl.store(at, h[k], mask=ok & (start < length) & (start % SAVED == 0))
            y = skip * xs[i]
            new = ()
            for k in tl.static_range(K):
                new = new + (_times_gate(gates[i][k], h[k], weighted[i] * line[i][2][k].to(ACC), PRECISE),)
                y += line[i][3][k].to(ACC) * new[k]
            h = new
            here = ok & (start + i < length)
            tl.store(y_row + cells[i] * CHANNELS, y, mask=here)
        cells, line = next_cells, following


@triton.jit
def _fetch_back(
    x_row, dt_row, B_row, C_row, dy_row, saved, start, path, length, ok,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TIME: tl.constexpr, SAVED: tl.constexpr,
):  # fmt: skip
    """What the gradient of TIME positions needs: their cells, inputs, dy, and the state kept before them."""
    cells = _cells(start, path, TIME)
    line = _fetch(x_row, dt_row, B_row, C_row, cells, start, length, ok, CHANNELS, N, K, TIME)
    dys, now = (), ()
    for i in tl.static_range(TIME):
        dys = dys + (tl.load(dy_row + cells[i] * CHANNELS, mask=ok & (start + i < length), other=0.0),)
    at = tl.minimum(start, length - 1) // SAVED * (CHANNELS * K)
    for k in tl.static_range(K):
        now = now + (tl.load(saved + at + k, mask=ok, other=0.0),)
    return cells, line, dys, now


@triton.jit
def _over_channels(x, SEG: tl.constexpr):
    """Sum over the channels of each segment, known to all of their lanes."""
    tile = tl.reshape(x, [SEG, x.shape[0] // SEG])
    total = tl.sum(tile, axis=1)
    return tl.reshape(tl.broadcast_to(total[:, None], tile.shape), [x.shape[0]])


@quick
@triton.jit(do_not_specialize=["rows", "columns", "first_order", "orders", "add"])
def _cross_scan_short_bwd_kernel(
    x_ptr, dt_ptr, A_ptr, B_ptr, C_ptr, D_ptr, dy_ptr, saved_ptr, dx_ptr, ddt_ptr, dmaps_ptr, dA_ptr, dD_ptr,
    rows, columns, first_order, orders, add,
    CHANNELS: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SEG: tl.constexpr, BD: tl.constexpr, TIME: tl.constexpr,
    SAVED: tl.constexpr, HAS_D: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients of `orders` orders; those of x are added up in its slots. The first segment is the last in time."""
    LANES: tl.constexpr = SEG * BD
    segment, channel, ok, order, row, block, slot, batch = _place(first_order, orders, CHANNELS, SEG, BD)
    length = rows * columns
    path = _path(order, rows, columns)
    cells_before = (row * 4 + order) * length
    of_row = row * length * CHANNELS + channel
    x_row, dt_row, dy_row = x_ptr + of_row, dt_ptr + cells_before * CHANNELS + channel, dy_ptr + of_row
    B_row, C_row = B_ptr + cells_before * N, C_ptr + cells_before * N
    dx_row = dx_ptr + slot * length * CHANNELS + channel
    ddt_row = ddt_ptr + cells_before * CHANNELS + channel
    map_size = batch.to(tl.int64) * 4 * length * N
    dmaps_row = dmaps_ptr + block * 2 * map_size + cells_before * N
    A = _rates(A_ptr, (order * CHANNELS + channel) * N, ok, N, K, PRECISE, ACC)
    skip = tl.zeros([LANES], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + order * CHANNELS + channel, mask=ok, other=0.0).to(ACC)
    stretches = tl.cdiv(length, SAVED)
    saved = saved_ptr + ((row * 4 + order) * stretches * CHANNELS + channel) * K
    carry, dA, dD = _zeros(channel, K, ACC), _zeros(channel, K, ACC), tl.zeros([LANES], ACC)
    turn = tl.arange(0, LANES) % BD
    chunks = tl.cdiv(length, SEG * TIME)
    begin = (chunks - 1) * (SEG * TIME) + (SEG - 1 - segment) * TIME
    following = _fetch_back(
        x_row, dt_row, B_row, C_row, dy_row, saved, begin, path, length, ok, CHANNELS, N, K, TIME, SAVED
    )  # fmt: skip
    for chunk_back in range(chunks):
        start = begin - chunk_back * (SEG * TIME)
        cells, line, dys, now = following
        earlier = tl.maximum(start - SEG * TIME, 0)
        following = _fetch_back(
            x_row, dt_row, B_row, C_row, dy_row, saved, earlier, path, length, ok, CHANNELS, N, K, TIME, SAVED
        )  # fmt: skip
        gates, weighted, total = (), (), tl.zeros([LANES], ACC)
        for i in tl.static_range(TIME):
            dt = line[i][1].to(ACC)
            total += dt
            weighted = weighted + (dt * line[i][0].to(ACC),)
            at_i = ()
            for k in tl.static_range(K):
                at_i = at_i + (_gate(dt, A[k], PRECISE),)
            gates = gates + (at_i,)
        products = ()
        for k in tl.static_range(K):
            products = products + (_product(total, A[k], PRECISE),)
        if SAVED > TIME:  # what was kept is the state before the chunk
            ends, entering = _zeros(channel, K, ACC), ()
            for i in tl.static_range(TIME):
                new = ()
                for k in tl.static_range(K):
                    new = new + (_times_gate(gates[i][k], ends[k], weighted[i] * line[i][2][k].to(ACC), PRECISE),)
                ends = new
            for k in tl.static_range(K):
                into, _leaving = _entering(products[k], ends[k], now[k], SEG, True)
                entering = entering + (into,)
            now = entering
        states = (now,)
        for i in tl.static_range(TIME):
            new = ()
            for k in tl.static_range(K):
                into = weighted[i] * line[i][2][k].to(ACC)
                new = new + (_times_gate(gates[i][k], states[i][k], into, PRECISE),)
            states = states + (new,)
        # What leaves each segment at its start if nothing enters at its end; then what enters.
        ends = _zeros(channel, K, ACC)
        for i in tl.static_range(TIME - 1, -1, -1):
            new = ()
            for k in tl.static_range(K):
                G = ends[k] + line[i][3][k].to(ACC) * dys[i].to(ACC)
                new = new + (_times_gate(gates[i][k], G, 0.0, PRECISE),)
            ends = new
        entering, left = (), ()
        for k in tl.static_range(K):
            into, leaving = _entering(products[k], ends[k], carry[k], SEG, False)
            entering, left = entering + (into,), left + (leaving,)
        carry = left
        kept = ()
        for _ in tl.static_range((2 * K * TIME + BD - 1) // BD):
            kept = kept + (tl.zeros([LANES], ACC),)
        for i in tl.static_range(TIME - 1, -1, -1):
            x, dt, dy = line[i][0].to(ACC), line[i][1].to(ACC), dys[i].to(ACC)
            u = weighted[i]
            new, new_dA = (), ()
            p, q = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
            for k in tl.static_range(K):
                B, C = line[i][2][k].to(ACC), line[i][3][k].to(ACC)
                G = entering[k] + C * dy
                for which in tl.static_range(2):
                    value = G * u if which == 0 else states[i + 1][k] * dy
                    total_of = _over_channels(tl.where(ok, value, 0.0), SEG)
                    replaced = ()
                    for j in tl.static_range((2 * K * TIME + BD - 1) // BD):
                        if j == ((which * K + k) * TIME + i) // BD:
                            own = turn == ((which * K + k) * TIME + i) % BD
                            replaced = replaced + (tl.where(own, total_of, kept[j]),)
                        else:
                            replaced = replaced + (kept[j],)
                    kept = replaced
                p += G * B
                G = _times_gate(gates[i][k], G, 0.0, PRECISE)
                e = G * states[i][k]
                q += e * A[k]
                new_dA = new_dA + (dA[k] + e * dt,)
                new = new + (G,)
            entering, dA = new, new_dA
            if not PRECISE:
                q = q * (1.0 / _LOG2_E)
            dD += dy * x
            here = ok & (start + i < length)
            dx = dt * p + skip * dy
            dx += tl.load(dx_row + cells[i] * CHANNELS, mask=here & (add != 0), other=0.0).to(ACC)
            tl.store(dx_row + cells[i] * CHANNELS, dx, mask=here)
            tl.store(ddt_row + cells[i] * CHANNELS, q + x * p, mask=here)
        for j in tl.static_range((2 * K * TIME + BD - 1) // BD):
            v_of = j * BD + turn  # (map, k, position)
            t = start + v_of % TIME
            k = v_of // TIME % K
            inner, first, stride, step = path
            cell = first + t * stride + t // inner * step
            at = dmaps_row + (v_of // (TIME * K)) * map_size + cell * N + k
            tl.store(at, kept[j], mask=(v_of < 2 * K * TIME) & (t < length) & (k < N))
    # [batch, order, segment, channel, k]
    out = (((row * 4 + order) * SEG + segment) * CHANNELS + channel) * N
    for k in tl.static_range(K):
        tl.store(dA_ptr + out + k, dA[k], mask=ok & (k < N))
    tl.store(dD_ptr + ((row * 4 + order) * SEG + segment) * CHANNELS + channel, dD, mask=ok)
