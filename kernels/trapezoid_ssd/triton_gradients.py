"""Launchers of the kernels that find the gradients of `trapezoid_ssd` from turned keys and queries."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..ssd.triton_kernels import ADJOINT, DESCENDING
from ..ssd.triton_outputs import Sweep, run_sweeps, strides
from ..ssd.triton_tiles import GradientTiles, Tiles, options, padded
from ..triton_utils import INTERPRETED, cdiv, multiprocessors
from .triton_inputs import Inputs
from .triton_links import _trapezoid_links_kernel
from .triton_maps import _trapezoid_maps_kernel

# Columns of keys and queries whose gradients one program holds. Narrower products would not run on wgmma.
_COLUMNS = 64


def states_at_borders(
    sweep: Sweep,
    q: Tensor,
    seq_idx: Tensor | None,
    dy: Tensor,
    dfinal: Tensor | None,
    dstate: Tensor,
    tiles: GradientTiles,
    parts: int,
) -> Tensor:
    """States that enter all chunks, and gradients of those that leave them, (2, b, h, chunks, p, n).

    Args:
        sweep: The recurrence of `ssd`, with as many groups as heads.
        q: Turned queries, (b, l, h, n), l counting positions and ranks.
        seq_idx: (b, l).
        dy: Gradient of the outputs, contiguous.
        dfinal: Gradient of the last state, (b, h, p, n).
        dstate: Where to write that of the first state, (b, h, p, n).
        tiles: Those of the kernels of `ssd`.
        parts: Parts of a row, 0 to choose.
    """
    backward = Sweep(dy, q, sweep.log_decay, None, dfinal, DESCENDING | ADJOINT, sweep.fine)
    return run_sweeps((sweep, backward), seq_idx, tiles.sweep, tiles.subs, parts, dstate)[0]


def links(
    given: Inputs,
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
    (batch, length, nheads, _), n, wide = values.shape, k.shape[3], given.log_decay
    chunks = batch * cdiv(length, chunk)
    kernel, dweight = x.new_empty(chunks * nheads, chunk, chunk), torch.empty_like(wide)
    chosen = options(values, n, wide, given.seq_idx, tiles, sweep.fine)
    _trapezoid_links_kernel[(chunks * nheads,)](
        x, values, wide, given.gamma, given.beta, k, q, given.D, given.x_rank, given.seq_idx, borders[0], borders[1],
        dy, dx, dlog_decay, dgamma, dweight, shared.D, shared.x_rank, kernel, length, nheads, *strides(x, values),
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

    turns: Tensor  # cos and sin side by side, (b, positions, h, 2 s)
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
    blocks, block_heads = blocks_of_heads(repeats, programs, blocks * programs or 4 * multiprocessors(given.x.device))
    dB_parts, dC_parts = (wide.new_empty(blocks, *dB.shape) if blocks > 1 else one for one in (dB, dC))
    drate_parts = wide.new_empty(2 * blocks * groups, *drate.shape)
    dphi_parts = wide.new_empty(2, *dphi.shape)
    ddt = wide.new_empty(2 * turning, *wide.shape)
    few = wide.dtype == torch.float64 or INTERPRETED
    chosen = options(sweep.values, n, sweep.log_decay, given.seq_idx, tiles, sweep.fine)
    _trapezoid_maps_kernel[(programs * blocks,)](
        sweep.values, dy, given.gamma, given.beta, given.rate, angles.turns, *decays, sweep.keys, q, borders[0],
        borders[1], kernel, angles.dphase, angles.dphi_end, dB_parts, dC_parts, shared.B_bias, shared.C_bias, ddt,
        drate_parts, dphi_parts, batch, length, nheads, repeats, blocks, block_heads, *strides(sweep.values),
        HAS_DPHASE=angles.dphase is not None, HAS_DPHI=angles.dphi_end is not None, S=pairs, HALF=angles.half,
        TERMS=0 if few else 3 if given.x.dtype == torch.float32 else 2, RANKS=given.ranks,
        **{name: value for name, value in chosen.items() if name not in ("PACKED", "EXACT")} | {"BLOCK_N": columns},
    )  # fmt: skip
    if blocks > 1:
        dB.copy_(dB_parts.sum(0))
        dC.copy_(dC_parts.sum(0))
    torch.sum(drate_parts, 0, out=drate).mul_(math.pi)
    torch.sum(dphi_parts, 0, out=dphi)
    return ddt
