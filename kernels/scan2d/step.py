"""One column of `scan2d`, for streams: the states of all rows at a time step from those at the step before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_devices, check_floating, check_shapes, check_state_index
from ..linear_scan.op import linear_scan
from ..overwriting import overwriting

Column = tuple[Tensor, Tensor]


def scan2d_step(
    a1: Tensor,
    a2: Tensor,
    a3: Tensor,
    a4: Tensor,
    b1: Tensor,
    b2: Tensor,
    state: Column,
    *,
    state_index: Tensor | None = None,
) -> tuple[Column, Column]:
    """One column of `scan2d`: both states of every row at this time step.

        h1[i] = a1[i] h1'[i] + a2[i] h2'[i] + b1[i]            ' is the column before
        h2[i] = a3[i] h1[i-1] + a4[i] h2[i-1] + b2[i]          a scan over the rows; nothing above the first one

    Args:
        a1: Transition of h1 along time, (b, i, d, n); d and n may be 1 and broadcast, here and in a2, a3, a4.
        a2: Transition from h2 to h1 along time.
        a3: Transition from h1 to h2 along the rows.
        a4: Transition of h2 along the rows.
        b1: Input of h1, (b, i, d, n).
        b2: Input of h2, (b, i, d, n).
        state: h1 and h2 of the column before, each (b, i, d, n), zeros at the start; with `state_index` pools of
            states, (s, i, d, n).
        state_index: Which state of the pools belongs to each entry of the batch, (b,) integers, each state at most
            once. A negative index marks padding: its column is 0 and no state changes for it.

    Returns:
        h1 and h2 of this column, each (b, i, d, n), in float32 for 16-bit inputs; and the new state or pools, in their
        dtypes. A new state of the column's dtype is the column itself, not a copy.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree; on a CPU in eager mode also if `state_index` names a state that is
            not there, or one twice.

    Differentiable in all floating tensors. `scan2d_step_` writes into `state`.
    Source: Behrouz, Santacatterina & Zabih (2024), Chimera, the discrete 2-D recurrence.
    """
    if overwriting():
        return scan2d_step_(a1, a2, a3, a4, b1, b2, state, state_index=state_index), state
    column = _advance(a1, a2, a3, a4, b1, b2, state, state_index)
    if state_index is None:
        return column, (column[0].to(state[0].dtype), column[1].to(state[1].dtype))
    # Padding writes to a place behind the last state, which is cut off again.
    count = state[0].shape[0]
    place = torch.where(state_index < 0, count, state_index).long()
    h1, h2 = (
        torch.cat([old, old.new_zeros(1, *old.shape[1:])]).index_copy(0, place, new.to(old.dtype))[:count]
        for old, new in zip(state, column, strict=True)
    )
    return column, (h1, h2)


@torch.no_grad()
def scan2d_step_(
    a1: Tensor,
    a2: Tensor,
    a3: Tensor,
    a4: Tensor,
    b1: Tensor,
    b2: Tensor,
    state: Column,
    *,
    state_index: Tensor | None = None,
) -> Column:
    """`scan2d_step` in place: overwrite `state` and return the column; no gradients, fit for CUDA graphs.

    Args:
        a1: Transition of h1 along time, (b, i, d, n); d and n may be 1 and broadcast, here and in a2, a3, a4.
        a2: Transition from h2 to h1 along time.
        a3: Transition from h1 to h2 along the rows.
        a4: Transition of h2 along the rows.
        b1: Input of h1, (b, i, d, n).
        b2: Input of h2, (b, i, d, n).
        state: h1 and h2 of the column before, each (b, i, d, n), or pools (s, i, d, n); overwritten.
        state_index: Which state of the pools belongs to each entry of the batch, (b,) integers; negative for padding.

    Returns:
        h1 and h2 of this column, each (b, i, d, n), in float32 for 16-bit inputs.

    Raises:
        TypeError: if an argument is no floating tensor.
        ValueError: if shapes or devices disagree; on a CPU in eager mode also if `state_index` names a state that is
            not there, or one twice.
    """
    column = _advance(a1, a2, a3, a4, b1, b2, state, state_index)
    for old, new in zip(state, column, strict=True):
        if state_index is None:
            old.copy_(new)
        elif new.shape[0]:
            # Padding repeats what the first entry that is none writes; without such an entry all write a state back.
            real = state_index >= 0
            source = torch.where(real, torch.arange(new.shape[0], device=new.device), real.int().argmax())
            place = state_index.clamp(min=0).long().index_select(0, source)
            written = torch.where(real.any(), new.to(old.dtype).index_select(0, source), old.index_select(0, place))
            old.index_put_((place,), written)
    return column


def _advance(
    a1: Tensor,
    a2: Tensor,
    a3: Tensor,
    a4: Tensor,
    b1: Tensor,
    b2: Tensor,
    state: Column,
    state_index: Tensor | None,
) -> Column:
    """Both states of each entry of the batch, (b, i, d, n)."""
    before1, before2 = state
    tensors: dict[str, Any] = {"b1": b1, "b2": b2, "a1": a1, "a2": a2, "a3": a3, "a4": a4}
    tensors |= {"state[0]": before1, "state[1]": before2}
    check_floating(**tensors)
    full, broadcast = "b i d n", "b i d? n?"
    held = full if state_index is None else "s i d n"
    layouts = (full, full, broadcast, broadcast, broadcast, broadcast, held, held)
    check_shapes(
        **{name: (tensor, dims) for (name, tensor), dims in zip(tensors.items(), layouts, strict=True)},
        state_index=(state_index, "b"),
    )
    check_devices(**tensors, state_index=state_index)
    check_state_index(state_index, before1.shape[0])
    double = any(tensor.dtype == torch.float64 for tensor in tensors.values())
    dtype = torch.float64 if double else torch.float32
    a1, a2, a3, a4, b1, b2, before1, before2 = (tensor.to(dtype) for tensor in (a1, a2, a3, a4, b1, b2, *state))
    if state_index is not None:
        rows = state_index.clamp(min=0).long()
        before1, before2 = before1.index_select(0, rows), before2.index_select(0, rows)
    h1 = a1 * before1 + a2 * before2 + b1
    # What h1 gives to the row below; then h2 is a recurrence along the rows.
    given = torch.cat([b2[:, :1], b2[:, 1:] + a3[:, 1:] * h1[:, :-1]], dim=1)
    h2 = linear_scan(a4.expand_as(b2).flatten(2), given.flatten(2))[0].view_as(b2)
    if state_index is not None:
        kept = (state_index >= 0)[:, None, None, None]
        h1, h2 = torch.where(kept, h1, 0.0), torch.where(kept, h2, 0.0)
    return h1, h2
