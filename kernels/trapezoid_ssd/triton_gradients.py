"""Launchers of the kernels that find the gradients of `trapezoid_ssd` from turned keys and queries."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ssd.triton_kernels import ADJOINT, DESCENDING
from ..ssd.triton_outputs import Sweep, run_sweeps, strides
from ..ssd.triton_tiles import GradientTiles, Tiles, options, padded
from ..triton_utils import INTERPRETED, cdiv, multiprocessors
from .triton_inputs import Inputs
from .triton_links import _trapezoid_links_kernel
from .triton_maps import _trapezoid_maps_kernel, _trapezoid_totals_kernel
from .triton_sweep import _trapezoid_sweep_kernel

# Programs of `maps` a multiprocessor: a few more than fit, since those whose columns turn take longer.
_PROGRAMS = 16
# Tiles of `_trapezoid_sweep_kernel`: four programs a multiprocessor.
_SWEEP = Tiles(64, 4, 2, 128)
# Columns of keys and queries whose gradients one program holds. Narrower products would not run on wgmma.
_COLUMNS = 64


def _sweeps_columns(given: Inputs, tiles: GradientTiles, parts: int) -> bool:
    """Whether states at borders are found some columns at a time, which takes rows that are not cut."""
    headdim, n = padded(given.x, given.B.shape[3])
    several = given.x.element_size() == 2 and headdim == 64 and n >= _COLUMNS
    return parts == 1 and tiles.subs == 1 and (several or INTERPRETED)


def turned_columns(given: Inputs) -> int:
    """Of two slices of columns the first one if the second stands still, else all."""
    n = given.B.shape[3]
    return _COLUMNS if _COLUMNS < n <= 2 * _COLUMNS and 2 * given.rate.shape[2] <= _COLUMNS else n


def empty_keys(given: Inputs, tiles: GradientTiles, parts: int) -> Tensor:
    """Where to write turned keys and queries, (2, b, l, h, n), l counting positions and ranks.

    Where states are found some columns at a time, the positions of a head lie side by side in memory, and columns are
    `turned_columns`.
    """
    (batch, _, nheads, _), (length, _, n) = given.x.shape, given.B.shape[1:]
    if not _sweeps_columns(given, tiles, parts):
        return given.x.new_empty(2, batch, length, nheads, n)
    return given.x.new_empty(2, batch, nheads, length, turned_columns(given)).transpose(2, 3)


def states_at_borders(
    given: Inputs,
    half: bool,
    sweep: Sweep,
    q: Tensor,
    seq_idx: Tensor | None,
    dy: Tensor,
    decays: tuple[Tensor, Tensor],
    dfinal: Tensor | None,
    dstate: Tensor,
    tiles: GradientTiles,
    parts: int,
) -> Tensor:
    """States that enter all chunks, and gradients of those that leave them, (2, b, h, chunks, p, n).

    Args:
        given: The inputs.
        half: Which entries are pairs.
        sweep: The recurrence of `ssd`, with as many groups as heads.
        q: Turned queries, see `empty_keys`, like the keys of `sweep`.
        seq_idx: (b, l).
        dy: Gradient of the outputs, contiguous.
        decays: See `maps`.
        dfinal: Gradient of the last state, (b, h, p, n).
        dstate: Where to write that of the first state, (b, h, p, n).
        tiles: Those of the kernels of `ssd`.
        parts: Parts of a row, 0 to choose.
    """
    x, k = sweep.values, sweep.keys
    (batch, length, nheads, headdim), n, width = x.shape, given.B.shape[3], k.shape[3]
    if _sweeps_columns(given, tiles, parts):
        columns = min(_COLUMNS, padded(x, n)[1])
        borders = x.new_empty(2, batch, nheads, cdiv(length, tiles.sweep.chunk), headdim, n)
        chosen = options(x, n, sweep.log_decay, seq_idx, _SWEEP._replace(chunk=tiles.sweep.chunk), sweep.fine)
        _trapezoid_sweep_kernel[(2 * batch * nheads * cdiv(n, columns),)](
            x, dy, k, q, given.B, given.C, given.B_bias, given.C_bias, decays[1], decays[0], sweep.state, dfinal,
            borders, dstate, batch, length, nheads, nheads // given.B.shape[2], *strides(x, given.B, given.C),
            *k.stride()[2:0:-1], HAS_STATE=sweep.state is not None, HAS_DFINAL=dfinal is not None,
            HALF=half and width < n, RANKS=given.ranks, WIDTH=width,
            **{name: value for name, value in chosen.items() if name not in ("PACKED", "EXACT")} | {"BLOCK_N": columns},
        )  # fmt: skip
        return borders
    backward = Sweep(dy, q, sweep.log_decay, None, dfinal, DESCENDING | ADJOINT, sweep.fine)
    return run_sweeps((sweep, backward), seq_idx, tiles.sweep, tiles.subs, parts, dstate)[0]


def links(
    given: Inputs,
    half: bool,
    sweep: Sweep,
    q: Tensor,
    dy: Tensor,
    borders: Tensor,
    tiles: Tiles,
    dx: Tensor,
    dlog_decay: Tensor,
    dgamma: Tensor,
    shared: Shared,
) -> tuple[Tensor, Tensor]:
    """Write gradients of x, x_rank, D, log-decays and, without what it does to dt, of gamma.

    Args:
        given: The inputs.
        half: Which entries are pairs.
        sweep: The recurrence of `ssd`.
        q: Turned queries, (b, l, h, n).
        dy: Gradient of the outputs, contiguous.
        borders: See `states_at_borders`.
        tiles: Of the kernel.
        dx: Where to write, (b, positions, h, p).
        dlog_decay: (b, positions, h).
        dgamma: (b, positions, h).
        shared: The same for what rows share.

    Returns:
        K^T of each chunk and head, (b * chunks * h, q, q), and the gradient of each position's weight for later ones,
        (b, positions, h).
    """
    x, values, k, chunk = given.x, sweep.values, sweep.keys, tiles.chunk
    (batch, length, nheads, _), n, wide = values.shape, given.B.shape[3], given.log_decay
    chunks = batch * cdiv(length, chunk)
    kernel, dweight = x.new_empty(chunks * nheads, chunk, chunk), torch.empty_like(wide)
    chosen = options(values, n, wide, given.seq_idx, tiles, sweep.fine)
    _trapezoid_links_kernel[(chunks * nheads,)](
        x, values, wide, given.gamma, given.beta, k, q, given.B, given.C, given.B_bias, given.C_bias, given.D,
        given.x_rank, given.seq_idx, borders[0], borders[1], dy, dx, dlog_decay, dgamma, dweight, shared.D,
        shared.x_rank, kernel, length, nheads, nheads // given.B.shape[2], *strides(x, values, given.B, given.C),
        *k.stride()[2:0:-1],         HALF=half, WIDTH=k.shape[3],
        HAS_RANK=given.x_rank is not None, RANKS=given.ranks,
        **{name: value for name, value in chosen.items() if name != "STAGES"},
    )  # fmt: skip
    return kernel, dweight


class Shared(NamedTuple):
    """Gradients of what rows share, for each chunk, to be added."""

    B_bias: Tensor  # (b * chunks, h, r, n)
    C_bias: Tensor  # (b * chunks, h, r, n)
    D: Tensor  # (b * chunks, h)
    x_rank: Tensor  # (b * chunks, h, r, p), without numbers if there is none

    def cut(self, chunks: slice) -> Shared:
        """The same for some chunks."""
        return Shared(*(one[chunks] for one in self))


def empty_shared(given: Inputs, chunk: int) -> Shared:
    """Tensors for the gradients of what rows share."""
    wide, chunks = given.log_decay, given.x.shape[0] * cdiv(given.B.shape[1], chunk)
    dB_bias, dC_bias = wide.new_empty(2, chunks, *given.B_bias.shape).unbind(0)
    dx_rank = wide.new_empty(0) if given.x_rank is None else wide.new_empty(chunks, *given.x_rank.shape)
    return Shared(dB_bias, dC_bias, wide.new_empty(chunks, wide.shape[2]), dx_rank)


class Angles(NamedTuple):
    """What turns keys and queries, and what is known of the gradient of the last angles."""

    turns: Tensor  # cos and sin side by side, (b, h, positions, 2 s)
    half: bool  # which entries are pairs
    dphase: Tensor | None  # gradient of the last angles, (b, h, s)
    dphi_end: Tensor | None  # the same with what they do to the last state


def blocks_of_heads(repeats: int, programs: int, wanted: int) -> tuple[int, int]:
    """Into how many blocks to cut a group's heads for about the wanted number of programs, and heads per block."""
    block_heads = cdiv(repeats, max(1, min(repeats, wanted // programs)))
    return cdiv(repeats, block_heads), block_heads


def maps(
    given: Inputs,
    angles: Angles,
    sweep: Sweep,
    q: Tensor,
    dy: Tensor,
    decays: tuple[Tensor, Tensor],
    borders: Tensor,
    kernel: Tensor,
    tiles: Tiles,
    drate: Tensor,
    dB: Tensor,
    dC: Tensor,
    dphi: Tensor,
    shared: Shared,
    blocks: int,
) -> Tensor:
    """Write gradients of the rates, of B, C, their biases and the first angles; return those of dt, in parts.

    Args:
        given: The inputs.
        angles: Their angles.
        sweep: The recurrence of `ssd`, with as many groups as heads.
        q: Turned queries, (b, l, h, n), l counting positions and ranks.
        dy: Gradient of the outputs, contiguous.
        decays: What each step still reads of the state before its chunk, and how much of its input is left at the
            chunk's end, (b, l, h).
        borders: See `states_at_borders`.
        kernel: K^T, see `links`.
        tiles: Of the kernel.
        drate: Where to write, (b, positions, s).
        dB: (b, l, g, n).
        dC: (b, l, g, n).
        dphi: (b, h, s).
        shared: The same for what rows share.
        blocks: Of a group's heads, 0 to choose.
    """
    (batch, _, nheads, _), (length, groups, n) = given.x.shape, given.B.shape[1:]
    pairs, chunk, repeats, wide = given.rate.shape[2], tiles.chunk, nheads // groups, given.log_decay
    chunks, columns = cdiv(length, chunk), min(_COLUMNS, padded(given.x, n)[1])
    slices, turning = cdiv(n, columns), cdiv(2 * pairs, columns)
    programs = 2 * slices * batch * chunks * groups
    wanted = blocks * programs or _PROGRAMS * multiprocessors(given.x.device)
    blocks, block_heads = blocks_of_heads(repeats, programs, wanted)
    dB_parts, dC_parts = (wide.new_empty(blocks, *dB.shape) if blocks > 1 else one for one in (dB, dC))
    drate_parts = wide.new_empty(2 * blocks * groups, *drate.shape)
    dphi_parts = wide.new_empty(2, *dphi.shape)
    ddt = wide.new_empty(2 * turning, *wide.shape)
    few = wide.dtype == torch.float64 or INTERPRETED
    if sweep.keys.shape[3] < n and given.ranks == 1:
        tiles = tiles._replace(stages=1)  # loads of the other programs hide behind products better than its own
    chosen = options(sweep.values, n, sweep.log_decay, given.seq_idx, tiles, sweep.fine)
    _trapezoid_maps_kernel[(programs * blocks,)](
        sweep.values, dy, given.gamma, given.beta, given.rate, angles.turns, *decays, sweep.keys, q, given.B,
        given.C, given.B_bias, given.C_bias, borders[0], borders[1], kernel, angles.dphase, angles.dphi_end, dB_parts,
        dC_parts, shared.B_bias, shared.C_bias, ddt, drate_parts, dphi_parts, batch, length, nheads, repeats, blocks,
        block_heads, *strides(sweep.values, given.B, given.C), *sweep.keys.stride()[2:0:-1], WIDTH=sweep.keys.shape[3],
        HAS_DPHASE=angles.dphase is not None, HAS_DPHI=angles.dphi_end is not None, S=pairs, HALF=angles.half,
        TERMS=0 if few else 3 if given.x.dtype == torch.float32 else 2, RANKS=given.ranks,
        **{name: value for name, value in chosen.items() if name not in ("PACKED", "EXACT")} | {"BLOCK_N": columns},
    )  # fmt: skip
    block, count, rates = 1024, dB.numel() if blocks > 1 else 0, drate.numel()
    of_maps = cdiv(count, block)
    _trapezoid_totals_kernel[(2 * of_maps + cdiv(rates, block),)](
        dB_parts, dC_parts, drate_parts, dB, dC, drate, count, rates, blocks, len(drate_parts), of_maps,
        BLOCK=block, ACC=chosen["ACC"],
    )  # fmt: skip
    torch.sum(dphi_parts, 0, out=dphi)
    return ddt
