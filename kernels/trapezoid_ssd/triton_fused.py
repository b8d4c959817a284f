"""Launchers of the kernels of `trapezoid_ssd` that turn keys and queries where they use them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..ssd.triton_kernels import _ssd_carry_kernel
from ..ssd.triton_outputs import choose_parts, strides
from ..ssd.triton_tiles import Tiles, narrow, options, padded, tiles
from ..triton_utils import INTERPRETED, cdiv
from .triton_inputs import Inputs, angles_of_chunks
from .triton_turned import _trapezoid_fwd_kernel, _trapezoid_parts_kernel, _trapezoid_ranks_fwd_kernel


def fuses(given: Inputs) -> bool:
    """Whether one head's tiles of a chunk fit into registers: 16-bit inputs, states of 64 x 64 or 64 x 128, padded.

    Narrower ones, which run without wgmma, stay with the kernels of `ssd`; the interpreter runs them too.
    """
    headdim, n = padded(given.x, given.B.shape[3])
    small = headdim <= 64 and n <= 128 and not narrow(headdim, n)
    return given.x.element_size() == 2 and (small or INTERPRETED)


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


def _entering(given: Inputs, shared: dict[str, Any], phases: Tensor, parts: int, part_length: int) -> Tensor | None:
    """The state that enters each part, (b, h, parts, p, n); with one part that of the row, or None."""
    if parts == 1:
        return given.state
    (batch, _, nheads, headdim), (length, groups, n) = given.x.shape, given.B.shape[1:]
    ends = given.log_decay.new_empty(batch, nheads, parts, headdim, n)
    factors = given.log_decay.new_empty(batch, nheads, parts)
    _trapezoid_parts_kernel[(batch * parts * nheads,)](
        given.x, given.log_decay, given.gamma, given.beta, given.rate, phases, given.B, given.B_bias, given.x_rank,
        given.seq_idx, ends, factors, length, nheads, nheads // groups, parts, part_length,
        *strides(given.x, given.B), **shared,
    )  # fmt: skip
    block = 1024 if INTERPRETED else 256
    _ssd_carry_kernel[(batch * nheads * cdiv(headdim * n, block),)](
        given.state, given.state, ends, factors, batch * nheads, parts, headdim * n,
        DESCENDS=False, HAS_STATE=given.state is not None, DESCENDS_2=False, HAS_STATE_2=False, BLOCK=block,
    )  # fmt: skip
    return ends


def fused_outputs(
    given: Inputs, half: bool, y: Tensor, final: Tensor, last: Tensor, chunk: int = 0, parts: int = 0
) -> None:
    """Write outputs (b, l * r, h, p), the last state and the last angles, contiguous; `chunk` and `parts` 0: chosen."""
    x, B, C = given.x, given.B, given.C
    (batch, _, nheads, _), (length, groups, n) = x.shape, B.shape[1:]
    chosen = tiles("turned fwd", *padded(x, n), x.dtype)
    chosen = chosen._replace(chunk=chunk or chosen.chunk)
    phases, shared = angles_of_chunks(given, chosen.chunk), _shared(given, half, chosen)
    # Operands of narrow states leave room for one more chunk that is loaded ahead.
    stages = 3 if given.ranks == 1 and padded(x, n)[1] <= 64 else chosen.stages
    count, part_length = choose_parts(batch * nheads, length, chosen.chunk, x.device, parts)
    entering = _entering(given, shared, phases, count, part_length)
    kernel = _trapezoid_fwd_kernel if given.ranks == 1 else _trapezoid_ranks_fwd_kernel
    kernel[(batch * count * nheads,)](
        x, given.log_decay, given.gamma, given.beta, given.rate, phases, B, C, given.B_bias, given.C_bias, given.D,
        given.x_rank, given.seq_idx, entering, y, final, length, nheads, nheads // groups, count, part_length,
        *strides(x, B, C), HAS_STATE=entering is not None, **shared | {"STAGES": stages},
    )  # fmt: skip
    torch.mul(phases[:, :, -1], math.pi, out=last)
