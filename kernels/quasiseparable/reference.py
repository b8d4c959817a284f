"""Both recurrences as loops, the definition that the other paths are compared with.

H^f_t = e^{a^f_t} H^f_{t-1} + w^f_t x_t B^f_t^T,    H^b_t = e^{a^b_t} H^b_{t+1} + w^b_t x_t B^b_t^T
y_t = H^f_{t-1} C^f_{t-1} + H^b_{t+1} C^b_{t+1} + diag_t x_t
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Side(NamedTuple):
    """One of the two recurrences."""

    log_decay: Tensor  # (b, l, h)
    weight: Tensor | None  # (b, l, h)
    B: Tensor  # (b, l, g, n)
    C: Tensor  # (b, l, g, n)


def quasiseparable_reference(
    x: Tensor, forward: Side, backward: Side, diag: Tensor, state: Tensor, shift: bool, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See `quasiseparable`; x (b, l, h, p), decays, weights, diag and state (2, b, h, p, n) are of one wide dtype."""
    length = x.shape[1]
    from_left, left = _read(x, forward, state[0], range(length), seq_idx)
    from_right, right = _read(x, backward, state[1], range(length - 1, -1, -1), seq_idx)
    outputs = []
    for t in range(length):
        y = diag[:, t, :, None] * x[:, t]
        for read, s in ((from_left, t - 1), (from_right, t + 1)):
            if not shift:
                y = y + read[t]
            elif 0 <= s < length:
                y = y + (read[s] if seq_idx is None else _where_same(seq_idx, s, t, read[s]))
        outputs.append(y)
    return torch.stack(outputs, dim=1), torch.stack([left, right])


def _read(
    x: Tensor, side: Side, state: Tensor, order: range, seq_idx: Tensor | None
) -> tuple[dict[int, Tensor], Tensor]:
    """H_t C_t of every position, and the state that the recurrence ends with."""
    repeats = x.shape[2] // side.B.shape[2]
    B, C = (part.to(x.dtype).repeat_interleave(repeats, dim=2) for part in (side.B, side.C))
    v = x if side.weight is None else x * side.weight[..., None]
    read: dict[int, Tensor] = {}
    for t in order:
        if seq_idx is not None and read:
            state = _where_same(seq_idx, t - order.step, t, state)
        state = side.log_decay[:, t].exp()[..., None, None] * state + v[:, t, :, :, None] * B[:, t, :, None]
        read[t] = (state * C[:, t, :, None]).sum(-1)  # no matrix product: autocast would round it
    return read, state


def _where_same(seq_idx: Tensor, s: int, t: int, value: Tensor) -> Tensor:
    """The value where two positions are of one sequence, else zero."""
    same = (seq_idx[:, s] == seq_idx[:, t]).unflatten(0, (-1, *[1] * (value.dim() - 1)))
    return torch.where(same, value, torch.zeros_like(value))
