"""The forward kernel of the grid scans, and what both directions share; how they work is in triton_impl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick

_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def _less_one(dt, scaled, A, PRECISE: tl.constexpr):
    """exp(dt A) - 1; `scaled` is dt log2(e)."""
    if PRECISE:
        x = dt * A
        if x.dtype == tl.float64:
            small = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x / 720)))))
            return tl.where(tl.abs(x) < 1e-3, small, tl.exp(x) - 1.0)
        else:
            small = x * (1 + x * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120)))))
            return tl.where(tl.abs(x) < 0.25, small, tl.exp2(scaled * A) - 1.0)
    else:
        return tl.exp2(scaled * A) - 1.0


@triton.jit
def _states_at(at, sub, ok, N: tl.constexpr, K: tl.constexpr):
    """Offsets (lanes, K) of each lane's states in rows of N numbers that begin at `at`, and which of them there are."""
    n = sub[:, None] * K + tl.arange(0, K)[None, :]
    mask = ok[:, None]
    if N % K != 0 or N & (N - 1) != 0:
        mask = mask & (n < N)
    return at[:, None] + n, mask


@triton.jit
def _load_planes(ptr, ok, PLANES: tl.constexpr, K: tl.constexpr):
    """What cells hand on, PLANES times (lanes, K), side by side; `ptr` is that of the first plane."""
    found = ()
    for plane in tl.static_range(PLANES):
        found = found + (tl.load(ptr + plane * K, mask=ok[:, None], other=0.0),)
    return found


@triton.jit
def _store_planes(ptr, values, ok, PLANES: tl.constexpr, K: tl.constexpr):
    """Undo `_load_planes`."""
    for plane in tl.static_range(PLANES):
        tl.store(ptr + plane * K, values[plane], mask=ok[:, None])


@triton.jit
def _line_of_zeros(lanes: tl.constexpr, COUNT: tl.constexpr, PLANES: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """A line of COUNT cells of zeros."""
    line = ()
    for _ in tl.static_range(COUNT):
        values = ()
        for _plane in tl.static_range(PLANES):
            values = values + (tl.zeros([lanes, K], ACC),)
        line = line + (values,)
    return line


@triton.jit
def _unless(fresh, line, COUNT: tl.constexpr, PLANES: tl.constexpr):
    """A line, with zeros where `fresh`."""
    found = ()
    for c in tl.static_range(COUNT):
        values = ()
        for plane in tl.static_range(PLANES):
            values = values + (tl.where(fresh[:, None], 0.0, line[c][plane]),)
        found = found + (values,)
    return found


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
def _over_channels(x, S: tl.constexpr, BD: tl.constexpr, SUB: tl.constexpr, K: tl.constexpr):
    """Sum of (lanes, K) over the channels of a strip, known to the lanes of all of them."""
    if BD == 1:
        return x
    else:
        cube = tl.reshape(x, [S, BD, SUB, K])
        total = tl.sum(cube, axis=1)
        return tl.reshape(tl.broadcast_to(total[:, None, :, :], cube.shape), x.shape)


@triton.jit
def _place(CHANNELS: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, SUB: tl.constexpr):
    """Batch index and block of channels of the program; strip, state group and channel of lanes."""
    blocks: tl.constexpr = (CHANNELS + BD - 1) // BD
    row = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks
    lane = tl.arange(0, S * BD * SUB)
    strip = lane // (BD * SUB)
    channel = block * BD + lane // SUB % BD
    return row, block, lane, strip, lane % SUB, channel, channel < CHANNELS


@triton.jit
def _weights(i, at_border, RULE: tl.constexpr, ACC: tl.constexpr):
    """What a cell of the rule "mean" gives to its left and upper neighbour."""
    half = tl.full(i.shape, 0.5, ACC)
    left = tl.where(i == 0, 1.0, tl.where(at_border, 0.0, half))
    return left, 1.0 - left


@triton.jit
def _inputs_of_row(
    x_ptr, dt1_ptr, dt2_ptr, r1_ptr, B1_ptr, B2_ptr, C1_ptr, C2_ptr, cell, column, step, columns, ok, channel, sub,
    RULE: tl.constexpr, HAS_R: tl.constexpr, MAPS_OUT: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, TJ: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """x, steps, input and (if MAPS_OUT) output maps of TJ cells: a tuple per cell."""
    found = ()
    for c in tl.static_range(TJ):
        here = ok & (column + c < columns)
        at = cell + c * step
        grid = at * CHANNELS + channel
        maps, wanted = _states_at(at * N, sub, here, N, K)
        x = tl.load(x_ptr + grid, mask=here, other=0.0).to(ACC)
        dt1 = tl.load(dt1_ptr + grid, mask=here, other=0.0).to(ACC)
        B1 = tl.load(B1_ptr + maps, mask=wanted, other=0.0).to(ACC)
        dt2, r1, B2, C1, C2 = dt1, dt1, B1, B1, B1
        if RULE != 1:
            dt2 = tl.load(dt2_ptr + grid, mask=here, other=0.0).to(ACC)
            B2 = tl.load(B2_ptr + maps, mask=wanted, other=0.0).to(ACC)
        if HAS_R:
            r1 = tl.load(r1_ptr + grid, mask=here, other=0.0).to(ACC)
        if MAPS_OUT:
            C1 = tl.load(C1_ptr + maps, mask=wanted, other=0.0).to(ACC)
            if RULE == 2:
                C2 = tl.load(C2_ptr + maps, mask=wanted, other=0.0).to(ACC)
        found = found + ((x, dt1, dt2, r1, B1, B2, C1, C2),)
    return found


@triton.jit
def _advance(
    cell, rates, left, above, wl, wt,
    RULE: tl.constexpr, HAS_R: tl.constexpr, HELD: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """What a cell passes down and to the right."""
    x, dt1, dt2, r1, B1, B2, _C1, _C2 = cell
    A1, A2, c2, c3 = rates
    d1, d2, s1, s2 = dt1[:, None], dt2[:, None], (dt1 * _LOG2_E)[:, None], (dt2 * _LOG2_E)[:, None]
    u1, u2 = (dt1 * x)[:, None], (dt2 * x)[:, None]
    if RULE == 0:
        from_left = left[0] + (_less_one(d1, s1, A1, PRECISE) * left[0] + u1 * B1)
        from_above = above[0] + (_less_one(d2, s2, A2, PRECISE) * above[0] + u2 * B2)
        down = (wl[:, None] * from_left + wt[:, None] * from_above,)
        return down, down
    elif RULE == 1:
        gate = _less_one(d1, s1, A1, PRECISE)
        g = left[0] + (gate * left[0] + u1 * B1)
        return (above[0] + (gate * above[0] + g),), (g,)
    else:
        gate1 = _less_one(r1[:, None], (r1 * _LOG2_E)[:, None], A1, PRECISE)
        gate2 = _less_one(d2, s2, A2, PRECISE)
        in1, in2 = u1, u2
        if HELD:
            held1 = gate1
            if HAS_R:
                held1 = _less_one(d1, s1, A1, PRECISE)
            in1, in2 = held1 / A1 * x[:, None], gate2 / A2 * x[:, None]
        first = left[0] + (gate1 * (left[0] - c2 * left[1]) + in1 * B1)
        second = above[1] + (gate2 * (above[1] - c3 * above[0]) + in2 * B2)
        return (first, second), (first, second)


@triton.jit
def _rates_of(
    A1_ptr, A2_ptr, c2_ptr, c3_ptr, at, sub, ok, RULE: tl.constexpr, HAS_C2: tl.constexpr, HAS_C3: tl.constexpr,
    HELD: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A1, A2, c2, c3 of each lane's states, (lanes, K); zeros for those that the rule has not."""
    place, wanted = _states_at(at, sub, ok, N, K)
    A1 = tl.load(A1_ptr + place, mask=wanted, other=0.0).to(ACC)
    A2, c2, c3 = A1, tl.zeros(A1.shape, ACC), tl.zeros(A1.shape, ACC)
    if RULE != 1:
        A2 = tl.load(A2_ptr + place, mask=wanted, other=0.0).to(ACC)
    if HELD:  # lanes without a state divide by it too
        A1, A2 = tl.where(A1 == 0, 1.0, A1), tl.where(A2 == 0, 1.0, A2)
    if HAS_C2:
        c2 = tl.load(c2_ptr + place, mask=wanted, other=0.0).to(ACC)
    if HAS_C3:
        c3 = tl.load(c3_ptr + place, mask=wanted, other=0.0).to(ACC)
    return A1, A2, c2, c3


@quick
@triton.jit(do_not_specialize=["rows", "columns", "share", "panels", "strips", "row_sign", "column_sign"])
def _grid_scan_fwd_kernel(
    x_ptr, dt1_ptr, dt2_ptr, r1_ptr, B1_ptr, B2_ptr, C1_ptr, C2_ptr, A1_ptr, A2_ptr, c2_ptr, c3_ptr, D_ptr,
    y_ptr, border_ptr, kept_ptr, rows, columns, share, panels, strips, row_sign, column_sign,
    RULE: tl.constexpr, HAS_R: tl.constexpr, HAS_C2: tl.constexpr, HAS_C3: tl.constexpr, HELD: tl.constexpr,
    HAS_D: tl.constexpr, SAVE: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, SUB: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, TJ: tl.constexpr, R: tl.constexpr,
    PRECISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 2 if RULE == 2 else 1
    V: tl.constexpr = PLANES * K
    LANES: tl.constexpr = S * BD * SUB
    row, _block, lane, own_strip, sub, channel, ok = _place(CHANNELS, S, BD, SUB)
    program = tl.program_id(0).to(tl.int64)
    rates = _rates_of(
        A1_ptr, A2_ptr, c2_ptr, c3_ptr, ((row // share) * CHANNELS + channel) * N, sub, ok, RULE, HAS_C2, HAS_C3,
        HELD, N, K, ACC,
    )  # fmt: skip
    skip = tl.zeros([LANES], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + (row // share) * CHANNELS + channel, mask=ok, other=0.0).to(ACC)
    chunks = tl.cdiv(rows, R)
    # Of the numbers that cells hand on, those of a lane of a program, and of a strip.
    own_place = (lane * V)[:, None] + tl.arange(0, K)[None, :]
    lead = (lane % (BD * SUB) * V)[:, None] + tl.arange(0, K)[None, :]
    period = tl.maximum(chunks, S)
    above = _line_of_zeros(LANES, TJ, PLANES, K, ACC)
    for t in range(panels * period + S - 1):
        # Strip after strip begins; a strip goes on with the next panel once its last chunk is done.
        turn = t - own_strip
        panel = tl.maximum(turn, 0) // period
        chunk = tl.where(panel < panels, turn - panel * period, -1)
        strip = panel * S + own_strip
        column = strip * TJ
        first = tl.where(column_sign > 0, column, columns - 1 - column)
        above = _unless(chunk == 0, above, TJ, PLANES)
        if SAVE:
            # [program, chunk - 1, panel, column, lane, value]
            keep = (((program * (chunks - 1) + chunk - 1) * panels + panel) * (TJ * V * LANES))[:, None] + own_place
            wanted = (chunk > 0) & (chunk < chunks)
            for c in tl.static_range(TJ):
                _store_planes(kept_ptr + keep + c * V * LANES, above[c], wanted, PLANES, K)
        for r in range(R):
            i = chunk * R + r
            here = ok & (i >= 0) & (i < rows)
            place = tl.where(row_sign > 0, i, rows - 1 - i)
            cell = (row * rows + place) * columns + first
            line = _inputs_of_row(
                x_ptr, dt1_ptr, dt2_ptr, r1_ptr, B1_ptr, B2_ptr, C1_ptr, C2_ptr, cell, column, column_sign,
                columns, here, channel, sub, RULE, HAS_R, True, CHANNELS, N, K, TJ, ACC,
            )  # fmt: skip
            # [program, border, row, lane of a strip, value]
            border = border_ptr + ((((program * (strips - 1) + strip) * rows + i) * (V * BD * SUB))[:, None] + lead)
            left = _load_planes(border - rows * V * (BD * SUB), here & (strip > 0), PLANES, K)
            wl, wt = _weights(i, strip < 0, RULE, ACC)
            below = ()
            own = tl.zeros([LANES], ACC)
            for c in tl.static_range(TJ):
                wl_c, wt_c = wl, wt
                if c == 0:
                    wl_c, wt_c = _weights(i, strip == 0, RULE, ACC)
                down, left = _advance(line[c], rates, left, above[c], wl_c, wt_c, RULE, HAS_R, HELD, PRECISE)
                below = below + (down,)
                read = line[c][6] * down[0]
                if RULE == 2:
                    read += line[c][7] * down[1]
                y = _over_states(tl.sum(read, axis=1), SUB)
                if HAS_D:
                    y += skip * line[c][0]
                own = tl.where(sub == c % SUB, y, own)
                if c % SUB == SUB - 1 or c == TJ - 1:
                    begin = c // SUB * SUB
                    mine = here & (begin + sub <= c) & (column + begin + sub < columns)
                    out = (cell + (begin + sub) * column_sign) * CHANNELS + channel
                    tl.store(y_ptr + out, own, mask=mine)
            above = below
            _store_planes(border, left, here & (strip < strips - 1), PLANES, K)
        if S > 1:
            tl.debug_barrier()
