"""The kernels of `dag_scan`; equations and schedules in triton_impl.py."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _add_parents(
    state, begin, end, nbr_ptr, edge_ptr, weight_ptr, states_ptr, column, ok,
    HEADS: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, SIZE: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Add a_e S_parent for the edges [begin, end) of each node of a tile; `column` (channel, state) of each lane."""
    channel, n = column
    head = channel // HEADDIM
    offset = (channel * SIZE + n)[None, :]
    for first in range(0, tl.max(end - begin, axis=0), AT_ONCE):
        rows, weights = (), ()  # of several edges before any is used, so that their latencies overlap
        for step in tl.static_range(AT_ONCE):
            at = begin + first + step
            here = at < end
            parent = tl.load(nbr_ptr + at, mask=here, other=0).to(tl.int64)
            edge = tl.load(edge_ptr + at, mask=here, other=0).to(tl.int64)
            both = here[:, None] & ok[None, :]
            weights = weights + (tl.load(weight_ptr + edge[:, None] * HEADS + head[None, :], mask=both, other=0.0),)
            rows = rows + (tl.load(states_ptr + parent[:, None] * (COLUMNS * SIZE) + offset, mask=both, other=0.0),)
        for step in tl.static_range(AT_ONCE):
            state += weights[step] * rows[step]
    return state


@triton.jit
def _lanes(first_n, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
           SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Channel, state in this block of states, offset in a row of B and C, and validity of each lane."""
    lane = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    channel, n = lane // PADDED, lane % PADDED
    group = channel // (HEADDIM * (HEADS // GROUPS))
    return channel, n, group, (channel < COLUMNS) & (n < SIZE)


@triton.jit
def _node_tile(
    position, position_ok, x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr, states_ptr,
    y_ptr, first_n, N, HEADS: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """States and outputs of a tile of nodes whose parents are done."""
    channel, n, group, ok = _lanes(first_n, HEADDIM, COLUMNS, HEADS, GROUPS, SIZE, PADDED, BLOCK_R)
    node = tl.load(perm_ptr + position, mask=position_ok, other=0).to(tl.int64)
    both = position_ok[:, None] & ok[None, :]
    x = tl.load(x_ptr + node[:, None] * COLUMNS + channel[None, :], mask=both, other=0.0).to(ACC)
    map_at = node[:, None] * (GROUPS * N) + (group * N + first_n + n)[None, :]
    state = x * tl.load(key_ptr + map_at, mask=both, other=0.0).to(ACC)
    begin = tl.load(row_ptr + position, mask=position_ok, other=0)
    end = tl.load(row_ptr + position + 1, mask=position_ok, other=0)
    state = _add_parents(
        state,
        begin,
        end,
        nbr_ptr,
        edge_ptr,
        weight_ptr,
        states_ptr,
        (channel, n),
        ok,
        HEADS,
        HEADDIM,
        COLUMNS,
        SIZE,
        4,
    )
    at = position[:, None] * (COLUMNS * SIZE) + (channel * SIZE + n)[None, :]
    tl.store(states_ptr + at, state, mask=both)
    read = state * tl.load(reader_ptr + map_at, mask=both, other=0.0).to(ACC)
    ROWS: tl.constexpr = state.shape[0]
    y = tl.sum(tl.reshape(read, [ROWS, BLOCK_R // PADDED, PADDED]), axis=2)
    out_channel = tl.program_id(1) * (BLOCK_R // PADDED) + tl.arange(0, BLOCK_R // PADDED)
    y_at = y_ptr + node[:, None] * COLUMNS + out_channel[None, :]
    y_ok = position_ok[:, None] & (out_channel < COLUMNS)[None, :]
    if ADD:
        y += tl.load(y_at, mask=y_ok, other=0.0).to(ACC)
    tl.store(y_at, y, mask=y_ok)


@triton.jit(do_not_specialize=["first", "last", "first_n", "N"])
def _dag_level_kernel(
    x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr, states_ptr, y_ptr,
    first, last, first_n, N,
    HEADS: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One level, positions [first, last)."""
    position = first + tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    _node_tile(
        position, position < last, x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr,
        states_ptr, y_ptr, first_n, N, HEADS, HEADDIM, COLUMNS, GROUPS, SIZE, PADDED, ADD, ACC, BLOCK_R,
    )  # fmt: skip


@triton.jit(do_not_specialize=["first_n", "N"])
def _dag_walk_kernel(
    x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr, states_ptr, y_ptr,
    graph_ptr, places_ptr, first_n, N,
    HEADS: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, BACKWARDS: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """All nodes of one graph, in order."""
    graph = tl.program_id(0)
    begin = tl.load(graph_ptr + graph)
    end = tl.load(graph_ptr + graph + 1)
    for step in range(end - begin):
        place = end - 1 - step if BACKWARDS else begin + step
        position = tl.load(places_ptr + place + tl.arange(0, 1))
        _node_tile(
            position, position >= 0, x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr,
            states_ptr, y_ptr, first_n, N, HEADS, HEADDIM, COLUMNS, GROUPS, SIZE, PADDED, ADD, ACC, BLOCK_R,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit(do_not_specialize=["nodes", "first_n", "N"])
def _dag_maps_kernel(
    x_ptr, dy_ptr, perm_ptr, states_ptr, gradients_ptr, dB_ptr, dC_ptr, nodes, first_n, N,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    ACC: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """dB and dC of a tile of nodes and one group of WIDTH channels."""
    group = tl.program_id(1)
    position = tl.program_id(0).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)
    position_ok = position < nodes
    node = tl.load(perm_ptr + position, mask=position_ok, other=0).to(tl.int64)
    n = tl.arange(0, PADDED)
    dB = tl.zeros([BLOCK_V, PADDED], ACC)
    dC = tl.zeros([BLOCK_V, PADDED], ACC)
    for start in range(0, WIDTH, BLOCK_P):
        inside = start + tl.arange(0, BLOCK_P)
        channel = group * WIDTH + inside
        row_ok = position_ok[:, None, None] & (inside < WIDTH)[None, :, None]
        ok = row_ok & (n < SIZE)[None, None, :]
        at = (position[:, None] * COLUMNS + channel[None, :])[:, :, None] * SIZE + n[None, None, :]
        given = (node[:, None] * COLUMNS + channel[None, :])[:, :, None]
        x = tl.load(x_ptr + given, mask=row_ok, other=0.0).to(ACC)
        dy = tl.load(dy_ptr + given, mask=row_ok, other=0.0).to(ACC)
        dB += tl.sum(x * tl.load(gradients_ptr + at, mask=ok, other=0.0), axis=1)
        dC += tl.sum(dy * tl.load(states_ptr + at, mask=ok, other=0.0), axis=1)
    out = node[:, None] * (GROUPS * N) + (group * N + first_n + n)[None, :]
    out_ok = position_ok[:, None] & (n < SIZE)[None, :]
    tl.store(dB_ptr + out, dB, mask=out_ok)
    tl.store(dC_ptr + out, dC, mask=out_ok)


@triton.jit(do_not_specialize=["edges"])
def _dag_edges_kernel(
    source_ptr, target_ptr, edge_ptr, states_ptr, gradients_ptr, dweight_ptr, edges,
    HEADS: tl.constexpr, ROW: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """<S_u, G_v> over the ROW states of one head, for a tile of edges."""
    head = tl.program_id(1)
    edge = tl.program_id(0).to(tl.int64) * BLOCK_E + tl.arange(0, BLOCK_E)
    edge_ok = edge < edges
    source = tl.load(source_ptr + edge, mask=edge_ok, other=0).to(tl.int64)
    target = tl.load(target_ptr + edge, mask=edge_ok, other=0).to(tl.int64)
    total = tl.zeros([BLOCK_E], ACC)
    for start in range(0, ROW, BLOCK_R):
        column = start + tl.arange(0, BLOCK_R)
        ok = edge_ok[:, None] & (column < ROW)[None, :]
        offset = (head * ROW + column)[None, :]
        state = tl.load(states_ptr + source[:, None] * (HEADS * ROW) + offset, mask=ok, other=0.0)
        gradient = tl.load(gradients_ptr + target[:, None] * (HEADS * ROW) + offset, mask=ok, other=0.0)
        total += tl.sum(state * gradient, axis=1)
    out = dweight_ptr + tl.load(edge_ptr + edge, mask=edge_ok, other=0).to(tl.int64) * HEADS + head
    if ADD:
        total += tl.load(out, mask=edge_ok, other=0.0)
    tl.store(out, total, mask=edge_ok)
