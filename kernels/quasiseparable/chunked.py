"""Both recurrences as one call of the chunked `ssd`, the backward one on the reversed row beside the forward one.

The two results meet in the wide dtype, so that 16-bit outputs are rounded once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ssd.chunked import ssd_chunked
from .reference import Side


def quasiseparable_chunked(
    x: Tensor,
    forward: Side,
    backward: Side,
    diag: Tensor,
    state: Tensor,
    shift: bool,
    seq_idx: Tensor | None,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """See `quasiseparable_reference`."""
    batch = x.shape[0]
    weight = None
    if forward.weight is not None or backward.weight is not None:
        ones = torch.ones_like(forward.log_decay)
        weight = _both(*(ones if side.weight is None else side.weight for side in (forward, backward)))
    y, final = ssd_chunked(
        _both(x, x),
        _both(forward.log_decay, backward.log_decay),
        _both(forward.B, backward.B),
        _both(forward.C, backward.C),
        state.flatten(0, 1),
        weight,
        None,
        None if seq_idx is None else _both(seq_idx, -seq_idx),
        chunk_size,
    )
    from_left, from_right = y[:batch], y[batch:].flip(1)
    if shift:
        # Rolled and masked instead of sliced and padded: l - 1 positions would be a case of their own in compiled code.
        from_left, from_right = _from_neighbour(from_left, 1, seq_idx), _from_neighbour(from_right, -1, seq_idx)
    return from_left + from_right + diag[..., None] * x, final.unflatten(0, (2, batch))


def _from_neighbour(read: Tensor, step: int, seq_idx: Tensor | None) -> Tensor:
    """What stands one position before (step 1) or after (step -1), zero where that is not of the same sequence."""
    length = read.shape[1]
    positions = torch.arange(length, device=read.device)
    exists = (positions != (0 if step > 0 else length - 1))[None]
    if seq_idx is not None:
        exists = exists & (seq_idx.roll(step, 1) == seq_idx)
    return torch.where(
        exists[..., None, None], read.roll(step, 1), torch.zeros((), dtype=read.dtype, device=read.device)
    )


def _both(forward: Tensor, backward: Tensor) -> Tensor:
    """The forward rows, and below them the backward ones reversed."""
    return torch.cat([forward, backward.flip(1)])
