"""The forward kernel of the grid scans, and what both directions share; how they work is in triton_impl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.triton_kernels import _columns
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
def _side_by_side(x, K: tl.constexpr):
    """Undo `_columns`."""
    lanes: tl.constexpr = x[0].shape[0]
    if K == 1:
        return x[0][:, None]
    elif K == 2:
        return tl.join(x[0], x[1])
    else:
        return tl.reshape(tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3])), [lanes, 4])


@triton.jit
def _states_of(ptr, sub, ok, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr):
    """K neighbouring numbers for each lane, from vectors of pointers to rows of N; 0 beyond N."""
    if K == 1:
        return (tl.load(ptr + sub, mask=ok & (sub < N), other=0.0).to(ACC),)
    n = sub[:, None] * K + tl.arange(0, K)[None, :]
    if N % K == 0 and N & (N - 1) == 0:
        found = tl.load(ptr[:, None] + n, mask=ok[:, None], other=0.0)
    else:
        found = tl.load(ptr[:, None] + n, mask=ok[:, None] & (n < N), other=0.0)
    return _columns(found.to(ACC), K)


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
def _line_of_zeros(like, TJ: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    found = ()
    for _ in tl.static_range(TJ):
        found = found + (_zeros(like, COUNT, ACC),)
    return found


@triton.jit
def _unless(fresh, line, TJ: tl.constexpr, COUNT: tl.constexpr):
    """A line, with zeros where `fresh`."""
    found = ()
    for c in tl.static_range(TJ):
        values = ()
        for v in tl.static_range(COUNT):
            values = values + (tl.where(fresh, 0.0, line[c][v]),)
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
def _over_channels(x, S: tl.constexpr, BD: tl.constexpr, SUB: tl.constexpr):
    """Sum over the channels of a strip, known to the lanes of all of them."""
    if BD == 1:
        return x
    else:
        cube = tl.reshape(x, [S, BD, SUB])
        total = tl.sum(cube, axis=1)
        return tl.reshape(tl.broadcast_to(total[:, None, :], cube.shape), [x.shape[0]])


@triton.jit
def _store_states(ptr, values, sub, ok, N: tl.constexpr, K: tl.constexpr):
    """Undo `_states_of`."""
    if K == 1:
        tl.store(ptr + sub, values[0], mask=ok & (sub < N))
    else:
        n = sub[:, None] * K + tl.arange(0, K)[None, :]
        mask = ok[:, None]
        if N % K != 0 or N & (N - 1) != 0:
            mask = mask & (n < N)
        tl.store(ptr[:, None] + n, _side_by_side(values, K), mask=mask)


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
        maps = at * N
        x = tl.load(x_ptr + grid, mask=here, other=0.0).to(ACC)
        dt1 = tl.load(dt1_ptr + grid, mask=here, other=0.0).to(ACC)
        B1 = _states_of(B1_ptr + maps, sub, here, N, K, ACC)
        dt2, r1, B2, C1, C2 = dt1, dt1, B1, B1, B1
        if RULE != 1:
            dt2 = tl.load(dt2_ptr + grid, mask=here, other=0.0).to(ACC)
            B2 = _states_of(B2_ptr + maps, sub, here, N, K, ACC)
        if HAS_R:
            r1 = tl.load(r1_ptr + grid, mask=here, other=0.0).to(ACC)
        if MAPS_OUT:
            C1 = _states_of(C1_ptr + maps, sub, here, N, K, ACC)
            if RULE == 2:
                C2 = _states_of(C2_ptr + maps, sub, here, N, K, ACC)
        found = found + ((x, dt1, dt2, r1, B1, B2, C1, C2),)
    return found


@triton.jit
def _advance(
    cell, rates, left, above, wl, wt,
    RULE: tl.constexpr, HAS_R: tl.constexpr, HELD: tl.constexpr, K: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """What a cell passes down and to the right."""
    x, dt1, dt2, r1, B1, B2, _C1, _C2 = cell
    A1, A2, c2, c3 = rates
    s1, s2, sr = dt1 * _LOG2_E, dt2 * _LOG2_E, r1 * _LOG2_E
    u1, u2 = dt1 * x, dt2 * x
    down, right = (), ()
    if RULE == 0:
        for k in tl.static_range(K):
            from_left = left[k] + (_less_one(dt1, s1, A1[k], PRECISE) * left[k] + u1 * B1[k])
            from_above = above[k] + (_less_one(dt2, s2, A2[k], PRECISE) * above[k] + u2 * B2[k])
            down = down + (wl * from_left + wt * from_above,)
        right = down
    elif RULE == 1:
        for k in tl.static_range(K):
            gate = _less_one(dt1, s1, A1[k], PRECISE)
            g = left[k] + (gate * left[k] + u1 * B1[k])
            right = right + (g,)
            down = down + (above[k] + (gate * above[k] + g),)
    else:
        second = ()
        for k in tl.static_range(K):
            gate1 = _less_one(r1, sr, A1[k], PRECISE)
            gate2 = _less_one(dt2, s2, A2[k], PRECISE)
            in1, in2 = u1, u2
            if HELD:
                held1 = gate1
                if HAS_R:
                    held1 = _less_one(dt1, s1, A1[k], PRECISE)
                in1, in2 = held1 / A1[k] * x, gate2 / A2[k] * x
            down = down + (left[k] + (gate1 * (left[k] - c2[k] * left[K + k]) + in1 * B1[k]),)
            second = second + (above[K + k] + (gate2 * (above[K + k] - c3[k] * above[k]) + in2 * B2[k]),)
        down = down + second
        right = down
    return down, right


@triton.jit
def _not_zero(values, K: tl.constexpr):
    found = ()
    for k in tl.static_range(K):
        found = found + (tl.where(values[k] == 0, 1.0, values[k]),)
    return found


@triton.jit
def _rates_of(
    A1_ptr, A2_ptr, c2_ptr, c3_ptr, at, sub, ok, RULE: tl.constexpr, HAS_C2: tl.constexpr, HAS_C3: tl.constexpr,
    HELD: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A1, A2, c2, c3 of each lane's states; zeros for those that the rule has not."""
    A1 = _states_of(A1_ptr + at, sub, ok, N, K, ACC)
    A2, c2, c3 = A1, _zeros(sub, K, ACC), _zeros(sub, K, ACC)
    if RULE != 1:
        A2 = _states_of(A2_ptr + at, sub, ok, N, K, ACC)
    if HELD:  # lanes without a state divide by it too
        A1, A2 = _not_zero(A1, K), _not_zero(A2, K)
    if HAS_C2:
        c2 = _states_of(c2_ptr + at, sub, ok, N, K, ACC)
    if HAS_C3:
        c3 = _states_of(c3_ptr + at, sub, ok, N, K, ACC)
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
    V: tl.constexpr = 2 * K if RULE == 2 else K
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
    lead = lane % (BD * SUB)
    period = tl.maximum(chunks, S)
    above = _line_of_zeros(lane, TJ, V, ACC)
    for t in range(panels * period + S - 1):
        # Strip after strip begins; a strip goes on with the next panel once its last chunk is done.
        turn = t - own_strip
        panel = tl.maximum(turn, 0) // period
        chunk = tl.where(panel < panels, turn - panel * period, -1)
        strip = panel * S + own_strip
        column = strip * TJ
        first = tl.where(column_sign > 0, column, columns - 1 - column)
        above = _unless(chunk == 0, above, TJ, V)
        if SAVE:
            # [program, chunk - 1, panel, column, value, lane]
            keep = kept_ptr + (((program * (chunks - 1) + chunk - 1) * panels + panel) * TJ * V) * LANES + lane
            wanted = (chunk > 0) & (chunk < chunks)
            for c in tl.static_range(TJ):
                _store_lanes(keep + c * V * LANES, above[c], LANES, wanted, V)
        for r in range(R):
            i = chunk * R + r
            here = ok & (i >= 0) & (i < rows)
            place = tl.where(row_sign > 0, i, rows - 1 - i)
            cell = (row * rows + place) * columns + first
            line = _inputs_of_row(
                x_ptr, dt1_ptr, dt2_ptr, r1_ptr, B1_ptr, B2_ptr, C1_ptr, C2_ptr, cell, column, column_sign,
                columns, here, channel, sub, RULE, HAS_R, True, CHANNELS, N, K, TJ, ACC,
            )  # fmt: skip
            # [program, border, row, value, lane of a strip]
            border = border_ptr + (((program * (strips - 1) + strip) * rows + i) * V) * (BD * SUB) + lead
            left = _load_lanes(border - rows * V * (BD * SUB), BD * SUB, here & (strip > 0), V)
            wl, wt = _weights(i, strip < 0, RULE, ACC)
            below = ()
            own = tl.zeros([LANES], ACC)
            for c in tl.static_range(TJ):
                wl_c, wt_c = wl, wt
                if c == 0:
                    wl_c, wt_c = _weights(i, strip == 0, RULE, ACC)
                down, left = _advance(line[c], rates, left, above[c], wl_c, wt_c, RULE, HAS_R, HELD, K, PRECISE)
                below = below + (down,)
                C1, C2 = line[c][6], line[c][7]
                y = C1[0] * down[0]
                for k in tl.static_range(1, K):
                    y += C1[k] * down[k]
                if RULE == 2:
                    for k in tl.static_range(K):
                        y += C2[k] * down[K + k]
                y = _over_states(y, SUB)
                if HAS_D:
                    y += skip * line[c][0]
                own = tl.where(sub == c % SUB, y, own)
                if c % SUB == SUB - 1 or c == TJ - 1:
                    begin = c // SUB * SUB
                    mine = here & (begin + sub <= c) & (column + begin + sub < columns)
                    out = (cell + (begin + sub) * column_sign) * CHANNELS + channel
                    tl.store(y_ptr + out, own, mask=mine)
            above = below
            _store_lanes(border, left, BD * SUB, here & (strip < strips - 1), V)
        if S > 1:
            tl.debug_barrier()
