"""The backward kernels of the grid scans; what they compute and how is in triton_impl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick
from .triton_kernels import (
    _LOG2_E,
    _added,
    _advance,
    _inputs_of_row,
    _less_one,
    _line_of_zeros,
    _load_lanes,
    _over_channels,
    _over_states,
    _rates_of,
    _side_by_side,
    _store_lanes,
    _store_states,
    _unless,
    _weights,
    _zeros,
)


@triton.jit
def _retreat(
    cell, dy, rates, left, above, right, under, wl, wt,
    RULE: tl.constexpr, HAS_R: tl.constexpr, HELD: tl.constexpr, K: tl.constexpr, PRECISE: tl.constexpr,
):  # fmt: skip
    """Adjoint of `_advance`: gradients to the left and up; of x, dt1, dt2, r1 before their sum over n; of the rates;
    and of the input maps before their sum over channels."""
    x, dt1, dt2, r1, B1, B2, C1, C2 = cell
    A1, A2, c2, c3 = rates
    s1, s2, sr = dt1 * _LOG2_E, dt2 * _LOG2_E, r1 * _LOG2_E
    u1, u2 = dt1 * x, dt2 * x
    to_left, to_above, to_left_2, to_above_2 = (), (), (), ()
    dA1, dA2, dc2, dc3, dB1, dB2 = (), (), (), (), (), ()
    dx, ddt1, ddt2, dr1 = x * 0.0, x * 0.0, x * 0.0, x * 0.0
    for k in tl.static_range(K):
        if RULE == 0:
            G = C1[k] * dy + right[k] + under[k]
            G1, G2 = wl * G, wt * G
            X1 = G1 + _less_one(dt1, s1, A1[k], PRECISE) * G1
            X2 = G2 + _less_one(dt2, s2, A2[k], PRECISE) * G2
            e1, e2 = X1 * left[k], X2 * above[k]
            p1, p2 = B1[k] * G1, B2[k] * G2
            dx += dt1 * p1 + dt2 * p2
            ddt1 += A1[k] * e1 + x * p1
            ddt2 += A2[k] * e2 + x * p2
            dA1, dA2 = dA1 + (dt1 * e1,), dA2 + (dt2 * e2,)
            dB1, dB2 = dB1 + (u1 * G1,), dB2 + (u2 * G2,)
            to_left, to_above = to_left + (X1,), to_above + (X2,)
        elif RULE == 1:
            H = C1[k] * dy + under[k]
            G = H + right[k]
            gate = _less_one(dt1, s1, A1[k], PRECISE)
            X1, X2 = G + gate * G, H + gate * H
            e = X1 * left[k] + X2 * above[k]
            p = B1[k] * G
            dx += dt1 * p
            ddt1 += A1[k] * e + x * p
            dA1, dB1 = dA1 + (dt1 * e,), dB1 + (u1 * G,)
            to_left, to_above = to_left + (X1,), to_above + (X2,)
        else:
            L1 = C1[k] * dy + right[k] + under[k]
            L2 = C2[k] * dy + right[K + k] + under[K + k]
            gate1 = _less_one(r1, sr, A1[k], PRECISE)
            gate2 = _less_one(dt2, s2, A2[k], PRECISE)
            X1, X2 = L1 + gate1 * L1, L2 + gate2 * L2
            e1 = X1 * (left[k] - c2[k] * left[K + k])
            e2 = X2 * (above[K + k] - c3[k] * above[k])
            dc2, dc3 = dc2 + (-gate1 * left[K + k] * L1,), dc3 + (-gate2 * above[k] * L2,)
            p1, p2 = B1[k] * L1, B2[k] * L2
            in_A1, in_A2 = r1 * e1, dt2 * e2
            dr1 += A1[k] * e1
            ddt2 += A2[k] * e2
            if HELD:
                held1 = gate1
                if HAS_R:
                    held1 = _less_one(dt1, s1, A1[k], PRECISE)
                w1, w2 = held1 / A1[k], gate2 / A2[k]
                dx += w1 * p1 + w2 * p2
                ddt1 += x * p1 * (1.0 + held1)
                ddt2 += x * p2 * (1.0 + gate2)
                in_A1 += x * p1 * (dt1 * (1.0 + held1) - w1) / A1[k]
                in_A2 += x * p2 * (dt2 * (1.0 + gate2) - w2) / A2[k]
                dB1, dB2 = dB1 + (w1 * x * L1,), dB2 + (w2 * x * L2,)
            else:
                dx += dt1 * p1 + dt2 * p2
                ddt1 += x * p1
                ddt2 += x * p2
                dB1, dB2 = dB1 + (u1 * L1,), dB2 + (u2 * L2,)
            dA1, dA2 = dA1 + (in_A1,), dA2 + (in_A2,)
            to_left, to_left_2 = to_left + (X1,), to_left_2 + (-c2[k] * gate1 * L1,)
            to_above, to_above_2 = to_above + (-c3[k] * gate2 * L2,), to_above_2 + (X2,)
    if RULE == 2 and not HAS_R:
        ddt1 += dr1
    return to_left + to_left_2, to_above + to_above_2, (dx, ddt1, ddt2, dr1), (dA1, dA2, dc2, dc3), dB1 + dB2


@triton.jit
def _add_to_states(ptr, values, sub, ok, N: tl.constexpr, K: tl.constexpr):
    """`_store_states` on top of what one and the same program stored: atomic only to spare it the wait for a load."""
    if K == 1:
        tl.atomic_add(ptr + sub, values[0], mask=ok & (sub < N), sem="relaxed")
    else:
        n = sub[:, None] * K + tl.arange(0, K)[None, :]
        tl.atomic_add(ptr[:, None] + n, _side_by_side(values, K), mask=ok[:, None] & (n < N), sem="relaxed")


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
    V: tl.constexpr = 2 * K if RULE == 2 else K
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
    own_strip, sub, lead = lane // (BD * SUB), lane % SUB, lane % (BD * SUB)
    scratch = scratch_ptr + program * ((R + 1) * TJ * SAVED * LANES) + lane
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
    dA1, dA2, dc2, dc3 = _zeros(lane, K, ACC), _zeros(lane, K, ACC), _zeros(lane, K, ACC), _zeros(lane, K, ACC)
    dD = tl.zeros([LANES], ACC)
    under = _line_of_zeros(lane, TJ, V, ACC)
    for t in range(panels * period + S - 1):
        turn = t - (S - 1 - own_strip)
        done = tl.maximum(turn, 0) // period  # panels
        back = turn - done * period
        panel, chunk = panels - 1 - done, chunks - 1 - back
        going = (turn >= 0) & (done < panels) & (back < chunks)
        strip = panel * S + own_strip
        column = strip * TJ
        first = tl.where(column_sign > 0, column, columns - 1 - column)
        under = _unless(back == 0, under, TJ, V)
        live = ok & going
        # The states of the chunk's rows, from the row above it and the column to its left.
        keep = kept_ptr + (((scanned * (chunks - 1) + chunk - 1) * panels + panel) * TJ * V) * LANES + lane
        above = ()
        for c in tl.static_range(TJ):
            states = _load_lanes(keep + c * V * LANES, LANES, live & (chunk > 0), V)
            _store_lanes(scratch + c * SAVED * LANES, states, LANES, lane >= 0, V)
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
            border = border_ptr + (((scanned * (strips - 1) + strip) * rows + i) * V) * (BD * SUB) + lead
            left = _load_lanes(border - rows * V * (BD * SUB), BD * SUB, here & (strip > 0), V)
            wl, wt = _weights(i, strip < 0, RULE, ACC)
            below = ()
            slot = scratch + (r + 1) * (TJ * SAVED * LANES)
            for c in tl.static_range(TJ):
                wl_c, wt_c = wl, wt
                if c == 0:
                    wl_c, wt_c = _weights(i, strip == 0, RULE, ACC)
                down, left = _advance(line[c], rates, left, above[c], wl_c, wt_c, RULE, HAS_R, HELD, K, PRECISE)
                below = below + (down,)
                _store_lanes(slot + c * SAVED * LANES, down, LANES, lane >= 0, V)
                if RULE == 1:
                    _store_lanes(slot + (c * SAVED + V) * LANES, left, LANES, lane >= 0, K)
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
            at = (((scanned * (strips - 1) + strip) * rows + i) * V) * (BD * SUB) + lead
            border = _load_lanes(border_ptr + at - rows * V * (BD * SUB), BD * SUB, here & (strip > 0), V)
            # [program, strip of a panel, row, value, lane of a strip]: read before it is written for the next panel
            own = (((program * S + own_strip) * rows + i) * V) * (BD * SUB) + lead
            right = _load_lanes(dborder_ptr + own, BD * SUB, here & (strip < strips - 1), V)
            wl, wt = _weights(i, strip < 0, RULE, ACC)
            slot = scratch + r * (TJ * SAVED * LANES)
            over, next_under = (), ()
            own_dx, own_ddt1 = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
            own_ddt2, own_dr1 = tl.zeros([LANES], ACC), tl.zeros([LANES], ACC)
            uppers, dys = (), ()  # before anything is stored, which later loads would wait for
            for c in tl.static_range(TJ):
                uppers = uppers + (_load_lanes(slot + c * SAVED * LANES, LANES, lane >= 0, V),)
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
                        left = _load_lanes(g_at, LANES, lane >= 0, K)
                    else:
                        left = states[c - 1]
                at_c = cell + c * column_sign
                dy = dys[c].to(ACC)
                right, up, outs, drates, dinto = _retreat(
                    line[c], dy, rates, left, uppers[c], right, under[c], wl_c, wt_c, RULE, HAS_R, HELD, K, PRECISE
                )
                next_under = (up,) + next_under
                dA1 = _added(dA1, drates[0], K)
                if RULE != 1:
                    dA2 = _added(dA2, drates[1], K)
                if HAS_C2:
                    dc2 = _added(dc2, drates[2], K)
                if HAS_C3:
                    dc3 = _added(dc3, drates[3], K)
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
                for k in tl.static_range(V):
                    of_maps = of_maps + (dy * states[c][k],)
                for m in tl.static_range(MAPS):
                    values = ()
                    for k in tl.static_range(K):
                        value = tl.where(ok, of_maps[m * K + k], 0.0)
                        values = values + (_over_channels(value, S, BD, SUB),)
                    wanted = in_grid & (column + c < columns) & (lane // SUB % BD == 0)
                    map_at = dmaps_row + m * map_size + at_c * N
                    if PASSES == 1:  # noqa: SIM114 - known when it is compiled
                        _store_states(map_at, values, sub, wanted, N, K)
                    elif again == 0:
                        _store_states(map_at, values, sub, wanted, N, K)
                    else:
                        _add_to_states(map_at, values, sub, wanted, N, K)
            under, states = next_under, over
            out = (((program * S + (own_strip + S - 1) % S) * rows + i) * V) * (BD * SUB) + lead
            _store_lanes(dborder_ptr + out, right, BD * SUB, here & (strip > 0), V)
        tl.debug_barrier()
    # [batch, strip, channel, rate, n]
    out = ((row * S + own_strip) * CHANNELS + channel) * (RATES * N) + sub * K
    for k in tl.static_range(K):
        wanted = ok & (sub * K + k < N)
        tl.store(drates_ptr + out + k, dA1[k], mask=wanted)
        if RULE != 1:
            tl.store(drates_ptr + out + N + k, dA2[k], mask=wanted)
        if RULE == 2:
            tl.store(drates_ptr + out + 2 * N + k, dc2[k], mask=wanted)
            tl.store(drates_ptr + out + 3 * N + k, dc3[k], mask=wanted)
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
