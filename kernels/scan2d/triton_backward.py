"""The backward kernels of the grid scans; what they compute and how is in triton_impl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick
from .triton_kernels import (
    _LOG2_E,
    _advance,
    _inputs_of_row,
    _less_one,
    _line_of_zeros,
    _load_planes,
    _over_channels,
    _over_states,
    _rates_of,
    _states_at,
    _store_planes,
    _unless,
    _weights,
)


@triton.jit
def _retreat(
    cell, dy, rates, left, above, right, under, wl, wt,
    RULE: tl.constexpr, HAS_R: tl.constexpr, HELD: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Adjoint of `_advance`: gradients to the left and up; of x, dt1, dt2, r1, summed over a lane's states; of the
    rates; and of the input maps before their sum over channels."""
    x, dt1, dt2, r1, B1, B2, C1, C2 = cell
    A1, A2, c2, c3 = rates
    d1, d2, s1, s2 = dt1[:, None], dt2[:, None], (dt1 * _LOG2_E)[:, None], (dt2 * _LOG2_E)[:, None]
    u1, u2, x2, dy2 = (dt1 * x)[:, None], (dt2 * x)[:, None], x[:, None], dy[:, None]
    if RULE == 0:
        G = C1 * dy2 + right[0] + under[0]
        G1, G2 = wl[:, None] * G, wt[:, None] * G
        X1 = G1 + _less_one(d1, s1, A1, PRECISE) * G1
        X2 = G2 + _less_one(d2, s2, A2, PRECISE) * G2
        e1, e2 = X1 * left[0], X2 * above[0]
        p1, p2 = B1 * G1, B2 * G2
        steps = (tl.sum(d1 * p1 + d2 * p2, axis=1), tl.sum(A1 * e1 + x2 * p1, axis=1))
        steps = steps + (tl.sum(A2 * e2 + x2 * p2, axis=1),)
        return (X1,), (X2,), steps, (d1 * e1, d2 * e2), (u1 * G1, u2 * G2)
    elif RULE == 1:
        H = C1 * dy2 + under[0]
        G = H + right[0]
        gate = _less_one(d1, s1, A1, PRECISE)
        X1, X2 = G + gate * G, H + gate * H
        e = X1 * left[0] + X2 * above[0]
        p = B1 * G
        steps = (tl.sum(d1 * p, axis=1), tl.sum(A1 * e + x2 * p, axis=1))
        return (X1,), (X2,), steps, (d1 * e,), (u1 * G,)
    else:
        R1 = r1[:, None]
        L1 = C1 * dy2 + right[0] + under[0]
        L2 = C2 * dy2 + right[1] + under[1]
        gate1 = _less_one(R1, (r1 * _LOG2_E)[:, None], A1, PRECISE)
        gate2 = _less_one(d2, s2, A2, PRECISE)
        X1, X2 = L1 + gate1 * L1, L2 + gate2 * L2
        e1 = X1 * (left[0] - c2 * left[1])
        e2 = X2 * (above[1] - c3 * above[0])
        p1, p2 = B1 * L1, B2 * L2
        in_A1, in_A2 = R1 * e1, d2 * e2
        dr1, ddt2 = A1 * e1, A2 * e2
        w1, w2 = d1, d2
        g1, g2 = x2 * p1, x2 * p2
        if HELD:
            held1 = gate1
            if HAS_R:
                held1 = _less_one(d1, s1, A1, PRECISE)
            w1, w2 = held1 / A1, gate2 / A2
            in_A1 += g1 * (d1 * (1.0 + held1) - w1) / A1
            in_A2 += g2 * (d2 * (1.0 + gate2) - w2) / A2
            g1, g2 = g1 * (1.0 + held1), g2 * (1.0 + gate2)
        ddt1, ddt2 = g1, ddt2 + g2
        if not HAS_R:
            ddt1 += dr1
        steps = (tl.sum(w1 * p1 + w2 * p2, axis=1), tl.sum(ddt1, axis=1), tl.sum(ddt2, axis=1))
        if HAS_R:
            steps = steps + (tl.sum(dr1, axis=1),)
        in_rates = (in_A1, in_A2, -gate1 * left[1] * L1, -gate2 * above[0] * L2)
        to_left, to_above = (X1, -c2 * gate1 * L1), (-c3 * gate2 * L2, X2)
        return to_left, to_above, steps, in_rates, (w1 * x2 * L1, w2 * x2 * L2)


@quick
@triton.jit(do_not_specialize=["rows", "columns", "share", "panels", "strips", "row_sign", "column_sign", "again"])
def _grid_scan_bwd_kernel(
    x_ptr, dt1_ptr, dt2_ptr, r1_ptr, B1_ptr, B2_ptr, C1_ptr, C2_ptr, A1_ptr, A2_ptr, c2_ptr, c3_ptr, D_ptr, dy_ptr,
    border_ptr, kept_ptr, dborder_ptr, scratch_ptr, dx_ptr, ddt1_ptr, ddt2_ptr, dr1_ptr, dmaps_ptr, drates_ptr, dD_ptr,
    rows, columns, share, panels, strips, row_sign, column_sign, again,
    RULE: tl.constexpr, HAS_R: tl.constexpr, HAS_C2: tl.constexpr, HAS_C3: tl.constexpr, HELD: tl.constexpr,
    HAS_D: tl.constexpr, CHANNELS: tl.constexpr, N: tl.constexpr,
    K: tl.constexpr, SUB: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, TJ: tl.constexpr, R: tl.constexpr,
    PASSES: tl.constexpr, PRECISE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Gradients, of one of PASSES groups of blocks of channels: launch `again` adds to the maps of those before it."""
    PLANES: tl.constexpr = 2 if RULE == 2 else 1
    V: tl.constexpr = PLANES * K
    SAVED: tl.constexpr = V + (K if RULE == 1 else 0)  # states of a cell in the scratch: for "separable" g as well
    LANES: tl.constexpr = S * BD * SUB
    RATES: tl.constexpr = 1 if RULE == 1 else 2 if RULE == 0 else 4
    INTO: tl.constexpr = 1 if RULE == 1 else 2  # input maps
    MAPS: tl.constexpr = INTO + (2 if RULE == 2 else 1)
    blocks: tl.constexpr = (CHANNELS + BD - 1) // BD
    groups: tl.constexpr = (blocks + PASSES - 1) // PASSES  # blocks of one launch
    program = tl.program_id(0).to(tl.int64)
    row = program // groups
    map_size = tl.num_programs(0).to(tl.int64) // groups * rows * columns * N  # of a gradient of one map
    dmaps_row = dmaps_ptr + program % groups * MAPS * map_size
    lane = tl.arange(0, S * BD * SUB)
    own_strip, sub = lane // (BD * SUB), lane % SUB
    # Of the numbers that cells hand on, those of a lane of a program, and of a strip.
    own_place = (lane * V)[:, None] + tl.arange(0, K)[None, :]
    lead = (lane % (BD * SUB) * V)[:, None] + tl.arange(0, K)[None, :]
    scratch = scratch_ptr + program * ((R + 1) * TJ * SAVED * LANES) + own_place
    chunks = tl.cdiv(rows, R)
    period = tl.maximum(chunks, S)
    block = again * groups + program % groups
    scanned = row * blocks + block  # the program that scanned it forwards
    channel = block * BD + lane // SUB % BD
    ok = channel < CHANNELS
    rates = _rates_of(
        A1_ptr, A2_ptr, c2_ptr, c3_ptr, ((row // share) * CHANNELS + channel) * N, sub, ok, RULE, HAS_C2, HAS_C3,
        HELD, N, K, ACC,
    )  # fmt: skip
    skip = tl.zeros([LANES], ACC)
    if HAS_D:
        skip = tl.load(D_ptr + (row // share) * CHANNELS + channel, mask=ok, other=0.0).to(ACC)
    dA1, dA2 = tl.zeros([LANES, K], ACC), tl.zeros([LANES, K], ACC)
    dc2, dc3 = tl.zeros([LANES, K], ACC), tl.zeros([LANES, K], ACC)
    dD = tl.zeros([LANES], ACC)
    under = _line_of_zeros(LANES, TJ, PLANES, K, ACC)
    for t in range(panels * period + S - 1):
        turn = t - (S - 1 - own_strip)
        done = tl.maximum(turn, 0) // period  # panels
        back = turn - done * period
        panel, chunk = panels - 1 - done, chunks - 1 - back
        going = (turn >= 0) & (done < panels) & (back < chunks)
        strip = panel * S + own_strip
        column = strip * TJ
        first = tl.where(column_sign > 0, column, columns - 1 - column)
        under = _unless(back == 0, under, TJ, PLANES)
        live = ok & going
        # The states of the chunk's rows, from the row above it and the column to its left.
        keep = (((scanned * (chunks - 1) + chunk - 1) * panels + panel) * (TJ * V * LANES))[:, None] + own_place
        above = ()
        for c in tl.static_range(TJ):
            states = _load_planes(kept_ptr + keep + c * V * LANES, live & (chunk > 0), PLANES, K)
            _store_planes(scratch + c * SAVED * LANES, states, lane >= 0, PLANES, K)
            above = above + (states,)
        for r in range(R):
            i = chunk * R + r
            here = live & (i < rows)
            place = tl.where(row_sign > 0, i, rows - 1 - i)
            cell = (row * rows + place) * columns + first
            line = _inputs_of_row(
                x_ptr, dt1_ptr, dt2_ptr, r1_ptr, B1_ptr, B2_ptr, C1_ptr, C2_ptr, cell, column, column_sign,
                columns, here, channel, sub, RULE, HAS_R, False, CHANNELS, N, K, TJ, ACC,
            )  # fmt: skip
            border = border_ptr + ((((scanned * (strips - 1) + strip) * rows + i) * (V * BD * SUB))[:, None] + lead)
            left = _load_planes(border - rows * V * (BD * SUB), here & (strip > 0), PLANES, K)
            wl, wt = _weights(i, strip < 0, RULE, ACC)
            below = ()
            slot = scratch + (r + 1) * (TJ * SAVED * LANES)
            for c in tl.static_range(TJ):
                wl_c, wt_c = wl, wt
                if c == 0:
                    wl_c, wt_c = _weights(i, strip == 0, RULE, ACC)
                down, left = _advance(line[c], rates, left, above[c], wl_c, wt_c, RULE, HAS_R, HELD, PRECISE)
                below = below + (down,)
                _store_planes(slot + c * SAVED * LANES, down, lane >= 0, PLANES, K)
                if RULE == 1:
                    _store_planes(slot + (c * SAVED + V) * LANES, left, lane >= 0, 1, K)
            above = below
        tl.debug_barrier()
        # Back over them.
        states = above
        for r_back in range(R):
            r = R - 1 - r_back
            i = chunk * R + r
            in_grid = going & (i < rows)
            here = ok & in_grid
            place = tl.where(row_sign > 0, i, rows - 1 - i)
            cell = (row * rows + place) * columns + first
            line = _inputs_of_row(
                x_ptr, dt1_ptr, dt2_ptr, r1_ptr, B1_ptr, B2_ptr, C1_ptr, C2_ptr, cell, column, column_sign,
                columns, here, channel, sub, RULE, HAS_R, True, CHANNELS, N, K, TJ, ACC,
            )  # fmt: skip
            at = (((scanned * (strips - 1) + strip - 1) * rows + i) * (V * BD * SUB))[:, None] + lead
            border = _load_planes(border_ptr + at, here & (strip > 0), PLANES, K)
            # [program, strip of a panel, row, lane of a strip, value]: read before it is written for the next panel
            own = (((program * S + own_strip) * rows + i) * (V * BD * SUB))[:, None] + lead
            right = _load_planes(dborder_ptr + own, here & (strip < strips - 1), PLANES, K)
            wl, wt = _weights(i, strip < 0, RULE, ACC)
            slot = scratch + r * (TJ * SAVED * LANES)
            over, next_under = (), ()
            own_dx, own_ddt1 = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
            own_ddt2, own_dr1 = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
            uppers, dys = (), ()  # before anything is stored, which later loads would wait for
            for c in tl.static_range(TJ):
                uppers = uppers + (_load_planes(slot + c * SAVED * LANES, lane >= 0, PLANES, K),)
                dy_at = dy_ptr + (cell + c * column_sign) * CHANNELS + channel
                dys = dys + (tl.load(dy_at, mask=here & (column + c < columns), other=0.0),)
            for c in tl.static_range(TJ - 1, -1, -1):
                wl_c, wt_c = wl, wt
                if c == 0:
                    wl_c, wt_c = _weights(i, strip == 0, RULE, ACC)
                over = (uppers[c],) + over
                left = border
                if c > 0:
                    if RULE == 1:
                        g_at = slot + ((TJ + c - 1) * SAVED + V) * LANES
                        left = _load_planes(g_at, lane >= 0, 1, K)
                    else:
                        left = states[c - 1]
                at_c = cell + c * column_sign
                dy = dys[c].to(ACC)
                right, up, outs, drates, dinto = _retreat(
                    line[c], dy, rates, left, uppers[c], right, under[c], wl_c, wt_c, RULE, HAS_R, HELD, PRECISE
                )
                next_under = (up,) + next_under
                dA1 += drates[0]
                if RULE != 1:
                    dA2 += drates[1]
                if HAS_C2:
                    dc2 += drates[2]
                if HAS_C3:
                    dc3 += drates[3]
                dD += dy * line[c][0]
                mine = sub == c % SUB
                dx = _over_states(outs[0], SUB)
                if HAS_D:
                    dx += skip * dy
                own_dx = tl.where(mine, dx, own_dx)
                own_ddt1 = tl.where(mine, _over_states(outs[1], SUB), own_ddt1)
                if RULE != 1:
                    own_ddt2 = tl.where(mine, _over_states(outs[2], SUB), own_ddt2)
                if HAS_R:
                    own_dr1 = tl.where(mine, _over_states(outs[3], SUB), own_dr1)
                if c % SUB == 0:
                    stored = here & (c + sub < min(c + SUB, TJ)) & (column + c + sub < columns)
                    out = (cell + (c + sub) * column_sign) * CHANNELS + channel
                    tl.store(dx_ptr + out, own_dx, mask=stored)
                    tl.store(ddt1_ptr + out, own_ddt1, mask=stored)
                    if RULE != 1:
                        tl.store(ddt2_ptr + out, own_ddt2, mask=stored)
                    if HAS_R:
                        tl.store(dr1_ptr + out, own_dr1, mask=stored)
                of_maps = dinto
                for plane in tl.static_range(PLANES):
                    of_maps = of_maps + (dy[:, None] * states[c][plane],)
                for m in tl.static_range(MAPS):
                    values = _over_channels(tl.where(ok[:, None], of_maps[m], 0.0), S, BD, SUB, K)
                    wanted = in_grid & (column + c < columns) & (lane // SUB % BD == 0)
                    place, wanted = _states_at(at_c * N, sub, wanted, N, K)
                    map_at = dmaps_row + m * map_size + place
                    if PASSES == 1:  # noqa: SIM114 - known when it is compiled
                        tl.store(map_at, values, mask=wanted)
                    elif again == 0:
                        tl.store(map_at, values, mask=wanted)
                    else:
                        # what the same program stored, so atomic only to spare it the wait for a load
                        tl.atomic_add(map_at, values, mask=wanted, sem="relaxed")
            under, states = next_under, over
            out = (((program * S + (own_strip + S - 1) % S) * rows + i) * (V * BD * SUB))[:, None] + lead
            _store_planes(dborder_ptr + out, right, here & (strip > 0), PLANES, K)
        tl.debug_barrier()
    # [batch, strip, channel, rate, n]
    out, wanted = _states_at(((row * S + own_strip) * CHANNELS + channel) * (RATES * N), sub, ok, N, K)
    tl.store(drates_ptr + out, dA1, mask=wanted)
    if RULE != 1:
        tl.store(drates_ptr + out + N, dA2, mask=wanted)
    if RULE == 2:
        tl.store(drates_ptr + out + 2 * N, dc2, mask=wanted)
        tl.store(drates_ptr + out + 3 * N, dc3, mask=wanted)
    tl.store(dD_ptr + (row * S + own_strip) * CHANNELS + channel, dD, mask=ok & (sub == 0))


@triton.jit
def _sum_of_rows(ptr, rows, stride, column, ok, ROWS: tl.constexpr, ACC: tl.constexpr):
    """The sum of `rows` rows, `stride` apart, at the columns given."""
    total = tl.zeros(column.shape, ACC)
    for first in range(0, rows, ROWS):
        row = (first + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & ok[None, :]
        total += tl.sum(tl.load(ptr + row[:, None] * stride + column[None, :], mask=mask, other=0.0), axis=0)
    return total


@quick
@triton.jit(do_not_specialize=["parts", "map_size", "rows"])
def _grid_scan_sums_kernel(
    dmaps_ptr, drates_ptr, dD_ptr, dB1_ptr, dB2_ptr, dC1_ptr, dC2_ptr, dA1_ptr, dA2_ptr, dc2_ptr, dc3_ptr, sum_D_ptr,
    parts, map_size, rows,
    RULE: tl.constexpr, HAS_C2: tl.constexpr, HAS_C3: tl.constexpr, HAS_D: tl.constexpr, CHANNELS: tl.constexpr,
    N: tl.constexpr, MANY: tl.constexpr, PARTS: tl.constexpr, FEW: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add the partial sums: of maps over `parts` blocks of channels, of rates and D over the `rows` rows of a group.

    The first programs take MANY numbers of a map each, the next ones FEW of the rates of a group, the last ones FEW of
    its D.
    """
    RATES: tl.constexpr = 1 if RULE == 1 else 2 if RULE == 0 else 4
    INTO: tl.constexpr = 1 if RULE == 1 else 2
    MAPS: tl.constexpr = INTO + (2 if RULE == 2 else 1)
    WIDTH: tl.constexpr = CHANNELS * RATES * N
    program = tl.program_id(0)
    of_map = tl.cdiv(map_size, MANY)
    if program < MAPS * of_map:
        which = program // of_map
        number = (program % of_map).to(tl.int64) * MANY + tl.arange(0, MANY)
        wanted = number < map_size
        size = map_size.to(tl.int64)
        dmap = _sum_of_rows(dmaps_ptr + which * size, parts, MAPS * size, number, wanted, PARTS, ACC)
        tl.store(dB1_ptr + number, dmap, mask=wanted & (which == 0))
        if RULE != 1:
            tl.store(dB2_ptr + number, dmap, mask=wanted & (which == 1))
        tl.store(dC1_ptr + number, dmap, mask=wanted & (which == INTO))
        if RULE == 2:
            tl.store(dC2_ptr + number, dmap, mask=wanted & (which == INTO + 1))
    else:
        blocks: tl.constexpr = (WIDTH + FEW - 1) // FEW
        blocks_of_D: tl.constexpr = (CHANNELS + FEW - 1) // FEW
        place = program - MAPS * of_map
        group, block = (place // (blocks + blocks_of_D)).to(tl.int64), place % (blocks + blocks_of_D)
        if block < blocks:
            at = block * FEW + tl.arange(0, FEW)
            ok = at < WIDTH
            drate = _sum_of_rows(drates_ptr + group * rows * WIDTH, rows, WIDTH, at, ok, ROWS, ACC)
            out = (group * CHANNELS + at // (RATES * N)) * N + at % N
            rate = at // N % RATES
            tl.store(dA1_ptr + out, drate, mask=ok & (rate == 0))
            if RULE != 1:
                tl.store(dA2_ptr + out, drate, mask=ok & (rate == 1))
            if HAS_C2:
                tl.store(dc2_ptr + out, drate, mask=ok & (rate == 2))
            if HAS_C3:
                tl.store(dc3_ptr + out, drate, mask=ok & (rate == 3))
        elif HAS_D:
            channel = (block - blocks) * FEW + tl.arange(0, FEW)
            inside = channel < CHANNELS
            dD = _sum_of_rows(dD_ptr + group * rows * CHANNELS, rows, CHANNELS, channel, inside, ROWS, ACC)
            tl.store(sum_D_ptr + group * CHANNELS + channel, dD, mask=inside)
