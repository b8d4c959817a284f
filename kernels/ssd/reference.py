"""The recurrence as a loop, the definition that the other paths are compared with.

H_t = e^{log_decay_t} H_{t-1} + weight_t x_t B_t^T,    y_t = H_t C_t + D_t x_t
"""

from __future__ import annotations

import torch
from torch import Tensor


def ssd_reference(
    x: Tensor,
    log_decay: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    weight: Tensor | None,
    D: Tensor | None,
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `ssd`; weight and D are (b, l, h), everything but x, B and C has the dtype of the state."""
    length, nheads, groups = x.shape[1], x.shape[2], B.shape[2]
    dtype = state.dtype
    v = x.to(dtype) if weight is None else x.to(dtype) * weight[..., None]
    B, C = (part.to(dtype).repeat_interleave(nheads // groups, dim=2) for part in (B, C))
    outputs = []
    for t in range(length):
        if seq_idx is not None and t > 0:
            same = seq_idx[:, t] == seq_idx[:, t - 1]
            state = torch.where(same[:, None, None, None], state, torch.zeros_like(state))
        state = log_decay[:, t].exp()[..., None, None] * state + v[:, t, :, :, None] * B[:, t, :, None]
        outputs.append((state * C[:, t, :, None]).sum(-1))  # no matrix product: autocast would round it
    y = torch.stack(outputs, dim=1)
    if D is not None:
        y = y + D[..., None] * x.to(dtype)
    return y.to(x.dtype), state
