"""The recurrence as a loop: m_t = p_t x_t + (1 - p_t) m_{t-1}. The definition that the other path is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def ema_scan_reference(x: Tensor, p: Tensor, state: Tensor, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """See `ema_scan`; p and the state have the dtype of the sums."""
    m, means = state, []
    for t in range(x.shape[1]):
        if seq_idx is not None and t > 0:
            m = torch.where((seq_idx[:, t] == seq_idx[:, t - 1])[:, None], m, torch.zeros_like(m))
        m = p[:, t, None] * x[:, t].to(m.dtype) + (1 - p[:, t, None]) * m
        means.append(m)
    return torch.stack(means, dim=1).to(x.dtype), m
