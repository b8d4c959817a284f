"""Both recurrences as one call of the chunked `ssd`, the backward one on the reversed row beside the forward one.

The two results meet in the wide dtype, so that 16-bit outputs are rounded once. For the gradient the inputs are kept
and put side by side again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ssd.chunked import default_chunk, ssd_chunked_forward, ssd_chunked_gradients
from ..transforms import apply, plain_call
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
    y, final = apply(
        _BothEnds,
        x,
        forward.log_decay,
        backward.log_decay,
        forward.B,
        backward.B,
        forward.C,
        backward.C,
        state.flatten(0, 1),
        forward.weight,
        backward.weight,
        seq_idx,
        chunk_size or default_chunk(x),
    )
    if shift and seq_idx is None and not torch.compiler.is_compiling() and plain_call(x, y, diag):
        # The same in place, in half the passes over the outputs.
        total = diag[..., None] * x
        total[:, 1:] += y[:batch, :-1]
        total[:, :-1] += y[batch:, :-1].flip(1)
        return total, final.unflatten(0, (2, batch))
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


def _side_by_side(
    x: Tensor,
    decay_f: Tensor,
    decay_b: Tensor,
    B_f: Tensor,
    B_b: Tensor,
    C_f: Tensor,
    C_b: Tensor,
    state: Tensor,
    weight_f: Tensor | None,
    weight_b: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Tensor arguments of `ssd` for both directions at once."""
    weight = None
    if weight_f is not None or weight_b is not None:
        ones = torch.ones_like(decay_f)
        weight = _both(*(ones if side is None else side for side in (weight_f, weight_b)))
    index = None if seq_idx is None else _both(seq_idx, -seq_idx)
    return _both(x, x), _both(decay_f, decay_b), _both(B_f, B_b), _both(C_f, C_b), state, weight, None, index


def _apart(both: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `_both`."""
    forward, backward = both.chunk(2)
    return forward, backward.flip(1)


class _BothEnds(torch.autograd.Function):
    """`ssd` of both directions, which keeps no copies that hold them side by side."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
        *tensors, chunk_size = arguments
        return ssd_chunked_forward(*_side_by_side(*tensors), chunk_size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.chunk_size = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dfinal: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: checkpointing unpacks them for one reading
        *_, weight_f, weight_b, _ = saved
        arguments = _side_by_side(*saved)
        dx, ddecay, dB, dC, dstate, dweight, _ = ssd_chunked_gradients(*arguments, ctx.chunk_size, dy, dfinal)
        dx_f, dx_b = _apart(dx)
        dweights: list[Tensor | None] = [None, None]
        if arguments[5] is not None:
            dweights = [
                None if side is None else d for side, d in zip((weight_f, weight_b), _apart(dweight), strict=True)
            ]
        return dx_f + dx_b, *_apart(ddecay), *_apart(dB), *_apart(dC), dstate, *dweights, None, None
