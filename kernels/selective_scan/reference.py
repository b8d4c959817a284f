"""The selective scan as a loop over positions. The definition that the other paths are compared with."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def selective_scan_reference(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """See `selective_scan`; B and C are (b, l, g, n), A and the initial state have the dtype of the states."""
    batch, _, channels = u.shape
    repeats = channels // B.shape[2]
    wide_u, wide_dt = (x.to(A.dtype).real for x in (u, dt))
    decay = torch.exp(wide_dt[..., None] * A)  # (b, l, d, n)
    inputs = (wide_dt * wide_u)[..., None] * B.to(A.dtype).repeat_interleave(repeats, dim=2)
    h = A.new_zeros(batch, *A.shape) if initial_state is None else initial_state
    states: list[Tensor] = []
    for t, (decay_t, input_t) in enumerate(zip(decay.unbind(1), inputs.unbind(1))):
        if seq_idx is not None and t > 0:
            h = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None, None], h, torch.zeros_like(h))
        h = decay_t * h + input_t
        states.append(h)
    every, final = torch.stack(states, dim=1), h
    if window is not None and window > 1:
        every = every + _from_later(decay, inputs, seq_idx, window) - inputs
    y = (every * C.to(A.dtype).repeat_interleave(repeats, dim=2)).sum(-1)
    y = 2 * y.real if A.is_complex() else y
    if D is not None:
        y = y + D * wide_u
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype), final


def _from_later(decay: Tensor, inputs: Tensor, seq_idx: Tensor | None, window: int) -> Tensor:
    """h^R_t = decay_t h^R_{t+1} + inputs_t inside segments of `window` positions, counted from a sequence's start."""
    batch, length = inputs.shape[:2]
    linked = torch.ones(batch, length, dtype=torch.bool, device=inputs.device)  # whether t + 1 is in t's segment
    for row in range(batch):
        start = 0
        for t in range(length - 1):
            same = seq_idx is None or bool(seq_idx[row, t + 1] == seq_idx[row, t])
            linked[row, t] = same and (t + 1 - start) % window != 0
            if not same:
                start = t + 1
    h = torch.zeros_like(inputs[:, 0])
    states = [h] * length
    for t in range(length - 1, -1, -1):
        h = decay[:, t] * torch.where(linked[:, t, None, None], h, torch.zeros_like(h)) + inputs[:, t]
        states[t] = h
    return torch.stack(states, dim=1)
