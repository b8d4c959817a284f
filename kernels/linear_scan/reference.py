"""The recurrence as a loop: h_t = a_t h_{t-1} + b_t. The definition that the other paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_scan_reference(
    a: Tensor, b: Tensor, initial_state: Tensor | None, reverse: bool, state_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """See `linear_scan`; a is (b, l, d), (b, l, 1) or (1, 1, d), b (b, l, d)."""
    batch, length, channels = b.shape
    h = b.new_zeros(batch, channels, dtype=state_dtype) if initial_state is None else initial_state.to(state_dtype)
    a = a.to(state_dtype).expand(-1, length, -1)
    order = range(length - 1, -1, -1) if reverse else range(length)
    states: list[Tensor] = [h] * length
    for t in order:
        h = a[:, t] * h + b[:, t].to(state_dtype)
        states[t] = h
    return torch.stack(states, dim=1).to(b.dtype), h
