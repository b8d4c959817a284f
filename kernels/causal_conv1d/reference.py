"""The convolution as a loop over positions and taps."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor | None, left: int, length: int, silu: bool
) -> Tensor:
    """y_t = act(bias + sum_i weight_i x_{t+i-left}), without terms outside of `x` or of another sequence.

    Args:
        x: (b, l', c), l' >= l; its last l positions are those of the outputs.
        weight: (c, k), float32 or float64.
        bias: (c,), like `weight`.
        seq_idx: (b, l').
        left: Index of the output whose first tap is x_0.
        length: Number of outputs, l.
        silu: Whether act is SiLU.
    """
    extra = x.shape[1] - length
    wide = x.to(weight.dtype)
    outputs = []
    for t in range(length):
        y = torch.zeros_like(wide[:, 0]) if bias is None else bias.expand_as(wide[:, 0])
        for i in range(weight.shape[1]):
            s = t + i - left
            if not 0 <= s < x.shape[1]:
                continue
            term = weight[:, i] * wide[:, s]
            if seq_idx is not None:
                term = torch.where((seq_idx[:, s] == seq_idx[:, t + extra])[:, None], term, torch.zeros_like(term))
            y = y + term
        outputs.append(F.silu(y) if silu else y)
    return torch.stack(outputs, dim=1).to(x.dtype)
