"""The kernels of `dag_scan`; equations and schedules in triton_impl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick


@triton.jit
def _lanes(tile, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, HEADS: tl.constexpr, GROUPS: tl.constexpr,
           SIZE: tl.constexpr, PADDED: tl.constexpr, BLOCK_R: tl.constexpr):  # fmt: skip
    """Channel, state in this block of states, group and validity of each lane."""
    lane = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    channel, n = lane // PADDED, lane % PADDED
    group = channel // (HEADDIM * (HEADS // GROUPS))
    return channel, n, group, (channel < COLUMNS) & (n < SIZE)


@triton.jit
def _nodes(
    position, last, tile, x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr, states_ptr,
    y_ptr, first_n, N, HEADS: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr,
    SIZE: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr,
    NODES: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """States and outputs of NODES nodes whose parents are done, and of a tile of columns.

    Indices are scalars, which all lanes load alike: vectors of them would be exchanged between lanes at each edge.
    """
    channel, n, group, ok = _lanes(tile, HEADDIM, COLUMNS, HEADS, GROUPS, SIZE, PADDED, BLOCK_R)
    head = channel // HEADDIM
    offset = channel * SIZE + n
    nodes, heres, edges, ends, states = (), (), (), (), ()
    longest = 0
    for v in tl.static_range(NODES):
        here = position + v < last
        node = tl.load(perm_ptr + position + v, mask=here, other=0)
        begin = tl.load(row_ptr + position + v, mask=here, other=0)
        end = tl.load(row_ptr + position + v + 1, mask=here, other=0)
        x = tl.load(x_ptr + node * COLUMNS + channel, mask=ok & here, other=0.0).to(ACC)
        key = tl.load(key_ptr + node * (GROUPS * N) + group * N + first_n + n, mask=ok & here, other=0.0).to(ACC)
        nodes, heres, edges, ends, states = (
            nodes + (node,), heres + (here,), edges + (begin,), ends + (end,), states + (x * key,),
        )  # fmt: skip
        longest = tl.maximum(longest, (end - begin).to(tl.int32))
    for first in range(0, longest, AT_ONCE):
        rows, weights = (), ()  # of several edges before any is used, so that their latencies overlap
        for v in tl.static_range(NODES):
            for step in tl.static_range(AT_ONCE):
                at = edges[v] + first + step
                here = at < ends[v]
                parent = tl.load(nbr_ptr + at, mask=here, other=0)
                edge = tl.load(edge_ptr + at, mask=here, other=0)
                weights = weights + (tl.load(weight_ptr + edge * HEADS + head, mask=ok & here, other=0.0),)
                row = states_ptr + parent * (COLUMNS * SIZE) + offset
                rows = rows + (tl.load(row, mask=ok & here, other=0.0),)
        new = ()
        for v in tl.static_range(NODES):
            state = states[v]
            for step in tl.static_range(AT_ONCE):
                state += weights[v * AT_ONCE + step] * rows[v * AT_ONCE + step]
            new = new + (state,)
        states = new
    out_channel = tile * (BLOCK_R // PADDED) + tl.arange(0, BLOCK_R // PADDED)
    for v in tl.static_range(NODES):
        here = heres[v]
        tl.store(states_ptr + (position + v) * (COLUMNS * SIZE) + offset, states[v], mask=ok & here)
        reader = reader_ptr + nodes[v] * (GROUPS * N) + group * N + first_n + n
        read = states[v] * tl.load(reader, mask=ok & here, other=0.0).to(ACC)
        y = tl.sum(tl.reshape(read, [BLOCK_R // PADDED, PADDED]), axis=1) if PADDED > 1 else read
        y_at, y_ok = y_ptr + nodes[v] * COLUMNS + out_channel, here & (out_channel < COLUMNS)
        if ADD:
            y += tl.load(y_at, mask=y_ok, other=0.0).to(ACC)
        tl.store(y_at, y, mask=y_ok)


@quick
@triton.jit(do_not_specialize=["first", "last", "first_n", "N"])
def _dag_level_kernel(
    x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr, states_ptr, y_ptr,
    first, last, first_n, N,
    HEADS: tl.constexpr, HEADDIM: tl.constexpr, COLUMNS: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr, ADD: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, NODES: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """One level, positions [first, last)."""
    position = first + tl.program_id(0).to(tl.int64) * NODES
    _nodes(
        position, last, tl.program_id(1), x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr,
        states_ptr, y_ptr, first_n, N, HEADS, HEADDIM, COLUMNS, GROUPS, SIZE, PADDED, ADD, ACC, BLOCK_R, NODES,
        AT_ONCE,
    )  # fmt: skip


@quick
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
        position = tl.load(places_ptr + place)
        _nodes(
            position, position + 1, tl.program_id(1), x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr,
            nbr_ptr, edge_ptr, states_ptr, y_ptr, first_n, N, HEADS, HEADDIM, COLUMNS, GROUPS, SIZE, PADDED, ADD, ACC,
            BLOCK_R, 1, 4,
        )  # fmt: skip
        tl.debug_barrier()


@quick
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


@quick
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
