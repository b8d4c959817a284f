"""The kernel of `dag_scan` that takes nodes in order in one launch; see triton_impl.py."""

from __future__ import annotations

import triton
import triton.language as tl

from ..triton_utils import quick


@triton.jit
def _tile(
    tile, first_n, N, HEADS: tl.constexpr, HEADDIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of WIDTH numbers of ROWS heads of a node: head; places in x, in the states and in a map; validity."""
    ACROSS: tl.constexpr = (HEADDIM * PADDED + WIDTH - 1) // WIDTH
    head = tile // ACROSS * ROWS + tl.arange(0, ROWS)[:, None]
    lane = tile % ACROSS * WIDTH + tl.arange(0, WIDTH)[None, :]
    channel, n = lane // PADDED, lane % PADDED
    ok = (head < HEADS) & (lane < HEADDIM * PADDED) & (n < SIZE)
    in_x = head * HEADDIM + channel
    if SIZE == PADDED:
        in_states = head * (HEADDIM * SIZE) + lane
    else:
        in_states = head * (HEADDIM * SIZE) + channel * SIZE + n
    in_map = head // (HEADS // GROUPS) * N + first_n
    map_ok = head < HEADS
    if PADDED > 1:
        in_map, map_ok = in_map + n, ok
    return head, in_x, in_states, in_map, ok, map_ok


@triton.jit
def _wait(done_ptr, nbr_ptr, first, end, COUNT: tl.constexpr):
    """Wait until the states of COUNT parents are there."""
    at = first + tl.arange(0, COUNT)
    here = at < end
    flags = done_ptr + tl.load(nbr_ptr + at, mask=here, other=0)
    missing = 1
    while missing > 0:
        done = tl.atomic_add(flags, 0, mask=here, sem="acquire")
        missing = tl.sum(tl.where(here, 1 - done, 0), axis=0)
    tl.debug_barrier()


@triton.jit
def _node(
    tile, position, node, begin, end, x, key, reader, weight_ptr, nbr_ptr, edge_ptr, states_ptr, y_ptr, done_ptr,
    HEADS: tl.constexpr, HEADDIM: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr, WAITING: tl.constexpr,
):  # fmt: skip
    """State and output of a node, a tile of columns of them, once its parents are done.

    Indices are scalars, which all lanes load alike: vectors of them would be exchanged between lanes at each edge.
    """
    row_size: tl.constexpr = HEADS * HEADDIM * SIZE
    head, in_x, in_states, _in_map, ok, _map_ok = _tile(tile, 0, 0, HEADS, HEADDIM, 1, SIZE, PADDED, ROWS, WIDTH)
    state = x.to(ACC) * key.to(ACC)
    for first in range(begin, end, AT_ONCE):
        places, weights = (), ()  # of several edges before any is used, so that their latencies overlap
        for step in tl.static_range(AT_ONCE):
            at = first + step
            places = places + (tl.load(nbr_ptr + at, mask=at < end, other=0),)
            edge = tl.load(edge_ptr + at, mask=at < end, other=0)
            weight = tl.load(weight_ptr + edge * HEADS + head, mask=(head < HEADS) & (at < end), other=0.0)
            weights = weights + (weight,)
        if (first - begin) % WAITING == 0:
            _wait(done_ptr, nbr_ptr, first, end, WAITING)
        rows = ()
        for step in tl.static_range(AT_ONCE):
            row = states_ptr + places[step] * row_size + in_states
            # Past the cache of the multiprocessor, which may hold what was there before.
            rows = rows + (tl.load(row, mask=ok & (first + step < end), other=0.0, cache_modifier=".cg"),)
        for step in tl.static_range(AT_ONCE):
            state += weights[step] * rows[step]
    tl.store(states_ptr + position * row_size + in_states, state, mask=ok)
    tl.debug_barrier()
    tl.atomic_xchg(done_ptr + position, 1, sem="release")
    y, y_ok = state * reader.to(ACC), ok
    if PADDED > 1:
        y = tl.sum(tl.reshape(tl.where(ok, y, 0.0), [ROWS, WIDTH // PADDED, PADDED]), axis=2)
        _head, in_x, _in_states, _in_map, y_ok, _map_ok = _tile(
            tile, 0, 0, HEADS, HEADDIM, 1, 1, 1, ROWS, WIDTH // PADDED
        )
    y_at = y_ptr + node * (HEADS * HEADDIM) + in_x
    if ADD:
        y += tl.load(y_at, mask=y_ok, other=0.0).to(ACC)
    tl.store(y_at, y, mask=y_ok)


@triton.jit
def _place(tile, step, nodes, perm_ptr, row_ptr, TILES: tl.constexpr, BACKWARDS: tl.constexpr):
    """Whether there is this item; its position, node, and first and last edge."""
    here = step < nodes if TILES == 1 else tile < TILES
    position = (nodes - 1 - step if BACKWARDS else step).to(tl.int64)
    node = tl.load(perm_ptr + position, mask=here, other=0)
    begin = tl.load(row_ptr + position, mask=here, other=0)
    end = tl.load(row_ptr + position + 1, mask=here, other=0)
    return here, position, node, begin, end


@triton.jit
def _inputs(
    tile, here, node, x_ptr, key_ptr, reader_ptr, first_n, N, HEADS: tl.constexpr, HEADDIM: tl.constexpr,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What a node's tile takes of x and of its two maps."""
    _head, in_x, _in_states, in_map, ok, map_ok = _tile(
        tile, first_n, N, HEADS, HEADDIM, GROUPS, SIZE, PADDED, ROWS, WIDTH
    )
    at = node * (GROUPS * N) + in_map
    x = tl.load(x_ptr + node * (HEADS * HEADDIM) + in_x, mask=ok & here, other=0.0)
    key = tl.load(key_ptr + at, mask=map_ok & here, other=0.0)
    return x, key, tl.load(reader_ptr + at, mask=map_ok & here, other=0.0)


@triton.jit
def _following(tile, step, nodes, TILES: tl.constexpr):
    """The item after this one of the same program."""
    step += tl.num_programs(0)
    if TILES > 1:
        tile += step // nodes
        step = step % nodes
    return tile, step


@quick
@triton.jit(do_not_specialize=["nodes", "first_n", "N"])
def _dag_nodes_kernel(
    x_ptr, key_ptr, reader_ptr, weight_ptr, perm_ptr, row_ptr, nbr_ptr, edge_ptr, states_ptr, y_ptr, done_ptr,
    nodes, first_n, N,
    HEADS: tl.constexpr, HEADDIM: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, PADDED: tl.constexpr,
    ADD: tl.constexpr, ACC: tl.constexpr, BACKWARDS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr, WAITING: tl.constexpr,
):  # fmt: skip
    """All nodes in order, tile of columns after tile of columns, dealt out to programs that all run at once.

    A node waits for its parents alone, each of which says in `done_ptr` (tiles, nodes), zeros before, that it is done:
    none waits for one behind it in the order, so that the first of those that are not done waits for none.
    """
    TILES: tl.constexpr = (HEADDIM * PADDED + WIDTH - 1) // WIDTH * ((HEADS + ROWS - 1) // ROWS)
    program = tl.program_id(0)
    tile, step = program // nodes, program % nodes
    # Indices are fetched two items ahead, and what is found by them one item ahead.
    here, position, node, begin, end = _place(tile, step, nodes, perm_ptr, row_ptr, TILES, BACKWARDS)
    x, key, reader = _inputs(
        tile if TILES > 1 else 0, here, node, x_ptr, key_ptr, reader_ptr, first_n, N, HEADS, HEADDIM, GROUPS, SIZE,
        PADDED, ROWS, WIDTH,
    )  # fmt: skip
    next_tile, next_step = _following(tile, step, nodes, TILES)
    here, next_position, next_node, next_begin, next_end = _place(
        next_tile, next_step, nodes, perm_ptr, row_ptr, TILES, BACKWARDS
    )
    for _ in range(program.to(tl.int64), nodes.to(tl.int64) * TILES, tl.num_programs(0).to(tl.int64)):
        after_tile, after_step = _following(next_tile, next_step, nodes, TILES)
        after = _place(after_tile, after_step, nodes, perm_ptr, row_ptr, TILES, BACKWARDS)
        next_x, next_key, next_reader = _inputs(
            next_tile if TILES > 1 else 0, here, next_node, x_ptr, key_ptr, reader_ptr, first_n, N, HEADS, HEADDIM,
            GROUPS, SIZE, PADDED, ROWS, WIDTH,
        )  # fmt: skip
        _node(
            tile if TILES > 1 else 0, position, node, begin, end, x, key, reader, weight_ptr, nbr_ptr, edge_ptr,
            states_ptr, y_ptr, done_ptr + (tile * nodes.to(tl.int64) if TILES > 1 else 0), HEADS, HEADDIM, SIZE, PADDED,
            ADD, ACC, ROWS, WIDTH, AT_ONCE, WAITING,
        )  # fmt: skip
        tile, position, node, begin, end = next_tile, next_position, next_node, next_begin, next_end
        x, key, reader = next_x, next_key, next_reader
        next_tile, next_step = after_tile, after_step
        here, next_position, next_node, next_begin, next_end = after
