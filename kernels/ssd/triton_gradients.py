"""Launchers of the kernels of `ssd` for its gradient, for one group of rows after another."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from ..autotune import fastest
from ..triton_utils import cdiv, multiprocessors
from .triton_backward import _ssd_bwd_links_kernel, _ssd_bwd_maps_kernel
from .triton_kernels import ADJOINT, DESCENDING, SHIFT
from .triton_outputs import Sweep, entering_states, store_borders, strides
from .triton_tiles import GradientTiles, gradient_alternatives, gradient_tiles, map_columns, options, padded

# States and gradients of states between the kernels are about so many numbers; rows are taken in groups that have them.
_BORDER_NUMBERS = 2**27
# The same where only every second state is written, or a quarter of the numbers of x if that is more.
_FEW_BORDER_NUMBERS = 2**24
# Where one row has more, it is taken in stretches that have so many, or a quarter of the numbers of x if that is more.
_STRETCH_NUMBERS = 2**25


class Gradients(NamedTuple):
    """Gradients of a recurrence in the shapes of its inputs, where the kernels write them."""

    dx: Tensor
    dlog_decay: Tensor
    dB: Tensor  # noqa: N815
    dC: Tensor  # noqa: N815
    dweight: Tensor
    dD: Tensor  # noqa: N815
    dstate: Tensor


def empty_gradients(
    sweep: Sweep, C: Tensor, D: Tensor | None, dx: Tensor | None = None, with_state: bool = True
) -> Gradients:
    """Tensors for the gradients of a recurrence; those of absent weights and D have no positions.

    That of the first state has no heads unless `with_state`.
    """
    x, B, log_decay = sweep.values, sweep.keys, sweep.log_decay
    absent = x.shape[0], 0, x.shape[2]
    return Gradients(
        dx=x.new_empty(x.shape) if dx is None else dx,
        dlog_decay=log_decay.new_empty(log_decay.shape),
        dB=B.new_empty(B.shape),
        dC=C.new_empty(C.shape),
        dweight=log_decay.new_empty(absent if sweep.weight is None else log_decay.shape),
        dD=log_decay.new_empty(absent if D is None else log_decay.shape),
        dstate=log_decay.new_empty(x.shape[0], x.shape[2] if with_state else 0, x.shape[3], B.shape[3]),
    )


def run_gradients(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    into: Gradients,
    *,
    add: bool = False,
    chunk: int = 0,
    parts: int = 0,
    blocks: int = 0,
) -> None:
    """Gradients of a recurrence; all tensors have dense rows.

    Args:
        sweep: The recurrence forward in its own direction; its `mode` may hold REVERSE and SHIFT.
        C: What is read, (b, l, g, n).
        D: Skip, (b, l, h).
        seq_idx: (b, l).
        dy: Gradient of the outputs, contiguous.
        dfinal: Gradient of the last state, (b, h, p, n).
        into: Where to write.
        add: Add to dx instead of overwriting it.
        chunk: Positions per chunk, 0 to choose.
        parts: Parts of a row, 0 to choose.
        blocks: Blocks of heads per group, each with its own sum for dB and dC, 0 to choose.
    """
    x, n = sweep.values, sweep.keys.shape[3]
    batch, length, nheads, headdim = x.shape

    def run(chosen: GradientTiles) -> None:
        numbers = nheads * cdiv(length, chosen.links.chunk * chosen.every) * headdim * n  # of a row's states
        limit, free = _BORDER_NUMBERS, 0
        if chosen.every > 1:
            limit, free = max(_FEW_BORDER_NUMBERS, x.numel() // 4), 0 if add else x[0].numel()
        for start, stop, borrows in _groups(batch, numbers, limit, free):
            rows = slice(start, stop)
            index = None if seq_idx is None else seq_idx[rows]
            given = (
                sweep.cut(rows), C[rows], None if D is None else D[rows], index, dy[rows],
                None if dfinal is None else dfinal[rows], Gradients(*(one[rows] for one in into)), chosen,
            )  # fmt: skip
            if 2 * numbers > limit and not (sweep.mode or add or borrows):
                run_gradients_in_stretches(*given, 2 * numbers, parts, blocks)
            else:
                later = into.dx[stop:].view(-1) if borrows else None
                run_gradients_at_once(*given, add, parts, blocks, later)

    first = gradient_tiles(x, n, chunk)
    if chunk or add:  # a search overwrites its results, and does not add to them
        run(first)
    else:
        run(fastest("ssd gradient", gradient_alternatives(first, x, n), run, x.device, sizes=(*padded(x, n), x.dtype)))


def _groups(batch: int, numbers: int, limit: int, free: int) -> Iterator[tuple[int, int, bool]]:
    """Groups of rows, [start, stop), and whether the states of one of two sweeps lie in dx of rows after the group.

    Args:
        batch: Rows.
        numbers: In the states that a sweep writes for a row.
        limit: Numbers for which there is memory beyond dx.
        free: In dx of a row, none if it cannot be lent.
    """
    start = 0
    while start < batch:
        left = batch - start
        alone = max(1, limit // (2 * numbers))
        lent = min(limit // numbers, left * free // (numbers + free))
        borrows = alone < min(left, lent)
        stop = min(batch, start + max(alone, lent))
        yield start, stop, borrows
        start = stop


def run_gradients_at_once(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    into: Gradients,
    chosen: GradientTiles,
    add: bool = False,
    parts: int = 0,
    blocks: int = 0,
    lent: Tensor | None = None,
) -> None:
    """`run_gradients` for all rows at once; `lent` is memory for the states of the first sweep."""
    sweeping, subs = chosen.sweep, chosen.subs
    x = sweep.values
    batch, length, nheads, headdim = x.shape
    backward = Sweep(dy, C, sweep.log_decay, None, dfinal, sweep.mode | DESCENDING | ADJOINT, sweep.fine)
    forward = sweep._replace(mode=sweep.mode & ~SHIFT)
    shape = batch, nheads, cdiv(length, sweeping.chunk * subs), headdim, C.shape[3]
    entering = x.new_empty(shape) if lent is None else lent[: math.prod(shape)].view(shape)
    borders = entering, x.new_empty(shape)
    if chosen.every > 1 and parts == 0:
        # Memory for states that enter parts is dearer here than multiprocessors with one program.
        count, programs = multiprocessors(x.device), 2 * batch * nheads
        parts = 1 if programs >= 0.9 * count else cdiv(2 * count, programs)
    finals = min(1, into.dstate.shape[1])
    store_borders((forward, backward), seq_idx, sweeping, subs, borders, into.dstate, finals, parts=parts)
    _run_chunks(sweep, C, D, seq_idx, borders, dy, into, add, chosen, blocks)


def run_gradients_in_stretches(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    into: Gradients,
    chosen: GradientTiles,
    numbers: int,
    parts: int = 0,
    blocks: int = 0,
) -> None:
    """`run_gradients` for a single row, the states of one stretch of it at a time.

    Args:
        sweep, C, D, seq_idx, dy, dfinal, into: As there, of one row and of no mode.
        chosen: Tiles.
        numbers: In the states and their gradients at all borders.
        parts: Parts of a stretch, 0 to choose.
        blocks: See `run_gradients`.
    """
    sweeping, subs, step = chosen.sweep, chosen.subs, chosen.links.chunk * chosen.every
    x = sweep.values
    _, length, nheads, headdim = x.shape
    stretches = cdiv(numbers, max(_STRETCH_NUMBERS, x.numel() // 4))
    parts = parts or cdiv(multiprocessors(x.device), nheads)
    part_length = cdiv(cdiv(length, stretches * parts), step) * step
    count = cdiv(length, part_length)
    backward = Sweep(dy, C, sweep.log_decay, None, dfinal, DESCENDING | ADJOINT, sweep.fine)
    entering = entering_states((sweep, backward), seq_idx, sweeping, subs, count, part_length)
    if count == 1:
        entering = tuple(None if one is None else one.unsqueeze(2) for one in entering)
    finals = min(1, into.dstate.shape[1])
    for first in range(0, count, parts):
        span = slice(first * part_length, min((first + parts) * part_length, length))
        here = cdiv(span.stop - span.start, part_length)
        states = [None if one is None else one[:, :, first : first + here].contiguous() for one in entering]
        index = None if seq_idx is None else seq_idx[:, span]
        if seq_idx is not None and first and states[0] is not None:
            # The kernels see the stretch alone, not that another sequence ended before it.
            follows = seq_idx[:, span.start] == seq_idx[:, span.start - 1]
            states[0][:, :, 0] = states[0][:, :, 0].where(follows[:, None, None, None], 0.0)
        some, gradient = sweep.cut(slice(None), span), backward.cut(slice(None), span)
        borders = tuple(
            x.new_empty(1, nheads, cdiv(span.stop - span.start, step), headdim, C.shape[3]) for _ in range(2)
        )
        store_borders(
            (some, gradient), index, sweeping, subs, borders, into.dstate, 0 if first else finals, tuple(states),
            parts=here, part_length=part_length,
        )  # fmt: skip
        found = Gradients(*(one[:, span] for one in into))._replace(dstate=into.dstate)
        read = None if D is None else D[:, span]
        _run_chunks(some, C[:, span], read, index, borders, dy[:, span], found, False, chosen, blocks)


def _run_chunks(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    borders: tuple[Tensor, ...],
    dy: Tensor,
    into: Gradients,
    add: bool,
    chosen: GradientTiles,
    blocks: int,
) -> None:
    """The two kernels that compute the gradients of all chunks from the states at the borders."""
    x, B, log_decay, weight, links = sweep.values, sweep.keys, sweep.log_decay, sweep.weight, chosen.links
    (batch, length, nheads, _), (groups, n) = x.shape, B.shape[2:]
    repeats = nheads // groups
    programs = batch * cdiv(length, links.chunk) * groups
    kernels = 1
    if blocks == 0:
        # Maps have two programs for each of the other kernel, whose blocks need no sums in float32.
        places = 2 * multiprocessors(x.device) // programs
        blocks = max(1, min(repeats, places // 2))
        kernels = 2 if blocks == 1 and places > 1 and repeats % 2 == 0 else 1
        blocks = blocks if kernels == 2 else max(1, min(repeats, places))
    block_heads = cdiv(repeats, blocks)
    blocks = cdiv(repeats, block_heads)
    dB, dC = into.dB, into.dC
    if blocks > 1:
        dB, dC = (log_decay.new_empty(blocks, *one.shape) for one in (dB, dC))
    kernel = x.new_empty(programs * blocks * kernels, links.chunk, links.chunk)
    shared = {"MODE": sweep.mode, "EVERY": chosen.every, "HAS_WEIGHT": weight is not None}
    _ssd_bwd_links_kernel[(programs * blocks * kernels,)](
        x, log_decay, B, C, weight, D, seq_idx, borders[1], dy, into.dx, into.dlog_decay, into.dweight,
        into.dD, kernel, length, nheads, repeats, blocks * kernels, block_heads // kernels, *strides(x, B, C, D),
        ADD=add, HAS_D=D is not None, **shared, **options(x, n, log_decay, seq_idx, links, sweep.fine),
    )  # fmt: skip
    columns = map_columns(x, n, chosen.every)
    _ssd_bwd_maps_kernel[(2 * programs * blocks,)](
        x, log_decay, B, C, weight, seq_idx, borders[0], borders[1], dy, kernel, dB, dC, into.dlog_decay, batch,
        length, nheads, repeats, blocks, block_heads, kernels, *strides(x, B, C), COLUMNS=columns,
        COLUMNS_B=columns if chosen.every == 2 else padded(x, n)[1], **shared,
        **options(x, n, log_decay, seq_idx, chosen.maps, sweep.fine),
    )  # fmt: skip
    if blocks > 1:
        into.dB.copy_(dB.sum(0))
        into.dC.copy_(dC.sum(0))
