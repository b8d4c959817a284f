"""Launchers of the kernels of `ssd` for its gradient, for one group of rows after another."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..autotune import fastest
from ..triton_utils import cdiv, multiprocessors
from .triton_backward import _ssd_bwd_links_kernel, _ssd_bwd_maps_kernel
from .triton_kernels import ADJOINT, DESCENDING, SHIFT
from .triton_outputs import Sweep, entering_states, run_sweeps, strides, sweep_parts
from .triton_tiles import GradientTiles, Tiles, gradient_alternatives, gradient_tiles, map_columns, options, padded

# States and gradients of states between the kernels are about so many numbers; rows are taken in groups that have them.
_BORDER_NUMBERS = 2**27
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
        numbers = 2 * nheads * cdiv(length, chosen.links.chunk) * headdim * n
        group = max(1, _BORDER_NUMBERS // numbers)
        if group >= batch and numbers <= _BORDER_NUMBERS:
            run_gradients_at_once(sweep, C, D, seq_idx, dy, dfinal, into, chosen, add, parts, blocks)
            return
        for start in range(0, batch, group):
            rows = slice(start, start + group)
            some, index = sweep.cut(rows), None if seq_idx is None else seq_idx[rows]
            given = (
                some, C[rows], None if D is None else D[rows], index, dy[rows],
                None if dfinal is None else dfinal[rows], Gradients(*(one[rows] for one in into)), chosen,
            )  # fmt: skip
            if numbers > _BORDER_NUMBERS and not (sweep.mode or add):
                run_gradients_in_stretches(*given, numbers, parts, blocks)
            else:
                run_gradients_at_once(*given, add, parts, blocks)

    first = gradient_tiles(x, n, chunk)
    if chunk or add:  # a search overwrites its results, and does not add to them
        run(first)
    else:
        run(fastest("ssd gradient", gradient_alternatives(first, x, n), run, x.device, sizes=(*padded(x, n), x.dtype)))


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
) -> None:
    """`run_gradients` for all rows at once."""
    links, maps, sweeping, subs = chosen
    backward = Sweep(dy, C, sweep.log_decay, None, dfinal, sweep.mode | DESCENDING | ADJOINT, sweep.fine)
    forward = sweep._replace(mode=sweep.mode & ~SHIFT)
    borders, _ = run_sweeps((forward, backward), seq_idx, sweeping, subs, parts, into.dstate)
    _run_chunks(sweep, C, D, seq_idx, borders, dy, into, add, links, maps, blocks)


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
    links, maps, sweeping, subs = chosen
    x = sweep.values
    length, nheads = x.shape[1:3]
    stretches = cdiv(numbers, max(_STRETCH_NUMBERS, x.numel() // 4))
    parts = parts or cdiv(multiprocessors(x.device), nheads)
    part_length = cdiv(cdiv(length, stretches * parts), links.chunk) * links.chunk
    count = cdiv(length, part_length)
    backward = Sweep(dy, C, sweep.log_decay, None, dfinal, DESCENDING | ADJOINT, sweep.fine)
    entering = entering_states((sweep, backward), seq_idx, sweeping, subs, count, part_length)
    if count == 1:
        entering = tuple(None if one is None else one.unsqueeze(2) for one in entering)
    unwritten = into.dstate[:, :0]
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
        dstate = unwritten if first else into.dstate
        borders, _ = sweep_parts((some, gradient), tuple(states), index, sweeping, subs, here, part_length, dstate)
        found = Gradients(*(one[:, span] for one in into))._replace(dstate=into.dstate)
        read = None if D is None else D[:, span]
        _run_chunks(some, C[:, span], read, index, borders, dy[:, span], found, False, links, maps, blocks)
        del borders, states  # their memory is the next stretch's


def _run_chunks(
    sweep: Sweep,
    C: Tensor,
    D: Tensor | None,
    seq_idx: Tensor | None,
    borders: Tensor,
    dy: Tensor,
    into: Gradients,
    add: bool,
    links: Tiles,
    maps: Tiles,
    blocks: int,
) -> None:
    """The two kernels that compute the gradients of all chunks from the states at the borders."""
    x, B, log_decay, weight = sweep.values, sweep.keys, sweep.log_decay, sweep.weight
    (batch, length, nheads, _), (groups, n) = x.shape, B.shape[2:]
    repeats = nheads // groups
    programs = batch * cdiv(length, links.chunk) * groups
    if blocks == 0:
        blocks = max(1, min(repeats, 2 * multiprocessors(x.device) // programs))
    block_heads = cdiv(repeats, blocks)
    blocks = cdiv(repeats, block_heads)
    dB, dC = into.dB, into.dC
    if blocks > 1:
        dB, dC = (log_decay.new_empty(blocks, *one.shape) for one in (dB, dC))
    kernel = x.new_empty(programs * blocks, links.chunk, links.chunk)
    sizes = length, nheads, repeats, blocks, block_heads
    shared = {"MODE": sweep.mode, "HAS_WEIGHT": weight is not None}
    _ssd_bwd_links_kernel[(programs * blocks,)](
        x, log_decay, B, C, weight, D, seq_idx, borders[1], dy, into.dx, into.dlog_decay, into.dweight,
        into.dD, kernel, *sizes, *strides(x, B, C, D), ADD=add,
        HAS_D=D is not None, **shared, **options(x, n, log_decay, seq_idx, links, sweep.fine),
    )  # fmt: skip
    _ssd_bwd_maps_kernel[(2 * programs * blocks,)](
        x, log_decay, B, C, weight, seq_idx, borders[0], borders[1], dy, kernel, dB, dC, into.dlog_decay, batch,
        *sizes, *strides(x, B, C), COLUMNS=map_columns(x, n), **shared,
        **options(x, n, log_decay, seq_idx, maps, sweep.fine),
    )  # fmt: skip
    if blocks > 1:
        into.dB.copy_(dB.sum(0))
        into.dC.copy_(dC.sum(0))
