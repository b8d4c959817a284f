"""Launchers of the kernels of `trapezoid_ssd` that turn keys and queries where they use them."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ssd.triton_kernels import _ssd_carry_kernel
from ..ssd.triton_outputs import choose_parts, strides
from ..ssd.triton_tiles import Tiles, options, padded, tiles
from ..triton_utils import INTERPRETED, cdiv
from .triton_backward import _trapezoid_bwd_kernel, _trapezoid_heads_kernel
from .triton_inputs import Inputs, angles_of_chunks
from .triton_turned import _trapezoid_fwd_kernel, _trapezoid_sweep_kernel


def fuses(given: Inputs) -> bool:
    """Whether one head's tiles and gradients of a chunk fit into registers: 16-bit inputs, states up to 64 x 128."""
    headdim, n = padded(given.x, given.B.shape[3])
    return given.x.element_size() == 2 and headdim <= 64 and n <= 128


# Rows over which one program sums gradients of keys and queries.
_ROWS = 32

# Gradients of keys and queries of a group of rows, per head, and states between chunks take about this many bytes.
_GROUP_BYTES = 2**29


def _groups(given: Inputs, chunk: int) -> list[slice]:
    """Groups of rows such that what exists for each takes about `_GROUP_BYTES`."""
    (batch, _, nheads, headdim), (length, _, n) = given.x.shape, given.B.shape[1:]
    numbers = 2 * nheads * n * (length + cdiv(length, chunk) * headdim)
    rows = max(1, _GROUP_BYTES // (numbers * given.x.element_size()))
    return [slice(start, start + rows) for start in range(0, batch, rows)]


def _shared(given: Inputs, half: bool, chosen: Tiles) -> dict[str, Any]:
    """Compile-time arguments of the kernels."""
    x, n, pairs = given.x, given.B.shape[3], given.rate.shape[2]
    block_n = padded(x, n)[1]
    return {
        "HAS_RANK": given.x_rank is not None,
        "S": pairs,
        "TURNING": block_n // 2 if 4 * pairs <= block_n else block_n,
        "HALF": half,
        "RANKS": given.ranks,
        **options(x, n, given.log_decay, given.seq_idx, chosen),
    }


def _chosen(kernel: str, given: Inputs, chunk: int) -> Tiles:
    """Those of `ssd`, all with the same chunk; what several ranks load ahead would fill the shared memory."""
    sizes = *padded(given.x, given.B.shape[3]), given.x.dtype
    chosen = tiles(kernel, *sizes)._replace(chunk=chunk or tiles("links", *sizes).chunk)
    return chosen if given.ranks == 1 else chosen._replace(stages=1)


def _inputs_of_kernels(given: Inputs, phases: Tensor) -> tuple[Tensor, ...]:
    return given.log_decay, given.gamma, given.beta, given.rate, phases, given.B, given.C, given.B_bias, given.C_bias


def _sweep(
    given: Inputs,
    half: bool,
    chosen: Tiles,
    phases: Tensor,
    entering: tuple[Tensor | None, Tensor | None],
    dy: Tensor | None,
    outputs: tuple[Tensor, Tensor, Tensor, Tensor],
    store: bool,
    parts: int,
    part_chunks: int,
) -> None:
    batch, _, nheads, _ = given.x.shape
    _trapezoid_sweep_kernel[((1 if dy is None else 2) * batch * parts * nheads,)](
        given.x, *_inputs_of_kernels(given, phases), given.x_rank, given.seq_idx, dy, *entering, *outputs,
        batch, given.B.shape[1], nheads, nheads // given.B.shape[2], parts, part_chunks,
        *strides(given.x, given.B, given.C), HAS_STATE=entering[0] is not None, HAS_DFINAL=entering[1] is not None,
        STORE=store, **_shared(given, half, chosen),
    )  # fmt: skip


def _entering(
    given: Inputs,
    half: bool,
    chosen: Tiles,
    phases: Tensor,
    dy: Tensor | None,
    dfinal: Tensor | None,
    parts: int,
    part_length: int,
) -> tuple[Tensor | None, Tensor | None]:
    """The state that enters each part and, with dy, the gradient of the one that leaves it, (b, h, parts, p, n)."""
    if parts == 1:
        return given.state, dfinal
    (batch, _, nheads, headdim), n, sweeps = given.x.shape, given.B.shape[3], 1 if dy is None else 2
    ends = given.log_decay.new_empty(sweeps, batch, nheads, parts, headdim, n)
    factors = given.log_decay.new_empty(sweeps, batch, nheads, parts)
    outputs = ends, ends, factors, ends
    _sweep(given, half, chosen, phases, (None, None), dy, outputs, False, parts, part_length // chosen.chunk)
    block = 1024 if INTERPRETED else 256
    _ssd_carry_kernel[(sweeps * batch * nheads * cdiv(headdim * n, block),)](
        given.state, dfinal, ends, factors, batch * nheads, parts, headdim * n,
        DESCENDS=False, HAS_STATE=given.state is not None, DESCENDS_2=True, HAS_STATE_2=dfinal is not None, BLOCK=block,
    )  # fmt: skip
    return ends[0], None if dy is None else ends[1]


def fused_outputs(
    given: Inputs, half: bool, y: Tensor, final: Tensor, last: Tensor, chunk: int = 0, parts: int = 0
) -> None:
    """Write outputs (b, l * r, h, p), the last state and the last angles, contiguous; `chunk` and `parts` 0: chosen."""
    (batch, _, nheads, _), (length, groups, _) = given.x.shape, given.B.shape[1:]
    chosen = _chosen("fwd", given, chunk)
    phases = angles_of_chunks(given, chosen.chunk)
    count, part_length = choose_parts(batch * nheads, length, chosen.chunk, given.x.device, parts)
    sweeping = _chosen("sweep", given, chosen.chunk)
    entering, _ = _entering(given, half, sweeping, phases, None, None, count, part_length)
    _trapezoid_fwd_kernel[(batch * count * nheads,)](
        given.x, *_inputs_of_kernels(given, phases), given.D, given.x_rank, given.seq_idx, entering, y, final,
        length, nheads, nheads // groups, count, part_length, *strides(given.x, given.B, given.C),
        HAS_STATE=entering is not None, **_shared(given, half, chosen),
    )  # fmt: skip
    torch.mul(phases[:, :, -1], math.pi, out=last)


class _Gradients(NamedTuple):
    """Gradients of a call in the order of its inputs, and in their shapes."""

    dx: Tensor
    dlog_decay: Tensor
    dgamma: Tensor
    dbeta: Tensor
    drate: Tensor
    dB: Tensor  # noqa: N815
    dC: Tensor  # noqa: N815
    dstate: Tensor
    dphi: Tensor


def _gradients(
    given: Inputs,
    half: bool,
    chosen: Tiles,
    dy: Tensor,
    dfinal: Tensor | None,
    dphase: Tensor | None,
    dphi_end: Tensor | None,
    into: _Gradients,
    parts: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Write the gradients of some rows, and return those of biases, D and x_rank."""
    x, B, wide, ranks = given.x, given.B, given.log_decay, given.ranks
    (batch, positions, nheads, headdim), (length, groups, n) = x.shape, B.shape[1:]
    chunks, pairs = cdiv(length, chosen.chunk), given.rate.shape[2]
    phases, shared = angles_of_chunks(given, chosen.chunk), _shared(given, half, chosen)
    sweeping = _chosen("sweep", given, chosen.chunk)
    count, part_length = choose_parts(2 * batch * nheads, length, chosen.chunk, x.device, parts)
    entering = _entering(given, half, sweeping, phases, dy, dfinal, count, part_length)
    block_p, block_n = padded(x, n)
    borders = x.new_empty(2, batch, nheads, chunks, block_p, block_n)
    outputs = borders, into.dstate, into.dstate, into.dstate
    _sweep(given, half, sweeping, phases, entering, dy, outputs, True, count, part_length // chosen.chunk)
    dk, dq = x.new_empty(2, batch, length, nheads, n).unbind(0)
    ddt, dweight = wide.new_empty(2, batch, positions, nheads).unbind(0)
    drate = wide.new_empty(batch, positions, nheads, pairs)
    blocks = cdiv(length, _ROWS)
    dB_bias, dC_bias = wide.new_empty(2, batch * blocks, nheads, ranks, n).unbind(0)
    dD = wide.new_empty(batch * chunks, nheads)
    dx_rank = wide.new_empty(0 if given.x_rank is None else batch * chunks, nheads, ranks, headdim)
    _trapezoid_bwd_kernel[(batch * chunks * nheads,)](
        x, *_inputs_of_kernels(given, phases), given.D, given.x_rank, given.seq_idx, borders, dphase, dphi_end, dy,
        into.dx, into.dlog_decay, into.dgamma, ddt, dweight, drate, into.dphi, dk, dq, dD, dx_rank,
        batch, length, nheads, nheads // groups, *strides(x, B, given.C), HAS_DPHASE=dphase is not None,
        HAS_DPHI=dphi_end is not None, **shared,
    )  # fmt: skip
    _trapezoid_heads_kernel[(batch * blocks * groups, 2)](
        dk, dq, into.dB, into.dC, dB_bias, dC_bias, length, nheads, nheads // groups,
        N=n, BLOCK_N=block_n, T=_ROWS, RANKS=ranks, ACC=shared["ACC"], **({} if INTERPRETED else {"num_warps": 4}),
    )  # fmt: skip
    torch.sum(drate, 2, out=into.drate)
    # One position later an input counts once more, with beta, unless another sequence begins.
    added = dweight[:, :-1]
    if given.seq_idx is not None:
        added = added * (given.seq_idx[:, 1:] == given.seq_idx[:, :-1])[..., None]
    into.dbeta[:, :1] = ddt[:, :1]
    torch.add(ddt[:, 1:], added, out=into.dbeta[:, 1:])
    of_ranks = dx_rank.sum(0) if given.x_rank is not None else dx_rank.flatten()
    return dB_bias.sum(0), dC_bias.sum(0), dD.sum(0), of_ranks


def fused_gradients(
    given: Inputs,
    half: bool,
    dy: Tensor,
    dfinal: Tensor | None,
    dphase: Tensor | None,
    dphi_end: Tensor | None,
    chunk: int = 0,
    parts: int = 0,
) -> tuple[Tensor, ...]:
    """Gradients of x to x_rank (empty if it is None); `dphase` is that of the last angles, with what they turn.

    `dphi_end` is without.
    """
    x, B, wide = given.x, given.B, given.log_decay
    chosen = _chosen("links", given, chunk)
    of_inputs = [one.new_empty(one.shape) for one in given[:7] if one is not None]
    dstate = wide.new_empty(x.shape[0], *x.shape[2:], B.shape[3])
    into = _Gradients._make([*of_inputs, dstate, wide.new_empty(x.shape[0], x.shape[2], given.rate.shape[2])])
    sums: list[tuple[Tensor, ...]] = []
    for rows in _groups(given, chosen.chunk):
        end, phase, own = (None if one is None else one[rows] for one in (dfinal, dphase, dphi_end))
        cut = _Gradients(*(one[rows] for one in into))
        sums.append(_gradients(given.cut(rows), half, chosen, dy[rows], end, phase, own, cut, parts))
    if len(sums) == 1:
        return *into, *sums[0]
    return *into, *(torch.stack(parts).sum(0) for parts in zip(*sums, strict=True))
